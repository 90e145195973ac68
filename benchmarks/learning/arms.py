"""The arms of the study of old data: DualClipPPO on old rollouts, waiting or reused, and losses in its place."""

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
from sb3_ppo_ext.common.update.old_rollouts import Reuse

BOUNDS = (3.0, 1.5)  # of the second clip, where its effect is measured


class Waiting(DualClipPPO):
    """
    Learns from each rollout when ``lag`` newer ones have been collected, once: first in, first out, as where actors
    and learner are apart. While the first rollouts wait, there is no update.

    At the end of each update it measures, by the final parameters and on all that the update learnt from, what a second
    clip would do around the policy that acted, and what it would take of PPO's gradient, whether or not it has one.

    :param lag: updates that a rollout waits
    """

    def __init__(self, *args: Any, lag: int = 0, **kwargs: Any) -> None:
        self.lag = lag
        super().__init__(*args, **kwargs)
        self._waiting: deque[Any] = deque()
        self._reused: list[RolloutBuffer] = []  # what an update learns from beside the rollout buffer

    def train(self) -> None:
        self._waiting.append(self.rollout_buffer)
        if len(self._waiting) <= self.lag:
            self.rollout_buffer = copy.copy(self.rollout_buffer)  # the next rollout is collected into arrays of its own
            return
        self.rollout_buffer = self._waiting.popleft()  # which the next rollout is written to
        self._reused = [rollout.buffer for rollout in self._old_rollouts]
        self._before_update()
        super().train()

    def _before_update(self) -> None:
        """What precedes an update, when its rollout is in the buffer."""

    def _after_update(self) -> None:
        super()._after_update()
        rollouts = [cast(RolloutBuffer, self.rollout_buffer).flat(), *(buffer.flat() for buffer in self._reused)]
        log_prob = th.cat([self._log_prob(rollout) for rollout in rollouts])
        old_log_prob = th.cat([rollout.old_log_prob for rollout in rollouts])
        advantages = losses.masked_whiten(th.cat([rollout.advantages for rollout in rollouts]))
        for buffer in self._reused:
            buffer.forget_flat()
        ratio = (log_prob.detach() - old_log_prob).exp()
        clipped = losses.dual_clip_surrogate_loss(
            log_prob, old_log_prob, advantages, dual_clip=None, clip_range=0.2
        ).loss
        whole = self._gradient_norm(clipped)
        self.logger.record("train/end_ratio_max", ratio.max().item())
        for bound in BOUNDS:
            is_cut = (advantages < 0.0) & (ratio > bound)
            share = self._gradient_norm(clipped * is_cut) / whole if is_cut.any() and whole > 0.0 else 0.0
            self.logger.record(f"train/end_cut_share_{bound:g}", is_cut.float().mean().item())
            self.logger.record(f"train/end_cut_gradient_{bound:g}", share)

    def _log_prob(self, rollout: RolloutSamples) -> th.Tensor:
        """By the present policy, in evaluation mode."""
        self.policy.set_training_mode(False)
        return self._actor_critic().evaluate_actor(rollout.inputs, rollout.actions).log_prob

    def _gradient_norm(self, of_samples: th.Tensor) -> float:
        """The norm of the gradient of the mean over the samples."""
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


class Decoupled(Waiting):
    """
    Clips around the policy with which an update begins, and weights each sample by what lies between that one and the
    policy that acted, up to a bound (Hilton et al. 2021, arXiv 2110.00641).

    Of reused rollouts this is ``reuse={"proximal": "newest"}``. Here a rollout that has waited, which holds the
    log-probabilities of the policy that acted, is given those of the present one.
    """

    def coefficients(self) -> dict[str, float]:
        return {**super().coefficients(), "max_importance_weight": Reuse.max_importance_weight}

    def _before_update(self) -> None:
        if not self.n_reused_rollouts:
            buffer = cast(RolloutBuffer, self.rollout_buffer)
            with th.no_grad():
                buffer._flat = buffer.flat()._replace(proximal_log_prob=self._log_prob(buffer.flat()))


_PPO = {"torch_compile": True, "dual_clip": None}
ARMS = {
    "ppo": Algorithm("PPO", "waiting", _PPO),
    "dual_clip_3": Algorithm("second clip, c = 3", "waiting", {**_PPO, "dual_clip": 3.0}),
    "dual_clip_1.5": Algorithm("second clip, c = 1.5", "waiting", {**_PPO, "dual_clip": 1.5}),
    "target_kl": Algorithm("PPO, stopped at target_kl 0.02", "waiting", {**_PPO, "target_kl": 0.02}),
    "truncated": Algorithm("truncated weights, c = 3", "waiting_truncated", {**_PPO, "dual_clip": 3.0}),
    "spo": Algorithm("SPO", "waiting_spo", _PPO),
    "decoupled": Algorithm("decoupled PPO, weights up to 2", "waiting_decoupled", _PPO),
}


def register_arms() -> None:
    """Let rl_zoo3 know them."""
    ALGOS.update(waiting=Waiting, waiting_truncated=TruncatedWeight, waiting_spo=SPO, waiting_decoupled=Decoupled)
