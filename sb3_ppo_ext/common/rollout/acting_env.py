"""Find the action masks for a call of ``predict`` that passes only observations."""

from __future__ import annotations

import dis
import functools
import sys
from collections.abc import Iterator
from types import CodeType, FrameType
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.vec_env import VecEnv, unwrap_vec_normalize

from sb3_ppo_ext.common.errors import ArgumentError
from sb3_ppo_ext.common.rollout.data import MASK_KEY
from sb3_ppo_ext.common.rollout.last_observations import has_shown
from sb3_ppo_ext.common.rollout.masks import METHOD, checked_masks, choices_of, convention_of, of_newest_frame
from sb3_ppo_ext.common.rollout.present_infos import present_info, present_infos


def masks_where_acting(obs: Any, n: int, action_space: spaces.Space[Any]) -> tuple[np.ndarray | None, bool]:
    """
    Read the action masks of the environments in which the caller of ``predict`` acts. ``evaluate_policy``, callbacks
    and the RL Zoo's commands pass only observations, but keep the environments in a variable of the function that calls
    ``predict``. Only these environments count, if they have the right number and action space and, as far as that is
    known, have last returned these observations. A model of the user's own whose ``predict`` calls this one is passed
    over, if it is known.

    :param obs: what ``predict`` was given
    :param n: number of observations
    :param action_space: of the policy
    :return: the masks, True where an action is allowed, shape ``(n, n_choices)``, or None if no environments are found
        or they give masks only in their observations; and whether to apply masks (False within sb3-contrib's
        ``evaluate_policy(use_masking=False)``)
    :raises ArgumentError: if the caller has several such environments, and their masks differ
    """
    frame: FrameType | None = sys._getframe(2)  # the `predict` that called predict_masked()
    may_be_unknown = True
    while frame is not None:
        shown = [(env, has_shown(env, obs)) for env in _fitting(frame, n, action_space)]
        found = [env for env, is_known in shown if is_known or (is_known is None and may_be_unknown)]
        if found:
            masks = _only_masks(found, frame)
            checked = None if masks is None else checked_masks(masks, choices_of(action_space), step=None)
            return checked, frame.f_locals.get("use_masking") is not False
        if frame.f_code.co_name != "predict":
            break
        may_be_unknown &= isinstance(frame.f_locals.get("self"), (BaseAlgorithm, BasePolicy))
        frame = frame.f_back
    return None, True


def _fitting(frame: FrameType, n: int, action_space: spaces.Space[Any]) -> Iterator[Any]:
    """Environments in the local variables of a function, and in the global ones that it reads."""
    of_module = (frame.f_globals.get(name) for name in _globals_read_by(frame.f_code))
    for env in [*frame.f_locals.values(), *of_module]:
        if issubclass(type(env), VecEnv):
            fits = env.num_envs == n and not getattr(env.unwrapped, "closed", False)
        else:
            fits = issubclass(type(env), gym.Env) and n == 1
        if fits and env.action_space == action_space:
            yield env


@functools.lru_cache(maxsize=64)
def _globals_read_by(code: CodeType) -> frozenset[str]:
    return frozenset(i.argval for i in dis.get_instructions(code) if i.opname == "LOAD_GLOBAL")


def _only_masks(envs: list[Any], frame: FrameType) -> Any:
    """The masks of all of these environments, which may be one in several wrappers."""
    cores = [_core(env) for env in envs]
    said: dict[int, Any] = dict.fromkeys(map(id, cores))
    for env, core in zip(envs, cores, strict=True):
        try:
            masks = _masks_of(env, frame)
        except AttributeError:  # this environment has not been reset, so nobody acts in it
            if len(said) == 1:
                raise
            continue
        if masks is not None:
            if said[id(core)] is not None and not _are_equal(masks, said[id(core)]):
                raise _several()
            said[id(core)] = masks
    first, *others = said.values()
    if not all(_are_equal(first, other) for other in others):
        raise _several()
    return first


def _core(env: Any) -> Any:
    """The innermost environment: the same for all of its wrappers and for a vector of only this environment."""
    inner = env.unwrapped
    alone = getattr(inner, "envs", [])
    return alone[0].unwrapped if isinstance(inner, VecEnv) and len(alone) == 1 else inner


def _are_equal(a: Any, b: Any) -> bool:
    if a is None or b is None:
        return a is b
    return all(np.array_equal(one, other) for one, other in zip(a, b, strict=True))


def _several() -> ArgumentError:
    return ArgumentError(
        "action_masks=None is not allowed: the observations may come from several environments of the caller, which "
        "allow different actions. It must be an array of True and False, one for each choice"
    )


def _masks_of(env: Any, frame: FrameType) -> Any:
    """One mask for each environment; None if there are none, or if the observations contain them."""
    if not isinstance(env, VecEnv):
        method = _attribute(env, METHOD)
        if callable(method):
            return [method()]
        info = frame.f_locals.get("info")
        if not isinstance(info, dict) or MASK_KEY not in info:
            return None
        mask = present_info(env, info).get(MASK_KEY)
        return None if mask is None else [mask]
    convention = convention_of(env)
    if convention == "method":
        return env.env_method(METHOD)
    if convention == "info":
        return [info.get(MASK_KEY) for info in present_infos(env)]
    normalizer = unwrap_vec_normalize(env)
    if convention is None or normalizer is None or MASK_KEY not in (normalizer.norm_obs_keys or ()):
        return None
    return of_newest_frame(normalizer.get_original_obs()[MASK_KEY], choices_of(env.action_space))


def _attribute(env: gym.Env[Any, Any], name: str) -> Any:
    try:
        return env.get_wrapper_attr(name)
    except AttributeError:
        return None
