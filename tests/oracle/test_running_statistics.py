"""What several processes have seen, put together, is what one would have computed from all of it."""

from __future__ import annotations

import numpy as np
import pytest
import torch as th
from stable_baselines3.common.running_mean_std import RunningMeanStd
from stable_baselines3.common.vec_env import VecFrameStack, VecNormalize

from sb3_ppo_ext.common.rollout.running_statistics import put_together, running_statistics, set_running_statistics
from sb3_ppo_ext.common.rollout.tensor_envs import TensorVecEnv
from tests.envs import DICT, scripted
from tests.tensor_envs import ShortPendulum


@pytest.mark.parametrize("sizes", [[5, 5], [1, 200, 0], [0, 0]])
@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_of_all_samples(sizes: list[int], offset: float) -> None:
    rng = np.random.default_rng(0)
    before = RunningMeanStd(epsilon=0.0, shape=(3,))
    first = offset + rng.normal(size=(20, 3))
    before.update(first)
    seen = [first]
    now = [before.copy() for _ in sizes]
    for statistics, size in zip(now, sizes, strict=True):
        for _ in range(3):
            seen.append(offset + rng.normal(1.0, 2.0, size=(size, 3)))
            if size:
                statistics.update(seen[-1])
    result = put_together(before, now)
    together = np.concatenate(seen)
    assert result.count == len(together)
    np.testing.assert_allclose(result.mean, together.mean(axis=0), rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(result.var, together.var(axis=0), rtol=1e-7)


def test_nothing_new_changes_no_bit() -> None:
    before = RunningMeanStd(shape=())
    before.update(np.random.default_rng(0).normal(size=7))
    result = put_together(before, [before.copy(), before.copy()])
    assert (result.mean, result.var, result.count) == (before.mean, before.var, before.count)


def test_all_statistics_are_found() -> None:
    env = VecNormalize(VecFrameStack(VecNormalize(scripted(), norm_obs=False), 2))
    assert [np.shape(found.mean) for found in running_statistics(env)] == [(8,), (), ()]
    of_dict = VecNormalize(scripted(DICT), norm_obs_keys=["vector"])
    assert [np.shape(found.mean) for found in running_statistics(of_dict)] == [(4,), ()]
    rewards = TensorVecEnv(ShortPendulum(3), normalize_rewards=True)
    assert [np.shape(found.mean) for found in running_statistics(VecNormalize(rewards))] == [(3,), (), ()]
    assert running_statistics(TensorVecEnv(ShortPendulum(3))) == []
    assert running_statistics(scripted()) == []
    assert running_statistics(None) == []


def test_writing_changes_what_the_wrapper_holds() -> None:
    env = VecNormalize(scripted())
    of_obs, (_, of_returns), new = env.obs_rms, running_statistics(env), RunningMeanStd(shape=(4,))
    new.update(np.ones((3, 4)))
    set_running_statistics(env, [new, of_returns])
    assert env.obs_rms is of_obs
    np.testing.assert_array_equal(env.obs_rms.mean, new.mean)
    new.mean += 1.0
    assert env.obs_rms.mean[0] == pytest.approx(1.0, abs=1e-3)


def test_rewards_of_tensors_are_normalized_by_what_all_processes_have_seen() -> None:
    """Two processes with one environment each end where one with both would."""
    ours, theirs, both = (TensorVecEnv(ShortPendulum(n), normalize_rewards=True) for n in (1, 1, 2))
    rewards = np.random.default_rng(0).normal(3.0, size=(20, 2)).astype(np.float32)
    before = running_statistics(ours)
    for row in th.as_tensor(rewards):
        for env, of_env in ((ours, row[:1]), (theirs, row[1:]), (both, row)):
            env.tensor_env.step = lambda actions, r=of_env: (th.zeros(len(r), 3), r, r != r, r != r, {})
            env.make_transition(th.zeros(1))
    now = put_together(before[0], [*running_statistics(ours), *running_statistics(theirs)])
    for env in (ours, theirs):
        set_running_statistics(env, [now])
        th.testing.assert_close(env.moments_of_returns.state_dict(), both.moments_of_returns.state_dict())
