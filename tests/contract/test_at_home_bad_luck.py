"""Environments that break in the middle of a rollout: a clear error, and a model that is as it was and trains on."""

from __future__ import annotations

import os
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv

from sb3_ppo_ext import TRPO
from sb3_ppo_ext.common.optimization import NonFiniteError
from tests.algorithms import ALGORITHMS, ROLLOUT, parameters, small
from tests.envs import BOX, ScriptedEnv

BOX_ACTIONS = spaces.Box(-1.0, 1.0, (2,), np.float32)
DICT = spaces.Dict({"good": BOX, "bad": BOX, "choice": spaces.Discrete(2)})


class Breaks(ScriptedEnv):
    """
    Does one thing wrong, once.

    :param mishap: what
    :param at: in which step after it was set; 0: never
    """

    def __init__(self, obs_space: Any, action_space: Any, mishap: str, at: int = 0) -> None:
        super().__init__(obs_space, action_space, script=((5, True, False),))
        self.mishap = mishap
        self.countdown = at

    def step(self, action: Any) -> Any:
        obs, reward, terminated, truncated, info = super().step(action)
        self.countdown -= 1
        if self.countdown == 0:
            if self.mishap == "raises":
                raise OSError("the simulator crashed")
            if self.mishap == "dies":
                sys.stderr.close()
                os._exit(3)
            if self.mishap == "shape":
                return np.zeros(7, np.float32), reward, terminated, truncated, info
            number = float(self.mishap)
            if isinstance(obs, dict):
                obs["bad"] = np.full_like(obs["bad"], number)
            else:
                obs = np.full_like(obs, number)
        return obs, reward, terminated, truncated, info


def fails(model: Any, error: type[Exception], message: str) -> None:
    """It fails so, and goes on from where it was when that rollout began, with and without a new count of the steps."""
    before = parameters(model)
    updates = model._n_updates
    with pytest.raises(error, match=message):
        model.learn(4 * ROLLOUT, reset_num_timesteps=False)
    assert model._n_updates == updates
    assert all(map(th.equal, parameters(model), before))
    trains_on(model)


def trains_on(model: Any) -> None:
    for reset_num_timesteps in (False, True):
        before = parameters(model)
        model.learn(2 * ROLLOUT, reset_num_timesteps=reset_num_timesteps)
        assert not all(map(th.equal, parameters(model), before))
        assert all(p.isfinite().all() for p in model.policy.parameters())


def breaking(algorithm: Any, obs_space: Any, action_space: Any, mishap: str, at: int = 3, **kwargs: Any) -> Any:
    """A model whose second environment is about to break."""
    env = DummyVecEnv([partial(Breaks, obs_space, action_space, mishap)] * 2)
    policy = "MultiInputPolicy" if isinstance(obs_space, spaces.Dict) else "MlpPolicy"
    model = small(algorithm, policy, env, learning_rate=1e-2, **kwargs).learn(2 * ROLLOUT)
    env.envs[1].countdown = at
    return model


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("action_space", [BOX_ACTIONS, spaces.Discrete(3), spaces.MultiBinary(2)])
@pytest.mark.parametrize("number", ["nan", "inf", "-inf"])
def test_an_observation_that_is_not_finite(algorithm: Any, action_space: Any, number: str) -> None:
    model = breaking(algorithm, BOX, action_space, number)
    fails(model, NonFiniteError, r"Observations are not finite, first in .*environment 1")


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_part_of_a_dict_that_is_not_finite(algorithm: Any) -> None:
    fails(breaking(algorithm, DICT, BOX_ACTIONS, "nan"), NonFiniteError, "first of 'bad' in step 3, environment 1")


@pytest.mark.parametrize("algorithm", [a for a in ALGORITHMS if a.__name__ != "REINFORCE"])  # has no last values
def test_the_last_observation_is_not_finite(algorithm: Any) -> None:
    model = breaking(algorithm, BOX, BOX_ACTIONS, "nan", at=ROLLOUT)
    model.env.envs[1]._script = ((1000, True, False),)
    model._last_obs = None  # a new episode, which does not end in the last step
    fails(model, NonFiniteError, "first in environment 1")


class Forgives(th.nn.Module):
    def forward(self, x: th.Tensor) -> th.Tensor:
        return x.nan_to_num(0.0, 1.0, -1.0).tanh()


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_policy_that_can_do_with_it_may(algorithm: Any) -> None:
    """Some mark what is missing by NaN. Only what the policy makes of it counts."""
    model = breaking(algorithm, BOX, BOX_ACTIONS, "nan")
    extractor = model.policy.features_extractor
    forgiving = th.nn.Sequential(extractor, Forgives())
    model.policy.pi_features_extractor = model.policy.vf_features_extractor = forgiving
    model.policy.features_extractor = forgiving
    model.learn(4 * ROLLOUT, reset_num_timesteps=False)
    assert model.env.envs[1].countdown < 0  # it has happened


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_an_environment_that_raises(algorithm: Any) -> None:
    fails(breaking(algorithm, BOX, BOX_ACTIONS, "raises"), OSError, "the simulator crashed")


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_an_observation_of_the_wrong_shape(algorithm: Any) -> None:
    """SB3's vector of environments refuses it. (It takes one that numpy can broadcast, such as (1,) for (4,).)"""
    fails(breaking(algorithm, BOX, BOX_ACTIONS, "shape"), ValueError, r"shape \(7,\) into shape \(4,\)")


def test_a_reward_that_is_not_a_number_of_any_kind() -> None:
    class NoReward(ScriptedEnv):
        def step(self, action: Any) -> Any:
            obs, _, *rest = super().step(action)
            return (obs, None, *rest)

    with pytest.raises(TypeError, match="NoneType"):
        small(TRPO, "MlpPolicy", NoReward(BOX, BOX_ACTIONS)).learn(ROLLOUT)


@pytest.mark.parametrize("algorithm", [ALGORITHMS[0], ALGORITHMS[3]])  # the two ways to collect; it takes a second
def test_a_worker_process_that_dies(algorithm: Any, tmp_path: Path) -> None:
    makers = [partial(Breaks, BOX, BOX_ACTIONS, "dies", at) for at in (0, 40)]
    env = SubprocVecEnv(makers)
    model = small(algorithm, "MlpPolicy", env, learning_rate=1e-2)
    model.save(tmp_path / "before")
    with pytest.raises(RuntimeError, match=r"Worker processes .* have ended: number 1 \(exit code 3\)") as error:
        model.learn(20 * ROLLOUT)
    assert isinstance(error.value.__cause__, (EOFError, ConnectionError))
    assert all(p.isfinite().all() for p in model.policy.parameters())
    for process in env.processes:
        process.terminate()  # SB3's close() waits for an answer of the one that is no more
    model.set_env(DummyVecEnv([partial(Breaks, BOX, BOX_ACTIONS, "nothing")] * 2))
    trains_on(model)
