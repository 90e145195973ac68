"""The supported observation and action spaces."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from stable_baselines3.common.preprocessing import is_image_space
from stable_baselines3.common.vec_env import VecEnv

from sb3_ppo_ext.common.distributions import family_of_space
from sb3_ppo_ext.common.errors import ArgumentError, UnsupportedSpaceError

TARGET_KL_PER_DIMENSION = 0.01

_MIN_IMAGE = 36  # smallest width and height for the three convolutions of SB3's NatureCNN


def check_spaces(env: gym.Env[Any, Any] | VecEnv, *, use_sde: bool) -> None:
    """
    :param env: the training environment
    :param use_sde: whether to explore with gSDE
    :raises ArgumentError: if SB3's policies and buffers do not support one of the spaces; the message says which spaces
        they support
    """
    observation_space, action_space = (getattr(env, name, None) for name in ("observation_space", "action_space"))
    parts: Any = [(None, observation_space)]
    if isinstance(observation_space, spaces.Dict) and observation_space.spaces:
        parts = observation_space.spaces.items()
    for key, space in parts:
        if not _can_be_observed(space):
            name = "observation_space" if key is None else f"observation_space[{key!r}]"
            raise UnsupportedSpaceError(
                f"{name}={space} is not supported: it must be Box, Discrete, MultiDiscrete of one axis or MultiBinary, "
                "counting from 0, or one Dict of these, not nested and not empty; a Box must have at least one axis"
                f"{_how_to_flatten(observation_space)}"
            )
    try:
        family_of_space(action_space)  # type: ignore[arg-type]  # raises if it is no supported space
    except ValueError as error:
        raise ArgumentError(str(error)) from None
    if isinstance(action_space, (spaces.Discrete, spaces.MultiDiscrete)) and np.any(action_space.start):
        n = action_space.n if isinstance(action_space, spaces.Discrete) else action_space.nvec
        raise ArgumentError(
            f"action_space={action_space} is not supported: the actions must count from 0. "
            f"gymnasium.wrappers.TransformAction(env, lambda action: action + {_plain(action_space.start)}, "
            f"gymnasium.spaces.{type(action_space).__name__}({_plain(n)})) shifts them"
        )
    if isinstance(action_space, spaces.Box):
        if not (np.isfinite(action_space.low).all() and np.isfinite(action_space.high).all()):
            raise ArgumentError(
                f"action_space={action_space} is not supported: a Box of actions must have finite bounds"
            )
    elif use_sde:
        raise ArgumentError(
            f"use_sde={use_sde} is not allowed with action_space={action_space}: generalized State-Dependent "
            "Exploration (gSDE) is for Box actions; it must be False"
        )


def _can_be_observed(space: object) -> bool:
    if isinstance(space, spaces.Discrete):
        return bool(space.start == 0)  # SB3 encodes it as a one-hot vector of n elements
    if isinstance(space, spaces.MultiDiscrete):
        return space.nvec.ndim == 1 and not np.any(space.start)
    if isinstance(space, spaces.Box):
        return space.shape != ()  # SB3's extractors flatten the axes after the first, and its buffer adds an axis
    return isinstance(space, spaces.MultiBinary)


def _how_to_flatten(space: object) -> str:
    if not isinstance(space, spaces.Space) or not space.is_np_flattenable:
        return ""
    return "; gymnasium.wrappers.FlattenObservation(env) makes one Box of it"


def _plain(numbers: Any) -> Any:
    return np.asarray(numbers).tolist()


def fitting_policies(observation_space: spaces.Space[Any]) -> str:
    """
    :param observation_space: of the environment; images have their channels first, as in SB3
    :return: for a message: the policies that take such observations
    """
    parts = observation_space.spaces.values() if isinstance(observation_space, spaces.Dict) else [observation_space]
    sides = [side for space in parts if is_image_space(space) for side in (space.shape or ())[1:]]
    if min(sides, default=_MIN_IMAGE) < _MIN_IMAGE:
        return (
            "one with your own features_extractor_class or, for a single image, MlpPolicy, which flattens it. The "
            f"NatureCNN of CnnPolicy and MultiInputPolicy needs at least {_MIN_IMAGE} x {_MIN_IMAGE} pixels; "
            "gymnasium.wrappers.ResizeObservation enlarges an image"
        )
    return "MlpPolicy for vectors, CnnPolicy for images, MultiInputPolicy for Dict observations"


def n_action_dims(action_space: spaces.Space[Any]) -> int:
    """
    The number of independent dimensions of an action: the components of a Box, 1 for Discrete, the length of a
    MultiDiscrete, the bits of a MultiBinary. KL divergence and Fisher information are sums over them.

    :param action_space: of the environment
    """
    return family_of_space(action_space).action_dim
