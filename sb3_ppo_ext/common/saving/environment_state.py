"""Save and restore the state of environments and their wrappers."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

from stable_baselines3.common.vec_env import (
    VecCheckNan,
    VecEnv,
    VecEnvWrapper,
    VecExtractDictObs,
    VecFrameStack,
    VecMonitor,
    VecNormalize,
    VecTransposeImage,
    VecVideoRecorder,
)
from stable_baselines3.common.vec_env.stacked_observations import StackedObservations

from sb3_ppo_ext.common.rollout.array_envs import ArrayVecEnv
from sb3_ppo_ext.common.rollout.tensor_envs import TensorVecEnv
from sb3_ppo_ext.common.rollout.transitions import BatchedVecEnv

# Attributes in which gymnasium's wrappers and SB3's Monitor keep state of an episode (TimeLimit, Monitor,
# FrameStackObservation) and of the whole training (NormalizeObservation, NormalizeReward). They are looked up by name,
# not by class, because rl_zoo3 replaces TimeLimit by its own class, which a worker process may not know.
_OF_EPISODE = ("_elapsed_steps", "rewards", "obs_queue")
_OF_TRAINING = ("obs_rms", "return_rms", "discounted_reward")

_VEC_MEMORY: dict[type[VecEnv], tuple[str, ...]] = {
    VecNormalize: ("obs_rms", "ret_rms", "returns", "old_obs", "old_reward"),
    VecFrameStack: ("stacked_obs",),
    VecMonitor: ("episode_returns", "episode_lengths"),
    ArrayVecEnv: ("_statistics", "_masks"),
    TensorVecEnv: ("_returns", "_lengths", "_discounted", "_of_returns"),
}
_VEC_SETTINGS: dict[type[VecEnvWrapper], tuple[str, ...]] = {
    VecNormalize: (
        "training", "norm_obs", "norm_reward", "clip_obs", "clip_reward", "gamma", "epsilon", "norm_obs_keys",
    ),
    VecTransposeImage: ("skip",),
    VecExtractDictObs: ("key",),
}  # fmt: skip
# These wrappers change nothing that is learnt from.
_ONLOOKERS = (VecCheckNan, VecVideoRecorder)


def env_state(env: VecEnv, *, in_episode: bool) -> dict[str, Any]:
    """
    :param env: the training environment
    :param in_episode: whether the next step continues an episode; otherwise the environments will be reset first
    :return: the state of the environments and their wrappers, and the settings of the wrappers
    """
    attributes = [name for name in ("np_random", *_OF_TRAINING) if _has(env, name)]
    states = None
    if in_episode and _has(env, "state_dict"):
        states = env.env_method("state_dict")
        attributes += [name for name in _OF_EPISODE if _has(env, name)]
    return {
        "attributes": {name: env.get_attr(name) for name in attributes},
        "states": states,
        "wrappers": [
            (class_name, {name: getattr(wrapper, name) for name in names})
            for wrapper, class_name, names in _with_memory(env)
        ],
        "settings": _settings(env),
    }


def check_env(env: VecEnv, state: dict[str, Any]) -> None:
    """
    :param env: the environments in which training is to continue
    :param state: the result of :func:`env_state`
    :raises ValueError: if the environments differ from those of the training; the message says how
    """
    saved, given = [name for name, _ in state["wrappers"]], [name for _, name, _ in _with_memory(env)]
    if saved != given:
        raise ValueError(f"the wrappers with a state were {saved} in the training, and are {given} here")
    is_old = "settings" not in state  # written by a version that did not save settings
    if not is_old:
        _check_settings(env, state)
    for name in state["attributes"]:
        if not _has(env, name):
            raise ValueError(
                f"the checkpoint has {name} of the environments, and these have none: a wrapper is missing"
            )
    new = [name for name in _OF_TRAINING if name not in state["attributes"] and _has(env, name)]
    if new and is_old:
        warnings.warn(
            f"The checkpoint does not contain the state of a wrapper of the environments ({', '.join(new)}): its "
            "statistics start again",
            stacklevel=3,
        )
    elif new:
        raise ValueError(f"these environments have a wrapper with {', '.join(new)}, and those of the training had none")
    if state["states"] is not None and not _has(env, "load_state_dict"):
        raise ValueError("the checkpoint has the state of the environments, and these have no load_state_dict()")


def _check_settings(env: VecEnv, state: dict[str, Any]) -> None:
    saved, given = state["settings"], _settings(env)
    saved_names, given_names = [name for name, _ in saved], [name for name, _ in given]
    if saved_names != given_names:
        raise ValueError(
            f"the wrappers were {saved_names} in the training, outermost first, and are {given_names} here"
        )
    differing = [
        f"{name} of {wrapper} was {value!r} in the training, and is {here[name]!r} here"
        for (wrapper, settings), (_, here) in zip(saved, given, strict=True)
        for name, value in settings.items()
        if here[name] != value
    ]
    if differing:
        raise ValueError("; ".join(differing))


def set_env_state(env: VecEnv, state: dict[str, Any]) -> None:
    """
    :param env: the environments in which training is to continue, checked by :func:`check_env`
    :param state: the result of :func:`env_state`, to restore
    """
    if state["states"] is not None:
        env.reset()  # most wrappers need a reset before the first step
        for index, of_one in enumerate(state["states"]):
            env.env_method("load_state_dict", of_one, indices=index)
    env.unwrapped._reset_seeds()  # otherwise an earlier seed would replace the generators at the next reset
    for name, values in state["attributes"].items():
        for index, value in enumerate(values):
            env.env_method("set_wrapper_attr", name, value, indices=index)
    for (wrapper, _, _), (_, attributes) in zip(_with_memory(env), state["wrappers"], strict=True):
        for name, value in attributes.items():
            setattr(wrapper, name, value)


def _wrappers(env: VecEnv) -> Iterator[VecEnvWrapper]:
    """The wrappers, outermost first."""
    while isinstance(env, VecEnvWrapper):
        yield env
        env = env.venv


def _with_memory(env: VecEnv) -> list[tuple[VecEnv, str, tuple[str, ...]]]:
    """The wrappers and vectors that have a state, with their names and the names of these attributes."""
    return [
        (wrapper, wrapper_class.__name__, tuple(name for name in names if name in vars(wrapper)))
        for wrapper in (*_wrappers(env), env.unwrapped)
        for wrapper_class, names in _VEC_MEMORY.items()
        if isinstance(wrapper, wrapper_class)
    ]


def _settings(env: VecEnv) -> list[tuple[str, dict[str, Any]]]:
    """The names and settings of the wrappers."""
    result = []
    for wrapper in _wrappers(env):
        if isinstance(wrapper, _ONLOOKERS):
            continue
        names = (name for of, names in _VEC_SETTINGS.items() if isinstance(wrapper, of) for name in names)
        settings = {name: getattr(wrapper, name) for name in names}
        if isinstance(wrapper, VecFrameStack):
            stacked = wrapper.stacked_obs
            settings = {"n_stack": stacked.n_stack, "channels_order": _channels_order(stacked)}
        result.append((type(wrapper).__name__, settings))
    return result


def _channels_order(stacked: StackedObservations[Any]) -> str | dict[str, Any]:
    if hasattr(stacked, "sub_stacked_observations"):
        return {key: _channels_order(sub) for key, sub in stacked.sub_stacked_observations.items()}
    return "first" if stacked.channels_first else "last"


def _has(env: VecEnv, name: str) -> bool:
    """Whether all environments have an attribute; False if the vector of environments cannot tell or restore it."""
    if isinstance(env.unwrapped, BatchedVecEnv) and not env.unwrapped.can_be_restored:
        return False
    try:
        return env.has_attr(name)
    except NotImplementedError:
        return False
