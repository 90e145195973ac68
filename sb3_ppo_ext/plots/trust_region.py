"""
A figure of TRPO's step in two dimensions, on a task whose objective is known in closed form. The step is computed by
this package's own Fisher product, conjugate gradient and line search.

The policy draws one number a from a normal distribution; its parameters theta are the mean and the logarithm of the
standard deviation sigma. The reward is ``-(a - 2)^2``, so that the expected return is ``-(mean - 2)^2 - sigma^2``.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import matplotlib
import numpy as np
import torch as th
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from sb3_ppo_ext.common.distributions import Gaussian
from sb3_ppo_ext.common.validation import check_int, check_real
from sb3_ppo_ext.numerics import FisherVectorProduct, LineSearchResult, backtracking_line_search, conjugate_gradient
from sb3_ppo_ext.plots.style import BLACK, BLUE, GREEN, SETTINGS, VERMILLION, WIDTH

_BEST_ACTION = 2.0
_START = np.array([0.0, math.log(2.0)])
_FAMILY = Gaussian(1)
_SKY, _PALE = "#56B4E9", "#999999"
_PLATE = {"facecolor": "white", "edgecolor": "none", "alpha": 0.75, "pad": 1.0}  # behind a number


class TrustRegionStep(NamedTuple):
    """
    One step from :data:`_START`. Vectors are (mean, log sigma).

    :param gradient: gradient of the objective
    :param fisher: the Fisher matrix F, shape ``(2, 2)``
    :param natural: the natural gradient, F^-1 times the gradient
    :param full_step: the longest step along the natural gradient that the second-order model of the KL allows
    :param trials: points that the line search tried, shape ``(n, 2)``
    :param kls: KL(old || new) at these points, shape ``(n,)``
    :param search: result of the line search
    """

    gradient: np.ndarray
    fisher: np.ndarray
    natural: np.ndarray
    full_step: np.ndarray
    trials: np.ndarray
    kls: np.ndarray
    search: LineSearchResult


def expected_return(theta: th.Tensor) -> th.Tensor:
    """
    :param theta: shape ``(batch, 2)``
    :return: shape ``(batch,)``
    """
    mean, log_std = theta.unbind(1)
    return -(mean - _BEST_ACTION).square() - (2.0 * log_std).exp()


def kl_from_start(theta: th.Tensor) -> th.Tensor:
    """
    :param theta: shape ``(batch, 2)``
    :return: KL(old || new), shape ``(batch,)``
    """
    return _FAMILY.kl(_params(th.from_numpy(_START).expand_as(theta)), _params(theta))


def _params(theta: th.Tensor) -> th.Tensor:
    """The parameters of the distribution: mean and sigma."""
    return th.stack((theta[:, 0], theta[:, 1].exp()), dim=1)


def trust_region_step(
    target_kl: float, *, shrinking_factor: float = 0.8, accept_ratio: float = 0.1, max_iter: int = 10
) -> TrustRegionStep:
    """
    :param target_kl: limit of the KL divergence
    :param shrinking_factor: argument of the line search
    :param accept_ratio: argument of the line search
    :param max_iter: argument of the line search
    :return: the step
    """
    theta = th.tensor(_START[None], requires_grad=True)
    objective = expected_return(theta)[0]
    gradient = th.autograd.grad(objective, theta)[0].flatten()
    product = FisherVectorProduct(_params(theta), [theta], _FAMILY.fisher)
    fisher = th.stack([product(unit) for unit in th.eye(2, dtype=th.float64)])
    natural = conjugate_gradient(product, gradient, max_steps=10).x
    full_step = math.sqrt(2.0 * target_kl / natural.dot(gradient).item()) * natural
    trials, kls = [], []

    def evaluate() -> tuple[float, float]:
        trials.append(theta.detach().flatten().numpy().copy())
        kls.append(kl_from_start(theta.detach()).item())
        return expected_return(theta.detach()).item(), kls[-1]

    search = backtracking_line_search(
        [theta],
        full_step,
        evaluate,
        objective_before=objective.item(),
        expected_improvement=gradient.dot(full_step).item(),
        constraint_limit=target_kl,
        shrinking_factor=shrinking_factor,
        max_iter=max_iter,
        accept_ratio=accept_ratio,
    )
    return TrustRegionStep(
        gradient.numpy(),
        fisher.numpy(),
        natural.numpy(),
        full_step.numpy(),
        np.stack(trials),
        np.array(kls),
        search,
    )


@matplotlib.rc_context(SETTINGS)
def trust_region_figure(
    *, target_kl: float = 0.5, shrinking_factor: float = 0.8, accept_ratio: float = 0.1, max_iter: int = 10
) -> Figure:
    """
    Draw TRPO's step for a policy with two parameters, the mean and the logarithm of the standard deviation of a normal
    distribution: contours of the objective, the true limit of the KL divergence and its second-order model, the plain
    gradient, the natural gradient, and the trials of the line search.

    Both gradients are scaled to the limit of the second-order model, so that by this model both steps have the same KL.

    :param target_kl: limit of KL(old || new), at most 2; the default is larger than in practice, so that the
        second-order model visibly differs from the true KL
    :param shrinking_factor: ratio of two successive fractions in the line search, between 0 and 1
    :param accept_ratio: share of the predicted improvement that the line search requires, from 0 to 1
    :param max_iter: largest number of trials of the line search, at least 1
    :return: the figure
    :raises ValueError: if a number is out of range
    """
    check_real("target_kl", target_kl, above=0.0, at_most=2.0)
    check_real("shrinking_factor", shrinking_factor, above=0.0, below=1.0)
    check_real("accept_ratio", accept_ratio, at_least=0.0, at_most=1.0)
    check_int("max_iter", max_iter, minimum=1)
    step = trust_region_step(target_kl, shrinking_factor=shrinking_factor, accept_ratio=accept_ratio, max_iter=max_iter)
    figure = Figure(figsize=(WIDTH, 5.0), layout="constrained")
    panel = figure.subplots()
    _draw_contours(panel, step.fisher, target_kl)
    plain = math.sqrt(2.0 * target_kl / (step.gradient @ step.fisher @ step.gradient)) * step.gradient
    _draw_arrow(panel, plain, VERMILLION, (0, (4, 1.5)), "plain gradient")
    _draw_arrow(panel, step.full_step, BLUE, "-", "natural gradient: the full step")
    _draw_trials(panel, step)
    panel.plot(*_START, "s", color=BLACK, markersize=7, zorder=6)
    panel.annotate("old policy", (_START[0], _START[1]), xytext=(-8, 6), textcoords="offset points", ha="right")
    panel.set(xlabel="mean", ylabel=r"$\log\ \sigma$")
    handles, labels = panel.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3)
    return figure


def _draw_contours(panel: Axes, fisher: np.ndarray, target_kl: float) -> None:
    """Draw the objective, the limit of the KL divergence, and the limit of its second-order model."""
    reach = np.sqrt(2.0 * target_kl / np.diag(fisher))  # the half-axes of the model's ellipse, as F is diagonal
    mean = np.linspace(_START[0] - 1.45 * reach[0], _START[0] + 1.45 * reach[0], 201)
    log_std = np.linspace(_START[1] - 1.2 * reach[1], _START[1] + 1.7 * reach[1], 201)
    theta = np.stack(np.meshgrid(mean, log_std), axis=-1)
    of_grid = th.from_numpy(theta).reshape(-1, 2)
    objective = expected_return(of_grid).reshape(201, 201).numpy()
    kl = kl_from_start(of_grid).reshape(201, 201).numpy()
    vectors = theta - _START
    model = 0.5 * np.einsum("...i,ij,...j", vectors, fisher, vectors)
    lines = panel.contour(mean, log_std, objective, levels=12, colors=_PALE, linewidths=0.8, linestyles="solid")
    for label in panel.clabel(lines, fontsize=7.5, fmt="%g"):
        label.set_clip_on(False)  # a label at the edge stays whole
    panel.contourf(mean, log_std, kl, levels=[-1.0, target_kl], colors=[_SKY], alpha=0.2)
    panel.contour(mean, log_std, kl, levels=[target_kl], colors=[BLACK], linewidths=1.8)
    panel.contour(mean, log_std, model, levels=[target_kl], colors=[BLACK], linewidths=1.3, linestyles="dotted")
    panel.plot([], [], color=_PALE, linewidth=0.8, label="expected return")
    panel.plot([], [], color=BLACK, label=f"KL = {target_kl:g}")
    panel.plot([], [], color=BLACK, linewidth=1.3, linestyle="dotted", label="its second-order model")
    panel.grid(visible=False)


def _draw_arrow(panel: Axes, vector: np.ndarray, color: str, dash: Any, label: str) -> None:
    end, neck = _START + vector, _START + 0.93 * vector
    panel.plot(*zip(_START, end, strict=True), color=color, linestyle=dash, linewidth=2.2, label=label)
    head = {"arrowstyle": "-|>", "color": color, "linewidth": 1.5, "mutation_scale": 16.0}
    panel.annotate("", (end[0], end[1]), (neck[0], neck[1]), arrowprops=head)


def _draw_trials(panel: Axes, step: TrustRegionStep) -> None:
    """Draw each trial of the line search, with its KL divergence."""
    n_refused = len(step.trials) - int(step.search.accepted)
    refused, accepted = step.trials[:n_refused], step.trials[n_refused:]
    panel.plot(*refused.T, "x", color=BLACK, markersize=8, markeredgewidth=1.8, label="trial, refused", zorder=6)
    panel.plot(*accepted.T, "o", color=GREEN, markersize=9, label="trial, accepted", zorder=6)
    for i, ((x, y), kl) in enumerate(zip(step.trials[:4], step.kls, strict=False)):  # more labels would overlap
        is_above = i % 2 == 0
        panel.annotate(
            f"KL {kl:.2f}",
            (x, y),
            xytext=(3, 9) if is_above else (-3, -9),
            textcoords="offset points",
            va="bottom" if is_above else "top",
            ha="left" if is_above else "right",
            fontsize=8.5,
            bbox=_PLATE,
            zorder=5,
        )
