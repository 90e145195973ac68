"""``sb3-ppo-ext study show``: what a study has found, as text; and as a page and a picture, which are written."""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from optuna.trial import FrozenTrial

from sb3_ppo_ext.zoo.errors import StudyError
from sb3_ppo_ext.zoo.study.candidates import evaluated_candidates, result_table, stored_results
from sb3_ppo_ext.zoo.study.plots import importances, why_no_importances, write_plots
from sb3_ppo_ext.zoo.study.study import ZooStudy
from sb3_ppo_ext.zoo.study.trials import REASON, decode_param, format_value


def show(study: ZooStudy, n_trials: int, program: Sequence[str]) -> None:
    """
    Print the best trials and what became of them, and write the plots.

    :param study: the study
    :param n_trials: how many of the best are printed
    :param program: how ``sb3-ppo-ext`` was started
    """
    best = study.best_trials()[:n_trials]
    explained = importances(study)
    print(study.counts())
    explains = ", and how much of the difference between good trials and others a hyper-parameter explains"
    print(f"\nThe best trials, of one training each{explains if explained else ''}:\n")
    for line in _trial_table(study, best, explained):
        print(line)
    if not explained:
        print(f"\nWhich hyper-parameters matter is not shown: {why_no_importances(study)}.")
    evaluation = _evaluation(study)
    if evaluation:
        print("\nTrained again, on fresh seeds.", *evaluation, sep="\n")
    errors = _errors(study)
    if errors:
        print("\nEnded early, for a reason that is known:", *(f"  {line}" for line in errors), sep="\n")
    if evaluation:
        commands = {"Write the best as YAML": shlex.join([*program, "study", "export", *study.arguments])}
    else:
        evaluate = [*program, "study", "evaluate", *study.arguments]
        commands = {"Train the best again, on fresh seeds": shlex.join(evaluate)}
    live = f"optuna-dashboard {shlex.quote(study.storage)}"
    commands["Live, in a browser (pip install optuna-dashboard)"] = live
    page, picture = write_plots(study, evaluation, commands)
    print(f"\nPlots:\n  {page}\n  {picture}")
    for what, command in commands.items():
        print(f"\n{what}:\n  {command}")


def _trial_table(study: ZooStudy, trials: Sequence[FrozenTrial], explained: dict[str, float]) -> list[str]:
    """
    :param study: the study
    :param trials: some of its trials
    :param explained: :func:`importances`
    :return: the lines of a table, with a column for each trial
    """
    hyperparams = [study.hyperparams(trial) for trial in trials]
    names = dict.fromkeys([*explained, *(name for values in hyperparams for name in values)])
    rows = [["", *(["explains"] if explained else []), *(f"trial {trial.number}" for trial in trials)]]
    rows += [["value", *([""] if explained else []), *(f"{trial.value:.2f}" for trial in trials)]]
    for name in names:
        label = next((values[name][0] for values in hyperparams if name in values), decode_param(name, 0)[0])
        share = [f"{explained[name]:.0%}" if name in explained else ""] if explained else []
        cells = [format_value(values[name][1]) if name in values else "" for values in hyperparams]
        rows += [[label, *share, *cells]]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        f"  {label:<{widths[0]}} " + " ".join(f"{cell:>{width}}" for cell, width in zip(cells, widths[1:], strict=True))
        for label, *cells in rows
    ]


def _evaluation(study: ZooStudy) -> list[str]:
    """The lines of a table of what was trained again; none, if nothing was."""
    if not stored_results(study):
        return []
    try:
        return result_table(evaluated_candidates(study))
    except StudyError as error:
        return [f"There are results, which cannot be shown: {error}"]


def _errors(study: ZooStudy) -> list[str]:
    """For each reason that a trial has failed or was pruned for, a line."""
    numbers: dict[str, list[str]] = {}
    for trial in study.trials():
        if REASON in trial.user_attrs:
            numbers.setdefault(trial.user_attrs[REASON], []).append(str(trial.number))
    return [
        f"{'trial' if len(them) == 1 else 'trials'} {', '.join(them)}: {reason}" for reason, them in numbers.items()
    ]
