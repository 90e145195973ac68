"""A policy or a buffer of the user's own trains correctly; ours keep what SB3's keep."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from sb3_contrib.common.envs import InvalidActionEnvDiscrete
from stable_baselines3 import PPO
from stable_baselines3.common import buffers as sb3_buffers
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.torch_layers import MlpExtractor
from stable_baselines3.common.type_aliases import RolloutBufferSamples

from sb3_ppo_ext import TRPO, AdaptiveKLPPO, DualClipPPO
from sb3_ppo_ext.common.rollout.actor_critic import DirectActorCritic
from sb3_ppo_ext.common.rollout.buffers import DictRolloutBuffer, RolloutBuffer
from tests.algorithms import (
    ALGORITHMS,
    ROLLOUT,
    STEP_BASED,
    assert_close_policies,
    assert_same_policy,
    have_moved,
    parameters,
    ppo_and_ours,
    small,
)
from tests.custom import EveryStepBuffer, OverridesForward
from tests.envs import BOX, DICT, IMAGE, ScriptedEnv, scripted


class ScalesLogits(ActorCriticPolicy):
    """Its actions are drawn from sharpened logits, everywhere in the same way."""

    def _get_action_dist_from_latent(self, latent_pi: th.Tensor) -> Any:
        return self.action_dist.proba_distribution(action_logits=3.0 * self.action_net(latent_pi))


class ShiftsValues(ActorCriticPolicy):
    """Its values are shifted, in each of the methods that give one."""

    def forward(self, obs: th.Tensor, deterministic: bool = False) -> Any:
        actions, values, log_prob = super().forward(obs, deterministic)
        return actions, values + 2.0, log_prob

    def evaluate_actions(self, obs: Any, actions: th.Tensor) -> Any:
        values, log_prob, entropy = super().evaluate_actions(obs, actions)
        return values + 2.0, log_prob, entropy

    def predict_values(self, obs: Any) -> th.Tensor:
        return super().predict_values(obs) + 2.0


class OverridesGetDistribution(ActorCriticPolicy):
    def get_distribution(self, obs: Any) -> Any:
        return super().get_distribution(obs)


class OwnNetworks(ActorCriticPolicy):
    """SB3's documented way to bring networks of one's own: no method that computes anything is overridden."""

    def _build_mlp_extractor(self) -> None:
        super()._build_mlp_extractor()
        self.mlp_extractor = Doubling(self.features_dim, [16], th.nn.ReLU)


class Doubling(MlpExtractor):
    def forward_actor(self, features: th.Tensor) -> th.Tensor:
        return 2.0 * super().forward_actor(features)


@pytest.mark.parametrize("policy", [ScalesLogits, ShiftsValues, OverridesGetDistribution, OwnNetworks])
def test_custom_policy_trains_as_in_sb3(policy: type[ActorCriticPolicy]) -> None:
    """The same parameters as SB3's PPO gets with the same policy."""
    models = ppo_and_ours(
        policy, lambda: make_vec_env("CartPole-v1", n_envs=2, seed=1), 8 * ROLLOUT, learning_rate=1e-3
    )
    assert_close_policies(*models, atol=1e-5)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("policy", [ScalesLogits, ShiftsValues])
def test_custom_policy_trains_with_every_algorithm(
    algorithm: Any, policy: type[ActorCriticPolicy], capsys: pytest.CaptureFixture[str]
) -> None:
    model = small(algorithm, policy, scripted(BOX, spaces.Discrete(3)), verbose=1)
    before = parameters(model)
    model.learn(4 * ROLLOUT)
    assert capsys.readouterr().out.count(f"{policy.__name__} overrides") == 1  # said once
    assert have_moved(model, before)


def test_sb3s_own_policies_are_used_directly() -> None:
    model = DualClipPPO(ActorCriticPolicy, "CartPole-v1", device="cpu")
    assert DirectActorCritic.refusal(model.policy) is None
    model = DualClipPPO(OwnNetworks, "CartPole-v1", device="cpu")
    assert DirectActorCritic.refusal(model.policy) is not None
    model.policy.mlp_extractor.is_pure = True  # type: ignore[assignment]
    assert DirectActorCritic.refusal(model.policy) is None
    for policy in (ScalesLogits, ShiftsValues, OverridesGetDistribution):
        model = DualClipPPO(policy, "CartPole-v1", device="cpu")
        assert DirectActorCritic.refusal(model.policy) is not None


def test_a_method_replaced_on_the_instance_is_seen() -> None:
    model = DualClipPPO("MlpPolicy", "CartPole-v1", device="cpu")
    forward = model.policy.forward
    model.policy.forward = lambda *args, **kwargs: forward(*args, **kwargs)  # type: ignore[method-assign]
    assert DirectActorCritic.refusal(model.policy) is not None


class StepByStep(sb3_buffers.RolloutBuffer):
    """A buffer of the user's own, which wants every step."""

    def __init__(self, *args: Any, note: str = "", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.note = note
        self.added = 0

    def add(self, *args: Any, **kwargs: Any) -> None:
        self.added += 1
        super().add(*args, **kwargs)


def test_a_buffer_of_the_users_own_is_filled_as_sb3_does() -> None:
    models = ppo_and_ours(
        "MlpPolicy",
        lambda: make_vec_env("CartPole-v1", n_envs=2, seed=1),
        8 * ROLLOUT,
        rollout_buffer_class=StepByStep,
        rollout_buffer_kwargs={"note": "mine"},
    )
    for model in models:
        assert (model.rollout_buffer.note, model.rollout_buffer.added) == ("mine", 4 * ROLLOUT)
    assert_close_policies(*models, atol=1e-5)


class Noted(RolloutBuffer):
    """A buffer derived from ours, with an argument."""

    def __init__(self, *args: Any, note: str, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.note = note


@pytest.mark.parametrize("algorithm", STEP_BASED)
def test_buffer_class_and_arguments_are_honoured(algorithm: Any) -> None:
    buffer = {"rollout_buffer_class": Noted, "rollout_buffer_kwargs": {"note": "mine"}}
    model = small(algorithm, "MlpPolicy", "CartPole-v1", **buffer).learn(ROLLOUT)
    assert type(model.rollout_buffer) is Noted
    assert model.rollout_buffer.note == "mine"


@pytest.mark.parametrize("algorithm", [AdaptiveKLPPO, TRPO])
def test_a_buffer_that_cannot_serve_is_refused(algorithm: Any) -> None:
    with pytest.raises(ValueError, match=r"rollout_buffer_class=StepByStep is not allowed.*subclass of sb3_ppo_ext"):
        algorithm("MlpPolicy", "CartPole-v1", device="cpu", rollout_buffer_class=StepByStep)


def test_observations_keep_their_dtype() -> None:
    env = ScriptedEnv(DICT, spaces.Discrete(2))
    model = DualClipPPO("MultiInputPolicy", env, n_steps=16, batch_size=16, n_epochs=1, device="cpu").learn(16)
    assert isinstance(model.rollout_buffer, DictRolloutBuffer)
    stored = model.rollout_buffer.observations
    assert stored["image"].dtype == np.uint8
    assert stored["vector"].dtype == np.float32
    assert stored["choice"].dtype == np.int64
    flat = model.rollout_buffer.flat().observations
    assert {key: value.dtype for key, value in flat.items()} == {
        "vector": th.float32,
        "image": th.uint8,
        "choice": th.int64,
    }
    image = DualClipPPO(
        "CnnPolicy", ScriptedEnv(IMAGE, spaces.Discrete(2)), n_steps=16, batch_size=16, n_epochs=1, device="cpu"
    ).learn(16)
    assert image.rollout_buffer.observations.dtype == np.uint8


@pytest.mark.parametrize("n_envs", [1, 3])
def test_what_the_buffer_holds_is_what_the_policy_says(n_envs: int) -> None:
    """Values, log-probabilities and distribution parameters, of SB3's own evaluate_actions and get_distribution."""
    env = scripted(n_envs=n_envs)
    model = DualClipPPO("MlpPolicy", env, n_steps=32, batch_size=32, seed=0, device="cpu")
    _, callback = model._setup_learn(32)
    model.collect_rollouts(model.env, callback, model.rollout_buffer, 32)
    samples = model.rollout_buffer.flat()
    with th.no_grad():
        values, log_prob, _ = model.policy.evaluate_actions(samples.observations, samples.actions)
        normal = model.policy.get_distribution(samples.observations).distribution
    th.testing.assert_close(samples.old_values, values.flatten())
    th.testing.assert_close(samples.old_log_prob, log_prob)
    th.testing.assert_close(samples.old_params, th.cat((normal.mean, normal.stddev), dim=1))
    # The arrays of shape (n_steps, n_envs, ...) hold the same.
    np.testing.assert_array_equal(model.rollout_buffer.values.swapaxes(0, 1).flatten(), samples.old_values.numpy())


class Watching(BaseCallback):
    """Collects the names in ``locals``, and stops after so many steps."""

    def __init__(self, stop_after: int) -> None:
        super().__init__()
        self.stop_after = stop_after
        self.names: set[str] = set()
        self.last_values = th.empty(0)

    def _on_step(self) -> bool:
        self.names |= set(self.locals)
        return self.n_calls < self.stop_after

    def _on_rollout_end(self) -> None:
        self.last_values = self.locals["values"]


def test_callbacks_see_sb3s_locals() -> None:
    theirs, ours = Watching(10), Watching(10)
    PPO("MlpPolicy", "CartPole-v1", n_steps=32, batch_size=32, device="cpu").learn(32, callback=theirs)
    DualClipPPO("MlpPolicy", "CartPole-v1", n_steps=32, batch_size=32, device="cpu").learn(32, callback=ours)
    assert theirs.names - ours.names <= {"values", "log_probs", "__class__"} | {"idx", "done"}
    assert {"self", "env", "rollout_buffer", "obs_tensor", "actions", "clipped_actions", "new_obs"} <= ours.names
    assert {"rewards", "dones", "infos", "n_steps", "n_rollout_steps", "callback"} <= ours.names


@pytest.mark.parametrize("policy", ["MlpPolicy", OverridesForward])
def test_callbacks_see_the_values_after_a_rollout_as_in_sb3(policy: Any) -> None:
    models = (
        algorithm(policy, scripted(n_envs=3), n_steps=4, batch_size=12, seed=0) for algorithm in (PPO, DualClipPPO)
    )
    watching = [Watching(100), Watching(100)]
    for model, callback in zip(models, watching, strict=True):
        model.learn(12, callback=callback)
    th.testing.assert_close(watching[1].last_values, watching[0].last_values)


def test_a_callback_stops_a_rollout_in_the_middle() -> None:
    model = DualClipPPO("MlpPolicy", "CartPole-v1", n_steps=32, batch_size=32, device="cpu")
    model.learn(320, callback=Watching(50))
    assert model.num_timesteps == 50
    assert model._n_updates == 10  # one rollout's epochs
    model.learn(64, reset_num_timesteps=False)
    assert model.num_timesteps == 114


@pytest.mark.parametrize("algorithm", [DualClipPPO, AdaptiveKLPPO])
def test_a_model_saved_by_sb3_loads_into_ours_and_back(algorithm: Any, tmp_path: Any) -> None:
    theirs = PPO("MlpPolicy", "CartPole-v1", n_steps=32, batch_size=32, n_epochs=1, device="cpu").learn(64)
    theirs.save(tmp_path / "theirs")
    ours = algorithm("MlpPolicy", "CartPole-v1", n_steps=32, batch_size=32, n_epochs=1, device="cpu")
    ours.set_parameters(tmp_path / "theirs")
    whole = DualClipPPO.load(tmp_path / "theirs", env=theirs.env, device="cpu")
    assert type(whole.rollout_buffer) is RolloutBuffer
    for model in (ours, whole):
        assert_same_policy(theirs, model)
        model.learn(64)
    ours.save(tmp_path / "ours")
    theirs.set_parameters(tmp_path / "ours")
    assert_same_policy(ours, theirs)
    theirs.learn(64)
    assert have_moved(theirs, parameters(ours))


@pytest.mark.parametrize("algorithm", STEP_BASED)
def test_a_derived_buffer_with_its_own_add_gets_every_step(algorithm: Any) -> None:
    models = [
        small(algorithm, "MlpPolicy", "CartPole-v1", rollout_buffer_class=buffer_class).learn(2 * ROLLOUT)
        for buffer_class in (None, EveryStepBuffer)
    ]
    assert models[1].rollout_buffer.n_added == 2 * ROLLOUT
    assert_close_policies(*models, atol=1e-5)


class OwnGet(RolloutBuffer):
    def get(self, batch_size: int | None = None) -> Any:
        return super().get(batch_size)


class GivesSB3Samples(RolloutBuffer):
    """Its minibatches do not say which actions were allowed."""

    def get(self, batch_size: int | None = None) -> Any:
        for samples in super().get(batch_size):
            yield RolloutBufferSamples(*samples[: len(RolloutBufferSamples._fields)])


def test_a_derived_buffer_must_not_lose_the_action_masks() -> None:
    env = InvalidActionEnvDiscrete(dim=6, n_invalid_actions=4)
    whole = small(DualClipPPO, "MlpPolicy", env).learn(ROLLOUT)
    assert_same_policy(whole, small(DualClipPPO, "MlpPolicy", env, rollout_buffer_class=OwnGet).learn(ROLLOUT))
    model = small(DualClipPPO, "MlpPolicy", env, rollout_buffer_class=GivesSB3Samples)
    before = parameters(model)
    with pytest.raises(ValueError, match="rollout_buffer_class=GivesSB3Samples is not allowed where environments mask"):
        model.learn(ROLLOUT)
    assert not have_moved(model, before)
    model.learn(ROLLOUT, use_masking=False)
