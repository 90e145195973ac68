"""The values of the observations that episodes ended with which a time limit has cut."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch as th

from sb3_ppo_ext.common.rollout.actor_critic import ActorCritic
from sb3_ppo_ext.common.rollout.data import PolicyInput, chunks, rows_of
from sb3_ppo_ext.common.rollout.failures import raise_if_final_not_finite


class FinalValues:
    """
    The values of the final observations of a rollout's truncated episodes.

    :param actor_critic: that collects the rollout. If it is pure, the observations are evaluated together, after the
        rollout; if not, each when it comes, as SB3 does it
    """

    def __init__(self, actor_critic: ActorCritic) -> None:
        self.actor_critic = actor_critic
        self._states: list[th.Tensor] = []
        self._steps: list[int] = []
        self._env_indices: list[int] = []
        self._final_obs: list[Any] = []  # as they came, one or several at a time
        self._n_evaluated = 0  # of these
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
        is_dict = isinstance(final_obs, dict)
        row = {k: np.array(x)[None] for k, x in final_obs.items()} if is_dict else np.array(final_obs)[None]
        self.add_rows(step, [env_index], row, None if state is None else state[None])

    def add_rows(self, step: int, env_indices: Sequence[int], final_obs: Any, states: th.Tensor | None = None) -> None:
        """
        :param step: of the rollout, in which the episodes were cut
        :param env_indices: numbers of the environments
        :param final_obs: one row for each of them, shape ``(n, *obs_shape)`` or a dict of such, to be kept
        :param states: what the policy remembers before them, shape ``(n, n_state)``; None: it has no memory
        """
        self._steps += [step] * len(env_indices)
        self._env_indices += [int(index) for index in env_indices]
        if states is not None:
            self._states += states
        self._final_obs.append(final_obs)
        if not self.actor_critic.is_pure:
            self.evaluate()

    def evaluate(self) -> None:
        """Evaluate the final observations that have not been evaluated yet."""
        all_obs: Any = self._final_obs[self._n_evaluated :]
        if not all_obs:
            return
        first = sum(map(len, self._values))
        space = self.actor_critic.policy.observation_space
        if isinstance(all_obs[0], dict):
            all_obs = {key: np.concatenate([obs[key] for obs in all_obs]) for key in all_obs[0]}
        else:
            all_obs = np.concatenate(all_obs)
        for rows in chunks(len(self) - first, space):
            self._values.append(self._evaluated(rows_of(all_obs, rows), first + rows.start))
        self._n_evaluated = len(self._final_obs)

    def evaluate_again(self, actor_critic: ActorCritic) -> None:
        """
        Evaluate all of them by another policy, or by other parameters.

        :param actor_critic: the policy
        """
        self.actor_critic = actor_critic
        self._values, self._n_evaluated = [], 0
        self.evaluate()

    def write_into(self, final_values: np.ndarray) -> None:
        """
        :param final_values: of a rollout, shape ``(n_steps, n_envs)``
        """
        if self._values:
            final_values[self._steps, self._env_indices] = np.concatenate(self._values)

    @th.no_grad()
    def _evaluated(self, final_obs: Any, first: int) -> np.ndarray:
        policy = self.actor_critic.policy
        inputs = PolicyInput(policy.obs_to_tensor(final_obs)[0])
        n_rows = inputs.n_rows
        if self._states:
            states = th.stack(self._states[first : first + n_rows])
            inputs = inputs._replace(state=states, starts=th.zeros(n_rows, device=policy.device))
        values: np.ndarray = self.actor_critic.values(inputs).cpu().numpy()
        raise_if_final_not_finite(values, final_obs, self._steps[first:], self._env_indices[first:])
        return values
