"""
Train one model with several processes: ``torchrun --nproc-per-node 4 train.py``, with a script for one process.

``learn`` joins the process group of ``torch.distributed`` if there is one. If there is none and ``torchrun`` has set
``WORLD_SIZE`` above 1, ``learn`` creates one (gloo on the CPU, nccl on GPUs). Then all processes train one model:

- **All arguments are per process**: ``n_envs``, ``n_steps``, ``episodes_per_env``, ``batch_size``. N processes are
  equivalent to one process with N times as many environments and N times the batch size: gradients, the normalisation
  of advantages, KL divergences, ``target_kl``, the Fisher products and the line search of TRPO, and the baselines of
  REINFORCE are computed over all processes. Only the shuffling differs: each process shuffles its own samples.
- ``total_timesteps`` and ``num_timesteps`` count the steps of all processes. During a rollout a process counts its own
  steps; those of the others are added at the end of the rollout.
- The first process (rank 0) logs, shows the progress bar and runs the callbacks. If a callback ends the training, all
  processes stop when they have completed their rollouts. If it changes parameters, all processes have them from the
  next rollout on. If it changes a hyper-parameter, that is an error. If it changes the rollout, only the rollout of the
  first process is changed. Logged losses are means over all processes, maxima are over all processes, and the episode
  statistics contain the episodes of all. The success rate and the explained variance are those of the first process.
- At the start, all processes get the first one's parameters, optimiser state and running statistics of observations
  and returns. The others use their own seeds and reset their environments. Any other difference between processes is
  an error that names it.
- The statistics of ``VecNormalize``, and those of a ``TensorVecEnv`` that normalises rewards, are merged after each
  rollout.
- An error in one process ends all: the others raise :class:`~sb3_ppo_ext.common.errors.ProcessError` with its message.
  If a process ends before all have joined the group, only torchrun notices; later, the others wait for five minutes.
- Processes on one machine (Linux, x86-64) exchange messages through shared memory, others through gloo or nccl.

``save`` works in each process. A checkpoint of the first process can be resumed by another number of processes with
the same ``n_envs`` each. On GPUs, the script must first call
``torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))``.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import inspect
import io
import os
import re
import secrets
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import stable_baselines3
import torch as th
from stable_baselines3.common.callbacks import BaseCallback, CallbackList, ConvertCallback, ProgressBarCallback
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.running_mean_std import RunningMeanStd
from stable_baselines3.common.type_aliases import MaybeCallback
from stable_baselines3.common.vec_env import VecEnvWrapper

from sb3_ppo_ext.common.errors import ArgumentError, ProcessError
from sb3_ppo_ext.common.rollout.running_statistics import put_together, running_statistics, set_running_statistics

if TYPE_CHECKING:
    from sb3_ppo_ext.common.update.process_group import ProcessGroup

# Attributes that may differ between processes, or are compared or shared in another way.
_OF_EACH = {"seed", "verbose", "tensorboard_log", "device", "start_time", "n_envs", "num_timesteps", "policy"}


def are_several() -> bool:
    """Whether this process is one of several that train one model."""
    dist = sys.modules.get("torch.distributed")
    if dist is not None and dist.is_available() and dist.is_initialized():
        return bool(dist.get_world_size() > 1)
    needed = {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
    return needed <= os.environ.keys() and int(os.environ["WORLD_SIZE"]) > 1


def n_processes() -> int:
    """The number of processes that train one model; before a group is created, torchrun's number."""
    if not are_several():
        return 1
    dist = sys.modules.get("torch.distributed")
    if dist is not None and dist.is_available() and dist.is_initialized():
        return int(dist.get_world_size())
    return int(os.environ["WORLD_SIZE"])


def is_first() -> bool:
    """Whether this process, rank 0, logs and saves; before a group is created, torchrun's rank counts."""
    dist = sys.modules.get("torch.distributed")
    if dist is not None and dist.is_available() and dist.is_initialized():
        return bool(dist.get_rank() == 0)
    return os.environ.get("RANK", "0") == "0"


class _OfRollout(NamedTuple):
    """The message that a process sends to the others at the end of a rollout."""

    goes_on: bool
    n_steps: int
    episodes: list[Any]
    statistics: list[RunningMeanStd]
    settings: dict[str, Any]


class Together:
    """
    One process's part in training a model with several processes.

    :param group: the group of all processes
    """

    def __init__(self, group: ProcessGroup) -> None:
        self.group = group
        self._is_new = True
        self._statistics: list[RunningMeanStd] = []
        self._episodes: list[Any] = []
        self._n_steps = 0

    def start(self, model: OnPolicyAlgorithm, arguments: dict[str, Any]) -> None:
        """
        Check that all processes have the same settings, and give them the first one's model.

        :param model: the model, before ``learn`` sets it up
        :param arguments: arguments of ``learn``
        :raises ArgumentError: if the processes differ
        """
        _check_alike(self.group.gathered({**arguments, **_settings(model), **_surroundings(model)}))
        content = io.BytesIO()
        if self.group.rank == 0:
            th.save(model.get_parameters(), content)
        seed = secrets.randbits(32) if model.seed is None else model.seed
        mine = content.getvalue(), running_statistics(model.env), model._n_updates, seed
        parameters, statistics, model._n_updates, seed = self.group.of_first(mine)
        if self.group.rank > 0:
            model.set_parameters(th.load(io.BytesIO(parameters), map_location="cpu", weights_only=False))
            set_running_statistics(model.env, statistics)
            if self._is_new:
                _seed_anew(model, (seed, model.num_timesteps, self.group.rank))
            model.set_logger(Logger(folder=None, output_formats=[]))
            model.verbose = 0
        self._is_new = False
        self._statistics = statistics

    def start_rollout(self, model: OnPolicyAlgorithm) -> None:
        """
        Give all processes the first one's parameters and buffers (those of batch normalisation depend on its samples
        only), and note which steps and episodes the other processes already know.

        :param model: the model, about to collect a rollout
        """
        self.group.take_from_first([*model.policy.parameters(), *model.policy.buffers()])
        self._n_steps = model.num_timesteps
        self._episodes = list(model.ep_info_buffer or [])

    def end_rollout(self, model: OnPolicyAlgorithm, is_complete: bool) -> bool:
        """
        Exchange steps, episodes and running statistics at the end of a rollout.

        :param model: the model that has collected the rollout
        :param is_complete: whether its rollout is complete; False if a callback has ended it
        :return: whether the rollouts of all processes are complete
        :raises ArgumentError: if a callback has changed a hyper-parameter, which only the first process knows
        """
        assert model.ep_info_buffer is not None
        told = set(map(id, self._episodes))
        own = _OfRollout(
            is_complete,
            model.num_timesteps - self._n_steps,
            [episode for episode in model.ep_info_buffer if id(episode) not in told],
            running_statistics(model.env),
            _settings(model),
        )
        reports = self.group.gathered(own)
        _check_alike([report.settings for report in reports])
        others = [report for rank, report in enumerate(reports) if rank != self.group.rank]
        model.num_timesteps += sum(report.n_steps for report in others)
        for report in others:
            model.ep_info_buffer.extend(report.episodes)
        of_processes = zip(*(report.statistics for report in reports), strict=True)
        self._statistics = [
            put_together(before, now) for before, now in zip(self._statistics, of_processes, strict=True)
        ]
        set_running_statistics(model.env, self._statistics)
        return all(report.goes_on for report in reports)


@contextlib.contextmanager
def training_together(
    model: Any, callback: MaybeCallback, progress_bar: bool, arguments: dict[str, Any]
) -> Iterator[tuple[MaybeCallback, bool]]:
    """
    Join the other processes for the training in the ``with`` block, if there are several.

    :param model: the model that learns
    :param callback: argument of ``learn``
    :param progress_bar: argument of ``learn``
    :param arguments: the other arguments of ``learn``
    :return: the callback of this process, and whether it shows SB3's progress bar
    :raises ArgumentError: if the processes differ
    :raises ProcessError: if another process has failed, or if an earlier training of the model has
    """
    if not are_several():
        yield callback, progress_bar
        return
    from sb3_ppo_ext.common.update.process_group import ProcessGroup

    if model._together is None:
        model._together = Together(ProcessGroup.joined(model.device))
        model._reducer = model._together.group
    group: ProcessGroup = model._reducer
    if group.failure is not None:
        raise ProcessError(
            f"The processes have left each other, as a training of this model has failed ({group.failure}), and cannot "
            "train it again: start all of them again, from a checkpoint"
        )
    try:
        model._together.start(model, arguments)
        if group.rank > 0:
            yield None, False
        elif progress_bar:
            yield CallbackList([_as_callback(callback), _ProgressBar()]), False
        else:
            yield callback, False
        group.gathered(None)  # no process goes on before the first one's callbacks have finished
    except BaseException as error:
        group.fail(error)
        raise


def _as_callback(callback: MaybeCallback) -> BaseCallback:
    if isinstance(callback, list):
        return CallbackList(callback)
    return callback if isinstance(callback, BaseCallback) else ConvertCallback(callback)


class _ProgressBar(ProgressBarCallback):
    """SB3's progress bar, which also shows the steps of the other processes, at the end of each rollout."""

    def _on_training_start(self) -> None:
        super()._on_training_start()
        self._first = self.model.num_timesteps

    def _catch_up(self) -> None:
        self.pbar.update(self.model.num_timesteps - self._first - self.pbar.n)

    def _on_rollout_start(self) -> None:
        self._catch_up()

    def _on_training_end(self) -> None:
        self._catch_up()
        super()._on_training_end()


def _seed_anew(model: OnPolicyAlgorithm, numbers: tuple[int, ...]) -> None:
    """Give a process other random numbers and episodes than the first: both may have been loaded from one file."""
    seed = int(np.random.SeedSequence(numbers).generate_state(1)[0])
    with contextlib.suppress(AttributeError, NotImplementedError):  # environments that cannot be seeded
        model.set_random_seed(seed)
    model._last_obs = None


def _settings(model: OnPolicyAlgorithm) -> dict[str, Any]:
    """The hyper-parameters, which must be the same in all processes, as strings."""
    return {
        name: _in_words(value)
        for name, value in vars(model).items()
        if not name.startswith("_") and name not in _OF_EACH and _is_setting(value)
    }


def _surroundings(model: OnPolicyAlgorithm) -> dict[str, Any]:
    """Everything else that must be the same in all processes."""
    wrappers, env = [], model.env
    while isinstance(env, VecEnvWrapper):
        wrappers.append(type(env).__name__)
        env = env.venv
    modules = {cls.__module__ for cls in (*type(model).__mro__, *type(model.policy).__mro__)}
    return {
        "num_timesteps": model.num_timesteps,
        "the environments": f"{model.n_envs} in {[*wrappers, *_ids(env)]}",
        "the parameters": str({name: tuple(p.shape) for name, p in model.policy.named_parameters()}),
        "the versions": f"torch {th.__version__}, stable_baselines3 {stable_baselines3.__version__}",
        "the code of sb3_ppo_ext": _digest_of_package(),
        **{f"the code of {module}": _digest_of_module(module) for module in sorted(modules)},
    }


def _is_setting(value: Any) -> bool:
    return (
        value is None
        or callable(value)
        or isinstance(value, (bool, int, float, str, dict, tuple, type))
        or hasattr(value, "dtype")
    )


def _in_words(value: Any) -> str:
    if isinstance(value, type) or not callable(value):
        return re.sub(r" at 0x[0-9a-f]+", "", repr(value))
    try:
        return str([float(value(progress)) for progress in (1.0, 0.5, 0.0)])  # a schedule
    except Exception:
        return getattr(value, "__qualname__", type(value).__qualname__)


def _ids(env: Any) -> list[str]:
    try:
        return sorted({str(getattr(spec, "id", None)) for spec in env.get_attr("spec")})
    except Exception:  # not every vector of environments has get_attr
        return []


@functools.cache
def _digest_of_module(name: str) -> str:
    try:
        return _digest(inspect.getsource(sys.modules[name]))
    except (KeyError, OSError, TypeError):  # built in, or typed into an interpreter
        return ""


@functools.cache
def _digest_of_package() -> str:
    paths = sorted(Path(__file__).parents[1].rglob("*.py"))
    return _digest("".join(path.read_text() for path in paths))


def _digest(code: str) -> str:
    return hashlib.sha256(code.encode()).hexdigest()[:12]


def _check_alike(descriptions: list[dict[str, Any]]) -> None:
    first = descriptions[0]
    for rank, other in enumerate(descriptions):
        differing = [
            f"{name} is {other.get(name, 'missing')}, and {first.get(name, 'missing')} in process 0"
            for name in sorted(first.keys() | other.keys())
            if first.get(name) != other.get(name)
        ]
        if differing:
            raise ArgumentError(
                f"The processes cannot train one model: in process {rank}, {'; '.join(differing)}. All must run the "
                "same script with the same arguments; and a callback, which only the first process runs, must not "
                "change hyper-parameters"
            )
