"""The environments of a side: those that are registered, three that are not, and vectors of gymnasium and EnvPool."""

from __future__ import annotations

import importlib
from typing import Any

import gymnasium as gym
import numpy as np
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecEnv, VecMonitor

from benchmarks.cases import IMAGES, INVALID_ACTIONS, MASKED_CART_POLE, SEED, Workload


class SyntheticImages(gym.Env[np.ndarray, np.int64]):
    """Frames of noise, 84x84x4 like the last four of an Atari game, that cost next to nothing; 500 steps an episode."""

    _FRAMES = 32

    def __init__(self) -> None:
        self.observation_space = gym.spaces.Box(0, 255, (84, 84, 4), np.uint8)
        self.action_space = gym.spaces.Discrete(6)
        self._frames = np.random.default_rng(SEED).integers(0, 256, (self._FRAMES, 84, 84, 4), np.uint8)
        self._n_steps = 0

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        self._n_steps = 0
        return self._frames[0], {}

    def step(self, action: np.int64) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        self._n_steps += 1
        reward = float(action == self._n_steps % 6)
        return self._frames[self._n_steps % self._FRAMES], reward, self._n_steps >= 500, False, {}


def masked_cart_pole() -> gym.Env[Any, Any]:
    """CartPole with a method ``action_masks()`` that always allows both actions."""
    from sb3_contrib.common.wrappers import ActionMasker

    return ActionMasker(gym.make("CartPole-v1"), lambda _: np.ones(2, dtype=bool))


def invalid_actions() -> gym.Env[Any, Any]:
    """The environment of sb3-contrib's tests of masks: 20 actions, of which other 10 are forbidden at each step."""
    from sb3_contrib.common.envs import InvalidActionEnvDiscrete

    return InvalidActionEnvDiscrete(dim=20, n_invalid_actions=10)


_NOT_REGISTERED = {IMAGES: SyntheticImages, MASKED_CART_POLE: masked_cart_pole, INVALID_ACTIONS: invalid_actions}


class _Adapted(VecEnv):
    """
    Environments that are stepped all at once, for SB3. Single ones cannot be reached.

    :param env: of another interface
    """

    def __init__(self, env: Any, n_envs: int, observation_space: Any, action_space: Any) -> None:
        self._env = env
        super().__init__(n_envs, observation_space, action_space)

    def step_async(self, actions: np.ndarray) -> None:
        self._actions = actions

    def close(self) -> None: ...

    def get_attr(self, attr_name: str, indices: Any = None) -> list[Any]:
        return [getattr(self._env, attr_name, None)] * self.num_envs

    def set_attr(self, attr_name: str, value: Any, indices: Any = None) -> None:
        raise NotImplementedError(attr_name)

    def env_method(self, method_name: str, *method_args: Any, indices: Any = None, **method_kwargs: Any) -> list[Any]:
        raise NotImplementedError(method_name)

    def env_is_wrapped(self, wrapper_class: type[Any], indices: Any = None) -> list[bool]:
        return [False] * self.num_envs


class PoolForSB3(_Adapted):
    """
    EnvPool's environments as SB3's users adapt them: an info for each environment and step, the rest as EnvPool gives
    it.

    :param pool: of ``envpool.make_gymnasium``
    """

    def __init__(self, pool: Any) -> None:
        super().__init__(pool, len(pool), pool.observation_space, pool.action_space)

    def reset(self) -> Any:
        return self._env.reset()[0]

    def step_wait(self) -> Any:
        obs, rewards, terminated, truncated, arrays = self._env.step(self._actions)
        dones = terminated | truncated
        infos: list[dict[str, Any]] = [
            {name: array[i] for name, array in arrays.items() if isinstance(array, np.ndarray)}
            for i in range(self.num_envs)
        ]
        ended = np.flatnonzero(dones)
        for i in ended:
            infos[i]["terminal_observation"] = obs[i].copy()
            infos[i]["TimeLimit.truncated"] = bool(truncated[i])
        if len(ended):
            obs[ended] = self._env.reset(ended)[0]
        return obs, rewards, dones, infos

    def seed(self, seed: int | None = None) -> Any:
        return [seed]  # it is seeded where it is made


class TensorsForSB3(_Adapted):
    """
    Torch environments as Isaac Lab's wrapper for SB3 adapts them: arrays of all tensors, and a list of infos.

    :param env: as :mod:`sb3_ppo_ext.common.rollout.tensor_envs` describes it
    """

    def __init__(self, env: Any) -> None:
        super().__init__(env, env.num_envs, env.single_observation_space, env.single_action_space)

    def reset(self) -> Any:
        return self._env.reset(seed=SEED)[0].cpu().numpy()

    def step_wait(self) -> Any:
        import torch as th

        *results, extras = self._env.step(th.as_tensor(self._actions, device=self._env.device))
        obs, rewards, terminated, truncated = (tensor.cpu().numpy() for tensor in results)
        infos: list[dict[str, Any]] = [{"TimeLimit.truncated": cut} for cut in (truncated & ~terminated).tolist()]
        dones = terminated | truncated
        if dones.any():
            final_obs = extras["final_obs"].cpu().numpy()
            for i in np.flatnonzero(dones):
                infos[i]["terminal_observation"] = final_obs[i]
        return obs, rewards, dones, infos


def make_environments(workload: Workload, who: str = "", n_times: int = 1, device: str = "cpu") -> VecEnv:
    """
    :param workload: whose environments are made, side by side in this process
    :param who: whose they are; SB3 has its own ways to have environments in a vector
    :param n_times: if above 1, so many times as many, each in a process of its own
    :param device: of those of tensors
    """
    if workload.vector == "torch":
        from examples.torch_environments import TorchPendulum

        tensors = TorchPendulum(workload.n_envs, device)
        if who == "sb3":
            return VecMonitor(TensorsForSB3(tensors))
        from sb3_ppo_ext import TensorVecEnv

        return TensorVecEnv(tensors)
    if not workload.vector:
        env = _NOT_REGISTERED.get(workload.env, workload.env)
        vec_env_cls = DummyVecEnv if n_times == 1 else SubprocVecEnv
        return make_vec_env(env, workload.n_envs * n_times, seed=SEED, vec_env_cls=vec_env_cls)
    if workload.vector == "envpool":
        envpool: Any = importlib.import_module("envpool")
        vector = envpool.make_gymnasium(workload.env, num_envs=workload.n_envs, seed=SEED, num_threads=2)
        if who == "sb3":
            return VecMonitor(PoolForSB3(vector))
    elif who == "sb3":
        return make_vec_env(workload.env, workload.n_envs, seed=SEED)
    else:
        vector = gym.make_vec(workload.env, workload.n_envs)
    from sb3_ppo_ext import ArrayVecEnv

    return ArrayVecEnv(vector)
