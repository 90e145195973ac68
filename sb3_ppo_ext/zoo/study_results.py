"""``sb3-ppo-ext study evaluate`` and ``export``: whether what a study has found stands, and what it is as YAML."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import hashlib
import json
import math
import shlex
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch as th
import yaml
from optuna.trial import FrozenTrial, TrialState
from rl_zoo3.utils import get_class_by_name

from sb3_ppo_ext.zoo.interrupts import INTERRUPTED
from sb3_ppo_ext.zoo.storage import StudyError, storage_errors
from sb3_ppo_ext.zoo.study import Place
from sb3_ppo_ext.zoo.study_run import last_line
from sb3_ppo_ext.zoo.summary import N_EPISODES, RESULT
from sb3_ppo_ext.zoo.trials import evaluated
from sb3_ppo_ext.zoo.workers import Workers

_PYTHON = ("policy_kwargs", "replay_buffer_kwargs")  # of an entry, what rl_zoo3 evaluates as Python
_RESULT = "sb3_ppo_ext_evaluation_"  # the attributes of a study that hold results begin so
_DEFAULT = "default"  # the candidate that is the entry which the trials started from
# --- evaluate ---


@dataclass
class Candidate:
    """
    What is trained on several seeds.

    :param label: the trial's number, or that it is the default
    :param entry: its hyper-parameters
    :param study_value: what the study has seen of it, in one training
    :param results: mean reward at the end of a training by its seed
    """

    label: str
    entry: dict[str, Any]
    study_value: float | None = None
    results: dict[int, float] = field(default_factory=dict)

    @property
    def mean(self) -> float:
        """Across seeds."""
        return float(np.mean(list(self.results.values())))

    @property
    def std(self) -> float:
        """Across seeds, of the sample; there must be two."""
        return float(np.std(list(self.results.values()), ddof=1))

    def key(self, seed: int) -> str:
        """
        :param seed: of a training
        :return: what makes its result another one
        """
        content = json.dumps(self.entry, sort_keys=True, default=_identity)
        return f"{self.label}_{hashlib.sha256(content.encode()).hexdigest()[:12]}_{seed}"


def _identity(value: Any) -> str:
    """
    :param value: of an entry, that is no JSON
    :return: what tells it from others, and is the same in every process
    """
    named = value if hasattr(value, "__qualname__") else type(value)
    return f"{named.__module__}.{named.__qualname__}"


def _candidate(place: Place, trial: FrozenTrial | None, n_timesteps: int) -> Candidate:
    """
    :param place: the study
    :param trial: one of its trials; or none, for the entry that all of them started from
    :param n_timesteps: to train for; if 0, as long as in the study
    """
    entry = place.entry(trial)
    if "policy_kwargs" in entry:
        entry["policy_kwargs"] = evaluated(entry["policy_kwargs"])
    entry["n_timesteps"] = n_timesteps or int(entry["n_timesteps"])  # an entry may count in floats, as 1e5
    return Candidate(_DEFAULT, entry) if trial is None else Candidate(str(trial.number), entry, trial.value)


def results(place: Place) -> dict[str, dict[str, Any]]:
    """
    :param place: the study
    :return: what was found by training again: by the key of a candidate on a seed, its last evaluation
    """
    attributes = place.study.user_attrs.items()
    return {name.removeprefix(_RESULT): value for name, value in attributes if name.startswith(_RESULT)}


def evaluate(place: Place, options: argparse.Namespace, train_arguments: Sequence[str], again: Sequence[str]) -> int:
    """
    Train the best trials, and the entry they started from, on seeds that the study has not seen.

    :param place: the study
    :param options: of ``study evaluate``
    :param train_arguments: those of ``train``
    :param again: this command
    :return: the exit code
    """
    numbers = dict.fromkeys(options.trials or [])
    trials = [place.trial(number) for number in numbers] if numbers else place.best()[: options.top]
    candidates = [_candidate(place, trial, options.n_timesteps) for trial in (None, *trials)]
    seeds = range(options.first_seed, options.first_seed + options.seeds)
    known = results(place)
    jobs = []
    for seed in seeds:  # one seed of all first: what there is when it is interrupted can be compared
        for candidate in candidates:
            if candidate.key(seed) in known:
                candidate.results[seed] = known[candidate.key(seed)]["mean"]
            else:
                jobs.append((candidate, seed))
    n_trainings = len(candidates) * len(seeds)
    if len(jobs) < n_trainings:
        print(f"{n_trainings - len(jobs)} of {n_trainings} trainings were done before")
    failures: list[str] = []
    try:
        with contextlib.closing(Workers(options.workers)) as workers:
            try:
                _train(place, workers, jobs, train_arguments, failures)
            except KeyboardInterrupt:
                workers.close(interrupt=False)  # what is half trained is of no use
                raise
    except KeyboardInterrupt:
        done = sum(len(candidate.results) for candidate in candidates)
        print(f"\n{done} of {n_trainings} trainings are done and kept. Go on:\n  {shlex.join(again)}")
        return INTERRUPTED
    print("", *table(candidates), sep="\n")
    if failures:
        print("\nFailed:", *failures, sep="\n  ")
        return 1
    winner = max(candidates, key=_rank)
    if winner is candidates[0]:
        print("\nThe winner is the default: no trial beats the entry that they started from.")
        return 0
    print(f"\nThe winner is trial {winner.label}: {_figures(winner)}, the default {_figures(candidates[0])}")
    start = again[: again.index("study") + 1]
    where = ["--study-name", place.name, "-f", options.log_folder]
    where += ["--storage", options.storage] if options.storage else []
    print(f"\nWrite it as YAML:\n  {shlex.join([*start, 'export', '--trial', winner.label, *where])}")
    return 0


def _train(
    place: Place,
    workers: Workers,
    jobs: list[tuple[Candidate, int]],
    train_arguments: Sequence[str],
    failures: list[str],
) -> None:
    """
    :param place: the study
    :param workers: the processes
    :param jobs: who is to be trained, and on which seed; their results are added to the candidates and to the file
    :param train_arguments: those of ``train``
    :param failures: what has failed is added
    """
    present: dict[int, tuple[Candidate, int]] = {}
    waiting = list(jobs)
    done = 0
    while waiting or present:
        for slot in workers.free[: len(waiting)]:
            candidate, seed = present[slot] = waiting.pop(0)
            folder = _run_folder(place, candidate, seed)
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            task = dataclasses.replace(place.task, n_timesteps=candidate.entry["n_timesteps"])
            arguments = ["train", "--num-threads", "1", "--eval-freq", str(2**31), *train_arguments, *task.arguments()]
            arguments += ["--seed", str(seed), "-f", str(folder)]
            if candidate.label != _DEFAULT:
                arguments += _trial_arguments(place, int(candidate.label))
            workers.start(slot, arguments, folder / "train.log")
        for slot, code in workers.ended(timeout=1.0).items():
            candidate, seed = present.pop(slot)
            folder = _run_folder(place, candidate, seed)
            done += 1
            said = f"{done} of {len(jobs)}: {_name(candidate)}, seed {seed}"
            result = next((json.loads(file.read_text()) for file in folder.rglob(RESULT)), None)
            if code or result is None or result["num_timesteps"] < candidate.entry["n_timesteps"]:
                log = folder / "train.log"
                failures.append(f"{_name(candidate)}, seed {seed}: {last_line(log)} ({log})")
                print(f"{said}: failed", flush=True)
                continue
            candidate.results[seed] = result["mean"]
            found = {"trial": candidate.label, "seed": seed, "n_timesteps": candidate.entry["n_timesteps"]}
            with storage_errors(place.storage):
                place.study.set_user_attr(_RESULT + candidate.key(seed), {**found, **result})
            print(f"{said}: {result['mean']:.2f} +/- {result['std']:.2f} over {N_EPISODES} episodes", flush=True)


def _run_folder(place: Place, candidate: Candidate, seed: int) -> Path:
    """
    :param place: the study
    :param candidate: who is trained
    :param seed: of the training
    """
    return place.folder / "evaluation" / candidate.key(seed)


def _trial_arguments(place: Place, number: int) -> list[str]:
    """
    :param place: the study
    :param number: of a trial
    :return: arguments of ``train`` that name the trial
    """
    return ["--storage", place.storage, "--study-name", place.name, "--trial-id", str(number)]


def _name(candidate: Candidate) -> str:
    """
    :param candidate: any
    """
    return candidate.label if candidate.label == _DEFAULT else f"trial {candidate.label}"


def _rank(candidate: Candidate) -> tuple[float, ...]:
    """
    :param candidate: that was trained
    :return: the greatest for the best; of equals the default, or what was better in the study
    """
    if candidate.study_value is None:
        return candidate.mean, float("inf")
    return candidate.mean, candidate.study_value, -int(candidate.label)


def _figures(candidate: Candidate) -> str:
    """
    :param candidate: that was trained
    """
    if len(candidate.results) == 1:
        return f"{candidate.mean:.2f} on one seed"
    return f"{candidate.mean:.2f} +/- {candidate.std:.2f} across {len(candidate.results)} seeds"


def table(candidates: Sequence[Candidate]) -> list[str]:
    """
    :param candidates: that were trained again
    :return: the lines of a table
    """
    lines = [f"Reward at the end of a training ({N_EPISODES} episodes), mean and std across seeds:"]
    lines += [f"  {'':<12} {'in the study':>12} {'mean':>10} {'std':>8}   seeds"]
    for candidate in candidates:
        value = "-" if candidate.study_value is None else f"{candidate.study_value:.2f}"
        each = " ".join(f"{candidate.results[seed]:.1f}" for seed in sorted(candidate.results))
        mean = f"{candidate.mean:.2f}" if candidate.results else "-"
        std = f"{candidate.std:.2f}" if len(candidate.results) > 1 else "-"
        lines += [f"  {_name(candidate):<12} {value:>12} {mean:>10} {std:>8}   {each}"]
    return lines


# --- export ---


def trained_again(place: Place) -> list[Candidate]:
    """
    :param place: the study
    :return: who was trained again and is still the same, with the largest budget that there is, best first
    """
    known = results(place)
    budget = max((result["n_timesteps"] for result in known.values()), default=0)
    candidates: dict[str, Candidate] = {}
    for key, result in known.items():
        label, seed = result["trial"], result["seed"]
        if label not in candidates:
            candidates[label] = _candidate(place, None if label == _DEFAULT else place.trial(int(label)), budget)
        if candidates[label].key(seed) == key:
            candidates[label].results[seed] = result["mean"]
    return sorted((candidate for candidate in candidates.values() if candidate.results), key=_rank, reverse=True)


def export(place: Place, number: int | None, output: Path | None, program: Sequence[str]) -> None:
    """
    Write a trial as a YAML entry.

    :param place: the study
    :param number: of the trial; without, the best of the evaluation, or of the study if there is none
    :param output: the file
    :param program: how ``sb3-ppo-ext`` was started
    """
    candidates = trained_again(place)
    again = {candidate.label: candidate for candidate in candidates}
    default = again.pop(_DEFAULT, None)
    if number is None and again:
        number = int(next(iter(again)))
    trial = place.best()[0] if number is None else place.trial(number)
    chosen = again.get(str(trial.number)) or _candidate(place, trial, 0)
    task, (budget, _) = place.task, trial.user_attrs.get("budget", (chosen.entry["n_timesteps"], 1))
    complete, pruned = (len(place.trials(state)) for state in (TrialState.COMPLETE, TrialState.PRUNED))
    comment = [
        f"Trial {trial.number} of the Optuna study {place.name}: {task.algo} on {task.env}, "
        f"{complete} complete and {pruned} pruned trials of {budget} steps each.",
        f"In the study, one training: {trial.value:.2f}.",
    ]
    if chosen.results:
        seeds = f"{min(chosen.results)} to {max(chosen.results)}"
        comment += [
            f"Trained again for {chosen.entry['n_timesteps']} steps with seeds {seeds}, reward at the end over "
            f"{N_EPISODES} episodes: {_figures(chosen)};",
            f"chosen among {len(again)} trials on these seeds.",
        ]
        if default is not None:
            comment += [f"The entry that the study started from, trained the same way: {_figures(default)}."]
    else:
        comment += ["Not trained again since."]
    text = _yaml(place, trial, chosen.entry, comment, program)
    file = output or place.folder / f"trial-{trial.number}.yml"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)
    print(f"trial {trial.number}: {file}")
    if not candidates:
        print("It was not trained again: `study evaluate` says whether it is good or was lucky.")
    elif candidates[0] is not chosen:
        figures = _figures(chosen) if chosen.results else "which was not trained again"
        print(f"Better when trained again: {_name(candidates[0])}, {_figures(candidates[0])}; this one: {figures}.")
    command = [*program, "train", *task.environment_arguments(), "-conf", str(file)]
    print(f"\nTrain with it:\n  {shlex.join(command)}")


def _yaml(
    place: Place, trial: FrozenTrial, entry: dict[str, Any], comment: Sequence[str], program: Sequence[str]
) -> str:
    """
    :param place: the study
    :param trial: one of its trials
    :param entry: its hyper-parameters
    :param comment: lines above
    :param program: how ``sb3-ppo-ext`` was started
    :return: a YAML file
    """
    try:
        kwargs = {name: _source(value) for name, value in entry.items() if name in _PYTHON and isinstance(value, dict)}
        text = yaml.safe_dump({place.task.env: {**entry, **kwargs}}, width=1000)
    except (StudyError, yaml.YAMLError) as error:
        train = [*program, "train", *place.task.arguments(), *_trial_arguments(place, trial.number)]
        reason = str(error).splitlines()[0]
        raise StudyError(f"YAML cannot say the entry ({reason}); train with it by {shlex.join(train)}") from error
    return "".join(f"# {line}".rstrip() + "\n" for line in comment) + str(text)


def _source(value: Any) -> str:
    """
    :param value: of ``policy_kwargs``
    :return: Python for it, as rl_zoo3 evaluates it
    :raises StudyError: if there is none
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
