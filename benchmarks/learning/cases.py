"""What is trained on what, for how many steps, with which seeds and hyper-parameters, and in which order."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import rl_zoo3
import yaml

from benchmarks.learning.algorithm import Algorithm
from benchmarks.learning.arms import ARMS
from benchmarks.learning.conditions import Condition
from sb3_ppo_ext.zoo import ALGORITHMS as OURS
from sb3_ppo_ext.zoo import config_path

_COMPILED = {"torch_compile": True}

ALGORITHMS = {
    "dual_clip_ppo": Algorithm("DualClipPPO", "dual_clip_ppo", _COMPILED),
    "sb3_ppo": Algorithm("SB3 PPO", "ppo"),
    # Equal to SB3's to 1e-7 (tests/parity/test_sb3_ppo.py), and run where SB3's is not.
    "ppo": Algorithm("PPO (ours, dual_clip=None)", "dual_clip_ppo", {**_COMPILED, "dual_clip": None}),
    "adaptive_kl_ppo": Algorithm("AdaptiveKLPPO", "adaptive_kl_ppo", _COMPILED),
    "trpo": Algorithm("TRPO", "trpo_ext", _COMPILED),
    "contrib_trpo": Algorithm("sb3-contrib TRPO", "trpo"),
    "reinforce": Algorithm("REINFORCE", "reinforce", _COMPILED),
    "a2c": Algorithm("SB3 A2C", "a2c"),
}

# Steps of the small tasks. zoo_configs/ has them, one number for each algorithm; here all algorithms have the number
# that most of the entries have. MountainCarContinuous-v0 has the largest: the other, 20 000, is ten rollouts.
SMALL = {
    "CartPole-v1": 100_000,
    "Acrobot-v1": 100_000,
    "Pendulum-v1": 100_000,
    "MountainCarContinuous-v0": 100_000,
    "LunarLander-v3": 1_000_000,
}
MUJOCO = dict.fromkeys(
    ("HalfCheetah-v5", "Hopper-v5", "Walker2d-v5", "Swimmer-v5", "Ant-v5", "InvertedDoublePendulum-v5"), 1_000_000
)
BUDGETS = {**SMALL, **MUJOCO, "Humanoid-v5": 1_000_000}

_WITH_SB3 = ("LunarLander-v3", "HalfCheetah-v5", "Hopper-v5")
_TUNED = ("HalfCheetah-v5", "Hopper-v5", "Walker2d-v5")
_CORE = ("dual_clip_ppo", "sb3_ppo", "trpo", "contrib_trpo")
_BOTH = (*SMALL, *MUJOCO)

# By set of hyper-parameters: on which environments an algorithm is run.
SUITE: dict[str, dict[str, tuple[str, ...]]] = {
    "defaults": {
        "dual_clip_ppo": _BOTH,
        "sb3_ppo": _WITH_SB3,
        "trpo": _BOTH,
        "contrib_trpo": _BOTH,
        "adaptive_kl_ppo": (*_BOTH, "Humanoid-v5"),
        "ppo": tuple(env for env in (*_BOTH, "Humanoid-v5") if env not in _WITH_SB3),
        "reinforce": tuple(SMALL),
        "a2c": tuple(SMALL),
    },
    "tuned": dict.fromkeys(_CORE, _TUNED),
}
SEEDS = {"defaults": 10, "tuned": 5}
_SEEDS_OF_ENV = {"Humanoid-v5": 3}


class Run(NamedTuple):
    """
    :param set: of hyper-parameters, a key of :data:`SUITE`, or that of a :class:`Condition` of old data
    :param env: id of the environment
    :param algo: a key of :data:`ALGORITHMS`, or, of old data, of :data:`ARMS`
    :param seed: of the training
    """

    set: str
    env: str
    algo: str
    seed: int

    def __str__(self) -> str:
        return f"{self.set}, {self.env}, {self.algorithm.label}, seed {self.seed}"

    @property
    def algorithm(self) -> Algorithm:
        """What it trains with."""
        return (ARMS if Condition.of_set(self.set) else ALGORITHMS)[self.algo]

    def path(self, folder: Path) -> Path:
        """:param folder: of the results of one set"""
        return folder / self.env / f"{self.algo}-{self.seed}.json"


def suite(
    name: str, algos: Iterable[str] | None = None, envs: Iterable[str] | None = None, seeds: int | None = None
) -> list[Run]:
    """
    The runs, in an order in which what is there is worth reading at any time: five seeds of the comparison with
    the peers, five of the rest, then the other seeds of both.

    :param name: a key of :data:`SUITE`
    :param algos: None: all
    :param envs: None: each algorithm's; if both are given, each of one is run on each of the other
    :param seeds: 0, 1, ...: how many; None: :data:`SEEDS`
    """
    of_algo = SUITE[name]
    n_seeds = {env: seeds or min(SEEDS[name], _SEEDS_OF_ENV.get(env, SEEDS[name])) for env in BUDGETS}
    wanted_algos, wanted_envs = list(algos or of_algo), list(envs or BUDGETS)
    runs = [
        Run(name, env, algo, seed)
        for env in BUDGETS
        for algo in ALGORITHMS
        if algo in wanted_algos and env in wanted_envs
        if (algos and envs) or env in of_algo.get(algo, ())
        for seed in range(n_seeds[env])
    ]
    return sorted(runs, key=lambda run: (run.seed // 5, run.algo not in _CORE, run.seed))


def entry(run: Run, overrides: dict[str, Any]) -> dict[str, Any]:
    """
    :param run: to be made
    :param overrides: what it has in place of the set's hyper-parameters
    :return: its hyper-parameters, as rl_zoo3's configurations have them; the rest are the constructor's defaults
    """
    algorithm = run.algorithm
    values: dict[str, Any] = {"policy": "MlpPolicy", "normalize": True, "n_envs": 1}
    condition = Condition.of_set(run.set)
    if condition is not None:
        return {**values, **algorithm.entry, **condition.entry(run.algo), **overrides}
    if run.set == "tuned":
        values |= _tuned_entry(run.env, algorithm.zoo)
    return {**values, "n_timesteps": BUDGETS[run.env], **algorithm.entry, **overrides}


def _tuned_entry(env: str, zoo: str) -> dict[str, Any]:
    """RL Zoo's entry, which is that of version 4 of the environment; of ours, what zoo_configs/ makes of it."""
    if zoo in OURS:
        path, key = config_path(zoo), env
    else:
        path, key = Path(rl_zoo3.__file__).parent / "hyperparams" / f"{zoo}.yml", env.replace("-v5", "-v4")
    found: dict[str, Any] = yaml.safe_load(path.read_text())[key]
    return found
