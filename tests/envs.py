"""Small environments for the tests."""

from __future__ import annotations

import copy
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces


class ScriptedEnv(gym.Env[Any, Any]):
    """
    Random observations and rewards; each episode ends in the next way of the script: after so many steps, terminated
    and/or truncated.

    :param obs_space: of the observations
    :param action_space: of the actions, which change nothing
    :param script: length, terminated and truncated of each episode, over and over
    """

    def __init__(
        self,
        obs_space: spaces.Space[Any],
        action_space: spaces.Space[Any],
        script: tuple[tuple[int, bool, bool], ...] = ((3, True, False), (2, False, True), (4, True, True)),
    ) -> None:
        self.observation_space = copy.deepcopy(obs_space)  # with a generator of its own
        self.action_space = action_space
        self._script = script
        self._episode = -1
        self._steps = 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        if seed is not None:
            self.observation_space.seed(seed)
        self._episode += 1
        self._steps = 0
        return self.observation_space.sample(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self._steps += 1
        length, terminated, truncated = self._script[self._episode % len(self._script)]
        ends = self._steps == length
        reward = float(self.np_random.normal())
        return self.observation_space.sample(), reward, ends and terminated, ends and truncated, {}


class WithoutMasks(gym.Wrapper[Any, Any, Any, Any]):
    """Hides that an environment says which actions are allowed, as the error about it proposes."""

    def get_wrapper_attr(self, name: str) -> Any:
        if name == "action_masks":
            raise AttributeError(name)
        return super().get_wrapper_attr(name)


BOX = spaces.Box(-1.0, 1.0, (4,), np.float32)
IMAGE = spaces.Box(0, 255, (3, 36, 36), np.uint8)
DICT = spaces.Dict({"vector": BOX, "image": IMAGE, "choice": spaces.Discrete(3)})
