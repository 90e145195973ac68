"""
Two tasks that need a memory and nothing else: importing this module lets ``gymnasium.make`` know them.

- ``TMaze-v0``: one observation is remembered until it is needed
- ``RepeatPrevious-v0``: what is to be remembered changes with each step
"""

from __future__ import annotations

from typing import Any

import gymnasium as gym
from gymnasium import spaces


class TMaze(gym.Env[Any, Any]):
    """
    A corridor with a sign at its start and a junction at its end (Bakker 2001, "Reinforcement learning with long
    short-term memory"). The sign says where the goal lies, left or right of the junction; the corridor looks the same
    everywhere.

    The turn at the junction ends the episode, with the reward 1 if it is the right one and 0 if not; there is no other
    reward, so the mean reward of an episode is the share of right turns. Whoever turns into a wall, or goes forward at
    the junction, stays where it is.

    :param corridor_length: steps from the sign to the junction
    """

    SIGN_LEFT, SIGN_RIGHT, CORRIDOR, JUNCTION = range(4)  # observations
    FORWARD, LEFT, RIGHT = range(3)  # actions

    def __init__(self, corridor_length: int = 10) -> None:
        self.observation_space = spaces.Discrete(4)
        self.action_space = spaces.Discrete(3)
        self.corridor_length = corridor_length

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[int, dict[str, Any]]:
        super().reset(seed=seed)
        self._position = 0
        self._goal = self.LEFT if self.np_random.random() < 0.5 else self.RIGHT
        return self._observation(), {}

    def step(self, action: int) -> tuple[int, float, bool, bool, dict[str, Any]]:
        at_junction = self._position == self.corridor_length
        turned = at_junction and action != self.FORWARD
        if action == self.FORWARD and not at_junction:
            self._position += 1
        return self._observation(), float(turned and action == self._goal), turned, False, {}

    def _observation(self) -> int:
        if self._position == 0:
            return self.SIGN_LEFT if self._goal == self.LEFT else self.SIGN_RIGHT
        return self.JUNCTION if self._position == self.corridor_length else self.CORRIDOR


class RepeatPrevious(gym.Env[Any, Any]):
    """
    At each step a symbol is seen, drawn anew, and the action must name the one that was seen some steps ago, as in
    popgym's task of this name (Morad et al. 2023, "POPGym").

    Each answer has the reward 1 / ``n_answers`` if it is right and -1 / ``n_answers`` if not, so an episode's reward is
    between -1 and 1. As long as there is nothing to name yet, the reward is 0.

    :param delay: of how many steps ago the symbol is to be named
    :param n_symbols: how many different ones there are
    :param n_answers: after which an episode ends
    """

    def __init__(self, delay: int = 4, n_symbols: int = 4, n_answers: int = 48) -> None:
        self.observation_space = spaces.Discrete(n_symbols)
        self.action_space = spaces.Discrete(n_symbols)
        self.delay = delay
        self.n_symbols = n_symbols
        self.n_answers = n_answers

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[int, dict[str, Any]]:
        super().reset(seed=seed)
        self._seen = [self._draw()]
        return self._seen[-1], {}

    def step(self, action: int) -> tuple[int, float, bool, bool, dict[str, Any]]:
        n_answers = len(self._seen) - self.delay  # this one among them
        reward = 0.0
        if n_answers > 0:
            reward = (1 if action == self._seen[-1 - self.delay] else -1) / self.n_answers
        self._seen.append(self._draw())
        return self._seen[-1], reward, n_answers == self.n_answers, False, {}

    def _draw(self) -> int:
        return int(self.np_random.integers(self.n_symbols))


# A random walk through the corridor takes 30 steps and a half more at the junction.
gym.register("TMaze-v0", TMaze, max_episode_steps=100)  # type: ignore[arg-type]
gym.register("RepeatPrevious-v0", RepeatPrevious)  # type: ignore[arg-type]
