"""Registers our algorithms, their search spaces and their hyper-parameter files with rl_zoo3."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rl_zoo3 import exp_manager
from rl_zoo3.hyperparams_opt import HYPERPARAMS_CONVERTER, HYPERPARAMS_SAMPLER
from rl_zoo3.utils import ALGOS
from stable_baselines3.common.base_class import BaseAlgorithm

from sb3_ppo_ext import REINFORCE, TRPO, AdaptiveKLPPO, DualClipPPO
from sb3_ppo_ext.zoo.search_spaces import CONVERTERS, SAMPLERS

ALGORITHMS: dict[str, type[BaseAlgorithm]] = {
    "dual_clip_ppo": DualClipPPO,
    "adaptive_kl_ppo": AdaptiveKLPPO,
    "trpo_ext": TRPO,
    "reinforce": REINFORCE,
}


def register() -> None:
    """
    Make our algorithms, their search spaces and their configurations known to all modules of rl_zoo3.

    Calling it again changes nothing. Algorithms, samplers and converters that rl_zoo3 already has are never replaced,
    so you can add your own sampler and converter first, to search your own space.
    """
    for key, algorithm in ALGORITHMS.items():
        known = ALGOS.get(key, algorithm)
        if known is not algorithm:
            raise ValueError(
                f"rl_zoo3 already has an algorithm under the key '{key}': {known.__module__}.{known.__qualname__}. "
                f"It is not replaced by {algorithm.__module__}.{algorithm.__qualname__}; remove one of the two."
            )
    ALGOS.update(ALGORITHMS)
    for key in ALGORITHMS:
        HYPERPARAMS_SAMPLER.setdefault(key, SAMPLERS[key])
        HYPERPARAMS_CONVERTER.setdefault(key, CONVERTERS[key])
    init = exp_manager.ExperimentManager.__init__
    if not hasattr(init, "finds_our_configurations"):
        exp_manager.ExperimentManager.__init__ = _finding_our_configurations(init)  # type: ignore[method-assign]


def _finding_our_configurations(init: Callable[..., None]) -> Callable[..., None]:
    """
    :param init: constructor of rl_zoo3's manager, which looks for all configurations in rl_zoo3's own folder
    :return: a constructor that finds the configurations of our algorithms
    """

    @functools.wraps(init)
    def wrapper(self: exp_manager.ExperimentManager, *arguments: Any, **options: Any) -> None:
        init(self, *arguments, **options)
        theirs = Path(exp_manager.__file__).parent / "hyperparams" / f"{self.algo}.yml"
        if self.algo in ALGORITHMS and Path(self.config) == theirs:
            self.config = str(config_path(self.algo))

    wrapper.finds_our_configurations = True  # type: ignore[attr-defined]
    return wrapper


def config_path(key: str) -> Path:
    """
    :param key: an algorithm's key, e.g. ``dual_clip_ppo``
    :return: its YAML file: inside an installed wheel, or beside the package in a source tree
    """
    in_wheel = Path(__file__).parent / "configs"
    in_source_tree = Path(__file__).parents[2] / "zoo_configs"
    for folder in (in_wheel, in_source_tree):
        path = folder / f"{key}.yml"
        if path.is_file():
            return path
    raise FileNotFoundError(f"There is no {key}.yml, neither in {in_wheel} nor in {in_source_tree}.")
