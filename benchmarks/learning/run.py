"""One training, with what is kept of it."""

from __future__ import annotations

import inspect
import json
import math
import os
import statistics
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch as th
from rl_zoo3.utils import ALGOS
from stable_baselines3.common.callbacks import EvalCallback
from stable_baselines3.common.vec_env import VecEnv

from benchmarks.cases import ROOT
from benchmarks.learning.arms import BOUNDS, register_arms
from benchmarks.learning.cases import Run
from benchmarks.machine import commit, peak_mib, processor, versions
from benchmarks.zoo import quiet_experiment
from sb3_ppo_ext.common.saving.files import write_whole
from sb3_ppo_ext.zoo import register

N_EVALUATIONS = 50  # one every 2 % of the steps
N_EPISODES = 10
_PACKAGES = ("sb3-ppo-ext", "torch", "stable-baselines3", "sb3-contrib", "rl_zoo3", "gymnasium", "mujoco", "numpy")
# What the algorithms log of their updates and is kept.
_LOGGED = (
    "approx_kl",
    "clip_fraction",
    "dual_clip_fraction",
    "end_ratio_max",
    *(f"end_cut_{what}_{bound:g}" for what in ("share", "gradient") for bound in BOUNDS),
    "explained_variance",
    "grad_norm",
    "is_line_search_success",
    "kl",
    "kl_coef",
    "kl_divergence_loss",
    "ratio_max",
    "std",
    "target_kl",
)
# The arguments of constructors that are no hyper-parameters.
_NO_HYPER_PARAMETERS = {"self", "env", "tensorboard_log", "verbose", "seed", "device", "stats_window_size"}


def processor_seconds() -> float:
    """Seconds of processor time, of this process and of those it has waited for: torch starts a C++ compiler."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


class LearningCurve(EvalCallback):
    """
    Evaluates like SB3's callback, and keeps what lies between two evaluations: returns of training episodes, what the
    updates logged, and seconds, without those of the evaluations.

    :param eval_env: environments that the episodes are shared among
    :param eval_freq: calls from one evaluation to the next
    :param folder: for the file that SB3's callback writes
    """

    def __init__(self, eval_env: VecEnv, eval_freq: int, folder: str) -> None:
        super().__init__(eval_env, n_eval_episodes=N_EPISODES, eval_freq=eval_freq, log_path=folder, verbose=0)
        self.process_seconds: list[float] = []
        self.wall_seconds: list[float] = []
        self.training_returns: list[float | None] = []
        self.training_episodes: list[int] = []
        self.logged: dict[str, list[float | None]] = defaultdict(list)
        self.rollouts: list[tuple[int, float]] = []  # steps and process seconds at the start of each
        self.evaluation_seconds = 0.0
        self._evaluation_wall_seconds = 0.0
        self._returns: list[float] = []
        self._updates: dict[str, list[float]] = defaultdict(list)

    def _on_training_start(self) -> None:
        self._start, self._wall_start = processor_seconds(), time.perf_counter()

    def _on_rollout_start(self) -> None:
        self.rollouts.append((self.num_timesteps, self.training_seconds()))
        for name in _LOGGED:  # the logger still has what the last update told it
            value = self.logger.name_to_value.get(f"train/{name}")
            if value is not None:
                self._updates[name].append(float(value))

    def _on_training_end(self) -> None:
        self._on_rollout_start()

    def training_seconds(self) -> float:
        """Seconds of processor time so far, without those of the evaluations."""
        return processor_seconds() - self._start - self.evaluation_seconds

    def _on_step(self) -> bool:
        for info in self.locals["infos"]:
            if "episode" in info:
                self._returns.append(float(info["episode"]["r"]))
        if self.n_calls % self.eval_freq or len(self.process_seconds) == N_EVALUATIONS:
            return True
        self.process_seconds.append(round(self.training_seconds(), 2))
        self.wall_seconds.append(round(time.perf_counter() - self._wall_start - self._evaluation_wall_seconds, 2))
        self.training_returns.append(_mean(self._returns))
        self.training_episodes.append(len(self._returns))
        for name in _LOGGED:
            values = self._updates[name]
            self.logged[name].append(rounded(max(values)) if values and name.endswith("_max") else _mean(values))
        self._returns, self._updates = [], defaultdict(list)
        start, wall_start = processor_seconds(), time.perf_counter()
        goes_on = super()._on_step()
        self.evaluation_seconds += processor_seconds() - start
        self._evaluation_wall_seconds += time.perf_counter() - wall_start
        return goes_on

    def compile_seconds(self) -> float:
        """What the first two iterations took above what as many steps take later."""
        iterations = [
            (steps - steps_before, seconds - seconds_before)
            for (steps_before, seconds_before), (steps, seconds) in zip(self.rollouts, self.rollouts[1:], strict=False)
        ]
        if len(iterations) < 3:
            return math.nan
        per_step = statistics.median(seconds / steps for steps, seconds in iterations[2:])
        return sum(seconds - steps * per_step for steps, seconds in iterations[:2])

    def record(self) -> dict[str, Any]:
        """What is to be kept."""
        return {
            "evaluation": {
                "steps": self.evaluations_timesteps,
                "mean": [rounded(statistics.fmean(returns)) for returns in self.evaluations_results],
                "std": [rounded(statistics.pstdev(returns)) for returns in self.evaluations_results],
                "length": [rounded(statistics.fmean(lengths)) for lengths in self.evaluations_length],
                "seconds": round(self.evaluation_seconds, 1),
            },
            "seconds": {"process": self.process_seconds, "wall": self.wall_seconds},
            "training": {"return": self.training_returns, "episodes": self.training_episodes},
            "log": {name: values for name, values in self.logged.items() if any(v is not None for v in values)},
        }


def make_run(run: Run, hyper_parameters: dict[str, Any], path: Path) -> None:
    """
    Train, in this process, and write the file of the run, whole or not at all.

    :param run: to be made
    :param hyper_parameters: as rl_zoo3's configurations have them
    :param path: of its file, in a folder that is there
    """
    th.set_num_threads(1)
    register()
    register_arms()
    zoo = run.algorithm.zoo
    compiled = bool(hyper_parameters.get("torch_compile"))
    with quiet_experiment(zoo, run.env, hyper_parameters, run.seed) as (manager, model, folder):
        eval_env = manager.create_envs(N_EPISODES, eval_env=True)
        eval_env.seed(10_000 + run.seed)  # other first states than the training's
        eval_freq = max(int(manager.n_timesteps / N_EVALUATIONS) // manager.n_envs, 1)
        curve = LearningCurve(eval_env, eval_freq, folder)
        model.learn(manager.n_timesteps, callback=curve)
        steps, seconds = curve.rollouts[-1]
        eval_env.close()
        assert model.env is not None
        model.env.close()
    record = {
        **run._asdict(),
        "entry": hyper_parameters,
        "hyper_parameters": _as_used(zoo, hyper_parameters, model.logger.name_to_value),
        "commit": commit(ROOT),
        "versions": versions(_PACKAGES),
        "processor": processor(),
        "peak_mib": round(peak_mib()),
        "total": {
            "steps": steps,
            "process_seconds": round(seconds, 1),
            "compile_seconds": rounded(curve.compile_seconds()) if compiled else 0.0,
        },
        **curve.record(),
    }
    write_whole(path, memoryview(_as_text(record).encode()))


def _as_used(zoo: str, entry: dict[str, Any], logged: dict[str, Any]) -> dict[str, Any]:
    """The arguments of the constructor: those of the entry, and for the rest its defaults."""
    parameters = inspect.signature(ALGOS[zoo]).parameters
    used = {
        name: entry.get(name, parameter.default)
        for name, parameter in parameters.items()
        if name not in _NO_HYPER_PARAMETERS and not name.startswith("_")
    }
    for name in ("target_kl", "cg_damping"):  # None stands for a number that depends on the environment
        if name in used and used[name] is None and f"train/{name}" in logged:
            used[name] = rounded(float(logged[f"train/{name}"]))
    return used


def rounded(number: float) -> float | None:
    """:param number: of which five digits are kept; None takes the place of one that is not finite"""
    return float(f"{number:.5g}") if math.isfinite(number) else None


def _mean(numbers: list[float]) -> float | None:
    return rounded(statistics.fmean(numbers)) if numbers else None


def _as_text(record: dict[str, Any]) -> str:
    """JSON, with a line for each list of numbers."""
    lines = []
    for name, value in record.items():
        if isinstance(value, dict) and any(isinstance(v, list) for v in value.values()):
            inner = ",\n".join(f"  {json.dumps(key)}: {_compact(v)}" for key, v in value.items())
            lines.append(f" {json.dumps(name)}: {{\n{inner}\n }}")
        else:
            lines.append(f" {json.dumps(name)}: {json.dumps(value)}")
    return "{\n" + ",\n".join(lines) + "\n}\n"


def _compact(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"))
