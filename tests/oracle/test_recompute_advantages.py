"""``recompute_advantages``: each epoch has the advantages and returns that SB3 would compute by the present critic."""

from __future__ import annotations

import itertools
import re
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common import buffers as sb3
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.vec_env import VecEnv

from sb3_ppo_ext import TRPO, AdaptiveKLPPO, ArrayVecEnv, DualClipPPO
from sb3_ppo_ext.common.rollout.buffers import RolloutBuffer
from tests.algorithms import PROXIMAL, ROLLOUT, assert_close_policies, assert_same_policy, have_moved, parameters, small
from tests.custom import EveryStepBuffer
from tests.envs import BOX, BOX_ACTIONS, DICT, IMAGE, scripted


class Keeps(BaseCallback):
    """
    Keeps the observations that a time limit ended episodes with, by step and environment, and the values that a rollout
    has at its end.
    """

    def __init__(self) -> None:
        super().__init__()
        self.final: dict[tuple[int, int], Any] = {}
        self.values: dict[str, Any] = {}

    def _on_rollout_start(self) -> None:
        self.final.clear()

    def _on_step(self) -> bool:
        for i, info in enumerate(self.locals["infos"]):
            if info.get("TimeLimit.truncated"):
                self.final[self.locals["n_steps"], i] = info["terminal_observation"].copy()
        return True

    def _on_rollout_end(self) -> None:
        names = ("values", "last_values", "final_values", "advantages", "returns")
        self.values = {name: getattr(self.locals["rollout_buffer"], name).copy() for name in names}


def by_sb3(model: Any, final: dict[tuple[int, int], Any]) -> tuple[np.ndarray, np.ndarray]:
    """Advantages and returns by SB3's buffer, of which the values are the policy's own; in the order of ``flat``."""
    ours, policy = model.rollout_buffer, model.policy
    was_training = policy.training
    policy.set_training_mode(False)

    def values(obs: Any) -> np.ndarray:
        with th.no_grad():
            computed: np.ndarray = policy.predict_values(policy.obs_to_tensor(obs)[0]).numpy().flatten()
        return computed

    n_steps, n_envs = ours.rewards.shape
    theirs = sb3.RolloutBuffer(
        n_steps, BOX, spaces.Discrete(2), gamma=ours.gamma, gae_lambda=ours.gae_lambda, n_envs=n_envs
    )
    theirs.rewards[:] = ours.rewards
    for (step, i), obs in final.items():
        theirs.rewards[step, i] += ours.gamma * values(obs[None])[0]
    theirs.values = np.stack([values(obs) for obs in ours.observations])
    theirs.episode_starts = ours.episode_starts
    theirs.compute_returns_and_advantage(th.as_tensor(values(model._last_obs)), model._last_episode_starts)
    policy.set_training_mode(was_training)
    return theirs.advantages.swapaxes(0, 1).flatten(), theirs.returns.swapaxes(0, 1).flatten()


def watch(model: Any, callback: Keeps) -> list[np.ndarray]:
    """
    Compare what each epoch learns from, as soon as it begins.

    :return: the advantages of each epoch
    """
    seen: list[np.ndarray] = []
    make_epoch = model._make_epoch

    def make_watched(step: Any, minibatches: Any, *args: Any) -> bool:
        expected = by_sb3(model, callback.final)

        def watched() -> Any:
            for i, (rollout, rows) in enumerate(minibatches):
                if i == 0:
                    np.testing.assert_allclose(rollout.advantages.numpy(), expected[0], atol=1e-5)
                    np.testing.assert_allclose(rollout.returns.numpy(), expected[1], atol=1e-5)
                    of_acting_policy = callback.values["values"].swapaxes(0, 1).flatten()
                    np.testing.assert_array_equal(rollout.old_values, of_acting_policy)
                    seen.append(rollout.advantages.numpy().copy())
                yield rollout, rows

        goes_on: bool = make_epoch(step, watched(), *args)
        return goes_on

    model._make_epoch = make_watched
    return seen


@pytest.mark.parametrize(
    ("algorithm", "obs_space", "kwargs"),
    [
        (DualClipPPO, BOX, {}),
        (DualClipPPO, BOX, {"torch_compile": True, "clip_range_vf": 0.1}),
        (AdaptiveKLPPO, BOX, {"torch_compile": True, "kl_adaptive_lr": {}}),
        (DualClipPPO, IMAGE, {"policy": "CnnPolicy", "policy_kwargs": {"share_features_extractor": False}}),
        (DualClipPPO, BOX, {"policy_kwargs": {"activation_fn": th.nn.modules.Dropout}}),
        (DualClipPPO, BOX, {"target_kl": 0.5, "rollback": True}),
    ],
    ids=["flat", "compiled", "compiled, all at once", "images", "noise in training", "rollback"],
)
@pytest.mark.usefixtures("without_compiler")
def test_each_epoch_has_the_targets_of_its_critic(algorithm: Any, obs_space: Any, kwargs: dict[str, Any]) -> None:
    def made(**more: Any) -> Any:
        env = scripted(obs_space, BOX_ACTIONS)
        arguments = {"policy": "MlpPolicy", "n_epochs": 3, "learning_rate": 0.005, **kwargs, **more}
        return small(algorithm, arguments.pop("policy"), env, **arguments)

    model, callback = made(recompute_advantages=True), Keeps()
    seen = watch(model, callback)
    model.learn(2 * ROLLOUT * model.n_envs, callback=callback)
    assert len(seen) == 2 * 3
    assert len(callback.final) >= 3
    assert all(np.abs(before - after).max() > 1e-3 for before, after in itertools.pairwise(seen))
    # The rollout stays what it was, for whoever looks at it.
    for name, array in callback.values.items():
        np.testing.assert_array_equal(getattr(model.rollout_buffer, name), array)
    np.testing.assert_array_equal(model.rollout_buffer.flat().advantages, seen[3])
    assert have_moved(made().learn(2 * ROLLOUT * model.n_envs), parameters(model))
    if "torch_compile" in kwargs:
        eager = made(recompute_advantages=True, torch_compile=False).learn(2 * ROLLOUT * model.n_envs)
        assert_close_policies(eager, model, atol=1e-5)


def test_the_first_epoch_is_as_ever() -> None:
    """Where a limit ends the first, nothing is computed anew."""
    kwargs: dict[str, Any] = {"batch_size": 16, "target_kl": 1e-9, "learning_rate": 0.01}
    with_it, without = (
        small(DualClipPPO, "MlpPolicy", scripted(), recompute_advantages=anew, **kwargs).learn(ROLLOUT)
        for anew in (True, False)
    )
    assert without.logger.name_to_value["train/early_stop_epoch"] == 0
    assert_same_policy(with_it, without)


def limited_cart_poles() -> VecEnv:
    return ArrayVecEnv(gym.make_vec("CartPole-v1", num_envs=2, max_episode_steps=7))


@pytest.mark.parametrize(
    ("policy", "make_env"), [("MultiInputPolicy", lambda: scripted(DICT)), ("MlpPolicy", limited_cart_poles)]
)
def test_by_the_same_parameters_they_are_those_of_the_rollout(policy: str, make_env: Any) -> None:
    model, callback = small(DualClipPPO, policy, make_env(), recompute_advantages=True), Keeps()
    model.train = lambda: None
    buffer = model.learn(ROLLOUT, callback=callback).rollout_buffer
    assert buffer.truncated.any()
    buffer.advantages, buffer.returns = np.zeros_like(buffer.advantages), np.zeros_like(buffer.returns)
    model._compute_targets_anew()
    for name, array in callback.values.items():
        np.testing.assert_allclose(getattr(buffer, name), array, atol=1e-6)


class OwnGet(RolloutBuffer):
    def get(self, batch_size: int | None = None) -> Any:
        return super().get(batch_size)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"n_epochs": 1}, "recompute_advantages=True is not allowed with n_epochs=1"),
        (
            {"policy": "MlpLstmPolicy"},
            "recompute_advantages=True is not allowed with policy=MlpLstmPolicy, which has a memory",
        ),
        (
            {"rollout_buffer_class": EveryStepBuffer},
            "is not allowed with rollout_buffer_class=EveryStepBuffer: it must",
        ),
        ({"rollout_buffer_class": OwnGet}, "recompute_advantages=True is not allowed with rollout_buffer_class=OwnGet"),
        ({"recompute_advantages": 1}, "recompute_advantages=1 is not allowed: it must be True or False"),
    ],
)
@pytest.mark.parametrize("algorithm", PROXIMAL)
def test_where_it_cannot_hold(algorithm: Any, kwargs: dict[str, Any], message: str) -> None:
    arguments = {"policy": "MlpPolicy", "recompute_advantages": True, **kwargs}
    with pytest.raises(ValueError, match=re.escape(message)):
        small(algorithm, arguments.pop("policy"), "CartPole-v1", **arguments)
    with pytest.raises(TypeError, match="recompute_advantages"):
        small(TRPO, "MlpPolicy", "CartPole-v1", recompute_advantages=True)
