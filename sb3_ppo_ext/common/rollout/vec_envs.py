"""Which environments can be learnt, and what they say of themselves."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
from stable_baselines3.common.vec_env import VecEnv

from sb3_ppo_ext.common.errors import ArgumentError


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


def has_masks_method(env: VecEnv) -> bool:
    """
    Whether environments have a method ``action_masks()``, as sb3-contrib has it.

    :param env: the environments
    """
    try:
        if not env.has_attr("action_masks"):
            return False
        # A vector of environments in other processes can say that there is the method, and not hand it over. Where
        # has_attr() is SB3's own it has just been handed over; some hand over None for what they do not have.
        asks = type(env.unwrapped).has_attr is VecEnv.has_attr
        return not asks or any(callable(method) for method in env.get_attr("action_masks"))
    except (AttributeError, NotImplementedError):  # of what is wrapped like a VecEnv and is none
        return False


def time_limit(env: VecEnv) -> int:
    """
    Steps after which the environments say that an episode is cut; 0 if they do not say.

    :param env: the training environment
    """
    try:
        specs = env.get_attr("spec")
    except (AttributeError, NotImplementedError):  # a vector of environments that cannot be looked into
        return 0
    return max((getattr(spec, "max_episode_steps", None) or 0 for spec in specs), default=0)
