"""A stored study: its trials, hyper-parameters and task."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState
from rl_zoo3.hyperparams_opt import HYPERPARAMS_CONVERTER

from sb3_ppo_ext.zoo.errors import StudyError
from sb3_ppo_ext.zoo.study.storage import (
    complete_trial,
    load_study,
    open_storage,
    state_name,
    storage_errors,
    without_password,
)
from sb3_ppo_ext.zoo.study.task import Task
from sb3_ppo_ext.zoo.study.trials import REASON, decode_param, merge_hyperparams

_TASK = "sb3_ppo_ext"  # the attribute of an Optuna study that holds its task


@dataclass
class ZooStudy:
    """
    An Optuna study with its storage, its task and its folder.

    :param name: name of the study
    :param storage: a path that ends in ``.log``, or the URL of a database, as in rl_zoo3
    :param folder: folder for the files about the study
    :param optuna_study: the Optuna study
    :param arguments: arguments that select the study in a ``study`` command
    """

    name: str
    storage: str
    folder: Path
    optuna_study: optuna.Study
    arguments: list[str]

    def trials(self, *states: TrialState) -> list[FrozenTrial]:
        """The trials in these states, or all trials if no state is given."""
        return self.optuna_study.get_trials(deepcopy=False, states=states or None)

    def best_trials(self) -> list[FrozenTrial]:
        """
        :return: the complete trials, best first
        :raises StudyError: if no trial is complete
        """
        trials = self.trials(TrialState.COMPLETE)
        if not trials:
            reasons = [trial.user_attrs[REASON] for trial in self.trials() if REASON in trial.user_attrs]
            last = f"; the last of {len(self.trials())} ended with {reasons[-1]}" if reasons else ""
            raise StudyError(f"study '{self.name}' has no complete trial yet{last}")
        return sorted(trials, key=lambda trial: trial.value or 0.0, reverse=True)

    def trial(self, number: int) -> FrozenTrial:
        """The complete trial with this number."""
        return complete_trial(self.optuna_study, number)

    def trial_arguments(self, number: int) -> list[str]:
        """The arguments of ``train`` that select a trial."""
        return ["--storage", self.storage, "--study-name", self.name, "--trial-id", str(number)]

    def counts(self) -> str:
        """The number of trials in each state, in words."""
        counts = [(len(self.trials(state)), state_name(state)) for state in TrialState]
        return ", ".join(f"{count} {name}" for count, name in counts if count)

    def entry(self, trial: FrozenTrial | None) -> dict[str, Any]:
        """
        :param trial: a trial of the study, or None for the entry that all of them started from
        :return: its hyper-parameters
        """
        entry = self.task.entry()
        return entry if trial is None else merge_hyperparams(entry, self._converted(trial))

    def _converted(self, trial: FrozenTrial) -> dict[str, Any]:
        """The hyper-parameters that were drawn for a trial."""
        try:
            return dict(HYPERPARAMS_CONVERTER[self.task.algo](dict(trial.params)))
        except KeyError as error:
            raise StudyError(
                f"trial {trial.number} of study '{self.name}' was drawn from another search space: "
                f"the converter of {self.task.algo} finds no {error}"
            ) from error

    def hyperparams(self, trial: FrozenTrial) -> dict[str, tuple[str, Any]]:
        """
        :param trial: a trial of the study
        :return: by the sampler's names, the hyper-parameters that were drawn and their values; then, by their own
            names, the hyper-parameters that are computed from these
        """
        try:
            converted = self._converted(trial)
        except StudyError:  # a trial of another program has drawn values only
            converted = {}
        inner = converted.pop("policy_kwargs", {})
        decoded = {key: decode_param(key, value) for key, value in trial.params.items()}
        values = {key: (name, converted.get(name, inner.get(name, value))) for key, (name, value) in decoded.items()}
        names = {name for name, _ in decoded.values()}
        return {**values, **{name: (name, value) for name, value in converted.items() if name not in names}}

    @property
    def task(self) -> Task:
        """The task of its trials."""
        if _TASK not in self.optuna_study.user_attrs:
            raise StudyError(
                f"study '{self.name}' was not made by `study run`, which would have noted what it trains; "
                "`study run` with its name adopts it"
            )
        return Task(**self.optuna_study.user_attrs[_TASK])

    def set_task(self, task: Task) -> None:
        """
        :param task: the task of the trials
        :raises StudyError: if the study already has another task
        """
        if _TASK in self.optuna_study.user_attrs:
            before = self.task
            for name, value in vars(before).items():
                if value != getattr(task, name):
                    raise StudyError(
                        f"study '{self.name}' was begun with {name}={value!r}, not {getattr(task, name)!r}; "
                        "another --study-name begins another study"
                    )
        else:
            self.optuna_study.set_user_attr(_TASK, vars(task))


def create_study(options: argparse.Namespace) -> ZooStudy:
    """
    :param options: options of ``study run``
    :return: the study, which is created if it does not exist
    """
    name = options.study_name or f"{options.algo}_{options.env}".replace("/", "-")
    storage = options.storage or str(_folder(options, name) / "study.log")
    opened = open_storage(storage, create=True)
    with storage_errors(storage):
        optuna.create_study(storage=opened, study_name=name, load_if_exists=True, direction="maximize")
    return _zoo_study(options, name, storage, load_study(storage, opened, name))


def find_study(options: argparse.Namespace) -> ZooStudy:
    """
    :param options: options of a ``study`` command other than ``run``
    :return: the study that they name, or the only one that there is
    """
    opened, name = None, options.study_name
    if options.storage:
        where = without_password(options.storage)
        opened = open_storage(options.storage, create=False)
        with storage_errors(options.storage):
            names = optuna.get_all_study_names(opened)
    else:
        where = str(Path(options.log_folder, "studies"))
        names = sorted(file.parent.name for file in Path(where).glob("*/study.log"))
    if not names:
        raise StudyError(f"there is no study in {where}; -f or --storage name another place")
    if name is None and len(names) > 1:
        raise StudyError(f"--study-name must say which study of {where} is meant: {', '.join(sorted(names))}")
    if name is not None and name not in names:
        raise StudyError(f"there is no study '{name}' in {where}; it has {', '.join(sorted(names))}")
    name = name or names[0]
    storage = options.storage or str(_folder(options, name) / "study.log")
    opened = opened or open_storage(storage, create=False)
    return _zoo_study(options, name, storage, load_study(storage, opened, name))


def _folder(options: argparse.Namespace, name: str) -> Path:
    if "/" in name or name in ("", ".", ".."):
        raise StudyError(f"study name {name!r} is not allowed: it must also be the name of a folder")
    return Path(options.log_folder, "studies", name)


def _zoo_study(options: argparse.Namespace, name: str, storage: str, study: optuna.Study) -> ZooStudy:
    folder = _folder(options, name)
    folder.mkdir(parents=True, exist_ok=True)
    arguments = ["--study-name", name, "-f", options.log_folder]
    arguments += ["--storage", options.storage] if options.storage else []
    return ZooStudy(name, storage, folder, study, arguments)
