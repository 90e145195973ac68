"""
``sb3-ppo-ext study``: what a search for hyper-parameters needs besides rl_zoo3's and Optuna's own commands.

Nothing is imported here: :mod:`sb3_ppo_ext.zoo.experiment` needs the lowest of these modules, and most of the others
need it.
"""
