"""Fitting the critic alone, without touching what the actor depends on."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import cast

import torch as th
from stable_baselines3.common.buffers import RolloutBuffer
from torch import nn

from sb3_ppo_ext import losses
from sb3_ppo_ext.common.actor_critic import ActorCritic
from sb3_ppo_ext.common.buffers import RolloutSamples


def reached(output: th.Tensor, parameters: Iterable[nn.Parameter]) -> list[nn.Parameter]:
    """
    The parameters that a tensor depends on, by its autograd graph.

    :param output: with its graph, which is kept
    :param parameters: candidates
    :return: those of them that the graph reaches, in their order
    """
    candidates = list(parameters)
    grads = th.autograd.grad(output.sum(), candidates, retain_graph=True, allow_unused=True)
    return [parameter for parameter, grad in zip(candidates, grads, strict=True) if grad is not None]


def set_critic_training_mode(policy: nn.Module, actor_parameters: Sequence[nn.Parameter]) -> None:
    """
    Put what belongs to the critic alone in training mode, the rest in evaluation mode: batch statistics that an actor
    shares would change its actions.

    :param policy: actor and critic
    :param actor_parameters: what the actor depends on
    """
    of_actor = set(actor_parameters)
    policy.train(False)
    for module in policy.modules():
        parameters = set(module.parameters())
        if parameters and not parameters & of_actor:
            module.train(True)


def fit_critic(
    actor_critic: ActorCritic,
    rollout_buffer: RolloutBuffer,
    optimizer: th.optim.Optimizer,
    actor_parameters: Sequence[nn.Parameter],
    *,
    n_epochs: int,
    batch_size: int,
) -> list[th.Tensor]:
    """
    Regress the values on the returns in the buffer, changing only parameters that the actor does not depend on.

    :param actor_critic: the policy
    :param rollout_buffer: filled
    :param optimizer: of the policy; the parameters of the actor get no gradient, so it leaves them and their moments
    :param actor_parameters: what the actor depends on
    :param n_epochs: passes over the rollout
    :param batch_size: samples in a minibatch
    :return: the loss of each minibatch, on the device
    """
    of_actor = set(actor_parameters)
    critic_parameters = [p for p in actor_critic.policy.parameters() if p not in of_actor and p.requires_grad]
    set_critic_training_mode(actor_critic.policy, actor_parameters)
    history = []
    for _ in range(n_epochs):
        for rollout_data in cast(Iterable[RolloutSamples], rollout_buffer.get(batch_size)):
            values = actor_critic.values(rollout_data.observations)
            loss = losses.value_loss(values, rollout_data.returns).mean()
            optimizer.zero_grad()
            loss.backward(inputs=critic_parameters)  # type: ignore[no-untyped-call]
            optimizer.step()
            history.append(loss.detach())
    return history
