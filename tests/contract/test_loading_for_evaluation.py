"""A model that is loaded to be watched needs nothing that only learning needs, and says so when it is to learn."""

from __future__ import annotations

import sys
import types
from typing import Any

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.evaluation import evaluate_policy

from sb3_ppo_ext import REINFORCE, DualClipPPO
from sb3_ppo_ext.common.saving.checkpoint import resume, save_checkpoint
from tests.algorithms import ALGORITHMS, ROLLOUT, small
from tests.envs import BOX, scripted


def make(n_envs: int = 2) -> Any:
    return scripted(BOX, spaces.Discrete(3), n_envs)


def watch(model: Any) -> None:
    _, lengths = evaluate_policy(model, make(1), n_eval_episodes=3, return_episode_rewards=True)
    assert lengths == [3, 2, 4]


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_compiled_model_where_there_is_no_compiler(algorithm, tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", sys.executable)  # nothing is compiled before there is something to learn
    model = small(algorithm, "MlpPolicy", make(), torch_compile=True)
    model.save(tmp_path / "model")
    save_checkpoint(model, tmp_path / "checkpoint")

    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(ValueError, match=r"torch_compile=True.*'no-such-compiler' was not found"):
        small(algorithm, "MlpPolicy", make(), torch_compile=True)
    for loaded in (
        algorithm.load(tmp_path / "model", device="cpu"),
        algorithm.load(tmp_path / "model", env=make(), device="cpu"),
        resume(algorithm, tmp_path / "checkpoint", make(), device="cpu"),
    ):
        assert loaded.torch_compile
        watch(loaded)
        loaded.set_env(make())
        with pytest.raises(ValueError, match=r"torch_compile=True.*'no-such-compiler' was not found"):
            loaded.learn(ROLLOUT)
        assert loaded.num_timesteps == 0
    algorithm.load(tmp_path / "model", env=make(), device="cpu", torch_compile=False).learn(ROLLOUT)


def test_an_optimiser_that_cannot_be_compiled(tmp_path):
    model = small(DualClipPPO, "MlpPolicy", make(), policy_kwargs={"optimizer_class": th.optim.SGD})
    model.save(tmp_path / "model")
    loaded = DualClipPPO.load(tmp_path / "model", env=make(), device="cpu", torch_compile=True)
    watch(loaded)
    with pytest.raises(ValueError, match=r"torch_compile=True.*optimizer_class=SGD"):
        loaded.learn(ROLLOUT)


def test_too_few_environments_for_a_baseline(tmp_path):
    small(REINFORCE, "MlpPolicy", make(2), baseline="mean", episodes_per_env=1).save(tmp_path / "model")
    loaded = REINFORCE.load(tmp_path / "model", env=make(1), device="cpu")
    watch(loaded)
    with pytest.raises(ValueError, match=r"episodes_per_env=1 with 1 environment"):
        loaded.learn(ROLLOUT)


@pytest.mark.parametrize("n_envs", [1, 3])
def test_another_number_of_environments_is_no_matter(n_envs, tmp_path):
    """The sizes of minibatches are recommended to who makes a model, not to who watches one."""
    small(DualClipPPO, "MlpPolicy", make(2), n_steps=12, batch_size=24).save(tmp_path / "model")
    watch(DualClipPPO.load(tmp_path / "model", env=make(n_envs), device="cpu"))


def test_a_buffer_that_cannot_be_imported(tmp_path, monkeypatch):
    module = types.ModuleType("of_the_users_own")

    class Buffer(RolloutBuffer):
        """Filled SB3's way."""

    Buffer.__module__, Buffer.__qualname__, module.Buffer = module.__name__, "Buffer", Buffer  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    model = small(DualClipPPO, "MlpPolicy", make(), rollout_buffer_class=Buffer).learn(ROLLOUT)
    model.save(tmp_path / "model")
    assert DualClipPPO.load(tmp_path / "model", device="cpu").rollout_buffer_class is Buffer

    obs = np.stack([BOX.sample() for _ in range(5)])
    expected = model.predict(obs, deterministic=True)[0]
    del module.Buffer  # type: ignore[attr-defined]
    for _ in ("no such class", "no such module"):
        with pytest.warns(UserWarning, match=r"rollout_buffer_class of .*model was left out .*of_the_users_own"):
            loaded = DualClipPPO.load(tmp_path / "model", device="cpu")
        np.testing.assert_array_equal(loaded.predict(obs, deterministic=True)[0], expected)
        monkeypatch.delitem(sys.modules, module.__name__, raising=False)
    replaced = {"rollout_buffer_class": Buffer}
    assert DualClipPPO.load(tmp_path / "model", device="cpu", custom_objects=replaced).rollout_buffer_class is Buffer


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_learning_without_an_environment(algorithm, tmp_path):
    model = small(algorithm, "MlpPolicy", make())
    model.save(tmp_path / "model")
    loaded = algorithm.load(tmp_path / "model", device="cpu")
    obs = np.zeros((2, *BOX.shape), np.float32)
    assert np.array_equal(loaded.predict(obs, deterministic=True)[0], model.predict(obs, deterministic=True)[0])
    watch(loaded)
    with pytest.raises(ValueError, match=rf"this {algorithm.__name__} has no environment.*load\(..., env=...\) or set"):
        loaded.learn(ROLLOUT)
    loaded.set_env(make())
    loaded.learn(ROLLOUT)
