"""Use of our algorithms and their hyper-parameters with the commands of rl_zoo3."""

try:
    import rl_zoo3  # noqa: F401
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f'sb3_ppo_ext.zoo needs rl_zoo3, and {error.name} is missing: pip install "sb3-ppo-ext[zoo]"',
        name=error.name,
    ) from error

from sb3_ppo_ext.zoo.experiment import ZooExperimentManager
from sb3_ppo_ext.zoo.registration import ALGORITHMS, config_path, register

__all__ = ["ALGORITHMS", "ZooExperimentManager", "config_path", "register"]
