"""The arms of the study of old data: DualClipPPO on rollouts that have waited, and losses in its place."""

from __future__ import annotations

import copy
import inspect
from collections import deque
from typing import Any, cast

import torch as th
from rl_zoo3.utils import ALGOS

from benchmarks.learning.algorithm import Algorithm
from sb3_ppo_ext import DualClipPPO, losses
from sb3_ppo_ext.common.rollout.buffers import RolloutBuffer
from sb3_ppo_ext.common.rollout.data import RolloutSamples
from sb3_ppo_ext.common.rollout.evaluation import Evaluation
from sb3_ppo_ext.common.update.objective import Coefficients, PolicyLoss

BOUNDS = (3.0, 1.5)  # of the second clip, where its effect is measured


class Waiting(DualClipPPO):
    """
    Learns from each rollout when ``lag`` newer ones have been collected, once: first in, first out, as where actors
    and learner are apart. While the first rollouts wait, there is no update.

    At the end of each update it measures, by the final parameters, what a second clip would do and what it would take
    of PPO's gradient, whether or not it has one.

    :param lag: updates that a rollout waits
    """

    def __init__(self, *args: Any, lag: int = 0, **kwargs: Any) -> None:
        self.lag = lag
        super().__init__(*args, **kwargs)
        self._waiting: deque[Any] = deque()

    def train(self) -> None:
        self._waiting.append(self.rollout_buffer)
        if len(self._waiting) <= self.lag:
            self.rollout_buffer = copy.copy(self.rollout_buffer)  # the next rollout is collected into arrays of its own
            return
        self.rollout_buffer = self._waiting.popleft()  # which the next rollout is written to
        super().train()

    def _after_update(self) -> None:
        super()._after_update()
        self.policy.set_training_mode(False)
        rollout = cast(RolloutBuffer, self.rollout_buffer).flat()
        log_prob = self._actor_critic().evaluate_actor(rollout.inputs, rollout.actions).log_prob
        advantages = losses.masked_whiten(rollout.advantages)
        ratio = (log_prob.detach() - rollout.old_log_prob).exp()
        clipped = losses.dual_clip_surrogate_loss(
            log_prob, rollout.old_log_prob, advantages, dual_clip=None, clip_range=0.2
        ).loss
        whole = self._gradient_norm(clipped)
        self.logger.record("train/end_ratio_max", ratio.max().item())
        for bound in BOUNDS:
            is_cut = (advantages < 0.0) & (ratio > bound)
            share = self._gradient_norm(clipped * is_cut) / whole if is_cut.any() and whole > 0.0 else 0.0
            self.logger.record(f"train/end_cut_share_{bound:g}", is_cut.float().mean().item())
            self.logger.record(f"train/end_cut_gradient_{bound:g}", share)

    def _gradient_norm(self, of_samples: th.Tensor) -> float:
        """The norm of the gradient of the mean over a rollout."""
        parameters = [p for p in self.policy.parameters() if p.requires_grad]
        gradients = th.autograd.grad(of_samples.mean(), parameters, retain_graph=True, allow_unused=True)
        return float(th.stack([g.square().sum() for g in gradients if g is not None]).sum().sqrt())


_signature = inspect.signature(DualClipPPO)
_lag = inspect.Parameter("lag", inspect.Parameter.KEYWORD_ONLY, default=0)
Waiting.__signature__ = _signature.replace(parameters=[*_signature.parameters.values(), _lag])  # type: ignore[attr-defined]


class TruncatedWeight(Waiting):
    """``-sg(min(r, c)) A log pi``, which goes on to learn from a bad action that has become likely."""

    @staticmethod
    def policy_loss(evaluation: Evaluation, samples: RolloutSamples, coefficients: Coefficients) -> PolicyLoss:
        weights = losses.truncated_importance_weights(
            evaluation.log_prob, samples.old_log_prob, maximum=coefficients["dual_clip"]
        )
        return PolicyLoss(samples.mean(losses.reinforce_loss(evaluation.log_prob, weights * samples.advantages)), {})


class SPO(Waiting):
    """Simple policy optimisation: a quadratic penalty in the clip's place."""

    @staticmethod
    def policy_loss(evaluation: Evaluation, samples: RolloutSamples, coefficients: Coefficients) -> PolicyLoss:
        surrogate = losses.spo_surrogate_loss(
            evaluation.log_prob, samples.old_log_prob, samples.advantages, epsilon=coefficients["clip_range"]
        )
        return PolicyLoss(samples.mean(surrogate.loss), {"approx_kl": surrogate.diagnostics.kl_k3})


_PPO = {"torch_compile": True, "dual_clip": None}
ARMS = {
    "ppo": Algorithm("PPO", "waiting", _PPO),
    "dual_clip_3": Algorithm("second clip, c = 3", "waiting", {**_PPO, "dual_clip": 3.0}),
    "dual_clip_1.5": Algorithm("second clip, c = 1.5", "waiting", {**_PPO, "dual_clip": 1.5}),
    "target_kl": Algorithm("PPO, stopped at target_kl 0.02", "waiting", {**_PPO, "target_kl": 0.02}),
    "truncated": Algorithm("truncated weights, c = 3", "waiting_truncated", {**_PPO, "dual_clip": 3.0}),
    "spo": Algorithm("SPO", "waiting_spo", _PPO),
}


def register_arms() -> None:
    """Let rl_zoo3 know them."""
    ALGOS.update(waiting=Waiting, waiting_truncated=TruncatedWeight, waiting_spo=SPO)
