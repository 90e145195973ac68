"""The results of a study as one HTML page that loads no other files, for screens of any size and for paper."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from html import escape
from typing import NamedTuple

from optuna.trial import TrialState

from sb3_ppo_ext.doctor.document import document
from sb3_ppo_ext.zoo.errors import StudyError
from sb3_ppo_ext.zoo.study.candidates import TABLE, Candidate, result_rows, verdict
from sb3_ppo_ext.zoo.study.plots import BEST, IN_PAGE, MARKS, Plot, as_svg
from sb3_ppo_ext.zoo.study.storage import state_name
from sb3_ppo_ext.zoo.study.study import ZooStudy
from sb3_ppo_ext.zoo.study.trials import BUDGET, REASON, duration, evaluations, explain_drawn, format_value, last_value

_SYMBOLS = {"o": "●", "x": "\u00d7", "s": "□", "v": "▼", "*": "★"}  # by matplotlib's markers


class Missing(NamedTuple):
    """
    Sentences that say why something is not shown; empty where it is shown.

    :param results: about the results of ``study evaluate``
    :param importances: about the importances of hyper-parameters
    """

    results: str
    importances: str


def page(
    study: ZooStudy,
    candidates: Sequence[Candidate],
    search: Sequence[Plot],
    hyperparams: Sequence[Plot],
    missing: Missing,
    commands: Mapping[str, str],
) -> str:
    """
    :param study: the study
    :param candidates: candidates that were trained again
    :param search: plots of all trials
    :param hyperparams: plots of the trials' values by hyper-parameter
    :param missing: why something is not shown
    :param commands: commands for the next step, by what they do
    :return: the page
    """
    parts = [f'<p class="soft">{escape(_subject(study))}</p>', f'<p class="verdict">{escape(summary(study))}</p>']
    if candidates:
        parts.append(f'<p class="verdict">{escape(verdict(candidates))}</p>')
    parts.append("<h2>Go on</h2>")
    for what, command in commands.items():
        parts.append(f"<p>{escape(what)}:</p><pre>{escape(command)}</pre>")
    parts.append(
        "<p>To search on, repeat the command that began the study, with a larger <code>--max-total-trials</code>.</p>"
    )
    parts.append("<h2>Trained again, on fresh seeds</h2>")
    if candidates:
        parts += [f"<p>{escape(TABLE)}:</p>", _table(result_rows(candidates))]
    else:
        parts.append(f"<p>{escape(missing.results)}</p>")
    parts += ["<h2>The search</h2>", _charts(search)]
    if missing.importances:
        parts.append(f"<p>{escape(missing.importances)}</p>")
    if hyperparams:
        labels = {label for trial in study.trials() for label, _ in study.hyperparams(trial).values()}
        explained = escape(explain_drawn(labels))
        said = [f'<p class="soft">{explained}</p>'] if explained else []
        parts += ["<h2>Reward by hyper-parameter</h2>", *said, _key(study), _charts(hyperparams, "code")]
    return document(f"Study {study.name}", [*parts, _trials(study)])


def summary(study: ZooStudy) -> str:
    """The number of trials, and the best of them."""
    complete = study.trials(TrialState.COMPLETE)
    if not complete:
        return f"{study.counts()}. No trial is complete yet."
    best = study.best_trials()[0]
    return f"{study.counts()}. The best is trial {best.number}: {best.value:.2f}, of one training."


def _subject(study: ZooStudy) -> str:
    """The algorithm, the task and the budgets of the trials, as far as they are known."""
    said = []
    with contextlib.suppress(StudyError):  # another program has made the study
        said.append(f"{study.task.algo} on {study.task.env}")
    budgets = {tuple(trial.user_attrs[BUDGET]) for trial in study.trials() if BUDGET in trial.user_attrs}
    said += [f"{steps:,} steps a trial, evaluated {times} time{'s' * (times > 1)}" for steps, times in sorted(budgets)]
    return ", ".join(said)


def _charts(plots: Sequence[Plot], tag: str = "span") -> str:
    figures = (
        f"<figure>{as_svg(plot)}<figcaption><{tag}>{escape(plot.name)}</{tag}></figcaption></figure>" for plot in plots
    )
    return f'<div class="charts">{"".join(figures)}</div>'


def _key(study: ZooStudy) -> str:
    """The legend of the marks in the plots."""
    with_value = {trial.state for trial in study.trials() if last_value(trial) is not None}
    marks = [(mark, _meaning(state)) for state, mark in MARKS.items() if state in with_value]
    if TrialState.COMPLETE in with_value:
        marks.append((BEST, "the best"))
    items = (
        f'<span style="color: {IN_PAGE.get(mark["color"], mark["color"])}">{_SYMBOLS[mark["marker"]]}</span> {name}'
        for mark, name in marks
    )
    return f'<p class="soft">{" &ensp; ".join(items)}</p>'


def _meaning(state: TrialState) -> str:
    return state_name(state) if state is TrialState.COMPLETE else f"{state_name(state)}, at its last evaluation"


def _trials(study: ZooStudy) -> str:
    """A table of all trials, the best first; values that are the same in all trials are listed above it."""
    complete = study.best_trials() if study.trials(TrialState.COMPLETE) else []
    trials = [*complete, *(trial for trial in study.trials() if trial.state is not TrialState.COMPLETE)]
    hyperparams = [
        {label: format_value(value) for label, value in study.hyperparams(trial).values()} for trial in trials
    ]
    names = list(dict.fromkeys(name for values in hyperparams for name in values))
    columns = {name: [values.get(name, "") for values in hyperparams] for name in names}
    same = {name: cells[0] for name, cells in columns.items() if len(trials) > 1 and len(set(cells)) == 1}
    reasons = [str(trial.user_attrs.get(REASON, "")) for trial in trials]
    table = {
        "trial": [str(trial.number) for trial in trials],
        "state": [state_name(trial.state) for trial in trials],
        "reward": ["" if (value := last_value(trial)) is None else f"{value:.2f}" for trial in trials],
        "steps": [f"{max(evaluations(trial), default=0):,}" for trial in trials],
        "time": [duration(trial) for trial in trials],
        **({"reason": reasons} if any(reasons) else {}),
        **{name: cells for name, cells in columns.items() if name not in same},
    }
    said = "The best trials come first. The reward is that of the last evaluation, after the steps in the next column."
    if same:
        said += f" The same in all trials: {', '.join(f'{name} {value}' for name, value in same.items())}."
    rows = _table([list(table), *zip(*table.values(), strict=True)])
    return f'<section class="wide"><h2>All trials</h2><p class="soft">{escape(said)}</p>{rows}</section>'


def _table(rows: Sequence[Sequence[str]]) -> str:
    """A table whose first row is the head. Long texts may take two lines."""
    head, *body = rows
    widths = [max((len(cell) for cell in cells if " " in cell), default=0) for cells in zip(*body, strict=True)]
    attributes = [
        f' class="words" style="min-width: {min(width, 60) // 2 + 5}ch"' if width > 12 else "" for width in widths
    ]

    def line(tag: str, cells: Sequence[str]) -> str:
        parts = (f"<{tag}{attribute}>{cell}</{tag}>" for attribute, cell in zip(attributes, cells, strict=True))
        return f"<tr>{''.join(parts)}</tr>"

    names = line("th", [escape(name).replace("_", "_<wbr>") for name in head])
    lines = "".join(line("td", [escape(cell) for cell in row]) for row in body)
    return f'<div class="table"><table><thead>{names}</thead><tbody>{lines}</tbody></table></div>'
