"""The environments of a side: those that are registered, and three that are not."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecEnv

from benchmarks.cases import IMAGES, INVALID_ACTIONS, MASKED_CART_POLE, SEED, Workload


class SyntheticImages(gym.Env[np.ndarray, np.int64]):
    """Frames of noise, 84x84x4 like the last four of an Atari game, that cost next to nothing; 500 steps an episode."""

    _FRAMES = 32

    def __init__(self) -> None:
        self.observation_space = gym.spaces.Box(0, 255, (84, 84, 4), np.uint8)
        self.action_space = gym.spaces.Discrete(6)
        self._frames = np.random.default_rng(SEED).integers(0, 256, (self._FRAMES, 84, 84, 4), np.uint8)
        self._n_steps = 0

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        self._n_steps = 0
        return self._frames[0], {}

    def step(self, action: np.int64) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        self._n_steps += 1
        reward = float(action == self._n_steps % 6)
        return self._frames[self._n_steps % self._FRAMES], reward, self._n_steps >= 500, False, {}


def masked_cart_pole() -> gym.Env[Any, Any]:
    """CartPole with a method ``action_masks()`` that always allows both actions."""
    from sb3_contrib.common.wrappers import ActionMasker

    return ActionMasker(gym.make("CartPole-v1"), lambda _: np.ones(2, dtype=bool))


def invalid_actions() -> gym.Env[Any, Any]:
    """The environment of sb3-contrib's tests of masks: 20 actions, of which other 10 are forbidden at each step."""
    from sb3_contrib.common.envs import InvalidActionEnvDiscrete

    return InvalidActionEnvDiscrete(dim=20, n_invalid_actions=10)


_NOT_REGISTERED = {IMAGES: SyntheticImages, MASKED_CART_POLE: masked_cart_pole, INVALID_ACTIONS: invalid_actions}


def make_environments(workload: Workload, n_times: int = 1) -> VecEnv:
    """
    :param workload: whose environments are made
    :param n_times: 1: side by side in this process; else, so many times as many, each in a process of its own
    """
    env = _NOT_REGISTERED.get(workload.env, workload.env)
    vec_env_cls = DummyVecEnv if n_times == 1 else SubprocVecEnv
    return make_vec_env(env, workload.n_envs * n_times, seed=SEED, vec_env_cls=vec_env_cls)
