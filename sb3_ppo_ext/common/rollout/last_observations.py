"""What environments last showed, to tell whether given observations are theirs."""

from __future__ import annotations

import copy
from typing import Any

import gymnasium as gym
import numpy as np
from stable_baselines3.common.vec_env import (
    DummyVecEnv,
    VecCheckNan,
    VecEnv,
    VecExtractDictObs,
    VecFrameStack,
    VecMonitor,
    VecNormalize,
    VecTransposeImage,
    VecVideoRecorder,
)

from sb3_ppo_ext.common.rollout.data import to_arrays
from sb3_ppo_ext.common.rollout.present_infos import Watch, WatchOfOne, watched, watched_one


def has_shown(env: VecEnv | gym.Env[Any, Any], obs: Any) -> bool | None:
    """
    Whether these are the observations that the last step or reset of environments returned. SB3's ``DummyVecEnv`` and
    wrappers keep them; others are watched from the first call on.

    :param env: one environment or a vector, wrapped or not
    :param obs: of all environments, or of the only one
    :return: None if it is not known, in the first call. If it is still not known when other observations follow, the
        environments have not been stepped or reset, and these cannot be theirs
    """
    shown = _of_vector(env) if isinstance(env, VecEnv) else _of_watch(watched_one(env))
    if not isinstance(shown, (Watch, WatchOfOne)):
        return _are_equal(obs, shown)
    if not any(_are_equal(obs, one) for one in shown.assumed):
        if len(shown.assumed) > shown.may_miss_a_step:
            return False
        shown.assumed.append(copy.deepcopy(obs))
    return None


def _of_watch(watch: Watch | WatchOfOne) -> Any:
    return watch if watch.obs is None else watch.obs


def _of_vector(env: VecEnv) -> Any:
    """The watch, if they are not known."""
    kind: Any = type(env)
    if kind.step_wait is DummyVecEnv.step_wait and kind.reset is DummyVecEnv.reset:
        return env._obs_from_buf()  # type: ignore[attr-defined]
    if kind is VecFrameStack:
        stacks = env.stacked_obs  # type: ignore[attr-defined]
        of_keys = getattr(stacks, "sub_stacked_observations", None)
        return stacks.stacked_obs if of_keys is None else {key: one.stacked_obs for key, one in of_keys.items()}
    if kind in (VecMonitor, VecVideoRecorder, VecCheckNan, VecExtractDictObs, VecNormalize, VecTransposeImage):
        inner = _of_vector(env.venv)  # type: ignore[attr-defined]
        return inner if isinstance(inner, Watch) else _through(env, inner)
    return _of_watch(watched(env))


def _through(wrapper: Any, obs: Any) -> Any:
    if isinstance(wrapper, VecNormalize):
        return wrapper.normalize_obs(to_arrays(obs))
    if isinstance(wrapper, VecTransposeImage):
        return wrapper.transpose_observations(dict(obs) if isinstance(obs, dict) else obs)
    return obs[wrapper.key] if isinstance(wrapper, VecExtractDictObs) else obs


def _are_equal(given: Any, shown: Any) -> bool:
    if isinstance(given, dict) and isinstance(shown, dict):
        return all(_are_equal(given[key], shown[key]) for key in given.keys() & shown.keys())
    if given is shown:
        return True
    # A caller may have added or removed an axis of one environment, or made float32 of float64.
    one, other = (np.asarray(to_arrays(obs)).reshape(-1) for obs in (given, shown))
    if one.size != other.size or not {one.dtype.kind, other.dtype.kind} <= set("biuf"):
        return False
    if one.dtype != other.dtype:
        one, other = one.astype(np.float32), other.astype(np.float32)
    return np.array_equal(one, other, equal_nan=True)
