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


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("action", ACTIONS)
@pytest.mark.parametrize("observation", OBSERVATIONS)
def test_spaces(algorithm: Any, observation: str, action: str) -> None:
    check_trains(algorithm, observation, action)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("action", ["box", "box_of_one"])
@pytest.mark.parametrize("observation", ["box", "image", "dict"])
@pytest.mark.parametrize("sde_sample_freq", [-1, 4])
def test_spaces_with_gsde(algorithm: Any, observation: str, action: str, sde_sample_freq: int) -> None:
    check_trains(algorithm, observation, action, use_sde=True, sde_sample_freq=sde_sample_freq)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize(
    "action",
    [spaces.MultiBinary([2, 2]), spaces.MultiDiscrete(np.array([[2, 3], [2, 2]]))],
    ids=["binary_matrix", "discrete_matrix"],
)
def test_spaces_that_sb3_refuses_are_refused(algorithm: Any, action: spaces.Space[Any]) -> None:
    """In whatever way: SB3 asserts."""
    with pytest.raises((AssertionError, ValueError)):
        small(algorithm, "MlpPolicy", ScriptedEnv(BOX, action))


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_the_wrong_policy_for_a_dict_is_refused(algorithm: Any) -> None:
    with pytest.raises(ValueError, match="You must use `MultiInputPolicy`"):
        small(algorithm, "MlpPolicy", ScriptedEnv(DICT, spaces.Discrete(2)))
