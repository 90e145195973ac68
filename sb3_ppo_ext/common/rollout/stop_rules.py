"""When a rollout ends: after a number of steps, or after a number of episodes."""

from __future__ import annotations

from typing import Protocol

import numpy as np

from sb3_ppo_ext.common.rollout.buffers import RolloutBuffer
from sb3_ppo_ext.common.rollout.episode_buffer import EpisodeBuffer


class StopRule(Protocol):
    """When a rollout ends."""

    @property
    def counted(self) -> np.ndarray | None:
        """Whether the current episode of each environment counts, bool, shape ``(n_envs,)``; None: all count."""
        ...

    def is_complete(self, n_steps: int, dones: np.ndarray, counts: np.ndarray | None = None) -> bool:
        """
        Whether to end the rollout, asked after each step.

        :param n_steps: steps taken in each environment
        :param dones: whether the last step ended an episode, shape ``(n_envs,)``
        :param counts: False where the step only reset the environment, shape ``(n_envs,)``; None: all steps count
        """
        ...

    def close(self, rollout_buffer: RolloutBuffer) -> None:
        """
        Called once the rollout is complete, before it is evaluated.

        :param rollout_buffer: that holds it
        """
        ...


class AfterSteps:
    """
    Ends a rollout after a fixed number of steps, usually in the middle of episodes.

    :param n_steps: of each environment
    """

    counted = None

    def __init__(self, n_steps: int) -> None:
        self._n_steps = n_steps

    def is_complete(self, n_steps: int, dones: np.ndarray, counts: np.ndarray | None = None) -> bool:
        return n_steps >= self._n_steps

    def close(self, rollout_buffer: RolloutBuffer) -> None:
        pass


class AfterEpisodes:
    """
    Ends a rollout when each environment has completed a fixed number of episodes. The rest of an episode that began
    before the rollout does not count, nor do the steps of an environment that waits for others.

    :param episodes_per_env: episodes to complete
    :param episode_starts: whether each environment is about to begin an episode, bool, shape ``(n_envs,)``
    :param episode_lengths: steps so far of each environment's episode, shape ``(n_envs,)``, updated in place
    :param max_episode_steps: raise an error if an awaited episode is still running after so many steps
    :param limit_in_words: the limit and where it comes from, for the error message
    """

    is_closed = False
    """Whether the rollout was complete."""

    def __init__(
        self,
        episodes_per_env: int,
        episode_starts: np.ndarray,
        episode_lengths: np.ndarray,
        *,
        max_episode_steps: int,
        limit_in_words: str,
    ) -> None:
        self._episodes_per_env = episodes_per_env
        self._completed = np.where(episode_starts, 0, -1)  # -1: the rest of an earlier episode comes first
        self._episode_lengths = episode_lengths
        self._max_episode_steps = max_episode_steps
        self._limit_in_words = limit_in_words

    @property
    def counted(self) -> np.ndarray:
        # Others would bias the logs: a waiting environment ends short episodes, and interrupted episodes are long.
        counted: np.ndarray = (self._completed >= 0) & (self._completed < self._episodes_per_env)
        return counted

    def count(self, dones: np.ndarray, counts: np.ndarray | None = None) -> None:
        """
        Count a step.

        :param dones: whether the step ended an episode, shape ``(n_envs,)``
        :param counts: False where the step only reset the environment, shape ``(n_envs,)``; None: all steps count
        """
        self._episode_lengths += 1
        self._episode_lengths[dones] = 0
        self._completed += dones if counts is None else dones & counts

    def is_complete(self, n_steps: int, dones: np.ndarray, counts: np.ndarray | None = None) -> bool:
        self.count(dones, counts)
        is_awaited = self._completed < self._episodes_per_env
        if (self._episode_lengths[is_awaited] >= self._max_episode_steps).any():
            raise ValueError(
                f"An episode has not ended within {self._limit_in_words}. REINFORCE learns from complete episodes: "
                "give the environment a time limit (gymnasium.wrappers.TimeLimit, or gymnasium.make(..., "
                "max_episode_steps=...)), or give REINFORCE a larger max_episode_steps if they are that long"
            )
        return not is_awaited.any()

    def close(self, rollout_buffer: RolloutBuffer) -> None:
        assert isinstance(rollout_buffer, EpisodeBuffer)
        self.is_closed = True
        rollout_buffer.close(self._episodes_per_env)
