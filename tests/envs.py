"""Small environments for the tests."""

from __future__ import annotations

import copy
import random
from collections.abc import Container
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from gymnasium.wrappers import TimeLimit
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import VecEnv

BOX = spaces.Box(-1.0, 1.0, (4,), np.float32)
IMAGE = spaces.Box(0, 255, (3, 36, 36), np.uint8)
DICT = spaces.Dict({"vector": BOX, "image": IMAGE, "choice": spaces.Discrete(3)})
BOX_ACTIONS = spaces.Box(-1.0, 1.0, (2,), np.float32)


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
    """Hides that an environment says which actions are allowed."""

    def get_wrapper_attr(self, name: str) -> Any:
        if name == "action_masks":
            raise AttributeError(name)
        return super().get_wrapper_attr(name)


def scripted(
    obs_space: spaces.Space[Any] = BOX, action_space: spaces.Space[Any] = BOX_ACTIONS, n_envs: int = 2, **kwargs: Any
) -> VecEnv:
    """
    A vector of :class:`ScriptedEnv`, each in a Monitor, with the seed 0.

    :param kwargs: of :class:`ScriptedEnv`
    """
    return make_vec_env(lambda: ScriptedEnv(obs_space, action_space, **kwargs), n_envs=n_envs, seed=0)


class LargeReward(gym.RewardWrapper):
    """
    Replaces some rewards by a number that is finite and too large to compute with.

    :param env: whose other rewards stay as they are
    :param steps: which rewards are replaced, counted from 1 over all episodes
    :param number: in their place
    """

    def __init__(self, env: gym.Env[Any, Any], steps: Container[int], number: float = 1e30) -> None:
        super().__init__(env)
        self._steps = steps
        self._number = number
        self._count = 0

    def reward(self, reward: Any) -> float:
        self._count += 1
        return self._number if self._count in self._steps else float(reward)


class RandomWalk(gym.Env[np.ndarray, np.ndarray]):
    """A random walk that draws from every generator there is: its own, Python's and numpy's."""

    observation_space = spaces.Box(-10.0, 10.0, (3,), np.float32)
    action_space = spaces.Box(-1.0, 1.0, (2,), np.float32)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        self.position = self.np_random.normal(size=3)
        return self.position.astype(np.float32), {}

    def noise(self) -> float:
        return self.np_random.normal() + random.random() + np.random.random()  # noqa: NPY002

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        self.position = 0.9 * self.position + 0.1 * self.noise() + 0.2 * action.sum()
        terminated = bool(self.np_random.random() < 0.05)
        return self.position.astype(np.float32), -float(np.square(self.position).sum()), terminated, False, {}


class SavedWalk(RandomWalk):
    """The walk with ``state_dict`` and ``load_state_dict``, so that a checkpoint holds its state."""

    def state_dict(self) -> dict[str, Any]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.position = state["position"]


class SeededWalk(SavedWalk):
    """The walk that draws from its own generator alone, as the others of a worker process are not saved."""

    def noise(self) -> float:
        return float(self.np_random.normal())


def limited_walk() -> gym.Env[Any, Any]:
    return TimeLimit(SeededWalk(), max_episode_steps=11)
