"""SB3's rollout buffers: transitions are added step by step, what the policy says of them once, at the end."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from typing import Any, NamedTuple, cast

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common import buffers as sb3
from stable_baselines3.common.type_aliases import PyTorchObs
from torch import nn

from sb3_ppo_ext.common.advantages import generalized_advantages
from sb3_ppo_ext.common.distributions import family_of_space


class RolloutSamples(NamedTuple):
    """
    A minibatch: the fields of SB3's ``RolloutBufferSamples``, and the distribution that the actions were drawn from.

    :param observations: shape ``(batch, *obs_shape)``, or a dict of such, in the dtype of the observation space
    :param actions: shape ``(batch, action_dim)``
    :param old_values: shape ``(batch,)``
    :param old_log_prob: shape ``(batch,)``
    :param advantages: shape ``(batch,)``
    :param returns: shape ``(batch,)``
    :param old_params: parameters of the distribution that drew the actions, shape ``(batch, n_params)``
    :param mask: True where a sample counts, shape ``(batch,)``; None if all do
    """

    observations: PyTorchObs
    actions: th.Tensor
    old_values: th.Tensor
    old_log_prob: th.Tensor
    advantages: th.Tensor
    returns: th.Tensor
    old_params: th.Tensor
    mask: th.Tensor | None = None


class RolloutBuffer(sb3.RolloutBuffer):
    """
    A rollout buffer that also holds the distribution parameters of each step, ``distribution_params``, shape
    ``(n_steps, n_envs, n_params)``. Takes the arguments of SB3's.

    It is filled by :meth:`add_observation` and :meth:`add_transition` at every step and :meth:`set_evaluation` once.
    Its arrays keep the shape ``(n_steps, n_envs, ...)``; :meth:`get` moves a flat copy of them to the device once, and
    cuts its minibatches out of that.
    """

    observations: Any  # an array, or for Dict observations a dict of arrays
    distribution_params: np.ndarray

    def reset(self) -> None:
        super().reset()
        n_params = family_of_space(self.action_space).n_params
        self.distribution_params = np.zeros((self.buffer_size, self.n_envs, n_params), dtype=np.float32)
        if isinstance(self.action_space, spaces.Box) and not np.issubdtype(self.actions.dtype, np.floating):
            self.actions = self.actions.astype(np.float32)  # integers would not be the actions that were drawn
        self.forget_flat()

    def forget_flat(self) -> None:
        """Let go of what was made of the arrays, as they may have changed."""
        self._flat_inputs: tuple[PyTorchObs, th.Tensor] | None = None
        self._flat: RolloutSamples | None = None

    @property
    def wants_every_step(self) -> bool:
        """Whether a derived buffer has an :meth:`add` of its own, which is then called at every step, as by SB3."""
        return type(self).add not in (sb3.RolloutBuffer.add, sb3.DictRolloutBuffer.add)

    def add_observation(self, obs: Any, episode_start: np.ndarray) -> None:
        """
        Add what all environments are about to act on; :meth:`add_transition` completes the step.

        :param obs: the observations
        :param episode_start: whether the observation is the first of an episode, shape ``(n_envs,)``
        """
        self._store_obs(self.pos, obs)
        self.episode_starts[self.pos] = episode_start

    def add_transition(self, action: np.ndarray, reward: np.ndarray) -> None:
        """
        Complete one step of all environments; what the policy says of it follows with :meth:`set_evaluation`.

        :param action: shape ``(n_envs, action_dim)`` or what reshapes to it
        :param reward: shape ``(n_envs,)``
        """
        self.actions[self.pos] = action.reshape(self.n_envs, self.action_dim)
        self.rewards[self.pos] = reward
        self.pos += 1
        self.full = self.pos == self.buffer_size

    def _store_obs(self, pos: int, obs: np.ndarray) -> None:
        # Discrete observations come as (n_envs,) and are stored as (n_envs, 1), like in SB3.
        self.observations[pos] = obs.reshape(self.n_envs, *self.obs_shape)

    def set_evaluation(self, values: th.Tensor, log_probs: th.Tensor, params: th.Tensor | None) -> None:
        """
        Set what the policy that collected the rollout says of it.

        :param values: shape ``(n_envs * n_steps,)``, in the order of :meth:`flat`
        :param log_probs: shape ``(n_envs * n_steps,)``
        :param params: shape ``(n_envs * n_steps, n_params)``; None if no update will ask for them
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

        :param last_values: values of the observations after the last step, one an environment
        :param dones: whether the last step ended an episode, shape ``(n_envs,)``
        """
        self.advantages = generalized_advantages(
            self.rewards,
            self.values,
            self.episode_starts,
            last_values.cpu().numpy().flatten(),
            dones,
            gamma=self.gamma,
            gae_lambda=self.gae_lambda,
        )
        self.returns = self.advantages + self.values
        self._flat = None

    def flat_inputs(self) -> tuple[PyTorchObs, th.Tensor]:
        """
        The observations and actions of the whole rollout on the device, in SB3's order: all steps of the first
        environment, then of the next. They are moved there once.

        :return: observations, and actions of shape ``(n_envs * n_steps, action_dim)``
        """
        if self._flat_inputs is None:
            actions = self.actions.astype(np.float32, copy=False)  # as SB3: MultiBinary's int8 could not be trained on
            self._flat_inputs = self._flat_obs(), self._to_flat(actions)
        return self._flat_inputs

    def inputs_so_far(self) -> tuple[PyTorchObs, th.Tensor]:
        """
        The observations and actions of the steps that have been added, on the device, step by step.

        :return: observations, and actions of shape ``(n_steps * n_envs, action_dim)``
        """

        def step_by_step(array: np.ndarray) -> th.Tensor:
            return self.to_torch(array[: self.pos].reshape(-1, *array.shape[2:]))

        observations = self.observations
        if isinstance(observations, dict):
            of_keys: PyTorchObs = {key: step_by_step(array) for key, array in observations.items()}
            return of_keys, step_by_step(self.actions.astype(np.float32, copy=False))
        return step_by_step(observations), step_by_step(self.actions.astype(np.float32, copy=False))

    def flat(self) -> RolloutSamples:
        """
        The whole rollout on the device, in the order of :meth:`flat_inputs`.

        :return: the samples; made at the first call after a rollout, the same tensors afterwards
        """
        assert self.full, "the rollout buffer is not full"
        if self._flat is None:
            observations, actions = self.flat_inputs()
            self._flat = RolloutSamples(
                observations,
                actions,
                self._to_flat(self.values).flatten(),
                self._to_flat(self.log_probs).flatten(),
                self._to_flat(self.advantages).flatten(),
                self._to_flat(self.returns).flatten(),
                self._to_flat(self._params_of_samples()),
            )
        return self._flat

    def _params_of_samples(self) -> np.ndarray:
        """The distribution parameters; none if a callback has added samples without theirs."""
        params = self.distribution_params
        return params if len(params) == len(self.returns) else np.zeros((*self.returns.shape, 0), dtype=np.float32)

    def _to_flat(self, array: np.ndarray) -> th.Tensor:
        return self.to_torch(self.swap_and_flatten(array), copy=False)

    def _unflat(self, tensor: th.Tensor) -> np.ndarray:
        shape = (self.n_envs, self.buffer_size, *tensor.shape[1:])
        return tensor.cpu().numpy().reshape(shape).swapaxes(0, 1)

    def _flat_obs(self) -> PyTorchObs:
        return self._to_flat(self.observations)

    def get(self, batch_size: int | None = None) -> Generator[RolloutSamples, None, None]:  # type: ignore[override]
        """
        Cut the rollout into minibatches at random (by numpy's generator, as SB3 does).

        :param batch_size: samples in one; the last may be smaller; ``None``: all of them in one
        :return: the minibatches of one epoch
        """
        flat = self.flat()
        for rows in self.shuffled_rows(batch_size or len(flat.returns)):
            yield take(flat, rows)

    def shuffled_rows(self, batch_size: int) -> tuple[th.Tensor, ...]:
        """
        The rows of :meth:`flat` that the minibatches of one epoch are made of, drawn anew.

        :param batch_size: samples in a minibatch; the last may be smaller
        :return: for each minibatch, shape ``(batch_size,)``
        """
        rows = th.from_numpy(np.random.permutation(len(self.flat().returns)))  # noqa: NPY002
        if self.device.type == "cuda":  # from where the host need not wait for it
            rows = rows.pin_memory()
        return th.split(rows.to(self.device, non_blocking=True), batch_size)


class DictRolloutBuffer(RolloutBuffer, sb3.DictRolloutBuffer):  # type: ignore[misc]
    """:class:`RolloutBuffer` for Dict observations."""

    def _store_obs(self, pos: int, obs: dict[str, np.ndarray]) -> None:  # type: ignore[override]
        for key, stored in self.observations.items():
            stored[pos] = np.reshape(obs[key], (self.n_envs, *self.obs_shape[key]))

    def _flat_obs(self) -> PyTorchObs:
        return {key: self._to_flat(array) for key, array in self.observations.items()}


def obs_rows(observations: PyTorchObs, rows: slice | th.Tensor) -> PyTorchObs:
    """
    Some of a batch of observations.

    :param observations: a tensor, or for Dict observations a dict of tensors
    :param rows: a range or indices of them
    """
    if isinstance(observations, dict):
        return {key: value[rows] for key, value in observations.items()}
    return observations[rows]


def take(samples: RolloutSamples, rows: th.Tensor) -> RolloutSamples:
    """
    Some of the samples.

    :param samples: of a rollout
    :param rows: indices of them, shape ``(batch,)``
    """
    observations, *rest = samples
    return RolloutSamples(
        obs_rows(observations, rows),
        *(None if tensor is None else tensor[rows] for tensor in rest),  # type: ignore[arg-type]
    )


def take_padded(samples: RolloutSamples, rows: th.Tensor | None, n_rows: int) -> RolloutSamples:
    """
    Some of the samples and, up to a fixed number, the first one again and again, with a mask of those that count.

    :param samples: of a rollout
    :param rows: indices of them, at most ``n_rows``; None: all
    :param n_rows: how many there are to be
    """
    if rows is None:
        rows = th.arange(len(samples.returns), device=samples.returns.device)
    counts = th.arange(n_rows, device=rows.device) < len(rows)
    padded = take(samples, nn.functional.pad(rows, (0, n_rows - len(rows))))
    return padded._replace(mask=counts if padded.mask is None else counts & padded.mask)


def minibatches(
    rollout_buffer: sb3.RolloutBuffer, batch_size: int
) -> Iterator[tuple[RolloutSamples, th.Tensor | None]]:
    """
    The minibatches of one epoch, each as samples and which rows of them, so that who computes with them cuts them out.

    :param rollout_buffer: filled
    :param batch_size: samples in a minibatch; the last may be smaller
    :return: samples and rows; the rows are None, for all of the samples, where a derived buffer has a ``get`` of its
        own
    """
    if isinstance(rollout_buffer, RolloutBuffer) and type(rollout_buffer).get is RolloutBuffer.get:
        flat = rollout_buffer.flat()
        for rows in rollout_buffer.shuffled_rows(batch_size):
            yield flat, rows
    else:
        for samples in rollout_buffer.get(batch_size):
            yield cast(RolloutSamples, samples), None


def buffer_class_for(observation_space: spaces.Space[Any]) -> type[RolloutBuffer]:
    """
    The buffer for an observation space.

    :param observation_space: of the environment
    """
    return DictRolloutBuffer if isinstance(observation_space, spaces.Dict) else RolloutBuffer
