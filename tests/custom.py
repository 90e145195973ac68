"""What users bring along: a policy, a buffer and a callback that several tests need."""

from __future__ import annotations

from typing import Any

from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.distributions import CategoricalDistribution
from stable_baselines3.common.policies import ActorCriticPolicy

from sb3_ppo_ext.common.rollout.buffers import RolloutBuffer


class OverridesForward(ActorCriticPolicy):
    """A policy that must be asked by SB3's methods, as it overrides one; it counts the calls of that one."""

    n_calls = 0

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.n_calls += 1
        return super().forward(*args, **kwargs)


class EveryStepBuffer(RolloutBuffer):
    """A buffer that must be given every step, as SB3 does it, as it overrides ``add``; it counts them."""

    n_added = 0

    def add(self, *args: Any, **kwargs: Any) -> None:
        self.n_added += 1
        super().add(*args, **kwargs)


class LearningRates(BaseCallback):
    """Notes the learning rate of each parameter group when a rollout begins and when training ends."""

    def __init__(self) -> None:
        super().__init__()
        self.rates: list[tuple[float, ...]] = []

    def _on_step(self) -> bool:
        return True

    def _on_rollout_start(self) -> None:
        self.rates.append(tuple(group["lr"] for group in self.model.policy.optimizer.param_groups))

    def _on_training_end(self) -> None:
        self._on_rollout_start()


class MyCategorical(CategoricalDistribution):
    """A distribution of the user's own, whose formulas are not known."""

    def log_prob(self, actions: Any) -> Any:
        return 1.0 * super().log_prob(actions)


class MyPolicy(ActorCriticPolicy):
    """Has such a distribution."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.action_dist = MyCategorical(int(self.action_space.n))  # type: ignore[attr-defined]
