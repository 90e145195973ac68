"""A rollout buffer that stays on the device of the model."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.vec_env import VecEnv

from sb3_ppo_ext.common.distributions import family_of_space
from sb3_ppo_ext.common.rollout.buffers import RolloutBuffer, buffer_class_for
from sb3_ppo_ext.common.rollout.data import dtype_of, to_arrays, to_tensors
from sb3_ppo_ext.common.rollout.transitions import gives_tensors
from sb3_ppo_ext.losses.targets import generalized_advantages


class _AsArray:
    """
    An attribute that holds a tensor, or a dict of tensors, but is read and set as numpy arrays. On the CPU they share
    memory. From another device you read a read-only copy; to change the tensor, set the attribute.
    """

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, buffer: Any, owner: type | None = None) -> Any:
        return self if buffer is None else _readable(buffer.tensors[self._name])

    def __set__(self, buffer: Any, value: Any) -> None:
        buffer.tensors[self._name] = None if value is None else _writable(value, buffer.device)


class TensorRolloutBuffer(RolloutBuffer):
    """
    :class:`RolloutBuffer` for environments whose observations and rewards are tensors. Its contents stay on the device
    of the model, in :attr:`tensors`; the attributes of the same names let callbacks read and set them as numpy arrays.
    It takes all observation spaces, including Dict.
    """

    tensors: dict[str, Any]
    """The tensors behind the attributes of the same names, shape ``(n_steps, n_envs, ...)``."""

    observations: Any = _AsArray()
    actions: Any = _AsArray()
    rewards: Any = _AsArray()
    advantages: Any = _AsArray()
    returns: Any = _AsArray()
    episode_starts: Any = _AsArray()
    values: Any = _AsArray()
    log_probs: Any = _AsArray()
    distribution_params: Any = _AsArray()
    truncated: Any = _AsArray()
    final_values: Any = _AsArray()
    last_values: Any = _AsArray()
    action_masks: Any = _AsArray()
    states: Any = _AsArray()
    counts: Any = _AsArray()
    _last_dones: Any

    def reset(self) -> None:
        space, action_space = self.observation_space, self.action_space
        # The policy draws floats, so a Box of integers could not store its actions.
        actions_dtype = th.float32 if isinstance(action_space, spaces.Box) else dtype_of(action_space)
        names = ("rewards", "advantages", "returns", "episode_starts", "values", "log_probs", "final_values")
        self.tensors = {name: self._zeros() for name in names}
        self.tensors |= {
            "observations": {key: self._zeros_of(part) for key, part in space.spaces.items()}
            if isinstance(space, spaces.Dict)
            else self._zeros_of(space),
            "actions": self._zeros(self.action_dim, dtype=actions_dtype),
            "distribution_params": self._zeros(family_of_space(action_space).n_params),
            "truncated": self._zeros(dtype=th.bool),
            "last_values": th.zeros(self.n_envs, device=self.device),
            **dict.fromkeys(("action_masks", "states", "counts")),
        }
        self._last_dones = th.zeros(self.n_envs, dtype=th.bool, device=self.device)
        self.pos, self.full, self.generator_ready = 0, False, False
        self.final_observations = None
        self.forget_flat()

    def _zeros(self, *shape: int, dtype: th.dtype = th.float32) -> th.Tensor:
        # In memory environment by environment, like the flat rollout, which is then a view instead of a copy.
        zeros = th.zeros(self.n_envs, self.buffer_size, *shape, dtype=dtype, device=self.device)
        return zeros.transpose(0, 1)

    def _zeros_of(self, space: spaces.Space[Any]) -> th.Tensor:
        shape = space.shape or (1,)  # Discrete ones as SB3 has them
        return self._zeros(*shape, dtype=dtype_of(space))

    @property
    def wants_every_step(self) -> bool:
        return False

    @property
    def terminated(self) -> Any:
        return _readable(self._terminated())

    def _terminated(self) -> th.Tensor:
        ends = th.cat((self.tensors["episode_starts"][1:] != 0.0, self._last_dones[None]))
        terminated: th.Tensor = ends & ~self.tensors["truncated"]
        return terminated

    def is_finite(self) -> bool:
        """Whether rewards, values and log-probabilities are finite."""
        names = ("rewards", "values", "log_probs")
        return bool(th.stack([self.tensors[name].isfinite().all() for name in names]).all())

    def add_observation(self, obs: Any, episode_start: Any) -> None:
        stored = self.tensors["observations"]
        if isinstance(stored, dict):
            for key, of_key in stored.items():
                of_key[self.pos] = obs[key].reshape(of_key.shape[1:])
        else:
            stored[self.pos] = obs.reshape(stored.shape[1:])
        self.tensors["episode_starts"][self.pos] = th.as_tensor(episode_start, device=self.device)

    def add_masks(self, masks: Any) -> None:
        if self.tensors["action_masks"] is None:
            self.tensors["action_masks"] = ~self._zeros(*masks.shape[1:], dtype=th.bool)
        self.tensors["action_masks"][self.pos] = th.as_tensor(masks, device=self.device)

    def add_state(self, state: th.Tensor) -> None:
        if self.pos % self.sequence_length:
            return
        if self.tensors["states"] is None:
            n_sequences = -(-self.buffer_size // self.sequence_length)
            self.tensors["states"] = th.zeros(self.n_envs, n_sequences, state.shape[1], device=self.device).transpose(
                0, 1
            )
        self.tensors["states"][self.pos // self.sequence_length] = state

    def add_transition(self, action: Any, reward: Any) -> None:
        self.tensors["actions"][self.pos] = action.reshape(self.n_envs, self.action_dim)
        self.tensors["rewards"][self.pos] = reward
        self.pos += 1
        self.full = self.pos == self.buffer_size

    def compute_returns_and_advantage(self, last_values: th.Tensor, dones: Any) -> None:
        tensors = self.tensors
        tensors["last_values"] = last_values.flatten()
        rewards = tensors["rewards"] if self.penalties is None else tensors["rewards"] - self.penalties
        self._last_dones = th.as_tensor(dones, dtype=th.bool, device=self.device)
        advantages = generalized_advantages(
            rewards,
            tensors["values"],
            tensors["last_values"],
            self._terminated(),
            tensors["truncated"],
            gamma=self.gamma,
            gae_lambda=self.gae_lambda,
            final_values=tensors["final_values"],
        ).float()
        tensors["advantages"], tensors["returns"] = advantages, advantages + tensors["values"]
        self._flat = None

    def stored(self, name: str) -> Any:
        return self.tensors[name]

    def _to_flat(self, array: Any) -> th.Tensor:
        return th.as_tensor(array, device=self.device).transpose(0, 1).flatten(0, 1)

    def _unflat(self, tensor: th.Tensor) -> Any:
        return tensor.view(self.n_envs, self.buffer_size, *tensor.shape[1:]).transpose(0, 1)

    def shuffled_rows(self, batch_size: int) -> tuple[th.Tensor, ...]:
        if self.device.type == "cpu":
            return super().shuffled_rows(batch_size)
        flat = self.flat()
        rows = th.randperm(len(flat.returns) // flat.length, device=self.device)  # drawn on the device: no copy
        return th.split(rows, max(1, batch_size // flat.length))


def own_buffer_class(env: VecEnv | None, observation_space: spaces.Space[Any]) -> type[RolloutBuffer]:
    """
    The buffer class for an environment.

    :param env: the training environment
    :param observation_space: of the environment
    """
    return TensorRolloutBuffer if gives_tensors(env) else buffer_class_for(observation_space)


def _readable(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _readable(part) for key, part in value.items()}
    array = to_arrays(value)
    if isinstance(value, th.Tensor) and value.device.type != "cpu":
        array.setflags(write=False)
    return array


def _writable(value: Any, device: th.device) -> Any:
    # torch refuses read-only and reversed arrays, so these are copied.
    if isinstance(value, np.ndarray) and (not value.flags.writeable or min(value.strides, default=0) < 0):
        value = value.copy()
    if isinstance(value, dict):
        return {key: _writable(part, device) for key, part in value.items()}
    return to_tensors(value, device)
