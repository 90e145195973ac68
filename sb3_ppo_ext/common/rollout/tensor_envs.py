"""
Environments whose tensors never leave their device.

Where SB3 takes an environment, an algorithm of this package takes one object that steps many environments at once, on
any device, if it has (nothing need be derived from):

- ``num_envs``, an integer, and ``device``, of its tensors;
- ``single_observation_space`` and ``single_action_space``, gymnasium's spaces of one environment;
- ``reset(seed=None) -> obs, extras``, which begins an episode everywhere;
- ``step(actions) -> obs, rewards, terminated, truncated, extras``.

``obs`` is a tensor of shape ``(num_envs, *obs_shape)``, or for a ``Dict`` space a dict of such. ``rewards`` are floats,
and ``terminated`` and ``truncated`` bools, of shape ``(num_envs,)``. A step that ends an episode begins the next:
``obs`` is its first observation, and ``extras["final_obs"]``, of the shape of ``obs``, holds what the episode ended
with; other rows may hold anything. Its value is used for bootstrapping when a time limit ends the episode. ``actions``
have the shape ``(num_envs, *action_shape)``; those of a ``Box`` are clipped to its bounds, as in SB3, and all others
have the dtype of their space. The environment may write into the returned tensors at the next step.

A ``VectorEnv`` of gymnasium is one of these, if it gives tensors, has a ``device``, and its ``autoreset_mode`` is
``SAME_STEP``. :mod:`sb3_ppo_ext.common.rollout.tensor_adapters` makes one of those of Isaac Lab, mjlab, Brax and MuJoCo
Playground.

``DualClipPPO("MlpPolicy", env, n_steps=24, batch_size=...)`` trains in it. From the environment to the optimiser all
stays on the device: observations, actions, the rollout buffer, advantages and minibatches. Callbacks see SB3's
protocol: ``locals["new_obs"]`` and ``locals["actions"]`` are tensors, ``rewards`` and ``dones`` arrays, and ``infos``
are made when they are asked for; ``model.get_env().extras`` are those of the last step. :class:`TensorVecEnv` makes of
an environment what ``evaluate_policy`` and ``EvalCallback`` take. Two more methods, ``state_dict() -> dict`` and
``load_state_dict(dict)``, let a checkpoint be resumed to the bit.

``policy_kwargs={"normalize_observations": True}`` and ``TensorVecEnv(env, normalize_rewards=True)`` take the place of
``VecNormalize``, on the device.

REINFORCE, whose rollouts are complete episodes, and buffers of one's own are filled by way of numpy, and so is what a
``VecNormalize`` or another wrapper of SB3's around a :class:`TensorVecEnv` gives.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch as th
from gymnasium import spaces
from gymnasium.vector import AutoresetMode
from stable_baselines3.common.monitor import Monitor

from sb3_ppo_ext.common.errors import ArgumentError
from sb3_ppo_ext.common.rollout.data import MASK_KEY, dtype_of, to_arrays
from sb3_ppo_ext.common.rollout.normalization import RunningMoments
from sb3_ppo_ext.common.rollout.transitions import BatchedVecEnv, Episodes, Infos, Transition, row_of
from sb3_ppo_ext.common.validation import check_bool, check_real

# Further attributes that callers may read, because they are the same for all environments.
_ASKED = ("render_mode", "spec", "state_dict", "load_state_dict")

_PROTOCOL = ("num_envs", "device", "single_observation_space", "single_action_space", "reset", "step")


def is_tensor_env(env: Any) -> bool:
    """
    Whether an object has what this module asks of environments on a device.

    :param env: any object
    """
    return all(hasattr(env, name) for name in _PROTOCOL)


class TensorVecEnv(BatchedVecEnv):
    """
    Wraps environments on a device as a ``VecEnv`` of SB3. For actions that are arrays it returns arrays, for tensors it
    returns tensors.

    :param env: as this module describes it
    :param normalize_rewards: whether rewards are divided by the standard deviation of the discounted returns so far and
        clipped to +-10, as ``VecNormalize`` does; the returns of episodes in the logs are not. A checkpoint holds the
        statistics
    :param gamma: discount factor of those returns, as the algorithm has it
    :raises ValueError: if the environment is another, or a number out of range
    """

    gives_tensors = True

    extras: dict[str, Any]
    """The ``extras`` of the last step or reset."""

    def __init__(self, env: Any, *, normalize_rewards: bool = False, gamma: float = 0.99) -> None:
        check_bool("normalize_rewards", normalize_rewards)
        check_real("gamma", gamma, at_least=0.0, at_most=1.0)
        given = f"env={env!r:.100} is not allowed: "
        missing = [name for name in _PROTOCOL if not hasattr(env, name)]
        if missing:
            raise ArgumentError(
                f"{given}an environment on a device must have {', '.join(_PROTOCOL)}; {missing[0]} is missing"
            )
        mode = (getattr(env, "metadata", None) or {}).get("autoreset_mode", AutoresetMode.SAME_STEP)
        if AutoresetMode(mode) is not AutoresetMode.SAME_STEP:
            raise ArgumentError(
                f"{given}its autoreset_mode is {AutoresetMode(mode)}, and must be {AutoresetMode.SAME_STEP}: the step "
                "that ends an episode begins the next"
            )
        if hasattr(env, "action_masks"):
            raise ArgumentError(
                f"{given}it has action_masks, which is not asked: masks must be in extras, or in Dict observations, "
                'under the key "action_mask"'
            )
        self.tensor_env = env
        try:
            self.device = th.device(env.device)
        except (RuntimeError, TypeError) as error:
            raise ArgumentError(
                f"{given}its device is {env.device!r}, and must be that of its tensors, such as 'cpu' or 'cuda'"
            ) from error
        self.can_be_restored = hasattr(env, "state_dict") and hasattr(env, "load_state_dict")
        self.max_episode_steps = getattr(env, "max_episode_steps", 0)
        self._start = time.time()
        self._gamma = gamma
        self._of_returns: RunningMoments | None = None
        if normalize_rewards:
            self._of_returns = RunningMoments(()).to(self.device)
            self._of_returns.count.fill_(1e-4)  # as VecNormalize begins
        # The policy draws floats for a Box and for bits.
        space = env.single_action_space
        self._actions_dtype = None if isinstance(space, spaces.Box) else dtype_of(space)
        self.extras = {}
        self._forget_episodes(env.num_envs)
        super().__init__(env.num_envs, env.single_observation_space, env.single_action_space)

    @property
    def moments_of_returns(self) -> RunningMoments | None:
        """The moments that normalise rewards; None if rewards are not normalised."""
        return self._of_returns

    def _forget_episodes(self, n_envs: int) -> None:
        # Monitor adds in float64, which MPS lacks.
        wide = th.float32 if self.device.type == "mps" else th.float64
        self._returns = th.zeros(n_envs, dtype=wide, device=self.device)
        self._lengths = th.zeros(n_envs, dtype=th.int64, device=self.device)
        self._discounted = th.zeros_like(self._returns)

    def reset(self) -> Any:
        if any(self._options):
            raise ValueError(f"set_options({self._options!r:.100}) is not allowed: the environments take none")
        obs, extras = self.tensor_env.reset(seed=self._seeds[0])
        self._check_obs(obs)
        self._check_extras(extras)
        self.extras = extras
        self.reset_infos = Infos(self.num_envs, lambda i: self._row_of(extras, i))  # type: ignore[assignment]
        self._reset_seeds()
        self._forget_episodes(self.num_envs)
        return to_arrays(obs)

    def make_transition(self, actions: Any) -> Transition:
        actions = th.as_tensor(actions, dtype=self._actions_dtype, device=self.device)
        obs, rewards, terminated, truncated, extras = self.tensor_env.step(actions)
        self._check_obs(obs)
        for name, tensor in (("rewards", rewards), ("terminated", terminated), ("truncated", truncated)):
            self._check_tensor(tensor, name)
        self._check_extras(extras)
        self.extras = extras
        terminated = terminated.bool()
        truncated = truncated.bool() & ~terminated
        self._returns += rewards
        self._lengths += 1
        if self._of_returns is not None:
            self._discounted = self._gamma * self._discounted + rewards
            n = self._discounted.new_tensor(float(self.num_envs))
            self._of_returns.add(self._discounted.mean(), self._discounted.var(correction=0), n)
            rewards = (rewards * (self._of_returns.var + 1e-8).rsqrt()).clamp(-10.0, 10.0)
        ends = terminated | truncated
        has_ended = bool(ends.any())  # the only wait for the device in most steps
        final_obs = extras.get("final_obs") if has_ended else None
        if has_ended and final_obs is None and bool(truncated.any()):
            raise ValueError(
                f"A time limit has cut the episode of environment {int(truncated.nonzero()[0])}, and extras have no "
                "'final_obs', which must be what it ended with"
            )
        if final_obs is not None:
            self._check_obs(final_obs, "'final_obs'")
        episodes = self._ended(ends.nonzero().flatten()) if has_ended else None

        def make_info(i: int) -> dict[str, Any]:
            info = self._row_of(extras, i)
            info["TimeLimit.truncated"] = bool(truncated[i])
            if ends[i]:
                info["terminal_observation"] = None if final_obs is None else to_arrays(row_of(final_obs, i))
            if episodes is not None:
                for episode in episodes.some(episodes.env_indices == i).infos():
                    info["episode"] = episode
            return info

        return Transition(
            obs, rewards, terminated, truncated, final_obs, None, episodes, Infos(self.num_envs, make_info)
        )

    def _row_of(self, extras: dict[str, Any], i: int) -> dict[str, Any]:
        """What extras say of an environment: the rows of tensors that have one for each."""
        return {
            name: to_arrays(value[i])
            for name, value in extras.items()
            if name != "final_obs" and isinstance(value, th.Tensor) and value.shape[:1] == (self.num_envs,)
        }

    def step_wait(self) -> Any:
        transition = self.make_transition(self._actions)
        if isinstance(self._actions, np.ndarray):
            of_episodes = transition.episodes
            transition = Transition(*map(to_arrays, transition))._replace(
                episodes=None if of_episodes is None else Episodes(*map(to_arrays, of_episodes))
            )
        self.transition = transition
        return transition.obs, transition.rewards, transition.dones, transition.infos

    def _check_obs(self, obs: Any, name: str = "observations") -> None:
        space = self.observation_space
        parts: Any = space.spaces.items() if isinstance(space, spaces.Dict) else [(None, space)]
        for key, of_key in parts:
            if key is not None and not (isinstance(obs, dict) and key in obs):
                raise ValueError(f"The environments gave {name} without the key {key!r}, which their space has")
            of_name = name if key is None else f"{name} of {key!r}"
            self._check_tensor(obs if key is None else obs[key], of_name, of_key.shape or ())

    def _check_tensor(self, tensor: Any, name: str, shape: tuple[int, ...] = ()) -> None:
        if not isinstance(tensor, th.Tensor):
            raise ValueError(f"The environments gave {name} as a {type(tensor).__name__}, which must be a tensor")
        if tuple(tensor.shape) != (self.num_envs, *shape):
            raise ValueError(
                f"The environments gave {name} of shape {tuple(tensor.shape)}, and by their number and space they must "
                f"have {(self.num_envs, *shape)}"
            )
        if tensor.requires_grad:
            raise ValueError(
                f"The environments gave {name} with a gradient, and nothing is differentiated through them: decorate "
                "their reset() and step() with torch.no_grad()"
            )

    def _check_extras(self, extras: Any) -> None:
        if not isinstance(extras, dict):
            raise ValueError(f"The environments gave extras as a {type(extras).__name__}, which must be a dict")

    def _ended(self, rows: th.Tensor) -> Episodes:
        """The episodes that the last step has ended; those that follow are counted from 0."""
        returns, lengths = self._returns[rows], self._lengths[rows]
        self._returns[rows] = 0.0
        self._lengths[rows] = 0
        self._discounted[rows] = 0.0
        now = th.full_like(returns, time.time() - self._start)
        return Episodes(rows, returns, lengths, now)

    def action_masks_in_infos(self) -> Any:
        return to_arrays(self.extras.get(MASK_KEY))

    def close(self) -> None:
        if hasattr(self.tensor_env, "close"):
            self.tensor_env.close()

    def has_attr(self, attr_name: str) -> bool:
        return attr_name in _ASKED and hasattr(self.tensor_env, attr_name)

    def get_attr(self, attr_name: str, indices: Any = None) -> list[Any]:
        if attr_name == "render_mode":
            value = getattr(self.tensor_env, attr_name, None)
        else:
            value = getattr(self.tensor_env, attr_name)
        return [value for _ in self._get_indices(indices)]

    def set_attr(self, attr_name: str, value: Any, indices: Any = None) -> None:
        setattr(self.tensor_env, attr_name, value)

    def env_method(self, method_name: str, *method_args: Any, indices: Any = None, **method_kwargs: Any) -> list[Any]:
        result = getattr(self.tensor_env, method_name)(*method_args, **method_kwargs)
        return [result for _ in self._get_indices(indices)]

    def env_is_wrapped(self, wrapper_class: type[Any], indices: Any = None) -> list[bool]:
        return [issubclass(Monitor, wrapper_class) for _ in self._get_indices(indices)]  # by which episodes are counted

    def get_images(self) -> Sequence[Any]:
        raise NotImplementedError("environments on a device are not drawn one by one")
