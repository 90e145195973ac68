"""
An objective of your own: a static method, in a class that has the rest of PPO. CartPole learns by it in 8 seconds.

    python -m examples.own_objective

This objective weights the gradient of log pi by the ratio, but by at most 2 (a truncated importance weight), and has no
clip. The class can be saved, loaded and compiled like the four algorithms of the package.
"""

from __future__ import annotations

from typing import Any

from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy

from sb3_ppo_ext import losses
from sb3_ppo_ext.common.proximal import ProximalAlgorithm
from sb3_ppo_ext.common.update.objective import PolicyLoss


class TruncatedWeights(ProximalAlgorithm):
    """``-sg(min(r, c)) A log pi``, where sg stops the gradient and c is ``bound``."""

    def __init__(self, policy: Any, env: Any, *, bound: float = 2.0, _init_setup_model: bool = True, **kwargs: Any):
        super().__init__(policy, env, **kwargs)
        self.bound = bound
        if _init_setup_model:
            self._setup_new_model()

    def coefficients(self) -> dict[str, float]:
        return {**super().coefficients(), "bound": self.bound}

    @staticmethod
    def policy_loss(evaluation: Any, samples: Any, coefficients: Any) -> PolicyLoss:
        weights = losses.truncated_importance_weights(
            evaluation.log_prob, samples.old_log_prob, maximum=coefficients["bound"]
        )
        loss = losses.reinforce_loss(evaluation.log_prob, weights * samples.advantages)
        return PolicyLoss(samples.mean(loss), {"weight_max": weights.detach().max()})


def main() -> None:
    env = make_vec_env("CartPole-v1", n_envs=8, seed=0)
    model = TruncatedWeights("MlpPolicy", env, n_steps=128, batch_size=256, seed=0).learn(60_000)
    mean, _ = evaluate_policy(model, env, n_eval_episodes=10)
    print(
        f"Mean return of 10 episodes: {mean:.0f}; largest weight: {model.logger.name_to_value['train/weight_max']:.2f}"
    )


if __name__ == "__main__":
    main()
