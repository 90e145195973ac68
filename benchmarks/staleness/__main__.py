"""
When does the second clip matter? Learning from rollouts that have waited, or that are learnt from again.

    python -m benchmarks.staleness --jobs 2
    python -m benchmarks.staleness --lags 0 16 --arms ppo dual_clip_3 --envs HalfCheetah-v5 --seeds 3
    python -m benchmarks.staleness --reuse 1 3 7 --arms ppo dual_clip_3 decoupled
    python -m benchmarks.staleness --lags 16 --check no_gradient_clipping
    python -m benchmarks.staleness --epochs 40

With a lag, a rollout waits so many updates before it is learnt from, once. With reuse, an update learns from the newest
rollout and so many before it; 0 of both are the same runs. Each run becomes a file,
``results/staleness/lag-LAG-epochs-EPOCHS/ENVIRONMENT/ARM-SEED.json`` (``reuse-K-epochs-EPOCHS``; with a check, its name
behind), like those of ``benchmarks.learning``: stop this at any time and start it again. ``make report`` makes the page
of the runs that are there. What we expected stands in ``hypotheses.md``, which is older than the first run.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from itertools import product
from pathlib import Path

from benchmarks.learning.arms import ARMS
from benchmarks.learning.cases import Run
from benchmarks.learning.conditions import CHECKS, Condition
from benchmarks.learning.runner import alone_in, make_runs

RESULTS = Path(__file__).parents[1] / "results" / "staleness"
ENVS = ("HalfCheetah-v5", "Hopper-v5", "Walker2d-v5", "LunarLander-v3")
LAGS = (0, 1, 4, 16)
REUSED = (0, 1, 3, 7)
N_SEEDS = 10


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--arms", nargs="+", choices=tuple(ARMS), help="if it is not said, all but those that would be another one")
    add("--envs", nargs="+", choices=ENVS, default=list(ENVS), help="all if it is not said")
    age = parser.add_mutually_exclusive_group()
    age.add_argument("--lags", nargs="+", type=int, choices=LAGS, default=list(LAGS), help="updates that rollouts wait")
    age.add_argument("--reuse", nargs="+", type=int, choices=REUSED, help="rollouts before the newest, not --lags")
    add("--epochs", type=int, choices=(10, 40), default=10, help="of an update")
    add("--check", choices=tuple(CHECKS), help="what is to be otherwise than at the documented defaults")
    add("--seeds", type=int, default=N_SEEDS, help="trainings of each, with the seeds 0, 1, ...")
    add("--jobs", type=int, default=1, help="processes at a time, of one thread each")
    add("--out", type=Path, default=RESULTS, help="folder for the results")
    args = parser.parse_args(argv)
    for name in ("seeds", "jobs"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} {getattr(args, name)} is not allowed: it must be at least 1")
    option, ages = ("lags", args.lags) if args.reuse is None else ("reuse", args.reuse)
    name = "lag" if args.reuse is None else "reuse"
    args.conditions = [Condition(n_epochs=args.epochs, check=args.check, **{name: age}) for age in ages]
    for condition, arm in product(args.conditions, args.arms or ()):
        if refusal := condition.refusal(arm):
            parser.error(f"--arms {arm} is not allowed with --{option} 0: {refusal}")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args = _parse(argv)
    os.environ |= dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
    os.environ["PYGAME_HIDE_SUPPORT_PROMPT"] = "1"
    with alone_in(args.out):
        failed = []
        # In an order in which what is there is worth reading at any time.
        for seed, condition in product(range(args.seeds), args.conditions):
            arms = [arm for arm in args.arms or ARMS if not condition.refusal(arm)]
            runs = [Run(condition.set, env, arm, seed) for env, arm in product(args.envs, arms)]
            failed += make_runs(runs, {}, args.out / condition.set, args.jobs)
    if failed:
        raise SystemExit("\n".join(f"FAILED: {run}" for run in failed))


if __name__ == "__main__":
    main()
