"""Explain errors that occur while a rollout is collected."""

from __future__ import annotations

import math
import traceback
from collections.abc import Iterator
from typing import Any

import numpy as np
from gymnasium import spaces
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv

from sb3_ppo_ext.common.errors import NonFiniteError
from sb3_ppo_ext.common.rollout.data import to_arrays
from sb3_ppo_ext.common.rollout.tensor_buffer import TensorRolloutBuffer


def explained(error: Exception, env: VecEnv, obs: Any) -> Exception | None:
    """
    Find the cause of an error. An error that a callback raised is left alone. If the error may have another cause than
    the one found here, it only gets a note.

    :param error: raised while a rollout was collected or the environments were reset for it; a note may be added to it
    :param env: the training environment
    :param obs: the last observations that the policy acted on; None if there are none yet
    :return: a more informative error to raise from it; None if the original error is to be raised
    """
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    codes = [frame.f_code for frame in frames]
    if any(isinstance(frame.f_locals.get("self"), BaseCallback) for frame in frames):
        return None
    if isinstance(error, (EOFError, ConnectionError)):
        ended = _ended_workers(env)
        if ended:
            return RuntimeError(
                f"Worker processes of the environment have ended: {ended}. A negative exit code is the signal that "
                "killed it; -9 often means that memory ran out. The model is as it was before this rollout: create "
                "the environment again, pass it to set_env() and go on"
            )
    misshapen = _refused_observation(error)
    if misshapen:
        return ValueError(misshapen)
    if isinstance(error, NonFiniteError):
        return None
    misshapen = _misshapen_batch(obs, env)
    if misshapen:
        if type(error) in _ERRORS_OF_TORCH and not any(code in _VEC_ENV_CODES for code in codes):
            return ValueError(misshapen)
        _add_note(error, misshapen)
    where = _not_finite(obs, axes=("environment",))
    if where:
        message = _not_finite_message({"Observations": where})
        if type(error) in _ERRORS_OF_TORCH and any("torch/distributions" in code.co_filename for code in codes):
            return NonFiniteError(message)
        _add_note(error, message)
    return None


_ERRORS_OF_TORCH = (RuntimeError, ValueError, IndexError, TypeError)
_VEC_ENV_CODES = {VecEnv.step.__code__}


def _add_note(error: Exception, note: str) -> None:
    if hasattr(error, "add_note"):
        error.add_note(note)
    else:  # before Python 3.11, which shows them
        vars(error).setdefault("__notes__", []).append(note)


def raise_if_rollout_not_finite(rollout_buffer: RolloutBuffer, of_values: Any, last_obs: Any) -> None:
    """
    Check that rewards are finite. Observations may hold anything as long as values and log-probabilities are finite.

    :param rollout_buffer: filled and evaluated
    :param of_values: computed from the values, including those of the observations after the last step
    :param last_obs: the observations after the last step
    :raises NonFiniteError: if a reward is not finite, or if a value or log-probability is not finite and an observation
        is not either, naming the first
    """
    if isinstance(rollout_buffer, TensorRolloutBuffer) and rollout_buffer.is_finite():
        results: tuple[Any, ...] = (to_arrays(of_values),)
    else:
        results = (rollout_buffer.rewards, rollout_buffer.values, rollout_buffer.log_probs, to_arrays(of_values))
    # A custom buffer may hold them in other types.
    if all(np.isfinite(result).all() for result in results if isinstance(result, np.ndarray)):
        return
    obs = _not_finite(rollout_buffer.observations, axes=("step", "environment"))
    found = {
        "Observations": obs or _not_finite(to_arrays(last_obs), axes=("environment",)),
        "Rewards": _not_finite(rollout_buffer.rewards, axes=("step", "environment")),
    }
    if any(found.values()):
        raise NonFiniteError(_not_finite_message(found))


def raise_if_final_not_finite(values: np.ndarray, final_obs: Any, steps: np.ndarray, env_indices: np.ndarray) -> None:
    """
    :param values: of final observations
    :param final_obs: the final observations, stacked
    :param steps: the step of each
    :param env_indices: the environment of each
    :raises NonFiniteError: if a value and its observation are both not finite, naming the observation
    """
    for i in np.flatnonzero(~np.isfinite(values)).tolist():
        one = {key: array[i] for key, array in final_obs.items()} if isinstance(final_obs, dict) else final_obs[i]
        if _not_finite(one, axes=()) is not None:
            where = f"in what an episode ended with in step {steps[i]}, environment {env_indices[i]}"
            raise NonFiniteError(_not_finite_message({"Observations": where}))


def raise_if_misshapen(obs: Any, space: spaces.Space[Any], env_index: int) -> None:
    """
    Check the size of an observation: numpy silently broadcasts one number to four, and so does SB3's ``DummyVecEnv``.

    :param obs: as an environment returned it
    :param space: of its observations
    :param env_index: number of the environment
    :raises ValueError: if the sizes differ, naming the shapes
    """
    for key, shape, expected in _shapes(obs, space):
        if math.prod(shape) != math.prod(expected):
            raise ValueError(_misshapen(key, f"Environment {env_index}", shape, expected))


def _shapes(obs: Any, space: spaces.Space[Any]) -> Iterator[tuple[str | None, tuple[int, ...], tuple[int, ...]]]:
    """The shape of each part of an observation that is an array, and that of its space."""
    parts: Any = [(None, obs, space)]
    if isinstance(space, spaces.Dict):
        parts = [(key, obs.get(key), part) for key, part in space.spaces.items()] if isinstance(obs, dict) else []
    for key, part, part_space in parts:
        shape = getattr(part, "shape", None)
        if shape is not None and part_space.shape is not None:
            yield key, tuple(shape), part_space.shape


def _misshapen(key: str | None, who: str, shape: tuple[int, ...], expected: tuple[int, ...]) -> str:
    of_key = "" if key is None else f" for {key!r}"
    return f"{who} returned an observation of shape {shape}{of_key}, and its observation space is of shape {expected}"


def _refused_observation(error: Exception) -> str | None:
    """If one of SB3's VecEnvs failed to stack observations: a sentence about the one with the wrong shape."""
    for frame, _ in traceback.walk_tb(error.__traceback__):
        local = dict(frame.f_locals)  # no dict in Python 3.13
        if frame.f_code is DummyVecEnv._save_obs.__code__:
            given, space = {local["env_idx"]: local["obs"]}, local["self"].observation_space
        elif frame.f_code.co_name == "_stack_obs" and {"obs_list", "space"} <= local.keys():  # of SubprocVecEnv
            given, space = dict(enumerate(local["obs_list"])), local["space"]
        else:
            continue
        for index, obs in given.items():
            for key, shape, expected in _shapes(obs, space):
                if shape != expected:
                    return _misshapen(key, f"Environment {index}", shape, expected)
    return None


def _misshapen_batch(obs: Any, env: VecEnv) -> str | None:
    """A sentence about a wrong shape that all environments share, which some VecEnvs do not refuse."""
    for key, shape, expected in _shapes(obs, env.observation_space):
        if math.prod(shape[1:]) != math.prod(expected):
            return _misshapen(key, "Each environment", shape[1:], expected)
    return None


def _not_finite_message(found: dict[str, str | None]) -> str:
    what = "; ".join(f"{name} are not finite, first {where}" for name, where in found.items() if where)
    return (
        f"{what} of the rollout. The update was not made: the parameters are as they were before it, and the "
        "environments will be reset. VecCheckNan of Stable-Baselines3 finds the step that made them"
    )


def _not_finite(obs: Any, axes: tuple[str, ...]) -> str | None:
    """The place of the first number that is NaN or infinite; None if there is none."""
    for key, array in obs.items() if isinstance(obs, dict) else [(None, obs)]:
        if np.issubdtype(np.asarray(array).dtype, np.floating):
            rows = np.argwhere(~np.isfinite(array))
            if len(rows):
                place = ", ".join(f"{axis} {i}" for axis, i in zip(axes, rows[0], strict=False))
                return f"in {place}" if key is None else f"of {key!r} in {place}"
    return None


def _ended_workers(env: VecEnv) -> str:
    ended = []
    for i, process in enumerate(getattr(env.unwrapped, "processes", [])):
        process.join(timeout=1.0)  # its pipe closes a moment before it ends
        if not process.is_alive():
            ended.append(f"number {i} (exit code {process.exitcode})")
    return ", ".join(ended)
