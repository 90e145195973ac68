"""A figure of which samples of a rollout still have a gradient after its update, and which are cut."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import matplotlib
import numpy as np
import torch as th
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from sb3_ppo_ext import losses
from sb3_ppo_ext.common.errors import ArgumentError
from sb3_ppo_ext.common.proximal import ProximalAlgorithm
from sb3_ppo_ext.common.rollout.buffers import RolloutBuffer
from sb3_ppo_ext.common.rollout.data import RolloutSamples
from sb3_ppo_ext.plots.style import BLACK, BLUE, GREY, SETTINGS, VERMILLION, WIDTH


class UpdatedSamples(NamedTuple):
    """
    The samples of a rollout, evaluated by the policy after the update on them. All fields have the shape ``(n,)``. At
    most one of the last three is true for a sample, and none if its advantage is 0.

    :param ratio: probability of the action under the present policy, divided by that under the policy that drew it
    :param advantage: normalised over the rollout, if the algorithm normalises advantages
    :param learns: whether the algorithm's loss has a gradient at the sample
    :param cut: whether the gradient is 0 because of the clip range, or another limit of the loss
    :param dual_clipped: whether the gradient is 0 because A < 0 and the ratio is beyond ``dual_clip``
    """

    ratio: np.ndarray
    advantage: np.ndarray
    learns: np.ndarray
    cut: np.ndarray
    dual_clipped: np.ndarray

    def in_words(self) -> dict[str, str]:
        """The number of samples of each kind in words, by the names of the fields."""
        names = {"learns": "still learn", "cut": "cut", "dual_clipped": "cut by the second clip"}
        counts = {name: int(getattr(self, name).sum()) for name in names}
        return {
            name: f"{words}: {counts[name]:,} ({100.0 * counts[name] / len(self.ratio):.1f} %)"
            for name, words in names.items()
        }


def check_has_objective(name: str, model: object) -> None:
    """
    :param name: name of the caller, for the message
    :param model: the model
    :raises ArgumentError: if the model has no loss whose gradient can be computed for each sample, or no fixed policy
        around which it clips
    """
    if not isinstance(model, ProximalAlgorithm):
        raise ArgumentError(
            f"model={type(model).__name__} is not allowed in {name}: it must be a DualClipPPO, an AdaptiveKLPPO or a "
            "ProximalAlgorithm of your own. A model of SB3's PPO that was saved can be loaded by DualClipPPO.load"
        )
    if model._reuse.proximal == "ewma":
        raise ArgumentError(
            f"reuse={model.reuse!r} is not allowed in {name}: at each gradient step, the update clips around another "
            "policy, the moving average; 'proximal' must be 'behaviour' or 'newest'"
        )


def rollout_of(name: str, model: ProximalAlgorithm) -> RolloutSamples:
    """
    :param name: name of the caller, for the message
    :param model: model whose rollout is wanted
    :return: all samples of the rollout in the model's buffer
    :raises ArgumentError: if there is no rollout, or the buffer is of another kind
    """
    buffer = model.rollout_buffer
    if not isinstance(buffer, RolloutBuffer):
        raise ArgumentError(
            f"rollout_buffer_class={type(buffer).__name__} is not allowed in {name}: it must be a subclass of "
            "sb3_ppo_ext.common.buffers.RolloutBuffer"
        )
    if not buffer.full:
        raise ArgumentError(
            f"model is not allowed in {name} before it has learnt: its rollout buffer must be full, as it is after "
            "learn(); it is not saved with the model"
        )
    return buffer.flat()


def coefficients_of(model: ProximalAlgorithm) -> dict[str, float]:
    """The coefficients of the model's loss, as in its last update."""
    return {"vf_coef": float(model.vf_coef), "max_grad_norm": float(model.max_grad_norm), **model.coefficients()}


def updated_samples(model: ProximalAlgorithm, rollout: RolloutSamples | None = None) -> UpdatedSamples:
    """
    Evaluate a rollout by the policy after the update. A sample still learns if the gradient of the algorithm's own
    ``model.policy_loss`` with respect to the log-probability of its action is not 0.

    :param model: model after :meth:`learn` or :meth:`train`
    :param rollout: rollout to evaluate; None for the one in ``model.rollout_buffer``
    :return: the samples after the update
    :raises ValueError: if the model has no loss of this kind, or no rollout
    """
    check_has_objective("updated_samples", model)
    if rollout is None:
        rollout = rollout_of("updated_samples", model)
    if model.normalize_advantage:
        rollout = rollout._replace(advantages=losses.masked_whiten(rollout.advantages))
    coefficients = coefficients_of(model)
    was_training = model.policy.training
    model.policy.set_training_mode(False)  # as it was when the actions were drawn
    try:
        parts = [
            _gradient(model, rollout.rows(rows), coefficients)
            for rows in model._chunks(len(rollout.advantages), rollout.length)
        ]
    finally:
        model.policy.set_training_mode(was_training)
    ratio, gradient = (th.cat(part).cpu().double().numpy() for part in zip(*parts, strict=True))
    advantage = rollout.advantages.cpu().double().numpy()
    has_none = (gradient == 0.0) & (advantage != 0.0)
    beyond = (advantage < 0.0) & (ratio > coefficients.get("dual_clip", np.inf))
    return UpdatedSamples(ratio, advantage, gradient != 0.0, has_none & ~beyond, has_none & beyond)


def _gradient(
    model: ProximalAlgorithm, samples: RolloutSamples, coefficients: Mapping[str, float]
) -> tuple[th.Tensor, th.Tensor]:
    """Ratios, and the gradient of the policy loss with respect to each log-probability."""
    with th.no_grad():
        evaluation = model._actor_critic().evaluate_actions(samples.inputs, samples.actions)
    log_prob = evaluation.log_prob.detach().requires_grad_()
    with th.enable_grad():
        loss = model.policy_loss(evaluation._replace(log_prob=log_prob), samples, coefficients).loss
    if not loss.requires_grad:
        raise ArgumentError(
            f"model={type(model).__name__} is not allowed: its policy_loss does not depend on evaluation.log_prob, and "
            "it must, to have a gradient at each sample"
        )
    (gradient,) = th.autograd.grad(loss, log_prob)
    return (log_prob.detach() - samples.old_log_prob).exp(), gradient


def update_figure(model: ProximalAlgorithm) -> Figure:
    """
    Draw advantage against ratio for each sample of the last rollout, after the update on it. The legend counts the
    samples that still learn, those that are cut, and those cut by the second clip. Regions without a gradient are
    hatched.

    :param model: a :class:`DualClipPPO`, an :class:`AdaptiveKLPPO` or a child of :class:`ProximalAlgorithm`, after
        :meth:`learn`
    :return: the figure
    :raises ValueError: if the model has no loss of this kind, or no rollout
    """
    check_has_objective("update_figure", model)
    return draw_update(model, updated_samples(model, rollout_of("update_figure", model)))


@matplotlib.rc_context(SETTINGS)
def draw_update(model: ProximalAlgorithm, samples: UpdatedSamples) -> Figure:
    """
    :param model: model after the update
    :param samples: samples of its rollout
    :return: the figure
    """
    figure = Figure(figsize=(WIDTH, 4.4), layout="constrained")
    panel = figure.subplots()
    _draw_map(panel, samples, coefficients_of(model))
    words = samples.in_words()
    for name, color, marker, size in (
        ("learns", BLUE, "o", 3.0),
        ("cut", VERMILLION, "x", 4.0),
        ("dual_clipped", BLACK, "^", 5.0),
    ):
        rows = getattr(samples, name)
        panel.plot(
            samples.ratio[rows],
            samples.advantage[rows],
            color=color,
            marker=marker,
            markersize=size,
            markeredgewidth=1.0 if marker == "x" else 0.0,
            linestyle="none",
            alpha=0.7,
            label=words[name],
            rasterized=len(samples.ratio) > 1000,  # a vector file with many points would be large
        )
    panel.set_xlabel(r"ratio $r = \pi(a|s)\,/\,\pi_\mathrm{old}(a|s)$, after the update")
    panel.set_ylabel("advantage, normalised" if model.normalize_advantage else "advantage")
    panel.set_title(f"{type(model).__name__}, {len(samples.ratio):,} samples of one rollout", fontweight="bold")
    handles, labels = panel.get_legend_handles_labels()
    legend = figure.legend(handles, labels, loc="outside lower center", ncols=3)
    for handle in legend.legend_handles:
        handle.set(alpha=1.0)  # type: ignore[union-attr]
    return figure


def _draw_map(panel: Axes, samples: UpdatedSamples, coefficients: Mapping[str, Any]) -> None:
    """Set the range of the axes, and hatch the regions where the clipped objective is flat."""
    low = high = 1.0
    if "clip_range" in coefficients:
        low = 1.0 - coefficients["clip_range"]
        high = 1.0 + coefficients.get("clip_range_high", coefficients["clip_range"])
    left, right = float(min(samples.ratio.min(), low)), float(max(samples.ratio.max(), high))
    if right > 5.0 * max(left, 1e-3):
        panel.set_xscale("log")
        left = max(left, 1e-6)
        left, right = left / 1.1, right * 1.1
        panel.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        panel.xaxis.set_major_formatter("{x:g}")
        panel.xaxis.set_minor_formatter(NullFormatter())
    else:
        margin = 0.08 * (right - left) + 1e-3
        left, right = left - margin, right + margin
    bound = 1.1 * max(float(np.abs(samples.advantage).max()), 1e-6)
    panel.set(xlim=(left, right), ylim=(-bound, bound))
    panel.axhline(0.0, color=GREY, linewidth=0.8)
    panel.axvline(1.0, color=GREY, linewidth=0.8)
    if "clip_range" not in coefficients:
        return
    dual_clip = coefficients.get("dual_clip", np.inf)
    flat = [(high, right, 0.0, bound, "//"), (left, low, -bound, 0.0, "//"), (dual_clip, right, -bound, 0.0, "xx")]
    for start, end, bottom, top, hatch in flat:
        if start < end:
            panel.fill_between(
                [start, end],
                bottom,
                top,
                facecolor="#F2F2F2",
                edgecolor="#CCCCCC",
                hatch=hatch,
                linewidth=0.0,
                zorder=0,
            )
    for edge in (low, high, dual_clip):
        if edge < right:
            panel.axvline(edge, color=GREY, linewidth=0.8, linestyle=":")
