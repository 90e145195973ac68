"""
What an update minimises: pure functions of what the policy says, of samples and of numbers.

A loss has no ``self``. All its numbers are coefficients, by name; where the gradient step is compiled they are tensors,
whose values are set anew for each update, so that none of them is kept by the program. One thing is written into: the
moving average of the policy that an update may clip around, by the :class:`ActorCriticLoss` that has one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch as th

from sb3_ppo_ext import losses
from sb3_ppo_ext.common.rollout.actor_critic import ActorCritic
from sb3_ppo_ext.common.rollout.data import RolloutSamples
from sb3_ppo_ext.common.rollout.evaluation import Evaluation
from sb3_ppo_ext.common.update.moving_average import MovingAverage

Coefficients = Mapping[str, float | th.Tensor]
"""The numbers of a loss, by name: floats, or scalars on the device where the step is compiled."""

Statistics = dict[str, th.Tensor]
"""Scalars without gradient, by the name they are logged under."""

Loss = Callable[[ActorCritic, RolloutSamples, Coefficients], tuple[th.Tensor, Statistics]]
"""The loss of a minibatch by the present policy, a scalar, and statistics of it. A pure function."""


class PolicyLoss(NamedTuple):
    """
    What an algorithm makes of a minibatch.

    :param loss: to be minimised, a scalar
    :param statistics: what to log of it, scalars without gradient, by the name they are logged under
    """

    loss: th.Tensor
    statistics: Statistics


PolicyLossFunction = Callable[[Evaluation, RolloutSamples, Coefficients], PolicyLoss]
"""An algorithm's own part of the loss. A pure function."""


@dataclass(frozen=True)
class ActorCriticLoss:
    """
    ``policy_loss + ent_coef * entropy_loss + vf_coef * value_loss``, of a minibatch.

    The coefficients are ``ent_coef``, ``vf_coef``, ``clip_range_vf`` if the values are clipped, and those of the policy
    loss. With ``reference_kl_coef`` among them, so many times ``KL(pi || pi_ref)`` of a reference policy is added.

    :param policy_loss: the algorithm's own part
    :param normalize_advantage: whether to normalise the advantages of each minibatch
    :param measures_kl: whether the mean KL(old || present) of the minibatch is wanted, as the statistic
        ``minibatch_kl``
    :param average: of the policies so far, to clip around, which each call takes the present policy into, by the
        coefficient ``ewma_decay``; None: there is none
    """

    policy_loss: PolicyLossFunction
    normalize_advantage: bool
    measures_kl: bool = False
    average: MovingAverage | None = None

    def __call__(
        self, actor_critic: ActorCritic, samples: RolloutSamples, coefficients: Coefficients
    ) -> tuple[th.Tensor, Statistics]:
        if self.normalize_advantage:
            samples = samples._replace(advantages=losses.masked_whiten(samples.advantages, samples.mask))
        if self.average is not None:
            samples = self.average.around(actor_critic.policy, samples, coefficients["ewma_decay"])
        evaluation = actor_critic.evaluate_actions(samples.inputs, samples.actions)
        given = samples if samples.proximal_log_prob is None else _Watched.of(samples)
        policy_loss, statistics = _checked(self.policy_loss(evaluation, given, coefficients), given, coefficients)
        value_loss = samples.mean(value_losses(evaluation.values, samples, coefficients))
        entropy = evaluation.log_prob.neg() if evaluation.entropy is None else evaluation.entropy
        entropy_loss = -samples.mean(entropy)
        loss = policy_loss + coefficients["vf_coef"] * value_loss
        if not isinstance(coefficients["ent_coef"], float) or coefficients["ent_coef"] != 0.0:
            loss = loss + coefficients["ent_coef"] * entropy_loss  # without a weight, it need not be differentiated
        if "reference_kl_coef" in coefficients:
            kl = samples.mean(evaluation.kl_to(samples.reference_params))
            loss = loss + coefficients["reference_kl_coef"] * kl
        if self.measures_kl:
            statistics["minibatch_kl"] = samples.mean(evaluation.kl_from(samples.old_params)).detach()
        if samples.proximal_log_prob is not None:
            weights = losses.probability_ratio(samples.proximal_log_prob, samples.old_log_prob)
            is_cut = weights > coefficients["max_importance_weight"]
            statistics["truncated_weight_fraction"] = samples.mean(is_cut.to(weights.dtype))
        statistics["policy_gradient_loss"] = policy_loss.detach()
        statistics["value_loss"] = value_loss.detach()
        statistics["entropy_loss"] = entropy_loss.detach()
        statistics["loss"] = loss.detach()
        return loss, statistics


class _Watched(RolloutSamples):
    """Samples, also if other ones are made of them, that know whether the policy to clip around has been asked for."""

    _reads: list[str]

    @classmethod
    def of(cls, samples: RolloutSamples) -> _Watched:
        watched = cls(*samples)
        watched._reads = []
        return watched

    @property
    def proximal_log_prob(self) -> th.Tensor | None:
        self._reads.append("proximal_log_prob")
        return cast("th.Tensor | None", self[self._fields.index("proximal_log_prob")])

    def _replace(self, **fields: Any) -> _Watched:
        return self._sharing(super()._replace(**fields))

    def rows(self, rows: slice | th.Tensor) -> _Watched:
        return self._sharing(super().rows(rows))

    def _sharing(self, samples: RolloutSamples) -> _Watched:
        watched = _Watched(*samples)
        watched._reads = self._reads
        return watched


def _checked(result: Any, samples: RolloutSamples, coefficients: Coefficients) -> PolicyLoss:
    """
    :param result: of a policy loss, which may be a user's
    :param samples: that it was given
    :param coefficients: that it was given
    :return: the result
    :raises TypeError: if it is not what it has to be
    :raises ValueError: if the update is limited by a statistic that is not there, or is to clip around a policy that
        the loss does not ask for
    """
    if not (
        isinstance(result, tuple)
        and len(result) == 2
        and isinstance(result[1], dict)
        and all(isinstance(x, th.Tensor) and x.dim() == 0 for x in (result[0], *result[1].values()))
    ):
        raise TypeError(
            "policy_loss must return PolicyLoss(loss, statistics): the loss, a tensor without dimensions such as "
            "samples.mean(...) gives, and a dict of such tensors by the names that they are logged under"
        )
    if "kl_limit" in coefficients and "approx_kl" not in result[1]:
        raise ValueError(
            "The update is to end where approx_kl is above a limit (target_kl), and the statistics that policy_loss "
            f"returns have no approx_kl, but {', '.join(result[1]) or 'none'}"
        )
    if isinstance(samples, _Watched) and not samples._reads:
        raise ValueError(
            "The update is to clip around another policy than the one that acted (reuse={'proximal': ...}), and "
            "policy_loss does not read samples.proximal_log_prob, so that this would have no effect. Read it, as "
            "losses.decoupled_surrogate_loss wants it, or leave 'proximal' at \"behaviour\""
        )
    return PolicyLoss(*result)


def value_losses(values: th.Tensor, samples: RolloutSamples, coefficients: Coefficients) -> th.Tensor:
    """
    The value loss of each sample, clipped if there is a coefficient ``clip_range_vf``.

    :param values: of the present critic, shape ``(batch,)``
    :param samples: a minibatch
    :param coefficients: numbers of the loss
    :return: shape ``(batch,)``
    """
    if "clip_range_vf" not in coefficients:
        return losses.value_loss(values, samples.returns)
    return losses.prediction_clipped_value_loss(
        values, samples.old_values, samples.returns, clip_range_vf=coefficients["clip_range_vf"]
    )
