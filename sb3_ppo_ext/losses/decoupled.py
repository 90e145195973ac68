"""The PPO loss that clips around a proximal policy instead of the policy that collected the data."""

from __future__ import annotations

import math

import torch as th

from sb3_ppo_ext.losses._guards import Scalar, check_same_shape, checked_scalar, prepared
from sb3_ppo_ext.losses.ratios import truncated_importance_weights
from sb3_ppo_ext.losses.surrogates import SurrogateLoss, dual_clip_surrogate_loss


def decoupled_surrogate_loss(
    log_prob: th.Tensor,
    proximal_log_prob: th.Tensor,
    old_log_prob: th.Tensor,
    advantages: th.Tensor,
    *,
    max_importance_weight: Scalar = math.inf,
    dual_clip: Scalar | None = None,
    clip_range: Scalar = 0.2,
    clip_range_high: Scalar | None = None,
    mask: th.Tensor | None = None,
    max_log_ratio: Scalar | None = 20.0,
) -> SurrogateLoss:
    """
    Clipped surrogate around a proximal policy instead of the policy that acted, negated (Hilton et al. 2021, arXiv
    2110.00641, section 3).

    ``loss = -w min(r A, clip(r) A)`` with ``r = pi_new / pi_prox`` and ``w = min(pi_prox / pi_old, bound)``

    Samples of old policies are weighted as if the proximal policy had drawn them, and the clip limits how far the new
    policy may move from the proximal policy. The bound, which the paper does not have, limits the variance. Where the
    proximal policy is the one that acted, the loss is that of :func:`dual_clip_surrogate_loss`.

    :param log_prob: log-probability of the action under the new policy, any shape
    :param proximal_log_prob: the same under the proximal policy, same shape
    :param old_log_prob: the same under the policy that drew the action, same shape
    :param advantages: A, same shape
    :param max_importance_weight: upper bound of w, > 0; infinity gives the paper's loss
    :param dual_clip: c > 1 + ``clip_range_high``, see :func:`dual_clip_surrogate_loss`; None gives the paper's loss
    :param clip_range: how far below 1 the ratio counts, >= 0
    :param clip_range_high: how far above 1 the ratio counts, >= 0; None for ``clip_range``
    :param mask: 1 or True where an element counts, same shape; None if all do
    :param max_log_ratio: bound on both log-ratios, see :func:`~sb3_ppo_ext.losses.log_ratio`
    :return: the loss, to be minimised, and diagnostics, whose ratio is r
    :raises ValueError: if there is no element, the shapes differ, or a number is out of range
    """
    check_same_shape(
        log_prob=log_prob,
        proximal_log_prob=proximal_log_prob,
        old_log_prob=old_log_prob,
        advantages=advantages,
        mask=mask,
    )
    max_importance_weight = checked_scalar("max_importance_weight", max_importance_weight, exclusive=True)
    proximal, old = prepared(mask, proximal_log_prob, old_log_prob)
    loss, diagnostics = dual_clip_surrogate_loss(
        log_prob,
        proximal_log_prob,
        advantages,
        dual_clip=dual_clip,
        clip_range=clip_range,
        clip_range_high=clip_range_high,
        mask=mask,
        max_log_ratio=max_log_ratio,
    )
    weights = truncated_importance_weights(proximal, old, maximum=max_importance_weight, max_log_ratio=max_log_ratio)
    return SurrogateLoss(weights * loss, diagnostics)
