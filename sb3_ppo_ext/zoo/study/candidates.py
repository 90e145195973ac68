"""Trials that were trained again on fresh seeds, and the entry they started from: who they are, and their results."""

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
_RESULT = "sb3_ppo_ext_evaluation_"  # the attributes of an Optuna study that hold results begin so


@dataclass
class Candidate:
    """
    What is trained on several seeds.

    :param label: the trial's number, or :data:`DEFAULT`
    :param entry: its hyper-parameters
    :param study_value: its value in the study, of one training
    :param results: mean reward at the end of a training by its seed
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
        """Across seeds."""
        return float(np.mean(list(self.results.values())))

    @property
    def std(self) -> float:
        """Across seeds, of the sample; there must be two."""
        return float(np.std(list(self.results.values()), ddof=1))

    @property
    def rank(self) -> tuple[float, ...]:
        """The greatest for the best; of equals, for the default, or for what was better in the study."""
        if self.study_value is None:
            return self.mean, float("inf")
        return self.mean, self.study_value, -int(self.label)

    def describe(self) -> str:
        """Its results in words."""
        if len(self.results) == 1:
            return f"{self.mean:.2f} on one seed"
        return f"{self.mean:.2f} +/- {self.std:.2f} across {len(self.results)} seeds"

    def key(self, seed: int) -> str:
        """What tells a training from all others of the study: the candidate, its hyper-parameters and the seed."""
        content = json.dumps(self.entry, sort_keys=True, default=_qualified_name)
        return f"{self.label}_{hashlib.sha256(content.encode()).hexdigest()[:12]}_{seed}"

    def folder(self, study: ZooStudy, seed: int) -> Path:
        """Where a training of the candidate is logged."""
        return study.folder / "evaluation" / self.key(seed)


def _qualified_name(value: Any) -> str:
    """What tells a value that is no JSON from others, and is the same in every process."""
    named = value if hasattr(value, "__qualname__") else type(value)
    return f"{named.__module__}.{named.__qualname__}"


def make_candidate(study: ZooStudy, trial: FrozenTrial | None, n_timesteps: int) -> Candidate:
    """
    :param study: the study
    :param trial: one of its trials; or none, for the entry that all of them started from
    :param n_timesteps: to train for; if 0, as long as in the study
    :return: the candidate, without results
    """
    entry = study.entry(trial)
    if "policy_kwargs" in entry:
        entry["policy_kwargs"] = evaluate_python(entry["policy_kwargs"])
    entry["n_timesteps"] = n_timesteps or int(entry["n_timesteps"])  # an entry may count in floats, as 1e5
    return Candidate(DEFAULT, entry) if trial is None else Candidate(str(trial.number), entry, trial.value)


def store_result(study: ZooStudy, candidate: Candidate, seed: int, result: dict[str, Any]) -> None:
    """
    :param study: keeps the result
    :param candidate: that was trained
    :param seed: of the training
    :param result: of the evaluation after it
    """
    training = {"trial": candidate.label, "seed": seed, "n_timesteps": candidate.entry["n_timesteps"]}
    with storage_errors(study.storage):
        study.optuna_study.set_user_attr(_RESULT + candidate.key(seed), {**training, **result})


def stored_results(study: ZooStudy) -> dict[str, dict[str, Any]]:
    """
    :param study: the study
    :return: what was stored of each training, by :meth:`Candidate.key`
    """
    attributes = study.optuna_study.user_attrs.items()
    return {name.removeprefix(_RESULT): value for name, value in attributes if name.startswith(_RESULT)}


def evaluated_candidates(study: ZooStudy) -> list[Candidate]:
    """
    :param study: the study
    :return: who was trained again and is still the same, with the largest budget that there is, best first
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
"""What :func:`result_rows` are."""


def result_rows(candidates: Sequence[Candidate]) -> list[list[str]]:
    """
    :param candidates: that were trained again
    :return: the rows of a table, its head first
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
    :param candidates: that were trained again
    :return: the lines of a table
    """
    lines = [
        f"  {name:<12} {value:>12} {mean:>10} {std:>8}   {seeds}"
        for name, value, mean, std, seeds in result_rows(candidates)
    ]
    return [f"{TABLE}:", *lines]


def verdict(candidates: Sequence[Candidate]) -> str:
    """
    :param candidates: that were trained again
    :return: which of them is the best, in words
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
