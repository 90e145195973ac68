"""rsl_rl's PPO on a batch of torch environments; of the Python environment ``.venv-rsl``."""

from __future__ import annotations

import contextlib
import importlib
import io
import time
from collections.abc import Callable
from typing import Any

import torch as th

from benchmarks.cases import SEED, Settings, Side, Workload
from benchmarks.tasks import Task, Turn
from examples.torch_environments import TorchPendulum


class PendulumForRsl:
    """
    The environments as rsl_rl has them.

    :param n_envs: number of them
    :param device: of their tensors
    """

    num_actions = 1
    max_episode_length = TorchPendulum.max_episode_steps

    def __init__(self, n_envs: int, device: str) -> None:
        self.cfg: dict[str, Any] = {}
        self.num_envs, self.device = n_envs, device
        self._tensor_dict: Any = importlib.import_module("tensordict").TensorDict
        self._env = TorchPendulum(n_envs, device)
        self._obs, _ = self._env.reset(seed=SEED)

    @property
    def episode_length_buf(self) -> th.Tensor:
        """Steps of each episode so far."""
        return self._env.n_steps

    def get_observations(self) -> Any:
        """Those of the last step, in one group."""
        return self._tensor_dict({"policy": self._obs}, batch_size=[self.num_envs])

    def step(self, actions: th.Tensor) -> tuple[Any, th.Tensor, th.Tensor, dict[str, Any]]:
        """:param actions: shape ``(n_envs, 1)``"""
        self._obs, rewards, terminated, truncated, _ = self._env.step(actions)
        return self.get_observations(), rewards, (terminated | truncated).long(), {"time_outs": truncated}


class RslTraining(Task):
    """
    Iterations of its runner's ``learn()``. What it prints is thrown away.

    :param side: of which it is said whether its models are compiled
    :param workload: to be done
    :param settings: of the run
    """

    def __init__(self, side: Side, workload: Workload, settings: Settings) -> None:
        if (workload.env, workload.vector) != ("Pendulum-v1", "torch"):
            raise ValueError(f"rsl_rl has no {workload}")
        th.manual_seed(SEED)
        self.device = th.cuda.get_device_name() if settings.device == "cuda" else "cpu"
        self._wait: Callable[[], object] = th.cuda.synchronize if settings.device == "cuda" else lambda: None
        self._n_samples = workload.n_envs * workload.n_steps
        networks = {"class_name": "MLPModel", "hidden_dims": [workload.width] * 2, "activation": "elu"}
        gaussian = {"class_name": "GaussianDistribution", "init_std": 1.0, "std_type": "log"}
        config = {
            "num_steps_per_env": workload.n_steps,
            "save_interval": 10**9,
            "obs_groups": {"actor": ["policy"], "critic": ["policy"]},
            "torch_compile_mode": "default" if side.torch_compile else None,
            "actor": {**networks, "distribution_cfg": gaussian},
            "critic": networks,
            "algorithm": {
                "class_name": "PPO",
                "num_learning_epochs": workload.n_epochs,
                "num_mini_batches": self._n_samples // workload.batch_size,
                "clip_param": 0.2,
                "gamma": 0.99,
                "lam": 0.95,
                "value_loss_coef": 1.0,
                "entropy_coef": 0.0,
                "learning_rate": 1e-3,
                "max_grad_norm": 1.0,
                "use_clipped_value_loss": False,
                "schedule": "fixed",
                "desired_kl": None,
                "normalize_advantage_per_mini_batch": True,
            },
        }
        runners: Any = importlib.import_module("rsl_rl.runners")
        with contextlib.redirect_stdout(io.StringIO()):
            env = PendulumForRsl(workload.n_envs, settings.device)
            self._runner = runners.OnPolicyRunner(env, config, None, settings.device)
        self._train = 0.0
        self._update: Callable[[], Any] = self._runner.alg.update
        self._runner.alg.update = self._timed_update

    def _clock(self) -> float:
        self._wait()
        return time.perf_counter()

    def _timed_update(self) -> Any:
        start = self._clock()
        result: Any = self._update()
        self._train = self._clock() - start
        return result

    def turn(self) -> Turn:
        """One iteration, at whose end the device is done."""
        start, cpu = self._clock(), time.process_time()
        with contextlib.redirect_stdout(io.StringIO()):
            self._runner.learn(1)
        seconds, cpu = self._clock() - start, time.process_time() - cpu
        return Turn(self._n_samples, seconds, seconds - self._train, self._train, cpu)
