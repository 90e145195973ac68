"""
When does the second clip matter? Learning from rollouts that have waited.

    python -m benchmarks.staleness --jobs 2
    python -m benchmarks.staleness --lags 0 16 --arms ppo dual_clip_3 --envs HalfCheetah-v5 --seeds 3
    python -m benchmarks.staleness --epochs 40
    python -m benchmarks.staleness --report

A rollout waits LAG updates before it is learnt from, once. Each run becomes a file,
``results/staleness/lag-LAG-epochs-EPOCHS/ENVIRONMENT/ARM-SEED.json``, like those of ``benchmarks.learning``: stop this
at any time and start it again. ``--report`` makes ``report.md`` from the runs that are there. What we expected stands
in ``hypotheses.md``, which is older than the first run.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.learning import statistics
from benchmarks.learning.arms import ARMS, BOUNDS
from benchmarks.learning.cases import Run, stale_set
from benchmarks.learning.published import SCORE_0_AND_1
from benchmarks.learning.results import Floats, read_records
from benchmarks.learning.runner import alone_in, make_runs
from benchmarks.learning.statistics import Estimate
from benchmarks.report import table

RESULTS = Path(__file__).parent / "results" / "staleness"
ENVS = ("HalfCheetah-v5", "Hopper-v5", "Walker2d-v5", "LunarLander-v3")
LAGS = (0, 1, 4, 16)
N_SEEDS = 10
_FINAL = 5  # evaluations, the last tenth of a run
_COLLAPSED = 0.5

_ABOUT = """\
- What a run *reaches* is the mean of its last five evaluations of ten episodes each. A score is 0 for a random policy
  and 1 for gymnasium's reward threshold. IQM and intervals, 95 % stratified bootstraps, are rliable's; fewer than three
  runs have none.
- *Improves on PPO*: the probability that a run of the arm ends above one of PPO with the same lag on the same task,
  where both have three runs or more.
- *Collapsed*: the share of runs that end below half of their own best score."""


def write_report(folder: Path, n_resamples: int = statistics.N_RESAMPLES) -> None:
    """
    :param folder: with the runs; for the page too
    :param n_resamples: of the bootstraps
    """
    lines = ["# The second clip on old data", "", "```", "python -m benchmarks.staleness --report", "```", ""]
    lines += [*_ABOUT.splitlines(), ""]
    for path in sorted(folder.glob("lag-*-epochs-*"), key=lambda path: [int(n) for n in path.name.split("-")[1::2]]):
        records = read_records(path)
        if records:
            _, lag, _, n_epochs = path.name.split("-")
            lines += [f"## Lag {lag}, {n_epochs} epochs", "", *_activation(records), ""]
            lines += [*_outcome(records, n_resamples), ""]
    (folder / "report.md").write_text("\n".join(lines).rstrip() + "\n")


def _activation(records: list[dict[str, Any]]) -> list[str]:
    """What a second clip would cut at the end of an update, whether or not the arm has one: means over all updates."""
    rows = []
    for env, arm in _there(records):
        logs = [record["log"] for record in records if (record["env"], record["algo"]) == (env, arm)]
        row = [env, ARMS[arm].label]
        for bound in BOUNDS:
            row += [_share(logs, f"end_cut_share_{bound:g}"), _share(logs, f"end_cut_gradient_{bound:g}")]
        largest = max(value for log in logs for value in log["end_ratio_max"] if value is not None)
        rows.append([*row, f"{largest:.3g}"])
    head = ["environment", "arm"]
    for bound in BOUNDS:
        head += [f"samples with A < 0, r > {bound:g}", "their share of the gradient's norm"]
    return table([*head, "largest ratio"], rows)


def _share(logs: list[dict[str, list[float | None]]], name: str) -> str:
    return f"{np.mean([value for log in logs for value in log[name] if value is not None]):.2g}"


def _outcome(records: list[dict[str, Any]], n_resamples: int) -> list[str]:
    rows = []
    there = _there(records)
    for arm in ARMS:
        envs = [env for env, of in there if of == arm]
        if not envs:
            continue
        finals, bests = _scores(records, arm, envs)
        row = [ARMS[arm].label, ", ".join(envs), f"{len(finals)}"]
        row.append(_interval(statistics.aggregates(finals, n_resamples)["IQM"]))
        shared = [env for env in envs if (env, "ppo") in there]
        improvement = "-"
        if arm != "ppo" and shared:
            ours, ppos = _scores(records, arm, shared)[0], _scores(records, "ppo", shared)[0]
            if min(len(ours), len(ppos)) >= statistics.MIN_RUNS:
                improvement = _interval(statistics.probability_of_improvement(ours, ppos, n_resamples))
        rows.append([*row, improvement, f"{(finals < _COLLAPSED * bests).mean():.0%}"])
        rows[-1] += [f"{np.mean(_finals(records, arm, env)):.0f}" if env in envs else "-" for env in ENVS]
    head = ["arm", "tasks", "runs of each", "IQM of scores", "improves on PPO", "collapsed"]
    return table([*head, *(f"{env}, mean return" for env in ENVS)], rows)


def _there(records: list[dict[str, Any]]) -> list[tuple[str, str]]:
    pairs = {(record["env"], record["algo"]) for record in records}
    return [(env, arm) for env in ENVS for arm in ARMS if (env, arm) in pairs]


def _finals(records: list[dict[str, Any]], arm: str, env: str) -> Floats:
    chosen = [record for record in records if (record["env"], record["algo"]) == (env, arm)]
    chosen.sort(key=lambda record: int(record["seed"]))
    return np.array([np.mean(record["evaluation"]["mean"][-_FINAL:]) for record in chosen])


def _scores(records: list[dict[str, Any]], arm: str, envs: Sequence[str]) -> tuple[Floats, Floats]:
    """What each run has reached, and its best evaluation, as scores; a line a run and a column an environment."""
    finals, bests = [], []
    for env in envs:
        zero, one = SCORE_0_AND_1[env]
        chosen = [record for record in records if (record["env"], record["algo"]) == (env, arm)]
        chosen.sort(key=lambda record: int(record["seed"]))
        best = np.array([max(record["evaluation"]["mean"]) for record in chosen])
        finals.append((_finals(records, arm, env) - zero) / (one - zero))
        bests.append((best - zero) / (one - zero))
    n = min(len(column) for column in finals)
    return np.stack([c[:n] for c in finals], axis=1), np.stack([c[:n] for c in bests], axis=1)


def _interval(estimate: Estimate) -> str:
    point, low, high = (float(np.squeeze(value)) for value in estimate)
    return f"{point:.2f}" if np.isnan(low) else f"{point:.2f} [{low:.2f}, {high:.2f}]"


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--arms", nargs="+", choices=tuple(ARMS), default=list(ARMS), help="all if it is not said")
    add("--envs", nargs="+", choices=ENVS, default=list(ENVS), help="all if it is not said")
    add("--lags", nargs="+", type=int, choices=LAGS, default=list(LAGS), help="updates that a rollout waits")
    add("--epochs", type=int, choices=(10, 40), default=10, help="of an update")
    add("--seeds", type=int, default=N_SEEDS, help="trainings of each, with the seeds 0, 1, ...")
    add("--jobs", type=int, default=1, help="processes at a time, of one thread each")
    add("--out", type=Path, default=RESULTS, help="folder for the results")
    add("--report", action="store_true", help="make no run, but the page")
    args = parser.parse_args(argv)
    for name in ("seeds", "jobs"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} {getattr(args, name)} is not allowed: it must be at least 1")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args = _parse(argv)
    if args.report:
        write_report(args.out)
        return
    os.environ |= dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
    os.environ["PYGAME_HIDE_SUPPORT_PROMPT"] = "1"
    with alone_in(args.out):
        failed = []
        for seed, lag in product(range(args.seeds), args.lags):  # so that what is there is worth reading at any time
            name = stale_set(lag, args.epochs)
            runs = [Run(name, env, arm, seed) for env, arm in product(args.envs, args.arms)]
            failed += make_runs(runs, {}, args.out / name, args.jobs)
    if failed:
        raise SystemExit("\n".join(f"FAILED: {run}" for run in failed))


if __name__ == "__main__":
    main()
