"""What went wrong while a rollout was collected, in words."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch as th
from stable_baselines3.common.vec_env import VecEnv

from sb3_ppo_ext.common.buffers import RolloutBuffer
from sb3_ppo_ext.common.optimization import NonFiniteError


def explained(error: Exception, env: VecEnv, obs: Any) -> Exception | None:
    """
    :param error: raised while a rollout was collected
    :param env: the training environment
    :param obs: that were acted on
    :return: an error that says more, to be raised from it; None if it says enough itself
    """
    if isinstance(error, (EOFError, ConnectionError)):
        ended = _ended_workers(env)
        if ended:
            return RuntimeError(
                f"Worker processes of the environment have ended: {ended}. A negative exit code is the signal that "
                "killed it, -9 often for want of memory. The model is as it was before this rollout: make the "
                "environment anew, give it to set_env() and go on"
            )
    where = _not_finite(obs, axes=("environment",))
    if where and not isinstance(error, NonFiniteError):
        return NonFiniteError(_observations(where))
    return None


def raise_if_observations_not_finite(rollout_buffer: RolloutBuffer, last_values: th.Tensor, last_obs: Any) -> None:
    """
    An observation may be what it likes as long as the policy makes something finite of it.

    :param rollout_buffer: filled and evaluated
    :param last_values: values of the observations after the last step
    :param last_obs: those observations
    :raises NonFiniteError: if values or log-probabilities are not finite and an observation is not, saying which
    """
    results = (rollout_buffer.values, rollout_buffer.log_probs, last_values.cpu().numpy())
    if all(np.isfinite(result).all() for result in results):
        return
    where = _not_finite(rollout_buffer.observations, axes=("step", "environment"))
    where = where or _not_finite(last_obs, axes=("environment",))
    if where:
        raise NonFiniteError(_observations(where))


def _observations(where: str) -> str:
    return (
        f"Observations are not finite, first {where} of the rollout. The update was not made: the parameters are as "
        "they were before it, and the environments will be reset. VecCheckNan of Stable-Baselines3 finds the step that "
        "made them"
    )


def _not_finite(obs: Any, axes: tuple[str, ...]) -> str | None:
    """Where the first number is that is NaN or infinite; None if there is none."""
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
