"""A rollout of complete episodes, the same number from each environment."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch as th

from sb3_ppo_ext.common.rollout.buffers import DictRolloutBuffer, RolloutBuffer
from sb3_ppo_ext.common.rollout.data import RolloutSamples


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
    A rollout buffer that grows until :meth:`close` is called. The arguments are those of SB3's buffer; ``buffer_size``
    is the initial size.

    A rollout may begin in the middle of an environment's episode, and an environment that has completed its episodes
    is stepped until the slowest one has too; :meth:`flat` and :meth:`get` leave these steps out.
    """

    def add_observation(self, obs: Any, episode_start: np.ndarray) -> None:
        if self.pos == self.buffer_size:
            self._resize(2 * self.buffer_size)
        super().add_observation(obs, episode_start)

    def close(self, episodes_per_env: int) -> None:
        """
        End the rollout: mark the buffer as full and cut it to the steps it holds.

        :param episodes_per_env: complete episodes of each environment, from the first that begins in the rollout on;
            the steps before and after them do not count
        """
        self._resize(self.pos)
        self.full = True
        # Episode number within the environment; -1 for an episode that began before the rollout.
        starts = self.episode_starts > 0 if self.counts is None else (self.episode_starts > 0) & self.counts
        episode = np.cumsum(starts, axis=0) - 1
        now = np.arange(self.buffer_size)[:, None]
        started = np.maximum.accumulate(np.where(starts, now, 0), axis=0)
        numbers = episode + episodes_per_env * np.arange(self.n_envs)
        counts = (episode >= 0) & (episode < episodes_per_env)
        self._counts = self._to_flat(counts if self.counts is None else counts & self.counts).flatten()
        self._index = EpisodeIndex(
            self._to_flat(numbers).flatten()[self._counts], self._to_flat(now - started).flatten()[self._counts]
        )

    def _resize(self, n_steps: int) -> None:
        """Change the length of the arrays that are filled at each step; the evaluation replaces the others."""

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
        if self.action_masks is not None:
            self.action_masks = resized(self.action_masks)
        if self.counts is not None:
            self.counts = resized(self.counts)
        states, self.states = self.states, None
        self.truncated, self.final_values = resized(self.truncated), resized(self.final_values)
        self.distribution_params = resized(self.distribution_params)  # a custom policy may not set them
        self.buffer_size = n_steps
        if states is not None:
            n_steps = -(-n_steps // self.sequence_length)
            self.states = resized(states)

    def episode_index(self) -> EpisodeIndex:
        """Where in its episode each sample of :meth:`flat` is, in the same order."""
        return self._index

    def flat(self) -> RolloutSamples:
        """
        The samples of the complete episodes, one episode after the other. For a recurrent policy, all sequences that
        contain some of them, with a mask of these samples; the last sequence of an environment is padded with its last
        sample.
        """
        if self._flat is None:
            whole = self._whole()
            self._flat = whole.rows(self._counts) if whole.states is None else self._sequences(whole)
        return self._flat

    def _sequences(self, whole: RolloutSamples) -> RolloutSamples:
        assert whole.states is not None
        n_missing = -self.buffer_size % self.sequence_length
        steps = th.arange(self.buffer_size + n_missing, device=self._counts.device).clamp(max=self.buffer_size - 1)

        def padded(part: Any) -> Any:
            if part is None:
                return None
            if isinstance(part, dict):
                return {key: padded(tensor) for key, tensor in part.items()}
            return part.view(self.n_envs, -1, *part.shape[1:])[:, steps].flatten(0, 1)

        samples = RolloutSamples(*map(padded, whole._replace(states=None, mask=self._counts)))
        assert samples.mask is not None
        samples.mask.view(self.n_envs, -1)[:, self.buffer_size :] = False
        counts = samples.mask.view(-1, self.sequence_length).any(dim=1)
        return samples._replace(states=whole.states).rows(counts)


class DictEpisodeBuffer(EpisodeBuffer, DictRolloutBuffer):  # type: ignore[misc]
    """:class:`EpisodeBuffer` for Dict observations."""
