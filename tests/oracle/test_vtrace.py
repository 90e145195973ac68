"""V-trace against numbers worked by hand, a plain loop, GAE, and the values of a process with listed trajectories."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch as th
from torch.fx.experimental.proxy_tensor import make_fx

from sb3_ppo_ext.losses import VTrace, generalized_advantages, vtrace
from tests.oracle.tabular import DYNAMICS, END, GAMMA, HORIZON, TRAJECTORIES, policy_table
from tests.oracle.test_targets import HAND, Rollout, column, random_rollout

NO = th.zeros(1, 1, dtype=th.bool)


def random_ratios(rollout: Rollout, seed: int = 3) -> th.Tensor:
    log_ratios = np.random.default_rng(seed).normal(size=tuple(rollout.rewards.shape))
    return th.from_numpy(log_ratios).to(rollout.rewards.dtype)


def targets(rollout: Rollout, log_ratios: th.Tensor, **kwargs: Any) -> VTrace:
    final_values = kwargs.pop("final_values", rollout.final_values)
    return vtrace(*rollout[:5], log_ratios, **{"gamma": 0.9, "final_values": final_values, **kwargs})


@pytest.mark.parametrize(
    ("ratio", "rho_bar", "v"),
    [
        (0.5, 1.0, 6.5),  # 4 + 0.5 * 5
        (2.0, 1.0, 9.0),  # 4 + 5
        (2.0, 1.5, 11.5),  # 4 + 1.5 * 5
        (2.0, math.inf, 14.0),  # 4 + 2 * 5
        (2.0, 0.0, 4.0),
    ],
)
def test_one_step_by_hand(ratio: float, rho_bar: float, v: float) -> None:
    """The TD error is 3 + 12/2 - 4 = 5, whatever the ratio; and the advantage."""
    found = vtrace(
        column(3), column(4), th.tensor([12.0]), NO, NO, column(ratio).log(), gamma=0.5, rho_bar=rho_bar, c_bar=0.0
    )
    th.testing.assert_close(found, VTrace(column(5.0), column(v)))


def test_three_steps_by_hand() -> None:
    """gamma 1/2, lambda 1, TD errors 2, 4, 8; what follows counts 1/2 of min(c_bar, ratio)."""
    found = vtrace(
        column(2, 4, 8),
        column(0, 0, 0),
        th.zeros(1),
        th.zeros(3, 1, dtype=th.bool),
        th.zeros(3, 1, dtype=th.bool),
        column(0.5, 3, 1.5).log(),
        gamma=0.5,
        rho_bar=2.0,
        c_bar=1.0,
    )
    # 1.5 * 8 = 12; 2 * 4 + 1/2 * 1 * 12 = 14; 1/2 * 2 + 1/2 * 1/2 * 14 = 4.5
    th.testing.assert_close(found.returns, column(4.5, 14.0, 12.0))
    # 8; 4 + 12/2; 2 + 14/2
    th.testing.assert_close(found.advantages, column(9.0, 10.0, 8.0))


@pytest.mark.parametrize("gae_lambda", [0.0, 0.7, 1.0])
@pytest.mark.parametrize("rho_bar", [1.0, math.inf])
def test_of_equal_policies_it_is_gae(gae_lambda: float, rho_bar: float) -> None:
    rollout = random_rollout(33, seed=5)
    mask = th.from_numpy(np.random.default_rng(1).random((33, 3)) < 0.8)
    for counts in (None, mask):
        found = targets(rollout, th.zeros(33, 3), gae_lambda=gae_lambda, rho_bar=rho_bar, mask=counts)
        advantages = rollout.to(generalized_advantages, gamma=0.9, gae_lambda=gae_lambda, mask=counts)
        th.testing.assert_close(found.advantages, advantages)
        values = rollout.values if counts is None else th.where(counts, rollout.values, 0.0)
        th.testing.assert_close(found.returns, advantages + values)


def test_by_hand_of_equal_policies() -> None:
    found = targets(HAND, th.zeros(8, 1), gamma=0.5, gae_lambda=0.5)
    assert th.equal(found.returns, column(3.25, 5, 5, 6, 4.5, 7, 7.75, 11))


def looped(
    rollout: Rollout, log_ratios: th.Tensor, mask: th.Tensor, gamma: float, lam: float, rho: float, c: float
) -> Any:
    """In Python's floats, one step of one environment at a time, from the last to the first."""
    n_steps, n_envs = rollout.rewards.shape
    rewards, values, last_values, terminated, truncated, final_values = (x.tolist() for x in rollout)
    counts, logs = mask.tolist(), log_ratios.tolist()
    returns, advantages = np.zeros((n_steps, n_envs)), np.zeros((n_steps, n_envs))
    for env in range(n_envs):
        value_after, return_after = last_values[env], last_values[env]
        for t in reversed(range(n_steps)):
            if counts[t][env]:
                if terminated[t][env]:
                    value_after = return_after = 0.0
                elif truncated[t][env]:
                    value_after = return_after = final_values[t][env]
                ratio = math.exp(logs[t][env])
                error = rewards[t][env] + gamma * value_after - values[t][env]
                after = gamma * lam * (return_after - value_after)
                returns[t, env] = values[t][env] + min(rho, ratio) * error + min(c, ratio) * after
                advantages[t, env] = error + after
                return_after = returns[t, env]
            else:
                return_after = values[t][env]
            value_after = values[t][env]
    return VTrace(th.from_numpy(advantages), th.from_numpy(returns))


@pytest.mark.parametrize("seed", range(8))
def test_as_a_plain_loop(seed: int) -> None:
    rng = np.random.default_rng(seed)
    n_steps, n_envs = int(rng.integers(1, 40)), int(rng.integers(1, 4))
    rollout = random_rollout(n_steps, n_envs, seed=seed, p_end=float(rng.choice([0.0, 0.1, 0.5])))
    log_ratios = random_ratios(rollout)
    mask = th.from_numpy(rng.random((n_steps, n_envs)) < rng.choice([0.5, 0.9, 1.0]))
    gamma, lam, c = float(rng.random()), float(rng.random()), float(rng.choice([0.5, 1.0, math.inf]))
    rho = c + 0.5
    found = targets(rollout, log_ratios, gamma=gamma, gae_lambda=lam, rho_bar=rho, c_bar=c, mask=mask)
    th.testing.assert_close(found, looped(rollout, log_ratios, mask, gamma, lam, rho, c))


# Enumeration

ACTING = np.array([[0.2, 0.8], [0.55, 0.45]])  # of (state, action); the target policy is tabular's


def all_trajectories(values: np.ndarray, target: np.ndarray) -> tuple[Rollout, th.Tensor, th.Tensor, th.Tensor]:
    """
    One environment for each trajectory, and no step after its end.

    :param values: of each state (first dimension) with so many steps left (second)
    :param target: the policy whose values are wanted
    :return: the transitions, log-ratios, which steps count, and the probability of each trajectory as acted
    """
    shape = (HORIZON, len(TRAJECTORIES))
    rewards, of_states, log_ratios, counts, ends = (th.zeros(shape, dtype=th.float64) for _ in range(5))
    probabilities = th.zeros(len(TRAJECTORIES), dtype=th.float64)
    for i, trajectory in enumerate(TRAJECTORIES):
        length, chosen = len(trajectory.states), 1.0
        for t, (state, action) in enumerate(zip(trajectory.states, trajectory.actions, strict=True)):
            rewards[t, i], of_states[t, i], counts[t, i] = trajectory.rewards[t], values[state, HORIZON - t], 1.0
            log_ratios[t, i] = math.log(target[state, action] / ACTING[state, action])
            chosen *= ACTING[state, action]
        ends[length - 1, i] = 1.0
        probabilities[i] = chosen * trajectory.dynamics
    assert probabilities.sum().item() == pytest.approx(1.0)
    nothing = th.zeros(shape[1], dtype=th.float64)
    return Rollout(rewards, of_states, nothing, ends, th.zeros(shape), rewards), log_ratios, counts, probabilities


def values_of(policy: np.ndarray) -> np.ndarray:
    """Of each state with so many steps left, by dynamic programming; nothing is left to be had after three steps."""
    values = np.zeros((2, HORIZON + 1))
    for left in range(1, HORIZON + 1):
        for (state, action), outcomes in DYNAMICS.items():
            for p, following, reward in outcomes:
                after = 0.0 if following == END else values[following, left - 1]
                values[state, left] += policy[state, action] * p * (reward + GAMMA * after)
    return values


def test_without_bounds_the_expectation_is_the_value_under_the_target_policy() -> None:
    """Whatever the values are that it begins with."""
    arbitrary = np.random.default_rng(0).normal(scale=5.0, size=(2, HORIZON + 1))
    rollout, log_ratios, counts, probabilities = all_trajectories(arbitrary, policy_table())
    bounds = {"rho_bar": math.inf, "c_bar": math.inf}
    found = targets(rollout, log_ratios, gamma=GAMMA, mask=counts, **bounds).returns
    expected = values_of(policy_table())[0, HORIZON]
    assert (probabilities @ found[0]).item() == pytest.approx(expected, rel=1e-12)
    assert abs(values_of(ACTING)[0, HORIZON] - expected) > 0.1


@pytest.mark.parametrize("rho_bar", [0.9, 1.3])
@pytest.mark.parametrize("c_bar", [0.5, 0.9])
def test_the_bound_says_whose_values_they_are(rho_bar: float, c_bar: float) -> None:
    """
    Espeholt et al. 2018, equation 3: the fixed point is the value of the policy that is in proportion to
    min(rho_bar * mu, pi), whatever c_bar. Its expected correction is 0 in each state.
    """
    unnormalised = np.minimum(rho_bar * ACTING, policy_table())
    between = unnormalised / unnormalised.sum(axis=1, keepdims=True)
    rollout, log_ratios, counts, probabilities = all_trajectories(values_of(between), policy_table())
    found = targets(rollout, log_ratios, gamma=GAMMA, mask=counts, rho_bar=rho_bar, c_bar=c_bar).returns
    corrections = counts * (found - rollout.values)
    for t in range(HORIZON):
        assert (probabilities @ corrections[t]).item() == pytest.approx(0.0, abs=1e-12)
    assert corrections.abs().max() > 0.1


# Guards


def test_large_ratios_stay_in_their_episode() -> None:
    """A product of 60 ratios of e^20 is infinite, and infinity times the 0 at the end of an episode would be NaN."""
    rollout = random_rollout(300, p_end=0.0)
    rollout.terminated[50] = True
    log_ratios = th.where(th.arange(300)[:, None] > 50, 50.0, 0.0).expand(-1, 3)
    found = targets(rollout, log_ratios, rho_bar=math.inf, c_bar=math.inf)
    assert not found.returns.isnan().any()
    assert found.returns[51:].abs().max() > 1e100
    first = targets(rollout.at(slice(51)), th.zeros(51, 3))
    th.testing.assert_close(found.returns[:51], first.returns)
    th.testing.assert_close(found.advantages[:51], first.advantages)
    th.testing.assert_close(targets(rollout, log_ratios), targets(rollout, th.zeros(300, 3)))


def test_what_the_mask_excludes_is_not_read() -> None:
    rollout, log_ratios = random_rollout(12, p_end=0.0), th.zeros(12, 3, dtype=th.float64)
    mask = (th.arange(12) != 6)[:, None].expand(-1, 3)
    expected = targets(rollout, log_ratios, mask=mask)
    log_ratios[6], rollout.rewards[6] = math.nan, math.nan
    found = targets(rollout, log_ratios, mask=mask)
    assert th.equal(found.returns, expected.returns)
    assert th.equal(found.advantages, expected.advantages)
    assert (found.returns[6] == 0).all()
    assert (found.advantages[6] == 0).all()


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"rho_bar": -1.0}, "rho_bar must be >= 0.0, got -1.0"),
        ({"c_bar": math.nan}, "c_bar must be >= 0.0, got nan"),
        ({"rho_bar": 0.5}, "c_bar must be <= rho_bar = 0.5, got 1.0"),
        ({"gae_lambda": 1.1}, "gae_lambda must be >= 0.0 and <= 1.0, got 1.1"),
        ({"log_ratios": th.zeros(4, 1)}, r"log_ratios must have the shape of rewards, \(4, 3\), got \(4, 1\)"),
    ],
)
def test_what_is_refused(kwargs: dict[str, Any], message: str) -> None:
    rollout = random_rollout(4)
    log_ratios = kwargs.pop("log_ratios", th.zeros(4, 3))
    with pytest.raises(ValueError, match=message):
        targets(rollout, log_ratios, **kwargs)


def test_numbers_may_be_tensors_and_nothing_is_read_on_the_host() -> None:
    rollout = random_rollout(12)
    log_ratios = random_ratios(rollout)
    numbers = {"gamma": 0.9, "gae_lambda": 0.8, "rho_bar": 1.5, "c_bar": 1.0}
    expected = targets(rollout, log_ratios, **numbers)

    def call(*tensors: th.Tensor) -> VTrace:
        return targets(Rollout(*tensors[:6]), tensors[6], **numbers)

    th.testing.assert_close(make_fx(call)(*random_rollout(12, seed=1), log_ratios)(*rollout, log_ratios), expected)
    as_tensors = {name: th.tensor(value, dtype=th.float64) for name, value in numbers.items()}
    th.testing.assert_close(targets(rollout, log_ratios, **as_tensors), expected)
    on_meta = {name: th.zeros((), device="meta") for name in numbers}
    meta = Rollout(*(x.to("meta") for x in rollout))
    assert targets(meta, log_ratios.to("meta"), **on_meta).returns.is_meta
