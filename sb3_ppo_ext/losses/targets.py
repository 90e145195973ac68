"""
Advantages for the policy and returns for the critic, computed from rewards and values.

All tensors have shape ``(T, n_envs)``: T steps of each environment, with any number of consecutive episodes. Sums over
time are computed in float64; results have the dtype of rewards and values, and no gradient.

An episode can end in two ways. After a terminal state, the value is 0. After a time limit, it is V of the final
observation, because the limit says nothing about the state (Pardo et al. 2018, arXiv 1712.00378).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch as th

from sb3_ppo_ext.losses._guards import Scalar, check_same_shape, checked_scalar, prepared
from sb3_ppo_ext.losses.ratios import log_ratio


@th.no_grad()
def generalized_advantages(
    rewards: th.Tensor,
    values: th.Tensor,
    last_values: th.Tensor,
    terminated: th.Tensor,
    truncated: th.Tensor,
    *,
    gamma: Scalar,
    gae_lambda: Scalar,
    final_values: th.Tensor | None = None,
    mask: th.Tensor | None = None,
) -> th.Tensor:
    """
    Generalised advantage estimates, GAE(lambda) (Schulman et al. 2016, arXiv 1506.02438, equation 16).

    ``A_t = sum_k (gamma lambda)^k delta_{t+k}`` with ``delta_t = r_t + gamma V_{t+1} - V_t``, where the sum runs to the
    end of the episode or of the rollout

    ``A_t + V_t`` is the TD(lambda) return, for the critic.

    :param rewards: r, as the environment gave them, shape ``(T, n_envs)``
    :param values: V of the observations that were acted on, same shape
    :param last_values: V of the observations after the last step, shape ``(n_envs,)``; not read where that step ended
        an episode
    :param terminated: whether the step led to a terminal state, same shape as rewards
    :param truncated: whether a time limit cut the episode after the step, same shape; a step that is both is terminated
    :param gamma: discount factor, from 0 to 1
    :param gae_lambda: lambda, from 0 (one-step TD errors: biased) to 1 (Monte-Carlo returns minus values: large
        variance)
    :param final_values: V of the episode's final observation, same shape, read where it was truncated only; None for 0
    :param mask: True where a step counts, same shape; None if all do. A step that does not count, such as padding or a
        reset, is not a transition: no advantage is passed on through it. Only its ``values`` are read: V of the
        observation after the step before it, if that step did not end an episode.
    :return: A, same shape, 0 where the mask excludes
    :raises ValueError: if a shape is wrong, or a number out of range
    """
    gae_lambda = checked_scalar("gae_lambda", gae_lambda, maximum=1.0)
    gamma, targets, goes_on = _one_step_targets(
        rewards, values, last_values, terminated, truncated, gamma=gamma, final_values=final_values, mask=mask
    )
    advantages = targets - values
    if mask is not None:
        advantages = th.where(mask.bool(), advantages, 0.0)
    factors = gamma * gae_lambda * goes_on.to(advantages.dtype)
    reach = 1
    while reach < len(advantages):
        factors = _double(advantages, factors, reach)
        reach *= 2
    return advantages.to(_common_dtype(rewards, values))


@th.no_grad()
def n_step_returns(
    rewards: th.Tensor,
    values: th.Tensor,
    last_values: th.Tensor,
    terminated: th.Tensor,
    truncated: th.Tensor,
    *,
    gamma: Scalar,
    n_steps: int,
    final_values: th.Tensor | None = None,
    mask: th.Tensor | None = None,
) -> th.Tensor:
    """
    n-step returns (Sutton & Barto 2018, equation 7.1).

    ``G_t = r_t + gamma r_{t+1} + ... + gamma^{n-1} r_{t+n-1} + gamma^n V_{t+n}``

    Where the episode or the rollout ends within these n steps, the sum ends there, with the value of the state that
    follows. n = 1 gives the target of TD(0), n >= T the Monte-Carlo return up to the end of the rollout.

    :param rewards: r, as the environment gave them, shape ``(T, n_envs)``
    :param values: V of the observations that were acted on, same shape
    :param last_values: V of the observations after the last step, shape ``(n_envs,)``; not read where that step ended
        an episode
    :param terminated: whether the step led to a terminal state, same shape as rewards
    :param truncated: whether a time limit cut the episode after the step, same shape; a step that is both is terminated
    :param gamma: discount factor, from 0 to 1
    :param n_steps: n >= 1, the number of rewards in a return
    :param final_values: V of the episode's final observation, same shape, read where it was truncated only; None for 0
    :param mask: True where a step counts, same shape; None if all do; see :func:`generalized_advantages`
    :return: G, same shape, 0 where the mask excludes
    :raises ValueError: if a shape is wrong, or a number out of range
    """
    if isinstance(n_steps, bool) or not isinstance(n_steps, int) or n_steps < 1:
        raise ValueError(f"n_steps must be an integer >= 1, got {n_steps!r}")
    gamma, returns, goes_on = _one_step_targets(
        rewards, values, last_values, terminated, truncated, gamma=gamma, final_values=final_values, mask=mask
    )
    # Rewards without a value where a longer return goes on; with the value of the next state where it cannot.
    sums = returns.clone()
    sums[:-1] = th.where(goes_on, rewards[:-1].to(sums.dtype), returns[:-1])
    factors = gamma * goes_on.to(sums.dtype)
    # `returns` already covers one step. The number of further steps is a sum of powers of two, and `sums` covers each
    # power in turn.
    more_steps = min(n_steps, len(rewards)) - 1
    reach = 1
    while reach <= more_steps:
        if more_steps & reach:
            shorter, returns = returns, sums.clone()
            returns[:-reach].add_(factors * shorter[reach:])
        factors = _double(sums, factors, reach)
        reach *= 2
    return returns.to(_common_dtype(rewards, values))


class VTrace(NamedTuple):
    """
    Targets from transitions of another policy.

    :param advantages: for a policy loss with the ratio to the policy that acted, shape ``(T, n_envs)``
    :param returns: v, for the critic, same shape
    """

    advantages: th.Tensor
    returns: th.Tensor


@th.no_grad()
def vtrace(
    rewards: th.Tensor,
    values: th.Tensor,
    last_values: th.Tensor,
    terminated: th.Tensor,
    truncated: th.Tensor,
    log_ratios: th.Tensor,
    *,
    gamma: Scalar,
    gae_lambda: Scalar = 1.0,
    rho_bar: Scalar = 1.0,
    c_bar: Scalar = 1.0,
    final_values: th.Tensor | None = None,
    mask: th.Tensor | None = None,
    max_log_ratio: Scalar | None = 20.0,
) -> VTrace:
    """
    V-trace: returns of a target policy from transitions of another policy (Espeholt et al. 2018, arXiv 1802.01561,
    equation 1 and remark 2).

    ``v_t = V_t + sum_k gamma^k c_t ... c_{t+k-1} rho_{t+k} delta_{t+k}`` with ``delta_t = r_t + gamma V_{t+1} - V_t``,
    ``rho_t = min(rho_bar, ratio_t)`` and ``c_t = lambda min(c_bar, ratio_t)``, where the sum runs to the end of the
    episode or of the rollout. ``rho_bar`` decides which policy is evaluated: infinity evaluates the target policy, a
    smaller bound a policy between the two. ``c_bar`` bounds the variance.

    ``A_t = r_t + gamma (lambda v_{t+1} + (1 - lambda) V_{t+1}) - V_t``. The paper multiplies it by ``rho_t``; the
    losses here contain the ratio themselves. If the two policies are equal, ``A`` is that of
    :func:`generalized_advantages`, and ``v`` is ``A + V``.

    :param rewards: r, as the environment gave them, shape ``(T, n_envs)``
    :param values: V of the observations that were acted on, same shape
    :param last_values: V of the observations after the last step, shape ``(n_envs,)``; not read where that step ended
        an episode
    :param terminated: whether the step led to a terminal state, same shape as rewards
    :param truncated: whether a time limit cut the episode after the step, same shape; a step that is both is terminated
    :param log_ratios: log-probability of each action under the target policy minus its log-probability under the policy
        that acted, same shape
    :param gamma: discount factor, from 0 to 1
    :param gae_lambda: lambda, from 0 to 1
    :param rho_bar: bound of the ratio that weights a TD error, >= 0; may be infinite
    :param c_bar: bound of the ratio that weights the later TD errors, >= 0 and, as in the paper, at most ``rho_bar``;
        may be infinite
    :param final_values: V of the episode's final observation, same shape, read where it was truncated only; None for 0
    :param mask: True where a step counts, same shape; None if all do; see :func:`generalized_advantages`
    :param max_log_ratio: bound on the log-ratios, see :func:`~sb3_ppo_ext.losses.log_ratio`
    :return: advantages and returns, 0 where the mask excludes
    :raises ValueError: if a shape is wrong, or a number out of range
    """
    check_same_shape(rewards=rewards, log_ratios=log_ratios)
    gae_lambda = checked_scalar("gae_lambda", gae_lambda, maximum=1.0)
    rho_bar = checked_scalar("rho_bar", rho_bar)
    c_bar = checked_scalar("c_bar", c_bar)
    if not isinstance(rho_bar, th.Tensor) and not isinstance(c_bar, th.Tensor) and c_bar > rho_bar:
        raise ValueError(f"c_bar must be <= rho_bar = {rho_bar}, got {c_bar}")
    gamma, targets, goes_on = _one_step_targets(
        rewards, values, last_values, terminated, truncated, gamma=gamma, final_values=final_values, mask=mask
    )
    (log_ratios,) = prepared(mask, log_ratios)
    ratios = log_ratio(log_ratios, th.zeros_like(log_ratios), max_log_ratio=max_log_ratio).to(targets.dtype).exp()
    keep = th.ones_like(ratios, dtype=th.bool) if mask is None else mask.bool()
    errors = th.where(keep, targets - values, 0.0)
    corrections = _at_most(rho_bar, ratios) * errors  # becomes v - V
    decay = gamma * gae_lambda * goes_on.to(corrections.dtype)
    factors = decay * _at_most(c_bar, ratios)[:-1]
    largest = th.finfo(corrections.dtype).max ** 0.5  # an infinite product times a 0, at an episode's end, would be NaN
    reach = 1
    while reach < len(corrections):
        factors = _double(corrections, factors, reach).clamp(max=largest)
        corrections = corrections.clamp(-largest, largest)
        reach *= 2
    advantages = errors.clone()
    advantages[:-1] += decay * corrections[1:]
    dtype = _common_dtype(rewards, values)
    return VTrace(advantages.to(dtype), th.where(keep, values + corrections, 0.0).to(dtype))


def _one_step_targets(
    rewards: th.Tensor,
    values: th.Tensor,
    last_values: th.Tensor,
    terminated: th.Tensor,
    truncated: th.Tensor,
    *,
    gamma: Scalar,
    final_values: th.Tensor | None,
    mask: th.Tensor | None,
) -> tuple[Scalar, th.Tensor, th.Tensor]:
    """
    Check the arguments and compute the one-step targets, which all of these functions need first.

    :return: gamma, as a number or a 0-d tensor; ``r_t + gamma V_{t+1}`` in float64, shape ``(T, n_envs)``, 0 where the
        mask excludes; whether step t + 1 is the next one of the same episode, shape ``(T - 1, n_envs)``
    """
    if rewards.dim() != 2:
        raise ValueError(f"rewards must have shape (T, n_envs), got {tuple(rewards.shape)}")
    check_same_shape(
        rewards=rewards,
        values=values,
        terminated=terminated,
        truncated=truncated,
        final_values=final_values,
        mask=mask,
    )
    if last_values.shape != rewards.shape[1:]:
        raise ValueError(
            f"last_values must have shape (n_envs,) = {tuple(rewards.shape[1:])}, got {tuple(last_values.shape)}"
        )
    gamma = checked_scalar("gamma", gamma, maximum=1.0)

    dtype = _common_dtype(rewards, values)
    (rewards,) = prepared(mask, rewards.to(dtype))
    if final_values is not None:
        is_cut = truncated.bool() & ~terminated.bool()
        rewards = th.where(is_cut, rewards + gamma * final_values.to(dtype), rewards)
    is_end = terminated.bool() | truncated.bool()
    next_values = th.cat((values, last_values[None]))[1:].to(dtype)
    # So far in the dtype of the arguments, to which SB3 rounds rewards and values; now in float64, which MPS lacks.
    wide = th.float32 if rewards.device.type == "mps" else th.float64
    targets = rewards.to(wide) + th.where(is_end, 0.0, gamma * next_values)
    goes_on = ~is_end[:-1]
    if mask is not None:
        keep = mask.bool()
        targets = th.where(keep, targets, 0.0)
        goes_on = goes_on & keep[:-1] & keep[1:]
    return gamma, targets, goes_on


def _common_dtype(rewards: th.Tensor, values: th.Tensor) -> th.dtype:
    """The common dtype of both; float32 for integers and 16-bit floats."""
    return th.promote_types(th.promote_types(rewards.dtype, values.dtype), th.float32)


def _double(sums: th.Tensor, factors: th.Tensor, reach: int) -> th.Tensor:
    """
    Extend sums over ``reach`` steps to twice as many, in place. log2(T) calls sum over all T steps, where a loop over
    time would need T.

    :param sums: sums over the ``reach`` steps from t on, or over as many as there are, shape ``(T, n_envs)``
    :param factors: weight of step ``t + reach`` in the sum at t, 0 if the episode has ended before it, shape
        ``(T - reach, n_envs)``
    :return: the factors of the longer sums, shape ``(T - 2 reach, n_envs)``
    """
    sums[:-reach].add_(factors * sums[reach:])
    return factors[:-reach] * factors[reach:]


def _at_most(bound: Scalar, ratios: th.Tensor) -> th.Tensor:
    largest: Any = bound  # by torch's stubs, clamp takes a number or a tensor, but no union of them
    return ratios.clamp(max=largest)
