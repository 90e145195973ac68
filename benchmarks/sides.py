"""
What runs in the process of a side: it makes what it is told to, and takes a turn when it is asked to.

What a side does not need is imported where it is used: it would count as its memory, and .venv-sbx does not have all.
"""

from __future__ import annotations

import importlib
import math
import re
import resource
import subprocess
import sys
import tempfile
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np

from benchmarks.cases import ENVIRONMENT, OURS, PRODUCTS, SEED, Settings, Side, Workload
from benchmarks.limits import ActingAlone, EnvironmentAlone, RecurrentProducts
from benchmarks.machine import MAXRSS_PER_MIB, versions
from benchmarks.tasks import Collecting, Task, Training, Turn

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
    "envpool",
]
_PEERS = {
    "sb3": ("stable_baselines3", "PPO"),
    "contrib": ("sb3_contrib", "TRPO"),
    "maskable": ("sb3_contrib", "MaskablePPO"),
    "recurrent": ("sb3_contrib", "RecurrentPPO"),
    "sbx": ("sbx", "PPO"),
    "before": ("sb3_ppo_ext", "DualClipPPO"),
}


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
        return {"host": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / MAXRSS_PER_MIB}


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

    from benchmarks.environments import make_environments

    if th.get_num_threads() != settings.threads:
        raise RuntimeError(f"torch has {th.get_num_threads()} threads and was to have {settings.threads}")
    is_sb3 = side.who in _PEERS
    env = make_environments(workload, side.who, side.n_processes if is_sb3 else 1)
    if side == ENVIRONMENT:
        if not actions.exists():
            raise RuntimeError("no side has trained, so there are no actions to take")
        return EnvironmentAlone(env, np.load(actions))

    device, wait = "cpu", lambda: None
    if side.who == "sbx":
        import jax  # type: ignore[import-not-found]

        if jax.default_backend() != ("gpu" if settings.device == "cuda" else "cpu"):
            raise RuntimeError(f"device={settings.device} is asked for, and the JAX of .venv-sbx has {jax.devices()}")
    elif settings.device == "cuda":
        if not th.cuda.is_available():
            raise RuntimeError("device=cuda is asked for, and torch sees none")
        device, wait = th.cuda.get_device_name(), th.cuda.synchronize
    if side == PRODUCTS:
        return RecurrentProducts(gym.spaces.flatdim(env.observation_space), workload, settings.device, device, wait)

    model = _algorithm(side, settings)(env=env, **_arguments(side, workload, settings))
    if side.who in ("acting", "collecting"):
        return (ActingAlone if side.who == "acting" else Collecting)(model, workload.n_steps)
    if side.who == "sbx":
        wait = lambda: jax.block_until_ready((model.policy.actor_state, model.policy.vf_state))  # noqa: E731
    # REINFORCE ends after one iteration, whatever number of steps is asked for.
    n_samples = max(workload.n_steps * workload.n_envs * side.n_processes * settings.n_iterations, 1)
    if side.n_processes > 1 and not is_sb3:
        from benchmarks.several import OneOfSeveral, followers

        return OneOfSeveral(model, n_samples, actions, followers(side, workload, settings, actions))
    return Training(model, n_samples, actions, device, wait)


def _algorithm(side: Side, settings: Settings) -> Any:
    module, name = _PEERS.get(side.who) or ("sb3_ppo_ext", OURS.get(side.who, "DualClipPPO"))
    if side.who == "before":
        sys.path.insert(0, settings.before)
    package = importlib.import_module(module)
    if side.who == "before" and not Path(str(package.__file__)).resolve().is_relative_to(settings.before):
        raise RuntimeError(f"the version before was to be in {settings.before}, and {package.__file__} was imported")
    return getattr(package, name)


def _arguments(side: Side, workload: Workload, settings: Settings) -> dict[str, Any]:
    """What the algorithm of a side is given; its other arguments stay at their defaults."""
    policy = "CnnPolicy" if workload.width is None else "MlpPolicy" if workload.lstm is None else "MlpLstmPolicy"
    networks: dict[str, Any] = {} if workload.width is None else {"net_arch": [workload.width] * 2}
    if workload.lstm is not None:
        networks["lstm_hidden_size"] = workload.lstm
    arguments = {"policy": policy, "policy_kwargs": networks, "seed": SEED, "device": settings.device}
    if side.who != "reinforce":
        epochs = "n_critic_updates" if side.who in ("trpo", "contrib") else "n_epochs"
        batch_size = workload.batch_size * (side.n_processes if side.who in _PEERS else 1)
        arguments |= {"n_steps": workload.n_steps, "batch_size": batch_size, epochs: workload.n_epochs}
    if side.torch_compile:
        arguments["torch_compile"] = True
    if side.sub_sampling_factor != 1:
        arguments["sub_sampling_factor"] = side.sub_sampling_factor
    return arguments


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
                value = versions(_PACKAGES), task.device
            else:
                value = getattr(task, name)()
            connection.send((value, None))
        except Exception as error:
            connection.send((None, f"{type(error).__name__}: {error}"))
