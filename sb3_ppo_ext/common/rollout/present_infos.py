"""The current infos and observations of environments; a VecEnv itself keeps only the infos of resets."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
from stable_baselines3.common.vec_env import VecEnv

from sb3_ppo_ext.common.rollout.data import MASK_KEY
from sb3_ppo_ext.common.rollout.transitions import BatchedVecEnv


def reset_infos(env: VecEnv) -> list[dict[str, Any]]:
    """
    The infos of the environments' last reset.

    :param env: the environments
    :return: one info for each environment; empty if a custom VecEnv does not keep them
    """
    infos: list[dict[str, Any]] = getattr(env.unwrapped, "reset_infos", [])
    return infos


def present_infos(env: VecEnv) -> list[dict[str, Any]]:
    """
    The infos that belong to the environments' current observations: those of the last step, or of the reset if the step
    ended an episode or a reset came later. The first call must follow a reset; from then on steps and resets are
    watched.

    :param env: the environments
    :return: one info for each environment; for a BatchedVecEnv, with the action mask alone
    """
    venv = env.unwrapped
    if isinstance(venv, BatchedVecEnv):  # it knows by itself
        masks = venv.action_masks_in_infos()
        return [{} if masks is None else {MASK_KEY: masks[i]} for i in range(venv.num_envs)]
    return watched(venv).infos


def watched(venv: VecEnv) -> Watch:
    """
    The watch of a VecEnv, which begins with the first call.

    :param venv: it may be a wrapper
    """
    watch = getattr(venv.step_wait, "__self__", None)
    return watch if isinstance(watch, Watch) else Watch(venv)


class Watch:
    """
    Replaces the methods that step and reset a VecEnv, and remembers the observations and infos that they return. A copy
    of the VecEnv has its own watch.

    :param venv: it may be a wrapper, whose infos are not kept
    """

    def __init__(self, venv: VecEnv) -> None:
        self._venv = venv
        self._step_whole, self._make_step, self._make_reset = venv.step, venv.step_wait, venv.reset
        self._keeps_infos = venv.unwrapped is venv and not isinstance(venv, BatchedVecEnv)
        self.infos = list(reset_infos(venv)) if self._keeps_infos else []
        self.obs: Any = None  # of the last step or reset; None: there was none since the watch began
        self.assumed: list[Any] = []  # what callers took for it as long as it was None
        self.may_miss_a_step = type(venv).step is not VecEnv.step  # see WatchOfOne
        venv.step_wait = self._step_wait  # type: ignore[method-assign]
        venv.reset = self._reset  # type: ignore[method-assign]
        if self.may_miss_a_step:  # it need not call step_wait()
            venv.step = self._step  # type: ignore[method-assign]

    def _step(self, actions: Any) -> Any:
        return self._noted(self._step_whole(actions))

    def _step_wait(self) -> Any:
        return self._noted(self._make_step())

    def _noted(self, result: Any) -> Any:
        self.obs, _, dones, infos = result
        resets = reset_infos(self._venv) if self._keeps_infos else []
        if resets:  # a VecEnv of one's own may keep none
            self.infos = [reset if done else info for reset, done, info in zip(resets, dones, infos, strict=True)]
        return result

    def _reset(self) -> Any:
        self.obs = self._make_reset()
        if self._keeps_infos:
            self.infos = list(reset_infos(self._venv))
        return self.obs


def present_info(env: gym.Env[Any, Any], info: dict[str, Any]) -> dict[str, Any]:
    """
    The info that belongs to an environment's current observation. From the first call on its steps and resets are
    watched.

    :param env: the environment
    :param info: the info that the caller kept; it may be older than a reset (``obs, _ = env.reset()``)
    """
    watch = watched_one(env)
    return info if watch.of_reset is None or info is not watch.of_step else watch.of_reset


def watched_one(env: gym.Env[Any, Any]) -> WatchOfOne:
    """
    The watch of an environment, which begins with the first call.

    :param env: it may be wrapped
    """
    watch = getattr(env.step, "__self__", None)
    return watch if isinstance(watch, WatchOfOne) else WatchOfOne(env)


class WatchOfOne:
    """
    Replaces ``step`` and ``reset`` of an environment, and remembers their observations and infos.

    :param env: it may be wrapped
    """

    may_miss_a_step = True  # in `env.step(model.predict(obs)[0])` the method is read before the watch begins

    def __init__(self, env: gym.Env[Any, Any]) -> None:
        self._make_step, self._make_reset = env.step, env.reset
        self.obs: Any = None  # of the last step or reset; None: there was none since the watch began
        self.assumed: list[Any] = []  # what callers took for it as long as it was None
        self.of_step: dict[str, Any] | None = None
        self.of_reset: dict[str, Any] | None = None  # that followed the step
        env.step = self._step  # type: ignore[method-assign]
        env.reset = self._reset  # type: ignore[method-assign]

    def _step(self, action: Any) -> Any:
        result = self._make_step(action)
        self.obs, self.of_step, self.of_reset = result[0], result[-1], None
        return result

    def _reset(self, **kwargs: Any) -> Any:
        result = self._make_reset(**kwargs)
        self.obs, self.of_reset = result
        return result
