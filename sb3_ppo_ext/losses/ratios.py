"""Probability ratios of two policies, and importance weights."""

from __future__ import annotations

import math
from typing import Any

import torch as th

from sb3_ppo_ext.losses._guards import Scalar, check_same_shape, checked_scalar, widened


def log_ratio(log_prob: th.Tensor, old_log_prob: th.Tensor, *, max_log_ratio: Scalar | None = 20.0) -> th.Tensor:
    """
    Logarithm of the probability ratio, bounded.

    ``clamp(log pi_new(a|s) - log pi_old(a|s), -b, b)`` with b = ``max_log_ratio``

    The bound keeps the exponential finite: exp overflows above 88 in float32. The default of 20 is usual in the
    training of language models, and far outside any trust region. Where the bound acts, the log-ratio is a constant and
    its gradient is 0.

    :param log_prob: log-probability of the action under the new policy, any shape
    :param old_log_prob: the same under the policy that drew the action, same shape
    :param max_log_ratio: b > 0; None for no bound
    :return: same shape
    :raises ValueError: if the shapes differ, or ``max_log_ratio`` is a number that is not > 0
    """
    check_same_shape(log_prob=log_prob, old_log_prob=old_log_prob)
    max_log_ratio = checked_scalar("max_log_ratio", max_log_ratio, optional=True, exclusive=True)
    difference = widened(log_prob) - widened(old_log_prob)
    if max_log_ratio is None:
        return difference
    bound: Any = max_log_ratio  # by torch's stubs, clamp takes two numbers or two tensors, but no union of them
    return difference.clamp(-bound, bound)


def probability_ratio(
    log_prob: th.Tensor, old_log_prob: th.Tensor, *, max_log_ratio: Scalar | None = 20.0
) -> th.Tensor:
    """
    Probability ratio of the new policy to the old one, the r of Schulman et al. 2017 (arXiv 1707.06347, section 3).

    ``r = pi_new(a|s) / pi_old(a|s) = exp(log_ratio)``

    :param log_prob: log-probability of the action under the new policy, any shape
    :param old_log_prob: the same under the policy that drew the action, same shape
    :param max_log_ratio: bound on the log-ratio, see :func:`log_ratio`
    :return: same shape
    :raises ValueError: as :func:`log_ratio`
    """
    return log_ratio(log_prob, old_log_prob, max_log_ratio=max_log_ratio).exp()


def truncated_importance_weights(
    log_prob: th.Tensor,
    old_log_prob: th.Tensor,
    *,
    maximum: Scalar = math.inf,
    max_log_ratio: Scalar | None = 20.0,
) -> th.Tensor:
    """
    Weights of samples of one policy in an expectation under another (Ionides 2008, Truncated importance sampling).

    ``w = min(pi(a|s) / pi_old(a|s), maximum)``

    A smaller maximum gives less variance and more bias: the expectation of f under pi loses
    ``E_old[max(ratio - maximum, 0) f]``.

    :param log_prob: log-probability of the action under pi, any shape
    :param old_log_prob: the same under the policy that drew the action, same shape
    :param maximum: bound of the weights, > 0; may be infinite
    :param max_log_ratio: bound on the log-ratio, see :func:`log_ratio`
    :return: w, same shape
    :raises ValueError: if the shapes differ, or a number is out of range
    """
    maximum = checked_scalar("maximum", maximum, exclusive=True)
    bound: Any = maximum
    return probability_ratio(log_prob, old_log_prob, max_log_ratio=max_log_ratio).clamp(max=bound)
