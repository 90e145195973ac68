"""
Gymnasium's CartPole and Pendulum as batches of environments whose states are torch tensors, on any device.

    python examples/torch_environments.py

They show the interface of an environment whose tensors stay on its device; see
:mod:`sb3_ppo_ext.common.rollout.tensor_envs`. Dynamics, rewards and limits are gymnasium's ``CartPole-v1`` and
``Pendulum-v1``.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Any

import numpy as np
import torch as th
from gymnasium import spaces


class TorchEnv(ABC):
    """
    A batch of environments. A step that ends an episode also begins the next one.

    :param num_envs: number of them
    :param device: of their tensors
    """

    single_observation_space: spaces.Space[Any]
    single_action_space: spaces.Space[Any]
    max_episode_steps: int

    def __init__(self, num_envs: int, device: th.device | str = "cpu") -> None:
        self.num_envs = num_envs
        self.device = th.device(device)
        self._random = th.Generator(self.device)

    def reset(self, *, seed: int | None = None) -> tuple[th.Tensor, dict[str, Any]]:
        """
        Begin an episode in every environment.

        :param seed: for the random generator; None: the generator continues
        :return: observations, shape ``(num_envs, *obs_shape)``, and further information
        """
        if seed is not None:
            self._random.manual_seed(seed)
        self.state = self._first_states()
        self.n_steps = th.zeros(self.num_envs, dtype=th.int64, device=self.device)
        return self._observe(self.state), {}

    def step(self, actions: th.Tensor) -> tuple[th.Tensor, th.Tensor, th.Tensor, th.Tensor, dict[str, Any]]:
        """
        :param actions: shape ``(num_envs, *action_shape)``
        :return: observations, of the new episode where one has ended; rewards; whether an episode terminated; whether
            a time limit cut it; and further information: ``final_obs``, the last observations of ended episodes
        """
        self.state, rewards, terminated = self._advance(self.state, actions)
        self.n_steps = self.n_steps + 1
        truncated = self.n_steps >= self.max_episode_steps
        final_obs = self._observe(self.state)
        ends = terminated | truncated
        self.state = th.where(ends.unsqueeze(1), self._first_states(), self.state)
        self.n_steps = self.n_steps.masked_fill(ends, 0)
        return self._observe(self.state), rewards, terminated, truncated, {"final_obs": final_obs}

    def state_dict(self) -> dict[str, th.Tensor]:
        """The state that :meth:`load_state_dict` restores, so that a resumed training continues the episodes."""
        return {"state": self.state, "n_steps": self.n_steps, "random": self._random.get_state()}

    def load_state_dict(self, state_dict: dict[str, th.Tensor]) -> None:
        """:param state_dict: from :meth:`state_dict`"""
        self.state, self.n_steps = state_dict["state"], state_dict["n_steps"]
        self._random.set_state(state_dict["random"])

    def _uniform(self, bounds: list[float]) -> th.Tensor:
        """Draw a number from ``-bound`` to ``bound`` for each environment and bound."""
        unit = th.rand(self.num_envs, len(bounds), generator=self._random, device=self.device)
        return (2.0 * unit - 1.0) * th.tensor(bounds, device=self.device)

    @abstractmethod
    def _first_states(self) -> th.Tensor:
        """Draw an initial state for each environment, shape ``(num_envs, n)``."""

    @abstractmethod
    def _observe(self, state: th.Tensor) -> th.Tensor:
        """The observation of each state."""

    @abstractmethod
    def _advance(self, state: th.Tensor, actions: th.Tensor) -> tuple[th.Tensor, th.Tensor, th.Tensor]:
        """The next states, the rewards and whether the next state is terminal."""


class TorchCartPole(TorchEnv):
    """``CartPole-v1`` (Barto, Sutton & Anderson 1983)."""

    single_observation_space: spaces.Space[Any] = spaces.Box(
        -np.array([4.8, np.inf, math.radians(24), np.inf], np.float32),
        np.array([4.8, np.inf, math.radians(24), np.inf], np.float32),
    )
    single_action_space: spaces.Space[Any] = spaces.Discrete(2)
    max_episode_steps = 500

    def _first_states(self) -> th.Tensor:
        return self._uniform([0.05] * 4)

    def _observe(self, state: th.Tensor) -> th.Tensor:
        return state

    def _advance(self, state: th.Tensor, actions: th.Tensor) -> tuple[th.Tensor, th.Tensor, th.Tensor]:
        gravity, mass_cart, mass_pole, half_length, force, dt = 9.8, 1.0, 0.1, 0.5, 10.0, 0.02
        mass = mass_cart + mass_pole
        x, x_dot, angle, angle_dot = state.unbind(dim=1)
        cos, sin = angle.cos(), angle.sin()
        push = (2.0 * actions - 1.0) * force
        inertia = (push + mass_pole * half_length * angle_dot.square() * sin) / mass
        angle_acc = (gravity * sin - cos * inertia) / (half_length * (4.0 / 3.0 - mass_pole * cos.square() / mass))
        x_acc = inertia - mass_pole * half_length * angle_acc * cos / mass
        state = state + dt * th.stack((x_dot, x_acc, angle_dot, angle_acc), dim=1)
        terminated = (state[:, 0].abs() > 2.4) | (state[:, 2].abs() > math.radians(12))
        return state, th.ones_like(x), terminated


class TorchPendulum(TorchEnv):
    """``Pendulum-v1``."""

    single_observation_space: spaces.Space[Any] = spaces.Box(
        -np.array([1.0, 1.0, 8.0], np.float32), np.array([1.0, 1.0, 8.0], np.float32)
    )
    single_action_space: spaces.Space[Any] = spaces.Box(-2.0, 2.0, (1,), np.float32)
    max_episode_steps = 200

    def _first_states(self) -> th.Tensor:
        return self._uniform([math.pi, 1.0])

    def _observe(self, state: th.Tensor) -> th.Tensor:
        angle, speed = state.unbind(dim=1)
        return th.stack((angle.cos(), angle.sin(), speed), dim=1)

    def _advance(self, state: th.Tensor, actions: th.Tensor) -> tuple[th.Tensor, th.Tensor, th.Tensor]:
        gravity, mass, length, dt = 10.0, 1.0, 1.0, 0.05
        angle, speed = state.unbind(dim=1)
        torque = actions.reshape(-1).clamp(-2.0, 2.0)
        from_top = (angle + math.pi) % (2.0 * math.pi) - math.pi
        rewards = -(from_top.square() + 0.1 * speed.square() + 0.001 * torque.square())
        speed = speed + dt * (1.5 * gravity / length * angle.sin() + 3.0 / (mass * length**2) * torque)
        speed = speed.clamp(-8.0, 8.0)
        state = th.stack((angle + dt * speed, speed), dim=1)
        return state, rewards, th.zeros_like(angle, dtype=th.bool)


def main() -> None:
    """Train in 256 CartPoles."""
    from sb3_ppo_ext import DualClipPPO

    settings: dict[str, Any] = {"n_steps": 32, "batch_size": 1024, "learning_rate": 1e-3, "gamma": 0.98, "seed": 0}
    env: Any = TorchCartPole(256)
    model = DualClipPPO("MlpPolicy", env, verbose=1, **settings)
    model.learn(300_000, log_interval=10)


if __name__ == "__main__":
    main()
