"""Ratios against literals: log 0.6 - log 0.3 = log 2."""

import math

import pytest
import torch as th

from sb3_ppo_ext.losses import log_ratio, probability_ratio

NEW = th.tensor([0.6, 0.3, 0.5], dtype=th.float64).log()
OLD = th.tensor([0.3, 0.6, 0.5], dtype=th.float64).log()


def test_log_ratio_and_ratio_of_known_probabilities() -> None:
    expected = th.tensor([math.log(2), -math.log(2), 0.0], dtype=th.float64)
    th.testing.assert_close(log_ratio(NEW, OLD), expected)
    th.testing.assert_close(probability_ratio(NEW, OLD), th.tensor([2.0, 0.5, 1.0], dtype=th.float64))


@pytest.mark.parametrize(
    ("bound", "expected"),
    [
        (20.0, [-20.0, -20.0, 5.0, 20.0, 20.0]),
        (10.0, [-10.0, -10.0, 5.0, 10.0, 10.0]),
        (None, [-1e4, -100.0, 5.0, 100.0, 1e4]),
        (math.inf, [-1e4, -100.0, 5.0, 100.0, 1e4]),
    ],
)
def test_bound(bound: float | None, expected: list[float]) -> None:
    log_prob = th.tensor([-1e4, -100.0, 5.0, 100.0, 1e4])
    assert log_ratio(log_prob, th.zeros(5), max_log_ratio=bound).tolist() == expected


def test_bound_is_20_unless_said_otherwise() -> None:
    assert log_ratio(th.tensor(21.0), th.tensor(0.0)).item() == 20.0
    assert log_ratio(th.tensor(-21.0), th.tensor(0.0)).item() == -20.0
    assert probability_ratio(th.tensor(1e4), th.tensor(0.0)).item() == pytest.approx(485165195.41, rel=1e-6)  # e^20


def test_gradient_is_one_inside_the_bound_and_zero_beyond() -> None:
    log_prob = th.tensor([-21.0, -19.0, 0.0, 19.0, 21.0], requires_grad=True)
    old_log_prob = th.zeros(5, requires_grad=True)
    gradients = th.autograd.grad(log_ratio(log_prob, old_log_prob).sum(), (log_prob, old_log_prob))
    assert gradients[0].tolist() == [0.0, 1.0, 1.0, 1.0, 0.0]
    assert gradients[1].tolist() == [0.0, -1.0, -1.0, -1.0, 0.0]


def test_gradient_of_the_ratio_is_the_ratio() -> None:
    log_prob = NEW.clone().requires_grad_()
    (gradient,) = th.autograd.grad(probability_ratio(log_prob, OLD).sum(), log_prob)
    th.testing.assert_close(gradient, th.tensor([2.0, 0.5, 1.0], dtype=th.float64))
