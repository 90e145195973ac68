"""
``sb3-ppo-ext study``: additions to rl_zoo3's and Optuna's own commands for a hyper-parameter search.

Nothing is imported here: :mod:`sb3_ppo_ext.zoo.experiment` imports the lowest of these modules, and most of the others
import it.
"""
