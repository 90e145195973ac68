"""``critic_observation_key``: of Dict observations, the critic sees one key and the actor the others."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor

from sb3_ppo_ext import DualClipPPO
from sb3_ppo_ext.common.errors import ArgumentError
from sb3_ppo_ext.common.policies import MultiInputActorCriticPolicy
from sb3_ppo_ext.common.rollout.adapters import direct_actor_critic
from sb3_ppo_ext.common.rollout.data import PolicyInput
from tests.algorithms import ALGORITHMS, assert_close_policies, assert_same_policy, have_moved, parameters, small
from tests.envs import BOX, BOX_ACTIONS, IMAGE, scripted

KEY = "privileged"
GROUPS = spaces.Dict({"policy": BOX, KEY: spaces.Box(-1.0, 1.0, (7,), np.float32)})
ACTIONS = (BOX_ACTIONS, spaces.Discrete(3), spaces.MultiDiscrete([2, 3]), spaces.MultiBinary(2))


def asymmetric(algorithm: Any, env: Any, policy: Any = "MultiInputPolicy", **kwargs: Any) -> Any:
    policy_kwargs = {"critic_observation_key": KEY, **kwargs.pop("policy_kwargs", {})}
    return small(algorithm, policy, env, policy_kwargs=policy_kwargs, **kwargs)


def batch(space: spaces.Dict, n: int = 5) -> dict[str, np.ndarray]:
    space.seed(0)
    samples = [space.sample() for _ in range(n)]
    return {key: np.stack([sample[key] for sample in samples]) for key in space}


@pytest.mark.parametrize(("algorithm", "action_space"), [*zip(ALGORITHMS, ACTIONS, strict=True)])
def test_the_actor_sees_all_but_the_key_and_the_critic_nothing_else(
    algorithm: Any, action_space: spaces.Space[Any]
) -> None:
    """As rollouts and updates run the networks, and as the policy's own methods do."""
    model = asymmetric(algorithm, scripted(GROUPS, action_space))
    before = parameters(model)
    model.learn(64)
    assert have_moved(model, before)
    core = direct_actor_critic(model.policy)
    obs = {key: th.as_tensor(array) for key, array in batch(GROUPS).items()}
    actions = core.act(PolicyInput(obs))[0].float().reshape(5, -1)

    @th.no_grad()
    def results(obs: dict[str, th.Tensor]) -> list[tuple[th.Tensor, th.Tensor]]:
        """Log-probabilities and values."""
        evaluation = core.evaluate_actions(PolicyInput(obs), actions)
        by_policy = model.policy.evaluate_actions(obs, actions.long().flatten() if actions.shape[1] == 1 else actions)
        alone = model.policy.get_distribution(obs).log_prob(actions.flatten() if actions.shape[1] == 1 else actions)
        return [
            (evaluation.log_prob, evaluation.values),
            (core.evaluate_actor(PolicyInput(obs), actions).log_prob, core.values(PolicyInput(obs))),
            (by_policy[1], by_policy[0].flatten()),
            (alone, model.policy.predict_values(obs).flatten()),
        ]

    of_critic = results({**obs, KEY: obs[KEY] + 1.0})
    of_actor = results({**obs, "policy": obs["policy"] + 1.0})
    for (log_prob, values), (same_log_prob, other_values), (other_log_prob, same_values) in zip(
        results(obs), of_critic, of_actor, strict=True
    ):
        assert th.equal(log_prob, same_log_prob)
        assert th.equal(values, same_values)
        assert not th.isclose(log_prob, other_log_prob).any()
        assert not th.isclose(values, other_values).any()


@pytest.mark.parametrize("policy", ["MultiInputPolicy", "MultiInputLstmPolicy"])
def test_a_model_predicts_from_the_actors_part_alone_also_when_it_was_saved_and_loaded(
    policy: str, tmp_path: Path
) -> None:
    env = scripted(GROUPS)
    model = asymmetric(DualClipPPO, env, policy).learn(32)
    file = io.BytesIO()
    model.save(file)
    file.seek(0)
    loaded = DualClipPPO.load(file, env=env)
    assert_same_policy(model, loaded)
    model.policy.save(tmp_path / "policy")
    alone = type(model.policy).load(str(tmp_path / "policy"), device="cpu")
    obs = batch(GROUPS)
    expected = model.predict(obs, deterministic=True)[0]
    for asked in (model, loaded, alone):
        assert np.array_equal(asked.predict({"policy": obs["policy"]}, deterministic=True)[0], expected)
    loaded.learn(32)


@pytest.mark.parametrize(
    "policy_kwargs",
    [
        {"enable_critic_lstm": True},
        {"enable_critic_lstm": False},
        {"rnn_type": "gru", "critic_learning_rate": 1e-3},
        {"rnn_type": "gru", "enable_critic_lstm": False, "n_lstm_layers": 2},
    ],
    ids=str,
)
def test_the_critic_of_a_policy_with_a_memory_has_observations_of_its_own(policy_kwargs: dict[str, Any]) -> None:
    policy_kwargs = {"lstm_hidden_size": 4, **policy_kwargs}
    model = asymmetric(DualClipPPO, scripted(GROUPS), "MultiInputLstmPolicy", policy_kwargs=policy_kwargs)
    before = parameters(model)
    model.learn(32)
    moved = {name for (name, p), q in zip(model.policy.named_parameters(), before, strict=True) if not th.equal(p, q)}
    assert any(name.startswith(("lstm_critic.weight_ih", "critic.weight")) for name in moved)
    obs = batch(GROUPS)
    other = {**obs, KEY: obs[KEY] + 1.0}
    assert np.array_equal(model.predict(obs, deterministic=True)[0], model.predict(other, deterministic=True)[0])


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_compiled_equals_eager(algorithm: Any, without_compiler: None) -> None:
    models = [asymmetric(algorithm, scripted(GROUPS), torch_compile=compiled).learn(64) for compiled in (False, True)]
    assert_close_policies(*models, atol=1e-5)


class Sum(BaseFeaturesExtractor):
    """Takes all that it is given."""

    def __init__(self, observation_space: spaces.Dict) -> None:
        super().__init__(observation_space, features_dim=1)

    def forward(self, observations: dict[str, th.Tensor]) -> th.Tensor:
        return th.stack([array.flatten(1).sum(dim=1) for array in observations.values()]).sum(dim=0).unsqueeze(1)


def test_an_extractor_of_ones_own_is_given_the_keys_of_its_side_alone() -> None:
    policy_kwargs = {"features_extractor_class": Sum}
    policy = asymmetric(DualClipPPO, scripted(GROUPS), policy_kwargs=policy_kwargs).policy
    obs = {key: th.as_tensor(array) for key, array in batch(GROUPS).items()}
    of_actor, of_critic = policy.extract_features(obs)
    assert th.allclose(of_actor[:, 0], obs["policy"].sum(dim=1))
    assert th.allclose(of_critic[:, 0], obs[KEY].sum(dim=1))


def test_an_actor_of_images_has_a_critic_of_numbers() -> None:
    space = spaces.Dict({"camera": IMAGE, "touch": BOX, KEY: BOX})
    policy = asymmetric(DualClipPPO, scripted(space)).learn(32).policy
    assert set(policy.pi_features_extractor.extractor.extractors) == {"camera", "touch"}
    assert set(policy.vf_features_extractor.extractor.extractors) == {KEY}


@pytest.mark.parametrize(
    ("policy", "space", "policy_kwargs", "message"),
    [
        ("MlpPolicy", BOX, {}, "must be Dict"),
        ("MultiInputPolicy", spaces.Dict({"policy": BOX}), {}, "one of 'policy'"),
        ("MultiInputPolicy", spaces.Dict({KEY: BOX}), {}, "the only key"),
        ("MultiInputPolicy", GROUPS, {"share_features_extractor": True}, "share_features_extractor=True"),
        ("MultiInputPolicy", GROUPS, {"critic_observation_key": 3}, "critic_observation_key=3"),
    ],
)
def test_what_cannot_be_is_refused(policy: str, space: Any, policy_kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        asymmetric(DualClipPPO, scripted(space), policy, policy_kwargs=policy_kwargs)


def test_without_it_the_policy_is_as_it_was() -> None:
    policy = small(DualClipPPO, "MultiInputPolicy", scripted(GROUPS)).policy
    assert isinstance(policy, MultiInputActorCriticPolicy)
    assert "critic_observation_key" not in policy._get_constructor_parameters()
    assert policy.vf_features_extractor is policy.pi_features_extractor
