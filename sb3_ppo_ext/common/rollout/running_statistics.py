"""Running statistics of observations and returns, which several processes can combine."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch as th
from stable_baselines3.common.running_mean_std import RunningMeanStd
from stable_baselines3.common.vec_env import VecEnv, VecEnvWrapper, VecNormalize

from sb3_ppo_ext.common.rollout.normalization import RunningMoments
from sb3_ppo_ext.common.rollout.tensor_envs import TensorVecEnv


def running_statistics(env: VecEnv | None) -> list[RunningMeanStd]:
    """
    Copies of the statistics of all ``VecNormalize`` wrappers, and of a ``TensorVecEnv`` that normalises rewards.

    :param env: the training environment
    """
    return [place.copy() if isinstance(place, RunningMeanStd) else _as_sb3s(place) for place in _places(env)]


def set_running_statistics(env: VecEnv | None, statistics: Sequence[RunningMeanStd]) -> None:
    """
    Replace the statistics of the environments.

    :param env: the training environment
    :param statistics: as :func:`running_statistics` gives them; they are copied into the objects that are there
    """
    for place, new in zip(_places(env), statistics, strict=True):
        if isinstance(place, RunningMeanStd):
            place.mean, place.var, place.count = new.mean.copy(), new.var.copy(), new.count
        else:
            for name, buffer in place.named_buffers():
                buffer.copy_(th.as_tensor(getattr(new, name)))


def _as_sb3s(moments: RunningMoments) -> RunningMeanStd:
    statistics = RunningMeanStd(epsilon=moments.count.item(), shape=tuple(moments.mean.shape))
    statistics.mean, statistics.var = (tensor.double().cpu().numpy() for tensor in (moments.mean, moments.var))
    return statistics


def _places(env: VecEnv | None) -> list[RunningMeanStd | RunningMoments]:
    found: list[RunningMeanStd | RunningMoments] = []
    while isinstance(env, VecEnvWrapper):
        if isinstance(env, VecNormalize):
            of_obs = getattr(env, "obs_rms", None) or []
            found += [*(of_obs.values() if isinstance(of_obs, dict) else [of_obs] if of_obs else []), env.ret_rms]
        env = env.venv
    if isinstance(env, TensorVecEnv) and env.moments_of_returns is not None:
        found.append(env.moments_of_returns)
    return found


def added(before: RunningMeanStd, now: RunningMeanStd) -> RunningMeanStd | None:
    """
    The statistics of the data that was added between two moments: the update formula of ``RunningMeanStd``, solved for
    the added part.

    :param before: statistics at the first moment
    :param now: the same statistics later
    :return: None if nothing was added
    """
    n = now.count - before.count
    if n <= 0.0:
        return None
    part = RunningMeanStd(epsilon=n, shape=np.shape(now.mean))
    part.mean = before.mean + (now.mean - before.mean) * (now.count / n)
    squares = now.var * now.count - before.var * before.count
    squares -= np.square(part.mean - before.mean) * (before.count * n / now.count)
    part.var = np.maximum(squares / n, 0.0)
    return part


def put_together(before: RunningMeanStd, now: Sequence[RunningMeanStd]) -> RunningMeanStd:
    """
    Combine the statistics of several processes (Chan et al. 1979).

    :param before: the common statistics with which all processes began
    :param now: the statistics of each process
    """
    total = before.copy()
    for of_process in now:
        part = added(before, of_process)
        if part is not None:
            total.combine(part)
    return total
