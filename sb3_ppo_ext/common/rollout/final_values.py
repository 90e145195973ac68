"""The values of the final observations of episodes that a time limit has cut."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch as th

from sb3_ppo_ext.common.rollout.actor_critic import ActorCritic
from sb3_ppo_ext.common.rollout.buffers import RolloutBuffer
from sb3_ppo_ext.common.rollout.data import PolicyInput, chunks, is_tensors, rows_of, to_arrays, to_tensors
from sb3_ppo_ext.common.rollout.failures import raise_if_final_not_finite


class FinalValues:
    """
    The final observations of a rollout's truncated episodes, and their values.

    It is kept with the rollout, which must be copyable. A compiled policy is not, so it holds no policy.
    """

    def __init__(self) -> None:
        self._states: list[th.Tensor] = []
        self._steps: list[int] = []  # one for each of the following
        self._env_indices: list[Any] = []
        self._final_obs: list[Any] = []  # as they came, one or several at a time
        self._n_evaluated = 0  # of these
        self._values: list[th.Tensor] = []

    def __len__(self) -> int:
        return sum(map(len, self._env_indices))

    def add(self, step: int, env_index: int, final_obs: Any, state: th.Tensor | None = None) -> None:
        """
        :param step: of the rollout, in which the episode was cut
        :param env_index: number of the environment
        :param final_obs: it is copied, because the environment may reuse its arrays
        :param state: hidden state before the final observation, shape ``(n_state,)``; None: no recurrent policy
        """
        is_dict = isinstance(final_obs, dict)
        row = {k: np.array(x)[None] for k, x in final_obs.items()} if is_dict else np.array(final_obs)[None]
        self.add_rows(step, np.array([env_index]), row, None if state is None else state[None])

    def add_rows(self, step: int, env_indices: Any, final_obs: Any, states: th.Tensor | None = None) -> None:
        """
        :param step: of the rollout, in which the episodes were cut
        :param env_indices: numbers of the environments, shape ``(n,)``
        :param final_obs: one row for each of them, shape ``(n, *obs_shape)`` or a dict of such, to be kept; arrays or
            tensors
        :param states: hidden states before them, shape ``(n, n_state)``; None: the policy is not recurrent
        """
        self._steps.append(step)
        self._env_indices.append(env_indices)
        if states is not None:
            self._states.append(states)
        self._final_obs.append(final_obs)

    def evaluate(self, actor_critic: ActorCritic) -> None:
        """
        Evaluate the final observations that have not been evaluated yet.

        :param actor_critic: the policy
        """
        all_obs: Any = self._final_obs[self._n_evaluated :]
        if not all_obs:
            return
        first = sum(map(len, self._values))
        all_obs = _joined(all_obs)
        for rows in chunks(len(self) - first, actor_critic.policy.observation_space):
            self._values.append(self._evaluated(actor_critic, rows_of(all_obs, rows), first + rows.start))
        self._n_evaluated = len(self._final_obs)

    def evaluate_again(self, actor_critic: ActorCritic) -> None:
        """
        Evaluate all of them by another policy, or by other parameters.

        :param actor_critic: the policy
        """
        self._values, self._n_evaluated = [], 0
        self.evaluate(actor_critic)

    def write_into(self, rollout_buffer: RolloutBuffer) -> None:
        """
        :param rollout_buffer: that holds the rollout
        """
        if self._values:
            place: Any = rollout_buffer.stored("final_values")
            values = th.cat(self._values)
            place[self._all_steps(), _joined(self._env_indices)] = values if is_tensors(place) else to_arrays(values)

    def _all_steps(self) -> np.ndarray:
        """One for each value."""
        return np.repeat(self._steps, [len(indices) for indices in self._env_indices])

    @th.no_grad()
    def _evaluated(self, actor_critic: ActorCritic, final_obs: Any, first: int) -> th.Tensor:
        policy = actor_critic.policy
        if is_tensors(final_obs):
            inputs = PolicyInput(to_tensors(final_obs, policy.device))
        else:
            inputs = PolicyInput(policy.obs_to_tensor(final_obs)[0])
        n_rows = inputs.n_rows
        if self._states:
            states = th.cat(self._states)[first : first + n_rows]
            inputs = inputs._replace(state=states, starts=th.zeros(n_rows, device=policy.device))
        values = actor_critic.values(inputs)
        if not bool(values.isfinite().all()):
            env_indices = to_arrays(_joined(self._env_indices))[first:]
            raise_if_final_not_finite(to_arrays(values), to_arrays(final_obs), self._all_steps()[first:], env_indices)
        return values


def _joined(parts: list[Any]) -> Any:
    """Rows of arrays or of tensors, or of dicts of such, in one."""
    if isinstance(parts[0], dict):
        return {key: _joined([part[key] for part in parts]) for key in parts[0]}
    return th.cat(parts) if isinstance(parts[0], th.Tensor) else np.concatenate(parts)
