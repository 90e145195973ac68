"""``sb3-ppo-ext study export``: a trial as an entry of a YAML file."""

from __future__ import annotations

import contextlib
import math
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch as th
import yaml
from optuna.trial import FrozenTrial, TrialState
from rl_zoo3.utils import get_class_by_name

from sb3_ppo_ext.common.saving.files import write_whole
from sb3_ppo_ext.zoo.errors import StudyError
from sb3_ppo_ext.zoo.study.candidates import DEFAULT, Candidate, evaluated_candidates, make_candidate
from sb3_ppo_ext.zoo.study.study import ZooStudy
from sb3_ppo_ext.zoo.study.trials import BUDGET
from sb3_ppo_ext.zoo.summary import N_EPISODES

_PYTHON = ("policy_kwargs", "replay_buffer_kwargs")  # keys of an entry whose strings rl_zoo3 evaluates as Python


def export(study: ZooStudy, number: int | None, output: Path | None, program: Sequence[str]) -> None:
    """
    Write a trial as a YAML entry.

    :param study: the study
    :param number: number of the trial; None for the best in the evaluation, or in the study if there was none
    :param output: the file; None for a file in the study's folder
    :param program: command that started ``sb3-ppo-ext``
    """
    candidates = evaluated_candidates(study)
    evaluated = {candidate.label: candidate for candidate in candidates}
    default = evaluated.pop(DEFAULT, None)
    if number is None and evaluated:
        number = int(next(iter(evaluated)))
    trial = study.best_trials()[0] if number is None else study.trial(number)
    chosen = evaluated.get(str(trial.number)) or make_candidate(study, trial, 0)
    comment = _comment(study, trial, chosen, default, len(evaluated))
    content = "".join(f"# {line}".rstrip() + "\n" for line in comment) + _yaml(study, trial, chosen.entry, program)
    file = output or study.folder / f"trial-{trial.number}.yml"
    file.parent.mkdir(parents=True, exist_ok=True)
    write_whole(file, memoryview(content.encode()))
    print(f"trial {trial.number}: {file}")
    if not candidates:
        print("It was not trained again: `study evaluate` shows whether it is good or was lucky.")
    elif candidates[0] is not chosen:
        this = chosen.describe() if chosen.results else "which was not trained again"
        print(f"Better when trained again: {candidates[0].name}, {candidates[0].describe()}; this one: {this}.")
    command = [*program, "train", *study.task.environment_arguments(), "-conf", str(file)]
    print(f"\nTrain with it:\n  {shlex.join(command)}")


def _comment(
    study: ZooStudy, trial: FrozenTrial, chosen: Candidate, default: Candidate | None, n_evaluated: int
) -> list[str]:
    """
    :param study: the study
    :param trial: the trial to write
    :param chosen: the trial as a candidate, with its results
    :param default: the entry that it started from, with its results, if there are any
    :param n_evaluated: number of trials with results
    :return: lines that say where the entry comes from, and how good it is
    """
    task, (budget, _) = study.task, trial.user_attrs.get(BUDGET, (chosen.entry["n_timesteps"], 1))
    complete, pruned = (len(study.trials(state)) for state in (TrialState.COMPLETE, TrialState.PRUNED))
    comment = [
        f"Trial {trial.number} of the Optuna study {study.name}: {task.algo} on {task.env}, "
        f"{complete} complete and {pruned} pruned trials of {budget} steps each.",
        f"In the study, one training: {trial.value:.2f}.",
    ]
    if not chosen.results:
        return [*comment, "Not trained again since."]
    seeds = ", ".join(map(str, sorted(chosen.results)))
    if len(chosen.results) == max(chosen.results) - min(chosen.results) + 1 > 2:
        seeds = f"{min(chosen.results)} to {max(chosen.results)}"
    comment += [
        f"Trained again for {chosen.entry['n_timesteps']} steps with seeds {seeds}, reward at the end over "
        f"{N_EPISODES} episodes: {chosen.describe()};",
        f"chosen among {n_evaluated} trials on these seeds.",
    ]
    if default is not None:
        comment += [f"The entry that the study started from, trained the same way: {default.describe()}."]
    return comment


def _yaml(study: ZooStudy, trial: FrozenTrial, entry: dict[str, Any], program: Sequence[str]) -> str:
    """
    :param study: the study
    :param trial: one of its trials
    :param entry: its hyper-parameters
    :param program: command that started ``sb3-ppo-ext``
    :return: the entry as YAML
    :raises StudyError: if YAML cannot express it
    """
    try:
        kwargs = {name: _source(value) for name, value in entry.items() if name in _PYTHON and isinstance(value, dict)}
        return str(yaml.safe_dump({study.task.env: {**entry, **kwargs}}, width=1000))
    except (StudyError, yaml.YAMLError) as error:
        train = [*program, "train", *study.task.arguments(), *study.trial_arguments(trial.number)]
        reason = str(error).splitlines()[0]
        raise StudyError(f"YAML cannot express the entry ({reason}); train with it by {shlex.join(train)}") from error


def _source(value: Any) -> str:
    """
    :param value: a value in ``policy_kwargs``
    :return: Python source that rl_zoo3 evaluates to it
    :raises StudyError: if there is no such source
    """
    if isinstance(value, dict):
        if all(isinstance(name, str) and name.isidentifier() for name in value):
            return f"dict({', '.join(f'{name}={_source(part)}' for name, part in value.items())})"
        return f"{{{', '.join(f'{_source(name)}: {_source(part)}' for name, part in value.items())}}}"
    if isinstance(value, (list, tuple)):
        parts = ", ".join(map(_source, value))
        return f"[{parts}]" if isinstance(value, list) else f"({parts},)"
    if isinstance(value, float):
        return repr(value) if math.isfinite(value) else f"float('{value}')"
    if value is None or isinstance(value, (bool, int, str)):
        return repr(value)
    name = getattr(value, "__name__", type(value).__name__)
    if getattr(th.nn, name, None) is value:
        return f"nn.{name}"
    path = f"{getattr(value, '__module__', None)}.{name}"
    with contextlib.suppress(ImportError, AttributeError, ValueError):
        if get_class_by_name(path) is value:
            return f"get_class_by_name('{path}')"
    raise StudyError(f"no module has {name}")
