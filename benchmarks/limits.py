"""What an iteration cannot be faster than."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.cases import SEED, Workload
from benchmarks.tasks import Task, Turn

if TYPE_CHECKING:
    from stable_baselines3.common.vec_env import VecEnv


class EnvironmentAlone(Task):
    """
    The limit: the environment steps of a training's first rollout, from the same seed by the same actions, and the
    masks before each of them, if the environment gives any.

    :param env: as the training had it
    :param actions: of that rollout, shape ``(steps, n_envs, ...)``
    """

    def __init__(self, env: VecEnv, actions: np.ndarray) -> None:
        self._env = env
        self._actions = actions
        self._gives_masks = env.has_attr("action_masks")

    def turn(self) -> Turn:
        """The whole rollout."""
        self._env.seed(SEED)
        self._env.reset()
        start, cpu = time.perf_counter(), time.process_time()
        for action in self._actions:
            if self._gives_masks:
                self._env.env_method("action_masks")
            self._env.step(action)
        seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
        return Turn(len(self._actions) * self._env.num_envs, seconds, seconds, 0.0, cpu)


class ActingAlone(Task):
    """
    The limit of collecting: the environments as they come, and the actor by whose actions they are stepped.

    :param model: that has the policy and the environments
    :param n_steps: in a rollout
    """

    def __init__(self, model: Any, n_steps: int) -> None:
        self._model = model
        self._vector = model.env.vector_env
        self._n_steps = n_steps
        self._obs = self._vector.reset()[0]

    def turn(self) -> Turn:
        """The steps of one rollout."""
        import torch as th

        from sb3_ppo_ext.common.rollout.data import PolicyInput

        act, step, obs = self._model._acting_policy().act, self._vector.step, self._obs
        shape = (self._model.n_envs, *self._model.action_space.shape)
        start, cpu = time.perf_counter(), time.process_time()
        with th.no_grad():
            for _ in range(self._n_steps):
                actions, _ = act(PolicyInput(th.as_tensor(obs)))
                obs, *_ = step(actions.numpy().reshape(shape))
        seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
        self._obs = obs
        return Turn(self._n_steps * self._model.n_envs, seconds, seconds, math.nan, cpu)


class RecurrentProducts(Task):
    """
    The limit of training with LSTMs: the matrix products of both of them, actor's and critic's, in the updates of one
    iteration, and nothing else.

    Where a time step of the sequences needs another (forward for the hidden states, backward for their gradients) there
    is a product for each time step; every other product is one for the whole minibatch. The observations and the states
    at the start of the sequences need no gradients.

    :param n_features: numbers in an observation
    :param workload: whose updates they are
    :param device: where the matrices are
    :param name: of that device
    :param wait: until the device has done what it was told
    """

    def __init__(self, n_features: int, workload: Workload, device: str, name: str, wait: Callable[[], object]) -> None:
        import torch as th

        assert workload.lstm is not None
        self.device = name
        self._wait = wait
        self._n_samples = workload.n_envs * workload.n_steps
        self._n_passes = 2 * workload.n_epochs * (self._n_samples // workload.batch_size)
        self._multiply = th.mm

        common = math.gcd(workload.n_steps, workload.batch_size)
        self.sequence_length = max(n for n in range(1, 17) if common % n == 0)  # as ours chooses it
        length, units = self.sequence_length, workload.lstm
        n_sequences = workload.batch_size // length
        inputs = th.randn(length * n_sequences, n_features, device=device)
        states = th.randn(length, n_sequences, units, device=device)
        gates = th.randn(length, n_sequences, 4 * units, device=device)  # or their gradients
        of_inputs = th.randn(4 * units, n_features, device=device)
        of_states = th.randn(4 * units, units, device=device)
        factors = [
            (inputs, of_inputs.t()),
            *((state, of_states.t()) for state in states),
            *((gate, of_states) for gate in gates[1:]),
            (gates.flatten(0, 1).t(), inputs),
            (gates.flatten(0, 1).t(), states.flatten(0, 1)),
        ]
        self._products = [(left, right, left @ right) for left, right in factors]

    def turn(self) -> Turn:
        """The products of all epochs and minibatches."""
        self._wait()
        start, cpu = time.perf_counter(), time.process_time()
        for _ in range(self._n_passes):
            for left, right, product in self._products:
                self._multiply(left, right, out=product)
        self._wait()
        seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
        return Turn(self._n_samples, seconds, 0.0, seconds, cpu)
