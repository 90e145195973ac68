"""The spaces of observations and actions, and which environments can be learnt."""

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

_MIN_IMAGE = 36  # pixels that the three convolutions of SB3's NatureCNN leave something of


def check_env(env: Any) -> None:
    """
    :param env: as the user gave it, made if it was an id
    :raises ArgumentError: for what is no environment that SB3 can take, saying what it is and what to do
    """
    if isinstance(env, VecEnv):
        return
    given = f"env={env!r:.100} is not allowed: "
    if _is_vector(env):
        raise ArgumentError(
            f"{given}it is a vector of environments, but not one of Stable-Baselines3's. It must be a VecEnv: for "
            "environments that gymnasium.make() knows, stable_baselines3.common.env_util.make_vec_env(id, n_envs=...) "
            "makes one; for others, such as those of EnvPool or Isaac Lab, take the VecEnv wrapper that they come with"
        )
    # SB3 adapts the environments of OpenAI Gym, where that is installed.
    if not isinstance(env, gym.Env) and not any(base.__module__.startswith("gym.") for base in type(env).__mro__):
        raise ArgumentError(
            f"{given}it must be a Gymnasium environment, a VecEnv of Stable-Baselines3, or the id of a registered one"
        )


def _is_vector(env: Any) -> bool:
    """Whether an object is many environments at once, as gymnasium, EnvPool and simulators on a GPU have them."""
    inner = env.unwrapped if isinstance(env, gym.Env) else env
    config = getattr(inner, "config", None)  # where older versions of EnvPool say it
    return (
        isinstance(inner, gym.vector.VectorEnv)
        or hasattr(inner, "single_observation_space")
        or (isinstance(config, dict) and "num_envs" in config)
    )


def check_no_masks(env: VecEnv) -> None:
    """
    :param env: to learn
    :raises ArgumentError: if the environments say which actions are allowed, by a method ``action_masks()`` as
        sb3-contrib has it: they would not be asked
    """
    if _has_masks(env):
        raise ArgumentError(
            "env is not allowed: it has a method action_masks(), and this algorithm does not mask actions; it would "
            "choose forbidden ones. sb3_contrib.MaskablePPO trains with masks. To train without them, take the "
            "wrapper ActionMasker off, give the method another name, or hide it behind a gymnasium.Wrapper whose "
            "get_wrapper_attr('action_masks') raises AttributeError"
        )


def _has_masks(env: VecEnv) -> bool:
    try:
        if not env.has_attr("action_masks"):
            return False
        # A vector of environments in other processes can say that there is the method, and not hand it over. Where
        # has_attr() is SB3's own it has just been handed over; some hand over None for what they do not have.
        asks = type(env.unwrapped).has_attr is VecEnv.has_attr
        return not asks or any(callable(method) for method in env.get_attr("action_masks"))
    except (AttributeError, NotImplementedError):  # of what is wrapped like a VecEnv and is none
        return False


def check_spaces(env: gym.Env[Any, Any] | VecEnv, *, use_sde: bool) -> None:
    """
    :param env: to learn
    :param use_sde: whether gSDE is to be used
    :raises ArgumentError: if SB3's policies and buffers cannot take one of the spaces, saying what they can take
    """
    observation_space, action_space = (getattr(env, name, None) for name in ("observation_space", "action_space"))
    parts: Any = [(None, observation_space)]
    if isinstance(observation_space, spaces.Dict):
        parts = observation_space.spaces.items()
    for key, space in parts:
        if not _can_be_observed(space):
            name = "observation_space" if key is None else f"observation_space[{key!r}]"
            raise UnsupportedSpaceError(
                f"{name}={space} is not supported: it must be Box, Discrete, MultiDiscrete of one axis or MultiBinary, "
                f"counting from 0, or one Dict of such, not nested{_how_to_flatten(observation_space)}"
            )
    try:
        family_of_space(action_space)  # type: ignore[arg-type]  # refuses what is none
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
        return bool(space.start == 0)  # SB3 encodes by one-hot vectors of n elements
    if isinstance(space, spaces.MultiDiscrete):
        return space.nvec.ndim == 1 and not np.any(space.start)
    return isinstance(space, (spaces.Box, spaces.MultiBinary))


def _how_to_flatten(space: object) -> str:
    if not isinstance(space, spaces.Space) or not space.is_np_flattenable:
        return ""
    return "; gymnasium.wrappers.FlattenObservation(env) makes one Box of it"


def _plain(numbers: Any) -> Any:
    return np.asarray(numbers).tolist()


def fitting_policies(observation_space: spaces.Space[Any]) -> str:
    """
    :param observation_space: of the environment, the channels of its images first, as SB3 puts them
    :return: the policies that take such observations, in words
    """
    parts = observation_space.spaces.values() if isinstance(observation_space, spaces.Dict) else [observation_space]
    sides = [side for space in parts if is_image_space(space) for side in (space.shape or ())[1:]]
    if min(sides, default=_MIN_IMAGE) < _MIN_IMAGE:
        return (
            "one with a features_extractor_class of your own or, for an image alone, MlpPolicy, which flattens it. The "
            f"NatureCNN that CnnPolicy and MultiInputPolicy have needs at least {_MIN_IMAGE} x {_MIN_IMAGE} pixels; "
            "gymnasium.wrappers.ResizeObservation enlarges an image"
        )
    return "MlpPolicy for vectors, CnnPolicy for images, MultiInputPolicy for Dict observations"


def n_action_dims(action_space: spaces.Space[Any]) -> int:
    """
    How many independent dimensions an action has: the components of a Box, 1 for Discrete, the length of a
    MultiDiscrete, the bits of a MultiBinary. KL divergence and Fisher information are sums over them.

    :param action_space: of the environment
    """
    return family_of_space(action_space).action_dim
