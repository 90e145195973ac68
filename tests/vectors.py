"""Vectors of environments that are none of SB3's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space

from tests.envs import BOX, ScriptedEnv

MakeEnv = Callable[[], gym.Env[Any, Any]]


CHOICE = gym.spaces.Discrete(3)


def scripted_envs(
    n_envs: int, action_space: gym.Space[Any] = CHOICE, obs_space: gym.Space[Any] = BOX
) -> list[Callable[[], ScriptedEnv]]:
    """What makes some whose episodes are terminated, truncated, and both at once, each at other steps than the next."""
    script = ((3, True, False), (2, False, True), (4, True, True))
    scripts = [script[i % 3 :] + script[: i % 3] for i in range(n_envs)]
    return [partial(ScriptedEnv, obs_space, action_space, script=of_one) for of_one in scripts]


def wrapped(wrapper: Callable[..., gym.Env[Any, Any]], makers: Sequence[MakeEnv]) -> list[MakeEnv]:
    """What makes each of the environments in a wrapper."""

    def make_wrapped(make: MakeEnv) -> gym.Env[Any, Any]:
        return wrapper(make())

    return [partial(make_wrapped, make) for make in makers]


class NativeVector(VectorEnv[Any, Any, Any]):
    """
    Steps environments all at once, and knows no ``reset_mask``, like gymnasium's own CartPole.

    :param makers: make the environments
    :param mode: when an episode follows another: with the next step, or in the step that ends one
    """

    def __init__(self, makers: Sequence[MakeEnv], mode: AutoresetMode = AutoresetMode.NEXT_STEP) -> None:
        self.envs = [make() for make in makers]
        self.num_envs = len(self.envs)
        self.metadata = {"autoreset_mode": mode}
        self.single_observation_space = self.envs[0].observation_space
        self.single_action_space = self.envs[0].action_space
        self.observation_space = batch_space(self.single_observation_space, self.num_envs)
        self.action_space = batch_space(self.single_action_space, self.num_envs)
        self._ended = [False] * self.num_envs

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        self._ended = [False] * self.num_envs
        seeds = [None if seed is None else seed + i for i in range(self.num_envs)]
        obs, infos = zip(*(env.reset(seed=s) for env, s in zip(self.envs, seeds, strict=True)), strict=True)
        return self._batched(obs), self._masks(infos)

    def step(self, actions: Any) -> tuple[Any, Any, Any, Any, dict[str, Any]]:
        is_next = self.metadata["autoreset_mode"] is AutoresetMode.NEXT_STEP
        results: list[Any] = [
            _as_step(*env.reset()) if ended and is_next else env.step(action)
            for env, ended, action in zip(self.envs, self._ended, actions, strict=True)
        ]
        obs, rewards, terminated, truncated, of_envs = zip(*results, strict=True)
        self._ended = [t or u for t, u in zip(terminated, truncated, strict=True)]
        infos = self._masks(of_envs)
        if not is_next and any(self._ended):
            infos["final_obs"] = self._batched(obs)
            obs = tuple(e.reset()[0] if ended else o for e, ended, o in zip(self.envs, self._ended, obs, strict=True))
        return self._batched(obs), np.array(rewards), np.array(terminated), np.array(truncated), infos

    def _masks(self, infos: Any) -> dict[str, Any]:
        return {"action_mask": np.stack([i["action_mask"] for i in infos])} if "action_mask" in infos[0] else {}

    def _batched(self, obs: Any) -> Any:
        if isinstance(obs[0], dict):
            return {key: np.stack([one[key] for one in obs]) for key in obs[0]}
        return np.stack(obs)


def _as_step(obs: Any, info: dict[str, Any]) -> tuple[Any, float, bool, bool, dict[str, Any]]:
    return obs, 0.0, False, False, info


class WithResetSteps(gym.Wrapper[Any, Any, Any, Any]):
    """
    One environment as ``NEXT_STEP`` makes it: between two episodes is one of a single step, from the last observation
    of the one to the first of the other, without a reward.
    """

    _obs: Any = None
    _has_ended = False

    def reset(self, **kwargs: Any) -> tuple[Any, dict[str, Any]]:
        if self._obs is None or kwargs.get("seed") is not None:
            self._obs, _ = self.env.reset(**kwargs)
        return self._obs, {}

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        if self._has_ended:
            self._has_ended = False
            self._obs, _ = self.env.reset()
            return self._obs, 0.0, True, False, {"is_reset_step": True}
        self._obs, reward, terminated, truncated, info = self.env.step(action)
        self._has_ended = terminated or truncated
        return self._obs, reward, terminated, truncated, info


class Pool:
    """
    Environments by EnvPool's interface: seeded where they are made, some of them reset by their numbers.

    :param makers: make the environments
    :param seed: of the first; the next have the next ones
    :param config: what it is made with besides
    """

    metadata = {"autoreset_mode": AutoresetMode.NEXT_STEP}  # noqa: RUF012
    closed = False
    render_mode = spec = None

    def __init__(self, makers: Sequence[MakeEnv], seed: int = 0, **config: Any) -> None:
        self.envs = [make() for make in makers]
        self.config = {"num_envs": len(makers), "batch_size": len(makers), "seed": seed, "max_episode_steps": 4}
        self.config |= config
        self.observation_space = self.single_observation_space = self.envs[0].observation_space
        self.action_space = self.single_action_space = self.envs[0].action_space
        self.all_env_ids = np.arange(len(makers))
        self.is_async = self.config["batch_size"] != len(makers)
        self._seeds: list[int | None] = [seed + i for i in range(len(makers))]
        self.unwrapped = self

    def __len__(self) -> int:
        return len(self.envs)

    def send(self, actions: Any) -> None: ...

    def recv(self) -> None: ...

    def reset(self, env_id: Any = None) -> tuple[Any, dict[str, Any]]:
        rows = self.all_env_ids if env_id is None else env_id
        obs = []
        for i in rows:
            obs.append(self.envs[i].reset(seed=self._seeds[i])[0])
            self._seeds[i] = None
        return np.stack(obs), {"env_id": rows}

    def step(self, actions: Any) -> tuple[Any, Any, Any, Any, dict[str, Any]]:
        results = [env.step(action) for env, action in zip(self.envs, actions, strict=True)]
        obs, rewards, terminated, truncated, _ = zip(*results, strict=True)
        truncated = np.array(truncated) & ~np.array(terminated)  # EnvPool says one of the two
        return np.stack(obs), np.array(rewards), np.array(terminated), truncated, {"env_id": self.all_env_ids}

    def close(self) -> None: ...
