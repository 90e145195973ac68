"""Small models in environments of noise, and what they do of a recorded rollout."""

from __future__ import annotations

import warnings
from functools import partial
from typing import Any

import gymnasium as gym
import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.vec_env import DummyVecEnv

from sb3_ppo_ext import REINFORCE, TRPO, AdaptiveKLPPO, DualClipPPO
from sb3_ppo_ext.common.rollout.episode_buffer import EpisodeBuffer

LENGTH = 6
EPISODES = 4


class Noise(gym.Env[Any, Any]):
    """
    Episodes of one length, with random observations and rewards.

    :param length: of the episodes
    :param is_masked: whether there are three actions, of which one is not allowed, instead of two numbers
    """

    observation_space = spaces.Box(-1.0, 1.0, (3,), np.float32)
    action_space: spaces.Space[Any] = spaces.Box(-1.0, 1.0, (2,), np.float32)

    def __init__(self, length: int, *, is_masked: bool = False) -> None:
        self._length = length
        if is_masked:
            self.action_space = spaces.Discrete(3)
            self.action_masks = self._masks

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.steps = 0
        return self.np_random.uniform(-1.0, 1.0, 3).astype(np.float32), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.steps += 1
        obs = self.np_random.uniform(-1.0, 1.0, 3).astype(np.float32)
        return obs, float(self.np_random.normal() + np.sum(action)), self.steps == self._length, False, {}

    def _masks(self) -> np.ndarray:
        return np.arange(3) != self.steps % 3


def model_of(
    algorithm: Any, lengths: list[int], policy: str = "MlpPolicy", *, is_masked: bool = False, **kwargs: Any
) -> Any:
    """
    A model whose minibatches are all of its samples, so that it does not matter how they are shuffled.

    :param algorithm: to be trained by
    :param lengths: of the episodes of each environment
    :param policy: of it
    :param is_masked: as :class:`Noise` has it
    :param kwargs: what is to be otherwise
    """
    sizes: dict[Any, dict[str, Any]] = {
        DualClipPPO: {"n_steps": EPISODES * LENGTH, "n_epochs": 3},
        AdaptiveKLPPO: {"n_steps": EPISODES * LENGTH, "n_epochs": 3},
        TRPO: {"n_steps": EPISODES * LENGTH, "n_critic_updates": 3},
        REINFORCE: {"episodes_per_env": EPISODES, "n_critic_updates": 3, "baseline": "value"},
    }
    batch_size = sum(lengths) * EPISODES if algorithm is REINFORCE else len(lengths) * EPISODES * LENGTH
    env = DummyVecEnv([partial(Noise, length, is_masked=is_masked) for length in lengths])
    arguments = {"seed": 0, "device": "cpu", "batch_size": batch_size, "learning_rate": 0.01, **sizes[algorithm]}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "batch_size=")  # that has room for old rollouts, too
        return algorithm(policy, env, **{**arguments, **kwargs})


_BEFORE_CLOSING = (
    "observations", "actions", "rewards", "episode_starts", "truncated", "final_values", "action_masks", "states"
)  # fmt: skip
_AFTERWARDS = ("values", "log_probs", "advantages", "returns", "distribution_params")


def recorded(model: Any) -> dict[str, np.ndarray | None]:
    """
    A copy of what a rollout buffer holds, as it is given to :func:`give`.

    :param model: that has collected
    """
    buffer = model.rollout_buffer
    arrays = {name: getattr(buffer, name) for name in (*_BEFORE_CLOSING, *_AFTERWARDS)}
    return {name: None if array is None else array.copy() for name, array in arrays.items()}


def give(worker: Any, recording: dict[str, np.ndarray | None], i: int) -> None:
    """
    Put the rollout of one environment into a worker's buffer.

    :param worker: that has one environment
    :param recording: of all environments
    :param i: the number of the one
    """

    def put(names: tuple[str, ...]) -> None:
        for name in names:
            array = recording[name]
            setattr(buffer, name, None if array is None else array[:, i : i + 1].copy())

    buffer = worker.rollout_buffer
    buffer.reset()
    rewards = recording["rewards"]
    assert rewards is not None
    buffer.buffer_size = buffer.pos = len(rewards)
    put(_BEFORE_CLOSING)
    buffer.full = True
    if isinstance(buffer, EpisodeBuffer):
        buffer.close(worker.episodes_per_env)
    put(_AFTERWARDS)
    buffer.forget_flat()


def parameters(model: Any) -> list[th.Tensor]:
    """A copy of the policy's parameters."""
    return [parameter.detach().clone() for parameter in model.policy.parameters()]
