"""The data types on the way from the environments to the optimiser: policy inputs and samples of a rollout."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.preprocessing import get_flattened_obs_dim
from stable_baselines3.common.type_aliases import PyTorchObs
from torch import nn

from sb3_ppo_ext.losses import masked_mean

# A rollout is evaluated in chunks of at most this many input numbers and rows, which bounds the memory it takes.
CHUNK_NUMBERS = 2**24
CHUNK_ROWS = 2**14


class PolicyInput(NamedTuple):
    """
    The inputs of a policy. A field that the policy does not use is None; then nothing is computed, stored or compiled
    for it.

    For a recurrent policy the batch consists of sequences of equal length, one after the other, each with the hidden
    state at its beginning.

    :param obs: a batch of observations, shape ``(batch, *obs_shape)``, or a dict of such
    :param mask: which actions are allowed, bool, shape ``(batch, n_actions)``; None: all
    :param state: of a recurrent policy, before the first observation of each sequence, shape
        ``(n_sequences, n_state)``; None: the policy has no memory
    :param starts: 1 where an observation is the first of its episode, so that the hidden state is reset, else 0; shape
        ``(batch,)``; None: the policy has no memory
    """

    obs: PyTorchObs
    mask: th.Tensor | None = None
    state: th.Tensor | None = None
    starts: th.Tensor | None = None

    @classmethod
    def of(cls, inputs: PolicyInput | PyTorchObs) -> PolicyInput:
        """
        :param inputs: inputs, or observations alone
        """
        return inputs if isinstance(inputs, cls) else cls(inputs)  # type: ignore[arg-type]

    @property
    def n_rows(self) -> int:
        """The number of observations."""
        return (next(iter(self.obs.values())) if isinstance(self.obs, dict) else self.obs).shape[0]

    @property
    def length(self) -> int:
        """Observations in a sequence; 1 where there is no memory."""
        return 1 if self.state is None else self.n_rows // len(self.state)

    def rows(self, rows: slice | th.Tensor) -> PolicyInput:
        """
        Some of the batch.

        :param rows: a range or indices; of sequences, where there is a memory
        """
        if self.state is None:
            return PolicyInput(*(rows_of(part, rows) for part in self))
        of_observations = (rows_of(part, rows, self.length) for part in self._replace(state=None))
        return PolicyInput(*of_observations)._replace(state=self.state[rows])


class RolloutSamples(NamedTuple):
    """
    Samples of a rollout: the fields of SB3's ``RolloutBufferSamples``, and further ones that our updates use.

    :param observations: shape ``(batch, *obs_shape)``, or a dict of such, in the dtype of the observation space
    :param actions: shape ``(batch, action_dim)``
    :param old_values: shape ``(batch,)``
    :param old_log_prob: shape ``(batch,)``
    :param advantages: shape ``(batch,)``
    :param returns: shape ``(batch,)``
    :param old_params: parameters of the distribution that drew the actions, shape ``(batch, n_params)``
    :param action_masks: which actions were allowed, bool, shape ``(batch, n_actions)``; None: all
    :param states: hidden states of a recurrent policy at the beginning of each sequence, shape
        ``(n_sequences, n_state)``; the samples are one sequence after the other. None: the policy has no memory
    :param episode_starts: 1 where a sample is the first of its episode, else 0, shape ``(batch,)``; None: the policy
        has no memory
    :param mask: which samples count, bool, shape ``(batch,)``; None: all. The others only pad the minibatch
    :param reference_params: parameters of the reference policy's distributions, shape ``(batch, n_params)``; None:
        there is no such policy
    :param proximal_log_prob: log-probability under the policy around which an update clips, shape ``(batch,)``;
        ``old_params`` then belong to that policy too. None: the update clips around the policy that acted
    """

    observations: PyTorchObs
    actions: th.Tensor
    old_values: th.Tensor
    old_log_prob: th.Tensor
    advantages: th.Tensor
    returns: th.Tensor
    old_params: th.Tensor
    action_masks: th.Tensor | None = None
    states: th.Tensor | None = None
    episode_starts: th.Tensor | None = None
    mask: th.Tensor | None = None
    reference_params: th.Tensor | None = None
    proximal_log_prob: th.Tensor | None = None

    @property
    def length(self) -> int:
        """Samples in a sequence; 1 where there is no memory."""
        return 1 if self.states is None else len(self.returns) // len(self.states)

    @property
    def inputs(self) -> PolicyInput:
        """What the policy acted on."""
        return PolicyInput(self.observations, self.action_masks, self.states, self.episode_starts)

    def mean(self, values: th.Tensor) -> th.Tensor:
        """
        Mean over the samples that count.

        :param values: one number a sample, shape ``(batch,)``
        """
        return values.mean() if self.mask is None else masked_mean(values, self.mask)

    def counted(self, values: th.Tensor) -> th.Tensor:
        """
        The numbers of the samples that count.

        :param values: one a sample, shape ``(batch,)``
        """
        return values if self.mask is None else values[self.mask]

    def scattered(self, values: th.Tensor, *, elsewhere: float = 0.0) -> th.Tensor:
        """
        The inverse of :meth:`counted`.

        :param values: one for each sample that counts
        :param elsewhere: the value of the other samples
        :return: shape ``(batch,)``
        """
        if self.mask is None:
            return values
        return th.full_like(self.mask, elsewhere, dtype=values.dtype).masked_scatter(self.mask, values)

    def padded(self, rows: th.Tensor | None, n_rows: int) -> RolloutSamples:
        """
        Select samples and pad them to a fixed number by repeating the first sample; ``mask`` excludes the padding.

        :param rows: indices of the samples (of sequences if the policy is recurrent), at most ``n_rows``; None: all
        :param n_rows: number of samples (or sequences) after padding
        """
        if rows is None:
            rows = th.arange(len(self.returns) // self.length, device=self.returns.device)
        counts = (th.arange(n_rows, device=rows.device) < len(rows)).repeat_interleave(self.length)
        padded = self.rows(nn.functional.pad(rows, (0, n_rows - len(rows))))
        return padded._replace(mask=counts if padded.mask is None else counts & padded.mask)

    def rows(self, rows: slice | th.Tensor) -> RolloutSamples:
        """
        Some of the samples.

        :param rows: a range or indices; of sequences, where there is a memory
        """
        if self.states is None:
            return RolloutSamples(*(rows_of(part, rows) for part in self))
        of_samples = (rows_of(part, rows, self.length) for part in self._replace(states=None))
        return RolloutSamples(*of_samples)._replace(states=self.states[rows])


MASK_KEY = "action_mask"
"""The key of action masks in Dict observations (as in PettingZoo) and in infos (as in gymnasium's Taxi)."""


def rows_of(part: Any, rows: slice | th.Tensor | np.ndarray, length: int = 1) -> Any:
    """
    Some rows of a tensor or an array, or of a dict of such; None of None.

    :param part: the first dimension of each is the batch
    :param rows: a range or indices
    :param length: number of samples in a row, if rows are sequences
    """
    if part is None:
        return None
    if isinstance(part, dict):
        return {key: rows_of(tensor, rows, length) for key, tensor in part.items()}
    return part[rows] if length == 1 else part.unflatten(0, (-1, length))[rows].flatten(0, 1)


def dtype_of(space: spaces.Space[Any]) -> th.dtype:
    """
    The dtype of tensors that hold what a space does.

    :param space: of observations or actions
    """
    return th.from_numpy(np.zeros(0, space.dtype)).dtype


def to_tensors(obs: Any, device: th.device) -> Any:
    """
    Move observations to a device; tensors that are already there are not copied.

    :param obs: an array or a tensor, or a dict of such
    :param device: the target device
    """
    if isinstance(obs, dict):
        return {key: th.as_tensor(part, device=device) for key, part in obs.items()}
    return th.as_tensor(obs, device=device)


def shuffled_rows(n_rows: int, n_in_minibatch: int, device: th.device) -> tuple[th.Tensor, ...]:
    """
    Draw the row indices of the minibatches of one epoch by numpy's generator, as SB3 does.

    :param n_rows: number of rows to shuffle
    :param n_in_minibatch: rows in a minibatch; the last may be smaller
    :param device: of the indices
    """
    rows = th.from_numpy(np.random.permutation(n_rows))  # noqa: NPY002
    if device.type == "cuda":  # the copy from pinned memory does not block the host
        rows = rows.pin_memory()
    return th.split(rows.to(device, non_blocking=True), n_in_minibatch)


def is_tensors(obs: Any) -> bool:
    """
    :param obs: an array or a tensor, or a dict of such
    """
    return isinstance(next(iter(obs.values())) if isinstance(obs, dict) else obs, th.Tensor)


def to_arrays(obs: Any) -> Any:
    """
    Convert to numpy arrays, which share the memory of tensors on the CPU.

    :param obs: an array or a tensor, or a dict of such
    """
    if isinstance(obs, dict):
        return {key: to_arrays(part) for key, part in obs.items()}
    return obs.detach().cpu().numpy() if isinstance(obs, th.Tensor) else obs


def fit_for(obs: np.ndarray, stored: np.ndarray) -> np.ndarray:
    """
    :param obs: observations of one step
    :param stored: the array for those of all steps, of the dtype of the observation space
    :return: the array, or a copy in the dtype of the observations if these are floats that it cannot hold, because it
        is of integers or float16: ``VecNormalize`` gives float32 without changing the space
    """
    is_fit = obs.dtype.kind != "f" or obs.dtype == stored.dtype or np.can_cast(np.float32, stored.dtype)
    return stored if is_fit else stored.astype(obs.dtype)


def chunks(n_samples: int, observation_space: spaces.Space[Any], length: int = 1) -> Iterator[slice]:
    """
    Cut a rollout into chunks, to bound the memory of a pass through the networks.

    :param n_samples: number of samples
    :param observation_space: of their observations
    :param length: samples in a sequence
    :return: ranges of samples, or of sequences where ``length`` is above 1
    """
    size = max(get_flattened_obs_dim(observation_space), 1)
    n_rows, rows = n_samples // length, max(1, min(CHUNK_ROWS, CHUNK_NUMBERS // size) // length)
    return (slice(start, min(start + rows, n_rows)) for start in range(0, n_rows, rows))
