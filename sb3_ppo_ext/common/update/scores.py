"""Scores: gradients of log-probabilities, summed over episodes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch as th
from torch import nn

from sb3_ppo_ext import losses
from sb3_ppo_ext.common.rollout.actor_critic import ActorCritic
from sb3_ppo_ext.common.rollout.data import RolloutSamples, rows_of
from sb3_ppo_ext.numerics import flatten


def score_statistics(
    actor_critic: ActorCritic,
    rollout: RolloutSamples,
    episode: th.Tensor,
    returns: th.Tensor,
    discount: th.Tensor,
    *,
    parameters: Sequence[nn.Parameter],
    chunks: Callable[[int, int], Iterator[slice]],
) -> tuple[th.Tensor, th.Tensor]:
    """
    ``S'g`` and ``S'S`` of each episode. S is the gradient of the sum of its discounted log-probabilities; g is the
    gradient of the same sum with each term multiplied by its return.

    :param actor_critic: the current policy
    :param rollout: all samples
    :param episode: the number of each sample's episode, -1 for a sample that does not count, shape ``(batch,)``
    :param returns: shape ``(batch,)``
    :param discount: the factor on each sample's log-probability, shape ``(batch,)``
    :param parameters: parameters with respect to which the gradients are taken
    :param chunks: cuts a number of samples, in sequences of a given length, into ranges
    :return: ``S'g`` and ``S'S``, each of shape ``(n_episodes,)``
    """

    length = rollout.length

    def weighted_score(rows: th.Tensor, weights: th.Tensor) -> th.Tensor:
        """The flat gradient of the weighted sum of the log-probabilities of some rows."""
        total = [th.zeros_like(p) for p in parameters]
        for chunk in chunks(len(rows) * length, length):
            some = rollout.rows(rows[chunk])
            log_prob = actor_critic.evaluate_actor(some.inputs, some.actions).log_prob
            weights_of_some = rows_of(weights, rows[chunk], length)
            grads = th.autograd.grad(log_prob.dot(weights_of_some), parameters, materialize_grads=True)
            total = [t + g for t, g in zip(total, grads, strict=True)]
        return flatten(total)

    statistics = []
    for i in range(int(episode.max()) + 1):
        is_of_episode = episode == i
        rows = is_of_episode.view(-1, length).any(dim=1).nonzero().flatten()
        score = weighted_score(rows, discount * is_of_episode)
        gradient = weighted_score(rows, discount * returns * is_of_episode)
        statistics.append(th.stack((score.dot(gradient), score.dot(score))))
    score_dot_gradient, score_square = th.stack(statistics, dim=1)
    return score_dot_gradient, score_square


def add_up_gradients(
    actor_critic: ActorCritic,
    rollout: RolloutSamples,
    n_episodes: int,
    *,
    ent_coef: float,
    reference_kl_coef: float,
    chunks: Callable[[int, int], Iterator[slice]],
) -> th.Tensor:
    """
    Add the gradient of the loss of a batch of episodes to ``.grad``. The loss is the mean over the episodes of the sum
    over their steps of ``-log pi(a|s) A - ent_coef * entropy + reference_kl_coef * KL(pi || pi_ref)``. The autograd
    graph of only one chunk is in memory at a time.

    :param actor_critic: the current policy
    :param rollout: all samples; their advantages are the factors A
    :param n_episodes: number of episodes
    :param ent_coef: weight of the entropy
    :param reference_kl_coef: weight of ``KL(pi || pi_ref)``
    :param chunks: cuts a number of samples, in sequences of a given length, into ranges
    :return: the sums of ``-log pi(a|s) A`` and of the entropy over the samples that count, and the number of these
        samples; shape ``(3,)``
    """
    policy_loss = rollout.advantages.new_zeros(())
    entropy_sum = rollout.advantages.new_zeros(())
    n_samples = 0
    for rows in chunks(len(rollout.advantages), rollout.length):
        samples = rollout.rows(rows)
        log_prob, entropy, params = actor_critic.evaluate_actor(samples.inputs, samples.actions)
        chunk_loss = losses.reinforce_loss(log_prob, samples.advantages).sum()
        log_prob = samples.counted(log_prob)
        # Without a formula, -log pi(a|s) estimates the entropy. The plain gradient of this estimate has mean 0, so the
        # estimate is used as a factor on the score instead.
        entropies = -log_prob.detach() if entropy is None else samples.counted(entropy)
        entropy_loss = losses.reinforce_loss(log_prob, entropies).sum() if entropy is None else -entropies.sum()
        loss = chunk_loss + ent_coef * entropy_loss
        if reference_kl_coef != 0.0:
            assert actor_critic.family is not None
            assert samples.reference_params is not None
            kl = actor_critic.family.kl(params, samples.reference_params)
            loss = loss + reference_kl_coef * samples.counted(kl).sum()
        (loss / n_episodes).backward()  # type: ignore[no-untyped-call]
        policy_loss += chunk_loss.detach()
        entropy_sum += entropies.detach().sum()
        n_samples += len(entropies)
    return th.stack((policy_loss, entropy_sum, entropy_sum.new_tensor(n_samples)))
