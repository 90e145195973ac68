"""Environments whose tensors stay on a device, and the same ones as SB3 would have them."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.vec_env import VecEnv

from examples.torch_environments import TorchCartPole, TorchPendulum


class ShortCartPole(TorchCartPole):
    """Its episodes are cut after few steps, where they have not ended by then."""

    max_episode_steps = 11

    def _first_states(self) -> th.Tensor:
        return self._uniform([2.2, 1.0, 0.15, 0.5])


class ShortPendulum(TorchPendulum):
    max_episode_steps = 5


class Groups(ShortCartPole):
    """What it shows is in two groups, of which one is for the critic; and an action is not allowed in some states."""

    single_observation_space: spaces.Space[Any] = spaces.Dict(
        {
            "policy": spaces.Box(-np.inf, np.inf, (2,), np.float32),
            "critic": spaces.Box(-np.inf, np.inf, (4,), np.float32),
        }
    )

    def reset(self, **kwargs: Any) -> Any:
        obs, extras = super().reset(**kwargs)
        return self._grouped(obs), extras

    def step(self, actions: th.Tensor) -> Any:
        obs, *others, extras = super().step(actions)
        return self._grouped(obs), *others, {"final_obs": self._grouped(extras["final_obs"])}

    def _grouped(self, obs: th.Tensor) -> dict[str, th.Tensor]:
        return {"policy": obs[:, :2], "critic": obs}


class MaskedGroups(Groups):
    """An action is not allowed where the cart is far to one side."""

    single_observation_space: spaces.Space[Any] = spaces.Dict(
        {**Groups.single_observation_space.spaces, "action_mask": spaces.MultiBinary(2)}
    )

    def _grouped(self, obs: th.Tensor) -> dict[str, th.Tensor]:
        mask = th.stack((obs[:, 0] > -1.0, obs[:, 0] < 1.0), dim=1).to(th.int8)
        return {**super()._grouped(obs), "action_mask": mask}


class AsSB3(VecEnv):
    """
    The same environments as SB3 has them, by arrays and an info for each.

    :param env: of tensors
    """

    def __init__(self, env: Any) -> None:
        self.env = env
        super().__init__(env.num_envs, env.single_observation_space, env.single_action_space)

    def reset(self) -> Any:
        obs, _ = self.env.reset(seed=self._seeds[0])
        self._seeds = [None] * self.num_envs
        self.episodes: list[list[float]] = [[] for _ in range(self.num_envs)]
        return numpy_of(obs)

    def step_async(self, actions: np.ndarray) -> None:
        self.actions = actions

    def step_wait(self) -> Any:
        results = self.env.step(th.tensor(self.actions))
        obs, rewards, terminated, truncated = map(numpy_of, results[:4])
        infos: list[dict[str, Any]] = []
        for i in range(self.num_envs):
            self.episodes[i].append(float(rewards[i]))
            infos.append({"TimeLimit.truncated": bool(truncated[i] and not terminated[i])})
            if terminated[i] or truncated[i]:
                final = numpy_of(results[4]["final_obs"])
                row = {key: array[i] for key, array in final.items()} if isinstance(final, dict) else final[i]
                infos[i]["terminal_observation"] = row
                infos[i]["episode"] = {"r": round(sum(self.episodes[i]), 6), "l": len(self.episodes[i]), "t": 0.0}
                self.episodes[i] = []
        return obs, rewards, terminated | truncated, infos

    def close(self) -> None: ...

    def get_attr(self, attr_name: str, indices: Any = None) -> list[Any]:
        if attr_name == "render_mode":
            return [None] * self.num_envs
        raise AttributeError(attr_name)

    def set_attr(self, attr_name: str, value: Any, indices: Any = None) -> None:
        raise AttributeError(attr_name)

    def env_method(self, method_name: str, *method_args: Any, indices: Any = None, **method_kwargs: Any) -> list[Any]:
        raise AttributeError(method_name)

    def env_is_wrapped(self, wrapper_class: Any, indices: Any = None) -> list[bool]:
        return [False] * self.num_envs


def numpy_of(tensors: Any) -> Any:
    """A copy of them."""
    if isinstance(tensors, dict):
        return {key: numpy_of(tensor) for key, tensor in tensors.items()}
    return tensors.numpy().copy()
