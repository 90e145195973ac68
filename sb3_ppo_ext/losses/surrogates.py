"""
Policy losses, whose minimisation makes good actions more likely.

Every function is elementwise; reduce with :mod:`sb3_ppo_ext.losses.aggregation` or ``.mean()``. Throughout, r is the
probability ratio of the new policy to the old one and A the advantage.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch as th

from sb3_ppo_ext.losses._guards import Scalar, check_not_empty, check_same_shape, checked_scalar, prepared
from sb3_ppo_ext.losses.ratios import log_ratio


class Diagnostics(NamedTuple):
    """
    How far the new policy is from the old one: 0-d tensors without gradient, each over the elements that count.

    All are computed from the bounded log-ratio (``max_log_ratio``). If no element counts, the ratios are 1 and the
    other fields 0.

    :param clip_fraction_low: share of elements with r < 1 - clip_range; 0 for a loss without a clip
    :param clip_fraction_high: share of elements with r > 1 + clip_range_high; 0 for a loss without a clip
    :param dual_clip_fraction: share of elements with A < 0 and r > dual_clip; 0 for a loss without a second clip
    :param kl_k1: mean of -log r, an unbiased estimate of KL(old||new)
    :param kl_k2: mean of (log r)^2 / 2, a biased estimate with a small variance
    :param kl_k3: mean of (r - 1) - log r, an unbiased estimate; SB3 logs it as ``approx_kl``
    :param ratio_min: smallest r
    :param ratio_max: largest r
    """

    clip_fraction_low: th.Tensor
    clip_fraction_high: th.Tensor
    dual_clip_fraction: th.Tensor
    kl_k1: th.Tensor
    kl_k2: th.Tensor
    kl_k3: th.Tensor
    ratio_min: th.Tensor
    ratio_max: th.Tensor

    @property
    def clip_fraction(self) -> th.Tensor:
        """Share of ratios outside the clip range, whatever the advantage's sign: SB3's ``clip_fraction``."""
        return self.clip_fraction_low + self.clip_fraction_high


class SurrogateLoss(NamedTuple):
    """
    A policy loss and its diagnostics.

    :param loss: elementwise, the shape of the input, to be minimised; 0 with gradient 0 where the mask excludes
    :param diagnostics: 0-d tensors without gradient
    """

    loss: th.Tensor
    diagnostics: Diagnostics


def surrogate_loss(
    log_prob: th.Tensor,
    old_log_prob: th.Tensor,
    advantages: th.Tensor,
    *,
    mask: th.Tensor | None = None,
    max_log_ratio: Scalar | None = 20.0,
) -> SurrogateLoss:
    """
    Surrogate of conservative policy iteration, negated (Schulman et al. 2017, arXiv 1707.06347, equation 6).

    ``loss = -r A``

    :param log_prob: log-probability of the action under the new policy, any shape
    :param old_log_prob: the same under the policy that drew the action, same shape
    :param advantages: A, same shape
    :param mask: 1 or True where an element counts, same shape; None if all do
    :param max_log_ratio: bound on the log-ratio, see :func:`~sb3_ppo_ext.losses.log_ratio`
    :return: the loss, to be minimised, and diagnostics
    :raises ValueError: if there is no element, the shapes differ, or a number is out of range
    """
    check_same_shape(log_prob=log_prob, old_log_prob=old_log_prob, advantages=advantages, mask=mask)
    check_not_empty(log_prob=log_prob)
    log_prob, old_log_prob, advantages = prepared(mask, log_prob, old_log_prob, advantages)
    log_ratios = log_ratio(log_prob, old_log_prob, max_log_ratio=max_log_ratio)
    ratio = log_ratios.exp()
    return SurrogateLoss(-advantages * ratio, _diagnose(log_ratios, ratio, advantages, mask))


def clipped_surrogate_loss(
    log_prob: th.Tensor,
    old_log_prob: th.Tensor,
    advantages: th.Tensor,
    *,
    clip_range: Scalar = 0.2,
    clip_range_high: Scalar | None = None,
    mask: th.Tensor | None = None,
    max_log_ratio: Scalar | None = 20.0,
) -> SurrogateLoss:
    """
    Clipped surrogate of PPO, negated (Schulman et al. 2017, arXiv 1707.06347, equation 7).

    ``loss = -min(r A, clip(r, 1 - clip_range, 1 + clip_range_high) A)``

    With both ranges equal, this is the loss of SB3's PPO. A larger ``clip_range_high`` gives the "clip-higher" of DAPO
    (Yu et al. 2025, arXiv 2503.14476, section 3.1), which lets the probability of unlikely actions grow further.

    :param log_prob: log-probability of the action under the new policy, any shape
    :param old_log_prob: the same under the policy that drew the action, same shape
    :param advantages: A, same shape
    :param clip_range: how far below 1 the ratio counts, >= 0
    :param clip_range_high: how far above 1 the ratio counts, >= 0; None for ``clip_range``
    :param mask: 1 or True where an element counts, same shape; None if all do
    :param max_log_ratio: bound on the log-ratio, see :func:`~sb3_ppo_ext.losses.log_ratio`
    :return: the loss, to be minimised, and diagnostics
    :raises ValueError: if there is no element, the shapes differ, or a number is out of range
    """
    return dual_clip_surrogate_loss(
        log_prob,
        old_log_prob,
        advantages,
        dual_clip=None,
        clip_range=clip_range,
        clip_range_high=clip_range_high,
        mask=mask,
        max_log_ratio=max_log_ratio,
    )


def dual_clip_surrogate_loss(
    log_prob: th.Tensor,
    old_log_prob: th.Tensor,
    advantages: th.Tensor,
    *,
    dual_clip: Scalar | None = 3.0,
    clip_range: Scalar = 0.2,
    clip_range_high: Scalar | None = None,
    mask: th.Tensor | None = None,
    max_log_ratio: Scalar | None = 20.0,
) -> SurrogateLoss:
    """
    Clipped surrogate that is also bounded where the advantage is negative, negated (Ye et al. 2020, arXiv 1912.09729,
    equation 5).

    ``loss = -max(min(r A, clip(r) A), c A)`` where A < 0, and ``-min(r A, clip(r) A)`` elsewhere; c = ``dual_clip``

    PPO's minimum bounds the objective from above, but not from below: one bad action that has become a hundred times
    more likely dominates the batch. Beyond r = c such an action adds a constant to the loss, and nothing to the
    gradient.

    :param log_prob: log-probability of the action under the new policy, any shape
    :param old_log_prob: the same under the policy that drew the action, same shape
    :param advantages: A, same shape
    :param dual_clip: c > 1 + ``clip_range_high``; None or infinity gives :func:`clipped_surrogate_loss`
    :param clip_range: how far below 1 the ratio counts, >= 0
    :param clip_range_high: how far above 1 the ratio counts, >= 0; None for ``clip_range``
    :param mask: 1 or True where an element counts, same shape; None if all do
    :param max_log_ratio: bound on the log-ratio, see :func:`~sb3_ppo_ext.losses.log_ratio`
    :return: the loss, to be minimised, and diagnostics
    :raises ValueError: if there is no element, the shapes differ, or a number is out of range. The value of a
        tensor is not checked: a c that is too small then also bounds the loss of positive advantages.
    """
    check_same_shape(log_prob=log_prob, old_log_prob=old_log_prob, advantages=advantages, mask=mask)
    check_not_empty(log_prob=log_prob)
    clip_range = checked_scalar("clip_range", clip_range)
    clip_range_high = checked_scalar("clip_range_high", clip_range_high, optional=True)
    if clip_range_high is None:
        clip_range_high = clip_range
    dual_clip = checked_scalar("dual_clip", dual_clip, optional=True, minimum=1.0, exclusive=True)
    _check_dual_clip(dual_clip, clip_range_high)

    log_prob, old_log_prob, advantages = prepared(mask, log_prob, old_log_prob, advantages)
    log_ratios = log_ratio(log_prob, old_log_prob, max_log_ratio=max_log_ratio)
    ratio = log_ratios.exp()
    # Every ratio is bounded by c, not only where A < 0. That makes no difference: where A >= 0, the clip at
    # 1 + clip_range_high < c acts first. No product contains c itself, so c = infinity needs no special case.
    bounded_ratio = ratio if dual_clip is None else ratio.clamp(max=dual_clip)
    cost = -advantages
    unclipped = bounded_ratio * cost
    # Where the clipped term is the larger loss, it does not depend on the ratio, so it needs no gradient. So where()
    # gives the same gradient as minimum() with a shorter backward pass. For a NaN it takes the unclipped term.
    clipped = _clip(bounded_ratio.detach(), clip_range, clip_range_high) * cost
    loss = th.where(clipped > unclipped, clipped, unclipped)
    diagnostics = _diagnose(
        log_ratios,
        ratio,
        advantages,
        mask,
        clip_range=clip_range,
        clip_range_high=clip_range_high,
        dual_clip=dual_clip,
    )
    return SurrogateLoss(loss, diagnostics)


def kl_penalized_surrogate_loss(
    log_prob: th.Tensor,
    old_log_prob: th.Tensor,
    advantages: th.Tensor,
    kl: th.Tensor,
    *,
    kl_coef: Scalar,
    mask: th.Tensor | None = None,
    max_log_ratio: Scalar | None = 20.0,
) -> SurrogateLoss:
    """
    Surrogate with a penalty on the distance to the old policy, negated (Schulman et al. 2017, arXiv 1707.06347,
    equation 8).

    ``loss = -(r A - beta KL(old||new))`` with beta = ``kl_coef``

    :param log_prob: log-probability of the action under the new policy, any shape
    :param old_log_prob: the same under the policy that drew the action, same shape
    :param advantages: A, same shape
    :param kl: KL(old||new) of the action distributions at each state, or an estimate, same shape; with its gradient
    :param kl_coef: beta, >= 0 and finite
    :param mask: 1 or True where an element counts, same shape; None if all do
    :param max_log_ratio: bound on the log-ratio, see :func:`~sb3_ppo_ext.losses.log_ratio`; it does not bound ``kl``
    :return: the loss, to be minimised, and diagnostics
    :raises ValueError: if there is no element, the shapes differ, or a number is out of range
    """
    check_same_shape(log_prob=log_prob, old_log_prob=old_log_prob, advantages=advantages, kl=kl, mask=mask)
    check_not_empty(log_prob=log_prob)
    kl_coef = checked_scalar("kl_coef", kl_coef, finite=True)
    log_prob, old_log_prob, advantages, kl = prepared(mask, log_prob, old_log_prob, advantages, kl)
    log_ratios = log_ratio(log_prob, old_log_prob, max_log_ratio=max_log_ratio)
    ratio = log_ratios.exp()
    return SurrogateLoss(kl_coef * kl - advantages * ratio, _diagnose(log_ratios, ratio, advantages, mask))


def spo_surrogate_loss(
    log_prob: th.Tensor,
    old_log_prob: th.Tensor,
    advantages: th.Tensor,
    *,
    epsilon: Scalar = 0.2,
    mask: th.Tensor | None = None,
    max_log_ratio: Scalar | None = 20.0,
) -> SurrogateLoss:
    """
    Surrogate of simple policy optimisation, negated (Xie et al. 2024, arXiv 2401.16025): a quadratic penalty replaces
    the clip.

    ``loss = -(r A - |A| (r - 1)^2 / (2 epsilon))``

    At the old policy its gradient equals that of :func:`surrogate_loss`. It is 0 only at r = 1 + sign(A) epsilon.
    Beyond this point it pulls the ratio back, whereas the gradient of PPO's clipped loss is 0 there.

    :param log_prob: log-probability of the action under the new policy, any shape
    :param old_log_prob: the same under the policy that drew the action, same shape
    :param advantages: A, same shape
    :param epsilon: distance from 1 at which the ratio is optimal, > 0; infinity gives :func:`surrogate_loss`
    :param mask: 1 or True where an element counts, same shape; None if all do
    :param max_log_ratio: bound on the log-ratio, see :func:`~sb3_ppo_ext.losses.log_ratio`
    :return: the loss, to be minimised, and diagnostics
    :raises ValueError: if there is no element, the shapes differ, or a number is out of range
    """
    check_same_shape(log_prob=log_prob, old_log_prob=old_log_prob, advantages=advantages, mask=mask)
    check_not_empty(log_prob=log_prob)
    epsilon = checked_scalar("epsilon", epsilon, exclusive=True)
    log_prob, old_log_prob, advantages = prepared(mask, log_prob, old_log_prob, advantages)
    log_ratios = log_ratio(log_prob, old_log_prob, max_log_ratio=max_log_ratio)
    ratio = log_ratios.exp()
    penalty = advantages.abs() * (ratio - 1.0).square() / (2.0 * epsilon)
    return SurrogateLoss(penalty - advantages * ratio, _diagnose(log_ratios, ratio, advantages, mask))


def reinforce_loss(log_prob: th.Tensor, weights: th.Tensor, *, mask: th.Tensor | None = None) -> th.Tensor:
    """
    Loss whose gradient is that of REINFORCE, negated (Williams 1992, section 4).

    ``loss = -log pi(a|s) w``

    Its value has no meaning by itself. The mean of its gradient over actions drawn from pi is minus the policy
    gradient.

    :param log_prob: log-probability of the action under the policy that drew it, any shape
    :param weights: w, the return minus a baseline, same shape; no gradient flows into it
    :param mask: 1 or True where an element counts, same shape; None if all do
    :return: the loss, elementwise, to be minimised
    :raises ValueError: if the shapes differ
    """
    check_same_shape(log_prob=log_prob, weights=weights, mask=mask)
    log_prob, weights = prepared(mask, log_prob, weights.detach())
    return -weights * log_prob


def _check_dual_clip(dual_clip: Scalar | None, clip_range_high: Scalar) -> None:
    if dual_clip is None or isinstance(dual_clip, th.Tensor) or isinstance(clip_range_high, th.Tensor):
        return
    if dual_clip <= 1 + clip_range_high and dual_clip != math.inf:
        raise ValueError(
            f"dual_clip must be > 1 + clip_range_high = {1 + clip_range_high}, got {dual_clip}: "
            "a smaller bound would act inside the trust region"
        )


def _clip(ratio: th.Tensor, clip_range: Scalar, clip_range_high: Scalar) -> th.Tensor:
    low: Any = 1 - clip_range
    high: Any = 1 + clip_range_high
    if isinstance(low, th.Tensor) == isinstance(high, th.Tensor):
        return ratio.clamp(low, high)
    # A single clamp with a number and a tensor would read the tensor's value on the host.
    return ratio.clamp(min=low).clamp(max=high)


def _diagnose(
    log_ratios: th.Tensor,
    ratio: th.Tensor,
    advantages: th.Tensor,
    mask: th.Tensor | None,
    *,
    clip_range: Scalar | None = None,
    clip_range_high: Scalar | None = None,
    dual_clip: Scalar | None = None,
) -> Diagnostics:
    """Compute all means in one reduction. The log-ratios of excluded elements are already 0."""
    with th.no_grad():
        excess = ratio - 1  # SB3 compares this with the clip range, so the clip fraction is the same to the last bit
        rows = [log_ratios, log_ratios.square(), excess - log_ratios]
        if clip_range is not None and clip_range_high is not None:
            rows += [excess < -clip_range, excess > clip_range_high]
        if dual_clip is not None:
            rows.append((ratio > dual_clip) & (advantages < 0))
        table = th.stack(rows).view(len(rows), -1)
        if mask is None:
            means = table.mean(1)
            ratio_min, ratio_max = th.aminmax(ratio)
        else:
            keep = mask.bool()
            means = table.sum(1) / keep.sum().clamp(min=1)
            # Excluded ratios are replaced by a value that cannot be the extreme; if all are excluded, they are 1.
            lowest, highest = th.aminmax(ratio)
            ratio_min = th.where(keep, ratio, highest).amin()
            ratio_max = th.where(keep, ratio, lowest).amax()
        mean_log_ratio, mean_square, kl_k3, *fractions = means.unbind()
        if len(fractions) < 3:
            fractions += [means.new_zeros(())] * (3 - len(fractions))
        low, high, dual = fractions
        return Diagnostics(low, high, dual, -mean_log_ratio, mean_square / 2, kl_k3, ratio_min, ratio_max)
