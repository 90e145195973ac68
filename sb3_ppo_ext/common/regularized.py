"""Staying close to a reference policy, for all four algorithms."""

from __future__ import annotations

import os
from typing import Any, cast

import torch as th
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.type_aliases import MaybeCallback, Schedule

from sb3_ppo_ext.common.algorithm import OnPolicyAlgorithm
from sb3_ppo_ext.common.distributions import Family
from sb3_ppo_ext.common.errors import ArgumentError
from sb3_ppo_ext.common.rollout.adapters import refusal
from sb3_ppo_ext.common.rollout.buffers import RolloutBuffer
from sb3_ppo_ext.common.update.controllers import AdaptiveCoefficient
from sb3_ppo_ext.common.update.reduce import average
from sb3_ppo_ext.common.update.reference import INITIAL, FrozenPolicy, check_reference, compare, frozen, measured
from sb3_ppo_ext.common.validation import as_schedule, check_one_of

_COEF = 0.1
_REWARD, _LOSS = "reward", "loss"


class RegularizedAlgorithm(OnPolicyAlgorithm):
    """
    An algorithm that may keep its policy pi close to a frozen reference policy, by a penalty on ``KL(pi || pi_ref)``.

    The expectation is under pi. So ``log pi(a|s) - log pi_ref(a|s)`` of the actions that pi has taken is an unbiased
    estimate of the KL, and both forms of the penalty are for the same quantity. In episodes of one step the optimum is
    ``pi* ~ pi_ref exp(r / coef)``. The KL is infinite if pi takes an action that the reference never takes, and changes
    little if pi gives up an action of the reference.

    :param args: arguments of :class:`OnPolicyAlgorithm`
    :param reference_policy: the reference policy; None: no penalty, and nothing is computed
    :param reference_kl_coef: weight of the penalty
    :param reference_kl: "reward" or "loss"
    :param kwargs: arguments of :class:`OnPolicyAlgorithm`
    """

    reference_policy: Any = None
    reference_kl_coef: float | str | Schedule | dict[str, Any] = _COEF
    reference_kl: str = _REWARD

    _used_reference_kl_coef: float = 0.0  # the weight in the current rollout

    def __init__(
        self,
        *args: Any,
        reference_policy: ActorCriticPolicy | FrozenPolicy | str | os.PathLike[str] | None = None,
        reference_kl_coef: float | str | Schedule | dict[str, Any] = _COEF,
        reference_kl: str = _REWARD,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.reference_policy = reference_policy
        self.reference_kl_coef = reference_kl_coef
        self.reference_kl = reference_kl

    def _validate(self) -> None:
        self._needs_old_params |= self.reference_policy is not None
        super()._validate()
        check_one_of("reference_kl", self.reference_kl, (_REWARD, _LOSS))
        if isinstance(self.reference_kl_coef, dict):
            AdaptiveCoefficient.checked("reference_kl_coef", self.reference_kl_coef)
        else:
            as_schedule("reference_kl_coef", self.reference_kl_coef, may_be_zero=True)

    def _setup_new_model(self) -> None:
        super()._setup_new_model()
        for name, default in (("reference_kl_coef", _COEF), ("reference_kl", _REWARD)):
            if self.reference_policy is None and getattr(self, name) != default:
                raise ArgumentError(
                    f"{name}={getattr(self, name)!r} is not allowed with reference_policy=None: there is no policy to "
                    f"stay close to. Give a reference_policy, or leave {name} out"
                )

    @property
    def _who_needs_kl(self) -> str:
        needs_it_for_more = type(self)._needs_old_params or self.kl_adaptive_lr is not None
        if needs_it_for_more or self.reference_policy is None:
            return super()._who_needs_kl
        return f"{type(self).__name__} with reference_policy"

    def _check_can_learn(self) -> None:
        super()._check_can_learn()
        if self.reference_policy is None:
            return
        self._needs_old_params = True
        is_own = isinstance(self.reference_policy, str) and self.reference_policy == INITIAL
        if not is_own:
            self.reference_policy = frozen(self.reference_policy)
            self.reference_policy.policy.to(self.device)
        check_reference(self.policy if is_own else self.reference_policy.policy, self.policy, self.rollout_buffer)

    def _setup_learn(
        self, total_timesteps: int, callback: MaybeCallback = None, *args: Any, **kwargs: Any
    ) -> tuple[int, BaseCallback]:
        result = super()._setup_learn(total_timesteps, callback, *args, **kwargs)
        if self.reference_policy is None:
            return result
        if not isinstance(self.reference_policy, FrozenPolicy):  # "initial": the current policy
            self.reference_policy = frozen(self.policy)
            self.reference_policy.policy.to(self.device)
        policy = self.reference_policy.policy
        reason = refusal(policy)
        if self._masks is not None and reason is not None:
            raise ArgumentError(
                f"reference_policy={type(policy).__name__}(...) is not allowed where environments mask actions: it "
                f"{reason}. Use an unchanged Stable-Baselines3 policy, or learn(..., use_masking=False)"
            )
        if self._together is not None:
            self._together.group.take_from_first([*policy.parameters(), *policy.buffers()])
        return result

    def _present_reference_kl_coef(self) -> float:
        given = self.reference_kl_coef
        if isinstance(given, dict):
            return AdaptiveCoefficient.checked("reference_kl_coef", given).coef
        return self._current_value(given)

    def _reference_coefficients(self) -> dict[str, float]:
        """The weight of ``KL(pi || pi_ref)`` in the loss, by name; empty without such a term."""
        if self.reference_policy is None or self.reference_kl != _LOSS:
            return {}
        return {"reference_kl_coef": self._present_reference_kl_coef()}

    def _compute_targets(self, rollout_buffer: RolloutBuffer, last_values: th.Tensor) -> None:
        if self.reference_policy is None:
            rollout_buffer.reference_params = rollout_buffer.penalties = None
        else:
            self._used_reference_kl_coef = self._present_reference_kl_coef()
            is_of_reward = self.reference_kl == _REWARD
            compare(rollout_buffer, self.reference_policy, self._used_reference_kl_coef if is_of_reward else None)
        super()._compute_targets(rollout_buffer, last_values)

    def _check_old_params(self) -> None:
        super()._check_old_params()
        if self.reference_policy is not None:
            buffer = cast(RolloutBuffer, self.rollout_buffer)
            params = buffer.reference_params
            if params is None or len(params) != len(buffer.flat_inputs()[1]):
                raise ValueError(
                    "A callback adds samples to the rollout buffer, and their distributions under the reference policy "
                    "are not known: a model with a reference_policy can only learn from its own steps"
                )

    def _follow_reference(self) -> None:
        """Log the KL between the policy that acted and the reference, and adapt the coefficient to it."""
        if self.reference_policy is None:
            return
        buffer = cast(RolloutBuffer, self.rollout_buffer)
        means, n_samples = measured(buffer, cast(Family, self._family))
        average(self._reducer, means, weight=n_samples)
        kl, reward, penalty = means.tolist()
        coef = self._reference_coefficients().get("reference_kl_coef", self._used_reference_kl_coef)
        if buffer.penalties is None:
            penalty = coef * kl
        self.logger.record("train/reference_kl", kl)
        self.logger.record("train/reference_kl_coef", coef)
        self.logger.record("train/reward_mean", reward)
        self.logger.record("train/penalized_reward_mean", reward - penalty)
        if isinstance(self.reference_kl_coef, dict):
            adaptive = AdaptiveCoefficient.checked("reference_kl_coef", self.reference_kl_coef)
            self.reference_kl_coef = {**self.reference_kl_coef, "coef": adaptive.after(kl)}
