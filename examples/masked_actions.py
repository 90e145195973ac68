"""
Some actions are forbidden: the environment says which, and neither training nor evaluation ever takes one.

    python -m examples.masked_actions

A number is hidden among ten, and each guess tells whether the number is higher or lower. What cannot be the number any
more is forbidden. Guessing at random then takes 4.9 guesses in the mean, and always halving what is left 2.9, which no
policy can beat.
"""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy

from sb3_ppo_ext import DualClipPPO


class HigherOrLower(gym.Env[np.ndarray, np.int64]):
    """Find the hidden number. ``action_masks`` is all that masks need."""

    observation_space = spaces.MultiBinary(10)
    action_space = spaces.Discrete(10)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        self.hidden = int(self.np_random.integers(10))
        self.possible = np.ones(10, dtype=np.int8)
        return self.possible.copy(), {}

    def step(self, action: np.int64) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        if action < self.hidden:
            self.possible[: action + 1] = 0
        elif action > self.hidden:
            self.possible[action:] = 0
        return self.possible.copy(), -1.0, bool(action == self.hidden), False, {}

    def action_masks(self) -> Any:
        """True where an action is allowed."""
        return self.possible == 1


def main() -> None:
    env = make_vec_env(HigherOrLower, n_envs=8, seed=0)
    model = DualClipPPO("MlpPolicy", env, n_steps=128, batch_size=256, gamma=1.0, seed=0)
    before: Any = evaluate_policy(model, env, n_eval_episodes=200, deterministic=False)
    model.learn(50_000)
    after: Any = evaluate_policy(model, env, n_eval_episodes=200)
    print(
        f"Guesses, mean of 200 episodes: {-before[0]:.2f} before training, {-after[0]:.2f} after. Halving takes 2.90."
    )


if __name__ == "__main__":
    main()
