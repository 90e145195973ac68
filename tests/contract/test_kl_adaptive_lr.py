"""``kl_adaptive_lr`` as its user meets it: what is refused, what is saved, what YAML may say."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from stable_baselines3 import PPO

from sb3_ppo_ext import TRPO, AdaptiveKLPPO, DualClipPPO
from sb3_ppo_ext.zoo.entry import read_numbers
from tests.algorithms import PROXIMAL, ROLLOUT, small
from tests.custom import MyPolicy


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        (
            {"kl_adaptive_lr": 0.01},
            "kl_adaptive_lr=0.01 is not allowed: it must be None, or a dict of target_kl",
        ),
        ({"kl_adaptive_lr": {"target": 0.01}}, "a key of kl_adaptive_lr='target' is not allowed: it must be one of"),
        ({"kl_adaptive_lr": {"target_kl": 0.0}}, "kl_adaptive_lr['target_kl']=0.0 is not allowed"),
        ({"kl_adaptive_lr": {"tolerance": 0.9}}, "kl_adaptive_lr['tolerance']=0.9 is not allowed"),
        ({"kl_adaptive_lr": {"factor": 1}}, "kl_adaptive_lr['factor']=1 is not allowed"),
        ({"kl_adaptive_lr": {"minimum": 0.0}}, "kl_adaptive_lr['minimum']=0.0 is not allowed"),
        (
            {"kl_adaptive_lr": {"minimum": 0.1}},
            "kl_adaptive_lr['maximum']=0.01 is not allowed: it must be a fin",
        ),
        (
            {"kl_adaptive_lr": {"every": "step"}},
            "kl_adaptive_lr['every']='step' is not allowed: it must be one of",
        ),
        ({"kl_adaptive_lr": {}, "learning_rate": "lin_3e-4"}, "learning_rate='lin_3e-4' is not allowed with kl_adapti"),
        ({"kl_adaptive_lr": {}, "learning_rate": lambda _: 1e-3}, "is not allowed with kl_adaptive_lr: it must be a n"),
        (
            {"kl_adaptive_lr": {}, "learning_rate": 0.02},
            "learning_rate=0.02 is not allowed: it must be a finite number",
        ),
        ({"kl_adaptive_lr": {}, "n_epochs": 1, "batch_size": 16}, "kl_adaptive_lr={} is not allowed with n_epochs=1 a"),
    ],
)
@pytest.mark.parametrize("algorithm", PROXIMAL)
def test_what_is_refused(algorithm: Any, kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        small(algorithm, "MlpPolicy", "CartPole-v1", **kwargs)


def test_targets_that_contradict_each_other() -> None:
    """A stop at a KL of 1.5 * 0.006 = 0.009 keeps the KL below 0.02 / 2 for ever."""
    with pytest.raises(ValueError, match=r"target_kl=0.006 is not allowed with kl_adaptive_lr=.*always rise"):
        small(DualClipPPO, "MlpPolicy", "CartPole-v1", target_kl=0.006, kl_adaptive_lr={"target_kl": 0.02})
    small(DualClipPPO, "MlpPolicy", "CartPole-v1", target_kl=0.007, kl_adaptive_lr={"target_kl": 0.02})
    with pytest.raises(ValueError, match=r"the learning rate and the penalty have the same target"):
        small(AdaptiveKLPPO, "MlpPolicy", "CartPole-v1", kl_adaptive_lr={"target_kl": 0.02})
    with pytest.raises(TypeError, match="kl_adaptive_lr"):
        small(TRPO, "MlpPolicy", "CartPole-v1", kl_adaptive_lr={})


def test_a_distribution_without_a_formula_is_refused() -> None:
    with pytest.raises(ValueError, match="DualClipPPO with kl_adaptive_lr needs the exact KL divergence"):
        small(DualClipPPO, MyPolicy, "CartPole-v1", kl_adaptive_lr={})
    small(DualClipPPO, MyPolicy, "CartPole-v1").learn(ROLLOUT)


@pytest.mark.parametrize("policy", ["MlpPolicy", "MlpLstmPolicy"])
@pytest.mark.parametrize("algorithm", PROXIMAL)
def test_the_present_rate_is_saved(algorithm: Any, policy: str, tmp_path: Path) -> None:
    model = small(algorithm, policy, "CartPole-v1", learning_rate=1e-5, kl_adaptive_lr={"maximum": 0.1})
    model.learn(2 * ROLLOUT)
    rate = model.learning_rate
    assert rate == pytest.approx(1.5**6 * 1e-5)  # 4 steps an update, of which the first tells nothing
    model.save(tmp_path / "model")
    loaded = algorithm.load(tmp_path / "model", env=model.env, device="cpu")
    assert loaded.learning_rate == loaded.lr_schedule(0.7) == rate
    assert loaded.kl_adaptive_lr == {"maximum": 0.1}
    assert loaded.learn(2 * ROLLOUT).learning_rate > rate
    if policy == "MlpPolicy":
        assert PPO.load(tmp_path / "model", device="cpu", target_kl=None).lr_schedule(0.7) == rate
    watched = algorithm.load(tmp_path / "model", device="cpu", learning_rate=0.0)  # as the RL Zoo's enjoy has it
    assert watched.learning_rate == 0.0
    without = algorithm.load(tmp_path / "model", env=model.env, device="cpu", kl_adaptive_lr=None)
    assert without.learn(2 * ROLLOUT).learning_rate == rate


def test_yaml_may_write_its_numbers_as_3e_4() -> None:
    """PyYAML reads them as strings."""
    read = read_numbers({"kl_adaptive_lr": {"minimum": "1e-5", "every": "epoch", "target_kl": 0.01}}, str)
    assert read == {"kl_adaptive_lr": {"minimum": 1e-5, "every": "epoch", "target_kl": 0.01}}
    assert read_numbers({"env_kwargs": {"name": "walker"}, "gamma": 0.9}, str) == {}
