"""
A task that needs a memory, with and without one: after some 11 seconds it prints how often each policy is right.

    python -m examples.memory_task

A sign is shown once, at the start of a corridor; at its end, three steps later, the action must be the sign. Without a
memory, no policy can be right more than half of the time except by chance.
"""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy

from sb3_ppo_ext import DualClipPPO


class Corridor(gym.Env[np.ndarray, np.int64]):
    """The observation is the sign (-1 or 1) in the first step, and 0 afterwards."""

    observation_space = spaces.Box(-1.0, 1.0, (1,), np.float32)
    action_space = spaces.Discrete(2)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        self.sign, self.steps = int(self.np_random.integers(2)), 0
        return np.full(1, 2 * self.sign - 1, np.float32), {}

    def step(self, action: np.int64) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        self.steps += 1
        is_over = self.steps == 4
        return np.zeros(1, np.float32), float(is_over and action == self.sign), is_over, False, {}


def main() -> None:
    for policy, kwargs in (("MlpPolicy", {}), ("MlpLstmPolicy", {"lstm_hidden_size": 16})):
        env = make_vec_env(Corridor, n_envs=8, seed=0)
        settings: dict[str, Any] = {"n_steps": 128, "batch_size": 256, "learning_rate": 3e-3, "policy_kwargs": kwargs}
        model = DualClipPPO(policy, env, seed=0, **settings).learn(30_000)
        share, _ = evaluate_policy(model, env, n_eval_episodes=200)
        print(f"{policy}: right in {share:.0%} of 200 episodes")


if __name__ == "__main__":
    main()
