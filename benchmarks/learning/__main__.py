"""
Learning curves of our algorithms and of their peers, each training in a process of its own.

    python -m benchmarks.learning --jobs 2
    python -m benchmarks.learning --set tuned --jobs 2
    python -m benchmarks.learning --algos trpo contrib_trpo --envs Hopper-v5 --seeds 3
    python -m benchmarks.learning --envs Hopper-v5 --override learning_rate=1e-4 --name slower

Each run becomes a file, ``results/learning/SET/ENVIRONMENT/ALGORITHM-SEED.json``. A run whose file is there is not made
again, and a file is there as a whole or not at all: stop this at any time, by any means, and start it again.
benchmarks/learning/cases.py has the suite, with the order in which it is run.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

import yaml

from benchmarks.learning.cases import ALGORITHMS, BUDGETS, SUITE, suite
from benchmarks.learning.runner import alone_in, make_runs

RESULTS = Path(__file__).parents[1] / "results" / "learning"


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--set", choices=tuple(SUITE), default="defaults", help="of hyper-parameters")
    add("--algos", nargs="+", choices=tuple(ALGORITHMS), help="all of the set if it is not said")
    add("--envs", nargs="+", choices=tuple(BUDGETS), help="those of the set if it is not said")
    add("--seeds", type=int, help="trainings of each, with the seeds 0, 1, ...; the set's number if it is not said")
    add("--override", nargs="+", default=[], metavar="NAME=VALUE", help="other hyper-parameters; they need --name")
    add("--name", help="of the folder for runs with other hyper-parameters")
    add("--jobs", type=int, default=1, help="processes at a time, of one thread each")
    add("--out", type=Path, default=RESULTS, help="folder for the results")
    args = parser.parse_args(argv)
    for name in ("seeds", "jobs"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            parser.error(f"--{name} {getattr(args, name)} is not allowed: it must be at least 1")
    if bool(args.override) != bool(args.name) or args.name in SUITE:
        parser.error("--override and --name go together, and --name is none of: " + ", ".join(SUITE))
    if not all("=" in word for word in args.override):
        parser.error("--override takes NAME=VALUE")
    args.override = {name: yaml.safe_load(value) for name, value in (word.split("=", 1) for word in args.override)}
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args = _parse(argv)
    # For the processes that are started from here: of one thread, and without a window.
    os.environ |= dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
    os.environ["PYGAME_HIDE_SUPPORT_PROMPT"] = "1"
    runs = suite(args.set, args.algos, args.envs, args.seeds)
    folder = args.out / (args.name or args.set)
    with alone_in(folder):
        failed = make_runs(runs, args.override, folder, args.jobs)
    if failed:
        raise SystemExit("\n".join(f"FAILED: {run}" for run in failed))


if __name__ == "__main__":
    main()
