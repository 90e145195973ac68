"""Rollout buffers: SB3's, extended by what exact KL divergences, masks, recurrent policies and targets need."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from typing import Any

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common import buffers as sb3
from stable_baselines3.common.type_aliases import DictRolloutBufferSamples, RolloutBufferSamples

from sb3_ppo_ext.common.distributions import family_of_space
from sb3_ppo_ext.common.rollout.data import PolicyInput, RolloutSamples, fit_for, shuffled_rows
from sb3_ppo_ext.losses.targets import generalized_advantages


class RolloutBuffer(sb3.RolloutBuffer):
    """
    SB3's rollout buffer, which also holds, in arrays of shape ``(n_steps, n_envs, ...)``:

    - ``distribution_params``: the parameters of the distributions that drew the actions;
    - ``truncated``, ``terminated``: whether the step ended an episode, by a time limit or otherwise;
    - ``final_values``: where the step was truncated, the value of the episode's final observation; else 0;
    - ``last_values``, shape ``(n_envs,)``: the values of the observations after the last step;
    - ``action_masks``: which actions were allowed, shape ``(n_steps, n_envs, n_choices)``; None where all are;
    - ``states``: the hidden states of a recurrent policy before each sequence of ``sequence_length`` steps, shape
      ``(n_sequences, n_envs, n_state)``; None if the policy is not recurrent;
    - ``counts``: False where a step only reset the environment, so that nothing is learnt from it; None if all steps
      count.

    ``rewards`` are the environments' own, while SB3 adds the discounted values of final observations to them. A derived
    buffer with its own ``add`` or ``compute_returns_and_advantage`` is filled by SB3's method: its rewards are SB3's,
    ``truncated`` is False everywhere, and ``final_values`` are 0.

    :meth:`add_observation` and :meth:`add_transition` fill it at every step, and :meth:`set_evaluation` once at the
    end; advantages and returns are computed afterwards. :meth:`get` moves a flat copy to the device once and cuts the
    minibatches from it. The arguments are those of SB3's buffer.
    """

    observations: Any  # an array, or for Dict observations a dict of arrays
    distribution_params: np.ndarray
    truncated: np.ndarray
    final_values: np.ndarray
    last_values: np.ndarray
    action_masks: np.ndarray | None
    states: np.ndarray | None
    counts: np.ndarray | None
    final_observations: Any  # a FinalValues; None if the rollout was not collected by a Collector
    sequence_length: int = 1
    penalties: Any = None  # subtracted from the rewards when targets are computed, shape ``(n_steps, n_envs)``
    reference_params: th.Tensor | None = None  # of a reference policy, in the order of :meth:`flat_inputs`

    def reset(self) -> None:
        super().reset()
        n_params = family_of_space(self.action_space).n_params
        self.distribution_params = np.zeros((self.buffer_size, self.n_envs, n_params), dtype=np.float32)
        if isinstance(self.action_space, spaces.Box) and not np.issubdtype(self.actions.dtype, np.floating):
            self.actions = self.actions.astype(np.float32)  # integers would not be the actions that were drawn
        self.truncated = np.zeros((self.buffer_size, self.n_envs), dtype=bool)
        self.final_values = np.zeros((self.buffer_size, self.n_envs), dtype=np.float32)
        self.last_values = np.zeros(self.n_envs, dtype=np.float32)
        self._last_dones = np.zeros(self.n_envs, dtype=bool)
        self.action_masks = self.states = self.counts = self.final_observations = None
        self.forget_flat()

    @property
    def terminated(self) -> np.ndarray:
        """Whether the step ended an episode, other than by a time limit; shape ``(n_steps, n_envs)``."""
        ends: np.ndarray = np.concatenate((self.episode_starts[1:] != 0.0, self._last_dones[None]))
        return np.asarray(ends & ~self.truncated)

    def forget_flat(self) -> None:
        """Drop the flat copies of the arrays, because the arrays may have changed."""
        self._flat_inputs: tuple[PolicyInput, th.Tensor] | None = None
        self._flat: RolloutSamples | None = None

    @property
    def wants_every_step(self) -> bool:
        """
        Whether SB3's method fills the buffer. It does for a derived buffer that has its own :meth:`add`, which must be
        called at every step, or computes its own advantages, which need SB3's rewards.
        """
        return (
            type(self).add not in (sb3.RolloutBuffer.add, sb3.DictRolloutBuffer.add)
            or type(self).compute_returns_and_advantage is not RolloutBuffer.compute_returns_and_advantage
        )

    def add_observation(self, obs: Any, episode_start: np.ndarray) -> None:
        """
        Add the observations on which the policy acts next; :meth:`add_transition` completes the step.

        :param obs: the observations
        :param episode_start: whether the observation is the first of an episode, shape ``(n_envs,)``
        """
        self._store_obs(self.pos, obs)
        self.episode_starts[self.pos] = episode_start

    def add_masks(self, masks: np.ndarray) -> None:
        """
        Add the action masks of the observations that :meth:`add_observation` has added.

        :param masks: bool, shape ``(n_envs, n_choices)``
        """
        if self.action_masks is None:
            self.action_masks = np.ones((self.buffer_size, *masks.shape), dtype=bool)
        self.action_masks[self.pos] = masks

    def add_state(self, state: th.Tensor) -> None:
        """
        Store the hidden state before the step if a sequence begins with it; otherwise do nothing.

        :param state: shape ``(n_envs, n_state)``
        """
        if self.pos % self.sequence_length:
            return
        if self.states is None:
            n_sequences = -(-self.buffer_size // self.sequence_length)
            self.states = np.zeros((n_sequences, *state.shape), dtype=np.float32)
        self.states[self.pos // self.sequence_length] = state.cpu().numpy()

    def add_counts(self, counts: np.ndarray) -> None:
        """
        Add whether the current step counts, for each environment; call it before :meth:`add_transition`.

        :param counts: bool, shape ``(n_envs,)``
        """
        if self.counts is None:
            self.counts = np.ones((self.buffer_size, self.n_envs), dtype=bool)
        self.counts[self.pos] = counts

    def add_transition(self, action: np.ndarray, reward: np.ndarray) -> None:
        """
        Complete one step of all environments; :meth:`set_evaluation` adds values and log-probabilities later.

        :param action: shape ``(n_envs, action_dim)`` or what reshapes to it
        :param reward: shape ``(n_envs,)``
        """
        self.actions[self.pos] = action.reshape(self.n_envs, self.action_dim)
        self.rewards[self.pos] = reward
        self.pos += 1
        self.full = self.pos == self.buffer_size

    def _store_obs(self, pos: int, obs: np.ndarray) -> None:
        # Discrete observations come as (n_envs,) and are stored as (n_envs, 1), like in SB3.
        self.observations = fit_for(obs, self.observations)
        self.observations[pos] = obs.reshape(self.n_envs, *self.obs_shape)

    def set_evaluation(self, values: th.Tensor, log_probs: th.Tensor, params: th.Tensor | None) -> None:
        """
        Set values, log-probabilities and distribution parameters under the policy that collected the rollout.

        :param values: shape ``(n_envs * n_steps,)``, in the order of :meth:`flat`
        :param log_probs: shape ``(n_envs * n_steps,)``
        :param params: shape ``(n_envs * n_steps, n_params)``; None if no update needs them
        """
        self.values = self._unflat(values)
        self.log_probs = self._unflat(log_probs)
        if params is not None:
            self.set_params(params)

    def set_params(self, params: th.Tensor) -> None:
        """
        Set the distribution parameters alone.

        :param params: shape ``(n_envs * n_steps, n_params)``, in the order of :meth:`flat`
        """
        self.distribution_params = self._unflat(params)

    def compute_returns_and_advantage(self, last_values: th.Tensor, dones: np.ndarray) -> None:
        """
        Set ``advantages`` by GAE(lambda), and ``returns = advantages + values``, the TD(lambda) estimate.

        :param last_values: values of the observations after the last step, one for each environment
        :param dones: whether the last step ended an episode, shape ``(n_envs,)``
        :raises ValueError: if a callback has added steps or environments to the rewards but not to ``truncated``
        """
        if not self.rewards.shape == self.truncated.shape == self.final_values.shape:
            raise ValueError(
                f"The rollout buffer has rewards of shape {self.rewards.shape}, truncated of shape "
                f"{self.truncated.shape} and final_values of shape {self.final_values.shape}: a callback that adds "
                "samples and computes the advantages anew must extend all three alike"
            )
        self.last_values = last_values.cpu().numpy().flatten()
        self._last_dones = np.asarray(dones, dtype=bool)
        rewards = self.rewards if self.penalties is None else self.rewards - self.penalties
        arrays = (rewards, self.values, self.last_values, self.terminated, self.truncated, self.final_values)
        # Copies, as torch refuses some arrays that a callback may have put there (read-only ones, reversed ones).
        *transitions, final_values = (th.from_numpy(np.array(array)) for array in arrays)
        advantages = generalized_advantages(
            *transitions, gamma=self.gamma, gae_lambda=self.gae_lambda, final_values=final_values
        )
        self.advantages = advantages.float().numpy()
        self.returns = self.advantages + self.values
        self._flat = None

    def flat_inputs(self) -> tuple[PolicyInput, th.Tensor]:
        """
        Policy inputs and actions of the whole rollout, on the device, in SB3's order: all steps of the first
        environment, then of the next. They are moved to the device once.

        :return: inputs, and actions of shape ``(n_envs * n_steps, action_dim)``
        """
        if self._flat_inputs is None:
            inputs = PolicyInput(self._flat_of("observations"))
            if self.action_masks is not None:
                inputs = inputs._replace(mask=self._flat_of("action_masks"))
            if self.states is not None:
                self._check_states(self.states)
                starts = self._flat_of("episode_starts").flatten()
                inputs = inputs._replace(state=self._flat_of("states"), starts=starts)
            actions = self._flat_of("actions").float()  # as SB3: MultiBinary's int8 could not be trained on
            self._flat_inputs = inputs, actions
        return self._flat_inputs

    def _check_states(self, states: np.ndarray) -> None:
        n_steps, length = len(self.episode_starts), self.sequence_length
        if states.shape[:2] != (-(-n_steps // length), self.n_envs):
            raise ValueError(
                f"The rollout buffer has {n_steps} steps of {self.n_envs} environment(s), in sequences of {length}, "
                f"and states of shape {states.shape}: a callback that adds samples must add the state before each "
                "sequence"
            )

    def inputs_so_far(self) -> tuple[PolicyInput, th.Tensor]:
        """
        Policy inputs and actions of the steps that have been added so far, on the device, one step after the other.

        :return: inputs, and actions of shape ``(n_steps * n_envs, action_dim)``
        """

        def step_by_step(stored: Any) -> Any:
            if isinstance(stored, dict):
                return {key: step_by_step(part) for key, part in stored.items()}
            return th.as_tensor(stored[: self.pos], device=self.device).flatten(0, 1)

        mask = None if self.action_masks is None else step_by_step(self.stored("action_masks"))
        actions = step_by_step(self.stored("actions")).float()
        return PolicyInput(step_by_step(self.stored("observations")), mask), actions

    def flat(self) -> RolloutSamples:
        """
        The rollout on the device, in the order of :meth:`flat_inputs`, without the steps that do not count.

        :return: the samples; made at the first call after a rollout, the same tensors afterwards
        """
        assert self.full, "the rollout buffer is not full"
        if self._flat is None:
            self._flat = self._whole()
            if self.counts is not None:
                self._flat = self._flat.rows(self._flat_of("counts").flatten())
        return self._flat

    def _whole(self) -> RolloutSamples:
        """All steps on the device."""
        inputs, actions = self.flat_inputs()
        returns = self._flat_of("returns").flatten()
        params = self._flat_of("distribution_params")
        return RolloutSamples(
            inputs.obs,
            actions,
            self._flat_of("values").flatten(),
            self._flat_of("log_probs").flatten(),
            self._flat_of("advantages").flatten(),
            returns,
            params
            if len(params) == len(returns)
            else returns.new_zeros(len(returns), 0),  # samples added by a callback have none
            inputs.mask,
            inputs.state,
            inputs.starts,
            reference_params=self.reference_params,
        )

    def stored(self, name: str) -> Any:
        """
        The array that holds the values of an attribute and may be written into.

        :param name: of the attribute
        """
        return getattr(self, name)

    def _flat_of(self, name: str) -> Any:
        stored = self.stored(name)
        if isinstance(stored, dict):
            return {key: self._to_flat(part) for key, part in stored.items()}
        return self._to_flat(stored)

    def _to_flat(self, array: np.ndarray) -> th.Tensor:
        return self.to_torch(self.swap_and_flatten(array), copy=False)

    def _unflat(self, tensor: th.Tensor) -> np.ndarray:
        shape = (self.n_envs, self.buffer_size, *tensor.shape[1:])
        return tensor.cpu().numpy().reshape(shape).swapaxes(0, 1)

    def get(self, batch_size: int | None = None) -> Generator[RolloutSamples, None, None]:  # type: ignore[override]
        """
        Cut the rollout into random minibatches (by numpy's generator, as SB3 does), of whole sequences if the policy is
        recurrent.

        :param batch_size: samples in a minibatch; the last may be smaller; ``None``: one minibatch of all samples
        :return: the minibatches of one epoch
        """
        flat = self.flat()
        for rows in self.shuffled_rows(batch_size or len(flat.returns)):
            yield flat.rows(rows)

    def shuffled_rows(self, batch_size: int) -> tuple[th.Tensor, ...]:
        """
        Draw which rows of :meth:`flat` form each minibatch of one epoch.

        :param batch_size: samples in a minibatch; the last may be smaller
        :return: one tensor of row indices for each minibatch; of sequence indices if the policy is recurrent
        """
        flat = self.flat()
        return shuffled_rows(len(flat.returns) // flat.length, max(1, batch_size // flat.length), self.device)


class DictRolloutBuffer(RolloutBuffer, sb3.DictRolloutBuffer):  # type: ignore[misc]
    """:class:`RolloutBuffer` for Dict observations."""

    def _store_obs(self, pos: int, obs: dict[str, np.ndarray]) -> None:  # type: ignore[override]
        for key, stored in self.observations.items():
            self.observations[key] = stored = fit_for(obs[key], stored)
            stored[pos] = np.reshape(obs[key], (self.n_envs, *self.obs_shape[key]))


def minibatches(
    rollout_buffer: sb3.RolloutBuffer, batch_size: int
) -> Iterator[tuple[RolloutSamples, th.Tensor | None]]:
    """
    Give the minibatches of one epoch, each as samples and the row indices to select from them, so that the caller (or
    its compiled program) selects the rows.

    :param rollout_buffer: filled
    :param batch_size: samples in a minibatch; the last may be smaller
    :return: samples and rows; the rows are None, which means all samples, if a derived buffer has its own ``get``
    """
    if isinstance(rollout_buffer, RolloutBuffer) and type(rollout_buffer).get is RolloutBuffer.get:
        flat = rollout_buffer.flat()
        for rows in rollout_buffer.shuffled_rows(batch_size):
            yield flat, rows
    else:
        for samples in rollout_buffer.get(batch_size):
            yield samples if isinstance(samples, RolloutSamples) else _of_sb3(samples), None


def size_to_pad_to(rollout_buffer: sb3.RolloutBuffer, batch_size: int) -> int | None:
    """
    The size to which a compiled step pads the smaller last minibatch of an epoch. Without padding, each size needs its
    own program. If some steps do not count, that could mean a new program in each rollout; and for sequences, which
    are unrolled, a second program takes long to compile.

    :param rollout_buffer: filled
    :param batch_size: samples in a minibatch
    :return: the number of rows (of sequences if the policy is recurrent); None if all minibatches have the same size,
        or a second program is cheap enough
    """
    if not isinstance(rollout_buffer, RolloutBuffer):
        return None
    if rollout_buffer.states is not None:
        n_sequences = rollout_buffer.states.shape[0] * rollout_buffer.n_envs
        n_of_minibatch = min(n_sequences, max(1, batch_size // rollout_buffer.sequence_length))
        return None if n_sequences % n_of_minibatch == 0 else n_of_minibatch
    return None if rollout_buffer.counts is None else min(rollout_buffer.counts.size, batch_size)


def values_and_returns(rollout_buffer: sb3.RolloutBuffer) -> tuple[np.ndarray, np.ndarray]:
    """
    Values and returns of the steps that count.

    :param rollout_buffer: filled, any of SB3's
    """
    counts = getattr(rollout_buffer, "counts", None)
    values, returns = rollout_buffer.values, rollout_buffer.returns
    return (values.flatten(), returns.flatten()) if counts is None else (values[counts], returns[counts])


def _of_sb3(samples: RolloutBufferSamples | DictRolloutBufferSamples) -> RolloutSamples:
    """Convert samples of one of SB3's buffers, which do not have the parameters of the action distributions."""
    return RolloutSamples(
        samples.observations,
        samples.actions,
        samples.old_values,
        samples.old_log_prob,
        samples.advantages,
        samples.returns,
        old_params=samples.advantages.new_empty((len(samples.advantages), 0)),
    )


def buffer_class_for(observation_space: spaces.Space[Any]) -> type[RolloutBuffer]:
    """
    The buffer for an observation space.

    :param observation_space: of the environment
    """
    return DictRolloutBuffer if isinstance(observation_space, spaces.Dict) else RolloutBuffer
