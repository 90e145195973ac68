"""
The losses that an update minimises: pure functions of the policy's outputs, the samples and the coefficients.

All numbers in a loss are coefficients, by name. Where the gradient step is compiled, they are tensors whose values are
set at each update; a plain number would become a constant of the program. There is one side effect: an
:class:`ActorCriticLoss` with a moving average of the policy, around which an update may clip, updates that average.
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
"""Computes the loss of a minibatch under the current policy, a scalar, and its statistics."""


class PolicyLoss(NamedTuple):
    """
    The result of an algorithm's policy loss for a minibatch.

    :param loss: the loss to minimise, a scalar
    :param statistics: scalars without gradient, by the name they are logged under
    """

    loss: th.Tensor
    statistics: Statistics


PolicyLossFunction = Callable[[Evaluation, RolloutSamples, Coefficients], PolicyLoss]
"""The policy loss of an algorithm. A pure function."""


@dataclass(frozen=True)
class ActorCriticLoss:
    """
    The loss of a minibatch: ``policy_loss + ent_coef * entropy_loss + vf_coef * value_loss``.

    The coefficients are ``ent_coef``, ``vf_coef``, ``clip_range_vf`` if the values are clipped, and those of the policy
    loss. If they include ``reference_kl_coef``, the loss also has the term
    ``reference_kl_coef * KL(pi || pi_ref)``, where pi_ref is the reference policy.

    :param policy_loss: the algorithm's policy loss
    :param normalize_advantage: whether to normalise the advantages of each minibatch
    :param measures_kl: whether to add the mean KL(old || current) of the minibatch to the statistics, as
        ``minibatch_kl``
    :param average: the moving average of the policy, around which to clip; each call adds the current policy to it,
        with the coefficient ``ewma_decay``. None: there is none
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
        policy_loss, statistics = _checked(
            self.policy_loss(evaluation, given, _Named(coefficients)), given, coefficients
        )
        value_loss = samples.mean(value_losses(evaluation.values, samples, coefficients))
        entropy = evaluation.log_prob.neg() if evaluation.entropy is None else evaluation.entropy
        entropy_loss = -samples.mean(entropy)
        loss = policy_loss + coefficients["vf_coef"] * value_loss
        if not isinstance(coefficients["ent_coef"], float) or coefficients["ent_coef"] != 0.0:
            loss = loss + coefficients["ent_coef"] * entropy_loss  # with weight 0, it needs no gradient
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


class _Named(dict[str, Any]):
    """Coefficients that say which there are, if another one is asked for."""

    def __missing__(self, name: str) -> Any:
        raise KeyError(f"policy_loss reads coefficients[{name!r}], and coefficients() has no such name: {list(self)}")


class _Watched(RolloutSamples):
    """Samples that record whether ``proximal_log_prob`` is read, from them or from samples derived from them."""

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
    Check what a policy loss returns, as a user may have written it.

    :param result: its return value
    :param samples: the samples that it was called with
    :param coefficients: the coefficients that it was called with
    :return: the result
    :raises TypeError: if the result is not a pair of a scalar loss and a dict of scalars
    :raises ValueError: if the statistics lack ``approx_kl`` although ``target_kl`` needs it, or if the loss has not
        read the policy to clip around
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

    :param values: values by the current critic, shape ``(batch,)``
    :param samples: a minibatch
    :param coefficients: the coefficients of the loss
    :return: shape ``(batch,)``
    """
    if "clip_range_vf" not in coefficients:
        return losses.value_loss(values, samples.returns)
    return losses.prediction_clipped_value_loss(
        values, samples.old_values, samples.returns, clip_range_vf=coefficients["clip_range_vf"]
    )
