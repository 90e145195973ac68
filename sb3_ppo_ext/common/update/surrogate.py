"""The surrogate objective of a rollout, computed in chunks, and the report of a policy step on it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch as th
from torch import nn

from sb3_ppo_ext import losses
from sb3_ppo_ext.common.distributions import Family
from sb3_ppo_ext.common.rollout.actor_critic import ActorCritic
from sb3_ppo_ext.common.rollout.data import RolloutSamples
from sb3_ppo_ext.common.rollout.evaluation import ActorEvaluation
from sb3_ppo_ext.common.update.reduce import Reducer, average
from sb3_ppo_ext.numerics import flatten


class PolicyStep(NamedTuple):
    """
    The outcome of the policy step of one update.

    :param status: "accepted", or why the step was not taken: "constraint", "improvement" (the line search found no
        point within the trust region, or none that improves enough), "zero_gradient", "not_positive_definite",
        "non_finite"
    :param objective: surrogate objective before the step
    :param kl: mean KL(old || new) after the step; 0 if none was taken
    :param fraction: fraction of the full step that was taken; 0 if none was taken
    :param predicted_improvement: first-order improvement of the objective by the last step tried
    :param actual_improvement: improvement of the objective by the last step tried
    :param cg_steps: number of conjugate gradient steps
    :param cg_residual: relative residual of conjugate gradient
    :param gradients: gradients of minus the objective before the step, one for each parameter of the actor
    :param reverse_kl: mean KL(new || old) after the step; 0 if none was taken
    """

    status: str
    objective: float
    kl: float = 0.0
    fraction: float = 0.0
    predicted_improvement: float = 0.0
    actual_improvement: float = 0.0
    cg_steps: int = 0
    cg_residual: float = 0.0
    gradients: Sequence[th.Tensor] = ()
    reverse_kl: float = 0.0


@dataclass(frozen=True)
class Surrogate:
    """
    The surrogate objective under the current parameters: the mean over a rollout of
    ``r A + ent_coef * entropy - reference_kl_coef * KL(pi || pi_ref)``, r being the probability ratio and A the
    advantage. The autograd graph of only one chunk is in memory at a time.

    :param actor_critic: the current policy
    :param family: the formulas of its distributions
    :param rollout: all samples
    :param ent_coef: weight of the entropy
    :param reference_kl_coef: weight of ``KL(pi || pi_ref)``
    :param chunks: cuts a number of samples, in sequences of a given length, into ranges
    :param reducer: averages over the processes
    """

    actor_critic: ActorCritic
    family: Family
    rollout: RolloutSamples
    ent_coef: float
    reference_kl_coef: float
    chunks: Callable[[int, int], Iterator[slice]]
    reducer: Reducer

    def gradient(self, candidates: Sequence[nn.Parameter]) -> tuple[th.Tensor, float, list[nn.Parameter]]:
        """
        Gradient and value of the objective, and the parameters on which it depends: those of the actor.

        :param candidates: parameters of the policy
        :return: the gradient, shape ``(n,)``, the objective, and the parameters, which have n elements in all
        """
        total: dict[nn.Parameter, th.Tensor] = {}
        objective = 0.0
        n_samples = len(self.rollout.advantages)
        for samples, actor in self._evaluated():
            chunk_objective = self._of_samples(samples, actor).sum() / n_samples
            grads = th.autograd.grad(chunk_objective, candidates, allow_unused=True)
            for parameter, grad in zip(candidates, grads, strict=True):
                if grad is not None:
                    total[parameter] = total[parameter] + grad if parameter in total else grad
            objective += chunk_objective.item()
        gradient, mean = flatten(list(total.values())), th.tensor(objective, dtype=th.float64)
        average(self.reducer, gradient, mean, weight=n_samples)
        return gradient, mean.item(), list(total)

    def value_and_kls(self) -> tuple[th.Tensor, th.Tensor, th.Tensor]:
        """The objective, mean KL(old || new) and mean KL(new || old), three scalars."""
        rollout, kl_of = self.rollout, self.family.kl
        objective = kl = reverse_kl = th.zeros((), device=rollout.advantages.device)
        for samples, actor in self._evaluated():
            objective = objective + self._of_samples(samples, actor).sum()
            kl = kl + kl_of(samples.old_params, actor.params).sum()
            reverse_kl = reverse_kl + kl_of(actor.params, samples.old_params).sum()
        n_samples = len(rollout.advantages)
        means = objective / n_samples, kl / n_samples, reverse_kl / n_samples
        average(self.reducer, *means, weight=n_samples)
        return means

    def _evaluated(self) -> Iterator[tuple[RolloutSamples, ActorEvaluation]]:
        for rows in self.chunks(len(self.rollout.advantages), self.rollout.length):
            samples = self.rollout.rows(rows)
            yield samples, self.actor_critic.evaluate_actor(samples.inputs, samples.actions)

    def _of_samples(self, samples: RolloutSamples, actor: ActorEvaluation) -> th.Tensor:
        """The objective of each sample."""
        log_prob, entropy, _ = actor
        old_log_prob = samples.old_log_prob
        objective = -losses.surrogate_loss(log_prob, old_log_prob, samples.advantages).loss
        if self.ent_coef != 0.0:
            if entropy is None:  # -E_old[r log pi], as the actions are the old policy's
                entropy = losses.surrogate_loss(log_prob, old_log_prob, log_prob).loss
            objective = objective + self.ent_coef * entropy
        if self.reference_kl_coef != 0.0:
            assert samples.reference_params is not None
            objective = objective - self.reference_kl_coef * self.family.kl(actor.params, samples.reference_params)
        return objective
