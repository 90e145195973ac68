"""Fitting the critic alone, without touching what the actor depends on."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch as th
from stable_baselines3.common.buffers import RolloutBuffer
from torch import nn

from sb3_ppo_ext import losses
from sb3_ppo_ext.common.actor_critic import ActorCritic
from sb3_ppo_ext.common.buffers import RolloutSamples, minibatches
from sb3_ppo_ext.common.optimization import Coefficients, MinibatchStep, Statistics


def reached(output: th.Tensor, parameters: Iterable[nn.Parameter]) -> list[nn.Parameter]:
    """
    The parameters that a tensor depends on, by its autograd graph.

    :param output: with its graph, which is kept
    :param parameters: candidates
    :return: those of them that require grad and that the graph reaches, in their order
    """
    candidates = [parameter for parameter in parameters if parameter.requires_grad]
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


def critic_parameters(policy: nn.Module, actor_parameters: Sequence[nn.Parameter]) -> list[nn.Parameter]:
    """
    What may be changed without changing the actor.

    :param policy: actor and critic
    :param actor_parameters: what the actor depends on
    """
    of_actor = set(actor_parameters)
    return [p for p in policy.parameters() if p.requires_grad and p not in of_actor]


def critic_loss(
    actor_critic: ActorCritic, rollout_data: RolloutSamples, coefficients: Coefficients
) -> tuple[th.Tensor, Statistics]:
    """
    Mean squared difference of values and returns.

    :param actor_critic: the present policy
    :param rollout_data: a minibatch
    :param coefficients: not looked at
    :return: the loss, and the same to be logged
    """
    loss = losses.value_loss(actor_critic.values(rollout_data.observations), rollout_data.returns).mean()
    return loss, {"value_loss": loss.detach()}


def fit_critic(
    step: MinibatchStep,
    policy: nn.Module,
    actor_parameters: Sequence[nn.Parameter],
    rollout_buffer: RolloutBuffer,
    *,
    n_epochs: int,
    batch_size: int,
) -> float:
    """
    Regress the values on the returns in the buffer.

    :param step: on :func:`critic_loss`, of :func:`critic_parameters`: what the actor depends on gets no gradient, so
        the optimiser leaves it and its moments alone
    :param policy: actor and critic
    :param actor_parameters: what the actor depends on
    :param rollout_buffer: filled
    :param n_epochs: passes over the rollout
    :param batch_size: samples in a minibatch
    :return: mean loss
    """
    set_critic_training_mode(policy, actor_parameters)
    coefficients = {"max_grad_norm": math.inf}
    with step:
        history = [
            step(rollout, rows, coefficients)
            for _ in range(n_epochs)
            for rollout, rows in minibatches(rollout_buffer, batch_size)
        ]
    return th.stack(history).mean(dim=0)[step.names.index("value_loss")].item()
