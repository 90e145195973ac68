"""Which masks are taken: those of the environments that are acted in, as they are now, whatever happened before."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
from stable_baselines3.common.callbacks import BaseCallback, EvalCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

from sb3_ppo_ext import DualClipPPO
from tests.contract.test_masks import ALGORITHMS, Forbids, policy_of

CONVENTIONS = ["method", "info", "observation"]


def make(says: str, n_envs: int = 1, seed: int = 0) -> Any:
    return make_vec_env(lambda: Forbids("discrete", says), n_envs=n_envs, seed=seed)


def trained(says: str, env: Any) -> DualClipPPO:
    return DualClipPPO(policy_of(says), env, seed=0, device="cpu", **ALGORITHMS[DualClipPPO]).learn(16)


class Ends(BaseCallback):
    """Ends training after some steps, by False or by what Ctrl-C raises."""

    def __init__(self, after: int, *, interrupts: bool) -> None:
        super().__init__()
        self.after, self.interrupts = after, interrupts

    def _on_step(self) -> bool:
        if self.n_calls == self.after and self.interrupts:
            raise KeyboardInterrupt
        return self.n_calls < self.after


@pytest.mark.parametrize("interrupts", [False, True])
@pytest.mark.parametrize("says", CONVENTIONS)
@pytest.mark.parametrize("algorithm", ALGORITHMS, ids=lambda a: a.__name__)
def test_learning_on_after_a_stop_within_a_rollout(algorithm: Any, says: str, interrupts: bool) -> None:
    model = algorithm(policy_of(says), make(says, 2), seed=0, device="cpu", **ALGORITHMS[algorithm])
    for after in (5, 7, 3):
        try:
            model.learn(100, callback=Ends(after, interrupts=interrupts), reset_num_timesteps=False)
        except KeyboardInterrupt:
            assert interrupts
    model.learn(40, reset_num_timesteps=False)


@pytest.mark.parametrize("says", ["method", "info"])
def test_learning_on_after_someone_else_has_stepped_the_environments(says: str) -> None:
    env = make(says, 2)
    model = trained(says, env)
    for n_steps in (3, 7, 9, 11):
        obs = env.reset()
        for _ in range(n_steps):
            obs, *_ = env.step(model.predict(obs)[0])
        model.learn(4, reset_num_timesteps=False)


class StepsByItself(DummyVecEnv):
    """Steps without ``step_wait()``, as vectors in one array may."""

    def step(self, actions: Any) -> Any:
        self.step_async(actions)
        return DummyVecEnv.step_wait(self)


def test_a_vector_with_a_step_of_its_own() -> None:
    env = StepsByItself([lambda: Forbids("discrete", "info")] * 2)
    model = DualClipPPO("MlpPolicy", env, seed=0, device="cpu", **ALGORITHMS[DualClipPPO]).learn(64)
    evaluate_policy(model, env, n_eval_episodes=4, warn=False)


@pytest.mark.parametrize("keeps_info", [True, False])
def test_one_environment_in_a_loop(keeps_info: bool) -> None:
    """Also where the info of a reset is passed over, and the one at hand is of the episode before."""
    env = Forbids("discrete", "info")
    model = trained("info", make("info", 2))
    obs, info = env.reset(seed=0)
    for _ in range(200):
        obs, _, is_over, _, info = env.step(model.predict(obs)[0])
        if is_over and keeps_info:
            obs, info = env.reset()
        elif is_over:
            obs, _ = env.reset()
    assert "action_mask" in info
    copy.deepcopy(env).reset()


@pytest.mark.parametrize("says", CONVENTIONS)
def test_whatever_the_variables_are_called(says: str) -> None:
    model = trained(says, make(says))
    vectors = model.get_env()
    assert vectors is not None
    for _ in range(3):
        obs = vectors.reset()
        done: Any = False  # as in scripts for one environment
        for _ in range(8):
            action, _ = model.predict(obs)  # type: ignore[arg-type]
            obs, _, done, info = vectors.step(action)
    assert done is not False
    assert len(info) == 1


@pytest.mark.parametrize("says", CONVENTIONS)
def test_the_nearest_environment_counts(says: str) -> None:
    def play(model: DualClipPPO, other: Any) -> None:
        obs = other.reset()
        for _ in range(20):
            obs, *_ = other.step(model.predict(obs)[0])

    env = make(says)
    play(trained(says, env), make(says, seed=5))


def test_between_two_environments_the_observations_decide() -> None:
    env, other = make("method"), make("method", seed=5)
    model = trained("method", env)
    env.reset()
    obs = other.reset()
    assert not np.array_equal(env.env_method("action_masks"), other.env_method("action_masks"))
    for _ in range(20):
        obs, *_ = other.step(model.predict(obs)[0])
    obs = env.reset()
    for _ in range(20):
        obs, *_ = env.step(model.predict(obs)[0])


def test_between_two_environments_that_do_not_show_their_observations_nothing_is_guessed() -> None:
    env, other = Forbids(), Forbids()
    model = trained("method", make("method"))
    env.reset(seed=0)
    obs, _ = other.reset(seed=5)
    assert not np.array_equal(env.action_masks(), other.action_masks())
    with pytest.raises(ValueError, match="several environments of the caller"):
        model.predict(obs)


class Open(Forbids):
    """Says nothing, and allows everything."""

    def _next(self) -> tuple[Any, dict[str, Any]]:
        obs, info = super()._next()
        self._mask[:] = True
        return obs, info


def test_environments_without_masks_and_back() -> None:
    env = make("method", 2)
    free = make_vec_env(lambda: Open("discrete", "none"), n_envs=2, seed=0)
    model = trained("method", env)
    with pytest.raises(ValueError, match="no environment was found that says which actions are allowed now"):
        evaluate_policy(model, free, 2)
    with pytest.raises(ValueError, match="no environment was found that says which actions are allowed now"):
        evaluate_policy(model.policy, free, 2)
    model.set_env(free)
    model.learn(32, callback=EvalCallback(free, eval_freq=4, n_eval_episodes=1, verbose=0))
    evaluate_policy(model.policy, free, 2)
    model.set_env(env)
    model.learn(32)
    evaluate_policy(model, env, 2)


def test_masks_ignored_and_then_heeded() -> None:
    class Lenient(Forbids):
        is_lenient = False

        def step(self, action: Any) -> Any:
            if self.is_lenient:
                self._mask[:] = True
            return super().step(action)

    env = make_vec_env(lambda: Lenient("discrete", "info"), n_envs=2, seed=0)
    model = DualClipPPO("MlpPolicy", env, seed=0, device="cpu", **ALGORITHMS[DualClipPPO])
    for Lenient.is_lenient in (True, False, True, False):
        model.learn(38, use_masking=not Lenient.is_lenient, reset_num_timesteps=False)


def test_a_normalizer_of_evaluation_keeps_no_mask_from_the_policy() -> None:
    """It has not been told to leave the mask alone, as the one of the training has."""
    env = make("observation")
    model = trained("observation", VecNormalize(env))
    other = VecNormalize(make("observation", seed=3), norm_reward=False)
    evaluate_policy(model, other, 5)
    obs: Any = other.reset()
    right = {**obs, "action_mask": other.get_original_obs()["action_mask"]}  # type: ignore[call-overload]
    assert not np.array_equal(obs["action_mask"], right["action_mask"])
    del env
    seen = []
    model.policy.pi_features_extractor.register_forward_pre_hook(lambda _, args: seen.append(args[0]["action_mask"]))
    model.predict(obs)
    assert np.array_equal(seen[0].numpy(), right["action_mask"])


def test_given_masks_are_one_for_each_observation() -> None:
    model = trained("method", make("method"))
    with pytest.raises(ValueError, match="action_masks of 5 environments are not allowed"):
        model.predict(np.zeros((2, 3), np.float32), action_masks=np.ones(5, bool))
    with pytest.raises(ValueError, match="action_masks of 2 environments are not allowed"):
        model.predict(np.zeros(3, np.float32), action_masks=np.ones((2, 5), bool))


def test_a_policy_that_a_callback_makes_unable_to_heed_masks() -> None:
    class Hooks(BaseCallback):
        def _on_rollout_start(self) -> None:
            self.model.policy.register_forward_hook(lambda *_: None)

        def _on_step(self) -> bool:
            return True

    model = DualClipPPO("MlpPolicy", make("method"), device="cpu", **ALGORITHMS[DualClipPPO])
    with pytest.raises(ValueError, match="the environments mask actions, and the policy has hooks"):
        model.learn(32, callback=Hooks())
