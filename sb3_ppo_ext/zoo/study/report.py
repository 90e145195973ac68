"""``sb3-ppo-ext study show``: print the results of a study, and write them as a page and a picture."""

from __future__ import annotations

import re
import shlex
import textwrap
from collections.abc import Sequence

from optuna.trial import FrozenTrial, TrialState

from sb3_ppo_ext.common.saving.files import write_whole
from sb3_ppo_ext.zoo.errors import StudyError
from sb3_ppo_ext.zoo.study.candidates import (
    DEFAULT,
    Candidate,
    evaluated_candidates,
    result_table,
    verdict,
)
from sb3_ppo_ext.zoo.study.page import Missing, page, summary
from sb3_ppo_ext.zoo.study.plots import as_picture, hyperparam_plots, importances, search_plots, why_no_importances
from sb3_ppo_ext.zoo.study.study import ZooStudy
from sb3_ppo_ext.zoo.study.trials import REASON, decode_param, explain_drawn, format_value

_WIDTH = 100  # of the table of trials, in characters


def show(study: ZooStudy, n_trials: int, program: Sequence[str]) -> None:
    """
    Print the best trials and their results on fresh seeds, and write the page and the picture.

    :param study: the study
    :param n_trials: how many of the best trials are printed
    :param program: command that started ``sb3-ppo-ext``
    :raises StudyError: if it has no trial
    """
    has_none_complete = study.trials() and not study.trials(TrialState.COMPLETE)
    best = [] if has_none_complete else study.best_trials()[:n_trials]
    explained = importances(study)
    candidates, no_results = _evaluated(study)
    no_importances = "" if explained else f"Which hyper-parameters matter is not shown: {why_no_importances(study)}."
    print(f"study {study.name}: {summary(study)}")
    if best:
        explains = ", and how much of the difference between good and other trials each hyper-parameter explains"
        print(f"\nThe best trials, of one training each{explains if explained else ''}:\n")
        for line in trial_table(study, best, explained):
            print(line)
        labels = {label for trial in best for label, _ in study.hyperparams(trial).values()}
        for line in textwrap.wrap(explain_drawn(labels), _WIDTH, break_on_hyphens=False):
            print(line)
    if no_importances:
        print(f"\n{no_importances}")
    if candidates:
        print("\nTrained again, on fresh seeds.", *result_table(candidates), "", verdict(candidates), sep="\n")
    else:
        print(f"\n{no_results}")
    errors = _errors(study)
    if errors:
        print("\nEnded early, for a reason that is known:", *(f"  {line}" for line in errors), sep="\n")
    commands = _commands(study, candidates, program)
    missing = Missing(no_results, no_importances)
    search, hyperparams = search_plots(study, explained, candidates), hyperparam_plots(study, explained)
    text, picture = study.folder / "report.html", study.folder / "report.png"
    write_whole(text, memoryview(page(study, candidates, search, hyperparams, missing, commands).encode()))
    write_whole(picture, as_picture([*search, *hyperparams]))
    print(f"\nWith plots:\n  {text}\n  {picture}")
    for what, command in commands.items():
        print(f"\n{what}:\n  {command}")


def _commands(study: ZooStudy, candidates: Sequence[Candidate], program: Sequence[str]) -> dict[str, str]:
    """Commands for the next step, by what they do."""
    commands: dict[str, list[str]] = {}
    evaluated = [candidate.label for candidate in candidates if candidate.label != DEFAULT]
    if study.trials(TrialState.COMPLETE) and str(study.best_trials()[0].number) not in evaluated:
        commands["Train the best again, on fresh seeds"] = [*program, "study", "evaluate", *study.arguments]
    if candidates and candidates[0].label == DEFAULT:
        commands["Train with the entry, which no trial beats"] = [*program, "train", *study.task.arguments()]
    elif evaluated:
        commands["Write the winner as YAML"] = [*program, "study", "export", *study.arguments]
        environment, file = study.task.environment_arguments(), study.folder / f"trial-{evaluated[0]}.yml"
        commands["Then train with it"] = [*program, "train", *environment, "-conf", str(file)]
    commands["See the study while it runs, in a browser (pip install optuna-dashboard)"] = [
        "optuna-dashboard",
        study.storage,
    ]
    return {what: shlex.join(command) for what, command in commands.items()}


def _evaluated(study: ZooStudy) -> tuple[list[Candidate], str]:
    """The candidates that were trained again; and if there are none to show, why."""
    try:
        candidates = evaluated_candidates(study)
    except StudyError as error:
        return [], f"There are results of `study evaluate`, which cannot be shown: {error}."
    return candidates, "" if candidates else "No trial has been trained again yet. The best one is often just lucky."


def trial_table(study: ZooStudy, trials: Sequence[FrozenTrial], explained: dict[str, float]) -> list[str]:
    """
    :param study: the study
    :param trials: some of its trials
    :param explained: :func:`importances`
    :return: the lines of a table, at most :data:`_WIDTH` characters wide, with a row for each trial. Hyper-parameters
        that have the same value in all of these trials come last; otherwise the most important one comes first. Those
        that do not fit are named below the table
    """
    hyperparams = [study.hyperparams(trial) for trial in trials]
    names = dict.fromkeys([*explained, *(name for values in hyperparams for name in values)])
    cells = {
        name: [format_value(values[name][1]) if name in values else "" for values in hyperparams] for name in names
    }
    columns = [
        _column("", [*(["explains"] if explained else []), *(f"trial {trial.number}" for trial in trials)]),
        _column("value", [*([""] if explained else []), *(f"{trial.value:.2f}" for trial in trials)]),
    ]
    left_out = []
    for name in sorted(names, key=lambda name: len(set(cells[name])) == 1):
        label = next((values[name][0] for values in hyperparams if name in values), decode_param(name, 0)[0])
        share = [f"{explained[name]:.0%}" if name in explained else ""] if explained else []
        column = _column(label, [*share, *cells[name]])
        if sum(1 + len(other[0]) for other in [*columns, column]) < _WIDTH:
            columns.append(column)
        else:
            left_out.append(label)
    height = max(map(len, columns))
    full = [[" " * len(column[0])] * (height - len(column)) + column for column in columns]
    lines = [f"  {' '.join(row)}".rstrip() for row in zip(*full, strict=True)]
    if left_out:
        lines += ["", *textwrap.wrap(f"Only on the page: {', '.join(left_out)}.", _WIDTH)]
    return lines


def _column(name: str, cells: Sequence[str]) -> list[str]:
    """
    Lines of the same width: the name, in two lines, broken at an underscore, where it is wider than the cells; then the
    cells.
    """
    width = max(map(len, ["", *cells]))
    places = [match.end() for match in re.finditer("_", name)] if len(name) > width else []
    place = min(places, key=lambda end: max(end, len(name) - end), default=0)
    head = [name[:place], name[place:]] if place else [name]
    width = max(width, *map(len, head))
    return [f"{line:>{width}}" for line in [*head, *cells]]


def _errors(study: ZooStudy) -> list[str]:
    """A line for each reason why trials failed or were pruned."""
    numbers: dict[str, list[str]] = {}
    for trial in study.trials():
        if REASON in trial.user_attrs:
            numbers.setdefault(trial.user_attrs[REASON], []).append(str(trial.number))
    return [
        f"{'trial' if len(them) == 1 else 'trials'} {', '.join(them)}: {reason}" for reason, them in numbers.items()
    ]
