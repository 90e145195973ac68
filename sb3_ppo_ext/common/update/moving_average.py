"""The exponentially weighted moving average of a policy, around which an update may clip."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch as th
from torch import nn

from sb3_ppo_ext.common.policy_distributions import family_of_policy
from sb3_ppo_ext.common.rollout.actor_critic import ActorCritic, SB3ActorCritic
from sb3_ppo_ext.common.rollout.adapters import direct_actor_critic, refusal
from sb3_ppo_ext.common.rollout.data import RolloutSamples
from sb3_ppo_ext.common.update.reference import FrozenPolicy


class MovingAverage(nn.Module):
    """
    The moving average of the policies of a training, one per gradient step (Hilton et al. 2021, arXiv 2110.00641,
    PPO-EWMA)::

        mean_t = sum_s decay^(t - s) theta_s / sum_s decay^(t - s)        s from 0 to t

    The division makes it a true average from the first step on, without extra weight for the first policy. After many
    steps, the mean age of the policies in it is decay / (1 - decay) steps. Only the parameters are averaged; buffers,
    such as running statistics, are copied from the current policy. The average is evaluated in evaluation mode.

    :param policy: a copy of the policy, which becomes the average
    :param total_weight: the sum of the weights so far, shape ``(1,)``; None: nothing has been averaged yet
    """

    total_weight: th.Tensor

    def __init__(self, policy: FrozenPolicy, total_weight: th.Tensor | None = None) -> None:
        super().__init__()
        self._copy = policy
        self.policy = policy.policy
        weight = th.zeros(1, dtype=th.float64) if total_weight is None else total_weight
        self.register_buffer("total_weight", weight.to(self.policy.device))
        self.prepare(for_program=False)

    def __reduce__(self) -> tuple[Any, ...]:
        return MovingAverage, (self._copy, self.total_weight.cpu())

    def fits(self, policy: nn.Module) -> bool:
        """
        Whether it can be the average of a policy: both have tensors of the same names and shapes.

        :param policy: a policy, which may have been replaced or have got other layers
        """
        own, others = (
            [(name, tensor.shape) for name, tensor in module.state_dict().items()] for module in (self.policy, policy)
        )
        return own == others

    def begin_anew(self) -> None:
        """Forget all earlier policies; the average starts again with the next one."""
        self.total_weight.zero_()

    def prepare(self, *, for_program: bool) -> None:
        """
        Decide how the average is evaluated.

        :param for_program: whether this will be within a compiled program
        """
        self._actor_critic: ActorCritic
        if refusal(self.policy) is None:
            self._actor_critic = direct_actor_critic(self.policy, for_program=for_program)
        else:
            self._actor_critic = SB3ActorCritic(self.policy, with_params=family_of_policy(self.policy) is not None)

    @th.no_grad()
    def around(self, policy: nn.Module, samples: RolloutSamples, decay: float | th.Tensor) -> RolloutSamples:
        """
        Add the current policy to the average; call it before each gradient step.

        :param policy: the policy before the step
        :param samples: the minibatch of the step
        :param decay: factor on the weights of all earlier policies
        :return: the samples, with the average as the policy to clip around
        """
        self.total_weight.copy_(self.total_weight * decay + 1.0)
        share = self.total_weight.reciprocal().squeeze()
        means, parameters = (_tensors_of(module, nn.Module.parameters) for module in (self.policy, policy))
        # Compute all averages before writing any, because two modules may share a parameter.
        moved = [th.lerp(mean, p, share.to(mean.dtype)) for mean, p in zip(means, parameters, strict=True)]
        for mean, value in zip(means, moved, strict=True):
            mean.copy_(value)
        own, present = (_tensors_of(module, nn.Module.buffers) for module in (self.policy, policy))
        for buffer, value in zip(own, present, strict=True):
            buffer.copy_(value)
        evaluation = self._actor_critic.evaluate_actor(samples.inputs, samples.actions)
        return samples._replace(proximal_log_prob=evaluation.log_prob, old_params=evaluation.params)


def _tensors_of(policy: nn.Module, kind: Callable[..., Iterator[th.Tensor]]) -> list[th.Tensor]:
    """The parameters or buffers of a policy, in the same order also where a program replaces them by other tensors."""
    return [tensor for module in policy.modules() for tensor in kind(module, recurse=False)]
