"""What the process of a side does again and again; as a rule, one iteration of ``learn()``."""

from __future__ import annotations

import math
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from benchmarks.machine import peak_mib

if TYPE_CHECKING:
    from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm


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
        peaks = {"host": peak_mib()}
        th = sys.modules.get("torch")
        if th is not None and th.cuda.is_initialized():
            peaks["device"] = th.cuda.max_memory_allocated() / 2**20
        return peaks


class Training(Task):
    """
    Iterations of ``learn()``, ``collect_rollouts`` and ``train`` timed apart.

    :param model: to be trained
    :param n_samples: in the rollouts of a turn; at least 1
    :param actions: file that the actions of the first iteration are written to, if it does not exist yet
    :param device: name of what the networks are on
    :param wait: until the device has done what it was told
    """

    def __init__(
        self, model: OnPolicyAlgorithm, n_samples: int, actions: Path, device: str, wait: Callable[[], object]
    ) -> None:
        self.device = device
        self.model = model
        self._n_samples = n_samples
        self._wait = wait
        self._actions = actions
        self._seconds = {"collect_rollouts": 0.0, "train": 0.0}
        for name in self._seconds:
            setattr(model, name, self._timed(name, getattr(model, name)))

    def _clock(self) -> float:
        self._wait()
        return time.perf_counter()

    def _timed(self, name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            start = self._clock()
            result = method(*args, **kwargs)
            self._seconds[name] += self._clock() - start
            return result

        return timed

    def turn(self) -> Turn:
        """One iteration, at whose end the device is done."""
        return self._iteration() if self._actions.exists() else self._recorded_iteration()

    def _iteration(self) -> Turn:
        steps = self.model.num_timesteps
        self._seconds = dict.fromkeys(self._seconds, 0.0)
        start, cpu = self._clock(), time.process_time()
        self.model.learn(self._n_samples, reset_num_timesteps=False)
        seconds, cpu = self._clock() - start, time.process_time() - cpu
        steps = self.model.num_timesteps - steps
        return Turn(steps, seconds, self._seconds["collect_rollouts"], self._seconds["train"], cpu)

    def _recorded_iteration(self) -> Turn:
        """Its actions are written to the file as the environment got them."""
        env: Any = self.model.env
        step, actions = env.step, []

        def recording_step(action: np.ndarray) -> Any:
            actions.append(np.array(action))
            return step(action)

        env.step = recording_step
        turn = self._iteration()
        del env.step
        np.save(self._actions, np.stack(actions))
        return turn


class Collecting(Task):
    """
    The rollouts of a training without its updates. The time is that of the steps alone; ``collect`` is of all of a
    rollout: steps, their evaluation and the advantages.

    :param model: whose rollouts they are
    :param n_steps: in one
    """

    def __init__(self, model: Any, n_steps: int) -> None:
        from sb3_ppo_ext.common.rollout.collector import Collector

        self._model = model
        self._n_steps = n_steps
        self._seconds = self._cpu = 0.0
        _, self._callback = model._setup_learn(total_timesteps=1)
        collect = Collector.collect

        def timed(*args: Any) -> bool:
            start, cpu = time.perf_counter(), time.process_time()
            is_complete = collect(*args)
            self._seconds, self._cpu = time.perf_counter() - start, time.process_time() - cpu
            return is_complete

        Collector.collect = timed  # type: ignore[method-assign,assignment]

    def turn(self) -> Turn:
        """One rollout."""
        model = self._model
        start = time.perf_counter()
        model.collect_rollouts(model.env, self._callback, model.rollout_buffer, self._n_steps)
        whole = time.perf_counter() - start
        return Turn(self._n_steps * model.n_envs, self._seconds, whole, math.nan, self._cpu)
