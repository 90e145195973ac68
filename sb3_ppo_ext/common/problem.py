"""What can be learnt: the spaces that an environment may have."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from stable_baselines3.common.vec_env import VecEnv

from sb3_ppo_ext.common.distributions import family_of_space


def check_spaces(env: gym.Env[Any, Any] | VecEnv, *, use_sde: bool) -> None:
    """
    :param env: to learn
    :param use_sde: whether gSDE is to be used
    :raises ValueError: if SB3's policies and buffers cannot take one of the spaces, saying what they can take
    """
    observation_space, action_space = (getattr(env, name, None) for name in ("observation_space", "action_space"))
    parts: Any = [(None, observation_space)]
    if isinstance(observation_space, spaces.Dict):
        parts = observation_space.spaces.items()
    for key, space in parts:
        if not _can_be_observed(space):
            name = "observation_space" if key is None else f"observation_space[{key!r}]"
            raise ValueError(
                f"{name}={space} is not supported: it must be Box, Discrete, MultiDiscrete of one axis or MultiBinary, "
                "counting from 0, or one Dict of such, not nested"
            )
    family_of_space(action_space)  # type: ignore[arg-type]  # refuses what is none
    if isinstance(action_space, spaces.Box):
        if not (np.isfinite(action_space.low).all() and np.isfinite(action_space.high).all()):
            raise ValueError(f"action_space={action_space} is not supported: a Box of actions must have finite bounds")
    elif use_sde:
        raise ValueError(
            f"use_sde={use_sde} is not allowed with action_space={action_space}: generalized State-Dependent "
            "Exploration (gSDE) is for Box actions; it must be False"
        )


def _can_be_observed(space: object) -> bool:
    if isinstance(space, spaces.Discrete):
        return bool(space.start == 0)  # SB3 encodes by one-hot vectors of n elements
    if isinstance(space, spaces.MultiDiscrete):
        return space.nvec.ndim == 1 and not np.any(space.start)
    return isinstance(space, (spaces.Box, spaces.MultiBinary))
