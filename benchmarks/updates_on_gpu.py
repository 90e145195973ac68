"""
What does a GPU do in an update? How long an update takes there and on the CPU, and how much of it the GPU works.

    python -m benchmarks.updates_on_gpu

The algorithms, environment and hyper-parameters are those of ``benchmarks.updates``: small networks and the documented
defaults. Seconds are of the wall clock, because the CPU waits for the GPU. *GPU works* is the time of its kernels and
copies, by torch's profiler, in per cent of an update; profiling prolongs the update, so the share is a lower bound.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch as th
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import VecNormalize
from torch.profiler import ProfilerActivity, profile

from benchmarks.machine import commit, processor, versions
from benchmarks.report import command_line, table
from benchmarks.updates import SIDES, Side

_WARM_UPS = 2


class Update(NamedTuple):
    """
    :param seconds: of the median update
    :param samples: that it learns from
    :param busy: share of an update in which the device works; 0 on the CPU
    :param extra_mib: memory of the device that an update takes above what there was before it
    """

    seconds: float
    samples: int
    busy: float
    extra_mib: float

    @property
    def us_a_sample(self) -> str:
        """For the table."""
        return f"{1e6 * self.seconds / self.samples:.3g}"


def measured(side: Side, env: str, device: str, *, compiled: bool, n_updates: int) -> Update:
    """
    :param side: which is trained
    :param env: id of the environment
    :param device: of the model
    :param compiled: whether its updates are compiled
    :param n_updates: that are timed; on a GPU, one more is profiled
    """
    kwargs: dict[str, Any] = {**side.kwargs, **({"torch_compile": True} if compiled else {})}
    model = side.algorithm("MlpPolicy", VecNormalize(make_vec_env(env, 1)), seed=0, device=device, **kwargs)
    train: Callable[[], None] = model.train
    n_timed = _WARM_UPS + n_updates
    seconds: list[float] = []
    samples, busy, extra_mib = 0, 0.0, 0.0

    def watched() -> None:
        nonlocal samples, busy, extra_mib
        samples = int(np.prod(np.shape(model.rollout_buffer.observations)[:2]))
        if len(seconds) < n_timed:
            seconds.append(_seconds(train, model.device))
        else:
            busy, extra_mib = _profiled(train, model.device)

    model.train = watched  # type: ignore[method-assign]
    for _ in range(n_timed + (model.device.type == "cuda")):
        model.learn(1, reset_num_timesteps=False)
    return Update(statistics.median(seconds[_WARM_UPS:]), samples, busy, extra_mib)


def _profiled(train: Callable[[], None], device: th.device) -> tuple[float, float]:
    """The share of an update in which the device works, and the memory that it takes, in MiB."""
    th.cuda.reset_peak_memory_stats()
    before = th.cuda.memory_allocated()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        seconds = _seconds(train, device)
    of_device = [event for event in profiler.events() or () if str(event.device_type).endswith("CUDA")]
    works = sum(event.time_range.elapsed_us() for event in of_device)
    return 1e-6 * works / seconds, (th.cuda.max_memory_allocated() - before) / 2**20


def _seconds(train: Callable[[], None], device: th.device) -> float:
    is_gpu = device.type == "cuda"
    if is_gpu:
        th.cuda.synchronize()
    start = time.perf_counter()
    train()
    if is_gpu:
        th.cuda.synchronize()
    return time.perf_counter() - start


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--env", default="HalfCheetah-v5", help="id of the environment")
    parser.add_argument("--updates", type=int, default=5, help="that are timed, after two others")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), help="folder for the results")
    args = parser.parse_args(arguments)
    if not th.cuda.is_available():
        parser.error("no CUDA device is there")
    th.set_num_threads(1)
    rows = []
    for side in SIDES:
        n = 100 * args.updates if side.name == "SB3 A2C" else args.updates  # its rollouts have five steps
        on_cpu = measured(side, args.env, "cpu", compiled=False, n_updates=n)
        eager = measured(side, args.env, "cuda", compiled=False, n_updates=n)
        cells = [side.name, str(eager.samples), on_cpu.us_a_sample, eager.us_a_sample, f"{eager.busy:.0%}"]
        if side.is_ours:
            compiled = measured(side, args.env, "cuda", compiled=True, n_updates=n)
            cells += [compiled.us_a_sample, f"{compiled.busy:.0%}", f"{max(eager.extra_mib, compiled.extra_mib):.0f}"]
        else:
            cells += ["", "", f"{eager.extra_mib:.0f}"]
        rows.append(cells)
        print(" | ".join(cells), flush=True)
    packages = versions(["torch", "stable-baselines3", "sb3-contrib", "gymnasium", "mujoco"])
    names = ["algorithm", "samples", "CPU", "GPU", "GPU works", "GPU, compiled", "GPU works", "MiB"]
    blocks = [
        [f"# What a GPU does in an update, {args.env}"],
        [f"`{command_line('updates_on_gpu', sys.argv[1:] if arguments is None else arguments)}`"],
        [
            f"{th.cuda.get_device_name()}, {processor()}, one thread; "
            f"{', '.join(' '.join(pair) for pair in packages.items())}; commit {commit(Path(__file__).parents[1])}"
        ],
        [
            "Microseconds a sample of the median update, on the CPU and on the GPU. *GPU works*: the time of its",
            "kernels and copies, in per cent of an update. *MiB*: the most memory of the GPU that an update took above",
            "what there was before it.",
        ],
        table(names, rows),
    ]
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "updates-cuda.md").write_text("\n\n".join("\n".join(block) for block in blocks) + "\n")


if __name__ == "__main__":
    main()
