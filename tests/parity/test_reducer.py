"""Two processes that train one model on half of the environments each make the steps of one that has them all."""

from __future__ import annotations

import threading
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.vec_env import DummyVecEnv

from sb3_ppo_ext import REINFORCE, TRPO, AdaptiveKLPPO, DualClipPPO
from sb3_ppo_ext.common.compile.program import Program
from sb3_ppo_ext.common.rollout.episode_buffer import EpisodeBuffer

LENGTH = 6
EPISODES = 4


class Noise(gym.Env[Any, Any]):
    """Episodes of one length, with random observations and rewards."""

    observation_space = spaces.Box(-1.0, 1.0, (3,), np.float32)
    action_space = spaces.Box(-1.0, 1.0, (2,), np.float32)

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.steps = 0
        return self.np_random.uniform(-1.0, 1.0, 3).astype(np.float32), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.steps += 1
        obs = self.np_random.uniform(-1.0, 1.0, 3).astype(np.float32)
        return obs, float(self.np_random.normal() + action.sum()), self.steps == LENGTH, False, {}


class Exchange:
    """A reducer of threads, which stand for processes."""

    is_local = False

    def __init__(self, n: int) -> None:
        self._barrier = threading.Barrier(n, timeout=30.0)
        self._given: dict[int, list[th.Tensor]] = {}
        self.n_calls = 0

    def average(self, *tensors: th.Tensor) -> None:
        self._given[threading.get_ident()] = [tensor.clone() for tensor in tensors]
        self.n_calls += self._barrier.wait() == 0
        means = [th.stack(same).mean(dim=0) for same in zip(*self._given.values(), strict=True)]
        self._barrier.wait()
        with th.no_grad():
            for tensor, mean in zip(tensors, means, strict=True):
                tensor.copy_(mean)


def model_of(algorithm: Any, n_envs: int, **kwargs: Any) -> Any:
    n_samples = n_envs * EPISODES * LENGTH  # all in one minibatch: how they are shuffled does not matter
    sizes: dict[Any, dict[str, Any]] = {
        DualClipPPO: {"n_steps": EPISODES * LENGTH, "n_epochs": 3, "normalize_advantage": False},
        AdaptiveKLPPO: {"n_steps": EPISODES * LENGTH, "n_epochs": 3, "normalize_advantage": False},
        TRPO: {"n_steps": EPISODES * LENGTH, "n_critic_updates": 3, "normalize_advantage": False},
        REINFORCE: {"episodes_per_env": EPISODES, "n_critic_updates": 3, "baseline": "value"},
    }
    env = DummyVecEnv([Noise] * n_envs)
    return algorithm(
        "MlpPolicy", env, seed=0, device="cpu", batch_size=n_samples, learning_rate=0.01, **sizes[algorithm], **kwargs
    )


def give(worker: Any, whole: Any, i: int) -> None:
    """Put the rollout of one environment into a worker's buffer."""
    theirs, buffer = whole.rollout_buffer, worker.rollout_buffer
    buffer.reset()
    buffer.buffer_size = buffer.pos = theirs.buffer_size
    inputs = ("observations", "actions", "rewards", "episode_starts", "truncated", "final_values")
    for name in inputs:
        setattr(buffer, name, getattr(theirs, name)[:, i : i + 1].copy())
    buffer.full = True
    if isinstance(buffer, EpisodeBuffer):
        buffer.close(EPISODES)
    for name in ("values", "log_probs", "advantages", "returns", "distribution_params"):
        setattr(buffer, name, getattr(theirs, name)[:, i : i + 1].copy())
    buffer.forget_flat()


@pytest.mark.parametrize(
    ("algorithm", "torch_compile"),
    [
        (DualClipPPO, False),
        (DualClipPPO, True),
        (AdaptiveKLPPO, False),
        (TRPO, False),
        (REINFORCE, False),
        (REINFORCE, True),
    ],
)
@pytest.mark.usefixtures("without_compiler")
def test_two_processes_equal_one(algorithm: Any, torch_compile: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    lock, first_call = threading.Lock(), Program._first_call

    def one_at_a_time(self: Program, *args: Any) -> list[th.Tensor]:
        with lock:  # torch traces in one thread
            return first_call(self, *args)

    monkeypatch.setattr(Program, "_first_call", one_at_a_time)
    whole = model_of(algorithm, 2, torch_compile=torch_compile)
    train = whole.train
    whole.train = lambda: None
    whole.learn(1)
    workers = [model_of(algorithm, 1, torch_compile=torch_compile) for _ in range(2)]
    exchange = Exchange(2)
    for i, worker in enumerate(workers):
        worker.policy.load_state_dict(whole.policy.state_dict())
        worker._reducer = exchange
        worker._logger = Logger(folder=None, output_formats=[])
        worker._current_progress_remaining = whole._current_progress_remaining
        give(worker, whole, i)
    before = [p.detach().clone() for p in whole.policy.parameters()]
    train()

    failed: list[BaseException] = []

    def trained(worker: Any) -> None:
        try:
            worker.train()
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=trained, args=(worker,)) for worker in workers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    assert exchange.n_calls >= 3
    assert not all(map(th.equal, before, whole.policy.parameters()))
    for worker in workers:
        for ours, expected in zip(worker.policy.parameters(), whole.policy.parameters(), strict=True):
            th.testing.assert_close(ours, expected, atol=2e-6, rtol=1e-4)
    assert all(map(th.equal, *(worker.policy.parameters() for worker in workers)))
    if algorithm is AdaptiveKLPPO:
        kls = [model.logger.name_to_value["train/kl"] for model in (*workers, whole)]
        assert kls == pytest.approx([kls[-1]] * 3, rel=1e-4)
        assert workers[0].kl_coef == workers[1].kl_coef == whole.kl_coef != 1.0
