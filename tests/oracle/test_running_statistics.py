"""What several processes have seen, put together, is what one would have computed from all of it."""

from __future__ import annotations

import numpy as np
import pytest
from stable_baselines3.common.running_mean_std import RunningMeanStd
from stable_baselines3.common.vec_env import VecFrameStack, VecNormalize

from sb3_ppo_ext.common.rollout.running_statistics import put_together, running_statistics, write_into
from tests.envs import DICT, scripted


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
    assert running_statistics(scripted()) == []
    assert running_statistics(None) == []


def test_writing_changes_what_the_wrapper_holds() -> None:
    env = VecNormalize(scripted())
    (of_obs, _), new = running_statistics(env), RunningMeanStd(shape=(4,))
    new.update(np.ones((3, 4)))
    write_into(of_obs, new)
    np.testing.assert_array_equal(env.obs_rms.mean, new.mean)
    new.mean += 1.0
    assert env.obs_rms.mean[0] == pytest.approx(1.0, abs=1e-3)
