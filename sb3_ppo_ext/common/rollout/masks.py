"""Which actions the environments allow: by a method, in their infos, or in their observations."""

from __future__ import annotations

import sys
from types import FrameType
from typing import Any, Literal

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from stable_baselines3.common.vec_env import VecEnv, VecNormalize, unwrap_vec_normalize

from sb3_ppo_ext.common.rollout.vec_envs import has_masks_method

Convention = Literal["method", "observation", "info"]

METHOD = "action_masks"  # of the environments, as sb3-contrib has it
KEY = "action_mask"  # of Dict observations, as PettingZoo has it, and of infos, as gymnasium's Taxi has it

_FRAMES = 8  # how far up the stack the environments are looked for that are being acted in


def choices_of(action_space: spaces.Space[Any]) -> list[int]:
    """
    How many choices each dimension of an action has: a mask has one entry for each of them, one dimension after the
    other. A binary one has two, of which the first is for 0.

    :param action_space: of the environment
    :return: empty where actions cannot be masked
    """
    if isinstance(action_space, spaces.Discrete):
        return [int(action_space.n)]
    if isinstance(action_space, spaces.MultiDiscrete):
        return [int(n) for n in action_space.nvec]
    if isinstance(action_space, spaces.MultiBinary):
        return [2] * int(np.prod(action_space.shape))
    return []


class ActionMasks:
    """
    Reads the masks of a vector of environments.

    :param env: the environments
    :param convention: where they say which actions are allowed
    """

    def __init__(self, env: VecEnv, convention: Convention) -> None:
        self._env = env
        self.convention = convention
        self._choices = choices_of(env.action_space)
        if not self._choices:
            raise ValueError(
                f"The environments mask actions ({convention}), and action_space={env.action_space} cannot be masked: "
                "it must be Discrete, MultiDiscrete or MultiBinary; learn(..., use_masking=False) ignores the masks"
            )
        self._starts = np.cumsum([0, *self._choices[:-1]])
        self._n_read = 0

    @classmethod
    def of(cls, env: VecEnv) -> ActionMasks | None:
        """
        :param env: environments that have been reset
        :return: what reads their masks; None if they have none
        """
        convention = convention_of(env)
        return None if convention is None else cls(env, convention)

    def at_reset(self, obs: Any) -> np.ndarray:
        """
        The masks of the first observations.

        :param obs: that the reset gave
        :return: True where an action is allowed, shape ``(n_envs, n_choices)``
        """
        return self._read(obs, _reset_infos(self._env))

    def after_step(self, obs: Any, dones: np.ndarray, infos: list[dict[str, Any]]) -> np.ndarray:
        """
        The masks of the observations that a step gave. Where it ended an episode, these are of the next one.

        :param obs: the observations
        :param dones: whether the step ended an episode, shape ``(n_envs,)``
        :param infos: of the step
        :return: True where an action is allowed, shape ``(n_envs, n_choices)``
        """
        if self.convention == "info" and dones.any():
            resets = _reset_infos(self._env)
            infos = [reset if done else info for reset, done, info in zip(resets, dones, infos, strict=True)]
        return self._read(obs, infos)

    def _read(self, obs: Any, infos: Any) -> np.ndarray:
        masks: Any
        if self.convention == "method":
            masks = self._env.env_method(METHOD)
        elif self.convention == "info":
            masks = [info.get(KEY) for info in infos]
        else:
            normalizer = unwrap_vec_normalize(self._env)
            masks = (obs if normalizer is None else normalizer.get_original_obs())[KEY]
        checked = checked_masks(masks, self._choices, step=self._n_read)
        self._n_read += 1
        return checked


def convention_of(env: VecEnv) -> Convention | None:
    """
    Where environments say which actions are allowed; None if they do not.

    :param env: the environments, reset where their infos are to be looked at
    """
    if has_masks_method(env):
        return "method"
    if isinstance(env.observation_space, spaces.Dict) and KEY in env.observation_space.spaces:
        return "observation"
    if any(KEY in info for info in _reset_infos(env)):
        return "info"
    return None


def _reset_infos(env: VecEnv) -> list[dict[str, Any]]:
    """What the environments said at their last reset; a vector of the user's own may not keep it."""
    infos: list[dict[str, Any]] = getattr(env.unwrapped, "reset_infos", [])
    return infos


def checked_masks(masks: Any, choices: list[int], *, step: int | None) -> np.ndarray:
    """
    :param masks: one an environment, as it was given
    :param choices: of each dimension of an action
    :param step: number of the step, for the message; None if there is none
    :return: True where an action is allowed, shape ``(n_envs, n_choices)``
    :raises ValueError: naming the environment, the step and the mask, if it is of another shape, holds anything but 0
        and 1, or allows nothing
    """
    size = sum(choices)
    if not choices:
        raise ValueError("An action mask was given for a Box of actions, which cannot be masked; it must be None")
    checked = np.empty((len(masks), size), dtype=bool)
    for i, mask in enumerate(masks):
        # Of stacked frames the newest stands last.
        values = np.asarray(mask if mask is not None else []).reshape(-1)
        if len(values) > size and len(values) % size == 0:
            values = values[-size:]
        is_right = len(values) == size and values.dtype.kind in "biuf"
        if not is_right or (values.dtype != bool and not np.isin(values, (0, 1)).all()):
            raise ValueError(
                f"{_where(i, step)} is {mask!r:.200}: it must hold {size} entries, each True or False (or 1 or 0), one "
                f"for each choice of an action ({' + '.join(map(str, choices))})"
            )
        checked[i] = values
    starts = np.cumsum([0, *choices[:-1]])
    allows = np.logical_or.reduceat(checked, starts, axis=1)
    if not allows.all():
        i, dimension = np.argwhere(~allows)[0]
        of_dimension = "" if len(choices) == 1 else f" in dimension {dimension}"
        raise ValueError(f"{_where(int(i), step)} allows no action{of_dimension}: {checked[i].astype(int).tolist()}")
    return checked


def _where(env_index: int, step: int | None) -> str:
    return f"The action mask of environment {env_index}" + ("" if step is None else f" in step {step}")


def keep_from_normalizing(env: VecEnv) -> None:
    """
    Let ``VecNormalize`` leave the mask in a Dict observation as it is.

    :param env: the environments
    """
    normalizer: VecNormalize | None = unwrap_vec_normalize(env)
    if normalizer is not None and normalizer.norm_obs_keys is not None and KEY in normalizer.norm_obs_keys:
        normalizer.norm_obs_keys.remove(KEY)


def masks_where_acting(n: int, action_space: spaces.Space[Any]) -> np.ndarray | None:
    """
    The masks of the environments that are being acted in by whoever called ``predict``: ``evaluate_policy``, callbacks
    and the RL Zoo's commands give the observations alone, and have the environments in a variable ``env``.

    :param n: number of observations
    :param action_space: of the policy
    :return: True where an action is allowed, shape ``(n, n_choices)``; None if no environment is found that says it
    """
    frame: FrameType | None = sys._getframe(1)
    for _ in range(_FRAMES):
        if frame is None:
            return None
        for name in ("env", "vec_env", "eval_env", "venv"):
            masks = _masks_in(frame, name, n)
            if masks is not None:
                return checked_masks(masks, choices_of(action_space), step=None)
        frame = frame.f_back
    return None


def _masks_in(frame: FrameType, name: str, n: int) -> Any:
    env = frame.f_locals.get(name)
    if isinstance(env, gym.Env) and n == 1:
        try:
            return [env.get_wrapper_attr(METHOD)()]
        except AttributeError:
            info = frame.f_locals.get("info")
            return [info[KEY]] if isinstance(info, dict) and KEY in info else None
    if not isinstance(env, VecEnv) or env.num_envs != n:
        return None
    convention = convention_of(env)
    if convention == "method":
        return env.env_method(METHOD)
    if convention == "info":
        infos, dones = frame.f_locals.get("infos"), frame.f_locals.get("dones", frame.f_locals.get("done"))
        resets = _reset_infos(env)
        if infos is None or dones is None:
            return [info.get(KEY) for info in resets]
        return [r.get(KEY) if done else info.get(KEY) for r, done, info in zip(resets, dones, infos, strict=True)]
    if convention == "observation":
        normalizer = unwrap_vec_normalize(env)
        return None if normalizer is None else normalizer.get_original_obs()[KEY]
    return None
