"""Infos and observations are copies, whatever an environment does with its own afterwards."""

from __future__ import annotations

import pickle
from collections import OrderedDict
from copy import deepcopy
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

from sb3_ppo_ext import DualClipPPO
from sb3_ppo_ext.common.rollout.env_copies import copy_quickly


class OneInfo(gym.Env[np.ndarray, np.ndarray]):
    """Writes each step's info into the same objects."""

    observation_space = spaces.Box(-1.0, 1.0, (2,))
    action_space = spaces.Box(-1.0, 1.0, (1,))

    def __init__(self) -> None:
        self._n = 0
        self._counts = np.zeros(2)
        self._info: dict[str, Any] = {"counts": self._counts, "nested": {"n": 0}, "list": [0]}

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        return np.zeros(2, np.float32), {}

    def step(self, action: np.ndarray) -> Any:
        self._n += 1
        self._counts += 1.0
        self._info["nested"]["n"] = self._info["list"][0] = self._info["n"] = self._n
        return np.zeros(2, np.float32), 0.0, self._n % 3 == 0, False, self._info


class _Keep(BaseCallback):
    def __init__(self) -> None:
        super().__init__()
        self.kept: list[dict[str, Any]] = []

    def _on_step(self) -> bool:
        self.kept.append(self.locals["infos"][0])
        return True


@pytest.mark.parametrize("wrap", [lambda env: env, VecNormalize])
def test_callbacks_get_copies(wrap: Any) -> None:
    callback = _Keep()
    model = DualClipPPO("MlpPolicy", wrap(DummyVecEnv([OneInfo])), n_steps=4, batch_size=4, n_epochs=1)
    model.learn(8, callback)

    assert [info["n"] for info in callback.kept] == list(range(1, 9))
    assert [info["nested"]["n"] for info in callback.kept] == list(range(1, 9))
    assert [info["list"] for info in callback.kept] == [[n] for n in range(1, 9)]
    assert [info["counts"].tolist() for info in callback.kept] == [[n, n] for n in range(1, 9)]


def test_copies_are_those_of_deepcopy() -> None:
    class Own(dict[str, Any]):
        pass

    shared = [1, 2]
    infos = [
        {"float": 1.5, "scalar": np.float32(2.0), "array": np.arange(3), "none": None, "shared": shared},
        Own(own=shared, tuple=(1, [2])),
        OrderedDict(a=1),
    ]
    env = DummyVecEnv([OneInfo] * 3)
    env.buf_infos = list(infos)
    copy_quickly(env)
    quick, slow = deepcopy(env.buf_infos), deepcopy(infos)

    assert type(quick) is list
    assert repr(quick) == repr(slow)
    assert [type(info) for info in quick] == [type(info) for info in slow]
    assert quick[0]["shared"] is quick[1]["own"]
    assert quick[0]["shared"] is not shared
    assert not np.shares_memory(quick[0]["array"], infos[0]["array"])


@pytest.mark.parametrize(
    "space",
    [
        spaces.Box(-1.0, 1.0, (2,)),
        spaces.Dict({"b": spaces.Box(-1.0, 1.0, (2,)), "a": spaces.Discrete(3)}),
        spaces.Tuple((spaces.Box(-1.0, 1.0, (2,)), spaces.MultiBinary(2))),
    ],
    ids=lambda space: type(space).__name__,
)
def test_observations_are_those_of_deepcopy(space: spaces.Space[Any]) -> None:
    class Drawn(OneInfo):
        observation_space = space  # type: ignore[assignment]

        def reset(self, **kwargs: Any) -> Any:
            return self.observation_space.sample(), {}

        def step(self, action: np.ndarray) -> Any:
            return self.observation_space.sample(), 0.0, False, False, {}

    def observations(quick: bool) -> list[Any]:
        space.seed(0)
        env = DummyVecEnv([Drawn] * 2)
        if quick:
            copy_quickly(env)
            assert type(env.buf_obs) is not OrderedDict
        return [env.reset(), *(env.step(np.zeros((2, 1)))[0] for _ in range(3))]

    quick, slow = observations(True), observations(False)
    assert repr(quick) == repr(slow)
    assert type(quick[0]) is type(slow[0])


def test_a_pickle_of_the_environments_needs_nothing_of_this_package() -> None:
    env = DummyVecEnv([OneInfo])
    copy_quickly(env)
    assert type(env.buf_infos) is not list
    assert type(env.buf_obs) is not OrderedDict
    loaded = pickle.loads(pickle.dumps(env))
    assert type(loaded.buf_infos) is list
    assert type(loaded.buf_obs) is OrderedDict
    assert repr(loaded.buf_obs) == repr(OrderedDict(env.buf_obs))


def test_what_is_no_list_of_the_vectors_own_stays_as_it_is() -> None:
    env = DummyVecEnv([OneInfo])
    env.buf_infos = own = type("Own", (list,), {})([{}])
    env.buf_obs = objects = OrderedDict([("x", np.array([[[1], [2]]], dtype=object))])
    copy_quickly(env)
    assert env.buf_infos is own
    assert env.buf_obs is objects
