"""Environments in whole arrays are what they are through DummyVecEnv: the same rollouts and parameters, to the bit."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.utils import explained_variance
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv, VecFrameStack, VecNormalize

from sb3_ppo_ext import REINFORCE, TRPO, AdaptiveKLPPO, DualClipPPO
from sb3_ppo_ext.common.rollout.array_envs import ArrayVecEnv
from tests.algorithms import ROLLOUT, STEP_BASED, assert_same_policy, small
from tests.envs import BOX, BOX_ACTIONS, DICT, ScriptedEnv
from tests.vectors import MakeEnv, NativeVector, Pool, WithResetSteps, scripted_envs, wrapped

N_ENVS = 3
OF_BUFFER = ("actions", "rewards", "episode_starts", "truncated", "terminated", "final_values", "advantages", "returns")


def dummy(makers: Sequence[MakeEnv]) -> VecEnv:
    env = DummyVecEnv(wrapped(Monitor, makers))
    env.seed(0)
    return env


def trained(algorithm: Any, env: Any, policy: str = "MlpPolicy", **kwargs: Any) -> Any:
    return small(algorithm, policy, env, **kwargs).learn(2 * ROLLOUT * N_ENVS)


def assert_same_training(one: Any, other: Any) -> None:
    """The last rollout, the parameters after it, and what the logs say of episodes."""
    for name in OF_BUFFER:
        np.testing.assert_array_equal(getattr(one.rollout_buffer, name), getattr(other.rollout_buffer, name), name)
    a, b = one.rollout_buffer.observations, other.rollout_buffer.observations
    for key in a if isinstance(a, dict) else [...]:
        np.testing.assert_array_equal(a[key], b[key])
    assert_same_policy(one, other)
    of_one, of_other = ([(e["r"], e["l"]) for e in model.ep_info_buffer] for model in (one, other))
    assert of_one == of_other
    assert one.num_timesteps == other.num_timesteps


ENVS = scripted_envs(N_ENVS)
VECTORS: dict[str, Callable[[], Any]] = {
    **{f"sync, {mode.value}": partial(SyncVectorEnv, ENVS, autoreset_mode=mode) for mode in AutoresetMode},
    "sync, without copies": lambda: SyncVectorEnv(ENVS, copy=False),
    "native, SameStep": lambda: NativeVector(ENVS, AutoresetMode.SAME_STEP),
    "pool": lambda: Pool(ENVS),
}


@pytest.mark.parametrize("vector", VECTORS)
def test_every_way_to_begin_episodes(vector: str) -> None:
    theirs = trained(DualClipPPO, dummy(ENVS))
    assert theirs.rollout_buffer.truncated.any()
    assert theirs.rollout_buffer.terminated.any()
    assert theirs.rollout_buffer.final_values.any()
    assert_same_training(theirs, trained(DualClipPPO, VECTORS[vector]()))


@pytest.fixture
def workers() -> Iterator[Callable[..., AsyncVectorEnv]]:
    made: list[AsyncVectorEnv] = []

    def make(*args: Any, **kwargs: Any) -> AsyncVectorEnv:
        made.append(AsyncVectorEnv(*args, **kwargs))
        return made[-1]

    yield make
    for env in made:
        env.close()


@pytest.mark.parametrize("mode", AutoresetMode)
def test_worker_processes(mode: AutoresetMode, workers: Any) -> None:
    async_env = workers(ENVS, autoreset_mode=mode)
    assert_same_training(trained(DualClipPPO, dummy(ENVS)), trained(DualClipPPO, async_env))


def test_worker_processes_without_shared_memory(workers: Any) -> None:
    """They reset at their next step what has been reset already, so it is left to them."""
    async_env = workers(ENVS, shared_memory=False)
    native = NativeVector(ENVS)
    assert_same_training(trained(DualClipPPO, native), trained(DualClipPPO, async_env))


@pytest.mark.parametrize(
    ("algorithm", "policy", "makers"),
    [
        (DualClipPPO, "MultiInputPolicy", scripted_envs(N_ENVS, obs_space=DICT)),
        (AdaptiveKLPPO, "MlpPolicy", scripted_envs(N_ENVS, BOX_ACTIONS)),
        (TRPO, "MlpPolicy", scripted_envs(N_ENVS, BOX_ACTIONS)),
        (REINFORCE, "MlpPolicy", scripted_envs(N_ENVS, spaces.MultiBinary(2), spaces.Discrete(5))),
    ],
)
def test_every_algorithm_and_space(algorithm: Any, policy: str, makers: list[MakeEnv]) -> None:
    one, other = (trained(algorithm, env, policy) for env in (dummy(makers), SyncVectorEnv(makers)))
    assert_same_training(one, other)


@pytest.mark.parametrize("algorithm", [DualClipPPO, REINFORCE])
def test_memory(algorithm: Any) -> None:
    kwargs = {"policy": "MlpLstmPolicy", "policy_kwargs": {"lstm_hidden_size": 4}}
    one, other = (trained(algorithm, env, **kwargs) for env in (dummy(ENVS), SyncVectorEnv(ENVS)))
    assert_same_training(one, other)


@pytest.mark.parametrize("wrap", [VecNormalize, partial(VecFrameStack, n_stack=2)], ids=["normalised", "stacked"])
@pytest.mark.parametrize("mode", [AutoresetMode.SAME_STEP, AutoresetMode.NEXT_STEP])
def test_wrappers_of_sb3(wrap: Any, mode: AutoresetMode) -> None:
    arrays = ArrayVecEnv(SyncVectorEnv(ENVS, autoreset_mode=mode))
    envs = [wrap(env) for env in (dummy(ENVS), arrays)]
    assert_same_training(*(trained(DualClipPPO, env) for env in envs))
    if wrap is VecNormalize:
        np.testing.assert_array_equal(envs[0].obs_rms.mean, envs[1].obs_rms.mean)
        np.testing.assert_array_equal(envs[0].ret_rms.var, envs[1].ret_rms.var)


class Masked(ScriptedEnv):
    """Allows two of three actions, others after each step, none after the last, and says so in one of three ways."""

    def __init__(self, convention: str, first_length: int) -> None:
        super().__init__(
            BOX, spaces.Discrete(3), script=((first_length, True, False), (2, False, True), (4, True, True))
        )
        self._convention = convention
        if convention == "observation":
            self.observation_space = spaces.Dict(
                {"vector": self.observation_space, "action_mask": spaces.Box(0, 1, (3,), np.int8)}
            )
        if convention == "method":
            self.action_masks = self._mask

    def _mask(self) -> np.ndarray:
        is_over = self._steps == self._script[self._episode % len(self._script)][0]
        return (np.arange(3) != (self._steps + self._episode) % 3) & (not is_over)

    def _said(self, obs: Any) -> tuple[Any, dict[str, Any]]:
        if self._convention == "observation":
            obs["action_mask"] = self._mask().astype(np.int8)
        return obs, {"action_mask": self._mask()} if self._convention == "info" else {}

    def reset(self, **kwargs: Any) -> tuple[Any, dict[str, Any]]:
        return self._said(super().reset(**kwargs)[0])

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        assert self._mask()[action]
        obs, reward, terminated, truncated, _ = super().step(action)
        obs, info = self._said(obs)
        return obs, reward, terminated, truncated, info


def masked(convention: str) -> list[Callable[[], Masked]]:
    return [partial(Masked, convention, first_length) for first_length in (1, 2, 3)]


@pytest.mark.parametrize("mode", AutoresetMode)
@pytest.mark.parametrize("convention", ["method", "info", "observation"])
def test_masks(convention: str, mode: AutoresetMode) -> None:
    makers = masked(convention)
    policy = "MultiInputPolicy" if convention == "observation" else "MlpPolicy"
    arrays = SyncVectorEnv(makers, autoreset_mode=mode)
    one, other = (trained(DualClipPPO, env, policy) for env in (dummy(makers), arrays))
    np.testing.assert_array_equal(one.rollout_buffer.action_masks, other.rollout_buffer.action_masks)
    assert not one.rollout_buffer.action_masks.all()
    assert_same_training(one, other)
    rewards = [evaluate_policy(other, ArrayVecEnv(SyncVectorEnv(makers, autoreset_mode=mode)), 6, deterministic=False)]
    assert np.isfinite(rewards).all()  # and the environments have refused no action


@pytest.mark.parametrize("convention", ["info", "observation"])
def test_masks_do_not_matter_where_a_step_only_begins_an_episode(convention: str) -> None:
    env = NativeVector(masked(convention))
    model = trained(DualClipPPO, env, "MultiInputPolicy" if convention == "observation" else "MlpPolicy")
    n_allowed = model.rollout_buffer.action_masks.sum(axis=2)
    np.testing.assert_array_equal(n_allowed, np.where(model.rollout_buffer.counts, 2, 3))


class CountsByInfos(BaseCallback):
    """Tells a rollout of :class:`WithResetSteps` which steps count."""

    def _on_rollout_start(self) -> None:
        self._counts: list[list[bool]] = []

    def _on_step(self) -> bool:
        self._counts.append(["is_reset_step" not in info for info in self.locals["infos"]])
        return True

    def _on_rollout_end(self) -> None:
        self.model.rollout_buffer.counts = np.array(self._counts)


@pytest.mark.parametrize("algorithm", STEP_BASED)
def test_steps_that_only_begin_an_episode(algorithm: Any) -> None:
    """They are episodes of one step, which are left out of what is learnt from."""
    env = DummyVecEnv(wrapped(WithResetSteps, ENVS))
    theirs = small(algorithm, "MlpPolicy", env).learn(2 * ROLLOUT * N_ENVS, callback=CountsByInfos())
    ours = trained(algorithm, NativeVector(ENVS))
    np.testing.assert_array_equal(theirs.rollout_buffer.counts, ours.rollout_buffer.counts)
    counts = ours.rollout_buffer.counts
    assert not counts.all()
    explained = explained_variance(ours.rollout_buffer.values[counts], ours.rollout_buffer.returns[counts])
    assert ours.logger.name_to_value["train/explained_variance"] == pytest.approx(explained)
    flat = ours.rollout_buffer.flat()
    np.testing.assert_array_equal(flat.returns, ours.rollout_buffer.returns.T[counts.T])
    theirs.ep_info_buffer.clear()
    ours.ep_info_buffer.clear()
    assert_same_training(theirs, ours)


def test_reinforce_has_the_same_episodes_with_and_without_steps_that_only_begin_them() -> None:
    """Each environment has its own generators, so one that waits is not told apart from one that acts."""
    models = [small(REINFORCE, "MlpPolicy", env, baseline="none").learn(1) for env in (dummy(ENVS), NativeVector(ENVS))]
    one, other = (model.rollout_buffer.flat() for model in models)
    th.testing.assert_close(other.observations, one.observations, atol=0.0, rtol=0.0)
    th.testing.assert_close(other.returns, one.returns)
    for a, b in zip(*(model.rollout_buffer.episode_index() for model in models), strict=True):
        assert a.tolist() == b.tolist()


@pytest.mark.usefixtures("without_compiler")
def test_one_compiled_step_for_rollouts_of_any_number_of_samples(programs: list[str]) -> None:
    eager, compiled = (
        trained(DualClipPPO, NativeVector(ENVS), batch_size=16, torch_compile=on) for on in (False, True)
    )
    assert programs.count("the gradient step") == 1
    th.testing.assert_close(compiled.policy.state_dict(), eager.policy.state_dict(), atol=1e-6, rtol=1e-5)


@pytest.mark.filterwarnings("ignore:.*precision lowered by casting")  # of EnvPool's spaces
@pytest.mark.parametrize("env_id", ["CartPole-v1", "HalfCheetah-v5"])
def test_envpool(env_id: str) -> None:
    """Beside pools of one environment each, with the same seeds."""
    envpool = pytest.importorskip("envpool")

    class One(gym.Env[Any, Any]):
        def __init__(self, seed: int) -> None:
            self._pool = make(num_envs=1, env_seed=[seed])
            self.observation_space, self.action_space = self._pool.observation_space, self._pool.action_space

        def reset(self, **_: Any) -> tuple[Any, dict[str, Any]]:
            return self._pool.reset()[0][0], {}

        def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
            obs, reward, terminated, truncated, _ = self._pool.step(np.array([action]))
            return obs[0], reward[0], bool(terminated[0]), bool(truncated[0]), {}

    make = partial(envpool.make_gymnasium, env_id, max_episode_steps=10, num_threads=1)
    alone = DummyVecEnv([partial(One, seed) for seed in (1, 2, 3)])
    pool = make(num_envs=N_ENVS, env_seed=[1, 2, 3])
    th.manual_seed(0)
    models = [small(DualClipPPO, "MlpPolicy", env, seed=None) for env in (alone, pool)]
    models[1].policy.load_state_dict(models[0].policy.state_dict())
    for model in models:
        np.random.seed(0)  # noqa: NPY002
        th.manual_seed(0)
        model.learn(2 * ROLLOUT * N_ENVS)
        model.ep_info_buffer.clear()
    assert_same_training(*models)
