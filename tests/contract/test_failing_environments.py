"""Environments that break in the middle of a rollout: a clear error, and a model that is as it was and trains on."""

from __future__ import annotations

import os
import sys
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecEnvWrapper, subproc_vec_env

from sb3_ppo_ext import REINFORCE, TRPO, DualClipPPO
from sb3_ppo_ext.common.errors import NonFiniteError
from tests.algorithms import ALGORITHMS, ROLLOUT, STEP_BASED, have_moved, parameters, small
from tests.custom import EveryStepBuffer, OverridesForward
from tests.envs import BOX, BOX_ACTIONS, ScriptedEnv
from tests.pairwise import pairwise

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
            if self.mishap.startswith("reward "):
                return obs, float(self.mishap.removeprefix("reward ")), terminated, truncated, info
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
        assert have_moved(model, before)


def breaking(algorithm: Any, obs_space: Any, action_space: Any, mishap: str, at: int = 3, **kwargs: Any) -> Any:
    """A model whose second environment is about to break."""
    env = DummyVecEnv([partial(Breaks, obs_space, action_space, mishap)] * 2)
    policy = "MultiInputPolicy" if isinstance(obs_space, spaces.Dict) else "MlpPolicy"
    policy = kwargs.pop("policy_class", policy)
    model = small(algorithm, policy, env, learning_rate=1e-2, **kwargs).learn(2 * ROLLOUT)
    env.envs[1].countdown = at
    return model


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.parametrize(
    ("algorithm", "action_space", "number"),
    pairwise(ALGORITHMS, [BOX_ACTIONS, spaces.Discrete(3), spaces.MultiBinary(2)], ["nan", "inf", "-inf"]),
)
def test_an_observation_that_is_not_finite(algorithm: Any, action_space: Any, number: str) -> None:
    model = breaking(algorithm, BOX, action_space, number)
    fails(model, NonFiniteError, r"Observations are not finite, first in .*environment 1")


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_part_of_a_dict_that_is_not_finite(algorithm: Any) -> None:
    fails(breaking(algorithm, DICT, BOX_ACTIONS, "nan"), NonFiniteError, "first of 'bad' in step 3, environment 1")


@pytest.mark.parametrize("algorithm", STEP_BASED)  # REINFORCE needs no last values
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


# How a rollout may come about
WAYS: dict[str, dict[str, Any]] = {
    "direct": {},
    "own policy": {"policy_class": OverridesForward},
    "own buffer": {"rollout_buffer_class": EveryStepBuffer},
}
ALGORITHMS_AND_WAYS = [
    (algorithm, way) for algorithm in ALGORITHMS for way in WAYS if algorithm in STEP_BASED or way != "own buffer"
]


@pytest.mark.parametrize(
    ("algorithm", "number", "way"),
    [
        *pairwise(STEP_BASED, ["nan", "inf", "-inf"], WAYS),
        *((REINFORCE, number, way) for number, way in (("nan", "direct"), ("inf", "own policy"), ("-inf", "direct"))),
    ],
)
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # SB3 computes with them first
def test_a_reward_that_is_not_finite(algorithm: Any, number: str, way: str) -> None:
    model = breaking(algorithm, BOX, BOX_ACTIONS, f"reward {number}", **WAYS[way])
    fails(model, NonFiniteError, "Rewards are not finite, first in step 2, environment 1 of the rollout")


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_both_are_named(algorithm: Any) -> None:
    """The one may be the reason for the other: whoever looks for it needs to know which came first."""
    model = breaking(algorithm, BOX, BOX_ACTIONS, "reward nan", at=6)
    model.env.envs[0].mishap, model.env.envs[0].countdown = "nan", 3
    fails(
        model,
        NonFiniteError,
        "Observations are not finite, first in step 3, environment 0; "
        "Rewards are not finite, first in step 5, environment 1 of the rollout",
    )


class BadEnd(ScriptedEnv):
    """The observation that a time limit ends the second episode with is not finite. Nothing is acted on it."""

    def step(self, action: Any) -> Any:
        obs, reward, terminated, truncated, info = super().step(action)
        return (
            np.full_like(obs, np.nan) if truncated and self._episode == 1 else obs,
            reward,
            terminated,
            truncated,
            info,
        )


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_final_observation_that_is_not_finite(algorithm: Any) -> None:
    env = DummyVecEnv([lambda: BadEnd(BOX, BOX_ACTIONS, script=((3, False, True),))])
    kwargs = {"bootstrap_timeouts": True} if algorithm is REINFORCE else {}
    model = small(algorithm, "MlpPolicy", env, learning_rate=1e-2, **kwargs)
    fails(model, NonFiniteError, "Observations are not finite, first in what an episode ended with in step 5, environ")


SHAPE = r"Environment 1 returned an observation of shape \(7,\), and its observation space is of shape \(4,\)"


@pytest.mark.parametrize(("algorithm", "way"), ALGORITHMS_AND_WAYS)
def test_an_observation_of_the_wrong_shape(algorithm: Any, way: str) -> None:
    model = breaking(algorithm, BOX, BOX_ACTIONS, "shape", **WAYS[way])
    fails(model, ValueError, SHAPE)


class Misshapen(ScriptedEnv):
    """All its observations are of another shape than its space."""

    def __init__(self, shape: tuple[int, ...], obs_space: Any = BOX) -> None:
        super().__init__(obs_space, BOX_ACTIONS)
        self.shape = shape

    def reset(self, **kwargs: Any) -> Any:
        return self._wrong(super().reset(**kwargs)[0]), {}

    def step(self, action: Any) -> Any:
        obs, *rest = super().step(action)
        return (self._wrong(obs), *rest)

    def _wrong(self, obs: Any) -> Any:
        wrong = np.zeros(self.shape, np.float32)
        return {**obs, "bad": wrong} if isinstance(obs, dict) else wrong


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_the_first_observation_is_of_the_wrong_shape(algorithm: Any) -> None:
    model = small(
        algorithm, "MlpPolicy", DummyVecEnv([partial(ScriptedEnv, BOX, BOX_ACTIONS), partial(Misshapen, (7,))])
    )
    with pytest.raises(ValueError, match=SHAPE):
        model.learn(1)
    model = small(algorithm, "MultiInputPolicy", Misshapen((7,), DICT))
    with pytest.raises(ValueError, match=r"Environment 0 returned .* of shape \(7,\) for 'bad', .* of shape \(4,\)"):
        model.learn(1)


class TakesAnything(DummyVecEnv):
    """As vectors of environments do that look at nothing, when all environments are wrong in the same way."""

    def _save_obs(self, env_idx: int, obs: Any) -> None:
        self.wrong = obs

    def _obs_from_buf(self) -> Any:
        return np.stack([self.wrong] * self.num_envs)


class StacksAsWorkersDo(DummyVecEnv):
    """Puts observations together as SubprocVecEnv does, without its processes."""

    def __init__(self, makers: Any) -> None:
        super().__init__(makers)
        self.given: list[Any] = [None] * self.num_envs

    def _save_obs(self, env_idx: int, obs: Any) -> None:
        self.given[env_idx] = obs

    def _obs_from_buf(self) -> Any:
        return subproc_vec_env._stack_obs(self.given, self.observation_space)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_the_observation_of_a_worker_is_of_the_wrong_shape(algorithm: Any) -> None:
    env = StacksAsWorkersDo([partial(ScriptedEnv, BOX, BOX_ACTIONS), partial(Misshapen, (7,))])
    with pytest.raises(ValueError, match=SHAPE):
        small(algorithm, "MlpPolicy", env).learn(1)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_all_observations_are_of_the_wrong_shape(algorithm: Any) -> None:
    model = small(algorithm, "MlpPolicy", TakesAnything([partial(Misshapen, (7,))] * 2))
    with pytest.raises(ValueError, match=r"Each environment returned .* of shape \(7,\), .* of shape \(4,\)"):
        model.learn(1)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("obs_space", [BOX, DICT], ids=["box", "dict"])
def test_an_observation_that_numpy_broadcasts(algorithm: Any, obs_space: Any) -> None:
    """
    SB3's DummyVecEnv puts one number in the place of four without a word, and nobody sees what it was given (to ask the
    environments would reset them once more and change what a seed gives) but for the final observation of an episode.
    So it is seen before the first update, unless no episode ends before that. Within a wrapper it is not looked for:
    one that changes observations may leave the final ones alone. ``gymnasium.make`` warns of it at once.
    """
    policy = "MultiInputPolicy" if isinstance(obs_space, spaces.Dict) else "MlpPolicy"
    model = small(algorithm, policy, Misshapen((1,), obs_space))
    before = parameters(model)
    with pytest.raises(ValueError, match=r"Environment 0 returned .* of shape \(1,\).* of shape \(4,\)"):
        model.learn(1)
    assert all(map(th.equal, parameters(model), before))


@pytest.mark.parametrize("shape", [(4,), (1, 4)])
def test_what_has_the_right_size_is_taken(shape: tuple[int, ...]) -> None:
    env = Misshapen(shape)
    env._script = ((3, True, False),)  # SB3 would want the value of an observation that a time limit ends with
    model = small(TRPO, "MlpPolicy", env)
    before = parameters(model)
    model.learn(ROLLOUT)
    assert model.rollout_buffer.observations.shape == (ROLLOUT, 1, 4)
    assert have_moved(model, before)


class ForgetsTheFinalOne(VecEnvWrapper):
    """Takes a part of the observations, but not of the final ones, which SB3 does not look at where nothing is cut."""

    def __init__(self, env: Any) -> None:
        super().__init__(env, observation_space=spaces.Box(-1.0, 1.0, (2,), np.float32))

    def reset(self) -> Any:
        return np.asarray(self.venv.reset())[:, :2]

    def step_wait(self) -> Any:
        obs, *rest = self.venv.step_wait()
        return (np.asarray(obs)[:, :2], *rest)


class TakesAPart(DummyVecEnv):
    """The same without a wrapper."""

    def __init__(self, makers: Any) -> None:
        super().__init__(makers)
        self.observation_space = spaces.Box(-1.0, 1.0, (2,), np.float32)

    def _obs_from_buf(self) -> Any:
        return np.asarray(super()._obs_from_buf())[:, :2]


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("vec_env", [lambda makers: ForgetsTheFinalOne(DummyVecEnv(makers)), TakesAPart])
def test_what_changes_observations_is_taken(algorithm: Any, vec_env: Any) -> None:
    env = vec_env([lambda: ScriptedEnv(BOX, BOX_ACTIONS, script=((5, True, False),))])
    model = small(algorithm, "MlpPolicy", env).learn(2 * ROLLOUT)
    assert model.rollout_buffer.observations.shape[2:] == (2,)
    assert env.get_attr("_episode")[0] >= 6  # there were final observations


def test_a_reward_that_is_not_a_number_of_any_kind() -> None:
    class NoReward(ScriptedEnv):
        def step(self, action: Any) -> Any:
            obs, _, *rest = super().step(action)
            return (obs, None, *rest)

    with pytest.raises(TypeError, match="NoneType"):
        small(TRPO, "MlpPolicy", NoReward(BOX, BOX_ACTIONS)).learn(ROLLOUT)


def test_a_worker_process_that_dies() -> None:
    makers = [partial(Breaks, BOX, BOX_ACTIONS, "dies", at) for at in (0, 40)]
    env = SubprocVecEnv(makers)
    model = small(DualClipPPO, "MlpPolicy", env, learning_rate=1e-2)
    with pytest.raises(RuntimeError, match=r"Worker processes .* have ended: number 1 \(exit code 3\)") as error:
        model.learn(20 * ROLLOUT)
    assert isinstance(error.value.__cause__, (EOFError, ConnectionError))
    assert all(p.isfinite().all() for p in model.policy.parameters())
    for process in env.processes:
        process.terminate()  # SB3's close() waits for an answer of the one that is no more
    model.set_env(DummyVecEnv([partial(Breaks, BOX, BOX_ACTIONS, "nothing")] * 2))
    trains_on(model)
