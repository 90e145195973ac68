"""What the environments of a vector said last, of which a vector itself keeps no more than what they said at resets."""

from __future__ import annotations

from typing import Any

from stable_baselines3.common.vec_env import VecEnv


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
    :return: one info an environment
    """
    venv = env.unwrapped
    watch = getattr(venv.step_wait, "__self__", None)
    if not isinstance(watch, _Watch):
        watch = _Watch(venv)
    return watch.infos


class _Watch:
    """
    Stands in the place of two methods of a vector, and remembers what they yield. A copy of the vector has its own.

    :param venv: not wrapped
    """

    def __init__(self, venv: VecEnv) -> None:
        self._venv = venv
        self._make_step, self._make_reset = venv.step_wait, venv.reset
        self.infos = list(reset_infos(venv))
        venv.step_wait = self._step_wait  # type: ignore[method-assign]
        venv.reset = self._reset  # type: ignore[method-assign]

    def _step_wait(self) -> Any:
        result = self._make_step()
        *_, dones, infos = result
        resets = reset_infos(self._venv)
        self.infos = [reset if done else info for reset, done, info in zip(resets, dones, infos, strict=True)]
        return result

    def _reset(self) -> Any:
        obs = self._make_reset()
        self.infos = list(reset_infos(self._venv))
        return obs
