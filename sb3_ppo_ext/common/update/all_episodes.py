"""The episodes of all processes that train one model, for baselines that are computed from the others of a batch."""

from __future__ import annotations

from typing import NamedTuple

import torch as th

from sb3_ppo_ext.common.rollout.data import RolloutSamples
from sb3_ppo_ext.common.rollout.episode_buffer import EpisodeIndex
from sb3_ppo_ext.common.update.reduce import Reducer, concatenated


class AllEpisodes(NamedTuple):
    """
    Samples of all processes that count, those of one process after the other.

    :param returns: shape ``(batch,)``
    :param values: of the critic, shape ``(batch,)``
    :param episode: number of the episode, from 0, shape ``(batch,)``
    :param step: number of the step in its episode, from 0, shape ``(batch,)``
    :param is_own: which are of this process, bool, shape ``(batch,)``
    """

    returns: th.Tensor
    values: th.Tensor
    episode: th.Tensor
    step: th.Tensor
    is_own: th.Tensor

    @classmethod
    def of(cls, rollout: RolloutSamples, index: EpisodeIndex, n_episodes: int, reducer: Reducer) -> AllEpisodes:
        """
        :param rollout: of this process
        :param index: where in its episode each sample is that counts
        :param n_episodes: of each process
        :param reducer: of the processes
        """
        returns, values = rollout.counted(rollout.returns), rollout.counted(rollout.old_values)
        numbers = index.episode + reducer.rank * n_episodes
        returns, values, episode, step = concatenated(reducer, returns, values, numbers, index.step)
        return cls(returns, values, episode, step, episode // n_episodes == reducer.rank)
