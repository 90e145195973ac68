"""What a second clip would cut, against the age of the data: colours by Okabe and Ito, and a marker for each arm."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from benchmarks.learning import statistics
from benchmarks.learning.arms import ARMS
from benchmarks.learning.conditions import Condition
from benchmarks.learning.figures import Style
from benchmarks.learning.statistics import Interval
from benchmarks.staleness.__main__ import ENVS
from benchmarks.staleness.results import Pair, Study

STYLES = {
    "ppo": Style("#000000", "-", "s"),
    "dual_clip_3": Style("#0072B2", "-", "o"),
    "dual_clip_1.5": Style("#56B4E9", (0, (5, 2)), "D"),
    "target_kl": Style("#009E73", (0, (1, 1)), "P"),
    "truncated": Style("#D55E00", (0, (5, 2)), "^"),
    "spo": Style("#E69F00", (0, (3, 1, 1, 1)), "v"),
    "decoupled": Style("#CC79A7", "-", "X"),
}
_MEASURES = {
    "end_cut_share_3": "share of samples\nwith A < 0 and r > 3",
    "end_cut_gradient_3": "their share of the\ngradient's norm",
}
_LINEAR_BELOW = 1e-5  # so that nothing is shown too


def activation(study: Study, conditions: Sequence[Condition], label: str, n_resamples: int) -> Figure | None:
    """
    A column of panels for each environment: the mean over the runs of each arm, with its interval.

    :param study: the runs that are there
    :param conditions: from the left to the right
    :param label: of what they differ in
    :param n_resamples: of the bootstraps
    :return: None if there are no runs but in the first condition
    """
    found = {pair: runs for pair, runs in study.items() if pair.condition in conditions}
    if all(pair.condition == conditions[0] for pair in found):
        return None
    envs = [env for env in ENVS if any(env in runs for runs in found.values())]
    arms = [arm for arm in ARMS if any(pair.arm == arm for pair in found)]
    n_columns = min(len(envs) + 1, len(arms))
    below = 0.3 + 0.2 * -(-len(arms) // n_columns)  # inches, for the label and the legend
    figure = Figure(figsize=(max(2.1 * len(envs), 4.2) + 0.7, 3.8 + below))
    axes = figure.subplots(len(_MEASURES), len(envs), squeeze=False, sharex=True, sharey="row")
    for row, (measure, said) in zip(axes, _MEASURES.items(), strict=True):
        for panel, env in zip(row, envs, strict=True):
            for i, arm in enumerate(arms):
                dodge = 0.07 * (i - (len(arms) - 1) / 2)
                means = {
                    x + dodge: statistics.mean(found[pair][env].logged[measure], n_resamples).number
                    for x, pair in enumerate(Pair(condition, arm) for condition in conditions)
                    if env in found.get(pair, {})
                }
                _draw(panel, STYLES[arm], means)
            panel.set_yscale("symlog", linthresh=_LINEAR_BELOW)
            panel.set_xticks(range(len(conditions)), [str(c.reuse or c.lag) for c in conditions])
        row[0].set_ylabel(said)
        row[0].set_ylim(bottom=0)  # of the whole row, when all of it is drawn
    for panel, env in zip(axes[0], envs, strict=True):
        panel.set_title(env)
    handles = [_line(STYLES[arm], label=ARMS[arm].label) for arm in arms]
    figure.legend(handles=handles, loc="lower center", ncols=n_columns, frameon=False, handlelength=3.2)
    height = figure.get_figheight()
    figure.supxlabel(label, fontsize=8, y=(below - 0.2) / height)
    figure.tight_layout(rect=(0, (below - 0.25) / height, 1, 1))
    return figure


def _draw(panel: Axes, style: Style, means: Mapping[float, Interval]) -> None:
    """A line through the means that are there, by where they stand."""
    x = list(means)
    panel.add_line(_line(style, x, [mean.point for mean in means.values()], clip_on=False))
    lows, highs = [mean.low for mean in means.values()], [mean.high for mean in means.values()]
    panel.vlines(x, lows, highs, color=style.color, linewidth=1)
    panel.autoscale_view()


def _line(style: Style, x: Sequence[float] = (), y: Sequence[float] = (), **kwargs: Any) -> Line2D:
    return Line2D(x, y, color=style.color, linestyle=style.dash, marker=style.marker, markersize=4, **kwargs)
