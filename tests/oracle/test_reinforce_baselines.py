"""REINFORCE's baselines by hand and in closed form, and the variance that they are for."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch as th

from sb3_ppo_ext.common.rollout import data
from sb3_ppo_ext.losses.baselines import leave_one_out, mean_of_other_episodes, optimal_of_other_episodes
from tests.oracle.tabular import (
    GAMMA,
    RETURNS,
    TRAJECTORIES,
    Trajectory,
    agent,
    gradient_estimate,
    probability,
    rewards_to_go,
    scores,
    statistics_of,
)


def variances(n_batches: int, batch_size: int, settings: dict[str, dict[str, Any]]) -> dict[str, float]:
    """Sum over the parameters of the estimates' variances, of the same batches for all."""
    drawn = np.random.default_rng(0).choice(
        len(TRAJECTORIES), size=(n_batches, batch_size), p=[probability(trajectory) for trajectory in TRAJECTORIES]
    )
    result = {}
    for name, kwargs in settings.items():
        model = agent(batch_size, **kwargs)
        estimates = [gradient_estimate(model, [TRAJECTORIES[i] for i in batch]) for batch in drawn]
        result[name] = float(np.var(estimates, axis=0).sum())
    return result


def test_variance_of_returns() -> None:
    """What was earned before an action adds noise only. Found: 21.6 and 6.2."""
    found = variances(
        500,
        8,
        {"total": {"returns": "total"}, "reward_to_go": {"returns": "reward_to_go", "discount_from": "start"}},
    )
    assert found["total"] > 2.0 * found["reward_to_go"], found


@pytest.mark.parametrize("returns", RETURNS)
def test_variance_of_baselines(returns: Any) -> None:
    """Found: 6.7, 2.0, 1.0 and 2.7 for rewards to go; 21.5, 4.3, 3.2 and 3.4 for total returns."""
    names = ("none", "mean", "optimal", "leave_one_out")
    found = variances(
        300, 8, {name: {"returns": returns, "discount_from": "start", "baseline": name} for name in names}
    )
    assert found["none"] > 1.5 * found["mean"], found
    assert found["mean"] > 1.15 * found["optimal"], found
    assert found["none"] > 1.5 * found["leave_one_out"], found


@pytest.mark.parametrize("returns", RETURNS)
def test_optimal_constant_has_the_least_variance(returns: Any) -> None:
    """The exact variance is a parabola in the constant; its minimum, by three of its points, is ``E[S'g] / E[S'S]``."""
    p = np.array([probability(trajectory) for trajectory in TRAJECTORIES])

    def gradient(trajectory: Trajectory, constant: float) -> np.ndarray:
        earned = np.array(rewards_to_go(trajectory))
        if returns == "total":
            return (earned[0] - constant) * scores(trajectory).sum(axis=0)
        return (GAMMA ** np.arange(len(earned)) * (earned - constant)) @ scores(trajectory)

    def variance(constant: float) -> float:
        gradients = np.array([gradient(trajectory, constant) for trajectory in TRAJECTORIES])
        return float(p @ np.square(gradients - p @ gradients).sum(axis=1))

    low, middle, high = variance(0.0), variance(1.0), variance(2.0)
    minimum = 1.0 + 0.5 * (low - high) / (low - 2.0 * middle + high)

    model = agent(len(TRAJECTORIES), returns=returns, discount_from="start", baseline="optimal")
    dots, squares = statistics_of(model, TRAJECTORIES)
    assert p @ dots / (p @ squares) == pytest.approx(minimum, rel=1e-5)


def test_mean_of_other_episodes() -> None:
    """
    Episodes of 3, 1 and 2 steps. Others of the first: (10 + 4 + 6) / 3 = 20 / 3; of the second:
    (1 + 2 + 3 + 4 + 6) / 5 = 3.2; of the third: (1 + 2 + 3 + 10) / 4 = 4.
    """
    returns, episode = th.tensor([1.0, 2.0, 3.0, 10.0, 4.0, 6.0]), th.tensor([0, 0, 0, 1, 2, 2])
    expected = th.tensor([20 / 3, 20 / 3, 20 / 3, 3.2, 4.0, 4.0])
    th.testing.assert_close(mean_of_other_episodes(returns, episode, 3), expected)


def test_leave_one_out() -> None:
    """
    Step 0: 1, 10 and 4, so the others' means are 14 / 2, 5 / 2 and 11 / 2. Step 1: 2, nothing and 6, so 6 / 2 and
    2 / 2. Step 2: 3, nothing and nothing, so 0.
    """
    returns, episode = th.tensor([1.0, 2.0, 3.0, 10.0, 4.0, 6.0]), th.tensor([0, 0, 0, 1, 2, 2])
    step = th.tensor([0, 1, 2, 0, 0, 1])
    expected = th.tensor([7.0, 3.0, 0.0, 2.5, 5.5, 1.0])
    th.testing.assert_close(leave_one_out(returns, episode, step, 3), expected)


def test_optimal_of_other_episodes() -> None:
    """(6 - 1) / (2 + 4), (2 - 1) / (1 + 4) and (2 + 6) / (1 + 2)."""
    found = optimal_of_other_episodes(th.tensor([2.0, 6.0, -1.0]), th.tensor([1.0, 2.0, 4.0]))
    th.testing.assert_close(found, th.tensor([5 / 6, 0.2, 8 / 3]))


def test_optimal_where_the_others_have_no_score() -> None:
    found = optimal_of_other_episodes(th.tensor([2.0, 0.0, 0.0]), th.tensor([0.5, 0.0, 0.0]))
    th.testing.assert_close(found, th.tensor([0.0, 4.0, 4.0]))


def test_optimal_beside_an_episode_that_dwarfs_the_others() -> None:
    """(2 + 6) / (1 + 3) for the first, which taking it off the total of 1e9 would round away."""
    found = optimal_of_other_episodes(th.tensor([3e9, 2.0, 6.0]), th.tensor([1e9, 1.0, 3.0]))
    th.testing.assert_close(found, th.tensor([2.0, 3.0, 3.0]))


@pytest.mark.parametrize("chunk", [1, 2, 100])
def test_score_statistics(monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    monkeypatch.setattr(data, "CHUNK_ROWS", chunk)
    expected = []
    for trajectory in TRAJECTORIES:
        discounted = (GAMMA ** np.arange(len(trajectory.states)))[:, None] * scores(trajectory)
        score, gradient = discounted.sum(axis=0), np.array(rewards_to_go(trajectory)) @ discounted
        expected.append((score @ gradient, score @ score))
    model = agent(len(TRAJECTORIES), discount_from="start", baseline="optimal")
    np.testing.assert_allclose(np.transpose(statistics_of(model, TRAJECTORIES)), expected, rtol=1e-5, atol=1e-6)
