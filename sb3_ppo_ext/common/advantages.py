"""Generalised advantage estimation, vectorised over time."""

from __future__ import annotations

import numpy as np


def generalized_advantages(
    rewards: np.ndarray,
    values: np.ndarray,
    episode_starts: np.ndarray,
    last_values: np.ndarray,
    dones: np.ndarray,
    *,
    gamma: float,
    gae_lambda: float,
) -> np.ndarray:
    """
    GAE(lambda) advantages (Schulman et al. 2016, arXiv 1506.02438, equation 16).

    ``A_t = delta_t + c_t A_{t+1}`` with ``delta_t = r_t + gamma V_{t+1} n_t - V_t`` and ``c_t = gamma lambda n_t``,
    where ``n_t`` is 0 if the episode ended at step t. A loop over time costs some ten numpy calls a step; here the
    recurrence is solved by doubling: after round k, ``A_t`` holds the sum of the 2^k terms from t on and ``c_t`` their
    common factor, so log2(n_steps) rounds do. It only ever multiplies factors of at most 1: nothing is divided.

    :param rewards: shape ``(n_steps, n_envs)``
    :param values: V of the observations that were acted on, shape ``(n_steps, n_envs)``
    :param episode_starts: 1 where the observation is the first of an episode, shape ``(n_steps, n_envs)``
    :param last_values: V of the observations after the last step, shape ``(n_envs,)``
    :param dones: whether the last step ended an episode, shape ``(n_envs,)``
    :param gamma: discount factor
    :param gae_lambda: trade-off between bias (0) and variance (1)
    :return: advantages, shape ``(n_steps, n_envs)``, float32
    """
    continues = np.empty(rewards.shape)  # float64: the sums below add in another order than SB3's loop
    continues[:-1] = 1.0 - episode_starts[1:]
    continues[-1] = 1.0 - dones
    next_values = np.concatenate((values[1:], last_values[None]))
    advantages = rewards + gamma * next_values * continues - values
    factors = gamma * gae_lambda * continues
    reach = 1
    while reach < len(rewards):
        # The right-hand sides are computed whole before they are added, so that no row reads an updated one.
        advantages[:-reach] += factors[:-reach] * advantages[reach:]
        factors[:-reach] *= factors[reach:]
        factors[-reach:] = 0.0
        reach *= 2
    result: np.ndarray = advantages.astype(np.float32)
    return result
