"""The loss around a proximal policy: literals, PPO's as a limit, and expectations over all old trajectories."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch as th

from sb3_ppo_ext import losses
from tests.oracle.tabular import (
    BIAS,
    DYNAMICS,
    END,
    GAMMA,
    HORIZON,
    TRAJECTORIES,
    WEIGHT,
    differentiated,
    gradient_of_practice,
    policy_table,
)
from tests.oracle.test_vtrace import ACTING, values_of


@pytest.mark.parametrize(
    ("new", "proximal", "old", "advantage", "bound", "expected"),
    [
        (0.5, 0.5, 0.25, 3.0, math.inf, -6.0),  # w = 2, r = 1
        (0.5, 0.5, 0.25, 3.0, 1.5, -4.5),  # w = 1.5
        (0.5, 0.25, 0.5, 4.0, math.inf, -2.5),  # w = 1/2, r = 2 counts 1.25
        (0.25, 0.5, 0.25, 4.0, math.inf, -4.0),  # w = 2, r = 1/2
        (0.25, 0.5, 0.25, -4.0, math.inf, 6.0),  # w = 2, r = 1/2 counts 3/4
        (0.8, 0.2, 0.1, -1.0, math.inf, 6.0),  # w = 2, r = 4 counts 3, the second clip
        (0.8, 0.2, 0.1, -1.0, 1.0, 3.0),
    ],
)
def test_by_hand(new: float, proximal: float, old: float, advantage: float, bound: float, expected: float) -> None:
    logs = [th.tensor([probability], dtype=th.float64).log() for probability in (new, proximal, old)]
    advantages = th.tensor([advantage], dtype=th.float64)
    loss, diagnostics = losses.decoupled_surrogate_loss(
        logs[0], logs[1], logs[2], advantages, max_importance_weight=bound, clip_range=0.25, dual_clip=3.0
    )
    th.testing.assert_close(loss, th.tensor([expected], dtype=th.float64))
    assert diagnostics.ratio_max.item() == pytest.approx(new / proximal)


@pytest.mark.parametrize("dual_clip", [None, 3.0])
def test_around_the_policy_that_acted_it_is_ppo_to_the_bit(dual_clip: float | None) -> None:
    generator = th.Generator().manual_seed(0)
    log_prob, old_log_prob, advantages = (th.randn(500, generator=generator) for _ in range(3))
    mask = th.rand(500, generator=generator) < 0.8
    log_prob.requires_grad_()
    kwargs = {"dual_clip": dual_clip, "clip_range": 0.1, "clip_range_high": 0.3, "mask": mask}
    expected = losses.dual_clip_surrogate_loss(log_prob, old_log_prob, advantages, **kwargs)
    found = losses.decoupled_surrogate_loss(
        log_prob, old_log_prob, old_log_prob, advantages, max_importance_weight=1.0, **kwargs
    )
    assert th.equal(found.loss, expected.loss)
    assert all(map(th.equal, found.diagnostics, expected.diagnostics))
    assert th.equal(*(th.autograd.grad(loss.sum(), log_prob)[0] for loss in (found.loss, expected.loss)))


# Enumeration: the process of tabular.py, its policy as proximal and new one, and other trajectories


def action_values() -> np.ndarray:
    """Of the proximal policy: of each state, action and number of steps left."""
    values, found = values_of(policy_table()), np.zeros((2, 2, HORIZON + 1))
    for (state, action), outcomes in DYNAMICS.items():
        for left in range(1, HORIZON + 1):
            for p, following, reward in outcomes:
                after = 0.0 if following == END else values[following, left - 1]
                found[state, action, left] += p * (reward + GAMMA * after)
    return found


def expected_gradient(bound: float, *, steps: int = HORIZON) -> np.ndarray:
    """
    Of minus the loss, over all trajectories of the acting policy. Each step has the weight of all actions up to it
    ("per decision"), which makes up for the states that the acting policy comes to.

    :param bound: of the weights
    :param steps: the first so many of each trajectory
    """
    table, of_actions = policy_table(), action_values()

    def objective(log_pi: th.Tensor) -> th.Tensor:
        total = th.zeros((), dtype=th.float64)
        for trajectory in TRAJECTORIES:
            probability, proximal, old = trajectory.dynamics, 0.0, 0.0
            new, proximals, olds, qs = [], [], [], []
            for t, (s, a) in enumerate(zip(trajectory.states, trajectory.actions, strict=True)):
                probability *= ACTING[s, a]
                proximal, old = proximal + math.log(table[s, a]), old + math.log(ACTING[s, a])
                proximals.append(proximal)
                olds.append(old)
                new.append(proximal + log_pi[s, a] - math.log(table[s, a]))
                qs.append(of_actions[s, a, HORIZON - t])
            columns = (th.tensor(column, dtype=th.float64) for column in (proximals, olds, qs))
            loss, _ = losses.decoupled_surrogate_loss(th.stack(new), *columns, max_importance_weight=bound)
            total = total - probability * loss[:steps].sum()
        return total

    return differentiated(objective)


def test_old_trajectories_give_the_fresh_gradient_in_expectation() -> None:
    np.testing.assert_allclose(expected_gradient(math.inf), gradient_of_practice(), rtol=1e-10)


def test_the_bias_of_a_bound_is_what_it_cuts_off() -> None:
    """Of the first action: sum over a of mu(a) max(ratio - bound, 0) Q(a) grad log pi(a)."""
    bound = 1.2
    table, of_actions = policy_table()[0], action_values()[0, :, HORIZON]
    cut = ACTING[0] * np.maximum(table / ACTING[0] - bound, 0.0)
    assert (cut > 0).sum() == 1
    lost = np.zeros(6)
    for action in (0, 1):
        of_logits = np.eye(2)[action] - table
        score = np.concatenate((np.outer(of_logits, [1.0, 0.0]).ravel(), of_logits))
        lost += cut[action] * of_actions[action] * score
    whole, bounded = expected_gradient(math.inf, steps=1), expected_gradient(bound, steps=1)
    np.testing.assert_allclose(whole - bounded, lost, rtol=1e-10, atol=1e-14)
    assert np.abs(lost).max() > 0.1
    assert WEIGHT.size + BIAS.size == lost.size
