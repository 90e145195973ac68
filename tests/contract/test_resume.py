"""A run that is resumed from a checkpoint equals the uninterrupted one, to the bit."""

from __future__ import annotations

import pickle
import random
import shutil
from collections import deque
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium.wrappers import TimeLimit
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.running_mean_std import RunningMeanStd
from stable_baselines3.common.vec_env import (
    DummyVecEnv,
    SubprocVecEnv,
    VecEnv,
    VecFrameStack,
    VecMonitor,
    VecNormalize,
)

from sb3_ppo_ext import REINFORCE, TRPO, AdaptiveKLPPO, DualClipPPO
from sb3_ppo_ext.common.saving.checkpoint import SafeCheckpointCallback, latest_checkpoint, resume, save_checkpoint
from tests.custom import LearningRates
from tests.envs import RandomWalk, SavedWalk, limited_walk
from tests.processes import in_new_process

N_ENVS = 3
TOTAL = 4 * 16 * N_ENVS


def make_env(*, env_class: type[RandomWalk] = SavedWalk, vec_monitor: bool = False) -> VecEnv:
    """Every wrapper that remembers something."""

    def single() -> gym.Env[Any, Any]:
        env = TimeLimit(env_class(), max_episode_steps=11)
        return env if vec_monitor else Monitor(env)

    env: VecEnv = VecFrameStack(DummyVecEnv([single] * N_ENVS), n_stack=2)
    return VecNormalize(VecMonitor(env) if vec_monitor else env)


def decreasing(progress: float) -> float:
    return 0.01 * (0.5 + progress)


PROXIMAL = {"n_steps": 16, "batch_size": 16, "n_epochs": 2, "learning_rate": decreasing}
ALGORITHMS: dict[str, tuple[type[Any], dict[str, Any]]] = {
    "DualClipPPO": (DualClipPPO, {**PROXIMAL, "clip_range": "lin_0.3"}),
    "AdaptiveKLPPO": (AdaptiveKLPPO, {**PROXIMAL, "target_kl": decreasing}),
    "TRPO": (TRPO, {"n_steps": 16, "batch_size": 16, "learning_rate": decreasing, "target_kl": decreasing}),
    "REINFORCE": (REINFORCE, {"episodes_per_env": 2, "baseline": "value", "learning_rate": decreasing}),
}
ADAPTING = {
    "n_steps": 16,
    "batch_size": 16,
    "n_epochs": 3,
    "target_kl": 0.02,
    "kl_adaptive_lr": {},
    "recompute_advantages": True,
    "rollback": True,
    "policy_kwargs": {"layer_norm": True},
}
REFERENCE = {"reference_policy": "initial", "reference_kl_coef": {"target_kl": 1e-3}}
REUSING = {**PROXIMAL, "n_reused_rollouts": 2, "reuse": {"target": "vtrace", "proximal": "newest"}}
MORE: dict[str, tuple[type[Any], dict[str, Any]]] = {
    "DualClipPPO, adapting": (DualClipPPO, ADAPTING),
    "DualClipPPO, reference": (DualClipPPO, {**PROXIMAL, **REFERENCE}),
    "AdaptiveKLPPO, reusing": (AdaptiveKLPPO, REUSING),
    "DualClipPPO, moving average": (DualClipPPO, {**PROXIMAL, "n_reused_rollouts": 1, "reuse": {"proximal": "ewma"}}),
}
CASES = [*((name, use_sde) for name in ALGORITHMS for use_sde in (False, True)), *((name, False) for name in MORE)]


def make_model(name: str, use_sde: bool, env: VecEnv, policy: str = "MlpPolicy") -> Any:
    algorithm, arguments = (ALGORITHMS | MORE)[name]
    model = algorithm(policy, env, use_sde=use_sde, sde_sample_freq=5, seed=7, device="cpu", **arguments)
    model.action_space.sample()  # so that its generator is not where the seed puts it
    return model


def bits(value: Any) -> Any:
    """In a form that is equal only where every bit is."""
    if isinstance(value, th.Tensor):
        value = value.detach().numpy()
    if isinstance(value, (np.ndarray, np.generic)):
        return str(value.dtype), value.shape, value.tobytes()
    if isinstance(value, RunningMeanStd):
        value = vars(value)
    if isinstance(value, dict):
        return {key: bits(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, deque)):
        return [bits(item) for item in value]
    return value


def outcome(model: BaseAlgorithm) -> dict[str, Any]:
    """All that training depends on and leaves behind."""
    env = model.get_env()
    normalize = model.get_vec_normalize_env()
    assert env is not None
    assert normalize is not None
    result = {
        "weights": model.policy.state_dict(),
        "optimizer": model.policy.optimizer.state_dict(),
        "kl_coef": getattr(model, "kl_coef", None),
        "reference_kl_coef": model.reference_kl_coef,
        "learning_rate": model.lr_schedule(0.5),
        "num_timesteps": model.num_timesteps,
        "n_updates": model._n_updates,
        "progress": model._current_progress_remaining,
        "last_obs": model._last_obs,
        "last_episode_starts": model._last_episode_starts,
        "last_state": model._last_state,
        "average": None if getattr(model, "_average", None) is None else model._average.state_dict(),
        "episodes": [(episode["r"], episode["l"]) for episode in model.ep_info_buffer or ()],
        "statistics": [normalize.obs_rms, normalize.ret_rms, normalize.returns],
        "positions": env.get_attr("position"),
        "env generators": [generator.bit_generator.state for generator in env.get_attr("np_random")],
        "python": random.getstate(),
        "numpy": np.random.get_state(),  # noqa: NPY002
        "torch": th.get_rng_state(),
        "action space": model.action_space.np_random.bit_generator.state,
    }
    return {key: bits(value) for key, value in result.items()}


def resume_all(folder: str) -> None:
    """In the new process: resume each case from the newest checkpoint in its folder, and train to the end."""
    outcomes = {}
    for name, use_sde in CASES:
        path = latest_checkpoint(Path(folder, f"{name}-{use_sde}"))
        assert path is not None
        model = resume((ALGORITHMS | MORE)[name][0], path, make_env(), device="cpu")
        model.learn(TOTAL - model.num_timesteps, reset_num_timesteps=False)
        outcomes[name, use_sde] = outcome(model)
    Path(folder, "outcomes.pkl").write_bytes(pickle.dumps(outcomes))


@pytest.fixture(scope="module")
def uninterrupted_and_resumed(tmp_path_factory) -> tuple[dict[Any, Any], dict[Any, Any]]:
    folder = tmp_path_factory.mktemp("resume")
    uninterrupted = {}
    for name, use_sde in CASES:
        written = folder / f"{name}-{use_sde}-all"
        model = make_model(name, use_sde, make_env())
        model.learn(TOTAL, callback=SafeCheckpointCallback(1, written, keep_last=None))
        uninterrupted[name, use_sde] = outcome(model)
        checkpoints = sorted(written.iterdir(), key=lambda path: int(path.name.split("_")[-2]))
        assert len(checkpoints) >= 3  # one after each iteration
        kept = folder / f"{name}-{use_sde}"
        kept.mkdir()
        for checkpoint in checkpoints[:2]:  # as if it had been killed in the third
            shutil.copy(checkpoint, kept)
    in_new_process("from tests.contract.test_resume import resume_all; resume_all(sys.argv[1])", folder)
    return uninterrupted, pickle.loads((folder / "outcomes.pkl").read_bytes())


@pytest.mark.parametrize(("name", "use_sde"), CASES)
def test_a_resumed_run_equals_the_uninterrupted_one(uninterrupted_and_resumed, name, use_sde):
    uninterrupted, resumed = (outcomes[name, use_sde] for outcomes in uninterrupted_and_resumed)
    assert len(uninterrupted["episodes"]) > 3
    if name == "AdaptiveKLPPO":
        assert uninterrupted["kl_coef"] != 1.0
    if name in MORE:
        assert uninterrupted["learning_rate"] != 3e-4
    for key, value in uninterrupted.items():
        assert resumed[key] == value, key


@pytest.mark.parametrize("name", ALGORITHMS)
def test_writing_checkpoints_changes_nothing(uninterrupted_and_resumed, name):
    model = make_model(name, False, make_env())
    model.learn(TOTAL)
    assert outcome(model) == uninterrupted_and_resumed[0][name, False]


@pytest.mark.parametrize(
    ("vec_monitor", "policy"), [(False, "MlpPolicy"), (True, "MlpPolicy"), (False, "MlpLstmPolicy")]
)
@pytest.mark.parametrize("name", ALGORITHMS)
def test_training_goes_on_after_learn_as_if_in_one_process(name, vec_monitor, policy, tmp_path):
    model = make_model(name, True, make_env(vec_monitor=vec_monitor), policy)
    model.learn(TOTAL // 2)
    if policy == "MlpLstmPolicy":
        assert model._last_state.any()
    save_checkpoint(model, tmp_path / "model.zip")
    model.learn(TOTAL // 2, reset_num_timesteps=False)

    resumed = resume(ALGORITHMS[name][0], tmp_path / "model.zip", make_env(vec_monitor=vec_monitor), device="cpu")
    resumed.learn(TOTAL // 2, reset_num_timesteps=False)
    assert outcome(resumed) == outcome(model)


def test_schedules_go_on_from_where_they_were(tmp_path):
    model = make_model("DualClipPPO", False, make_env())
    model.learn(TOTAL, callback=SafeCheckpointCallback(1, tmp_path, keep_last=None))
    path = tmp_path / f"rl_model_{TOTAL // 2}_steps.zip"
    resumed, rates = resume(DualClipPPO, path, make_env(), device="cpu"), LearningRates()
    resumed.learn(TOTAL - resumed.num_timesteps, callback=rates, reset_num_timesteps=False)
    assert rates.rates == [(decreasing(progress),) for progress in (0.5, 0.25, 0.0)]


def test_a_completed_run_that_is_started_again_does_nothing(tmp_path):
    model = make_model("DualClipPPO", False, make_env())
    model.learn(TOTAL, callback=SafeCheckpointCallback(1000, tmp_path))
    before = outcome(model)
    (path,) = tmp_path.iterdir()
    resumed = resume(DualClipPPO, path, make_env(), device="cpu")
    resumed.learn(
        TOTAL - resumed.num_timesteps, callback=SafeCheckpointCallback(1, tmp_path), reset_num_timesteps=False
    )
    assert outcome(resumed) == before


def test_environments_that_do_not_give_their_state_are_reset_and_draw_on(tmp_path):
    model = make_model("DualClipPPO", False, make_env(env_class=RandomWalk))
    model.learn(TOTAL // 2)
    save_checkpoint(model, tmp_path / "model.zip")

    def resumed(seed: int) -> dict[str, Any]:
        env = make_env(env_class=RandomWalk)
        env.seed(seed)  # as make_vec_env() does, before the first reset
        return outcome(
            resume(DualClipPPO, tmp_path / "model.zip", env, device="cpu").learn(TOTAL // 2, reset_num_timesteps=False)
        )

    env = model.get_env()
    model.set_env(env)  # it will be reset here too
    model.learn(TOTAL // 2, reset_num_timesteps=False)
    assert outcome(model) == resumed(1) == resumed(2)


def test_worker_processes(tmp_path):
    env = SubprocVecEnv([limited_walk])
    try:
        model = DualClipPPO("MlpPolicy", VecNormalize(env), **PROXIMAL, seed=7, device="cpu")
        model.learn(32)
        save_checkpoint(model, tmp_path / "model.zip")
        model.learn(32, reset_num_timesteps=False)
        resumed = resume(DualClipPPO, tmp_path / "model.zip", VecNormalize(env), device="cpu")
        resumed.learn(32, reset_num_timesteps=False)
    finally:
        env.close()
    assert bits(resumed.policy.state_dict()) == bits(model.policy.state_dict())


class Opaque(DummyVecEnv):
    """A vector of environments that does not let one look into them."""

    def has_attr(self, attr_name: str) -> bool:
        raise NotImplementedError


def test_environments_that_cannot_be_looked_into(tmp_path):
    model = DualClipPPO("MlpPolicy", Opaque([limited_walk]), **PROXIMAL, device="cpu")
    model.learn(32)
    save_checkpoint(model, tmp_path / "model.zip")
    resumed = resume(DualClipPPO, tmp_path / "model.zip", Opaque([limited_walk]), device="cpu")
    assert resumed.learn(32, reset_num_timesteps=False).num_timesteps == 64


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("checkpoint") / "rl_model_0_steps.zip"
    model = make_model("DualClipPPO", False, make_env())
    model.learn(1)
    save_checkpoint(model, path)
    return path


def test_an_environment_in_other_wrappers_is_refused(checkpoint):
    env = make_env()
    assert isinstance(env, VecNormalize)
    with pytest.raises(ValueError, match=r"rl_model_0_steps.zip cannot.*'VecNormalize'.*\['VecFrameStack'\]"):
        resume(DualClipPPO, checkpoint, env.venv, device="cpu")


def test_environments_that_cannot_take_their_state_back_are_refused(checkpoint):
    with pytest.raises(ValueError, match=r"rl_model_0_steps.zip cannot.*load_state_dict"):
        resume(DualClipPPO, checkpoint, make_env(env_class=RandomWalk), device="cpu")


def test_a_model_that_was_saved_without_training_state_is_refused(tmp_path):
    make_model("DualClipPPO", False, make_env()).save(tmp_path / "model.zip")
    with pytest.raises(ValueError, match=r"model.zip cannot.*without training_state.pkl"):
        resume(DualClipPPO, tmp_path / "model.zip", make_env(), device="cpu")


def test_a_model_without_an_environment_is_refused(checkpoint, tmp_path):
    with pytest.raises(ValueError, match="no environment"):
        save_checkpoint(DualClipPPO.load(checkpoint, device="cpu"), tmp_path / "model.zip")
    assert list(tmp_path.iterdir()) == []
