"""The results of evaluating a policy on a batch."""

from __future__ import annotations

from typing import NamedTuple

import torch as th

from sb3_ppo_ext.common.distributions import Family


class Evaluation(NamedTuple):
    """
    The present policy's evaluation of a batch of observations and of the actions that were taken there.

    :param values: shape ``(batch,)``
    :param log_prob: log-probability of the actions, shape ``(batch,)``
    :param entropy: shape ``(batch,)``; ``None`` where there is no closed form
    :param params: distribution parameters, shape ``(batch, n_params)``, or ``(batch, 0)`` if nobody wants them
    :param family: the formulas for these parameters; None for a custom distribution
    """

    values: th.Tensor
    log_prob: th.Tensor
    entropy: th.Tensor | None
    params: th.Tensor
    family: Family | None

    def kl_from(self, old_params: th.Tensor) -> th.Tensor:
        """
        Exact KL(old || present) of the whole action, in nats, shape ``(batch,)``. The algorithm whose loss asks for it
        has the class attribute ``_needs_old_params = True``, or derives from one that has.

        :param old_params: parameters of the distributions that acted, shape ``(batch, n_params)``
        :raises ValueError: if the parameters have not been kept, or there is no formula for them
        """
        if self.family is None or self.params.shape != old_params.shape:
            raise ValueError(
                "The parameters of the action distributions have not been kept, and an exact KL divergence is "
                "computed from them: the algorithm whose loss asks for it must have the class attribute "
                "_needs_old_params = True, and a rollout buffer with a get() of its own must give RolloutSamples"
            )
        return self.family.kl(old_params, self.params)

    def kl_to(self, reference_params: th.Tensor | None) -> th.Tensor:
        """
        Exact KL(present || reference) of the whole action, in nats, shape ``(batch,)``.

        :param reference_params: parameters of a reference policy's distributions, shape ``(batch, n_params)``
        """
        assert self.family is not None
        assert reference_params is not None
        return self.family.kl(self.params, reference_params)


class ActorEvaluation(NamedTuple):
    """
    The present actor's evaluation of a batch of actions.

    :param log_prob: log-probability of the actions, shape ``(batch,)``
    :param entropy: shape ``(batch,)``; ``None`` where there is no closed form
    :param params: distribution parameters, shape ``(batch, n_params)``, or ``(batch, 0)`` if nobody wants them
    """

    log_prob: th.Tensor
    entropy: th.Tensor | None
    params: th.Tensor


class StepEvaluation(NamedTuple):
    """
    What the pass that drew the actions of one step also computed. It is kept where computing it at the end, for the
    whole rollout, would cost more or give other results.

    :param values: shape ``(n_envs,)``
    :param log_prob: shape ``(n_envs,)``; None if it is computed from the parameters
    :param params: shape ``(n_envs, n_params)``; None if nobody wants them
    :param state: hidden state after the step, shape ``(n_envs, n_state)``; None: the policy is not recurrent
    """

    values: th.Tensor
    log_prob: th.Tensor | None
    params: th.Tensor | None
    state: th.Tensor | None = None
