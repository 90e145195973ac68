"""What a second clip would cut, against the age of the data; colours by Okabe and Ito, and no two lines of one marker."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from benchmarks.learning import statistics
from benchmarks.learning.arms import ARMS
from benchmarks.learning.conditions import Condition
from benchmarks.learning.figures import Style
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
    figure = Figure(figsize=(max(2.1 * len(envs), 4.2) + 0.7, 4.4))
    axes = figure.subplots(len(_MEASURES), len(envs), squeeze=False, sharex=True, sharey="row")
    for row, (measure, said) in zip(axes, _MEASURES.items(), strict=True):
        for panel, env in zip(row, envs, strict=True):
            for i, arm in enumerate(arms):
                points = []
                for x, condition in enumerate(conditions):
                    runs = found.get(Pair(condition, arm), {}).get(env)
                    if runs is not None:
                        mean = statistics.mean(runs.logged[measure], n_resamples).number
                        points.append((x + 0.07 * (i - (len(arms) - 1) / 2), *mean))
                if points:
                    x, point, low, high = np.array(points).T
                    style = STYLES[arm]
                    panel.plot(x, point, color=style.color, linestyle=style.dash, marker=style.marker, markersize=4)
                    panel.vlines(x, low, high, color=style.color, linewidth=1)
            panel.set_yscale("symlog", linthresh=_LINEAR_BELOW)
            panel.set_ylim(bottom=0)
            panel.set_xticks(range(len(conditions)), [str(c.reuse or c.lag) for c in conditions])
        row[0].set_ylabel(said)
    for panel, env in zip(axes[0], envs, strict=True):
        panel.set_title(env)
    handles = [
        Line2D([], [], color=s.color, linestyle=s.dash, marker=s.marker, markersize=4, label=ARMS[arm].label)
        for arm, s in ((arm, STYLES[arm]) for arm in arms)
    ]
    figure.legend(handles=handles, loc="lower center", ncols=min(len(envs) + 1, 4), frameon=False, handlelength=3.2)
    figure.supxlabel(label, fontsize=8, y=0.13)
    figure.tight_layout(rect=(0, 0.13, 1, 1))
    return figure
