"""The runs that are there: what each has reached, and what a second clip would cut."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from benchmarks.learning.arms import ARMS
from benchmarks.learning.conditions import Condition
from benchmarks.learning.published import SCORE_0_AND_1
from benchmarks.learning.results import Floats, read_records
from benchmarks.learning.statistics import MIN_RUNS
from benchmarks.staleness.__main__ import ENVS

_FINAL = 5  # evaluations, the last tenth of a run
_COLLAPSED = 0.5


class Runs(NamedTuple):
    """
    Those of an arm on an environment, a number for each.

    :param returns: what it has reached, the mean of its last evaluations
    :param scores: likewise, where a random policy has 0 and gymnasium's reward threshold 1
    :param collapsed: 1 where it ends below half of its own best score, else 0
    :param logged: by name, the mean over all updates of what they measured
    :param largest_ratio: the largest of all updates
    """

    returns: Floats
    scores: Floats
    collapsed: Floats
    logged: dict[str, Floats]
    largest_ratio: Floats


class Pair(NamedTuple):
    """An arm in a condition."""

    condition: Condition
    arm: str


Study: TypeAlias = dict[Pair, dict[str, Runs]]


def read_study(folder: Path) -> tuple[Study, list[dict[str, Any]]]:
    """
    :param folder: with a folder for each condition
    :return: the runs by arm and environment, conditions and arms in the order in which they are shown; and what all
        files hold
    """
    study: Study = {}
    everything = []
    found = [(condition, path) for path in folder.iterdir() if (condition := Condition.of_set(path.name))]
    for condition, path in sorted(found, key=lambda each: _place(each[0])):
        records = read_records(path)
        everything += records
        groups: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
        for record in records:
            groups[record["algo"], record["env"]].append(record)
        for arm in ARMS:
            by_env = {env: _runs(env, groups[arm, env]) for env in ENVS if (arm, env) in groups}
            if by_env:
                study[Pair(condition, arm)] = by_env
    return study, everything


def _place(condition: Condition) -> tuple[Any, ...]:
    return condition.check or "", condition.n_epochs, condition.reuse, condition.lag


def _runs(env: str, records: list[dict[str, Any]]) -> Runs:
    records = sorted(records, key=lambda record: int(record["seed"]))
    zero, one = SCORE_0_AND_1[env]
    returns = np.array([np.mean(record["evaluation"]["mean"][-_FINAL:]) for record in records])
    bests = np.array([max(record["evaluation"]["mean"]) for record in records])
    scores, best_scores = (returns - zero) / (one - zero), (bests - zero) / (one - zero)
    names = [name for name in records[0]["log"] if name.startswith("end_cut")]
    return Runs(
        returns,
        scores,
        (scores < _COLLAPSED * best_scores).astype(float),
        {name: np.array([np.mean(_there(record["log"][name])) for record in records]) for name in names},
        np.array([max(_there(record["log"]["end_ratio_max"])) for record in records]),
    )


def _there(values: Iterable[float | None]) -> list[float]:
    """Without the times between two evaluations in which there was no update."""
    return [value for value in values if value is not None]


def logged(*names: str) -> Callable[[Runs], Floats]:
    """:param names: of what the updates measured; what :func:`matrix` takes, with a layer for each name"""
    return lambda runs: np.stack([runs.logged[name] for name in names], axis=-1)


def matrix(by_env: dict[str, Runs], envs: Sequence[str], what: Callable[[Runs], Floats]) -> Floats:
    """
    :param by_env: the runs of an arm
    :param envs: the columns
    :param what: of the runs
    :return: a line for each of the runs that all the environments have, a column for each of these
    """
    columns = [what(by_env[env]) for env in envs]
    n = min(len(column) for column in columns)
    return np.stack([column[:n] for column in columns], axis=1)


def comparable(study: Study, pairs: Sequence[Pair]) -> list[str]:
    """
    :param study: the runs that are there
    :param pairs: that are to be compared
    :return: the environments on which each of them has runs enough
    """
    of_pairs = [study.get(pair, {}) for pair in pairs]
    return [env for env in ENVS if all(env in runs and len(runs[env].scores) >= MIN_RUNS for runs in of_pairs)]
