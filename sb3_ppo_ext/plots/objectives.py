"""Figures of objectives against the ratio. All values come from this package's losses and from autograd."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import matplotlib
import numpy as np
import torch as th
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from sb3_ppo_ext import losses
from sb3_ppo_ext.common.errors import ArgumentError
from sb3_ppo_ext.common.validation import check_one_of, check_real
from sb3_ppo_ext.plots.style import BLACK, BLUE, GREY, SETTINGS, VERMILLION, WIDTH

Loss = Callable[[th.Tensor, th.Tensor, th.Tensor], losses.SurrogateLoss]

OBJECTIVES = ("plain", "clipped", "asymmetric", "dual_clip", "kl_penalized", "spo")
"""The names that :func:`surrogate_figure` accepts."""

_TOO_CLOSE = 1e-6  # distance of the ratios on both sides of an edge


def objective_and_gradient(loss: Loss, ratios: np.ndarray, advantage: float) -> tuple[np.ndarray, np.ndarray]:
    """
    :param loss: loss as a function of log-probabilities, old log-probabilities and advantages
    :param ratios: shape ``(n,)``
    :param advantage: A, the same at each ratio
    :return: the objective and its derivative with respect to the ratio, each of shape ``(n,)``
    """
    ratio = th.tensor(ratios, dtype=th.float64, requires_grad=True)
    objective = -loss(ratio.log(), th.zeros_like(ratio), th.full_like(ratio, advantage)).loss
    (gradient,) = th.autograd.grad(objective.sum(), ratio)
    return objective.detach().numpy(), gradient.numpy()


class _Row(NamedTuple):
    """
    :param title: title of the row
    :param loss: loss that is drawn
    :param edges: ratios where its gradient may jump
    """

    title: str
    loss: Loss
    edges: tuple[float, ...] = ()


def _kl_penalized(
    log_prob: th.Tensor, old_log_prob: th.Tensor, advantages: th.Tensor, *, kl_coef: float
) -> losses.SurrogateLoss:
    """The loss with the KL divergence estimated from a single sample."""
    kl = losses.kl_k3(log_prob, old_log_prob)
    return losses.kl_penalized_surrogate_loss(log_prob, old_log_prob, advantages, kl, kl_coef=kl_coef)


@matplotlib.rc_context(SETTINGS)
def surrogate_figure(
    names: str | Sequence[str] = OBJECTIVES,
    *,
    clip_range: float = 0.2,
    clip_range_high: float = 0.4,
    dual_clip: float = 3.0,
    kl_coef: float = 3.0,
    epsilon: float = 0.2,
) -> Figure:
    """
    Draw objectives (negated losses, which are maximised) and their gradients with respect to the ratio against the
    ratio, for A = 1 and A = -1, with a row for each objective.

    The KL divergence of "kl_penalized" is estimated by k3 from a single sample, see :func:`sb3_ppo_ext.losses.kl_k3`.

    :param names: one or several of "plain", "clipped" (PPO), "asymmetric" ("clip-higher"), "dual_clip", "kl_penalized"
        and "spo", in the order in which they are drawn
    :param clip_range: how far below 1 the ratio counts, and also how far above 1 for "clipped" and "dual_clip"; less
        than 1
    :param clip_range_high: how far above 1 the ratio counts for "asymmetric"
    :param dual_clip: c, greater than ``1 + clip_range``
    :param kl_coef: beta of "kl_penalized"
    :param epsilon: epsilon of "spo"
    :return: the figure
    :raises ValueError: if a name is unknown or a number is out of range
    """
    names = list(names) if isinstance(names, Sequence) and not isinstance(names, str) else [names]
    if not names:
        raise ArgumentError(f"names=[] is not allowed: it must have at least one of {', '.join(OBJECTIVES)}")
    for name in names:
        check_one_of("names", name, OBJECTIVES)
    check_real("clip_range", clip_range, at_least=0.0, below=1.0)
    check_real("clip_range_high", clip_range_high, at_least=0.0)
    check_real("dual_clip", dual_clip, above=1.0 + clip_range)
    check_real("kl_coef", kl_coef, at_least=0.0)
    check_real("epsilon", epsilon, above=0.0)
    low, high = 1.0 - clip_range, 1.0 + clip_range
    clipped, dual = losses.clipped_surrogate_loss, losses.dual_clip_surrogate_loss
    asymmetric = partial(clipped, clip_range=clip_range, clip_range_high=clip_range_high)
    rows = {
        "plain": _Row("Plain surrogate", losses.surrogate_loss),
        "clipped": _Row(f"PPO: range {clip_range:g}", partial(clipped, clip_range=clip_range), (low, high)),
        "asymmetric": _Row(
            f"Asymmetric: {clip_range:g} below, {clip_range_high:g} above",
            asymmetric,
            (low, 1.0 + clip_range_high),
        ),
        "dual_clip": _Row(
            f"Dual clip: range {clip_range:g}, c = {dual_clip:g}",
            partial(dual, dual_clip=dual_clip, clip_range=clip_range),
            (low, high, dual_clip),
        ),
        "kl_penalized": _Row(f"KL penalty: β = {kl_coef:g}", partial(_kl_penalized, kl_coef=kl_coef)),
        "spo": _Row(f"SPO: ε = {epsilon:g}", partial(losses.spo_surrogate_loss, epsilon=epsilon)),
    }
    last = max(dual_clip, 1.0 + clip_range_high) + 1.0
    figure = Figure(figsize=(WIDTH, 0.75 + 1.35 * len(names)), layout="constrained")
    panels = figure.subplots(len(names), 2, sharex=True, sharey="col", squeeze=False)
    for (left, right), name in zip(panels, names, strict=True):
        row = rows[name]
        ratios = _ratios(last, row.edges)
        for advantage, color, dash in ((1.0, BLUE, "-"), (-1.0, VERMILLION, (0, (4, 1.5)))):
            objective, gradient = objective_and_gradient(row.loss, ratios, advantage)
            label = f"$A = {advantage:+g}$"
            left.plot(ratios, objective, color=color, linestyle=dash, label=label)
            right.plot(ratios, gradient, color=color, linestyle=dash)
        for panel in (left, right):
            panel.axvline(1.0, color=GREY, linewidth=0.8)
            panel.axhline(0.0, color=GREY, linewidth=0.8)
            for edge in row.edges:
                panel.axvline(edge, color=GREY, linewidth=0.8, linestyle=":")
        left.set_title(row.title, loc="left", fontweight="bold")
        left.set_ylabel("objective")
        right.set_ylabel("gradient")
    panels[0, 0].set(xlim=(0.0, last), ylim=(-last - 0.2, 3.0), yticks=(-4, -2, 0, 2))
    panels[0, 1].set(ylim=(-2.6, 2.6), yticks=(-2, -1, 0, 1, 2))
    for panel in panels[-1]:
        panel.set_xlabel("ratio r")
        panel.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    handles, labels = panels[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=2)
    return figure


def _ratios(last: float, edges: Sequence[float]) -> np.ndarray:
    """The ratios at which objectives are drawn: from nearly 0 on, and on both sides of each edge."""
    beside = [edge + side for edge in edges for side in (-_TOO_CLOSE, _TOO_CLOSE) if edge + side > 0.0]
    ratios: np.ndarray = np.sort(np.concatenate((np.linspace(0.01, last, 400), beside)))
    return ratios


class Case(NamedTuple):
    """
    One of the cases of the clipped objective, at an example ratio.

    :param name: where the ratio is: "below", "inside" or "above" the range, or "beyond c"
    :param ratio: ratio at which it is marked
    :param advantage: A, 1 or -1
    :param objective: objective at this ratio
    :param is_clipped: whether the objective differs from the unclipped one, r A
    :param gradient: gradient of the objective with respect to the ratio
    """

    name: str
    ratio: float
    advantage: float
    objective: float
    is_clipped: bool
    gradient: float

    def in_words(self) -> str:
        """The text of the figure."""
        return (
            f"{self.name}: {'clipped' if self.is_clipped else 'not clipped'}, "
            f"{'no gradient' if self.gradient == 0.0 else 'gradient A'}"
        )


def cases_of(loss: Loss, marks: Sequence[tuple[str, float]], advantage: float) -> list[Case]:
    """
    :param loss: a clipped loss
    :param marks: names and ratios of the cases
    :param advantage: A
    :return: the cases
    """
    ratios = np.array([ratio for _, ratio in marks])
    objective, gradient = objective_and_gradient(loss, ratios, advantage)
    plain, _ = objective_and_gradient(losses.surrogate_loss, ratios, advantage)
    is_clipped = ~np.isclose(objective, plain, rtol=1e-9, atol=0.0)
    return [
        Case(name, ratio, advantage, float(value), bool(clip), float(slope))
        for (name, ratio), value, clip, slope in zip(marks, objective, is_clipped, gradient, strict=True)
    ]


@matplotlib.rc_context(SETTINGS)
def cases_figure(
    *, clip_range: float = 0.2, clip_range_high: float | None = None, dual_clip: float | None = 3.0
) -> Figure:
    """
    Draw the six cases of the clipped objective: the ratio below, inside or above the range, with an advantage of either
    sign. Each case is marked, with a text that says whether it is clipped and whether it has a gradient. The second
    clip adds a seventh case, where A < 0 and the ratio is beyond c.

    :param clip_range: how far below 1 the ratio counts; less than 1
    :param clip_range_high: how far above 1 the ratio counts; None for ``clip_range``
    :param dual_clip: c, greater than ``1 + clip_range_high``; None for PPO without the second clip
    :return: the figure
    :raises ValueError: if a number is out of range
    """
    check_real("clip_range", clip_range, above=0.0, below=1.0)
    if clip_range_high is not None:
        check_real("clip_range_high", clip_range_high, above=0.0)
    low, high = 1.0 - clip_range, 1.0 + (clip_range if clip_range_high is None else clip_range_high)
    if dual_clip is not None:
        check_real("dual_clip", dual_clip, above=high)
    loss = partial(
        losses.dual_clip_surrogate_loss, dual_clip=dual_clip, clip_range=clip_range, clip_range_high=clip_range_high
    )
    above = high + (0.5 if dual_clip is None else min(0.5, (dual_clip - high) / 2.0))
    marks = [("below", 0.6 * low), ("inside", 1.0), ("above", above)]
    last = high + 1.2 if dual_clip is None else dual_clip + 1.0
    ratios = _ratios(last, (low, high) if dual_clip is None else (low, high, dual_clip))

    figure = Figure(figsize=(WIDTH, 4.4), layout="constrained")
    panels = figure.subplots(2, 2, height_ratios=(3.0, 1.0))
    number = 1
    for advantage, panel, words in zip((1.0, -1.0), panels[0], panels[1], strict=True):
        cases = cases_of(loss, marks, advantage)
        if advantage < 0.0 and dual_clip is not None:
            cases += cases_of(loss, [("beyond c", dual_clip + 0.5)], advantage)
        _draw_objective(panel, loss, ratios, advantage)
        for edge, name in ((low, "low"), (high, "high"), (dual_clip, "c")):
            if edge is not None and (name != "c" or advantage < 0.0):
                panel.axvline(edge, color=GREY, linewidth=0.8, linestyle=":")
                side, offset = ("right", -3) if name == "low" else ("left", 3)
                panel.annotate(
                    f"{edge:g}",
                    (edge, 1.0),
                    xycoords=("data", "axes fraction"),
                    xytext=(offset, -2),
                    textcoords="offset points",
                    ha=side,
                    va="top",
                    color=GREY,
                )
        panel.set_title(f"A {'>' if advantage > 0.0 else '<'} 0", fontweight="bold")
        panel.set(xlabel="ratio r", xlim=(0.0, last))
        panel.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        words.set_axis_off()
        for line, case in enumerate(cases):
            color = VERMILLION if case.gradient == 0.0 else BLUE
            _mark(panel, case.ratio, case.objective, number, color)
            words.text(0.02, 0.92 - 0.27 * line, str(number), color=color, fontweight="bold", va="center")
            words.text(0.08, 0.92 - 0.27 * line, case.in_words(), va="center")
            number += 1
    panels[0, 0].set_ylabel("objective, in units of |A|")
    handles, labels = panels[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=3)
    return figure


def _draw_objective(panel: Axes, loss: Loss, ratios: np.ndarray, advantage: float) -> None:
    """Draw the objective, with different colours where it has a gradient and where not, over the unclipped one."""
    plain, _ = objective_and_gradient(losses.surrogate_loss, ratios, advantage)
    objective, gradient = objective_and_gradient(loss, ratios, advantage)
    panel.plot(ratios, plain, color=BLACK, linewidth=1.0, linestyle=(0, (2, 2)), label="r A, without a clip")
    panel.plot(
        ratios, np.where(gradient != 0.0, objective, np.nan), color=BLUE, linewidth=2.4, label="objective with gradient"
    )
    panel.plot(
        ratios,
        np.where(gradient == 0.0, objective, np.nan),
        color=VERMILLION,
        linewidth=2.4,
        linestyle=(0, (4, 1)),
        label="objective without gradient",
    )


def _mark(panel: Axes, x: float, y: float, number: int, color: str) -> None:
    """Draw a disc with a number in it."""
    panel.plot([x], [y], marker="o", markersize=13, color=color, markeredgecolor="white", linestyle="none", zorder=5)
    panel.annotate(
        str(number), (x, y), color="white", ha="center", va="center", fontweight="bold", fontsize=8.5, zorder=6
    )
