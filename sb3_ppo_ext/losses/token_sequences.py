"""
Rewards, advantages and entropy of sequences of tokens, for fine-tuning a language model with PPO.

Tensors have shape ``(batch, time)``, with one response in each row. ``mask`` is 1 or True at the tokens that count:
those that the policy wrote. They are one response, even if other tokens (prompt, padding, a tool's output) come before,
between or after them.

Fine-tuning as in Ziegler et al. 2019 (arXiv 1909.08593) and Ouyang et al. 2022 (arXiv 2203.02155)::

    rewards = losses.token_rewards(scores, log_prob, ref_log_prob, kl_coef=0.1, mask=mask)
    advantages = losses.token_gae(rewards, values, gamma=1.0, gae_lambda=0.95, mask=mask)
    returns = advantages + values
    advantages = losses.masked_whiten(advantages, mask)
"""

from __future__ import annotations

import torch as th

from sb3_ppo_ext.losses._guards import Scalar, as_floats, check_same_shape, checked_scalar, prepared
from sb3_ppo_ext.losses.aggregation import masked_mean
from sb3_ppo_ext.losses.targets import generalized_advantages


@th.no_grad()
def token_rewards(
    scores: th.Tensor,
    log_prob: th.Tensor,
    ref_log_prob: th.Tensor,
    *,
    kl_coef: Scalar,
    mask: th.Tensor | None = None,
) -> th.Tensor:
    """
    Rewards of tokens: the score of the response at its last token, and at each token a penalty on the log-ratio to a
    reference policy (Ziegler et al. 2019, arXiv 1909.08593, equation 2; Ouyang et al. 2022, arXiv 2203.02155, equation
    2).

    ``r_t = -beta (log pi(a_t|s_t) - log pi_ref(a_t|s_t)) + [t is the last token] score`` with beta = ``kl_coef``

    Over responses written by pi, the penalties of a response sum up to ``-beta KL(pi||pi_ref)`` on average.

    :param scores: score of each whole response, shape ``(batch,)``; not read where no token counts
    :param log_prob: log-probability of each token under the policy that wrote it, shape ``(batch, time)``
    :param ref_log_prob: the same under the reference policy, same shape
    :param kl_coef: beta, >= 0 and finite
    :param mask: 1 or True where a token counts, shape ``(batch, time)``; None if all do
    :return: r, shape ``(batch, time)``, without gradient; 0 where the mask excludes
    :raises ValueError: if a shape is wrong, or ``kl_coef`` is a number out of range
    """
    _check_is_batch_of_rows("log_prob", log_prob)
    check_same_shape(log_prob=log_prob, ref_log_prob=ref_log_prob, mask=mask)
    if scores.shape != log_prob.shape[:1]:
        raise ValueError(f"scores must have shape (batch,) = {tuple(log_prob.shape[:1])}, got {tuple(scores.shape)}")
    kl_coef = checked_scalar("kl_coef", kl_coef, finite=True)
    log_prob, ref_log_prob = prepared(mask, log_prob, ref_log_prob)
    keep = _kept(log_prob, mask)
    n_from_here_on = keep.flip(1).cumsum(1).flip(1)
    score_at_last = th.where(keep & (n_from_here_on == 1), scores[:, None], 0.0)
    return score_at_last - kl_coef * (log_prob - ref_log_prob)


@th.no_grad()
def token_gae(
    rewards: th.Tensor,
    values: th.Tensor,
    *,
    gamma: Scalar,
    gae_lambda: Scalar,
    mask: th.Tensor | None = None,
) -> th.Tensor:
    """
    Generalised advantage estimates (Schulman et al. 2016, arXiv 1506.02438, equation 16) of responses of different
    lengths. In each row, the tokens that count are the steps of one episode, which ends with the last of them; see
    :func:`~sb3_ppo_ext.losses.generalized_advantages`.

    ``A_t + V_t`` is the TD(lambda) return, for the critic. Language models are usually trained with gamma = 1.

    :param rewards: shape ``(batch, time)``, for example from :func:`token_rewards`
    :param values: V before each token is written, same shape
    :param gamma: discount factor, from 0 to 1
    :param gae_lambda: lambda, from 0 to 1
    :param mask: 1 or True where a token counts, same shape; None if all do
    :return: A, same shape, without gradient; 0 where the mask excludes
    :raises ValueError: if a shape is wrong, or a number out of range
    """
    _check_is_batch_of_rows("rewards", rewards)
    check_same_shape(rewards=rewards, values=values, mask=mask)
    rewards, values = prepared(mask, rewards, values)
    keep = _kept(rewards, mask)
    # Move the tokens that count to the front of each row, in their order. They are followed by zeros: rewards and
    # values after the end are 0, so no step has to be marked as terminal.
    order = (~keep).int().argsort(dim=1, stable=True)
    never = th.zeros_like(keep).T
    advantages = generalized_advantages(
        rewards.gather(1, order).T,
        values.gather(1, order).T,
        values.new_zeros(len(values)),
        terminated=never,
        truncated=never,
        gamma=gamma,
        gae_lambda=gae_lambda,
    ).T
    return th.zeros_like(advantages).scatter(1, order, advantages)


def masked_whiten(x: th.Tensor, mask: th.Tensor | None = None) -> th.Tensor:
    """
    Shift and scale the elements that count to mean 0 and standard deviation 1, as SB3's PPO normalises advantages.

    ``(x_i - mean) / (std + 1e-8)``, with mean and standard deviation (divided by n - 1) over the elements that count

    :param x: any shape
    :param mask: 1 or True where an element counts, same shape; None if all do
    :return: same shape; 0 with gradient 0 where the mask excludes; ``x`` unchanged if only one element counts
    :raises ValueError: if the shapes differ
    """
    check_same_shape(x=x, mask=mask)
    (x,) = prepared(mask, as_floats(x))
    if mask is None:
        return x if x.numel() <= 1 else (x - x.mean()) / (x.std() + 1e-8)
    keep = mask.bool()
    n = keep.sum()
    centred = th.where(keep, x - masked_mean(x, mask), 0.0)
    variance = centred.square().sum() / (n - 1).clamp(min=1)
    std = variance.clamp(min=th.finfo(x.dtype).tiny).sqrt()  # the root's gradient is infinite at 0
    return th.where(n > 1, centred / (std + 1e-8), x)


def masked_entropy(logits: th.Tensor, mask: th.Tensor | None = None) -> th.Tensor:
    """
    Entropy of the distribution of each token, in nats, for example for an entropy bonus (Williams & Peng 1991).

    ``H_t = -sum_v p_t(v) log p_t(v)`` with ``p_t = softmax(logits_t)``

    A logit of minus infinity forbids a token and adds nothing to the entropy.

    :param logits: shape ``(..., n_tokens)``, ``n_tokens`` being the size of the vocabulary
    :param mask: 1 or True where a token counts, shape ``(...)``; None if all do
    :return: H, shape ``(...)``; 0 with gradient 0 where the mask excludes
    :raises ValueError: if a shape is wrong
    """
    if logits.dim() == 0 or logits.shape[-1] == 0:
        raise ValueError(f"logits must have shape (..., n_tokens) with n_tokens >= 1, got {tuple(logits.shape)}")
    if mask is not None and mask.shape != logits.shape[:-1]:
        raise ValueError(
            f"mask must have the shape of logits without its last dimension, {tuple(logits.shape[:-1])}, "
            f"got {tuple(mask.shape)}"
        )
    (logits,) = prepared(None if mask is None else mask[..., None], logits)
    log_probs = logits.log_softmax(-1)
    # The clamp: 0 * min is 0, but 0 * -inf would be NaN, in the gradient too.
    entropy = -(log_probs.exp() * log_probs.clamp(min=th.finfo(log_probs.dtype).min)).sum(-1)
    return entropy if mask is None else th.where(mask.bool(), entropy, 0.0)


def _check_is_batch_of_rows(name: str, tensor: th.Tensor) -> None:
    if tensor.dim() != 2:
        raise ValueError(f"{name} must have shape (batch, time), got {tuple(tensor.shape)}")


def _kept(like: th.Tensor, mask: th.Tensor | None) -> th.Tensor:
    return th.ones_like(like, dtype=th.bool) if mask is None else mask.bool()
