"""A rollout of complete episodes, so many from each environment."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch as th

from sb3_ppo_ext.common.buffers import DictRolloutBuffer, RolloutBuffer, RolloutSamples, take


class EpisodeIndex(NamedTuple):
    """
    Where in its episode each sample is.

    :param episode: number of the episode, from 0, shape ``(batch,)``
    :param step: number of the step in its episode, from 0, shape ``(batch,)``
    """

    episode: th.Tensor
    step: th.Tensor


class EpisodeBuffer(RolloutBuffer):
    """
    A rollout buffer that grows until it is told to :meth:`close`. Takes the arguments of SB3's; ``buffer_size`` is
    where it starts.

    An environment that is done with its episodes steps on until the last one is; :meth:`flat` and :meth:`get` leave
    those steps out.
    """

    def add_transition(self, obs: Any, action: np.ndarray, reward: np.ndarray, episode_start: np.ndarray) -> None:
        if self.pos == self.buffer_size:
            self._resize(2 * self.buffer_size)
        super().add_transition(obs, action, reward, episode_start)

    def close(self, episodes_per_env: int) -> None:
        """
        End the rollout: the buffer is full, and as long as what it holds.

        :param episodes_per_env: complete episodes of each environment; what follows them does not count
        """
        self._resize(self.pos)
        self.full = True
        self.episodes_per_env = episodes_per_env

    def _resize(self, n_steps: int) -> None:
        def resized(array: np.ndarray) -> np.ndarray:
            result = np.zeros((n_steps, *array.shape[1:]), dtype=array.dtype)
            kept = min(n_steps, len(array))
            result[:kept] = array[:kept]
            return result

        if isinstance(self.observations, dict):
            self.observations = {key: resized(array) for key, array in self.observations.items()}
        else:
            self.observations = resized(self.observations)
        self.actions = resized(self.actions)
        self.rewards = resized(self.rewards)
        self.episode_starts = resized(self.episode_starts)
        self.buffer_size = n_steps

    def _episode_index(self) -> tuple[np.ndarray, np.ndarray]:
        """Number of the episode within its environment, and of the step within its episode: ``(n_steps, n_envs)``."""
        episode = np.cumsum(self.episode_starts, axis=0).astype(np.int64) - 1
        now = np.arange(self.buffer_size)[:, None]
        started = np.maximum.accumulate(np.where(self.episode_starts > 0, now, 0), axis=0)
        return episode, now - started

    def episode_index(self) -> EpisodeIndex:
        """Where in its episode each sample of :meth:`flat` is, in the same order."""
        episode, step = self._episode_index()
        numbers = episode + self.episodes_per_env * np.arange(self.n_envs)
        counts = self._counts(episode)
        return EpisodeIndex(self._to_flat(numbers).flatten()[counts], self._to_flat(step).flatten()[counts])

    def _counts(self, episode: np.ndarray) -> th.Tensor:
        return self._to_flat(episode < self.episodes_per_env).flatten()

    def flat(self) -> RolloutSamples:
        if self._flat is None:
            self._flat = take(super().flat(), self._counts(self._episode_index()[0]))
        return self._flat


class DictEpisodeBuffer(EpisodeBuffer, DictRolloutBuffer):  # type: ignore[misc]
    """:class:`EpisodeBuffer` for Dict observations."""
