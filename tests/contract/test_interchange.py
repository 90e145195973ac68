"""Which algorithm may load whose file: this package's of before and now, SB3's and sb3-contrib's, and theirs ours."""

from __future__ import annotations

import io
import math
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sb3_contrib
import torch as th
from gymnasium import spaces
from sb3_contrib import MaskablePPO, RecurrentPPO
from sb3_contrib.common.envs import (
    InvalidActionEnvDiscrete,
    InvalidActionEnvMultiBinary,
    InvalidActionEnvMultiDiscrete,
)
from sb3_contrib.common.maskable.policies import MaskableActorCriticPolicy
from stable_baselines3 import A2C, DQN, PPO
from stable_baselines3.common.distributions import kl_divergence
from stable_baselines3.common.env_util import make_vec_env

from sb3_ppo_ext import REINFORCE, TRPO, AdaptiveKLPPO, DualClipPPO
from sb3_ppo_ext.common.distributions import family_of_space
from sb3_ppo_ext.common.rollout.actor_critic import DirectActorCritic
from sb3_ppo_ext.common.rollout.data import PolicyInput
from sb3_ppo_ext.common.rollout.masks import choices_of
from sb3_ppo_ext.common.saving.checkpoint import load_weights, resume, save_checkpoint
from sb3_ppo_ext.common.saving.interchange import ALGORITHM
from tests.algorithms import ALGORITHMS, PROXIMAL, ROLLOUT, assert_same_policy, small
from tests.envs import BOX, scripted

FILES = Path(__file__).parent / "files"
TORQUES = spaces.Box(-1.0, 1.0, (3,), np.float32)


def make(action_space: Any = TORQUES, n_envs: int = 2) -> Any:
    return scripted(BOX, action_space, n_envs)


def theirs(algorithm: Any, env: Any = None, **arguments: Any) -> Any:
    """A model of SB3 or sb3-contrib, trained a little."""
    sizes = {} if algorithm is A2C else {"batch_size": 8}
    arguments = {
        "n_steps": ROLLOUT,
        "policy_kwargs": {"net_arch": [8]},
        "device": "cpu",
        "seed": 0,
        **sizes,
        **arguments,
    }
    return algorithm("MlpPolicy", make() if env is None else env, **arguments).learn(2 * ROLLOUT)


class Child(DualClipPPO):
    """A user's own."""


class Sibling(DualClipPPO):
    """Another one."""


# Among the algorithms of this package.


@pytest.mark.parametrize("by", ALGORITHMS)
@pytest.mark.parametrize("of", ALGORITHMS)
def test_only_the_algorithm_itself_loads_a_file(of, by, tmp_path):
    small(of, "MlpPolicy", make()).save(tmp_path / "model")
    with zipfile.ZipFile(tmp_path / "model.zip") as archive:
        assert archive.read(ALGORITHM).decode() == f"sb3_ppo_ext.{of.__name__}"
    if of is by:
        assert type(by.load(tmp_path / "model", device="cpu")) is by
        return
    for source in (tmp_path / "model", str(tmp_path / "model.zip"), io.BytesIO((tmp_path / "model.zip").read_bytes())):
        with pytest.raises(
            ValueError, match=rf"cannot be loaded by {by.__name__}: .* model of sb3_ppo_ext.{of.__name__}"
        ):
            by.load(source, env=make(), device="cpu")


@pytest.mark.parametrize("of", ALGORITHMS)
def test_only_the_algorithm_itself_resumes_a_checkpoint(of, tmp_path):
    save_checkpoint(small(of, "MlpPolicy", make()), tmp_path / "a.zip")
    by = TRPO if of is not TRPO else AdaptiveKLPPO
    for other in (by, PPO, sb3_contrib.TRPO):  # which load anything themselves
        with pytest.raises(
            ValueError, match=rf"a.zip cannot be loaded by {other.__name__}: .*sb3_ppo_ext.{of.__name__}"
        ):
            resume(other, tmp_path / "a.zip", make(), device="cpu")
    assert type(resume(of, tmp_path / "a.zip", make(), device="cpu")) is of


def test_a_class_and_those_that_derive_from_it_are_one_algorithm(tmp_path):
    for of in (DualClipPPO, Child):
        small(DualClipPPO, "MlpPolicy", make()).save(tmp_path / "model")
        model = of("MlpPolicy", make(), n_steps=8, batch_size=8, device="cpu")
        model.save(tmp_path / "model")
        for by in (DualClipPPO, Child, Sibling):
            assert_same_policy(by.load(tmp_path / "model", device="cpu"), model)
        with pytest.raises(ValueError, match=r"cannot be loaded by TRPO: it is a model of sb3_ppo_ext.DualClipPPO"):
            TRPO.load(tmp_path / "model", device="cpu")


@pytest.mark.parametrize("by", ALGORITHMS)
@pytest.mark.parametrize("of", ALGORITHMS)
def test_files_of_before_they_named_their_algorithm(of, by):
    names = {
        DualClipPPO: "dual_clip_ppo",
        AdaptiveKLPPO: "adaptive_kl_ppo",
        TRPO: "trpo",
        REINFORCE: "reinforce",
    }
    path = FILES / f"{names[of]}.zip"
    if of is not by:
        with pytest.raises(ValueError, match=rf"cannot be loaded by {by.__name__}: .* sb3_ppo_ext.{of.__name__}"):
            by.load(path, device="cpu")
        return
    model = by.load(path, env=make_vec_env("CartPole-v1"), device="cpu")
    assert model.num_timesteps >= 8
    expected: dict[Any, dict[str, Any]] = {
        DualClipPPO: {"learning_rate": 1e-3, "clip_range": 0.3, "dual_clip": 4.0},
        AdaptiveKLPPO: {"target_kl": 0.04, "kl_coef_factor": 2.0, "clip_range": None},
        TRPO: {"cg_damping": None, "target_kl": None},
        REINFORCE: {"baseline": "value", "ent_coef": 0.01, "episodes_per_env": 1},
    }
    for name, value in expected[of].items():
        loaded = getattr(model, name)
        assert (loaded(1.0) if callable(loaded) else loaded) == value
    if of is TRPO:
        assert model.sub_sampling_factor == 2  # fvp_subsampling in the file
        assert "fvp_subsampling" not in vars(model)
    model.learn(8, reset_num_timesteps=False)


# Theirs into ours.


@pytest.mark.parametrize("of", [PPO, A2C])
@pytest.mark.parametrize("by", PROXIMAL)
def test_ppo_and_a2c_of_sb3(of, by, tmp_path):
    model = theirs(of, gamma=0.9, learning_rate=2e-3)
    model.save(tmp_path / "model")
    loaded = by.load(tmp_path / "model", env=make(), device="cpu")
    assert_same_policy(loaded, model)
    assert loaded.gamma == 0.9
    assert loaded.lr_schedule(1.0) == 2e-3
    assert type(loaded.policy.optimizer) is type(model.policy.optimizer)
    assert not hasattr(loaded, "rms_prop_eps")
    loaded.learn(2 * ROLLOUT, reset_num_timesteps=False)
    loaded.save(tmp_path / "ours")
    by.load(tmp_path / "ours", device="cpu")


def test_a_checkpoint_of_sb3s_model(tmp_path):
    model = theirs(PPO)
    save_checkpoint(model, tmp_path / "a.zip")
    assert_same_policy(resume(PPO, tmp_path / "a.zip", make(), device="cpu"), model)
    assert_same_policy(resume(DualClipPPO, tmp_path / "a.zip", make(), device="cpu"), model)
    for by in (A2C, TRPO, MaskablePPO):
        with pytest.raises(ValueError, match=rf"loaded by {by.__name__}: it is a model of stable_baselines3.PPO"):
            resume(by, tmp_path / "a.zip", make(), device="cpu")


@pytest.mark.parametrize(
    ("action_space", "factor"),
    [
        (TORQUES, 3),
        (spaces.Discrete(4), 1),
        (spaces.MultiBinary(3), 3),
        (spaces.MultiDiscrete([2, 3]), 1),  # whose KL divergence sb3-contrib does not average
    ],
    ids=["box", "discrete", "multi_binary", "multi_discrete"],
)
def test_contribs_trpo(action_space, factor, tmp_path):
    model = theirs(
        sb3_contrib.TRPO, make(action_space), target_kl=0.02, cg_damping=0.05, sub_sampling_factor=2, cg_max_steps=7
    )
    model.save(tmp_path / "model")

    def load(**arguments: Any) -> TRPO:
        return TRPO.load(tmp_path / "model", env=make(action_space), device="cpu", **arguments)

    if factor > 1:
        with pytest.warns(
            UserWarning, match=r"3 action dimensions.*target_kl=0.02 became 0.06, cg_damping=0.05 became 0.15"
        ):
            loaded = load()
    else:
        loaded = load()
    assert_same_policy(loaded, model)
    assert loaded._whole_action_value(loaded.target_kl, math.nan) == pytest.approx(0.02 * factor)
    assert loaded._whole_action_value(loaded.cg_damping, math.nan) == pytest.approx(0.05 * factor)
    assert loaded.sub_sampling_factor == 2
    assert loaded.cg_max_steps == 7
    # A quantity of the whole action is so many times what sb3-contrib takes for it.
    obs, other = th.randn(5, 4), TRPO("MlpPolicy", make(action_space), seed=5, device="cpu").policy
    kl = kl_divergence(model.policy.get_distribution(obs), other.get_distribution(obs)).mean()
    params = [DirectActorCritic(policy).params(PolicyInput(obs)) for policy in (loaded.policy, other)]
    joint = family_of_space(action_space).kl(*params).mean()
    assert joint.item() == pytest.approx(factor * kl.item(), rel=1e-4)

    loaded.learn(2 * ROLLOUT, reset_num_timesteps=False)
    for arguments in (
        {"target_kl": 0.5, "cg_damping": 0.6},
        {"custom_objects": {"target_kl": 0.5, "cg_damping": 0.6, "action_space": action_space}},
    ):
        own = load(**arguments)  # a user's numbers are of the whole action, as everywhere here
        assert (own._whole_action_value(own.target_kl, math.nan), own.cg_damping) == (0.5, 0.6)


MASKED = {
    "discrete": InvalidActionEnvDiscrete(dim=6, n_invalid_actions=2),
    "multi_discrete": InvalidActionEnvMultiDiscrete(dims=[3, 4], n_invalid_actions=3),
    "multi_binary": InvalidActionEnvMultiBinary(dims=3, n_invalid_actions=2),
}


def maskable_ppo(env, policy="MlpPolicy"):
    return MaskablePPO(policy, env, n_steps=16, batch_size=8, policy_kwargs={"net_arch": [8]}, device="cpu", seed=0)


def assert_same_actions(one, other, env):
    """Of the networks as they are, with masks."""
    for _ in range(10):
        obs, _ = env.reset()
        obs, masks = np.asarray(obs).reshape(-1), env.action_masks()
        actions = [model.predict(obs, action_masks=masks, deterministic=True)[0] for model in (one, other)]
        assert np.array_equal(*actions)


@pytest.mark.parametrize("by", PROXIMAL)
@pytest.mark.parametrize("masked", MASKED.values(), ids=MASKED)
def test_maskable_ppo(masked, by, tmp_path):
    model = maskable_ppo(masked).learn(32)
    model.save(tmp_path / "model")
    loaded = by.load(tmp_path / "model", env=masked, device="cpu")
    assert_same_policy(loaded, model)
    assert_same_actions(loaded, model, masked)
    for _ in range(20):  # of the environment that is at hand
        obs, _ = masked.reset()
        action = np.asarray(loaded.predict(np.asarray(obs).reshape(-1))[0]).reshape(-1)
        starts = np.cumsum([0, *choices_of(masked.action_space)[:-1]])
        assert np.asarray(masked.action_masks())[starts + action].all()
    loaded.learn(16, reset_num_timesteps=False)
    loaded.save(tmp_path / "ours")
    again = by.load(tmp_path / "ours", device="cpu")
    back = MaskablePPO.load(tmp_path / "ours", env=masked, device="cpu")
    for other in (again, back):
        assert_same_policy(other, loaded)
        assert_same_actions(other, loaded, masked)
    back.learn(16)
    with pytest.raises(ValueError, match=r"cannot be loaded by TRPO: it is a model of sb3_contrib.MaskablePPO"):
        TRPO.load(tmp_path / "model", device="cpu")
    save_checkpoint(model, tmp_path / "checkpoint")  # which names the algorithm
    assert_same_policy(by.load(tmp_path / "checkpoint", device="cpu"), model)


@pytest.mark.parametrize(
    ("kind", "policy"),
    [
        ("discrete", "MlpPolicy"),
        ("multi_discrete", "MlpPolicy"),
        ("discrete", MaskableActorCriticPolicy),
        ("multi_discrete", MaskableActorCriticPolicy),
        ("multi_binary", MaskableActorCriticPolicy),
    ],
)
def test_weights_of_maskable_ppo_and_back(kind, policy, tmp_path):
    masked = MASKED[kind]
    model = maskable_ppo(masked).learn(16)
    model.save(tmp_path / "model")
    for algorithm in ALGORITHMS:
        ours = small(algorithm, policy, masked)
        load_weights(tmp_path / "model.zip", ours.policy)
        assert_same_policy(ours, model)
    ours = small(DualClipPPO, policy, masked, seed=3)
    ours.set_parameters(model.get_parameters())
    assert_same_policy(ours, model)
    ours.learn(ROLLOUT)
    model.set_parameters(ours.get_parameters())
    assert_same_policy(model, ours)
    assert_same_actions(model, ours, masked)


def test_binary_actions_of_maskable_ppo_have_two_outputs_each():
    model = maskable_ppo(MASKED["multi_binary"])
    with pytest.raises(RuntimeError, match=r"size mismatch for action_net.*\[6, 8\].*\[3, 8\]"):
        small(DualClipPPO, "MlpPolicy", MASKED["multi_binary"]).set_parameters(model.get_parameters())


class OwnDefaults(MaskableActorCriticPolicy):
    """Other defaults, the same computation."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"activation_fn": th.nn.ReLU, **kwargs})


class OwnForward(MaskableActorCriticPolicy):
    """A computation of its own."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return super().forward(*args, **kwargs)


def test_maskable_ppo_with_a_policy_of_ones_own(tmp_path):
    masked = MASKED["discrete"]
    model = maskable_ppo(masked, OwnDefaults).learn(16)
    model.save(tmp_path / "model")
    loaded = DualClipPPO.load(tmp_path / "model", device="cpu")
    assert_same_policy(loaded, model)
    assert_same_actions(loaded, model, masked)
    del masked
    with pytest.raises(ValueError, match="this model was trained with action masks"):
        loaded.predict(np.zeros(1))
    replaced = DualClipPPO.load(tmp_path / "model", custom_objects={"policy_class": OwnDefaults}, device="cpu")
    with pytest.raises(ValueError, match="this model was trained with action masks"):
        replaced.predict(np.zeros(1))
    maskable_ppo(MASKED["discrete"], OwnForward).save(tmp_path / "own")
    with pytest.raises(ValueError, match=r"policy=OwnForward is not allowed: .* takes action_masks"):
        DualClipPPO.load(tmp_path / "own", device="cpu")


@pytest.mark.parametrize("by", ALGORITHMS)
def test_models_of_another_kind_are_refused(by, tmp_path):
    others = {
        "stable_baselines3.PPO": (PPO, "MlpPolicy", {}),
        "stable_baselines3.A2C": (A2C, "MlpPolicy", {}),
        "sb3_contrib.TRPO": (sb3_contrib.TRPO, "MlpPolicy", {}),
        "sb3_contrib.RecurrentPPO": (RecurrentPPO, "MlpLstmPolicy", {"policy_kwargs": {"lstm_hidden_size": 4}}),
        "another kind of algorithm": (DQN, "MlpPolicy", {"buffer_size": 10}),
    }
    for name, (of, policy, arguments) in others.items():
        if name in by._loads_files_of:
            continue
        of(policy, "CartPole-v1", device="cpu", **arguments).save(tmp_path / "model")
        with pytest.raises(ValueError, match=rf"model.* cannot be loaded by {by.__name__}: it is a model of {name}"):
            by.load(tmp_path / "model", device="cpu")


# Ours into theirs.


@pytest.mark.parametrize("of", PROXIMAL)
def test_sb3s_ppo_goes_on_with_ours(of, tmp_path):
    model = small(of, "MlpPolicy", make(), gamma=0.9).learn(2 * ROLLOUT)
    model.save(tmp_path / "model")
    loaded = PPO.load(tmp_path / "model", env=make(), device="cpu")
    assert_same_policy(loaded, model)
    assert loaded.gamma == 0.9
    assert loaded.clip_range(1.0) == model.clip_range(1.0)
    loaded.learn(2 * ROLLOUT, reset_num_timesteps=False)
    loaded.save(tmp_path / "theirs")
    assert_same_policy(of.load(tmp_path / "theirs", device="cpu"), loaded)


@pytest.mark.parametrize("arguments", [{}, {"cg_damping": 0.2, "learning_rate": 2e-3}])
def test_contribs_trpo_goes_on_with_ours(arguments, tmp_path):
    model = small(TRPO, "MlpPolicy", make(), **arguments).learn(2 * ROLLOUT)
    model.save(tmp_path / "model")
    loaded = sb3_contrib.TRPO.load(tmp_path / "model", env=make(), device="cpu")
    assert_same_policy(loaded, model)
    assert loaded.cg_damping == arguments.get("cg_damping", 0.1)
    assert loaded.target_kl == 0.01
    loaded.learn(2 * ROLLOUT, reset_num_timesteps=False)


def test_what_is_none_is_none_again(tmp_path):
    """SB3's and sb3-contrib's algorithms take no None for these, so they are not in the file."""
    for algorithm, names in ((AdaptiveKLPPO, ("clip_range", "target_kl")), (TRPO, ("target_kl", "cg_damping"))):
        small(algorithm, "MlpPolicy", make(), **dict.fromkeys(names)).save(tmp_path / "model")
        loaded = algorithm.load(tmp_path / "model", device="cpu")
        assert [getattr(loaded, name) for name in names] == [None] * len(names)
        numbers = dict.fromkeys(names, 0.5)
        for arguments in ({"custom_objects": numbers}, numbers):
            loaded = algorithm.load(tmp_path / "model", device="cpu", **arguments)
            assert [loaded._whole_action_value(getattr(loaded, name), math.nan) for name in names] == [0.5] * len(names)
