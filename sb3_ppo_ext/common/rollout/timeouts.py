"""Episodes that a time limit has cut, and the values of what they ended with."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch as th
from stable_baselines3.common.buffers import RolloutBuffer

from sb3_ppo_ext.common.rollout.actor_critic import ActorCritic
from sb3_ppo_ext.common.rollout.failures import raise_if_final_not_finite


class Timeouts:
    """
    The final observations of the episodes of a rollout that a time limit has cut.

    :param actor_critic: that collects the rollout. If it is pure, the observations are evaluated together, after the
        rollout; if not, each when it comes, as SB3 does it
    :param rollout_buffer: of the rollout
    """

    def __init__(self, actor_critic: ActorCritic, rollout_buffer: RolloutBuffer) -> None:
        self.actor_critic = actor_critic
        self._rollout_buffer = rollout_buffer
        self._steps: list[int] = []
        self._env_indices: list[int] = []
        self._final_obs: list[Any] = []
        self._values: list[np.ndarray] = []

    def __len__(self) -> int:
        return len(self._steps)

    def add(self, step: int, env_index: int, final_obs: Any) -> None:
        """
        :param step: of the rollout, in which the episode was cut
        :param env_index: number of the environment
        :param final_obs: as the environment gave it, which may write its next one into the same arrays
        """
        self._steps.append(step)
        self._env_indices.append(env_index)
        if self.actor_critic.is_pure:
            is_dict = isinstance(final_obs, dict)
            self._final_obs.append({k: np.array(x) for k, x in final_obs.items()} if is_dict else np.array(final_obs))
        else:
            self._values.append(self._evaluated([final_obs], len(self) - 1))

    def evaluate(self, chunks: Callable[[int], Iterable[slice]]) -> None:
        """
        Evaluate the final observations that have not been evaluated yet.

        :param chunks: cuts so many observations into ranges, to be evaluated together
        """
        first = len(self) - len(self._final_obs)
        for chunk in chunks(len(self._final_obs)):
            self._values.append(self._evaluated(self._final_obs[chunk], first + chunk.start))
        self._final_obs = []

    def bootstrap(self, gamma: float) -> None:
        """
        Add the discounted value of the final observation to the last reward of each of the episodes.

        :param gamma: discount factor
        """
        if self._values:
            self._rollout_buffer.rewards[self._steps, self._env_indices] += gamma * np.concatenate(self._values)

    @th.no_grad()
    def _evaluated(self, final_obs: list[Any], first: int) -> np.ndarray:
        if isinstance(final_obs[0], dict):
            stacked: Any = {key: np.stack([obs[key] for obs in final_obs]) for key in final_obs[0]}
        else:
            stacked = np.stack(final_obs)
        policy = self.actor_critic.policy
        values: np.ndarray = self.actor_critic.values(policy.obs_to_tensor(stacked)[0]).cpu().numpy()
        raise_if_final_not_finite(values, stacked, self._steps[first:], self._env_indices[first:])
        return values
