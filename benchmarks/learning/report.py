"""
What the learning curves say: a page of tables, and figures.

    python -m benchmarks.learning.report

Both are made from the runs that are there, whichever these are, and the page says what is missing. ``--results`` names
the folder of the runs; ``report.md`` and ``figures/`` are written to it.
"""

from __future__ import annotations

import argparse
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib as mpl
import numpy as np

from benchmarks.learning import figures, statistics
from benchmarks.learning.__main__ import RESULTS
from benchmarks.learning.cases import ALGORITHMS, BUDGETS, MUJOCO, SMALL, SUITE, suite
from benchmarks.learning.published import PUBLISHED
from benchmarks.learning.results import (
    Curves,
    Floats,
    Results,
    compared_label,
    of_algo,
    read_records,
    results_of,
    score_matrix,
)
from benchmarks.learning.statistics import Estimate
from benchmarks.report import table

GROUPS = {"MuJoCo": tuple(MUJOCO), "small tasks": tuple(SMALL)}
# A group's scores are of the environments on which all of these were run.
_CORE = ("dual_clip_ppo", "sb3_ppo", "trpo", "contrib_trpo")
_IN_GROUPS = (*_CORE, "adaptive_kl_ppo", "reinforce", "a2c")
_OURS = ("dual_clip_ppo", "adaptive_kl_ppo", "trpo", "reinforce")
_PEERS = ("sb3_ppo", "contrib_trpo", "a2c")
_KL_TOLERANCE = 1.5
_RACE = (("HalfCheetah-v5", "dual_clip_ppo"), ("HalfCheetah-v5", "sb3_ppo"))  # the figure of the README

_ABOUT = """\
- A return is the mean of 10 episodes of the deterministic policy, every 2 % of the steps. What a run *reaches* is the
  mean of the last tenth of these evaluations, 50 episodes.
- Intervals are 95 % stratified bootstraps over the runs, by rliable; fewer than three runs have none. In brackets
  behind them, the number of runs.
- Where SB3's PPO was not run, *PPO* is ours with `dual_clip=None`, which equals it to 1e-7.
- Seconds are processor time of one thread, of training alone: evaluations do not count, and compiling has its own
  column. They were taken while other work went on, so they are good for ratios of two and more, not for less."""

_SCORES = """\
A score is 0 for a random policy and 1 for gymnasium's reward threshold (benchmarks/learning/published.py has both). The
scores are of the environments on which all of DualClipPPO, PPO, TRPO and sb3-contrib's TRPO have three runs or more
(if there are none, of those on which all have one), and of as many runs of an algorithm as all of these have of it."""

_PUBLISHED = """\
**v3, v4 and v5 of these environments are not the same tasks**: observations, rewards and ends of episodes were changed.
The published figures say what size of return is usual, and no more. They are means, and so is ours, at the defaults."""


class Group(NamedTuple):
    """
    Some environments and who was run on them.

    :param envs: on which all of the algorithms compared have runs
    :param scores: by algorithm, a line for each run and a column for each environment
    """

    envs: list[str]
    scores: dict[str, Floats]


def write_report(folder: Path, n_resamples: int = statistics.N_RESAMPLES) -> None:
    """
    :param folder: with the runs; for the page and the figures too
    :param n_resamples: of the bootstraps
    """
    blocks = [["# Learning curves"], ["`python -m benchmarks.learning`, then `make report`"]]
    records = {path.name: read_records(path) for path in sorted(folder.iterdir()) if path.is_dir()}
    records = {name: found for name, found in records.items() if found}
    if not records:
        raise SystemExit(f"{folder} has no runs: python -m benchmarks.learning makes them")
    blocks += [head(found for of_set in records.values() for found in of_set), [_ABOUT]]
    with mpl.rc_context(figures.SETTINGS):
        for name in sorted(records, key=lambda name: (*SUITE, name).index(name)):
            blocks += _section(name, results_of(records[name]), folder / "figures", n_resamples)
    blocks += [[f"**Missing**: all {len(suite(name))} runs of `{name}`."] for name in SUITE if name not in records]
    (folder / "report.md").write_text("\n\n".join("\n".join(block) for block in blocks) + "\n")


def head(records: Iterable[dict[str, Any]]) -> list[str]:
    """
    What runs were made on and what they took.

    :param records: what their files hold
    """
    records = list(records)
    hours = sum(record["total"]["process_seconds"] + record["evaluation"]["seconds"] for record in records) / 3600
    versions = {f"{package} {version}" for record in records for package, version in record["versions"].items()}
    return [
        f"- {len(records)} runs, {hours:.1f} core-hours with their evaluations",
        f"- {', '.join(sorted({record['processor'] for record in records}))}",
        f"- commit {', '.join(sorted({record['commit'] for record in records}))}",
        f"- {', '.join(sorted(versions))}",
    ]


def _section(name: str, results: Results, out: Path, n_resamples: int) -> Iterator[list[str]]:
    """The blocks of the page for a set of hyper-parameters."""
    yield [f"## {_title(name)}"]
    yield from _missing(name, results)
    algos = [algo for algo in ALGORITHMS if any(of == algo for _, of in results)]
    curves = {key: statistics.iqm_curve(of_key.returns, n_resamples) for key, of_key in results.items()}
    for stem, by_seconds in (("curves", False), ("seconds", True)):
        figure = figures.learning_curves(results, curves, by_seconds=by_seconds)
        yield [f"![{stem}](figures/{figures.save(figure, out, f'{name}-{stem}')})"]
    finals = {key: statistics.mean(of_key.final, n_resamples) for key, of_key in results.items()}
    race = {key: of_key for key, of_key in results.items() if key in _RACE}
    if name == "defaults" and len(race) == len(_RACE):
        figure = figures.learning_curves(race, curves, by_seconds=True)
        yield [f"![DualClipPPO and SB3's PPO](figures/{figures.save(figure, out, 'race')})"]
    yield ["### What they reach", "", "Means of the runs."]
    yield _by_environment(results, algos, lambda curves: _reached(curves, finals))
    if name == "defaults":
        yield from _beside_published(results, finals)
    groups = {name: group for name, envs in GROUPS.items() if (group := _group(results, envs)).envs}
    if groups:
        yield from _aggregates(name, groups, out, n_resamples)
    yield from _improvements(name, results, out, n_resamples)
    yield from _costs(results, algos)
    yield from _updates(results, algos)


def _title(name: str) -> str:
    return {"defaults": "The constructors' defaults, VecNormalize", "tuned": "RL Zoo's tuned entries"}.get(name, name)


def _missing(name: str, results: Results) -> Iterator[list[str]]:
    """What the suite has and is not there."""
    there = {(env, algo, seed) for (env, algo), curves in results.items() for seed in curves.seeds}
    wanted = suite(name) if name in SUITE else []
    left = [run for run in wanted if (run.env, run.algo, run.seed) not in there]
    if not left:
        return
    text = [f"**Missing**: {len(left)} of the {len(wanted)} runs of the suite."]
    for algo in ALGORITHMS:
        counts = {env: sum(r.env == env and r.algo == algo for r in left) for env in BUDGETS}
        said = ", ".join(f"{env} {count}" for env, count in counts.items() if count)
        if said:
            text.append(f"- {ALGORITHMS[algo].label}: {said}")
    yield [text[0], "", *text[1:]]


def _group(results: Results, envs: Sequence[str]) -> Group:
    """Of some environments, those on which all that are compared were run, and who was run on all of these."""
    common = comparable([of_algo(results, algo) for algo in _CORE], envs)
    found = {algo: score_matrix(of_algo(results, algo), common) for algo in _IN_GROUPS}
    return Group(common, {algo: scores for algo, scores in found.items() if scores is not None})


def comparable(by_env: Sequence[Mapping[str, Curves]], envs: Iterable[str]) -> list[str]:
    """
    The environments on which algorithms can be compared: an environment with one run must not hide the ten of another.

    :param by_env: the runs of each algorithm, by environment
    :param envs: candidates
    :return: those on which each has as many runs as an interval needs; if there are none, those on which each has a run
    """
    common = [env for env in envs if all(env in curves for curves in by_env)]
    enough = [env for env in common if all(len(c[env].seeds) >= statistics.MIN_RUNS for c in by_env)]
    return enough or common


def together_and_alone(by_env: Sequence[Mapping[str, Curves]], envs: Iterable[str]) -> list[list[str]]:
    """
    On which environments algorithms are compared: on all that can be compared, of which each counts as many runs as
    there are of the one with the fewest; then on each that has more runs than that.

    :param by_env: the runs of each algorithm, by environment
    :param envs: candidates
    """
    together = comparable(by_env, envs)
    n_runs = {env: min(len(curves[env].seeds) for curves in by_env) for env in together}
    return [together, *([env] for env in together if n_runs[env] > min(n_runs.values()))]


def _aggregates(set_name: str, groups: Mapping[str, Group], out: Path, n_resamples: int) -> Iterator[list[str]]:
    yield ["### All environments together", "", _SCORES]
    estimates = {
        name: {algo: statistics.aggregates(scores, n_resamples) for algo, scores in group.scores.items()}
        for name, group in groups.items()
    }
    for name, group in groups.items():
        rows = [
            [
                compared_label(algo),
                str(len(group.scores[algo])),
                *(_cell(estimate, ".2f") for estimate in by_metric.values()),
            ]
            for algo, by_metric in estimates[name].items()
        ]
        yield [f"{name[0].upper()}{name[1:]}: {', '.join(group.envs)}"]
        yield table(["algorithm", "runs", *statistics.METRICS], rows)
    figure = figures.intervals(estimates)
    yield [f"![aggregates](figures/{figures.save(figure, out, f'{set_name}-aggregates')})"]
    thresholds = figures.thresholds_of(scores for group in groups.values() for scores in group.scores.values())
    shares = {
        name: {algo: statistics.profile(scores, thresholds, n_resamples) for algo, scores in group.scores.items()}
        for name, group in groups.items()
    }
    figure = figures.profiles(shares, thresholds)
    yield [f"![performance profiles](figures/{figures.save(figure, out, f'{set_name}-profiles')})"]


def _improvements(set_name: str, results: Results, out: Path, n_resamples: int) -> Iterator[list[str]]:
    """Each of ours against each peer, on the environments on which both can be compared."""
    rows, drawn = [], []
    for group, of_group in GROUPS.items():
        for ours in _OURS:
            for peer in _PEERS:
                by_env, of_peer = of_algo(results, ours), of_algo(results, peer)
                names = compared_label(ours), compared_label(peer)
                for envs in together_and_alone([by_env, of_peer], of_group):
                    x, y = score_matrix(by_env, envs), score_matrix(of_peer, envs)
                    if x is None or y is None:
                        continue
                    probability = statistics.probability_of_improvement(x, y, n_resamples)
                    on = group if len(envs) == len(of_group) else ", ".join(envs)
                    rows.append([*names, on, f"{len(x)}, {len(y)}", _cell(probability, ".2f")])
                    named = envs[0] if len(envs) == 1 else group
                    drawn.append((f"{names[0]} > {names[1]}, {named}", ours, probability))
    if not rows:
        return
    yield [
        "### Probability of improvement",
        "",
        "Of a run of ours being above one of the peer, on the same environment. Where some environments have three",
        "runs or more of both, those with fewer are left out. Of several environments together, as many runs count as",
        "all of them have. An environment that has more runs also has a row of its own, with all of them.",
    ]
    yield table(["ours", "peer", "on", "runs", "probability"], rows)
    figure = figures.improvements(drawn)
    yield [f"![probability of improvement](figures/{figures.save(figure, out, f'{set_name}-improvement')})"]


def _beside_published(results: Results, finals: Mapping[tuple[str, str], Estimate]) -> Iterator[list[str]]:
    envs = [env for env in MUJOCO if any(env.startswith(task) for of in PUBLISHED.values() for task in of)]
    rows = []
    for algo in _CORE:
        by_env = of_algo(results, algo)
        cells = [_reached(by_env[env], finals) if env in by_env else "" for env in envs]
        if any(cells):
            rows.append([f"{compared_label(algo)}, here, v5", *cells])
    if not rows:
        return
    for source, figures_of in PUBLISHED.items():
        rows.append([source, *(figures_of.get(env.removesuffix("-v5"), "") for env in envs)])
    yield ["### Beside published figures", "", _PUBLISHED]
    yield table(["mean return after a million steps", *envs], rows)


def _costs(results: Results, algos: Sequence[str]) -> Iterator[list[str]]:
    """What a training takes."""
    of_env: dict[str, Counter[str]] = defaultdict(Counter)
    for (env, _), curves in results.items():
        of_env[env].update(curves.processors)

    def seconds_of(curves: Curves) -> str:
        ((processor, _),) = of_env[curves.env].most_common(1)
        rows = [row for row, of_run in enumerate(curves.processors) if of_run == processor]
        return f"{1e6 * np.median(curves.seconds[rows, -1]) / curves.steps[-1]:.0f} ({len(rows)})" if rows else ""

    yield [
        "### What a training takes",
        "",
        "Seconds for a million steps, without compiling: the median of the runs on the processor on which most runs of",
        "the environment were made, and in brackets their number.",
    ]
    yield _by_environment(results, algos, seconds_of)
    rows = []
    for algo in algos:
        runs = [curves for (_, of), curves in results.items() if of == algo]
        peaks = np.concatenate([curves.peak_mib for curves in runs])
        compiling = np.concatenate([curves.compile_seconds for curves in runs])
        seconds = f"{np.median(compiling):.0f} ({compiling.max():.0f})" if compiling.any() else ""
        rows.append([ALGORITHMS[algo].label, seconds, f"{np.median(peaks):.0f}"])
    yield ["Compiling, the median of the runs and the most, which is that of a first run; the most memory of a run."]
    yield table(["algorithm", "seconds of compiling", "peak MiB"], rows)


def _updates(results: Results, algos: Sequence[str]) -> Iterator[list[str]]:
    """What the updates did, as they logged it."""
    if "dual_clip_ppo" in algos:
        rows = [
            [env, f"{np.nanmean(c.logged['dual_clip_fraction']):.1e}", f"{np.nanmax(c.logged['ratio_max']):.3g}"]
            for env, c in of_algo(results, "dual_clip_ppo").items()
            if "dual_clip_fraction" in c.logged
        ]
        yield ["### Does the second clip matter?", "", "The share of samples that it touches, of DualClipPPO."]
        yield table(["environment", "share", "largest ratio"], rows)
    of_a_target = [algo for algo in ("adaptive_kl_ppo", "trpo") if algo in algos]
    if of_a_target:
        yield [
            "### Does the KL divergence keep to its target?",
            "",
            f"The mean of KL / target, and in brackets how often its mean over 2 % of the steps is between "
            f"1 / {_KL_TOLERANCE} and {_KL_TOLERANCE}. For TRPO the target is a bound.",
        ]
        yield _by_environment(results, of_a_target, _kl_to_target)


def _kl_to_target(curves: Curves) -> str:
    if "kl" not in curves.logged or "target_kl" not in curves.logged:
        return ""
    ratio = curves.logged["kl"] / curves.logged["target_kl"]
    ratio = ratio[~np.isnan(ratio)]
    near = (ratio >= 1 / _KL_TOLERANCE) & (ratio <= _KL_TOLERANCE)
    return f"{ratio.mean():.2f} ({near.mean():.0%})"


def _by_environment(results: Results, algos: Sequence[str], cell: Callable[[Curves], str]) -> list[str]:
    """A table with a line for each environment and a column for each algorithm."""
    rows = [
        [env, *(cell(results[env, algo]) if (env, algo) in results else "" for algo in algos)]
        for env in dict.fromkeys(env for env, _ in results)
    ]
    return table(["environment", *(ALGORITHMS[algo].label for algo in algos)], rows)


def _reached(curves: Curves, finals: Mapping[tuple[str, str], Estimate]) -> str:
    return f"{_cell(finals[curves.env, curves.algo], ',.4g')} ({len(curves.seeds)})"


def _cell(estimate: Estimate, form: str) -> str:
    return format(estimate.number, form)


def report_command(description: str | None, results: Path, write: Callable[[Path], None]) -> None:
    """
    Run a command that writes the page of some runs.

    :param description: of the command
    :param results: folder of the runs, if the command line names no other
    :param write: writes the page and its figures to the folder that it is given
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=results, help="folder of the runs")
    folder = parser.parse_args().results
    if not folder.is_dir():
        parser.error(f"--results {folder} is not allowed: it must be a folder")
    write(folder)
    print(folder / "report.md")


if __name__ == "__main__":
    report_command(__doc__, RESULTS, write_report)
