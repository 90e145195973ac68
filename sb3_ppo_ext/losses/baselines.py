"""Baselines of REINFORCE, each computed from the other episodes of a batch, so that it adds no bias."""

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
    For each sample, the mean return of the other episodes at the same step, where an episode that has already ended
    counts as 0. It is the baseline of Kool et al. 2019, "Buy 4 REINFORCE Samples, Get a Baseline for Free!", at every
    step.

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
    For each episode, the constant baseline that minimises the variance of the gradient estimate, estimated from the
    other episodes: ``b* = E[S'g] / E[S'S]``, where S is the sum of the episode's scores and g is the sum of its scores
    times returns. Peters & Schaal 2008, "Reinforcement learning of motor skills with policy gradients", section 3.2,
    use one baseline for each parameter; this is one for all parameters.

    :param score_dot_gradient: ``S'g`` of each episode, shape ``(n_episodes,)``
    :param score_square: ``S'S`` of each episode, shape ``(n_episodes,)``
    :return: shape ``(n_episodes,)``; 0 where the other episodes have no score
    """
    # A product, because subtracting an episode from the total would leave rounding errors as large as the largest term.
    others = 1.0 - th.eye(len(score_square), dtype=score_square.dtype, device=score_square.device)
    numerator, denominator = others @ score_dot_gradient, others @ score_square
    return th.where(denominator == 0.0, 0.0, numerator / denominator)
