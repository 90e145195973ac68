"""What a policy remembers while rollouts are interrupted, continued, changed by callbacks and saved."""

from __future__ import annotations

import math
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from sb3_contrib import RecurrentPPO
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from torch import nn

from sb3_ppo_ext import REINFORCE, DualClipPPO
from sb3_ppo_ext.common.errors import ArgumentError
from sb3_ppo_ext.common.recurrent_policies import RecurrentActorCriticPolicy
from sb3_ppo_ext.common.rollout.adapters import direct_actor_critic
from sb3_ppo_ext.common.rollout.buffers import size_to_pad_to
from tests.algorithms import ALGORITHMS, small
from tests.envs import BOX, BOX_ACTIONS, DICT, ScriptedEnv, scripted

N_STEPS, N_ENVS = 16, 2
MEMORY = {"lstm_hidden_size": 4}


def remembering(algorithm: Any, env: Any = None, policy: Any = "MlpLstmPolicy", **kwargs: Any) -> Any:
    policy_kwargs = {**MEMORY, **kwargs.pop("policy_kwargs", {})}
    return small(algorithm, policy, env or scripted(), policy_kwargs=policy_kwargs, **kwargs)


LONG_EPISODES = ((1000, True, False),)


def contrib_and_ours(learn: Any, **kwargs: Any) -> tuple[Any, Any]:
    """RecurrentPPO and DualClipPPO, that have collected as ``learn`` has them do, and learnt nothing."""
    models = []
    for algorithm, own in ((RecurrentPPO, {}), (DualClipPPO, {"sequence_length": N_STEPS})):
        model: Any = algorithm(
            "MlpLstmPolicy",
            scripted(n_envs=N_ENVS, **kwargs),
            n_steps=N_STEPS,
            batch_size=N_STEPS * N_ENVS,
            seed=0,
            device="cpu",
            policy_kwargs={"net_arch": [8], **MEMORY},
            **own,
        )
        model.train = lambda: None
        learn(model)
        models.append(model)
    return models[0], models[1]


def assert_same_rollout(theirs: Any, ours: Any) -> None:
    for name in ("actions", "values", "log_probs", "advantages"):
        array = getattr(ours.rollout_buffer, name)
        assert np.allclose(array, getattr(theirs.rollout_buffer, name).reshape(array.shape), atol=1e-5), name


class ChangesPolicy(BaseCallback):
    """In the middle of the rollout: all parameters, or the layer that gives the values."""

    def __init__(self, *, replaces_a_layer: bool = False) -> None:
        super().__init__()
        self.replaces_a_layer = replaces_a_layer

    def _on_step(self) -> bool:
        if self.num_timesteps == 10 * N_ENVS:
            policy: Any = self.model.policy
            if self.replaces_a_layer:
                policy.value_net = nn.Linear(8, 1)
            else:
                with th.no_grad():
                    for parameter in policy.parameters():
                        parameter.add_(0.1)
        return True


def test_a_callback_that_changes_the_policy_in_a_rollout() -> None:
    """Final observations before the change have the values of the policy before it."""
    theirs, ours = contrib_and_ours(lambda model: model.learn(N_STEPS * N_ENVS, callback=ChangesPolicy()))
    assert ours.rollout_buffer.truncated[:9].any()
    assert_same_rollout(theirs, ours)


def test_a_callback_that_replaces_a_layer_in_a_rollout_is_noticed() -> None:
    model = remembering(DualClipPPO)
    with pytest.warns(UserWarning, match="policy was changed while it collected a rollout"):
        model.learn(N_STEPS * N_ENVS, callback=ChangesPolicy(replaces_a_layer=True))


@pytest.mark.parametrize("error", [None, KeyboardInterrupt])
def test_what_is_remembered_when_a_callback_ends_a_rollout(error: Any) -> None:
    """The observation that it was ended at has not been seen yet: the next rollout begins with it."""

    def stops(variables: dict[str, Any], _: Any) -> bool:
        stops_now: bool = variables["self"].num_timesteps == 10 * N_ENVS
        if stops_now and error is not None:
            raise error
        return not stops_now

    def learn(model: Any) -> None:
        try:
            model.learn(2 * N_STEPS * N_ENVS, callback=stops)
        except KeyboardInterrupt:
            assert error is not None
        model.learn(N_STEPS * N_ENVS, reset_num_timesteps=False)

    assert_same_rollout(*contrib_and_ours(learn, script=LONG_EPISODES))


def test_reinforce_goes_on_after_the_step_that_a_callback_stopped_at() -> None:
    model = remembering(REINFORCE, scripted(script=LONG_EPISODES))
    states = []

    def stops(variables: dict[str, Any], _: Any) -> bool:
        states.append(variables["next_state"].numpy())
        return len(states) < 5

    model.learn(100, callback=stops)
    assert np.array_equal(model._last_state, states[-1])
    assert not np.array_equal(states[-1], states[-2])


class Masking(ScriptedEnv):
    def action_masks(self) -> np.ndarray:
        return np.array([False, True, True])


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_all_that_is_computed_of_a_rollout_with_masks_and_memory_is_of_the_masked_distributions(
    algorithm: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sb3_ppo_ext.reinforce._FIRST_BUFFER_SIZE", 4)  # which is to grow
    model = remembering(algorithm, make_vec_env(lambda: Masking(BOX, spaces.Discrete(3)), 2, seed=0))
    model.train = lambda: None
    model.learn(32)
    model.policy.set_training_mode(False)
    flat = model.rollout_buffer.flat()
    counts = slice(None) if flat.mask is None else flat.mask
    actor_critic = direct_actor_critic(model.policy)
    evaluation = actor_critic.evaluate_actions(flat.inputs, flat.actions)
    assert (flat.old_params[:, 0] == -math.inf).all()
    for params in (
        actor_critic.params(flat.inputs),
        actor_critic.evaluate_actor(flat.inputs, flat.actions).params,
        evaluation.params,
    ):
        assert th.allclose(params[counts], flat.old_params[counts], atol=1e-6)
    assert th.allclose(evaluation.log_prob[counts], flat.old_log_prob[counts], atol=1e-6)
    assert th.allclose(evaluation.values[counts], flat.old_values[counts], atol=1e-6)


@pytest.mark.parametrize("baseline", ["value", "optimal"])
def test_all_that_reinforce_logs_with_masks_and_memory_is_finite(baseline: str) -> None:
    """Sequences are longer than the episodes, and the last ones are filled up."""
    model = remembering(
        REINFORCE,
        make_vec_env(lambda: Masking(BOX, spaces.Discrete(3)), 2, seed=0),
        baseline=baseline,
        sequence_length=8,
    )
    model.learn(64)
    flat = model.rollout_buffer.flat()
    assert not flat.mask.all()
    assert flat.action_masks.any(dim=1).all(), "a sample allows no action"
    for name, value in model.logger.name_to_value.items():
        assert math.isfinite(value), name


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_the_length_of_sequences_follows_what_is_changed_between_two_trainings(algorithm: Any) -> None:
    model = remembering(algorithm).learn(32)
    assert model.rollout_buffer.sequence_length == 8
    model.batch_size = 4
    model.learn(32)
    assert model.rollout_buffer.sequence_length == 4
    model.sequence_length = 2
    model.learn(32)
    assert model.rollout_buffer.flat().length == 2
    model.batch_size = 3
    with pytest.raises(ArgumentError, match="sequence_length=2 is not allowed with batch_size=3"):
        model.learn(32)


def test_minibatches_are_padded_to_the_largest_that_there_is() -> None:
    """In a compiled step, and where the last one is smaller than the others."""
    buffer = remembering(DualClipPPO).learn(32).rollout_buffer  # of 4 sequences of 8 steps
    padded_to = {batch_size: size_to_pad_to(buffer, batch_size) for batch_size in (8, 16, 24, 32, 64)}
    assert padded_to == {8: None, 16: None, 24: 3, 32: None, 64: None}


def test_the_value_after_an_episode_that_the_rollout_ends_with_is_that_of_an_empty_memory() -> None:
    model = remembering(DualClipPPO, scripted(script=((4, True, False),)))
    model.train = lambda: None
    model.learn(N_STEPS * N_ENVS)
    assert model._last_episode_starts.all()
    assert model._last_state.any()
    nothing = th.zeros(1, N_ENVS, 4)
    with th.no_grad():
        values = model.policy.predict_values(th.as_tensor(model._last_obs), (nothing, nothing), th.zeros(N_ENVS))
    assert np.allclose(model.rollout_buffer.last_values, values.flatten(), atol=1e-6)


class Doubles(BaseCallback):
    """Adds the samples of a rollout to it a second time."""

    def __init__(self, *names: str) -> None:
        super().__init__()
        self.names = names

    def _on_step(self) -> bool:
        return True

    def _on_rollout_end(self) -> None:
        buffer = self.locals["rollout_buffer"]
        for name in self.names:
            setattr(buffer, name, np.concatenate([getattr(buffer, name)] * 2))
        buffer.buffer_size *= 2


def test_samples_that_are_added_without_states_are_refused() -> None:
    names = ["observations", "actions", "rewards", "returns", "episode_starts", "values", "log_probs", "advantages"]
    with pytest.raises(ValueError, match=r"states of shape .* must add the state before each sequence"):
        remembering(DualClipPPO).learn(32, callback=Doubles(*names))
    model = remembering(DualClipPPO, n_epochs=1).learn(32, callback=Doubles(*names, "states"))
    assert model.rollout_buffer.flat().length == 8


class OwnForward(RecurrentActorCriticPolicy):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return super().forward(*args, **kwargs)


@pytest.mark.parametrize(
    ("policy", "obs_space", "policy_kwargs", "message"),
    [
        ("MlpLstmPolicy", BOX, {"lstm_kwargs": 3}, "lstm_kwargs=3 is not allowed: it must be a dict"),
        ("MlpLstmPolicy", BOX, {"lstm_kwargs": {"dtype": th.float64}}, "dtype must be left out"),
        ("MlpLstmPolicy", BOX, {"enable_critic_lstm": "no"}, "enable_critic_lstm='no' is not allowed"),
        ("MlpLstmPolicy", DICT, {}, "policy=MlpLstmPolicy .* its features extractor takes one array"),
        (OwnForward, BOX, {"critic_learning_rate": 0.1}, "critic_learning_rate .* OwnForward, which overrides"),
    ],
    ids=["lstm_kwargs", "dtype", "enable_critic_lstm", "dict", "own forward"],
)
def test_what_cannot_be_learnt_with_is_told_before(
    policy: Any, obs_space: Any, policy_kwargs: dict[str, Any], message: str
) -> None:
    with pytest.raises(ArgumentError, match=message):
        remembering(DualClipPPO, scripted(obs_space), policy, policy_kwargs=policy_kwargs)


def test_a_state_may_be_one_array() -> None:
    env: gym.Env[Any, Any] = Masking(BOX, spaces.Discrete(3))
    for one in (scripted(BOX, BOX_ACTIONS), make_vec_env(lambda: env, 1)):
        model = remembering(DualClipPPO, one).learn(16)
        masks = {"action_masks": env.action_masks()} if model.action_space == env.action_space else {}
        obs = one.reset()
        _, state = model.predict(obs, **masks)
        expected = model.predict(obs, state, deterministic=True, **masks)
        actual = model.predict(obs, np.stack(state), deterministic=True, **masks)
        assert np.array_equal(actual[0], expected[0])
        assert np.array_equal(actual[1], expected[1])
