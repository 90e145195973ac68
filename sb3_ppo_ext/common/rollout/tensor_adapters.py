"""
Adapters that give the environments of Isaac Lab, mjlab, Brax and MuJoCo Playground the interface of
:mod:`sb3_ppo_ext.common.rollout.tensor_envs`.

Neither these libraries nor JAX are imported before an adapter is created.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch as th
from gymnasium import spaces
from torch.utils.dlpack import from_dlpack

from sb3_ppo_ext.common.validation import check_int, check_real


class RslRlEnv:
    """
    Adapts an environment with the interface of ``rsl_rl``, such as the ``RslRlVecEnvWrapper`` of Isaac Lab and mjlab.

    Its observations are groups. A single group is the observation itself; several groups form a ``Dict``, for
    ``"MultiInputPolicy"``. With ``policy_kwargs={"critic_observation_key": "critic"}``, only the critic sees the group
    ``"critic"``.

    These environments do not give the final observation of an episode. If a time limit (``extras["time_outs"]``) cuts
    it, bootstrapping uses the observation before the last step instead, as in ``rsl_rl``.

    :param env: with ``num_envs``, ``num_actions``, ``device``, ``get_observations()``, ``reset()`` and
        ``step(actions)``, which gives observations, rewards, dones and extras
    :param action_bound: actions are clipped to it on both sides; a ``Box`` must have bounds in SB3
    """

    def __init__(self, env: Any, *, action_bound: float = 100.0) -> None:
        check_real("action_bound", action_bound, above=0.0)
        self.env = env
        self.num_envs = int(env.num_envs)
        self.device = th.device(env.device)
        self._obs = self._groups(env.get_observations())
        self.single_observation_space = _space_of(self._obs)
        self.single_action_space = spaces.Box(-action_bound, action_bound, (int(env.num_actions),), np.float32)

    def reset(self, *, seed: int | None = None) -> tuple[Any, dict[str, Any]]:
        """
        :param seed: for the environment's ``seed``, if it has one; None: it goes on
        :return: observations, and further information
        """
        of_simulation = getattr(self.env, "unwrapped", self.env)
        if seed is not None and callable(getattr(of_simulation, "seed", None)):
            of_simulation.seed(seed)
        obs, extras = self.env.reset()
        self._obs = self._groups(obs)
        return self._obs, dict(extras)

    def step(self, actions: th.Tensor) -> tuple[Any, th.Tensor, th.Tensor, th.Tensor, dict[str, Any]]:
        """
        :param actions: shape ``(num_envs, num_actions)``
        :return: observations, rewards, terminated, truncated, and further information
        """
        before = _clone(self._obs)  # the simulation may write into the original
        obs, rewards, dones, extras = self.env.step(actions)
        self._obs = self._groups(obs)
        dones = dones.bool()
        time_outs = extras.get("time_outs")
        truncated = th.zeros_like(dones) if time_outs is None else time_outs.bool() & dones
        return self._obs, rewards, dones & ~truncated, truncated, {**extras, "final_obs": before}

    @staticmethod
    def _groups(obs: Any) -> Any:
        if isinstance(obs, tuple):  # of older versions, with extras
            obs = obs[0]
        if isinstance(obs, th.Tensor):
            return obs
        groups = {str(key): obs[key] for key in obs.keys()}  # noqa: SIM118  (a TensorDict is no mapping)
        return next(iter(groups.values())) if len(groups) == 1 else groups

    def close(self) -> None:
        """Close the simulation."""
        self.env.close()


class BraxEnv:
    """
    Adapts an environment of Brax or of MuJoCo Playground, stepped by JAX. Arrays pass through dlpack, without a copy if
    JAX and torch use the same device.

    As in these libraries' training wrappers, each episode begins in the state in which the environment's first episode
    began. Unlike there, the final observation of an episode is known and used for bootstrapping when a time limit cuts
    the episode. A dict of observations, such as Playground's ``"state"`` and ``"privileged_state"``, becomes a
    ``Dict``.

    :param env: one environment without wrappers, from ``brax.envs.get_environment(name)`` or
        ``mujoco_playground.registry.load(name)``
    :param num_envs: number of copies of it
    :param episode_length: steps after which an episode is cut
    :param action_repeat: steps of the environment with the same action
    :param device: of the tensors, the same as that of JAX's arrays
    """

    def __init__(
        self,
        env: Any,
        num_envs: int,
        *,
        episode_length: int = 1000,
        action_repeat: int = 1,
        device: th.device | str = "cpu",
    ) -> None:
        check_int("num_envs", num_envs, minimum=1)
        check_int("episode_length", episode_length, minimum=1)
        check_int("action_repeat", action_repeat, minimum=1)
        self.env = env
        self.num_envs = num_envs
        self.device = th.device(device)
        self.max_episode_steps = episode_length
        self._jax: Any = importlib.import_module("jax")
        self._begin, self._step = _compiled(self._jax, env, num_envs, episode_length, action_repeat)
        self._key = self._jax.random.PRNGKey(0)
        shapes = self._jax.eval_shape(self._begin, self._key)[0].obs
        self.single_observation_space = _space_of(shapes)
        self.single_action_space = spaces.Box(-1.0, 1.0, (int(env.action_size),), np.float32)

    def reset(self, *, seed: int | None = None) -> tuple[Any, dict[str, Any]]:
        """
        :param seed: of all that follows; None: the random numbers go on
        :return: observations, and further information
        """
        if seed is not None:
            self._key = self._jax.random.PRNGKey(seed)
        self._key, key = self._jax.random.split(self._key)
        self._first, self._n_steps = self._begin(key)
        self._state = self._first
        return self._tensors(self._state.obs), {}

    def step(self, actions: th.Tensor) -> tuple[Any, th.Tensor, th.Tensor, th.Tensor, dict[str, Any]]:
        """
        :param actions: shape ``(num_envs, action_size)``
        :return: observations, rewards, terminated, truncated, and further information
        """
        of_jax = self._jax.dlpack.from_dlpack(actions.detach().contiguous())
        self._state, self._n_steps, final_obs, rewards, terminated, truncated = self._step(
            self._first, self._state, self._n_steps, of_jax
        )
        obs, final_obs, rewards, terminated, truncated = map(
            self._tensors, (self._state.obs, final_obs, rewards, terminated, truncated)
        )
        return obs, rewards, terminated > 0, truncated > 0, {"final_obs": final_obs}

    def _tensors(self, arrays: Any) -> Any:
        if isinstance(arrays, Mapping):
            return {key: self._tensors(array) for key, array in arrays.items()}
        tensor: th.Tensor = from_dlpack(arrays)
        return tensor


def _compiled(jax: Any, env: Any, num_envs: int, episode_length: int, action_repeat: int) -> tuple[Any, Any]:
    """The compiled functions that reset and step all environments."""
    jnp = jax.numpy

    def begin(key: Any) -> Any:
        return jax.vmap(env.reset)(jax.random.split(key, num_envs)), jnp.zeros(num_envs, jnp.int32)

    def step(first: Any, state: Any, n_steps: Any, actions: Any) -> Any:
        def repeated(state: Any, _: Any) -> Any:
            after = jax.vmap(env.step)(state, actions)
            return after, (after.reward, after.done)

        state, (rewards, dones) = jax.lax.scan(repeated, state, (), action_repeat)
        is_end = dones.max(axis=0) > 0.0
        n_steps = n_steps + action_repeat
        truncated = (n_steps >= episode_length) & ~is_end
        ends = is_end | truncated

        def anew(of_first: Any, present: Any) -> Any:
            if present.shape[:1] != (num_envs,):  # the same for all
                return present
            return jnp.where(ends.reshape(-1, *[1] * (present.ndim - 1)), of_first, present)

        # Other parts of a state, such as random keys and commands, are not reset, as in the libraries' own wrappers.
        simulated = "pipeline_state" if hasattr(state, "pipeline_state") else "data"
        begun = {
            name: jax.tree_util.tree_map(anew, getattr(first, name), getattr(state, name))
            for name in (simulated, "obs")
        }
        after = state.replace(done=jnp.zeros_like(state.done), **begun)
        flags = (is_end.astype(jnp.float32), truncated.astype(jnp.float32))  # dlpack has no bools everywhere
        return after, jnp.where(ends, 0, n_steps), state.obs, rewards.sum(axis=0), *flags

    return jax.jit(begin), jax.jit(step)


def _space_of(obs: Any) -> spaces.Space[Any]:
    """The space of one environment, from the observations of all."""
    if isinstance(obs, Mapping):
        return spaces.Dict({key: _space_of(part) for key, part in obs.items()})
    return spaces.Box(-np.inf, np.inf, tuple(obs.shape[1:]), np.float32)


def _clone(obs: Any) -> Any:
    return {key: part.clone() for key, part in obs.items()} if isinstance(obs, dict) else obs.clone()
