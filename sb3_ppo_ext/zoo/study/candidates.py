"""The candidates of ``study evaluate``: trials, and the entry they started from, with their results on fresh seeds."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from optuna.trial import FrozenTrial

from sb3_ppo_ext.zoo.study.storage import storage_errors
from sb3_ppo_ext.zoo.study.study import ZooStudy
from sb3_ppo_ext.zoo.study.trials import evaluate_python
from sb3_ppo_ext.zoo.summary import N_EPISODES

DEFAULT = "default"  # the label of the entry that the trials started from
_RESULT = "sb3_ppo_ext_evaluation_"  # the attributes of an Optuna study that hold results begin like this


@dataclass
class Candidate:
    """
    A trial, or the default entry, that is trained on several seeds.

    :param label: number of the trial, or :data:`DEFAULT`
    :param entry: its hyper-parameters
    :param study_value: value of the trial in the study, from a single training
    :param results: mean reward at the end of each training, by seed
    """

    label: str
    entry: dict[str, Any]
    study_value: float | None = None
    results: dict[int, float] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.label if self.label == DEFAULT else f"trial {self.label}"

    @property
    def mean(self) -> float:
        """Mean across seeds."""
        return float(np.mean(list(self.results.values())))

    @property
    def std(self) -> float:
        """Sample standard deviation across at least two seeds."""
        return float(np.std(list(self.results.values()), ddof=1))

    @property
    def rank(self) -> tuple[float, ...]:
        """Sort key, largest for the best. Among equal means, the default wins, then the better trial in the study."""
        if self.study_value is None:
            return self.mean, float("inf")
        return self.mean, self.study_value, -int(self.label)

    def describe(self) -> str:
        """The results in words."""
        if len(self.results) == 1:
            return f"{self.mean:.2f} on one seed"
        return f"{self.mean:.2f} +/- {self.std:.2f} across {len(self.results)} seeds"

    def key(self, seed: int) -> str:
        """Identify a training within the study, by the candidate, its hyper-parameters and the seed."""
        content = json.dumps(self.entry, sort_keys=True, default=_qualified_name)
        return f"{self.label}_{hashlib.sha256(content.encode()).hexdigest()[:12]}_{seed}"

    def folder(self, study: ZooStudy, seed: int) -> Path:
        """The log folder of a training of the candidate."""
        return study.folder / "evaluation" / self.key(seed)


def _qualified_name(value: Any) -> str:
    """Identify a value that JSON cannot express, by a name that is the same in every process."""
    named = value if hasattr(value, "__qualname__") else type(value)
    return f"{named.__module__}.{named.__qualname__}"


def make_candidate(study: ZooStudy, trial: FrozenTrial | None, n_timesteps: int) -> Candidate:
    """
    :param study: the study
    :param trial: one of its trials, or None for the entry that all of them started from
    :param n_timesteps: steps of a training; 0 for as many as in the study
    :return: the candidate, without results
    """
    entry = study.entry(trial)
    if "policy_kwargs" in entry:
        entry["policy_kwargs"] = evaluate_python(entry["policy_kwargs"])
    entry["n_timesteps"] = n_timesteps or int(entry["n_timesteps"])  # an entry may count in floats, as 1e5
    return Candidate(DEFAULT, entry) if trial is None else Candidate(str(trial.number), entry, trial.value)


def store_result(study: ZooStudy, candidate: Candidate, seed: int, result: dict[str, Any]) -> None:
    """
    :param study: study that stores the result
    :param candidate: candidate that was trained
    :param seed: seed of the training
    :param result: result of the evaluation after the training
    """
    training = {"trial": candidate.label, "seed": seed, "n_timesteps": candidate.entry["n_timesteps"]}
    with storage_errors(study.storage):
        study.optuna_study.set_user_attr(_RESULT + candidate.key(seed), {**training, **result})


def stored_results(study: ZooStudy) -> dict[str, dict[str, Any]]:
    """
    :param study: the study
    :return: the stored result of each training, by :meth:`Candidate.key`
    """
    attributes = study.optuna_study.user_attrs.items()
    return {name.removeprefix(_RESULT): value for name, value in attributes if name.startswith(_RESULT)}


def evaluated_candidates(study: ZooStudy) -> list[Candidate]:
    """
    :param study: the study
    :return: the candidates with results, best first: those trained with the largest budget, with unchanged
        hyper-parameters
    """
    stored = stored_results(study)
    budget = max((result["n_timesteps"] for result in stored.values()), default=0)
    candidates: dict[str, Candidate] = {}
    for key, result in stored.items():
        label, seed = result["trial"], result["seed"]
        if label not in candidates:
            candidates[label] = make_candidate(study, None if label == DEFAULT else study.trial(int(label)), budget)
        if candidates[label].key(seed) == key:
            candidates[label].results[seed] = result["mean"]
    with_results = [candidate for candidate in candidates.values() if candidate.results]
    return sorted(with_results, key=lambda candidate: candidate.rank, reverse=True)


TABLE = f"Reward at the end of a training ({N_EPISODES} episodes), mean and std across seeds"
"""Heading of :func:`result_rows`."""


def result_rows(candidates: Sequence[Candidate]) -> list[list[str]]:
    """
    :param candidates: candidates that were trained again
    :return: the rows of a table, the head first
    """
    rows = [["", "in the study", "mean", "std", "seeds"]]
    for candidate in candidates:
        value = "-" if candidate.study_value is None else f"{candidate.study_value:.2f}"
        each = " ".join(f"{candidate.results[seed]:.1f}" for seed in sorted(candidate.results))
        mean = f"{candidate.mean:.2f}" if candidate.results else "-"
        std = f"{candidate.std:.2f}" if len(candidate.results) > 1 else "-"
        rows += [[candidate.name, value, mean, std, each]]
    return rows


def result_table(candidates: Sequence[Candidate]) -> list[str]:
    """
    :param candidates: candidates that were trained again
    :return: the lines of a table
    """
    lines = [
        f"  {name:<12} {value:>12} {mean:>10} {std:>8}   {seeds}"
        for name, value, mean, std, seeds in result_rows(candidates)
    ]
    return [f"{TABLE}:", *lines]


def verdict(candidates: Sequence[Candidate]) -> str:
    """
    :param candidates: candidates that were trained again
    :return: a sentence that names the best
    """
    winner = max(candidates, key=lambda candidate: candidate.rank)
    default = next((candidate for candidate in candidates if candidate.label == DEFAULT), None)
    if winner is default:
        said = "The winner is the default: no trial beats the entry that they started from."
    else:
        beaten = f", the default {default.describe()}" if default else ""
        said = f"The winner is trial {winner.label}: {winner.describe()}{beaten}."
    if any(candidate.results.keys() != winner.results.keys() for candidate in candidates):
        said += " Not all were trained on the same seeds."
    return said
