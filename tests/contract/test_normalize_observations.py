"""``normalize_observations``: the policy normalises observations by what it has been trained with."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.callbacks import BaseCallback

from sb3_ppo_ext import AdaptiveKLPPO, DualClipPPO
from sb3_ppo_ext.common.errors import ArgumentError
from sb3_ppo_ext.common.rollout.normalization import RunningMoments
from sb3_ppo_ext.common.update.normalization import update_normalization
from sb3_ppo_ext.common.update.reduce import OneProcess
from tests.algorithms import ALGORITHMS, assert_close_policies, have_moved, parameters, small
from tests.envs import BOX, DICT, IMAGE, scripted

SHIFTED = spaces.Box(np.float32([2.0, -50.0]), np.float32([4.0, 150.0]))


class Collected(BaseCallback):
    """Keeps the observations of all rollouts."""

    def __init__(self) -> None:
        super().__init__()
        self.observations: list[Any] = []

    def _on_step(self) -> bool:
        return True

    def _on_rollout_end(self) -> None:
        buffer: Any = self.model.rollout_buffer  # type: ignore[attr-defined]
        seen = buffer.flat().observations
        self.observations.append({k: x.numpy() for k, x in seen.items()} if isinstance(seen, dict) else seen.numpy())


def normalizing(algorithm: Any, env: Any, policy: str = "MlpPolicy", **kwargs: Any) -> Any:
    policy_kwargs = {"normalize_observations": True, **kwargs.pop("policy_kwargs", {})}
    return small(algorithm, policy, env, policy_kwargs=policy_kwargs, **kwargs)


def moments_of(model: Any) -> list[RunningMoments]:
    return [module for module in model.policy.modules() if isinstance(module, RunningMoments)]


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_the_statistics_are_those_of_all_that_it_was_trained_with(algorithm: Any) -> None:
    model = normalizing(algorithm, scripted(SHIFTED))
    collected = Collected()
    before = parameters(model)
    model.learn(96, callback=collected)
    assert have_moved(model, before)
    seen = np.concatenate(collected.observations)
    assert len(collected.observations) > 1
    (moments,) = moments_of(model)
    np.testing.assert_allclose(moments.mean, seen.mean(axis=0), rtol=1e-5)
    np.testing.assert_allclose(moments.var, seen.var(axis=0), rtol=1e-4)
    assert moments.count == len(seen)
    obs = th.tensor([[3.0, 60.0], [1e6, -1e6]])
    expected = np.clip((obs.numpy() - seen.mean(axis=0)) / np.sqrt(seen.var(axis=0) + 1e-8), -10.0, 10.0)
    np.testing.assert_allclose(model.policy.extract_features(obs), expected, rtol=1e-3)


def test_an_update_compares_probabilities_that_were_normalised_alike() -> None:
    model = normalizing(DualClipPPO, scripted(SHIFTED), n_epochs=1, batch_size=32, learning_rate=1e-9)
    model.learn(96)
    assert abs(model.logger.name_to_value["train/approx_kl"]) < 1e-6
    assert abs(model.logger.name_to_value["train/ratio_max"] - 1.0) < 1e-4


def test_the_coefficient_follows_the_divergence_that_the_update_has_made() -> None:
    """And not the one that the new statistics make."""
    model = normalizing(AdaptiveKLPPO, scripted(SHIFTED), learning_rate=0.0)
    with th.no_grad():
        model.policy.action_net.weight.mul_(100.0)
    model.learn(64)
    assert abs(model.logger.name_to_value["train/kl"]) < 1e-6


def test_they_are_saved_with_the_model(tmp_path: Any) -> None:
    model = normalizing(DualClipPPO, scripted(SHIFTED)).learn(64)
    model.save(tmp_path / "model")
    loaded = DualClipPPO.load(tmp_path / "model")
    obs = model.env.reset()
    assert np.array_equal(model.predict(obs, deterministic=True)[0], loaded.predict(obs, deterministic=True)[0])
    model.policy.save(tmp_path / "policy")
    alone = type(model.policy).load(str(tmp_path / "policy"), device="cpu")
    assert np.array_equal(model.predict(obs, deterministic=True)[0], alone.predict(obs, deterministic=True)[0])
    fresh = normalizing(DualClipPPO, scripted(SHIFTED))
    assert not np.array_equal(model.predict(obs, deterministic=True)[0], fresh.predict(obs, deterministic=True)[0])


def test_of_a_dict_what_is_a_box_and_no_image_is_normalised() -> None:
    policy_kwargs = {"share_features_extractor": False}
    model = normalizing(DualClipPPO, scripted(DICT), "MultiInputPolicy", policy_kwargs=policy_kwargs).learn(32)
    assert [tuple(moments.mean.shape) for moments in moments_of(model)] == [BOX.shape] * 2  # of actor and critic
    assert all(moments.count == 32 for moments in moments_of(model))
    with pytest.raises(ArgumentError, match="a Box that is no image"):
        normalizing(DualClipPPO, scripted(IMAGE), "CnnPolicy")


def test_with_a_memory_and_step_by_step() -> None:
    model = normalizing(DualClipPPO, scripted(SHIFTED), "MlpLstmPolicy", policy_kwargs={"lstm_hidden_size": 4})
    assert moments_of(model.learn(32))[0].count == 32


def test_compiled_equals_eager(without_compiler: None) -> None:
    models = [
        normalizing(DualClipPPO, scripted(SHIFTED), torch_compile=compiled).learn(96) for compiled in (False, True)
    ]
    assert_close_policies(*models, atol=1e-4, rtol=1e-4)


class Two(OneProcess):
    """This process, and another one that has seen the opposite of its observations three times as often."""

    n_processes = 2

    def summed(self, message: th.Tensor) -> th.Tensor:
        return message * th.tensor([4.0, -2.0, -2.0, 4.0, 4.0])  # how many, sums and sums of squares of two numbers


def test_several_processes_have_the_same() -> None:
    model = normalizing(DualClipPPO, scripted(SHIFTED))
    x = th.tensor([[1.0, 2.0], [3.0, 6.0]])
    update_normalization(model.policy, x, Two())
    both = np.concatenate([x.numpy(), *[-x.numpy()] * 3])
    (moments,) = moments_of(model)
    np.testing.assert_allclose(moments.mean, both.mean(axis=0), rtol=1e-6)
    np.testing.assert_allclose(moments.var, both.var(axis=0), rtol=1e-6)
    assert moments.count == 8.0


def test_numbers_far_from_0_are_normalised_exactly() -> None:
    moments = RunningMoments((1,))
    x = th.tensor([1e5, 1e5 + 1.0, 1e5 + 2.0, 1e5 + 5.0], dtype=th.float64)
    for part in (x[:1], x[1:]):
        moments.add(part.mean()[None], part.var(correction=0)[None], th.tensor(float(len(part))))
    assert abs(moments.var.item() - 3.5) < 1e-2
