"""
What the study of old data says: a page of tables, and figures.

    python -m benchmarks.staleness.report

Both are made from the runs that are there, whichever these are. ``--results`` names the folder of the runs;
``report.md`` and ``figures/`` are written to it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import product
from pathlib import Path

import matplotlib as mpl

from benchmarks.learning import statistics
from benchmarks.learning.arms import ARMS, BOUNDS
from benchmarks.learning.conditions import Condition
from benchmarks.learning.figures import SETTINGS, save
from benchmarks.learning.report import head, report_command
from benchmarks.learning.results import Floats
from benchmarks.report import table
from benchmarks.staleness.__main__ import ENVS, LAGS, N_SEEDS, RESULTS, REUSED
from benchmarks.staleness.figures import activation
from benchmarks.staleness.hypotheses import HOW_DECIDED, answers
from benchmarks.staleness.results import Pair, Runs, Study, comparable, logged, matrix, read_study

_CORE_ARMS = ("ppo", "dual_clip_3", "dual_clip_1.5", "target_kl")
_CORE_ENVS = ENVS[:3]

_ABOUT = """\
- What a run *reaches* is the mean of its last five evaluations of ten episodes each. A score is 0 for a random policy
  and 1 for gymnasium's reward threshold. IQM and intervals, 95 % stratified bootstraps, are rliable's; fewer than three
  runs have none.
- *Improves on PPO*: the probability that a run of the arm ends above one of PPO in the same condition on the same task,
  where both have three runs or more.
- *Collapsed*: the share of runs that end below half of their own best score.
- What a second clip would cut is measured at the end of each update on all that it learnt from, whether or not the arm
  has one: the samples with A < 0 whose ratio to the policy that acted is above a bound. Means over all updates.
- A row of all tasks together is of those that PPO was run on, and is there for an arm that was run on each of them."""


def write_report(folder: Path, n_resamples: int = statistics.N_RESAMPLES) -> None:
    """
    :param folder: with the runs; for the page and the figures too
    :param n_resamples: of the bootstraps
    """
    study, records = read_study(folder)
    if not records:
        raise SystemExit(f"{folder} has no runs: python -m benchmarks.staleness makes them")
    blocks = [["# The second clip on old data"], ["`python -m benchmarks.staleness`, then `make report`"]]
    blocks += [[*head(records), _progress(study)], [_ABOUT]]
    blocks += [["## What we expected, and what was found"], [HOW_DECIDED]]
    found = table(["hypothesis", "what decides it", "outcome"], answers(study, n_resamples))
    found[1] = found[1].replace("---:", "---")  # for text
    blocks += [found]
    with mpl.rc_context(SETTINGS):
        blocks += _figures(study, folder / "figures", n_resamples)
    for condition in dict.fromkeys(pair.condition for pair in study):
        of_condition = {pair.arm: runs for pair, runs in study.items() if pair.condition == condition}
        title = str(condition)
        blocks += [[f"## {title[0].upper()}{title[1:]}"]]
        blocks += [_activation(of_condition, n_resamples), _outcome(study, condition, n_resamples)]
    (folder / "report.md").write_text("\n\n".join("\n".join(block) for block in blocks) + "\n")


def _progress(study: Study) -> str:
    """How much of the core grid is there."""
    pairs = [Pair(Condition(lag=lag), arm) for lag, arm in product(LAGS, _CORE_ARMS)]
    cells = [study.get(pair, {}).get(env) for pair, env in product(pairs, _CORE_ENVS)]
    n_there = sum(min(len(runs.scores), N_SEEDS) for runs in cells if runs is not None)
    grid = f"{len(_CORE_ARMS)} arms, lags {', '.join(map(str, LAGS))}, {len(_CORE_ENVS)} tasks, {N_SEEDS} seeds"
    return f"- {n_there} of the {len(cells) * N_SEEDS} runs of the core grid: {grid}"


def _figures(study: Study, out: Path, n_resamples: int) -> Iterator[list[str]]:
    for stem, conditions, label in (
        ("lag", [Condition(lag=lag) for lag in LAGS], "updates that each rollout waits"),
        ("reuse", [Condition(reuse=k) for k in REUSED], "older rollouts that an update learns from too"),
    ):
        figure = activation(study, conditions, label, n_resamples)
        if figure is not None:
            yield [f"![what a second clip would cut](figures/{save(figure, out, f'activation-{stem}')})"]


def _activation(by_arm: dict[str, dict[str, Runs]], n_resamples: int) -> list[str]:
    """What a second clip would cut."""
    names = [f"end_cut_{what}_{bound:g}" for bound in BOUNDS for what in ("share", "gradient")]
    rows = []
    for tasks, envs, arm in _rows(by_arm):
        numbers = matrix(by_arm[arm], envs, logged(*names))
        means = statistics.estimate(lambda sample: sample.mean(axis=(0, 1)), numbers, n_resamples=n_resamples)
        largest = max(by_arm[arm][env].largest_ratio.max() for env in envs)
        rows.append([tasks, ARMS[arm].label, *(f"{mean:.2g}" for mean in means.numbers), f"{largest:.3g}"])
    columns = ["tasks", "arm"]
    for bound in BOUNDS:
        columns += [f"samples with A < 0, r > {bound:g}", "their share of the gradient's norm"]
    return table([*columns, "largest ratio"], rows)


def _outcome(study: Study, condition: Condition, n_resamples: int) -> list[str]:
    """What the runs have reached."""
    by_arm = {pair.arm: runs for pair, runs in study.items() if pair.condition == condition}
    rows = []
    for tasks, envs, arm in _rows(by_arm):

        def of(arm: str, what: Callable[[Runs], Floats], envs: Sequence[str] = envs) -> Floats:
            return matrix(by_arm[arm], envs, what)

        scores = of(arm, lambda runs: runs.scores)
        improvement = "-"
        if arm != "ppo" and set(envs) <= set(comparable(study, [Pair(condition, arm), Pair(condition, "ppo")])):
            of_ppo = of("ppo", lambda runs: runs.scores)
            improvement = f"{statistics.probability_of_improvement(scores, of_ppo, n_resamples).number:.2f}"
        returns = f"{of(arm, lambda runs: runs.returns).mean():.0f}" if len(envs) == 1 else ""
        iqm = f"{statistics.iqm(scores, n_resamples).number:.2f}"
        collapsed = f"{of(arm, lambda runs: runs.collapsed).mean():.0%}"
        rows.append([tasks, ARMS[arm].label, f"{len(scores)}", returns, iqm, improvement, collapsed])
    return table(["tasks", "arm", "runs of each", "mean return", "IQM of scores", "improves on PPO", "collapsed"], rows)


def _rows(by_arm: dict[str, dict[str, Runs]]) -> Iterator[tuple[str, list[str], str]]:
    """The rows of a table: what the tasks are called, the tasks, and an arm; all tasks together first."""
    together = list(by_arm.get("ppo", {}))
    groups = [(f"{len(together)} tasks", together)] if len(together) > 1 else []
    for tasks, envs in [*groups, *((env, [env]) for env in ENVS)]:
        for arm, runs in by_arm.items():
            if set(envs) <= set(runs):
                yield tasks, envs, arm


if __name__ == "__main__":
    report_command(__doc__, RESULTS, write_report)
