"""The runs that are there, as arrays: by environment and algorithm, a line for each seed."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from benchmarks.learning.cases import ALGORITHMS, BUDGETS
from benchmarks.learning.published import SCORE_0_AND_1

Floats: TypeAlias = NDArray[np.float64]

# The last tenth of the evaluations, 50 episodes, is what a training has reached.
_FINAL = 0.1


class Curves(NamedTuple):
    """
    The runs of an algorithm on an environment.

    :param env: id of the environment
    :param algo: a key of :data:`benchmarks.learning.cases.ALGORITHMS`
    :param seeds: of the runs, in the order of the lines of the arrays
    :param steps: of the evaluations
    :param returns: mean return of each evaluation; a line a run
    :param seconds: of processor time that the training had taken until then, without compiling
    :param compile_seconds: of processor time, of each run; 0 for what is not compiled
    :param peak_mib: the most memory that each had
    :param processors: on which each was made
    :param logged: by name, what the updates logged between evaluations; NaN where there was no update
    """

    env: str
    algo: str
    seeds: list[int]
    steps: Floats
    returns: Floats
    seconds: Floats
    compile_seconds: Floats
    peak_mib: Floats
    processors: list[str]
    logged: dict[str, Floats]

    @property
    def label(self) -> str:
        """Of the algorithm, for readers."""
        return ALGORITHMS[self.algo].label

    @property
    def final(self) -> Floats:
        """What each run has reached: the mean return of the last tenth of its evaluations."""
        n = max(round(_FINAL * len(self.steps)), 1)
        return np.asarray(self.returns[:, -n:].mean(axis=1))

    @property
    def scores(self) -> Floats:
        """What each run has reached, where a random policy has 0 and :data:`SCORE_0_AND_1` says what has 1."""
        zero, one = SCORE_0_AND_1[self.env]
        return (self.final - zero) / (one - zero)


Results: TypeAlias = dict[tuple[str, str], Curves]


def read_records(folder: Path) -> list[dict[str, Any]]:
    """:param folder: of a set of hyper-parameters; what its files hold"""
    return [json.loads(path.read_text()) for path in sorted(folder.glob("*/*.json"))]


def results_of(records: Iterable[dict[str, Any]]) -> Results:
    """
    :param records: of runs
    :return: the runs by environment and algorithm, in the order of the suite
    """
    groups: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
    for record in records:
        groups[record["env"], record["algo"]].append(record)
    return {
        (env, algo): _curves(sorted(groups[env, algo], key=lambda record: int(record["seed"])))
        for env in BUDGETS
        for algo in ALGORITHMS
        if (env, algo) in groups
    }


def _curves(records: list[dict[str, Any]]) -> Curves:
    n = min(len(record["evaluation"]["steps"]) for record in records)
    compiling = np.array([record["total"]["compile_seconds"] or 0.0 for record in records])
    seconds = np.array([record["seconds"]["process"][:n] for record in records])
    names = set.intersection(*(set(record["log"]) for record in records))
    return Curves(
        env=records[0]["env"],
        algo=records[0]["algo"],
        seeds=[record["seed"] for record in records],
        steps=np.array(records[0]["evaluation"]["steps"][:n], dtype=float),
        returns=np.array([record["evaluation"]["mean"][:n] for record in records], dtype=float),
        seconds=np.maximum(seconds - compiling[:, None], 0.0),
        compile_seconds=compiling,
        peak_mib=np.array([record["peak_mib"] for record in records], dtype=float),
        processors=[record["processor"] for record in records],
        logged={name: np.array([record["log"][name][:n] for record in records], dtype=float) for name in sorted(names)},
    )


def of_algo(results: Results, algo: str) -> dict[str, Curves]:
    """
    :param results: the runs that are there
    :param algo: a key of :data:`benchmarks.learning.cases.ALGORITHMS`; "sb3_ppo" stands for PPO: SB3's, and where that
        was not run, ours with ``dual_clip=None``, which equals it
    :return: its runs, by environment
    """
    keys = ("ppo", algo) if algo == "sb3_ppo" else (algo,)
    return {env: curves for key in keys for (env, of), curves in results.items() if of == key}


def compared_label(algo: str) -> str:
    """:param algo: a key of ALGORITHMS; how it is called where :func:`of_algo` chose its runs"""
    return "PPO" if algo == "sb3_ppo" else ALGORITHMS[algo].label


def score_matrix(curves: dict[str, Curves], envs: Iterable[str]) -> Floats | None:
    """
    :param curves: of an algorithm, by environment
    :param envs: the columns
    :return: scores, a line for each of the runs that all the environments have; None if one of them has none
    """
    chosen = [curves.get(env) for env in envs]
    if not chosen or any(of_env is None for of_env in chosen):
        return None
    columns = [of_env.scores for of_env in chosen if of_env is not None]
    n = min(len(column) for column in columns)
    return np.stack([column[:n] for column in columns], axis=1)
