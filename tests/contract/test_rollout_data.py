"""What a callback or an environment does to a rollout counts, and what it raises arrives."""

from __future__ import annotations

from typing import Any, ClassVar

import gymnasium as gym
import numpy as np
import optuna
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from stable_baselines3.common.vec_env import DummyVecEnv

from sb3_ppo_ext import REINFORCE, TRPO, AdaptiveKLPPO, DualClipPPO
from sb3_ppo_ext.common.errors import NonFiniteError
from tests.algorithms import (
    ALGORITHMS,
    ROLLOUT,
    assert_close_policies,
    assert_same_policy,
    have_moved,
    parameters,
    ppo_and_ours,
    small,
)
from tests.custom import OverridesForward
from tests.envs import BOX, BOX_ACTIONS, DICT, ScriptedEnv, scripted
from tests.pairwise import pairwise

# --- edits -----------------------------------------------------------------------------------------------------------


class Edits(BaseCallback):
    """Changes an array of the buffer at the end of each rollout: in it, or by another in its place."""

    def __init__(self, name: str, replaces: bool) -> None:
        super().__init__()
        self.name, self.replaces = name, replaces

    def _on_step(self) -> bool:
        return True

    def _on_rollout_end(self) -> None:
        buffer = self.locals["rollout_buffer"]
        array = getattr(buffer, self.name)
        if isinstance(array, dict):
            array["vector"] *= -1
        elif self.replaces:
            setattr(buffer, self.name, 0.5 * array)
        else:
            array *= 0.5


@pytest.mark.parametrize("name", ["observations", "actions", "log_probs", "values", "returns", "advantages"])
@pytest.mark.parametrize(("n_envs", "replaces"), [(1, False), (2, False), (2, True)])
def test_edits_at_the_end_of_a_rollout_are_learnt_from_as_by_sb3(name: str, n_envs: int, replaces: bool) -> None:
    unedited, edited = (
        ppo_and_ours(
            "MlpPolicy",
            lambda: scripted(n_envs=n_envs),
            2 * ROLLOUT * n_envs,
            callback=callback,
            clip_range_vf=0.1,
            normalize_advantage=False,
        )
        for callback in (lambda: None, lambda: Edits(name, replaces))
    )
    assert_close_policies(*edited, atol=5e-6, rtol=1e-5)
    assert have_moved(edited[1], parameters(unedited[1]))  # the edit has made a difference


class Doubles(BaseCallback):
    """Adds each sample once more, as augmentation does."""

    def _on_step(self) -> bool:
        return True

    def _on_rollout_end(self) -> None:
        buffer = self.locals["rollout_buffer"]
        for name in ("observations", "actions", "rewards", "returns", "values", "log_probs", "advantages"):
            setattr(buffer, name, np.concatenate([getattr(buffer, name)] * 2))
        buffer.episode_starts = np.concatenate([buffer.episode_starts] * 2)
        buffer.buffer_size *= 2


def test_samples_that_are_added_at_the_end_of_a_rollout_are_learnt_from_as_by_sb3() -> None:
    models = ppo_and_ours("MlpPolicy", scripted, 2 * ROLLOUT, callback=Doubles)
    assert_close_policies(*models, atol=5e-6, rtol=1e-5)


class Recomputes(BaseCallback):
    """Puts other rewards in the place of those of the rollout, and computes the advantages anew."""

    def __init__(self, other: Any) -> None:
        super().__init__()
        self.other = other

    def _on_step(self) -> bool:
        return True

    def _on_rollout_end(self) -> None:
        buffer = self.locals["rollout_buffer"]
        buffer.rewards = self.other(buffer.rewards)
        buffer.compute_returns_and_advantage(last_values=self.locals["values"], dones=self.locals["dones"])


def read_only(rewards: Any) -> Any:
    rewards = rewards - 1
    rewards.flags.writeable = False
    return rewards


OTHER_REWARDS = {
    "read-only": read_only,
    "reversed": lambda rewards: rewards[:, ::-1],
    "float64": lambda rewards: rewards.astype(np.float64),
    "column by column": np.asfortranarray,
}


@pytest.mark.parametrize("other", OTHER_REWARDS)
def test_any_array_of_rewards_makes_advantages_as_by_sb3(other: str) -> None:
    models = ppo_and_ours(
        "MlpPolicy",
        lambda: DummyVecEnv([lambda: ScriptedEnv(BOX, BOX_ACTIONS, script=((3, True, False),))] * 2),
        2 * ROLLOUT * 2,
        callback=lambda: Recomputes(OTHER_REWARDS[other]),
    )
    assert_close_policies(*models, atol=5e-6, rtol=1e-5)


@pytest.mark.parametrize("axis", [0, 1])
def test_rewards_that_are_added_alone_make_no_advantages(axis: int) -> None:
    doubles = Recomputes(lambda rewards: np.concatenate([rewards] * 2, axis=axis))
    with pytest.raises(ValueError, match="must extend all three alike"):
        small(DualClipPPO, "MlpPolicy", ScriptedEnv(BOX, BOX_ACTIONS)).learn(ROLLOUT, callback=doubles)


@pytest.mark.parametrize("algorithm", [AdaptiveKLPPO, TRPO])
def test_samples_that_are_added_without_the_distributions_that_acted_are_refused(algorithm: Any) -> None:
    with pytest.raises(ValueError, match="adds samples without distribution_params"):
        small(algorithm, "MlpPolicy", ScriptedEnv(BOX, BOX_ACTIONS)).learn(ROLLOUT, callback=Doubles())


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_edited_observations_of_a_dict_are_learnt_from(algorithm: Any) -> None:
    unedited, edited = (
        small(algorithm, "MultiInputPolicy", scripted(DICT)).learn(1, callback=callback)
        for callback in (None, Edits("observations", replaces=False))
    )
    assert have_moved(edited, parameters(unedited))


# --- exceptions ------------------------------------------------------------------------------------------------------


class Missing(gym.Env[Any, Any]):
    """Marks what is missing by NaN."""

    observation_space = spaces.Box(-1, 1, (2,), np.float32)
    action_space = spaces.Discrete(2)

    def __init__(self) -> None:
        self.steps = 0
        self.raises: Exception | None = None

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        return np.array([0, np.nan], np.float32), {}

    def step(self, action: Any) -> Any:
        self.steps += 1
        if self.raises is not None:
            raise self.raises
        return np.array([0, np.nan], np.float32), 1.0, self.steps % 5 == 0, False, {}


class Known(BaseFeaturesExtractor):
    raises: Exception | None = None

    def __init__(self, observation_space: Any) -> None:
        super().__init__(observation_space, 4)

    def forward(self, x: th.Tensor) -> th.Tensor:
        if self.raises is not None:
            raise self.raises
        return th.cat((x.nan_to_num(0.0), x.isnan().float()), 1)


class UserError(Exception):
    pass


STEERING = [optuna.TrialPruned(), KeyboardInterrupt(), StopIteration(), UserError(), ValueError("mine"), EOFError()]


@pytest.mark.parametrize("event", ["_on_step", "_on_rollout_start", "_on_rollout_end", "_on_training_start"])
@pytest.mark.parametrize("error", STEERING, ids=lambda error: type(error).__name__)
def test_what_a_callback_raises_passes_as_it_is(event: str, error: BaseException) -> None:
    model = small(DualClipPPO, "MlpPolicy", Missing(), policy_kwargs={"features_extractor_class": Known})
    model.learn(ROLLOUT)

    class Raises(BaseCallback):
        def _on_step(self) -> bool:
            return True

    callback = Raises()

    def fail() -> bool:
        raise error

    setattr(callback, event, fail)
    with pytest.raises(type(error)) as caught:
        model.learn(2 * ROLLOUT, callback=callback)
    assert caught.value is error
    assert not hasattr(error, "__notes__")
    model.learn(ROLLOUT)


def test_what_a_callback_raises_in_a_method_of_sb3s_passes_as_it_is() -> None:
    class Raises(BaseCallback):
        def on_step(self) -> bool:  # in place of SB3's own
            # The arguments are checked by default, but no longer once torch.compile has been used in this process.
            th.distributions.Categorical(logits=th.full((1, 2), th.nan), validate_args=True)
            return True

        def _on_step(self) -> bool:
            return True

    model = small(DualClipPPO, "MlpPolicy", Missing(), policy_kwargs={"features_extractor_class": Known})
    with pytest.raises(ValueError, match="Expected parameter logits") as caught:
        model.learn(ROLLOUT, callback=Raises())
    assert not isinstance(caught.value, NonFiniteError)


@pytest.mark.parametrize(
    ("algorithm", "where", "error"),
    pairwise(ALGORITHMS, ["environment", "policy"], [UserError("mine"), ValueError("mine"), optuna.TrialPruned()]),
    ids=str,
)
def test_what_an_environment_or_a_policy_raises_gets_a_note_at_most(
    algorithm: Any, where: str, error: Exception
) -> None:
    env = Missing()
    model = small(algorithm, "MlpPolicy", env, policy_kwargs={"features_extractor_class": Known})
    (env if where == "environment" else model.policy.features_extractor).raises = error
    with pytest.raises(type(error)) as caught:
        model.learn(ROLLOUT)
    assert caught.value is error
    notes = getattr(error, "__notes__", [])
    assert all("Observations are not finite, first in environment 0" in note for note in notes)
    assert notes
    del error.__notes__


def test_what_torch_cannot_do_with_nan_is_explained() -> None:
    with pytest.raises(NonFiniteError, match="Observations are not finite, first in environment 0"):
        small(DualClipPPO, OverridesForward, Missing()).learn(ROLLOUT)


# --- references ------------------------------------------------------------------------------------------------------


class Reuses(DummyVecEnv):
    """Writes all that it gives into the same arrays, final observations too, as fast simulators do."""

    def __init__(self, makers: Any) -> None:
        super().__init__(makers)
        self.places: dict[str, Any] = {}

    def _reused(self, name: str, value: Any) -> Any:
        if isinstance(value, dict):
            self.places.setdefault(name, {}).update({key: self._reused(f"{name} {key}", x) for key, x in value.items()})
            return self.places[name]
        place = self.places.setdefault(name, np.array(value))
        place[...] = value
        return place

    def reset(self) -> Any:
        return self._reused("obs", super().reset())

    def step_wait(self) -> Any:
        obs, rewards, dones, infos = super().step_wait()
        for i, info in enumerate(infos):
            if "terminal_observation" in info:
                info["terminal_observation"] = self._reused(f"final {i}", info["terminal_observation"])
        return self._reused("obs", obs), self._reused("rewards", rewards), self._reused("dones", dones), infos


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("obs_space", [BOX, DICT], ids=["box", "dict"])
def test_an_environment_may_write_into_what_it_gave(algorithm: Any, obs_space: Any) -> None:
    policy = "MultiInputPolicy" if obs_space is DICT else "MlpPolicy"
    kwargs = {"bootstrap_timeouts": True} if algorithm is REINFORCE else {}
    models = []
    for vec_env in (DummyVecEnv, Reuses):
        env = vec_env([lambda: ScriptedEnv(obs_space, BOX_ACTIONS)] * 2)
        env.seed(0)
        models.append(small(algorithm, policy, env, **kwargs).learn(2 * ROLLOUT))
    fresh, reused = (model.rollout_buffer for model in models)
    assert (fresh.episode_starts[1:] > 0).any()
    for name in ("actions", "rewards", "episode_starts", "values", "log_probs", "returns"):
        np.testing.assert_array_equal(getattr(reused, name), getattr(fresh, name), err_msg=name)
    assert_same_policy(*models)


class OneInfo(gym.Wrapper[Any, Any, Any, Any]):
    """Has one dict for all that it says of its episodes."""

    episode: ClassVar[dict[str, float]] = {}

    def step(self, action: Any) -> Any:
        obs, reward, terminated, truncated, info = self.env.step(action)
        if terminated or truncated:
            self.episode.update(r=self.episode.get("r", 0.0) + 1.0, l=1, t=0.0)
            info["episode"] = self.episode
        return obs, reward, terminated, truncated, info


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_what_is_said_of_an_episode_is_kept(algorithm: Any) -> None:
    OneInfo.episode.clear()
    env = DummyVecEnv([lambda: OneInfo(ScriptedEnv(BOX, BOX_ACTIONS))])
    model = small(algorithm, "MlpPolicy", env).learn(1)
    returns = [info["r"] for info in model.ep_info_buffer]
    assert returns == [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0][: len(returns)]
    assert len(returns) > 3


class NoEpisode(gym.Wrapper[Any, Any, Any, Any]):
    """Says of each step that there is no episode to tell of."""

    def step(self, action: Any) -> Any:
        *result, info = self.env.step(action)
        return *result, {**info, "episode": None}


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_an_episode_that_is_none_is_not_counted_as_by_sb3(algorithm: Any) -> None:
    env = DummyVecEnv([lambda: NoEpisode(ScriptedEnv(BOX, BOX_ACTIONS))])
    assert not small(algorithm, "MlpPolicy", env).learn(1).ep_info_buffer


# --- actions ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("dtype", [np.int64, np.int8])
def test_integer_actions_are_stored_as_they_were_drawn(algorithm: Any, dtype: Any) -> None:
    """The buffer of SB3 cuts them to integers, whose probability the policy never gave."""
    env = ScriptedEnv(BOX, spaces.Box(-3, 3, (2,), dtype))
    model = small(algorithm, "MlpPolicy", env).learn(1)
    flat = model.rollout_buffer.flat()
    assert (flat.actions != flat.actions.round()).any()
    model = small(algorithm, "MlpPolicy", env)
    _, callback = model._setup_learn(1, None)
    model.collect_rollouts(model.env, callback, model.rollout_buffer, ROLLOUT)
    flat = model.rollout_buffer.flat()
    with th.no_grad():
        log_prob = model._actor_critic().evaluate_actor(flat.inputs, flat.actions).log_prob
    th.testing.assert_close(log_prob, flat.old_log_prob, atol=1e-5, rtol=1e-5)
