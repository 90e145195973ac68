"""The masks of the environments that whoever calls ``predict`` acts in."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import FrameType
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from stable_baselines3.common.vec_env import VecEnv, unwrap_vec_normalize

from sb3_ppo_ext.common.errors import ArgumentError
from sb3_ppo_ext.common.rollout.data import MASK_KEY
from sb3_ppo_ext.common.rollout.masks import METHOD, checked_masks, choices_of, convention_of, of_newest_frame
from sb3_ppo_ext.common.rollout.present_infos import present_info, present_infos

_FRAMES = 8  # how far up the stack the environments are looked for


def masks_where_acting(n: int, action_space: spaces.Space[Any]) -> tuple[np.ndarray | None, bool]:
    """
    The masks of the environments that are being acted in by whoever called ``predict``: ``evaluate_policy``, callbacks
    and the RL Zoo's commands give the observations alone, and have the environments in a local variable. The nearest
    caller that has environments of the right number and actions is the one that acts.

    :param n: number of observations
    :param action_space: of the policy
    :return: True where an action is allowed, shape ``(n, n_choices)``, or None if these environments say nothing but in
        their observations, or none are found; and whether masks are to be heeded, which sb3-contrib's
        ``evaluate_policy(use_masking=False)`` does not
    :raises ArgumentError: if the caller has several, and they do not say the same
    """
    frame: FrameType | None = sys._getframe(1)
    for _ in range(_FRAMES):
        if frame is None:
            break
        found = list(_fitting(frame, n, action_space))
        if found:
            masks = _only_masks(found, frame)
            checked = None if masks is None else checked_masks(masks, choices_of(action_space), step=None)
            return checked, frame.f_locals.get("use_masking") is not False
        frame = frame.f_back
    return None, True


def _fitting(frame: FrameType, n: int, action_space: spaces.Space[Any]) -> Iterator[Any]:
    for env in list(frame.f_locals.values()):
        if issubclass(type(env), VecEnv):
            fits = env.num_envs == n and not getattr(env.unwrapped, "closed", False)
        else:
            fits = issubclass(type(env), gym.Env) and n == 1
        if fits and env.action_space == action_space:
            yield env


def _only_masks(envs: list[Any], frame: FrameType) -> Any:
    """The masks of all of these environments, which may be one in several wrappers."""
    cores = [_core(env) for env in envs]
    said: dict[int, Any] = dict.fromkeys(map(id, cores))
    for env, core in zip(envs, cores, strict=True):
        try:
            masks = _masks_of(env, frame)
        except AttributeError:  # of one that has not been reset, and is not acted in
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
    """What is the same object for an environment in all of its wrappers, in a vector of it alone too."""
    inner = env.unwrapped
    alone = getattr(inner, "envs", [])
    return alone[0].unwrapped if isinstance(inner, VecEnv) and len(alone) == 1 else inner


def _are_equal(a: Any, b: Any) -> bool:
    if a is None or b is None:
        return a is b
    return all(np.array_equal(one, other) for one, other in zip(a, b, strict=True))


def _several() -> ArgumentError:
    return ArgumentError(
        "action_masks=None is not allowed: the caller has several environments that the observations may be of, and "
        "they allow different actions. It must be an array of True and False, one for each choice"
    )


def _masks_of(env: Any, frame: FrameType) -> Any:
    """One mask an environment; None if it says none, or the observations have it."""
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
