"""
Checkpoints that are written whole or not at all, and exact resumption of training from them.

This script may be killed at any moment and started again::

    path = latest_checkpoint("checkpoints")
    model = DualClipPPO("MlpPolicy", env, seed=0) if path is None else resume(DualClipPPO, path, env)
    model.learn(
        1_000_000 - model.num_timesteps,
        callback=SafeCheckpointCallback(10_000, "checkpoints"),
        reset_num_timesteps=False,
    )

``learn(..., reset_num_timesteps=False)`` adds the steps already made to its argument. The subtraction keeps the sum at
1,000,000 in every start, and so the remaining progress that all schedules follow.

The resumed run equals the uninterrupted run, to the bit, if the environments can save their state. This takes two
methods: ``state_dict()``, which returns everything that ``step`` depends on, in any form that can be pickled, and
``load_state_dict(state)``. The state need not contain the generator ``np_random``, nor what SB3's ``Monitor`` and
gymnasium's ``TimeLimit``, ``FrameStackObservation``, ``NormalizeObservation`` and ``NormalizeReward`` remember. Any
other wrapper that remembers something needs the two methods too, and must call those of the environment that it wraps.
Environments without the methods are reset, and continue the same sequence of random numbers. (One exception to the
equality: gSDE with a user's own rollout buffer draws other noise in the first rollout.)

The state of callbacks is not saved: counters and best results (``EvalCallback.best_mean_reward``, the patience of
``StopTrainingOnNoModelImprovement``) start again with each start of the script, as in SB3.

A checkpoint is also a model file, which ``load`` can read. It contains ``vecnormalize.pkl``, which
:func:`load_vec_normalize` reads to evaluate the model, or to train it in other environments. Loading a model or
resuming it runs code that the file may contain; :func:`load_weights` does not.
"""

from __future__ import annotations

import io
import os
import pickle
import random
import re
import warnings
import zipfile
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch as th
from stable_baselines3.common.base_class import BaseAlgorithm, maybe_make_env
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.save_util import open_path
from stable_baselines3.common.type_aliases import GymEnv
from stable_baselines3.common.vec_env import VecEnv, VecNormalize, unwrap_vec_normalize
from torch import nn

from sb3_ppo_ext.common.saving.environment_state import check_env, env_state, set_env_state
from sb3_ppo_ext.common.saving.files import WEIGHTS, ReadableFile, damage_of, save_whole, write_whole
from sb3_ppo_ext.common.saving.interchange import ALGORITHM, check_origin, mark_of, name_of
from sb3_ppo_ext.common.validation import check_int

Algorithm = TypeVar("Algorithm", bound=BaseAlgorithm)

_TRAINING_STATE = "training_state.pkl"
_VEC_NORMALIZE = "vecnormalize.pkl"


class SafeCheckpointCallback(BaseCallback):
    """
    Writes checkpoints to ``<save_path>/<name_prefix>_<steps>_steps.zip``, each whole or not at all: one file with the
    model, the statistics of ``VecNormalize`` and the state of the random generators.

    Checkpoints are written between two rollouts, when an update is complete and no rollout has begun, and at the end of
    training. A checkpoint that cannot be written (a full disk) only causes a warning: training goes on, the earlier
    checkpoints are unchanged, and the next one may succeed.

    Pass the callback to ``learn``, alone or in a list; it cannot be the child of another callback, such as
    ``EveryNTimesteps``.

    :param save_freq: steps per environment between two checkpoints; the rollout is completed first
    :param save_path: folder of the checkpoints; it is created if it does not exist
    :param name_prefix: prefix of their names
    :param keep_last: number of checkpoints to keep; None: all
    :param verbose: 2 to print the name of each checkpoint
    :raises ValueError: if an argument is out of range; in ``learn`` if the folder contains a checkpoint with more steps
        than the model has made, which belongs to another run or should be resumed
    """

    def __init__(
        self,
        save_freq: int,
        save_path: str | os.PathLike[str],
        name_prefix: str = "rl_model",
        *,
        keep_last: int | None = 3,
        verbose: int = 0,
    ) -> None:
        super().__init__(verbose)
        check_int("save_freq", save_freq, minimum=1)
        if keep_last is not None:
            check_int("keep_last", keep_last, minimum=1)
        self.save_freq = save_freq
        self.save_path = Path(save_path)
        self.name_prefix = name_prefix
        self.keep_last = keep_last
        self._last_call = 0

    def _on_training_start(self) -> None:
        self.save_path.mkdir(parents=True, exist_ok=True)
        for steps, path in _checkpoints(self.save_path, self.name_prefix):
            if steps > self.model.num_timesteps and _defect(path) is None:
                raise ValueError(
                    f"save_path={str(self.save_path)!r} is not allowed: the model has made {self.model.num_timesteps} "
                    f"steps, and {path.name} has more. Resume from that checkpoint, or choose another save_path or "
                    "name_prefix"
                )

    def _on_step(self) -> bool:
        if self.parent is not None:
            raise ValueError(
                f"{type(self).__name__} is not allowed inside {type(self.parent).__name__}: pass it to learn() itself"
            )
        return True

    def _on_rollout_start(self) -> None:
        if self.n_calls - self._last_call >= self.save_freq:
            self._save()

    def _on_training_end(self) -> None:
        self._save()

    def _save(self) -> None:
        self._last_call = self.n_calls
        path = self.save_path / f"{self.name_prefix}_{self.model.num_timesteps}_steps.zip"
        content = _checkpoint_bytes(self.model)
        try:
            write_whole(path, content)
            self._remove_old()
        except OSError as error:
            warnings.warn(
                f"Checkpointing to {path} failed: {error}. Training goes on; the earlier checkpoints are unchanged",
                stacklevel=2,
            )
        else:
            if self.verbose >= 2:
                print(f"Saved checkpoint {path}")

    def _remove_old(self) -> None:
        if self.keep_last is not None:
            checkpoints = _checkpoints(self.save_path, self.name_prefix)
            # A damaged file with more steps than the model has made belongs to another run: keep it, do not count it.
            past = [path for steps, path in checkpoints if steps <= self.model.num_timesteps]
            for path in past[: -self.keep_last]:
                path.unlink(missing_ok=True)


def save_checkpoint(model: BaseAlgorithm, path: str | os.PathLike[str]) -> None:
    """
    Write a checkpoint, whole or not at all: an existing file at ``path`` stays until the new one replaces it. The file
    gets the name that ``save`` would give it.

    Between two calls of ``learn``, a checkpoint contains everything that training depends on. In the middle of a
    rollout it does not: the steps that have been collected are not saved.

    :param model: the model to save, with its environment
    :param path: path of the file; ``.zip`` is added if it has no suffix
    :raises OSError: if the file cannot be written
    :raises ValueError: if the model has no environment
    """
    save_whole(path, _checkpoint_bytes(model))


def latest_checkpoint(save_path: str | os.PathLike[str], name_prefix: str = "rl_model") -> Path | None:
    """
    Find the undamaged checkpoint with the most steps. Damaged ones are skipped, with a warning.

    :param save_path: folder of the checkpoints
    :param name_prefix: prefix of their names
    :return: its path; None if there is no checkpoint, or no such folder
    """
    for _, path in reversed(_checkpoints(Path(save_path), name_prefix)):
        defect = _defect(path)
        if defect is None:
            return path
        warnings.warn(f"Checkpoint {path} was skipped: {defect}", stacklevel=2)
    return None


def resume(
    algo_class: type[Algorithm],
    path: str | os.PathLike[str],
    env: GymEnv | str,
    *,
    device: th.device | str = "auto",
    custom_objects: dict[str, Any] | None = None,
) -> Algorithm:
    """
    Load the model of a checkpoint to continue its training: the state of the environments, the statistics of
    ``VecNormalize`` and the random generators are restored.

    Continue with ``model.learn(total - model.num_timesteps, reset_num_timesteps=False)``, where ``total`` is the number
    of steps of the whole training. Draw no random numbers in between.

    :param algo_class: class of the model
    :param path: path of the checkpoint; ``.zip`` may be left out
    :param env: the environment, built as for the training, with the same number of environments and the same wrappers
        and settings; or the id of a registered environment
    :param device: "cpu", "cuda" or "auto"
    :param custom_objects: attributes that replace those in the file, by name
    :return: the model
    :raises ValueError: if the file cannot be read, is damaged, is no checkpoint or belongs to another algorithm, or if
        ``env`` differs from that of the training
    """
    if os.path.isdir(path):
        raise ValueError(f"{path} cannot be resumed: it is a folder; latest_checkpoint() names the newest file in it")
    try:
        file = open_path(Path(path), "r", suffix="zip")
    except OSError as error:
        raise ValueError(f"{path} cannot be resumed: {error}") from error
    with file:  # opened once, because another checkpoint may replace it meanwhile
        defect = _defect(file)
        if defect is not None:
            raise ValueError(f"{path} cannot be resumed: {defect}")
        mark = mark_of(file)
        if mark is not None and not hasattr(algo_class, "_loads_files_of"):  # SB3's and sb3-contrib's load() takes any
            check_origin(mark, algo_class, (), path)
        with zipfile.ZipFile(file) as archive:
            state = _unpickled(archive, _TRAINING_STATE, path)
        # Without the environment, because load() would seed it.
        model = algo_class.load(file, device=device, custom_objects=custom_objects)
    vec_env = model._wrap_env(maybe_make_env(env, model.verbose), model.verbose)
    if vec_env.num_envs != model.n_envs:
        raise ValueError(
            f"{path} cannot be resumed with this environment: it was trained in {model.n_envs} environments, and here "
            f"are {vec_env.num_envs}. To resume, give it {model.n_envs} environments. To continue with another number, "
            "new episodes and new random numbers, call env = load_vec_normalize(path, env) if the training had a "
            f"VecNormalize, and then {algo_class.__name__}.load(path, env=env)"
        )
    try:
        check_env(vec_env, state["env"])
    except ValueError as error:
        raise ValueError(f"{path} cannot be resumed with this environment: {error}") from None
    model.set_env(vec_env, force_reset=state["env"]["states"] is None)
    set_env_state(vec_env, state["env"])
    _set_random_state(model, state["random"])
    if state.get("old_rollouts"):  # checkpoints of earlier versions have none
        model._old_rollouts = state["old_rollouts"]  # type: ignore[attr-defined]
        for rollout in state["old_rollouts"]:
            rollout.buffer.device = model.device
    if "average" in state:
        model._average = state["average"]  # type: ignore[attr-defined]
    return model


def load_vec_normalize(path: str | os.PathLike[str], venv: VecEnv) -> VecNormalize | None:
    """
    Wrap environments in the ``VecNormalize`` of a checkpoint, with its statistics and settings, as
    :meth:`stable_baselines3.common.vec_env.VecNormalize.load` does with its own files. Both run code that the file may
    contain.

    :param path: path of the checkpoint; ``.zip`` may be left out
    :param venv: the environments, not yet normalised
    :return: the wrapper; None if the training had none
    :raises OSError: if the file cannot be read
    :raises ValueError: if it is damaged, or if its statistics do not fit the environments
    """
    if unwrap_vec_normalize(venv) is not None:
        raise ValueError("venv is not allowed: it already has a VecNormalize, and would be normalised twice")
    path = Path(path)
    with open_path(path, "r", suffix="zip") as file:
        damage = damage_of(file)
        if damage is not None:
            raise ValueError(f"{path} has no VecNormalize that can be read: {damage}")
        with zipfile.ZipFile(file) as archive:
            if _VEC_NORMALIZE not in archive.namelist():
                return None
            vec_normalize: VecNormalize = _unpickled(archive, _VEC_NORMALIZE, path)
    try:
        vec_normalize.set_venv(venv)
    except AssertionError:
        raise ValueError(
            f"the VecNormalize of {path} does not fit: it is for observations in "
            f"{vec_normalize.observation_space}, and the environments have {venv.observation_space}"
        ) from None
    return vec_normalize


def load_weights(path: str | os.PathLike[str], policy: nn.Module) -> None:
    """
    Load the weights of a policy from a model file without running code that the file may contain: only the tensors in
    ``policy.pth`` are read.

    :param path: path of a model file or checkpoint; ``.zip`` may be left out
    :param policy: the policy to load into, such as ``model.policy``; unchanged if loading fails
    :raises OSError: if the file cannot be read
    :raises ValueError: if the file is damaged, contains more than tensors, or does not fit the policy
    """
    path = Path(path)
    with open_path(path, "r", suffix="zip") as file:
        try:
            with zipfile.ZipFile(file) as archive:
                content = io.BytesIO(archive.read(WEIGHTS))
            weights = th.load(content, map_location="cpu", weights_only=True)
        except Exception as error:  # a damaged or malicious file may raise anything
            raise ValueError(f"{path} has no weights that can be read: {error}") from error
    present = policy.state_dict()
    if not isinstance(weights, dict):
        raise ValueError(f"{path} has no weights that can be read: {WEIGHTS} holds a {type(weights).__name__}")
    differing = sorted(
        name
        for name in present.keys() | weights.keys()
        if name not in present or present[name].shape != getattr(weights.get(name), "shape", None)
    )
    if differing:
        raise ValueError(f"{path} does not fit the policy: they differ in the names or shapes of {differing}")
    policy.load_state_dict(weights)


def _checkpoints(folder: Path, name_prefix: str) -> list[tuple[int, Path]]:
    """Steps and path of each checkpoint, damaged ones too, the one with the most steps last."""
    if not folder.is_dir():
        return []
    pattern = re.compile(rf"{re.escape(name_prefix)}_(\d+)_steps\.zip")
    matches = ((pattern.fullmatch(path.name), path) for path in folder.iterdir())
    return sorted((int(match[1]), path) for match, path in matches if match)


def _defect(file: Path | ReadableFile) -> str | None:
    """Why a file cannot be resumed; None if it is a whole checkpoint. Its whole content is checked."""
    damage = damage_of(file)
    if damage is not None:
        return damage
    with zipfile.ZipFile(file) as archive:
        is_checkpoint = _TRAINING_STATE in archive.namelist()
    return None if is_checkpoint else f"it is a model without {_TRAINING_STATE}, not a checkpoint"


def _unpickled(archive: zipfile.ZipFile, member: str, path: object) -> Any:
    try:
        return pickle.loads(archive.read(member))
    except Exception as error:  # a class in it may raise anything, or be missing here
        raise ValueError(f"{member} in {path} cannot be read here ({type(error).__name__}: {error})") from error


def _checkpoint_bytes(model: BaseAlgorithm) -> memoryview:
    """The content of a checkpoint, built in memory, so that only :func:`write_whole` can meet errors of the disk."""
    env = model.get_env()
    if env is None:
        raise ValueError("the model has no environment: give it one with set_env()")
    state: dict[str, Any] = {
        "env": env_state(env, in_episode=model._last_obs is not None),
        "random": _random_state(model),
    }
    old_rollouts = getattr(model, "_old_rollouts", ())
    if old_rollouts:
        state["old_rollouts"] = old_rollouts
    if getattr(model, "_average", None) is not None:
        state["average"] = model._average  # type: ignore[attr-defined]
    buffer = io.BytesIO()
    model.save(buffer)
    with zipfile.ZipFile(buffer, "a") as archive:
        if ALGORITHM not in archive.namelist():  # SB3's and sb3-contrib's save() writes none
            archive.writestr(ALGORITHM, name_of(type(model)))
        archive.writestr(_TRAINING_STATE, pickle.dumps(state))
        vec_normalize = model.get_vec_normalize_env()
        if vec_normalize is not None:
            archive.writestr(_VEC_NORMALIZE, pickle.dumps(vec_normalize))
    return buffer.getbuffer()


def _random_state(model: BaseAlgorithm) -> dict[str, Any]:
    return {
        "python": random.getstate(),
        "numpy": np.random.get_state(),  # noqa: NPY002
        "torch": th.get_rng_state(),
        "cuda": th.cuda.get_rng_state_all() if th.cuda.is_initialized() else [],  # type: ignore[no-untyped-call]
        "action_space": model.action_space.np_random.bit_generator.state,
    }


def _set_random_state(model: BaseAlgorithm, state: dict[str, Any]) -> None:
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])  # noqa: NPY002
    th.set_rng_state(state["torch"])
    for device, cuda_state in enumerate(state["cuda"][: th.cuda.device_count()]):
        th.cuda.set_rng_state(cuda_state, device)
    model.action_space.np_random.bit_generator.state = state["action_space"]
