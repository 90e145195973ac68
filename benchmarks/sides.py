"""
What runs in the process of a side: it makes what it is told to, and takes a turn when it is asked to.

What a side does not need is imported where it is used: it would count as its memory, and .venv-sbx does not have all.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import math
import platform
import re
import resource
import subprocess
import sys
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import gymnasium as gym
import numpy as np

from benchmarks.cases import ENVIRONMENT, IMAGES, OURS, Settings, Side, Workload

if TYPE_CHECKING:
    from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
    from stable_baselines3.common.vec_env import VecEnv

SEED = 0
_PACKAGES = [
    "torch",
    "stable-baselines3",
    "sb3-contrib",
    "gymnasium",
    "mujoco",
    "numpy",
    "sbx-rl",
    "jax",
    "jaxlib",
    "flax",
]
_PEERS = {"sb3": ("stable_baselines3", "PPO"), "contrib": ("sb3_contrib", "TRPO"), "sbx": ("sbx", "PPO")}
_MAXRSS_PER_MIB = 2**20 if sys.platform == "darwin" else 2**10


class Turn(NamedTuple):
    """
    :param steps: of the environments, in one iteration
    :param seconds: for all of it
    :param collect: seconds of it in ``collect_rollouts``
    :param train: seconds of it in ``train``
    :param cpu: seconds of processor time
    """

    steps: int
    seconds: float
    collect: float
    train: float
    cpu: float

    @property
    def rest(self) -> float:
        """Seconds of it in neither: logging, and what else ``learn`` does."""
        return self.seconds - self.collect - self.train


class Task(ABC):
    """What a process does again and again."""

    device = "cpu"

    @abstractmethod
    def turn(self) -> Turn:
        """One iteration."""

    def peak_memory(self) -> dict[str, float]:
        """The most that the process has had so far, in MiB; and on the CUDA device, what torch had."""
        peaks = {"host": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / _MAXRSS_PER_MIB}
        with contextlib.suppress(OSError, IndexError):
            # getrusage's maximum begins, on Linux, with the memory that the parent had.
            status = Path("/proc/self/status").read_text()
            peaks["host"] = int(re.findall(r"^VmHWM:\s*(\d+) kB", status, re.MULTILINE)[0]) / 2**10
        th = sys.modules.get("torch")
        if th is not None and th.cuda.is_initialized():
            peaks["device"] = th.cuda.max_memory_allocated() / 2**20
        return peaks


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


class Training(Task):
    """
    Iterations of ``learn()``, ``collect_rollouts`` and ``train`` timed apart.

    :param model: to be trained
    :param n_samples: in a rollout; at least 1
    :param actions: file that the actions of the first iteration are written to, if it does not exist yet
    :param device: name of what the networks are on
    :param wait: until the device has done what it was told
    """

    def __init__(
        self, model: OnPolicyAlgorithm, n_samples: int, actions: Path, device: str, wait: Callable[[], object]
    ) -> None:
        self.device = device
        self._model = model
        self._n_samples = n_samples
        self._wait = wait
        self._actions = actions
        self._seconds: dict[str, float] = {}
        for name in ("collect_rollouts", "train"):
            setattr(model, name, self._timed(name, getattr(model, name)))

    def _clock(self) -> float:
        self._wait()
        return time.perf_counter()

    def _timed(self, name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            start = self._clock()
            result = method(*args, **kwargs)
            self._seconds[name] = self._clock() - start
            return result

        return timed

    def turn(self) -> Turn:
        """One iteration, at whose end the device is done."""
        return self._iteration() if self._actions.exists() else self._recorded_iteration()

    def _iteration(self) -> Turn:
        steps = self._model.num_timesteps
        start, cpu = self._clock(), time.process_time()
        self._model.learn(self._n_samples, reset_num_timesteps=False)
        seconds, cpu = self._clock() - start, time.process_time() - cpu
        steps = self._model.num_timesteps - steps
        return Turn(steps, seconds, self._seconds["collect_rollouts"], self._seconds["train"], cpu)

    def _recorded_iteration(self) -> Turn:
        """Its actions are written to the file as the environment got them."""
        env: Any = self._model.env
        step, actions = env.step, []

        def recording_step(action: np.ndarray) -> Any:
            actions.append(np.array(action))
            return step(action)

        env.step = recording_step
        turn = self._iteration()
        del env.step
        np.save(self._actions, np.stack(actions))
        return turn


class EnvironmentAlone(Task):
    """
    The limit: the environment steps of a training's first rollout, from the same seed by the same actions.

    :param env: as the training had it
    :param actions: of that rollout, shape ``(steps, n_envs, ...)``
    """

    def __init__(self, env: VecEnv, actions: np.ndarray) -> None:
        self._env = env
        self._actions = actions

    def turn(self) -> Turn:
        """The whole rollout."""
        self._env.seed(SEED)
        self._env.reset()
        start, cpu = time.perf_counter(), time.process_time()
        for action in self._actions:
            self._env.step(action)
        seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
        return Turn(len(self._actions) * self._env.num_envs, seconds, seconds, 0.0, cpu)


class CleanRL(Task):
    """
    CleanRL's script, unmodified. It cannot wait, so a turn is a run of it: three iterations, of which the first is its
    warm-up. The time is from the steps per second that it prints, which it counts from the start of its loop.

    :param workload: to be done
    :param settings: of the run
    """

    _ITERATIONS = 3

    def __init__(self, workload: Workload, settings: Settings) -> None:
        self._n_samples = workload.n_envs * workload.n_steps
        if workload.width != 64 or self._n_samples % workload.batch_size:
            raise ValueError("CleanRL has networks of width 64 and minibatches of one size only")
        script = Path(settings.cleanrl_script)
        self._command = [settings.cleanrl_python, str(script)]
        self._command += (
            f"--seed {SEED} --env-id {workload.env} --num-envs {workload.n_envs} --num-steps {workload.n_steps} "
            f"--total-timesteps {self._ITERATIONS * self._n_samples} --update-epochs {workload.n_epochs} "
            f"--num-minibatches {self._n_samples // workload.batch_size} --learning-rate 3e-4 --gamma 0.99 "
            "--gae-lambda 0.95 --clip-coef 0.2 --ent-coef 0.0 --vf-coef 0.5 --max-grad-norm 0.5"
        ).split()
        # Its releases before 2.0 take "--cuda False", later ones "--no-cuda".
        with_words = "import tyro" not in script.read_text()
        for name, on in {"cuda": settings.device == "cuda", "anneal-lr": False, "clip-vloss": False}.items():
            self._command += [f"--{name}", str(on)] if with_words else [f"--{name}" if on else f"--no-{name}"]

    def turn(self) -> Turn:
        """A run of the script."""
        with tempfile.TemporaryDirectory() as folder:
            run = subprocess.run(self._command, cwd=folder, capture_output=True, text=True, check=False)
        per_second = [int(number) for number in re.findall(r"^SPS: (\d+)", run.stdout, re.MULTILINE)]
        if run.returncode or len(per_second) != self._ITERATIONS or not all(per_second):
            raise RuntimeError(
                f"CleanRL's script ended with status {run.returncode} and printed {len(per_second)} of "
                f"{self._ITERATIONS} 'SPS:' lines; it said: {(run.stderr.strip() or run.stdout)[-500:]}"
            )
        steps = self._ITERATIONS * self._n_samples
        seconds = steps / per_second[-1] - self._n_samples / per_second[0]
        return Turn(steps - self._n_samples, seconds, math.nan, math.nan, math.nan)

    def peak_memory(self) -> dict[str, float]:
        """The most that a run has had, in MiB."""
        return {"host": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / _MAXRSS_PER_MIB}


def make_task(side: Side, workload: Workload, settings: Settings, actions: Path) -> Task:
    """
    :param side: who is to work
    :param workload: on what
    :param settings: of the run
    :param actions: file of the actions that :data:`ENVIRONMENT` is stepped with; who trains first writes it
    :return: ready for its first iteration
    """
    if side.who == "cleanrl":
        return CleanRL(workload, settings)

    import torch as th
    from stable_baselines3.common.env_util import make_vec_env

    if th.get_num_threads() != settings.threads:
        raise RuntimeError(f"torch has {th.get_num_threads()} threads and was to have {settings.threads}")
    env = make_vec_env(SyntheticImages if workload.env == IMAGES else workload.env, workload.n_envs, seed=SEED)
    if side == ENVIRONMENT:
        if not actions.exists():
            raise RuntimeError("no side has trained, so there are no actions to take")
        return EnvironmentAlone(env, np.load(actions))

    # The other arguments stay at their defaults.
    arguments: dict[str, Any] = {
        "policy": "CnnPolicy" if workload.env == IMAGES else "MlpPolicy",
        "env": env,
        "policy_kwargs": {} if workload.width is None else {"net_arch": [workload.width] * 2},
        "seed": SEED,
        "device": settings.device,
    }
    if side.who != "reinforce":
        epochs = "n_critic_updates" if side.who in ("trpo", "contrib") else "n_epochs"
        arguments |= {"n_steps": workload.n_steps, "batch_size": workload.batch_size, epochs: workload.n_epochs}
    if side.torch_compile:
        arguments["torch_compile"] = True
    if side.sub_sampling_factor != 1:
        arguments["sub_sampling_factor"] = side.sub_sampling_factor

    device, wait = "cpu", lambda: None
    if side.who == "sbx":
        import jax  # type: ignore[import-not-found]

        if jax.default_backend() != ("gpu" if settings.device == "cuda" else "cpu"):
            raise RuntimeError(f"device={settings.device} is asked for, and the JAX of .venv-sbx has {jax.devices()}")
    elif settings.device == "cuda":
        if not th.cuda.is_available():
            raise RuntimeError("device=cuda is asked for, and torch sees none")
        device, wait = th.cuda.get_device_name(), th.cuda.synchronize

    module, name = _PEERS.get(side.who) or ("sb3_ppo_ext", OURS[side.who])
    model = getattr(importlib.import_module(module), name)(**arguments)
    if side.who == "sbx":
        wait = lambda: jax.block_until_ready((model.policy.actor_state, model.policy.vf_state))  # noqa: E731
    # REINFORCE ends after one iteration, whatever number of steps is asked for.
    return Training(model, max(workload.n_steps * workload.n_envs, 1), actions, device, wait)


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return versions


def serve(file_descriptor: int) -> None:
    """
    Do what is asked for, and answer each time with a result and an error, of which one is None.

    :param file_descriptor: of the connection to the process that lets the sides take turns
    """
    connection = Connection(file_descriptor)
    task: Task | None = None
    while True:
        try:
            name, *arguments = connection.recv()
        except EOFError:
            return
        try:
            if name == "make":
                task = None  # and its memory is free before the next is made
                task = make_task(*arguments)
                value = _versions(), task.device
            else:
                value = getattr(task, name)()
            connection.send((value, None))
        except Exception as error:
            connection.send((None, f"{type(error).__name__}: {error}"))
