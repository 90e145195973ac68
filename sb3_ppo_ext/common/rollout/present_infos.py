"""What environments said last, of which a vector of them keeps no more than what they said at resets."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
from stable_baselines3.common.vec_env import VecEnv

from sb3_ppo_ext.common.rollout.data import MASK_KEY
from sb3_ppo_ext.common.rollout.transitions import BatchedVecEnv


def reset_infos(env: VecEnv) -> list[dict[str, Any]]:
    """
    What the environments said at their last reset.

    :param env: the environments
    :return: one info an environment; empty if they are a vector of the user's own that does not keep it
    """
    infos: list[dict[str, Any]] = getattr(env.unwrapped, "reset_infos", [])
    return infos


def present_infos(env: VecEnv) -> list[dict[str, Any]]:
    """
    The infos that belong to the observations that the environments gave last: of the last step, and where that ended an
    episode, or they have been reset since, of the reset. The first call must follow a reset; from then on the vector is
    watched.

    :param env: the environments
    :return: one info an environment; of those that are stepped all at once, of which actions are allowed alone
    """
    venv = env.unwrapped
    if isinstance(venv, BatchedVecEnv):  # it knows by itself
        masks = venv.action_masks_in_infos()
        return [{} if masks is None else {MASK_KEY: masks[i]} for i in range(venv.num_envs)]
    watch = getattr(venv.step_wait, "__self__", None)
    if not isinstance(watch, _Watch):
        watch = _Watch(venv)
    return watch.infos


class _Watch:
    """
    Stands in the place of the methods of a vector that step and reset it, and remembers what they yield. A copy of the
    vector has its own.

    :param venv: not wrapped
    """

    def __init__(self, venv: VecEnv) -> None:
        self._venv = venv
        self._step_whole, self._make_step, self._make_reset = venv.step, venv.step_wait, venv.reset
        self.infos = list(reset_infos(venv))
        venv.step_wait = self._step_wait  # type: ignore[method-assign]
        venv.reset = self._reset  # type: ignore[method-assign]
        if type(venv).step is not VecEnv.step:  # it need not call step_wait()
            venv.step = self._step  # type: ignore[method-assign]

    def _step(self, actions: Any) -> Any:
        return self._noted(self._step_whole(actions))

    def _step_wait(self) -> Any:
        return self._noted(self._make_step())

    def _noted(self, result: Any) -> Any:
        *_, dones, infos = result
        resets = reset_infos(self._venv)
        self.infos = [reset if done else info for reset, done, info in zip(resets, dones, infos, strict=True)]
        return result

    def _reset(self) -> Any:
        obs = self._make_reset()
        self.infos = list(reset_infos(self._venv))
        return obs


def present_info(env: gym.Env[Any, Any], info: dict[str, Any]) -> dict[str, Any]:
    """
    The info that belongs to the observation that an environment gave last. From the first call on it is watched.

    :param env: the environment
    :param info: that its user has kept, who may have passed over what it said at a reset (``obs, _ = env.reset()``)
    """
    watch = getattr(env.step, "__self__", None)
    if not isinstance(watch, _WatchOfOne):
        watch = _WatchOfOne(env)
    return info if watch.of_reset is None or info is not watch.of_step else watch.of_reset


class _WatchOfOne:
    """
    Stands in the place of two methods of an environment.

    :param env: it may be wrapped
    """

    def __init__(self, env: gym.Env[Any, Any]) -> None:
        self._make_step, self._make_reset = env.step, env.reset
        self.of_step: dict[str, Any] | None = None
        self.of_reset: dict[str, Any] | None = None  # that followed the step
        env.step = self._step  # type: ignore[method-assign]
        env.reset = self._reset  # type: ignore[method-assign]

    def _step(self, action: Any) -> Any:
        result = self._make_step(action)
        self.of_step, self.of_reset = result[-1], None
        return result

    def _reset(self, **kwargs: Any) -> Any:
        result = self._make_reset(**kwargs)
        self.of_reset = result[-1]
        return result
