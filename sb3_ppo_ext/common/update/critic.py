"""Fit the critic alone, without changing anything that the actor depends on."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import cast

import numpy as np
import torch as th
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.policies import ActorCriticPolicy
from torch import nn

from sb3_ppo_ext import losses
from sb3_ppo_ext.common.rollout.actor_critic import ActorCritic
from sb3_ppo_ext.common.rollout.buffers import values_and_returns
from sb3_ppo_ext.common.rollout.data import PolicyInput, RolloutSamples
from sb3_ppo_ext.common.rollout.purity import keeps_statistics
from sb3_ppo_ext.common.update.normalization import update_normalization
from sb3_ppo_ext.common.update.objective import Coefficients, Statistics
from sb3_ppo_ext.common.update.reduce import Reducer
from sb3_ppo_ext.common.update.samplers import Epochs
from sb3_ppo_ext.common.update.step import MinibatchStep


def set_critic_training_mode(policy: ActorCriticPolicy, actor_parameters: Sequence[nn.Parameter]) -> None:
    """
    Put modules that only the critic uses in training mode, and all others in evaluation mode: new batch statistics in a
    shared module would change the actor's actions.

    :param policy: actor and critic
    :param actor_parameters: the parameters on which the actor depends
    """
    of_actor = set(actor_parameters)
    policy.train(False)
    for module in policy.modules():
        parameters = set(module.parameters())
        if parameters and not parameters & of_actor:
            module.train(True)
    # A module without parameters belongs to the critic if it is in the critic's networks but not in the actor's.
    extractor = policy.mlp_extractor
    policy_net, value_net = (getattr(extractor, name, None) for name in ("policy_net", "value_net"))
    actors = _modules_of(policy.pi_features_extractor, policy.action_net, policy_net)
    for module in _modules_of(policy.vf_features_extractor, policy.value_net, value_net):
        if not set(module.parameters()) & of_actor and not _modules_of(module) & actors:
            module.train(True)


def _modules_of(*networks: nn.Module | None) -> set[nn.Module]:
    return {module for network in networks if network is not None for module in network.modules()}


@th.no_grad()
def update_statistics(actor_critic: ActorCritic, inputs: PolicyInput, batch_size: int, reducer: Reducer) -> None:
    """
    Update the running statistics of a policy (batch normalisation, normalised observations) with one rollout. For
    algorithms whose actor makes its step in evaluation mode.

    :param actor_critic: the policy
    :param inputs: the inputs of the rollout
    :param batch_size: largest number of samples in one pass
    :param reducer: combines the statistics of several processes
    """
    update_normalization(actor_critic.policy, inputs.obs, reducer)
    policy, n_rows = actor_critic.policy, inputs.n_rows // inputs.length
    if not keeps_statistics(policy):
        return
    policy.set_training_mode(True)
    for rows in th.arange(n_rows).tensor_split(-(-inputs.n_rows // batch_size)):
        actor_critic.params(inputs.rows(rows.to(policy.device)))
    policy.set_training_mode(False)


def critic_parameters(policy: nn.Module, actor_parameters: Sequence[nn.Parameter]) -> list[nn.Parameter]:
    """
    The trainable parameters on which the actor does not depend.

    :param policy: actor and critic
    :param actor_parameters: the parameters on which the actor depends
    """
    of_actor = set(actor_parameters)
    return [p for p in policy.parameters() if p.requires_grad and p not in of_actor]


def critic_loss(
    actor_critic: ActorCritic, rollout_data: RolloutSamples, coefficients: Coefficients
) -> tuple[th.Tensor, Statistics]:
    """
    Mean squared difference of values and returns, over the samples that count.

    :param actor_critic: the current policy
    :param rollout_data: a minibatch
    :param coefficients: ignored
    :return: the loss, and the same number as the statistic ``value_loss``
    """
    loss = rollout_data.mean(losses.value_loss(actor_critic.values(rollout_data.inputs), rollout_data.returns))
    return loss, {"value_loss": loss.detach()}


def fit_critic(
    step: MinibatchStep,
    policy: ActorCriticPolicy,
    actor_parameters: Sequence[nn.Parameter],
    rollout_buffer: RolloutBuffer,
    *,
    n_epochs: int,
    batch_size: int,
    reducer: Reducer,
) -> float:
    """
    Regress the values on the returns in the buffer.

    :param step: a step on :func:`critic_loss` for the :func:`critic_parameters`; the actor's parameters get no
        gradient, so the optimiser changes neither them nor their moments
    :param policy: actor and critic
    :param actor_parameters: the parameters on which the actor depends
    :param rollout_buffer: filled
    :param n_epochs: passes over the rollout
    :param batch_size: samples in a minibatch
    :param reducer: combines what several processes have
    :return: mean value loss of the minibatches
    """
    if not critic_parameters(policy, actor_parameters):  # all frozen: the values are still those in the buffer
        values, returns = values_and_returns(rollout_buffer)
        return float(np.square(values - returns).mean())
    set_critic_training_mode(policy, actor_parameters)
    coefficients = {"max_grad_norm": math.inf}
    history: list[th.Tensor] = []
    rollout: RolloutSamples | None = None
    with step:
        for minibatches in Epochs(rollout_buffer, batch_size, n_epochs, reducer):
            for samples, rows in minibatches:
                if samples is not rollout:
                    rollout, of_critic = samples, _of_critic(samples)
                history.append(step(of_critic, rows, coefficients))
    return th.stack(history).mean(dim=0)[step.names.index("value_loss")].item()


def _of_critic(samples: RolloutSamples) -> RolloutSamples:
    """The samples without the fields that the critic does not read, which would be indexed for nothing."""
    nothing = cast(th.Tensor, None)
    return samples._replace(
        actions=nothing, old_values=nothing, old_log_prob=nothing, advantages=nothing, old_params=nothing
    )
