"""
What does an update do? How far it moves the policy, what it costs, and how much its step size matters.

    python -m benchmarks.updates
    python -m benchmarks.updates --env Pendulum-v1 --steps 20000 --seeds 1 --out /tmp/trial

All algorithms are trained with their documented defaults, in one environment with VecNormalize. After each update, the
KL divergence of the new policy from the one that collected the rollout is computed on the observations of the rollout,
by torch.distributions and in the same way for all. The step size is ``learning_rate`` or ``target_kl``, whichever says
how far an update goes. Seconds are of processor time and of one thread.
"""

from __future__ import annotations

import argparse
import copy
import csv
import functools
import math
import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import sb3_contrib
import stable_baselines3 as sb3
import torch as th
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.vec_env import VecNormalize

from benchmarks.machine import commit, peak_mib, processor, reset_peak, versions
from benchmarks.report import command_line, table
from sb3_ppo_ext import REINFORCE, TRPO, AdaptiveKLPPO, DualClipPPO

SCALES = (1 / 3, 1.0, 3.0)
_N_EPISODES = 20  # the last ones of a training, whose mean return is reported


class Side(NamedTuple):
    """
    :param name: in the tables
    :param algorithm: its class
    :param kwargs: of its constructor, where they are not the defaults
    :param step_size: the argument that says how far an update goes; None: it is not varied
    """

    name: str
    algorithm: type[OnPolicyAlgorithm]
    kwargs: dict[str, Any]
    step_size: str | None = None

    @property
    def is_ours(self) -> bool:
        """Whether it can be compiled."""
        return self.algorithm.__module__.startswith("sb3_ppo_ext")


SIDES = [
    Side("PPO", DualClipPPO, {"dual_clip": None}, "learning_rate"),
    Side("AdaptiveKLPPO", AdaptiveKLPPO, {}, "target_kl"),
    Side("TRPO", TRPO, {}, "target_kl"),
    Side("REINFORCE", REINFORCE, {}, "learning_rate"),
    Side("SB3 PPO", sb3.PPO, {}),
    Side("SB3 A2C", sb3.A2C, {}),
    Side("sb3-contrib TRPO", sb3_contrib.TRPO, {}),
]


class Measured(NamedTuple):
    """
    What a training was measured to do; lists have a number for each update.

    :param kl: KL(old || new), the mean over the observations of the rollout
    :param largest_kl: the same, in the state where it is largest
    :param passes: backward passes
    :param seconds: of processor time
    :param extra_mib: memory that the updates took above what there was before them
    :param samples: in the last rollout
    :param step_size: the value of the argument
    :param target_kl: what the update was told to keep to, if it was told
    :param mean_return: of the last episodes
    """

    kl: list[float]
    largest_kl: list[float]
    passes: list[int]
    seconds: list[float]
    extra_mib: float
    samples: int
    step_size: float
    target_kl: float | None
    mean_return: float


class Watch(BaseCallback):
    """Measures each update, from the end of its rollout to the beginning of the next."""

    def __init__(self) -> None:
        super().__init__()
        self.kl: list[float] = []
        self.largest_kl: list[float] = []
        self.passes: list[int] = []
        self.seconds: list[float] = []
        self.extra_mib = 0.0
        self.samples = 0
        self._old_policy: Any = None
        self._n_passes = 0

    def counted(self, backward: Callable[..., Any]) -> Callable[..., Any]:
        """:param backward: a function of torch's, of which a call is one backward pass"""

        @functools.wraps(backward)
        def call(*args: Any, **kwargs: Any) -> Any:
            self._n_passes += 1
            return backward(*args, **kwargs)

        return call

    def _on_step(self) -> bool:
        return True

    def _on_rollout_end(self) -> None:
        assert isinstance(self.model, OnPolicyAlgorithm)
        buffer = self.model.rollout_buffer
        observations = np.asarray(buffer.observations)[: buffer.pos]
        self._observations = th.as_tensor(observations.reshape(-1, *observations.shape[2:]))
        self.samples = len(self._observations)
        self._old_policy = copy.deepcopy(self.model.policy)
        self._n_passes = 0
        reset_peak()
        self._mib = peak_mib()
        self._start = time.process_time()

    def _on_rollout_start(self) -> None:
        if self._old_policy is None:
            return
        self.seconds.append(time.process_time() - self._start)
        self.extra_mib = max(self.extra_mib, peak_mib() - self._mib)
        self.passes.append(self._n_passes)
        kl = kl_divergence(self._old_policy, self.model.policy, self._observations)
        self.kl.append(kl.mean().item())
        self.largest_kl.append(kl.max().item())
        self._old_policy = None

    def _on_training_end(self) -> None:
        self._on_rollout_start()


@th.no_grad()
def kl_divergence(old: Any, new: Any, observations: th.Tensor) -> th.Tensor:
    """
    KL(old || new) of the whole action in each state.

    :param old: a policy
    :param new: another one, with distributions of the same kind
    :param observations: of the states
    :return: shape ``(n,)``
    """
    distributions = [policy.get_distribution(observations).distribution for policy in (old, new)]
    kl = th.distributions.kl_divergence(*distributions)
    return kl.reshape(len(observations), -1).sum(dim=1)


def measured(
    side: Side, env: str, steps: int, seed: int, *, compiled: bool = False, step_size: float | None = None
) -> Measured:
    """
    :param side: which is trained
    :param env: id of the environment
    :param steps: of the training
    :param seed: of the training
    :param compiled: whether its update is compiled
    :param step_size: the value of the argument; None: its default
    """
    th.set_num_threads(1)
    kwargs = dict(side.kwargs)
    if compiled:
        kwargs["torch_compile"] = True
    if step_size is not None:
        assert side.step_size is not None
        kwargs[side.step_size] = step_size
    vec_env = VecNormalize(make_vec_env(env, 1))
    model = side.algorithm("MlpPolicy", vec_env, seed=seed, device="cpu", **kwargs)
    watch = Watch()
    with (
        mock.patch.object(th.Tensor, "backward", watch.counted(th.Tensor.backward)),
        mock.patch.object(th.autograd, "grad", watch.counted(th.autograd.grad)),
    ):
        model.learn(steps, callback=watch, log_interval=10**9)
    returns = [info["r"] for info in model.ep_info_buffer or ()]
    target_kl = model.logger.name_to_value.get("train/target_kl")
    if isinstance(model, sb3_contrib.TRPO):  # whose KL is the mean over the dimensions of an action
        target_kl = model.target_kl * math.prod(model.action_space.shape or ())
    used: float | None = step_size if step_size is not None else getattr(model, side.step_size or "learning_rate")
    if used is None:  # the default depends on the environment
        assert target_kl is not None
        used = target_kl
    return Measured(
        watch.kl,
        watch.largest_kl,
        watch.passes,
        watch.seconds,
        watch.extra_mib,
        watch.samples,
        float(used),
        target_kl,
        statistics.fmean(returns[-_N_EPISODES:]) if returns else math.nan,
    )


def in_process_of_its_own(*args: Any, **kwargs: Any) -> Measured:
    """What :func:`measured` gives; what one training leaves in memory does not help the next."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(measured, *args, **kwargs).result()


class Row(NamedTuple):
    """
    :param side: that was measured
    :param eager: a training at the defaults, the shorter if the side can be compiled
    :param by_scale: for each of :data:`SCALES`, trainings by different seeds; for a peer, its one training
    """

    side: Side
    eager: Measured
    by_scale: dict[float, list[Measured]]

    @property
    def at_defaults(self) -> list[Measured]:
        return self.by_scale[1.0]


def measure_side(side: Side, env: str, steps: int, n_seeds: int) -> Row:
    """
    :param side: which is trained
    :param env: id of the environment
    :param steps: of a training
    :param n_seeds: trainings at each step size
    """
    if not side.is_ours:
        alone = in_process_of_its_own(side, env, steps, 0)
        return Row(side, alone, {1.0: [alone]})
    eager = in_process_of_its_own(side, env, steps // 4, 0)
    by_scale = {
        scale: [
            in_process_of_its_own(
                side, env, steps, seed, compiled=True, step_size=None if scale == 1.0 else scale * eager.step_size
            )
            for seed in range(n_seeds)
        ]
        for scale in SCALES
    }
    return Row(side, eager, by_scale)


def _how_far(row: Row) -> list[str]:
    kl = np.concatenate([run.kl for run in row.at_defaults])
    largest = np.concatenate([run.largest_kl for run in row.at_defaults])
    target = row.at_defaults[0].target_kl
    above = "" if target is None else f"{(kl > target).mean():.0%}"
    return [
        row.side.name,
        "none" if target is None else f"{target:.3g}",
        f"{kl.mean():.2g}",
        f"{kl.max():.2g}",
        above,
        f"{np.median(largest):.2g}",
    ]


def _what_it_costs(row: Row) -> list[str]:
    eager, seconds = row.eager, np.concatenate([run.seconds for run in row.at_defaults])
    per_sample = 1e6 / eager.samples
    return [
        row.side.name,
        f"{eager.samples}",
        f"{statistics.median(eager.passes):.0f}",
        f"{statistics.median(eager.seconds) * per_sample:.0f}",
        f"{np.median(seconds) * per_sample:.0f}" if row.side.is_ours else "",
        f"{eager.extra_mib:.0f}",
    ]


def _tuning(row: Row) -> list[str]:
    means = [statistics.fmean(run.mean_return for run in runs) for runs in row.by_scale.values()]
    return [
        row.side.name,
        f"`{row.side.step_size}={row.at_defaults[0].step_size:.3g}`",
        *(f"{mean:,.0f}" for mean in means),
    ]


_HOW_FAR = """\
KL(old || new) of the whole action, after each update. *Target*: what the update is told to keep to; for TRPO it is a
bound of the mean. *In one state*: in the state of the rollout where it is largest, the median over the updates."""

_COSTS = """\
*Backward passes* of the median update: of PPO and AdaptiveKLPPO each is of a minibatch, of A2C and REINFORCE of the
rollout (and of minibatches for a critic), and TRPO has both: the rollout for the gradient and two for each product with
the Fisher matrix, minibatches for the critic. *Memory*: the most that an update took above what there was before it."""

_TUNING = """\
The mean return of the last 20 training episodes, with a third of the step size, with the default, and with three times
as much."""


def write_page(rows: Sequence[Row], about: Sequence[str], out: Path) -> None:
    """
    :param rows: what was measured
    :param about: the first lines of the page
    :param out: folder
    """
    varied = [row for row in rows if row.side.step_size]
    n_seeds = max(len(row.at_defaults) for row in rows)
    how_far = ["algorithm", "target", "mean", "largest update", "above target", "in one state"]
    costs = ["algorithm", "samples", "backward passes", "us a sample, default", "compiled", "MiB"]
    tuning = ["algorithm", "step size", "a third", "default", "three times"]
    blocks = [
        about,
        ["## How far an update goes"],
        [_HOW_FAR],
        table(how_far, map(_how_far, rows)),
        ["## What it costs"],
        [_COSTS],
        table(costs, map(_what_it_costs, rows)),
        ["## How much the step size matters"],
        [f"{_TUNING} Trainings of each: {n_seeds}."],
        table(tuning, map(_tuning, varied)),
    ]
    out.mkdir(parents=True, exist_ok=True)
    (out / "updates.md").write_text("\n\n".join("\n".join(block) for block in blocks) + "\n")
    with (out / "updates.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["side", "scale", "seed", "updates", "mean_kl", "max_kl", "median_kl_in_one_state", "return"])
        for row in rows:
            for scale, runs in row.by_scale.items():
                for seed, run in enumerate(runs):
                    numbers = np.mean(run.kl), max(run.kl), np.median(run.largest_kl), run.mean_return
                    cells = [f"{number:.4g}" for number in (scale, *numbers)]
                    writer.writerow([row.side.name, cells[0], seed, len(run.kl), *cells[1:]])


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--env", default="HalfCheetah-v5", help="id of the environment")
    parser.add_argument("--steps", type=int, default=100_000, help="of a training")
    parser.add_argument("--seeds", type=int, default=3, help="trainings of ours at each step size")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), help="folder for the results")
    args = parser.parse_args(arguments)
    rows = []
    for side in SIDES:
        rows.append(measure_side(side, args.env, args.steps, args.seeds))
        print(" | ".join(_how_far(rows[-1])), "|", " | ".join(_what_it_costs(rows[-1])[1:]), flush=True)
    packages = versions(["torch", "stable-baselines3", "sb3-contrib", "gymnasium", "mujoco"])
    about = [
        f"# What an update does, {args.env}",
        "",
        f"`{command_line('updates', sys.argv[1:] if arguments is None else arguments)}`",
        "",
        f"{processor()}; {', '.join(' '.join(pair) for pair in packages.items())}; commit "
        f"{commit(Path(__file__).parents[1])}",
        "",
        f"{args.steps} steps, the documented defaults, VecNormalize, one environment. Peers are trained once.",
    ]
    write_page(rows, about, args.out)


if __name__ == "__main__":
    main()
