"""Scores: gradients of log-probabilities, added up over episodes."""

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
    ``S'g`` and ``S'S`` of each episode, S being the gradient of the sum of its (discounted) log-probabilities, and g of
    the same weighted by its returns.

    :param actor_critic: the present policy
    :param rollout: all samples
    :param episode: number of each sample's episode, -1 of one that does not count, shape ``(batch,)``
    :param returns: shape ``(batch,)``
    :param discount: of each sample's log-probability, shape ``(batch,)``
    :param parameters: that the gradients are of
    :param chunks: cuts so many samples, in sequences of such a length, into ranges
    :return: two tensors of shape ``(n_episodes,)``
    """

    length = rollout.length

    def weighted_score(rows: th.Tensor, weights: th.Tensor) -> th.Tensor:
        """Gradient of the sum of some samples' log-probabilities, each times its weight, of all parameters, flat."""
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
    Add the gradient of the loss of a batch of episodes to ``.grad``: of minus the log-probabilities times the
    advantages, the entropy and the KL divergence from a reference policy, each summed over the steps of an episode. The
    graph of one chunk lives at a time.

    :param actor_critic: the present policy
    :param rollout: all samples; the advantages are what the scores are multiplied by
    :param n_episodes: that they are of
    :param ent_coef: weight of the entropy
    :param reference_kl_coef: weight of ``KL(pi || pi_ref)``
    :param chunks: cuts so many samples, in sequences of such a length, into ranges
    :return: the first part of the loss, the entropy, both summed over the samples that count, and how many these are;
        shape ``(3,)``
    """
    policy_loss = rollout.advantages.new_zeros(())
    entropy_sum = rollout.advantages.new_zeros(())
    n_samples = 0
    for rows in chunks(len(rollout.advantages), rollout.length):
        samples = rollout.rows(rows)
        log_prob, entropy, params = actor_critic.evaluate_actor(samples.inputs, samples.actions)
        chunk_loss = losses.reinforce_loss(log_prob, samples.advantages).sum()
        log_prob = samples.counted(log_prob)
        # Estimated by the actions, if there is no formula. The gradient of the estimate has the mean 0; with their
        # scores it has not.
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
