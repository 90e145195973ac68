"""Wrap a vector environment of gymnasium or EnvPool as a VecEnv of SB3 that gives whole arrays."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from gymnasium.vector import AsyncVectorEnv, SyncVectorEnv, VectorEnv, VectorWrapper
from gymnasium.wrappers.vector import RecordEpisodeStatistics
from stable_baselines3.common.env_util import is_wrapped
from stable_baselines3.common.monitor import Monitor

from sb3_ppo_ext.common.errors import ArgumentError
from sb3_ppo_ext.common.rollout.autoreset import is_envpool, way_to_begin, within_the_step
from sb3_ppo_ext.common.rollout.data import MASK_KEY
from sb3_ppo_ext.common.rollout.episode_statistics import EpisodeStatistics
from sb3_ppo_ext.common.rollout.transitions import BatchedVecEnv, Infos, Transition, info_of, row_of


class ArrayVecEnv(BatchedVecEnv):
    """
    Lets SB3 use a ``VectorEnv`` of gymnasium, or an environment of EnvPool (``envpool.make_gymnasium``), as a
    ``VecEnv``. ``DualClipPPO("MlpPolicy", gymnasium.make_vec("CartPole-v1", 256))`` wraps its environment by itself;
    for ``evaluate_policy`` and ``EvalCallback`` you wrap it. It records returns and lengths of episodes as ``Monitor``
    does.

    An episode ends and the next begins within one step, as in SB3: for ``SyncVectorEnv``, ``AsyncVectorEnv`` with
    shared memory and EnvPool in every ``autoreset_mode``, for other vectors with ``SAME_STEP`` or ``DISABLED``. A
    ``NEXT_STEP`` vector of another kind spends a whole step on each reset. These steps have no reward, nothing is
    learnt from them, and they are not part of the recorded episodes.

    :param env: the vector of environments
    :raises ValueError: if it is not such a vector, or its environments cannot all be stepped at once
    """

    def __init__(self, env: Any) -> None:
        _check(env)
        self.vector_env = env
        self._inner = env.unwrapped
        self._is_envpool = is_envpool(self._inner)
        self._begin = way_to_begin(env)
        n_envs = len(env) if is_envpool(env) else env.num_envs
        # When only some are reset, RecordEpisodeStatistics forgets all: the vector removes the mask it looks for.
        begins_by_mask = self._begin not in (None, within_the_step)
        self._statistics = EpisodeStatistics(n_envs, reads_theirs=not (begins_by_mask and _is_recorded(env)))
        self._begins = np.zeros(n_envs, dtype=bool)  # the environments that begin an episode with the next step
        self._masks: Any = None
        action_space = env.single_action_space
        self._action_dtype = None if isinstance(action_space, spaces.Box) else action_space.dtype
        self.processes = getattr(self._inner, "processes", [])  # to find out why one does not answer
        self.resets_take_steps = self._begin is None
        self.can_be_restored = type(env) is SyncVectorEnv
        super().__init__(n_envs, env.single_observation_space, action_space)
        if self._is_envpool:
            self.max_episode_steps = self._inner.config.get("max_episode_steps", 0)
        elif self.has_attr("spec"):
            self.max_episode_steps = max(
                getattr(spec, "max_episode_steps", None) or 0 for spec in self.get_attr("spec")
            )

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.vector_env!r})"

    def seed(self, seed: int | None = None) -> Sequence[int | None]:
        if self._is_envpool and seed != self._inner.config["seed"]:
            raise NotImplementedError(
                f"environments of EnvPool are seeded where they are made, and these were with "
                f"{self._inner.config['seed']}: envpool.make_gymnasium(..., seed={seed}) makes them with this seed"
            )
        return super().seed(seed)

    def reset(self) -> Any:
        seed, options = self._seeds[0], self._options[0]
        if any(others != options for others in self._options):
            raise ValueError(f"set_options({self._options!r:.100}) is not allowed: all environments get the same ones")
        if self._is_envpool:
            obs, infos = self.vector_env.reset()
        else:
            obs, infos = self.vector_env.reset(seed=seed, options=dict(options) if options else None)
        self._reset_seeds()
        self._reset_options()
        self._begins = np.zeros(self.num_envs, dtype=bool)
        self._statistics.forget()
        self._masks = infos.get(MASK_KEY)
        self.reset_infos = Infos(self.num_envs, lambda i: info_of(infos, i, self.num_envs))  # type: ignore[assignment]
        return _arrays(obs)

    def make_transition(self, actions: Any) -> Transition:
        if self._action_dtype is not None:
            actions = actions.astype(self._action_dtype, copy=False)
        obs, *results, infos = self.vector_env.step(actions)
        obs, (rewards, terminated, truncated) = _arrays(obs), self._checked(results)
        counts = None
        if self._begin is None:
            counts = ~self._begins
            rewards, terminated, truncated = np.where(counts, rewards, 0.0), terminated & counts, truncated & counts
        ends = terminated | truncated
        final_obs, final_infos, self._masks = None, infos, infos.get(MASK_KEY)
        if self._begin is None:
            self._begins = ends
        if ends.any():
            if self._begin is not None:
                obs, final_obs, final_infos, self._masks = self._begin(obs, ends, infos)
            else:  # the next action only begins the episode, so any will do
                final_obs, obs, self._masks = obs, _with_all_allowed(obs, ends), _all_allowed(self._masks, ends)
        if self._is_envpool and "reward" in infos and "terminated" in infos:
            # Atari: the reward before clipping, and the end of the game where an episode ends with each life.
            ends_game = ends & ((infos["terminated"] != 0) | truncated)
            episodes = self._statistics.after(infos["reward"], counts, ends_game, final_infos)
        else:
            episodes = self._statistics.after(rewards, counts, ends, final_infos)
        truncated = truncated & ~terminated

        def make_info(i: int) -> dict[str, Any]:
            info = info_of(final_infos if ends[i] else infos, i, self.num_envs)
            info["TimeLimit.truncated"] = bool(truncated[i])
            if ends[i]:
                info["terminal_observation"] = row_of(final_obs, i)
            if episodes is not None:
                for episode in episodes.some(episodes.env_indices == i).infos():
                    info["episode"] = episode
            return info

        return Transition(
            obs,
            rewards.astype(np.float32),
            terminated,
            truncated,
            final_obs,
            counts,
            episodes,
            Infos(self.num_envs, make_info),
        )

    def _checked(self, results: Sequence[Any]) -> Iterator[np.ndarray]:
        for name, dtype, array in zip(
            ("rewards", "terminations", "truncations"), (float, bool, bool), results, strict=True
        ):
            if np.shape(array) != (self.num_envs,):
                raise ValueError(
                    f"{self.vector_env!r:.100} gives {name} of shape {np.shape(array)}, which must be "
                    f"({self.num_envs},): one number for each environment"
                )
            yield np.asarray(array, dtype=dtype)

    def action_masks_in_infos(self) -> Any:
        return self._masks

    def close(self) -> None:
        self.vector_env.close()

    def get_images(self) -> Sequence[np.ndarray | None]:
        frames = self.vector_env.render(np.arange(self.num_envs)) if self._is_envpool else self.vector_env.render()
        return [None] * self.num_envs if frames is None else list(frames)

    # Single environments can be reached only in gymnasium's SyncVectorEnv and, in part, AsyncVectorEnv.

    def has_attr(self, attr_name: str) -> bool:
        if isinstance(self._inner, (SyncVectorEnv, AsyncVectorEnv)):
            return all(self._inner.call("has_wrapper_attr", attr_name))
        return attr_name in _OF_ALL and hasattr(self.vector_env, attr_name)

    def get_attr(self, attr_name: str, indices: Any = None) -> list[Any]:
        chosen = list(self._get_indices(indices))
        if isinstance(self._inner, SyncVectorEnv):
            return [self._inner.envs[i].get_wrapper_attr(attr_name) for i in chosen]
        if not self.has_attr(attr_name):  # a worker process ends when it is asked for what is not there
            raise AttributeError(f"{self.vector_env!r:.100} cannot say {attr_name!r} of its environments")
        if isinstance(self._inner, AsyncVectorEnv):
            values = self._inner.get_attr(attr_name)
            return [values[i] for i in chosen]
        return [getattr(self.vector_env, attr_name)] * len(chosen)

    def set_attr(self, attr_name: str, value: Any, indices: Any = None) -> None:
        chosen = self._each(indices, f"set_attr({attr_name!r})")
        if isinstance(self._inner, SyncVectorEnv):
            for i in chosen:
                self._inner.envs[i].set_wrapper_attr(attr_name, value)
        else:
            self._inner.set_attr(attr_name, [value] * self.num_envs)

    def env_method(self, method_name: str, *method_args: Any, indices: Any = None, **method_kwargs: Any) -> list[Any]:
        chosen = self._each(indices, f"env_method({method_name!r})")
        if isinstance(self._inner, SyncVectorEnv):
            methods = [self._inner.envs[i].get_wrapper_attr(method_name) for i in chosen]
            return [method(*method_args, **method_kwargs) for method in methods]
        return list(self._inner.call(method_name, *method_args, **method_kwargs))

    def _each(self, indices: Any, what: str) -> list[int]:
        """The environments with these indices, if single ones can be reached."""
        chosen = list(self._get_indices(indices))
        if isinstance(self._inner, SyncVectorEnv) or (
            isinstance(self._inner, AsyncVectorEnv) and chosen == list(range(self.num_envs))
        ):
            return chosen
        raise NotImplementedError(
            f"{what} is not possible: single environments of {self.vector_env!r:.100} cannot be reached"
        )

    def env_is_wrapped(self, wrapper_class: type[Any], indices: Any = None) -> list[bool]:
        chosen = list(self._get_indices(indices))
        if wrapper_class is Monitor:  # its figures are in the infos of ended episodes
            return [True] * len(chosen)
        if isinstance(self._inner, SyncVectorEnv):
            return [is_wrapped(self._inner.envs[i], wrapper_class) for i in chosen]
        return [False] * len(chosen)


_OF_ALL = ("metadata", "render_mode", "spec")  # these attributes of a vector hold for each of its environments


def _check(env: Any) -> None:
    """Raise an ArgumentError unless this is a vector whose environments can all be stepped at once."""
    given = f"env={env!r:.100} is not allowed: "
    if is_envpool(env):
        if not hasattr(env, "single_action_space") and not isinstance(env, gym.Env):
            raise ArgumentError(f"{given}envpool.make_gymnasium makes one that can be taken")
        if env.is_async:
            raise ArgumentError(
                f"{given}its batch_size={env.config['batch_size']} is not its num_envs={len(env)}, so a step "
                "does not move all environments; leave batch_size out"
            )
        if env.config.get("max_num_players", 1) != 1:
            raise ArgumentError(f"{given}it has several players, and each environment must have one")
    elif not isinstance(env, VectorEnv):
        raise ArgumentError(f"{given}it must be a VectorEnv of gymnasium or an environment of EnvPool")
    if env.closed:
        raise ArgumentError(f"{given}it has been closed")


def _is_recorded(env: Any) -> bool:
    while isinstance(env, VectorWrapper):
        if isinstance(env, RecordEpisodeStatistics):
            return True
        env = env.env
    return False


def _arrays(obs: Any) -> Any:
    if isinstance(obs, dict):
        return {key: _arrays(part) for key, part in obs.items()}
    return obs if isinstance(obs, np.ndarray) else np.array(obs)


def _all_allowed(masks: Any, rows: np.ndarray) -> Any:
    if masks is None:
        return None
    if masks.dtype != object:
        return np.where(rows[:, None], np.ones_like(masks), masks)
    # In parts, one for each dimension of an action.
    return [tuple(map(np.ones_like, mask)) if row else mask for row, mask in zip(rows, masks, strict=True)]


def _with_all_allowed(obs: Any, rows: np.ndarray) -> Any:
    return {**obs, MASK_KEY: _all_allowed(obs[MASK_KEY], rows)} if isinstance(obs, dict) and MASK_KEY in obs else obs
