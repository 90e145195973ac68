"""The running statistics of ``VecNormalize``, put together where several processes have added to the same ones."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from stable_baselines3.common.running_mean_std import RunningMeanStd
from stable_baselines3.common.vec_env import VecEnv, VecEnvWrapper, VecNormalize


def running_statistics(env: VecEnv | None) -> list[RunningMeanStd]:
    """
    Those of all ``VecNormalize`` around the environments.

    :param env: the training environment
    """
    found: list[RunningMeanStd] = []
    while isinstance(env, VecEnvWrapper):
        if isinstance(env, VecNormalize):
            of_obs = getattr(env, "obs_rms", None) or []
            found += [*(of_obs.values() if isinstance(of_obs, dict) else [of_obs] if of_obs else []), env.ret_rms]
        env = env.venv
    return found


def added(before: RunningMeanStd, now: RunningMeanStd) -> RunningMeanStd | None:
    """
    The statistics of what was added meanwhile: the formula by which ``RunningMeanStd`` adds, solved for the part.

    :param before: statistics
    :param now: the same, later
    :return: None if nothing was
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
    Statistics of all that several processes have seen (Chan et al. 1979).

    :param before: what all of them had
    :param now: what each of them has
    """
    total = before.copy()
    for of_process in now:
        part = added(before, of_process)
        if part is not None:
            total.combine(part)
    return total


def write_into(place: RunningMeanStd, statistics: RunningMeanStd) -> None:
    """
    :param place: changed, as others hold it
    :param statistics: that it shall be
    """
    place.mean, place.var, place.count = statistics.mean.copy(), statistics.var.copy(), statistics.count
