"""
Some actions are forbidden: the environment says which, and neither training nor the trained policy takes them.

    python -m examples.masked_actions

A number is hidden among ten, and each guess tells whether the number is higher or lower. Numbers that
have been ruled out are forbidden. Guessing at random among the rest takes 3.44 guesses on average; always halving the
rest takes 2.90, which no policy can beat except by chance. After some 8 seconds the script prints how many guesses the
trained policy takes. (A policy that was never trained does not use masks yet.)
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
    """Find the hidden number. The method ``action_masks`` is all that masks need."""

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
    model.learn(50_000)
    mean: Any = evaluate_policy(model, env, n_eval_episodes=1_000)[0]
    print(f"Guesses, mean of 1000 episodes: {-mean:.2f}. Guessing at random takes 3.44. Halving takes 2.90.")


if __name__ == "__main__":
    main()
