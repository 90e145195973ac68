"""The figures of the report, as PNG and SVG; colours by Okabe and Ito, and no two lines of one dash."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from benchmarks.learning.cases import ALGORITHMS
from benchmarks.learning.results import Curves, Floats, Results, compared_label
from benchmarks.learning.statistics import METRICS, Estimate


class Style(NamedTuple):
    """
    :param color: one of Okabe and Ito's
    :param dash: of the line, as matplotlib takes it
    :param marker: of a point
    """

    color: str
    dash: Any
    marker: str


# Ours are drawn through, the peers dashed.
STYLES = {
    "dual_clip_ppo": Style("#0072B2", "-", "o"),
    "sb3_ppo": Style("#000000", (0, (5, 2)), "s"),
    "ppo": Style("#000000", (0, (1, 1)), "D"),
    "trpo": Style("#D55E00", "-", "^"),
    "contrib_trpo": Style("#E69F00", (0, (5, 2)), "v"),
    "adaptive_kl_ppo": Style("#009E73", "-", "P"),
    "reinforce": Style("#CC79A7", "-", "X"),
    "a2c": Style("#56B4E9", (0, (3, 1, 1, 1)), "*"),
}
# For all that is drawn and saved: ``with matplotlib.rc_context(SETTINGS)``.
SETTINGS: Any = {
    "font.size": 8,
    "axes.titlesize": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "lines.linewidth": 1.4,
    "svg.hashsalt": "sb3_ppo_ext",  # the same names in the file each time
    "svg.fonttype": "none",
}


def save(figure: Figure, folder: Path, stem: str) -> str:
    """
    :param figure: to be saved
    :param folder: for the files
    :param stem: of their names
    :return: the PNG's name
    """
    folder.mkdir(parents=True, exist_ok=True)
    figure.savefig(folder / f"{stem}.png", dpi=120, bbox_inches="tight", metadata={"Software": None})
    figure.savefig(folder / f"{stem}.svg", bbox_inches="tight", metadata={"Date": None})
    return f"{stem}.png"


def learning_curves(results: Results, estimates: Mapping[tuple[str, str], Estimate], *, by_seconds: bool) -> Figure:
    """
    A panel for each environment: the interquartile mean of the runs, with its interval.

    :param results: the runs
    :param estimates: the interquartile means of each of them
    :param by_seconds: of processor time, in place of steps
    """
    envs = list(dict.fromkeys(env for env, _ in results))
    figure, panels = _panels(len(envs), 3, (2.5, 2.0) if len(envs) > 1 else (4.5, 2.6))
    for panel, env in zip(panels, envs, strict=True):
        of_env = [curves for (of, _), curves in results.items() if of == env]
        for curves in of_env:
            x = curves.seconds.mean(axis=0) if by_seconds else curves.steps / 1000
            style, drawn = STYLES[curves.algo], estimates[env, curves.algo]
            panel.plot(x, drawn.point, color=style.color, linestyle=style.dash)
            panel.fill_between(x, drawn.low, drawn.high, color=style.color, alpha=0.15, linewidth=0)
        panel.set_title(f"{env} ({_count(of_env)})")
        panel.margins(x=0.01)
    labels = {algo: ALGORITHMS[algo].label for algo in ALGORITHMS if any(of == algo for _, of in results)}
    return _finish(figure, labels, "seconds of processor time" if by_seconds else "thousand steps", "return")


def intervals(groups: Mapping[str, Mapping[str, dict[str, Estimate]]]) -> Figure:
    """:param groups: of tasks; of each, the aggregates of each algorithm"""
    figure = Figure(figsize=(8.5, 0.6 + sum(0.5 + 0.24 * len(group) for group in groups.values())))
    heights = [0.5 + 0.24 * len(group) for group in groups.values()]
    axes = figure.subplots(len(groups), len(METRICS), squeeze=False, height_ratios=heights)
    for row, (name, group) in zip(axes, groups.items(), strict=True):
        for panel, metric in zip(row, METRICS, strict=True):
            for y, (algo, estimates) in enumerate(reversed(list(group.items()))):
                _draw_interval(panel, y, STYLES[algo], estimates[metric])
            panel.set_yticks(range(len(group)), [compared_label(algo) for algo in reversed(list(group))])
            panel.tick_params(axis="y", length=0, labelleft=panel is row[0])
            panel.set_ylim(-0.6, len(group) - 0.4)
            panel.set_title(f"{name}: {metric}" if panel is row[0] else metric)
    figure.tight_layout()
    return figure


def profiles(groups: Mapping[str, Mapping[str, Estimate]], thresholds: Floats) -> Figure:
    """
    :param groups: of tasks; of each, the share of runs above each threshold, by algorithm
    :param thresholds: of the score
    """
    figure, panels = _panels(len(groups), 2, (3.6, 2.4))
    for panel, (name, group) in zip(panels, groups.items(), strict=True):
        for algo, shares in group.items():
            style = STYLES[algo]
            panel.plot(thresholds, shares.point, color=style.color, linestyle=style.dash)
            panel.fill_between(thresholds, shares.low, shares.high, color=style.color, alpha=0.15, linewidth=0)
        panel.set_title(name)
        panel.margins(x=0)
        panel.set_ylim(-0.02, 1.02)
    labels = {algo: compared_label(algo) for algo in STYLES if any(algo in group for group in groups.values())}
    return _finish(figure, labels, "score", "share of runs above it")


def improvements(rows: Sequence[tuple[str, str, Estimate]]) -> Figure:
    """:param rows: what is compared on which tasks, the algorithm, and the probability that it is better"""
    figure = Figure(figsize=(7, 0.8 + 0.24 * len(rows)))
    panel = figure.subplots()
    for y, (_, algo, probability) in enumerate(reversed(rows)):
        _draw_interval(panel, y, STYLES[algo], Estimate(*(part[0] for part in probability)))
    panel.axvline(0.5, color="0.4", linewidth=0.8)
    panel.set_yticks(range(len(rows)), [label for label, _, _ in reversed(rows)])
    panel.tick_params(axis="y", length=0)
    panel.set_xlim(-0.02, 1.02)
    panel.set_ylim(-0.6, len(rows) - 0.4)
    panel.set_xlabel("probability of improvement")
    figure.tight_layout()
    return figure


def _draw_interval(panel: Axes, y: float, style: Style, drawn: Estimate) -> None:
    panel.plot([drawn.low, drawn.high], [y, y], color=style.color, linewidth=5, alpha=0.35, solid_capstyle="butt")
    panel.plot(drawn.point, y, color=style.color, marker=style.marker, markersize=5)


def _panels(n: int, n_columns: int, size: tuple[float, float]) -> tuple[Figure, list[Axes]]:
    """A figure with so many panels of a size in inches, and a line for the legend."""
    n_columns = min(n, n_columns)
    n_rows = -(-n // n_columns)
    figure = Figure(figsize=(size[0] * n_columns, size[1] * n_rows + 0.6))
    panels = list(figure.subplots(n_rows, n_columns, squeeze=False).flat)
    for panel in panels[n:]:
        panel.remove()
    return figure, panels[:n]


def _finish(figure: Figure, labels: Mapping[str, str], x_label: str, y_label: str) -> Figure:
    """Name the axes, and the lines by algorithm."""
    handles = [
        Line2D([], [], color=STYLES[algo].color, linestyle=STYLES[algo].dash, label=label)
        for algo, label in labels.items()
    ]
    n_columns = min(len(handles), 4)
    figure.legend(handles=handles, loc="lower center", ncols=n_columns, frameon=False, handlelength=3.2)
    height = figure.get_figheight()
    figure.supxlabel(x_label, fontsize=8, y=0.4 / height)
    figure.supylabel(y_label, fontsize=8)
    figure.tight_layout(rect=(0, 0.35 / height, 1, 1))
    return figure


def _count(of_env: Iterable[Curves]) -> str:
    """How many runs the lines of a panel are of."""
    numbers = sorted({len(curves.seeds) for curves in of_env})
    runs = "run" if numbers == [1] else "runs"
    return f"{numbers[0]} {runs}" if len(numbers) == 1 else f"{numbers[0]} to {numbers[-1]} {runs}"


def thresholds_of(scores: Iterable[Floats]) -> Floats:
    """:param scores: that the thresholds of a performance profile are to cover"""
    everything = np.concatenate([np.ravel(each) for each in scores])
    return np.linspace(min(float(everything.min()), 0.0), max(float(everything.max()), 1.0), 101)
