"""A training is not resumed in environments that are wrapped otherwise, and goes on in those wrapped the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces
from gymnasium.wrappers import FrameStackObservation, NormalizeObservation, NormalizeReward, TimeLimit
from stable_baselines3.common.vec_env import (
    DummyVecEnv,
    SubprocVecEnv,
    VecCheckNan,
    VecEnv,
    VecExtractDictObs,
    VecFrameStack,
    VecMonitor,
    VecNormalize,
    VecTransposeImage,
)

from sb3_ppo_ext import DualClipPPO
from sb3_ppo_ext.common.saving.checkpoint import load_vec_normalize, resume, save_checkpoint
from tests.contract.test_resume import bits
from tests.envs import ScriptedEnv, SeededWalk, limited_walk

FILES = Path(__file__).parent / "files"
DICT = spaces.Dict({"a": spaces.Box(-1.0, 1.0, (2,)), "b": spaces.Box(-1.0, 1.0, (2,))})
IMAGES = spaces.Box(0, 255, (36, 36, 3), np.uint8)
ACTIONS = spaces.Discrete(2)


def walks(n_envs: int = 1) -> VecEnv:
    return DummyVecEnv([limited_walk] * n_envs)


def dicts() -> VecEnv:
    return DummyVecEnv([lambda: ScriptedEnv(DICT, ACTIONS)])


def images() -> VecEnv:
    return DummyVecEnv([lambda: ScriptedEnv(IMAGES, ACTIONS)])


def squares() -> VecEnv:
    """Whose frames have one shape, in whatever order they are stacked by."""
    return DummyVecEnv([lambda: ScriptedEnv(spaces.Box(-1.0, 1.0, (2,)), ACTIONS)])


def trained(env: VecEnv | gym.Env[Any, Any], policy: str = "MlpPolicy") -> DualClipPPO:
    return DualClipPPO(
        policy, env, n_steps=16, batch_size=16, n_epochs=1, policy_kwargs={"net_arch": [4]}, seed=3, device="cpu"
    ).learn(16)


NORMALIZE: dict[str, tuple[Any, Any]] = {
    "training": (False, True),
    "norm_obs": (True, False),
    "norm_reward": (False, True),
    "clip_obs": (2.0, 10.0),
    "clip_reward": (5.0, 10.0),
    "gamma": (0.9, 0.99),
    "epsilon": (1e-4, 1e-8),
}


@pytest.mark.parametrize("name", NORMALIZE)
def test_another_setting_of_vec_normalize_is_refused_by_name(name, tmp_path):
    of_training, other = NORMALIZE[name]
    save_checkpoint(trained(VecNormalize(walks(), **{name: of_training})), tmp_path / "a.zip")
    expected = rf"a.zip cannot.*{name} of VecNormalize was {of_training!r} in the training, and is {other!r} here"
    with pytest.raises(ValueError, match=expected):
        resume(DualClipPPO, tmp_path / "a.zip", VecNormalize(walks(), **{name: other}), device="cpu")
    resumed = resume(DualClipPPO, tmp_path / "a.zip", VecNormalize(walks(), **{name: of_training}), device="cpu")
    assert getattr(resumed.get_vec_normalize_env(), name) == of_training


def test_all_differences_are_named(tmp_path):
    save_checkpoint(trained(VecNormalize(walks(), clip_obs=2.0)), tmp_path / "a.zip")
    with pytest.raises(ValueError, match=r"norm_obs .*True.*False.*; clip_obs .*2.0.*10.0"):
        resume(DualClipPPO, tmp_path / "a.zip", VecNormalize(walks(), norm_obs=False), device="cpu")


@pytest.mark.parametrize(
    ("of_training", "other", "said"),
    [
        (
            lambda: VecNormalize(dicts(), norm_obs_keys=["a"]),
            lambda: VecNormalize(dicts()),
            r"norm_obs_keys of VecNormalize was \['a'\] in the training, and is \['a', 'b'\]",
        ),
        (
            lambda: VecFrameStack(squares(), 3),
            lambda: VecFrameStack(squares(), 2),
            "n_stack of VecFrameStack was 3 in the training, and is 2",
        ),
        (
            lambda: VecFrameStack(squares(), 2, channels_order="first"),
            lambda: VecFrameStack(squares(), 2, channels_order="last"),
            "channels_order of VecFrameStack was 'first' in the training, and is 'last'",
        ),
        (
            lambda: VecFrameStack(dicts(), 2, channels_order={"a": "first", "b": "last"}),
            lambda: VecFrameStack(dicts(), 2),
            "channels_order of VecFrameStack was {'a': 'first', 'b': 'last'} in the training",
        ),
        (
            lambda: VecExtractDictObs(dicts(), "a"),
            lambda: VecExtractDictObs(dicts(), "b"),
            "key of VecExtractDictObs was 'a' in the training, and is 'b'",
        ),
        (
            lambda: VecNormalize(VecFrameStack(walks(), 2)),
            lambda: VecFrameStack(VecNormalize(walks()), 2),
            r"\['VecNormalize', 'VecFrameStack'\] in the training, and are \['VecFrameStack', 'VecNormalize'\] here",
        ),
        (lambda: VecMonitor(walks()), walks, r"were \['VecMonitor'\] in the training, and are \[\] here"),
        (
            lambda: VecExtractDictObs(dicts(), "a"),
            squares,
            r"wrappers were \['VecExtractDictObs'\] in the training, outermost first, and are \[\] here",
        ),
        (lambda: walks(2), walks, r"trained in 2 environments, and here are 1\. To resume, give it 2 environments\."),
    ],
    ids=["keys", "n_stack", "order", "order-dict", "key", "swapped", "monitor", "extract", "n_envs"],
)
def test_other_wrappers_are_refused_by_name(of_training, other, said, tmp_path):
    env = of_training()
    policy = "MultiInputPolicy" if isinstance(env.observation_space, spaces.Dict) else "MlpPolicy"
    save_checkpoint(trained(env, policy), tmp_path / "a.zip")
    with pytest.raises(ValueError, match=f"a.zip cannot be resumed with this environment: .*{said}"):
        resume(DualClipPPO, tmp_path / "a.zip", other(), device="cpu")
    resume(DualClipPPO, tmp_path / "a.zip", of_training(), device="cpu").learn(16, reset_num_timesteps=False)


def test_the_advice_for_another_number_of_environments_keeps_the_statistics(tmp_path):
    model = trained(VecNormalize(walks(2)))
    save_checkpoint(model, tmp_path / "a.zip")
    with pytest.raises(
        ValueError, match=r"env = load_vec_normalize\(path, env\) if .* DualClipPPO.load\(path, env=env\)"
    ):
        resume(DualClipPPO, tmp_path / "a.zip", VecNormalize(walks(3)), device="cpu")
    env = load_vec_normalize(tmp_path / "a.zip", walks(3))
    assert env is not None
    np.testing.assert_array_equal(env.obs_rms.mean, model.get_env().obs_rms.mean)
    loaded = DualClipPPO.load(tmp_path / "a.zip", env=env, device="cpu")
    assert loaded.learn(24, reset_num_timesteps=False).n_envs == 3


def test_who_only_looks_on_may_come_and_go(tmp_path):
    save_checkpoint(trained(VecCheckNan(VecNormalize(walks()))), tmp_path / "a.zip")
    for env in (VecNormalize(walks()), VecNormalize(VecCheckNan(walks()))):
        assert resume(DualClipPPO, tmp_path / "a.zip", env, device="cpu").num_timesteps == 16


def test_the_wrapper_that_sb3_adds_is_no_difference(tmp_path):
    save_checkpoint(trained(images(), "CnnPolicy"), tmp_path / "a.zip")
    for env in (images(), VecTransposeImage(images())):
        assert resume(DualClipPPO, tmp_path / "a.zip", env, device="cpu").num_timesteps == 16


# Wrappers inside the environments.


def normalised() -> gym.Env[Any, Any]:
    env: Any = TimeLimit(SeededWalk(), max_episode_steps=11)
    return NormalizeReward(FrameStackObservation(NormalizeObservation(env), 2), gamma=0.9)


def remembered(model: DualClipPPO) -> list[Any]:
    env = model.get_env()
    assert env is not None
    statistics = [vars(of_one) for name in ("obs_rms", "return_rms") for of_one in env.get_attr(name)]
    return bits([statistics, env.get_attr("discounted_reward"), model.policy.state_dict()])


@pytest.mark.parametrize("in_workers", [False, True])
def test_what_gymnasiums_wrappers_remember_is_put_back(in_workers, tmp_path):
    env: VecEnv = SubprocVecEnv([normalised]) if in_workers else DummyVecEnv([normalised] * 2)
    try:
        model = trained(env)
        save_checkpoint(model, tmp_path / "a.zip")
        at_checkpoint = remembered(model)
        uninterrupted = remembered(model.learn(64, reset_num_timesteps=False))
        resumed = resume(
            DualClipPPO, tmp_path / "a.zip", env if in_workers else DummyVecEnv([normalised] * 2), device="cpu"
        )
        assert remembered(resumed) == at_checkpoint
        assert remembered(resumed.learn(64, reset_num_timesteps=False)) == uninterrupted
    finally:
        env.close()


def test_statistics_of_environments_that_give_no_state_are_put_back(tmp_path):
    """As those of ``VecNormalize`` are: the episode begins anew, the statistics do not."""

    def make() -> gym.Env[Any, Any]:
        return NormalizeObservation(gym.make("CartPole-v1"))

    model = trained(make())
    save_checkpoint(model, tmp_path / "a.zip")
    statistics = model.get_env().get_attr("obs_rms")[0]
    resumed = resume(DualClipPPO, tmp_path / "a.zip", make(), device="cpu").get_env().get_attr("obs_rms")[0]
    assert resumed.count == statistics.count > 16
    np.testing.assert_array_equal(resumed.mean, statistics.mean)
    with pytest.raises(ValueError, match=r"the checkpoint has obs_rms of the environments.*a wrapper is missing"):
        resume(DualClipPPO, tmp_path / "a.zip", gym.make("CartPole-v1"), device="cpu")
    save_checkpoint(trained(gym.make("CartPole-v1")), tmp_path / "b.zip")
    with pytest.raises(ValueError, match=r"these environments.* obs_rms, and those of the training had none"):
        resume(DualClipPPO, tmp_path / "b.zip", make(), device="cpu")


# Checkpoints of the time before the settings were written.


def test_an_old_checkpoint_is_resumed():
    def make(**settings: Any) -> VecEnv:
        return VecNormalize(DummyVecEnv([lambda: gym.make("Pendulum-v1")]), **settings)

    model = resume(DualClipPPO, FILES / "checkpoint.zip", make(clip_obs=5.0), device="cpu")
    assert model.get_vec_normalize_env().obs_rms.count > 8
    assert model.learn(8, reset_num_timesteps=False).num_timesteps == 16
    with pytest.raises(ValueError, match=r"were \['VecNormalize'\] in the training, and are \[\] here"):
        resume(DualClipPPO, FILES / "checkpoint.zip", gym.make("Pendulum-v1"), device="cpu")
    inside = VecNormalize(DummyVecEnv([lambda: NormalizeReward(gym.make("Pendulum-v1"))]), clip_obs=5.0)
    with pytest.warns(
        UserWarning, match=r"does not contain the state of a wrapper.*return_rms, discounted_reward.*start again"
    ):
        resume(DualClipPPO, FILES / "checkpoint.zip", inside, device="cpu")
