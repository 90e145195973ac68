"""Every kind of environment that SB3's PPO takes."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3 import PPO
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import (
    DummyVecEnv,
    SubprocVecEnv,
    VecCheckNan,
    VecEnv,
    VecFrameStack,
    VecMonitor,
    VecNormalize,
    VecTransposeImage,
)

from tests.algorithms import ALGORITHMS, PROXIMAL, ROLLOUT, assert_same_policy, have_moved, parameters, small
from tests.envs import BOX, IMAGE, ScriptedEnv

LAST = spaces.Box(0, 255, (36, 36, 3), np.uint8)
TINY_CNN = {"features_extractor_kwargs": {"features_dim": 8}}


def scripted() -> gym.Env[Any, Any]:
    return ScriptedEnv(BOX, spaces.Discrete(3))


def images() -> gym.Env[Any, Any]:
    return ScriptedEnv(LAST, spaces.Discrete(3))


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_every_way_to_give_one_environment(algorithm: Any) -> None:
    """They are the same environment, so the same seed gives the same parameters."""
    ways = [
        "CartPole-v1",
        gym.make("CartPole-v1"),
        Monitor(gym.make("CartPole-v1")),
        DummyVecEnv([lambda: gym.make("CartPole-v1")]),
        VecMonitor(DummyVecEnv([lambda: gym.make("CartPole-v1")])),
        make_vec_env("CartPole-v1", n_envs=1),
        VecCheckNan(make_vec_env("CartPole-v1", n_envs=1)),
    ]
    models = [small(algorithm, "MlpPolicy", env).learn(2 * ROLLOUT) for env in ways]
    for model in models[1:]:
        assert isinstance(model.env, VecEnv)
        assert_same_policy(model, models[0])
    assert have_moved(models[0], parameters(small(algorithm, "MlpPolicy", "CartPole-v1")))


def of_one_length() -> gym.Env[Any, Any]:
    """All episodes are alike, so that it does not matter how many another model has run."""
    return ScriptedEnv(BOX, spaces.Discrete(3), script=((3, False, True),))


@pytest.fixture(scope="module")
def workers() -> Iterator[SubprocVecEnv]:
    """Started once: a worker takes a second."""
    env = SubprocVecEnv([of_one_length, of_one_length])
    yield env
    env.close()


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_worker_processes_give_what_one_process_gives(algorithm: Any, workers: SubprocVecEnv) -> None:
    one, other = (
        small(algorithm, "MlpPolicy", VecMonitor(env)).learn(2 * ROLLOUT)
        for env in (DummyVecEnv([of_one_length, of_one_length]), workers)
    )
    assert_same_policy(one, other)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_what_is_learnt_from_is_normalised(algorithm: Any) -> None:
    env = VecNormalize(DummyVecEnv([scripted, scripted]), gamma=0.99)
    model = small(algorithm, "MlpPolicy", env).learn(4 * ROLLOUT)
    assert model.get_vec_normalize_env() is env
    assert env.obs_rms.count > 4 * ROLLOUT
    assert env.ret_rms.count > 4 * ROLLOUT
    # What is learnt from is what the wrapper gave: the observations of a uniform distribution, at unit variance.
    assert np.std(model.rollout_buffer.observations) == pytest.approx(1.0, abs=0.2)
    assert np.std(model.get_vec_normalize_env().get_original_obs()) < 1.0


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize(("dtype", "in_dict"), [(np.int32, False), (np.int32, True), (np.float16, False)])
def test_normalised_numbers_are_learnt_from_as_they_were_acted_on(algorithm: Any, dtype: Any, in_dict: bool) -> None:
    """VecNormalize makes float32 of them and leaves the space as it was; SB3 puts them back into its dtype."""
    numbers = spaces.Box(-5, 5, (3,), dtype)
    space = spaces.Dict({"numbers": numbers}) if in_dict else numbers
    env = VecNormalize(DummyVecEnv([partial(ScriptedEnv, space, spaces.Discrete(3))] * 2))
    acted_on: list[Any] = []

    def watch(local_variables: dict[str, Any], _: Any) -> bool:
        acted_on.append(local_variables["obs_tensor"])
        return True

    model = small(algorithm, "MultiInputPolicy" if in_dict else "MlpPolicy", env)
    model.train = lambda: None
    model.learn(1, callback=watch)
    learnt_from = model.rollout_buffer.observations
    if in_dict:
        acted_on, learnt_from = [obs["numbers"] for obs in acted_on], learnt_from["numbers"]
    assert np.array_equal(learnt_from, th.stack(acted_on).numpy())


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("wrap", [lambda env: env, VecTransposeImage], ids=["as_is", "transposed_already"])
def test_images_are_transposed_once(algorithm: Any, wrap: Any) -> None:
    model = small(algorithm, "CnnPolicy", wrap(DummyVecEnv([images])), policy_kwargs=TINY_CNN).learn(ROLLOUT)
    assert isinstance(model.env, VecTransposeImage)
    assert not isinstance(model.env.venv, VecTransposeImage)
    assert model.observation_space.shape == (3, 36, 36)
    assert model.rollout_buffer.observations.shape[2:] == (3, 36, 36)
    action, _ = model.predict(LAST.sample())  # as PPO, in either order of the axes
    assert model.action_space.contains(int(action))


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("policy", ["MlpPolicy", "CnnPolicy"])
def test_stacked_frames_are_learnt_from(algorithm: Any, policy: str) -> None:
    make, kwargs, shape = (scripted, {}, (12,)) if policy == "MlpPolicy" else (images, TINY_CNN, (9, 36, 36))
    env = VecFrameStack(DummyVecEnv([make, make]), n_stack=3)
    model = small(algorithm, policy, env, policy_kwargs=kwargs).learn(2 * ROLLOUT)
    assert model.rollout_buffer.obs_shape == shape


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_wrappers_may_be_stacked(algorithm: Any) -> None:
    env: VecEnv = VecMonitor(DummyVecEnv([images, images, images]))
    env = VecNormalize(VecFrameStack(env, n_stack=2), norm_obs=False)
    model = small(algorithm, "CnnPolicy", env, policy_kwargs=TINY_CNN).learn(3 * ROLLOUT)
    assert len(model.ep_info_buffer) > 0
    assert model.rollout_buffer.observations.shape[1:] == (3, 6, 36, 36)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_the_monitor_sees_episodes(algorithm: Any) -> None:
    """A plain environment is wrapped in a Monitor, once."""
    model = small(algorithm, "MlpPolicy", scripted()).learn(ROLLOUT)
    assert {info["l"] for info in model.ep_info_buffer} == {2, 3, 4}
    inner = model.env.envs[0]
    assert isinstance(inner, Monitor)
    assert isinstance(inner.env, ScriptedEnv)
    wrapped = small(algorithm, "MlpPolicy", Monitor(scripted()))
    assert isinstance(wrapped.env.envs[0].env, ScriptedEnv)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_another_environment_is_used_after_set_env(algorithm: Any) -> None:
    model = small(algorithm, "MlpPolicy", DummyVecEnv([scripted, scripted])).learn(2 * ROLLOUT)
    other = DummyVecEnv([scripted, scripted])
    model.set_env(other)
    model.learn(2 * ROLLOUT, reset_num_timesteps=False)
    assert other.envs[0]._episode > 0  # it was used
    assert model.num_timesteps >= 4 * ROLLOUT


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_set_env_refuses_what_sb3_refuses(algorithm: Any) -> None:
    """An environment of another space, or another number of environments, by SB3's own errors."""
    theirs = PPO("MlpPolicy", DummyVecEnv([scripted, scripted]), n_steps=ROLLOUT, batch_size=8, device="cpu")
    ours = small(algorithm, "MlpPolicy", DummyVecEnv([scripted, scripted]))
    for wrong in (
        DummyVecEnv([scripted]),
        DummyVecEnv([scripted] * 3),
        DummyVecEnv([lambda: ScriptedEnv(IMAGE, spaces.Discrete(3))] * 2),
        DummyVecEnv([lambda: ScriptedEnv(BOX, spaces.Discrete(2))] * 2),
    ):
        errors = []
        for model in (theirs, ours):
            with pytest.raises((AssertionError, ValueError)) as error:
                model.set_env(wrong)
            errors.append((error.type, str(error.value).replace(type(model).__name__, "PPO")))
        assert errors[0] == errors[1]
    ours.learn(2 * ROLLOUT)  # with the environment it had


@pytest.mark.parametrize("algorithm", PROXIMAL)
def test_a_loaded_model_takes_another_number_of_environments(algorithm: Any, tmp_path: Any) -> None:
    """As in SB3: ``load`` with an environment builds the buffer anew."""
    small(algorithm, "MlpPolicy", DummyVecEnv([scripted, scripted])).save(tmp_path / "model")
    model = algorithm.load(tmp_path / "model", env=DummyVecEnv([scripted] * 3), device="cpu")
    model.learn(3 * ROLLOUT)
    assert model.rollout_buffer.actions.shape[1] == 3
