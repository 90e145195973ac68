"""
Estimators of the KL divergence between two policies, from log-probabilities of actions that one of them drew.

The *second* argument belongs to the policy that drew the actions, and the divergence is from that policy to the other:

- Actions of the old policy, as in PPO: ``kl_k3(log_prob, old_log_prob)`` estimates KL(old||new).
- Actions of the new policy, compared with a reference, as in the training of language models:
  ``kl_k3(ref_log_prob, log_prob)`` estimates KL(new||reference). Other libraries write ``(log_prob, ref_log_prob)`` for
  the same; here that order estimates neither divergence.

If the old policy takes its two actions with probabilities 0.9 and 0.1, and the new one with 0.5 and 0.5, KL(old||new)
is ``0.9 log(0.9 / 0.5) + 0.1 log(0.1 / 0.5) = 0.368`` and KL(new||old) is 0.511; the examples below use these policies.

Schulman, "Approximating KL Divergence", http://joschu.net/blog/kl-approx.html. With r the probability ratio of the new
policy to the old one, and the mean taken over actions of the old policy:

========= ========================= ======================================================================
estimator value for one action      its mean
========= ========================= ======================================================================
k1        ``-log r``                KL, unbiased; large variance, negative for some actions
k2        ``(log r)^2 / 2``         biased, equal to KL to second order; never negative
k3        ``(r - 1) - log r``       KL, unbiased; small variance, never negative
abs       ``|log r|``               not an estimate of KL, but an upper bound on it
========= ========================= ======================================================================

The gradients of k1 and k3 are unbiased too if the policy that drew the actions is held fixed. They are biased for
KL(new||reference) under actions of the new policy, because the gradient step also changes the distribution of actions.
"""

from __future__ import annotations

import torch as th

from sb3_ppo_ext.losses._guards import Scalar, check_same_shape, checked_scalar, prepared
from sb3_ppo_ext.losses.ratios import log_ratio


def kl_k1(log_prob: th.Tensor, old_log_prob: th.Tensor, *, mask: th.Tensor | None = None) -> th.Tensor:
    """
    Unbiased estimate of KL(old||new) with a large variance, Schulman's k1.

    ``k1 = -log r``

    The second argument belongs to the policy that drew the actions. If that is the new one, ``kl_k1(ref_log_prob,
    log_prob)`` estimates KL(new||reference); ``kl_k1(log_prob, ref_log_prob)`` is that with the sign reversed:

        >>> import torch as th
        >>> old, new = th.tensor([0.9, 0.1]), th.tensor([0.5, 0.5])
        >>> round((old * kl_k1(new.log(), old.log())).sum().item(), 4)  # KL(old||new)
        0.3681
        >>> round((new * kl_k1(old.log(), new.log())).sum().item(), 4)  # KL(new||old)
        0.5108
        >>> round((new * kl_k1(new.log(), old.log())).sum().item(), 4)  # the arguments in the wrong order
        -0.5108

    :param log_prob: log-probability of the action under the new policy, any shape
    :param old_log_prob: the same under the policy that drew the action, same shape
    :param mask: 1 or True where an element counts, same shape; None if all do
    :return: elementwise; 0 with gradient 0 where the mask excludes
    :raises ValueError: if the shapes differ
    """
    return -_log_ratio(log_prob, old_log_prob, mask)


def kl_k2(log_prob: th.Tensor, old_log_prob: th.Tensor, *, mask: th.Tensor | None = None) -> th.Tensor:
    """
    Biased estimate of KL(old||new) that is never negative, Schulman's k2; exact to second order in log r.

    ``k2 = (log r)^2 / 2``

    The order of the arguments makes no difference; the policy that drew the actions decides which divergence is
    estimated. With actions of the old policy it is KL(old||new), with actions of the new policy KL(new||old):

        >>> import torch as th
        >>> old, new = th.tensor([0.5, 0.5]), th.tensor([0.4, 0.6])
        >>> round((old * kl_k2(new.log(), old.log())).sum().item(), 4)  # KL(old||new) is 0.0204
        0.0208
        >>> round((new * kl_k2(old.log(), new.log())).sum().item(), 4)  # KL(new||old) is 0.0201
        0.0199

    :param log_prob: log-probability of the action under the new policy, any shape
    :param old_log_prob: the same under the policy that drew the action, same shape
    :param mask: 1 or True where an element counts, same shape; None if all do
    :return: elementwise; 0 with gradient 0 where the mask excludes
    :raises ValueError: if the shapes differ
    """
    return _log_ratio(log_prob, old_log_prob, mask).square() / 2


def kl_k3(
    log_prob: th.Tensor,
    old_log_prob: th.Tensor,
    *,
    mask: th.Tensor | None = None,
    max_log_ratio: Scalar | None = 20.0,
) -> th.Tensor:
    """
    Unbiased, never negative estimate of KL(old||new) with a small variance, Schulman's k3; SB3's ``approx_kl``.

    ``k3 = (r - 1) - log r``

    The second argument belongs to the policy that drew the actions. If that is the new one, ``kl_k3(ref_log_prob,
    log_prob)`` estimates KL(new||reference); ``kl_k3(log_prob, ref_log_prob)`` estimates neither divergence:

        >>> import torch as th
        >>> old, new = th.tensor([0.9, 0.1]), th.tensor([0.5, 0.5])
        >>> round((old * kl_k3(new.log(), old.log())).sum().item(), 4)  # KL(old||new)
        0.3681
        >>> round((new * kl_k3(old.log(), new.log())).sum().item(), 4)  # KL(new||old)
        0.5108
        >>> round((new * kl_k3(new.log(), old.log())).sum().item(), 4)  # the arguments in the wrong order
        1.267

    :param log_prob: log-probability of the action under the new policy, any shape
    :param old_log_prob: the same under the policy that drew the action, same shape
    :param mask: 1 or True where an element counts, same shape; None if all do
    :param max_log_ratio: upper bound on the log-ratio, > 0, since its exponential overflows; beyond it the gradient is
        0. None for no bound. (The other estimators cannot overflow and have no bound.)
    :return: elementwise; 0 with gradient 0 where the mask excludes
    :raises ValueError: if the shapes differ, or ``max_log_ratio`` is a number that is not > 0
    """
    max_log_ratio = checked_scalar("max_log_ratio", max_log_ratio, optional=True, exclusive=True)
    log_ratios = _log_ratio(log_prob, old_log_prob, mask)
    if max_log_ratio is not None:
        log_ratios = log_ratios.clamp(max=max_log_ratio)
    # expm1, because k3 of a small step is no larger than the rounding error of exp(x) - 1.
    return log_ratios.expm1() - log_ratios


def kl_abs(log_prob: th.Tensor, old_log_prob: th.Tensor, *, mask: th.Tensor | None = None) -> th.Tensor:
    """
    Absolute difference of the log-probabilities; its mean is an upper bound on KL(old||new).

    ``abs = |log r|``

    :param log_prob: log-probability of the action under the new policy, any shape
    :param old_log_prob: the same under the policy that drew the action, same shape
    :param mask: 1 or True where an element counts, same shape; None if all do
    :return: elementwise; 0 with gradient 0 where the mask excludes
    :raises ValueError: if the shapes differ
    """
    return _log_ratio(log_prob, old_log_prob, mask).abs()


def _log_ratio(log_prob: th.Tensor, old_log_prob: th.Tensor, mask: th.Tensor | None) -> th.Tensor:
    check_same_shape(log_prob=log_prob, old_log_prob=old_log_prob, mask=mask)
    log_prob, old_log_prob = prepared(mask, log_prob, old_log_prob)
    return log_ratio(log_prob, old_log_prob, max_log_ratio=None)
