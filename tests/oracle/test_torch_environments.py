"""The batched torch environments of ``examples/`` are gymnasium's, step by step."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th

from examples.torch_environments import TorchCartPole, TorchEnv, TorchPendulum

KINDS: list[Any] = [(TorchCartPole, "CartPole-v1"), (TorchPendulum, "Pendulum-v1")]


@pytest.mark.parametrize(("kind", "env_id"), KINDS)
def test_each_step_is_gymnasiums(kind: type[TorchEnv], env_id: str) -> None:
    """From the same states, by the same actions: observations, rewards, and which episodes end."""
    ours, theirs = kind(16), gym.make(env_id).unwrapped
    theirs.reset(seed=0)
    assert ours.single_observation_space == theirs.observation_space
    assert ours.single_action_space == theirs.action_space
    ours.reset(seed=0)
    ours.single_action_space.seed(0)
    n_ends = 0
    for _ in range(60):
        states = ours.state.double().numpy()
        actions = np.stack([ours.single_action_space.sample() for _ in range(16)])
        _, rewards, terminated, truncated, extras = ours.step(th.as_tensor(actions))
        assert not truncated.any()
        for i in range(16):
            theirs.state = states[i].copy()  # type: ignore[attr-defined]
            theirs.steps_beyond_terminated = None  # type: ignore[attr-defined]
            obs, reward, is_end, _, _ = theirs.step(actions[i])
            np.testing.assert_allclose(extras["final_obs"][i], obs, rtol=1e-5, atol=1e-5)
            np.testing.assert_allclose(rewards[i], float(reward), rtol=1e-4, atol=1e-4)
            assert bool(terminated[i]) == is_end
            n_ends += is_end
    assert (n_ends > 0) == (kind is TorchCartPole)


@pytest.mark.parametrize(("kind", "env_id"), KINDS)
def test_an_episode_is_cut_where_gymnasium_cuts_it_and_begins_as_its_episodes_do(
    kind: type[TorchEnv], env_id: str
) -> None:
    ours, spec = kind(1000), gym.spec(env_id)
    first, _ = ours.reset(seed=0)
    theirs = gym.make_vec(env_id, num_envs=1000, vectorization_mode="sync").reset(seed=0)[0]
    highest = np.abs(theirs).max(axis=0)
    for quantile in (0.0, 0.25, 0.5, 0.75, 1.0):
        apart = np.quantile(first, quantile, axis=0) - np.quantile(theirs, quantile, axis=0)
        assert (np.abs(apart) < 0.15 * highest).all()
    ours.n_steps[3] = spec.max_episode_steps - 1  # type: ignore[operator]
    obs, _, terminated, truncated, extras = ours.step(th.zeros(1000, *ours.single_action_space.shape))  # type: ignore
    assert truncated.nonzero().tolist() == [[3]]
    assert not terminated[3]
    assert th.equal(obs[:3], extras["final_obs"][:3])
    assert not th.equal(obs[3], extras["final_obs"][3])
    assert ours.n_steps[:5].tolist() == [1, 1, 1, 0, 1]


def test_a_seed_gives_the_same_episodes_again() -> None:
    one, other = TorchCartPole(4), TorchCartPole(4)
    for env in (one, other):
        env.reset(seed=3)
        for _ in range(30):
            env.step(th.ones(4))
    assert th.equal(one.state, other.state)
    assert not th.equal(one.reset(seed=4)[0], other.reset(seed=3)[0])
