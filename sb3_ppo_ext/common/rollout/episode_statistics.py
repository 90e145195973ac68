"""Returns and lengths of the episodes of many environments, kept in arrays."""

from __future__ import annotations

import time
from typing import Any

import numpy as np

from sb3_ppo_ext.common.rollout.transitions import Episodes


class EpisodeStatistics:
    """
    Records returns and lengths of episodes, as ``Monitor`` does for one environment. Statistics of the environments
    themselves (wrapped in ``RecordEpisodeStatistics`` or ``Monitor``) take precedence.

    :param n_envs: number of environments
    :param reads_theirs: whether the environments' own statistics can be relied on
    """

    def __init__(self, n_envs: int, *, reads_theirs: bool) -> None:
        self._start = time.time()
        self._reads_theirs = reads_theirs
        self.returns = np.zeros(n_envs)
        self.lengths = np.zeros(n_envs, dtype=np.int64)

    def forget(self) -> None:
        """Start all episodes from zero."""
        self.returns[:] = 0.0
        self.lengths[:] = 0

    def after(
        self, rewards: np.ndarray, counts: np.ndarray | None, ends: np.ndarray, infos: dict[str, Any]
    ) -> Episodes | None:
        """
        Count a step.

        :param rewards: shape ``(n_envs,)``
        :param counts: False where the step only reset the environment, shape ``(n_envs,)``; None: all steps count
        :param ends: whether the step ended an episode, bool, shape ``(n_envs,)``
        :param infos: of the environments whose episodes ended, as arrays
        :return: the episodes that the step ended; None if there are none
        """
        if counts is None:
            self.returns += rewards
            self.lengths += 1
        else:
            self.returns += np.where(counts, rewards, 0.0)
            self.lengths += counts
        if not ends.any():
            return None
        rows = np.flatnonzero(ends)
        theirs = infos.get("episode") if self._reads_theirs else None
        if isinstance(theirs, dict) and "r" in theirs and "l" in theirs:
            rows = np.flatnonzero(ends & infos.get("_episode", True))
            returns, lengths = (np.asarray(theirs[name])[rows] for name in ("r", "l"))
        else:
            returns, lengths = self.returns[rows], self.lengths[rows]
        self.returns[ends] = 0.0
        self.lengths[ends] = 0
        successes = infos.get("is_success")
        if successes is not None:
            says = np.broadcast_to(infos.get("_is_success", True), ends.shape)
            successes = np.where(says, successes, None)[rows]
        return Episodes(rows, returns, lengths, np.full(len(rows), time.time() - self._start), successes)
