"""Every observation space that SB3 accepts, with every action space."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env

from sb3_ppo_ext import TRPO
from tests.algorithms import ALGORITHMS, parameters, small
from tests.envs import BOX, DICT, IMAGE, ScriptedEnv
from tests.pairwise import pairwise

OBSERVATIONS: dict[str, spaces.Space[Any]] = {
    "box": BOX,
    "matrix": spaces.Box(-1.0, 1.0, (2, 3), np.float64),
    "image": IMAGE,
    "image_channels_last": spaces.Box(0, 255, (36, 40, 3), np.uint8),
    "discrete": spaces.Discrete(5),
    "multi_discrete": spaces.MultiDiscrete([3, 2]),
    "multi_binary": spaces.MultiBinary(4),
    "dict": spaces.Dict(
        {**DICT.spaces, "choices": spaces.MultiDiscrete([2, 4]), "bits": spaces.MultiBinary(3), "last": BOX}
    ),
}
ACTIONS: dict[str, spaces.Space[Any]] = {
    "box": spaces.Box(-1.0, 1.0, (2,), np.float32),
    "box_of_one": spaces.Box(-2.0, 3.0, (1,), np.float32),
    "box_matrix": spaces.Box(-1.0, 1.0, (2, 3), np.float32),
    "discrete": spaces.Discrete(3),
    "discrete_of_one": spaces.Discrete(1),
    "multi_discrete": spaces.MultiDiscrete([3, 1, 2]),
    "multi_binary": spaces.MultiBinary(3),
    "multi_binary_of_one": spaces.MultiBinary(1),
}
POLICY = {"dict": "MultiInputPolicy", "image": "CnnPolicy", "image_channels_last": "CnnPolicy"}
EXTRACTOR: dict[str, dict[str, Any]] = {
    "CnnPolicy": {"features_extractor_kwargs": {"features_dim": 8}},
    "MultiInputPolicy": {"features_extractor_kwargs": {"cnn_output_dim": 8}},
    "MlpPolicy": {},
}


class ComparesWithSB3(BaseCallback):
    """At the end of a rollout, the buffer must hold what SB3's methods say of its observations and actions."""

    def __init__(self) -> None:
        super().__init__()
        self.n_samples = 0

    def _on_rollout_end(self) -> None:
        samples = self.model.rollout_buffer.flat()
        actions = samples.actions
        if isinstance(self.model.action_space, spaces.Discrete):
            actions = actions.long().flatten()
        with th.no_grad():
            values, log_prob, _ = self.model.policy.evaluate_actions(samples.observations, actions)
        th.testing.assert_close(samples.old_values, values.flatten(), atol=1e-5, rtol=1e-5)
        th.testing.assert_close(samples.old_log_prob, log_prob, atol=1e-5, rtol=1e-5)
        self.n_samples += len(log_prob)

    def _on_step(self) -> bool:
        return all(
            self.model.action_space.contains(action.astype(self.model.action_space.dtype).reshape(self.shape))
            for action in self.locals["clipped_actions"]
        )

    @property
    def shape(self) -> tuple[int, ...]:
        return self.model.action_space.shape or ()


def check_trains(algorithm: Any, observation: str, action: str, **kwargs: Any) -> None:
    policy = POLICY.get(observation, "MlpPolicy")
    env = make_vec_env(lambda: ScriptedEnv(OBSERVATIONS[observation], ACTIONS[action]), n_envs=2)
    model = small(algorithm, policy, env, learning_rate=1e-2, policy_kwargs=EXTRACTOR[policy], **kwargs)
    before = parameters(model)
    callback = ComparesWithSB3()
    with warnings.catch_warnings():
        if algorithm is TRPO and action == "discrete_of_one":  # where there is nothing to choose, it says so
            warnings.filterwarnings("ignore", "TRPO left the policy as it was in this update: zero_gradient")
        model.learn(32, callback=callback)
    assert callback.n_samples > 0
    assert model.num_timesteps >= 32  # the callback did not end it: all actions were of the space
    after = dict(model.policy.named_parameters())
    assert all(p.isfinite().all() for p in after.values())
    moved = {name for (name, p), q in zip(after.items(), before, strict=True) if not th.equal(p, q)}
    assert "value_net.weight" in moved
    assert ("action_net.weight" in moved) == (action != "discrete_of_one")
    obs = model.env.reset()
    for deterministic in (True, False):
        actions, _ = model.predict(obs, deterministic=deterministic)
        assert actions.shape == (2, *model.action_space.shape)
        assert all(model.action_space.contains(a.astype(model.action_space.dtype)) for a in actions)
    one = model.observation_space.sample()
    assert model.action_space.contains(np.asarray(model.predict(one)[0]).astype(model.action_space.dtype))


@pytest.mark.parametrize(("observation", "action", "algorithm"), pairwise(OBSERVATIONS, ACTIONS, ALGORITHMS))
def test_every_pair_of_spaces_trains(algorithm: Any, observation: str, action: str) -> None:
    check_trains(algorithm, observation, action)


@pytest.mark.parametrize(
    ("algorithm", "observation", "action", "sde_sample_freq"),
    pairwise(ALGORITHMS, ["box", "image", "dict"], ["box", "box_of_one"], [-1, 4]),
)
def test_gsde_trains_with_every_kind_of_observation(
    algorithm: Any, observation: str, action: str, sde_sample_freq: int
) -> None:
    check_trains(algorithm, observation, action, use_sde=True, sde_sample_freq=sde_sample_freq)


# What SB3 asserts about, stumbles over, or fails at once training has begun
NO_ACTIONS: dict[str, spaces.Space[Any]] = {
    "unbounded": spaces.Box(-np.inf, np.inf, (2,)),
    "half_bounded": spaces.Box(np.float32([-1.0, 0.0]), np.float32([1.0, np.inf])),
    "binary_matrix": spaces.MultiBinary([2, 2]),
    "discrete_matrix": spaces.MultiDiscrete(np.array([[2, 3], [2, 2]])),
    "dict": spaces.Dict({"a": spaces.Discrete(2)}),
    "tuple": spaces.Tuple((spaces.Discrete(2),)),
    "text": spaces.Text(3),
}
NO_OBSERVATIONS: dict[str, spaces.Space[Any]] = {
    "tuple": spaces.Tuple((BOX, spaces.Discrete(2))),
    "text": spaces.Text(3),
    "sequence": spaces.Sequence(BOX),
    "graph": spaces.Graph(BOX, None),
    "discrete_matrix": spaces.MultiDiscrete(np.array([[2, 3], [2, 2]])),
    "discrete_from_1": spaces.Discrete(3, start=1),
    "multi_discrete_from_1": spaces.MultiDiscrete([3, 2], start=[0, 1]),
    "nested": spaces.Dict({"a": spaces.Dict({"b": BOX})}),
    "tuple_in_dict": spaces.Dict({"a": BOX, "b": spaces.Tuple((BOX,))}),
    "text_in_dict": spaces.Dict({"a": spaces.Text(3)}),
    "number": spaces.Box(-1.0, 1.0, ()),
    "number_in_dict": spaces.Dict({"a": BOX, "b": spaces.Box(-1.0, 1.0, ())}),
    "empty_dict": spaces.Dict({}),
}


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("action", NO_ACTIONS)
def test_actions_that_cannot_be_learnt(algorithm: Any, action: str) -> None:
    with pytest.raises(ValueError, match=r"(?s)action_space=.* is not supported: .* must (be|have)") as error:
        small(algorithm, "MlpPolicy", ScriptedEnv(BOX, NO_ACTIONS[action]))
    assert f"={NO_ACTIONS[action]} is" in str(error.value)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("observation", NO_OBSERVATIONS)
def test_observations_that_cannot_be_learnt_from(algorithm: Any, observation: str) -> None:
    space = NO_OBSERVATIONS[observation]
    policy = "MultiInputPolicy" if isinstance(space, spaces.Dict) else "MlpPolicy"
    with pytest.raises(ValueError, match=r"(?s)observation_space.*=.* is not supported: it must be Box, Discrete"):
        small(algorithm, policy, ScriptedEnv(space, spaces.Discrete(2)))


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_gsde_is_for_box_actions(algorithm: Any) -> None:
    with pytest.raises(ValueError, match=r"use_sde=True is not allowed with action_space=Discrete\(2\): .* be False"):
        small(algorithm, "MlpPolicy", ScriptedEnv(BOX, spaces.Discrete(2)), use_sde=True)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("policy", ["MlpPolicy", "CnnPolicy"])
def test_the_wrong_policy_for_a_dict_is_refused(algorithm: Any, policy: str) -> None:
    with pytest.raises(ValueError, match=f"You must use `MultiInputPolicy`.*{policy}"):
        small(algorithm, policy, ScriptedEnv(DICT, spaces.Discrete(2)))


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize(
    ("policy", "observation"),
    [
        ("CnnPolicy", BOX),
        ("CnnPolicy", spaces.Discrete(3)),
        ("CnnPolicy", spaces.Box(0.0, 1.0, (3, 36, 36))),  # an image, but not in bytes
        ("CnnPolicy", spaces.Box(0, 255, (3, 10, 10), np.uint8)),  # smaller than the convolutions
        ("MultiInputPolicy", BOX),
        ("MultiInputPolicy", spaces.Discrete(3)),
    ],
)
def test_the_wrong_policy_for_an_observation_is_refused(algorithm: Any, policy: str, observation: Any) -> None:
    with pytest.raises(
        ValueError, match=f"(?s)policy={policy} with .* not allowed .*(CnnPolicy for images|36 x 36)"
    ) as error:
        small(algorithm, policy, ScriptedEnv(observation, spaces.Discrete(2)))
    assert f"observation_space={observation}" in str(error.value)
    assert error.value.__cause__ is not None  # what SB3 said, and where
