"""The plots of a study: as SVG elements for its page, and together as one picture."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable, Sequence
from html import escape
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, FuncFormatter, LogLocator, MaxNLocator, NullFormatter
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.exceptions import ExperimentalWarning
from optuna.importance import PedAnovaImportanceEvaluator, get_param_importances
from optuna.trial import FrozenTrial, TrialState

from sb3_ppo_ext.plots.style import BLUE, GREEN, PURPLE, SETTINGS, VERMILLION
from sb3_ppo_ext.zoo.study.candidates import Candidate
from sb3_ppo_ext.zoo.study.storage import state_name
from sb3_ppo_ext.zoo.study.study import ZooStudy
from sb3_ppo_ext.zoo.study.trials import decode_param, evaluations, format_value, last_value

_FEWEST = 10  # complete trials, for importances
_LARGEST = 10  # number of importances that are drawn
_SIZE = (3.6, 2.5)  # of a plot, in inches
_COLUMNS = 3  # of the picture

_INK, _SOFT, _RULE = "#1d2430", "#5c6675", "#dde1e7"
IN_PAGE = {
    _INK: "var(--ink)",
    _SOFT: "var(--soft)",
    _RULE: "var(--rule)",
    BLUE.lower(): "var(--blue)",
    VERMILLION.lower(): "var(--vermillion)",
    "'DejaVu Sans'": "system-ui, 'Segoe UI', Roboto, 'Liberation Sans'",
}
"""The colours and the font of the page, which may be light on dark, in place of those of the plots."""

_SETTINGS = {
    **SETTINGS,
    "text.color": _SOFT, "axes.labelcolor": _SOFT, "xtick.color": _SOFT, "ytick.color": _SOFT,
    "axes.edgecolor": _SOFT, "grid.color": _RULE, "grid.alpha": 1.0,
    "font.size": 8, "axes.labelsize": 8, "xtick.labelsize": 7.5, "ytick.labelsize": 7.5, "legend.fontsize": 7.5,
    "legend.handletextpad": 0.3, "legend.columnspacing": 1.0, "legend.borderaxespad": 0.1,
    "lines.markersize": 4.5, "figure.constrained_layout.use": True,
    "svg.fonttype": "none",  # text stays text
}  # fmt: skip

BEST: dict[str, Any] = {"marker": "*", "color": _INK, "markersize": 9, "linestyle": "", "zorder": 4}
"""How the best of the complete trials is drawn."""

MARKS: dict[TrialState, dict[str, Any]] = {
    TrialState.COMPLETE: {"marker": "o", "color": BLUE.lower()},
    TrialState.PRUNED: {"marker": "x", "color": VERMILLION.lower()},
    TrialState.RUNNING: {"marker": "s", "color": GREEN, "markerfacecolor": "none"},
    TrialState.FAIL: {"marker": "v", "color": PURPLE},
}
"""How a trial is drawn, by its state."""


class Plot(NamedTuple):
    """
    :param name: title of the plot
    :param draw: function that draws it
    """

    name: str
    draw: Callable[[Axes], None]


def why_no_importances(study: ZooStudy) -> str:
    """Why there are no :func:`importances`, for a message."""
    complete = len(study.trials(TrialState.COMPLETE))
    if complete < _FEWEST:
        return f"that takes at least {_FEWEST} complete trials, and there are {complete}"
    return "the trials do not differ enough"


def importances(study: ZooStudy) -> dict[str, float]:
    """
    :param study: the study
    :return: importances by the sampler's names, the largest first; empty if there are too few trials
    """
    if len(study.trials(TrialState.COMPLETE)) < _FEWEST:
        return {}
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        warnings.simplefilter("ignore", ExperimentalWarning)
        try:
            return get_param_importances(study.optuna_study, evaluator=PedAnovaImportanceEvaluator())
        except (ValueError, RuntimeError, UserWarning):
            return {}


def search_plots(study: ZooStudy, explained: dict[str, float], candidates: Sequence[Candidate]) -> list[Plot]:
    """
    :param study: the study
    :param explained: :func:`importances`
    :param candidates: candidates that were trained again
    :return: the plots of all trials, without empty ones
    """
    plots = [Plot("The trials, in the order in which they began", lambda axes: _history(axes, study))]
    if any(len(trial.intermediate_values) > 1 for trial in study.trials()):
        plots += [Plot("The evaluations of each trial", lambda axes: _evaluations(axes, study))]
    if candidates:
        plots += [Plot("Trained again, on fresh seeds", lambda axes: _candidates(axes, candidates))]
    if explained:
        plots += [Plot("Which hyper-parameters matter", lambda axes: _importances(axes, explained))]
    return plots


def hyperparam_plots(study: ZooStudy, explained: dict[str, float]) -> list[Plot]:
    """
    :param study: the study
    :param explained: :func:`importances`
    :return: for each hyper-parameter that was searched, a plot of the trials' values; the most important comes first
    """
    distributions: dict[str, BaseDistribution] = {}
    for trial in study.trials():
        if last_value(trial) is not None:
            distributions |= {key: found for key, found in trial.distributions.items() if not found.single()}
    keys = sorted(distributions, key=lambda key: -explained.get(key, 0.0))
    return [Plot(decode_param(key, 0)[0], _hyperparam(study, key, distributions[key])) for key in keys]


def as_svg(plot: Plot) -> str:
    """Draw a plot as an SVG element with the colours of the page."""
    file = io.StringIO()
    with matplotlib.rc_context(_SETTINGS):
        figure = Figure(figsize=_SIZE)
        plot.draw(figure.subplots())
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(file, format="svg", transparent=True, metadata=nothing)
    text = file.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    text = re.sub(r'<g id="[^"]*"', "<g", text)  # all plots of the page would have the same ids
    for drawn, of_page in IN_PAGE.items():
        text = text.replace(drawn, of_page)
    return re.sub(
        r"<svg[^>]*?(viewBox=\"[^\"]*\")[^>]*>", rf'<svg \1 role="img" aria-label="{escape(plot.name)}">', text
    )


def as_picture(plots: Sequence[Plot]) -> memoryview:
    """All plots in one PNG."""
    rows = -(-len(plots) // _COLUMNS)
    file = io.BytesIO()
    with matplotlib.rc_context(_SETTINGS):
        figure = Figure(figsize=(_SIZE[0] * _COLUMNS, _SIZE[1] * rows))
        parts = figure.subfigures(rows, _COLUMNS, squeeze=False).flat  # so that titles are above the legends
        for part, plot in zip(parts, plots, strict=False):
            plot.draw(part.subplots())
            part.suptitle(plot.name, color=_INK, fontsize="medium")
        figure.savefig(file, format="png", dpi=150, metadata={"Software": None})
    return file.getbuffer()


def _legend(axes: Axes) -> None:
    """Add a legend above the plot, where it hides nothing."""
    axes.legend(loc="lower left", bbox_to_anchor=(0.0, 1.0), ncols=4)


def _drawn(study: ZooStudy, state: TrialState) -> list[tuple[FrozenTrial, float]]:
    """The trials in a state that have a value, with their values."""
    values = [(trial, last_value(trial)) for trial in study.trials(state)]
    return [(trial, value) for trial, value in values if value is not None]


def _history(axes: Axes, study: ZooStudy) -> None:
    complete = _drawn(study, TrialState.COMPLETE)
    if complete:
        numbers = [*(trial.number for trial, _ in complete), study.trials()[-1].number]
        best = np.maximum.accumulate([*(value for _, value in complete), -np.inf])
        axes.step(numbers, best, where="post", color=_INK, linewidth=1.0, label="best so far")
    for state, mark in MARKS.items():
        drawn = _drawn(study, state)
        if drawn:
            numbers, values = [trial.number for trial, _ in drawn], [value for _, value in drawn]
            axes.plot(numbers, values, **mark, linestyle="", label=state_name(state))
    without = [trial.number for trial in study.trials() if last_value(trial) is None]
    if without:
        floor: dict[str, Any] = {"transform": axes.get_xaxis_transform(), "clip_on": False}
        axes.plot(without, [0.0] * len(without), marker="|", color=_SOFT, linestyle="", label="no value", **floor)
    if len(without) == len(study.trials()):
        axes.set_yticks([])
    _star(axes, complete, lambda trial: trial.number)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set(xlabel="trial", ylabel="reward")
    _legend(axes)


def _star(axes: Axes, complete: Sequence[tuple[FrozenTrial, float]], x: Callable[[FrozenTrial], float]) -> None:
    """Mark the best of the complete trials."""
    if complete:
        trial, value = max(complete, key=lambda pair: pair[1])
        axes.plot([x(trial)], [value], **BEST, label="best")


def _evaluations(axes: Axes, study: ZooStudy) -> None:
    complete = _drawn(study, TrialState.COMPLETE)
    best = max(complete, key=lambda pair: pair[1])[0].number if complete else None
    labelled = set()
    for trial in study.trials():
        steps, values = list(evaluations(trial)), list(evaluations(trial).values())
        if trial.number == best:
            axes.plot(steps, values, **{**BEST, "linestyle": "-", "markersize": 6}, label=f"trial {best}, the best")
        elif steps:
            mark, label = MARKS[trial.state], state_name(trial.state)
            ended: dict[str, Any] = {"markevery": [-1], "linewidth": 0.9, "alpha": 0.6}
            axes.plot(steps, values, **mark, **ended, label=None if label in labelled else label)
            labelled.add(label)
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.set(xlabel="steps", ylabel="reward")
    _legend(axes)


def _candidates(axes: Axes, candidates: Sequence[Candidate]) -> None:
    """Draw the results of the candidates, the best on top."""
    for height, candidate in enumerate(reversed(candidates)):
        results = list(candidate.results.values())
        labels = ("in the study", "each seed", "mean and std") if height == 0 else (None, None, None)
        value = [] if candidate.study_value is None else [candidate.study_value]
        axes.plot(value, [height] * len(value), **MARKS[TrialState.COMPLETE], linestyle="", label=labels[0])
        axes.plot(results, [height] * len(results), "o", color=BLUE, markerfacecolor="none", label=labels[1])
        spread = candidate.std if len(results) > 1 else 0.0
        mark: dict[str, Any] = {"fmt": "D", "color": _INK, "markersize": 4.0, "linewidth": 1.0, "capsize": 3.0}
        axes.errorbar([candidate.mean], [height - 0.2], xerr=[spread], **mark, label=labels[2])
    axes.set_yticks(range(len(candidates)), [candidate.name for candidate in reversed(candidates)])
    axes.set_ylim(-0.6, len(candidates) - 0.4)
    axes.set_xlabel("reward")
    _legend(axes)


def _importances(axes: Axes, explained: dict[str, float]) -> None:
    largest = list(explained.items())[:_LARGEST][::-1]
    names, shares = [decode_param(key, 0)[0] for key, _ in largest], [100.0 * share for _, share in largest]
    axes.barh(names, shares, color=BLUE, height=0.7)
    axes.set_xlabel("% of the difference that it explains")
    axes.grid(visible=False, axis="y")


def _hyperparam(study: ZooStudy, key: str, distribution: BaseDistribution) -> Callable[[Axes], None]:
    """Draw the values of trials over a hyper-parameter, on the sampler's scale, labelled with its values."""

    def draw(axes: Axes) -> None:
        drawn = {
            state: [(trial, value) for trial, value in _drawn(study, state) if key in trial.params] for state in MARKS
        }
        if isinstance(distribution, CategoricalDistribution):
            trials = [trial for pairs in drawn.values() for trial, _ in pairs]
            labels = {trial.params[key]: format_value(study.hyperparams(trial)[key][1]) for trial in trials}
            places = {choice: place for place, choice in enumerate(filter(labels.__contains__, distribution.choices))}
            axes.set_xticks(range(len(places)), [labels[choice] for choice in places])
            axes.set_xlim(-0.5, len(places) - 0.5)
        elif isinstance(distribution, (IntDistribution, FloatDistribution)):
            places = {}
            _scale(axes, key, distribution)

        def x(trial: FrozenTrial) -> float:
            beside = 0.3 * (
                (trial.number * 0.618 + 0.5) % 1.0 - 0.5
            )  # so that trials with the same choice do not hide each other
            return places[trial.params[key]] + beside if places else float(trial.params[key])

        for state, pairs in drawn.items():
            values = [value for _, value in pairs]
            axes.plot([x(trial) for trial, _ in pairs], values, **MARKS[state], linestyle="")
        _star(axes, drawn[TrialState.COMPLETE], x)
        axes.set_ylabel("reward")

    return draw


def _scale(axes: Axes, key: str, distribution: IntDistribution | FloatDistribution) -> None:
    """Set the axis to the range that was searched."""
    low, high = distribution.low, distribution.high
    if distribution.log:
        axes.set_xscale("log")
        subs = (1.0,) if high > 50.0 * low else (1.0, 2.0, 5.0)
        axes.xaxis.set_major_locator(LogLocator(subs=subs))
        axes.xaxis.set_minor_formatter(NullFormatter())
        margin = (high / low) ** 0.05
        axes.set_xlim(low / margin, high * margin)
    else:
        axes.xaxis.set_major_locator(
            MaxNLocator(5, steps=[1, 2, 2.5, 5, 10], integer=isinstance(distribution, IntDistribution))
        )
        margin = 0.05 * (high - low)
        axes.set_xlim(low - margin, high + margin)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda tick, _: format_value(decode_param(key, tick)[1])))
    if key.startswith("one_minus_"):
        axes.xaxis.set_inverted(True)
