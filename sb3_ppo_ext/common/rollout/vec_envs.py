"""Check which environments can be used for training, and read their properties."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
from stable_baselines3.common.vec_env import VecEnv

from sb3_ppo_ext.common.errors import ArgumentError
from sb3_ppo_ext.common.rollout.array_envs import ArrayVecEnv
from sb3_ppo_ext.common.rollout.autoreset import is_envpool
from sb3_ppo_ext.common.rollout.freed_memory import keep_freed_memory
from sb3_ppo_ext.common.rollout.tensor_envs import TensorVecEnv, is_tensor_env
from sb3_ppo_ext.common.rollout.transitions import BatchedVecEnv


def as_learnable(env: Any) -> Any:
    """
    :param env: as the user gave it, made if it was an id
    :return: the same environment, or a VecEnv around a vector that is not one of SB3's
    :raises ArgumentError: if SB3 cannot use it, saying what it is and what to do
    """
    learnable = _as_learnable(env)
    if isinstance(learnable, VecEnv) and isinstance(learnable.unwrapped, BatchedVecEnv):
        keep_freed_memory()
    return learnable


def _as_learnable(env: Any) -> Any:
    if isinstance(env, VecEnv):
        return env
    if is_tensor_env(env):
        return TensorVecEnv(env)
    inner = env.unwrapped if isinstance(env, gym.Env) else env
    if isinstance(env, gym.vector.VectorEnv) or is_envpool(env):
        return ArrayVecEnv(env)
    given = f"env={env!r:.100} is not allowed: "
    if isinstance(inner, gym.vector.VectorEnv) or hasattr(inner, "single_observation_space"):
        raise ArgumentError(
            f"{given}it is a vector of environments, but neither one of Stable-Baselines3's (a VecEnv) nor one of "
            "gymnasium's (a VectorEnv). For environments such as those of Isaac Lab, take the VecEnv wrapper that they "
            "come with"
        )
    # SB3 adapts the environments of OpenAI Gym, where that is installed.
    if not isinstance(env, gym.Env) and not any(base.__module__.startswith("gym.") for base in type(env).__mro__):
        raise ArgumentError(
            f"{given}it must be a Gymnasium environment or VectorEnv, a VecEnv of Stable-Baselines3, an environment of "
            "EnvPool, or the id of a registered one"
        )
    return env


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
    if isinstance(env.unwrapped, BatchedVecEnv):
        return env.unwrapped.max_episode_steps
    try:
        specs = env.get_attr("spec")
    except (AttributeError, NotImplementedError):  # a vector of environments that cannot be looked into
        return 0
    return max((getattr(spec, "max_episode_steps", None) or 0 for spec in specs), default=0)
