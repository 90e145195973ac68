"""Baselines of REINFORCE that are computed from the other episodes of a batch, so that they add no bias."""

from __future__ import annotations

import torch as th


def mean_of_other_episodes(returns: th.Tensor, episode: th.Tensor, n_episodes: int) -> th.Tensor:
    """
    For each sample, the mean of the returns at all steps of the other episodes.

    :param returns: shape ``(batch,)``
    :param episode: number of each sample's episode, shape ``(batch,)``
    :param n_episodes: at least 2
    :return: shape ``(batch,)``
    """
    sums, counts = returns.new_zeros(n_episodes), returns.new_zeros(n_episodes)
    sums.index_add_(0, episode, returns)
    counts.index_add_(0, episode, th.ones_like(returns))
    return ((sums.sum() - sums) / (counts.sum() - counts))[episode]


def leave_one_out(returns: th.Tensor, episode: th.Tensor, step: th.Tensor, n_episodes: int) -> th.Tensor:
    """
    For each sample, the mean over the other episodes of their return at the same step, 0 for an episode that has ended
    by then: Kool et al. 2019, "Buy 4 REINFORCE Samples, Get a Baseline for Free!", at every step.

    :param returns: shape ``(batch,)``
    :param episode: number of each sample's episode, shape ``(batch,)``
    :param step: number of the step in its episode, shape ``(batch,)``
    :param n_episodes: at least 2
    :return: shape ``(batch,)``
    """
    sums = returns.new_zeros(int(step.max()) + 1)
    sums.index_add_(0, step, returns)
    return (sums[step] - returns) / (n_episodes - 1)


def optimal_of_other_episodes(score_dot_gradient: th.Tensor, score_square: th.Tensor) -> th.Tensor:
    """
    For each episode, the constant that minimises the variance of the gradient estimate, ``b* = E[S'g] / E[S'S]`` with S
    the sum of the episode's scores and g of its scores times returns, estimated from the other episodes. Peters &
    Schaal 2008, "Reinforcement learning of motor skills with policy gradients", section 3.2, have one for each
    parameter; this is one for all of them.

    :param score_dot_gradient: ``S'g`` of each episode, shape ``(n_episodes,)``
    :param score_square: ``S'S`` of each episode, shape ``(n_episodes,)``
    :return: shape ``(n_episodes,)``; 0 where the other episodes have no score
    """
    # A product, as taking an episode off the total would leave rounding errors of the size of the largest.
    others = 1.0 - th.eye(len(score_square), dtype=score_square.dtype, device=score_square.device)
    numerator, denominator = others @ score_dot_gradient, others @ score_square
    return th.where(denominator == 0.0, 0.0, numerator / denominator)
