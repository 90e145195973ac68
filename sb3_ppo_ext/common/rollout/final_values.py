"""The values of the observations that episodes ended with which a time limit has cut."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch as th

from sb3_ppo_ext.common.rollout.actor_critic import ActorCritic
from sb3_ppo_ext.common.rollout.data import PolicyInput, chunks
from sb3_ppo_ext.common.rollout.failures import raise_if_final_not_finite


class FinalValues:
    """
    The values of the final observations of a rollout's truncated episodes.

    :param actor_critic: that collects the rollout. If it is pure, the observations are evaluated together, after the
        rollout; if not, each when it comes, as SB3 does it
    """

    def __init__(self, actor_critic: ActorCritic) -> None:
        self.actor_critic = actor_critic
        self._states: list[th.Tensor | None] = []
        self._steps: list[int] = []
        self._env_indices: list[int] = []
        self._final_obs: list[Any] = []
        self._values: list[np.ndarray] = []

    def __len__(self) -> int:
        return len(self._steps)

    def add(self, step: int, env_index: int, final_obs: Any, state: th.Tensor | None = None) -> None:
        """
        :param step: of the rollout, in which the episode was cut
        :param env_index: number of the environment
        :param final_obs: as the environment gave it, which may write its next one into the same arrays
        :param state: what the policy remembers before it, shape ``(n_state,)``; None: it has no memory
        """
        self._steps.append(step)
        self._env_indices.append(env_index)
        self._states.append(state)
        is_dict = isinstance(final_obs, dict)
        self._final_obs.append({k: np.array(x) for k, x in final_obs.items()} if is_dict else np.array(final_obs))
        if not self.actor_critic.is_pure:
            self.evaluate()

    def evaluate(self) -> None:
        """Evaluate the final observations that have not been evaluated yet."""
        first = sum(map(len, self._values))
        for rows in chunks(len(self) - first, self.actor_critic.policy.observation_space):
            some = slice(first + rows.start, first + rows.stop)
            self._values.append(self._evaluated(self._final_obs[some], some.start))

    def evaluate_again(self, actor_critic: ActorCritic) -> None:
        """
        Evaluate all of them by another policy, or by other parameters.

        :param actor_critic: the policy
        """
        self.actor_critic = actor_critic
        self._values = []
        self.evaluate()

    def write_into(self, final_values: np.ndarray) -> None:
        """
        :param final_values: of a rollout, shape ``(n_steps, n_envs)``
        """
        if self._values:
            final_values[self._steps, self._env_indices] = np.concatenate(self._values)

    @th.no_grad()
    def _evaluated(self, final_obs: list[Any], first: int) -> np.ndarray:
        if isinstance(final_obs[0], dict):
            stacked: Any = {key: np.stack([obs[key] for obs in final_obs]) for key in final_obs[0]}
        else:
            stacked = np.stack(final_obs)
        policy = self.actor_critic.policy
        inputs = PolicyInput(policy.obs_to_tensor(stacked)[0])
        states = [state for state in self._states[first : first + len(final_obs)] if state is not None]
        if states:
            inputs = inputs._replace(state=th.stack(states), starts=th.zeros(len(states), device=policy.device))
        values: np.ndarray = self.actor_critic.values(inputs).cpu().numpy()
        raise_if_final_not_finite(values, stacked, self._steps[first:], self._env_indices[first:])
        return values
