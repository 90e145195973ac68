"""KL estimators against the exact KL of categorical distributions, the mean taken by enumeration."""

import doctest
import math

import pytest
import torch as th
from hypothesis import given, settings
from hypothesis import strategies as st

from sb3_ppo_ext import losses
from sb3_ppo_ext.losses import kl_abs, kl_k1, kl_k2, kl_k3

LN2 = math.log(2)
OLD = th.tensor([0.50, 0.25, 0.25], dtype=th.float64)
NEW = th.tensor([0.25, 0.50, 0.25], dtype=th.float64)
# log r of the three actions: -ln 2, ln 2, 0. KL(old||new) = 0.5 ln 2 - 0.25 ln 2.
EXACT_KL = 0.25 * LN2

logits = st.lists(st.floats(-3, 3), min_size=4, max_size=4).map(lambda values: th.tensor(values, dtype=th.float64))


@pytest.mark.parametrize(
    ("estimator", "mean"),
    [
        (kl_k1, EXACT_KL),
        (kl_k3, EXACT_KL),
        (kl_k2, 0.375 * LN2**2),  # (0.5 + 0.25) ln^2 2 / 2 = 0.180 against 0.173
        (kl_abs, 0.75 * LN2),  # (0.5 + 0.25) ln 2
    ],
)
def test_mean_over_actions_of_the_old_policy(estimator: type, mean: float) -> None:
    assert th.dot(OLD, estimator(NEW.log(), OLD.log())).item() == pytest.approx(mean, rel=1e-12)


@pytest.mark.parametrize(
    ("estimator", "values"),
    [
        (kl_k1, [LN2, -LN2, 0.0]),
        (kl_k2, [LN2**2 / 2, LN2**2 / 2, 0.0]),
        (kl_k3, [LN2 - 0.5, 1 - LN2, 0.0]),  # 1/2 - 1 + ln 2, 2 - 1 - ln 2
        (kl_abs, [LN2, LN2, 0.0]),
    ],
)
def test_values_of_single_actions(estimator: type, values: list[float]) -> None:
    th.testing.assert_close(estimator(NEW.log(), OLD.log()), th.tensor(values, dtype=th.float64))


@given(old_logits=logits, new_logits=logits)
@settings(deadline=None, derandomize=True)
def test_k1_and_k3_are_unbiased_in_value_and_gradient(old_logits: th.Tensor, new_logits: th.Tensor) -> None:
    new_logits = new_logits.clone().requires_grad_()
    old = th.distributions.Categorical(logits=old_logits)
    new = th.distributions.Categorical(logits=new_logits)
    exact = th.distributions.kl_divergence(old, new).detach()
    for estimator in (kl_k1, kl_k3):
        mean = th.dot(old.probs, estimator(new_logits.log_softmax(0), old_logits.log_softmax(0)))
        th.testing.assert_close(mean.detach(), exact)
        (gradient,) = th.autograd.grad(mean, new_logits)
        th.testing.assert_close(gradient, (new.probs - old.probs).detach())  # d/dz of a softmax's cross-entropy


@given(old_logits=logits, new_logits=logits)
@settings(deadline=None, derandomize=True)
def test_bounds(old_logits: th.Tensor, new_logits: th.Tensor) -> None:
    old, new = old_logits.log_softmax(0), new_logits.log_softmax(0)
    exact = th.dot(old.exp(), kl_k1(new, old))
    assert (kl_k2(new, old) >= 0).all()
    assert (kl_k3(new, old) >= -1e-15).all()
    assert th.dot(old.exp(), kl_abs(new, old)) >= exact - 1e-15


def test_k2_and_k3_agree_to_second_order() -> None:
    step = th.tensor(1e-3, dtype=th.float64)
    # k3 - k2 = x^3 / 6 + ...
    difference = kl_k3(step, th.zeros_like(step)) - kl_k2(step, th.zeros_like(step))
    assert difference.item() == pytest.approx(1e-9 / 6, rel=1e-3)


def test_k3_keeps_its_digits_for_small_steps() -> None:
    # exp(x) - 1 - x in float32 has an error of 6e-8 here, a tenth of the value
    assert kl_k3(th.tensor(1e-3), th.tensor(0.0)).item() == pytest.approx(5.001667e-7, rel=1e-3)


@pytest.mark.parametrize("estimator", [kl_k1, kl_k2, kl_k3, kl_abs])
def test_identical_policies_have_no_distance(estimator: type) -> None:
    log_prob = th.tensor([-0.1, -3.0, -50.0], requires_grad=True)
    result = estimator(log_prob, log_prob.detach().clone())
    assert result.tolist() == [0.0, 0.0, 0.0]
    if estimator is not kl_k1:
        assert th.autograd.grad(result.sum(), log_prob)[0].tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("estimator", [kl_k1, kl_k2, kl_k3, kl_abs])
@pytest.mark.parametrize("size", [21.0, 100.0, 1e4])
def test_extreme_log_ratios_stay_finite(estimator: type, size: float) -> None:
    log_prob = th.tensor([size, -size], requires_grad=True)
    result = estimator(log_prob, th.zeros(2))
    assert result.isfinite().all()
    assert th.autograd.grad(result.sum(), log_prob)[0].isfinite().all()


def test_k3_is_bounded_above_only() -> None:
    log_prob = th.tensor([25.0, -25.0], dtype=th.float64, requires_grad=True)
    bounded = kl_k3(log_prob, th.zeros_like(log_prob))
    # e^20 - 21; e^-25 - 1 + 25
    th.testing.assert_close(bounded, th.tensor([485165174.40979, 24.0], dtype=th.float64))
    slope_above, slope_below = th.autograd.grad(bounded.sum(), log_prob)[0].tolist()
    assert slope_above == 0.0
    assert slope_below == pytest.approx(-1.0)
    unbounded = kl_k3(log_prob, th.zeros_like(log_prob), max_log_ratio=None)
    assert unbounded[0].item() == pytest.approx(math.exp(25) - 26)


def test_the_examples_in_the_docstrings() -> None:
    failed, run = doctest.testmod(losses.kl)
    assert failed == 0
    assert run >= 14


def test_which_order_means_which_divergence() -> None:
    """Of actions of the new policy: the reference comes first, whatever other libraries have."""
    reference, new = OLD, th.tensor([0.7, 0.2, 0.1], dtype=th.float64)
    exact = th.dot(new, (new / reference).log()).item()
    other = th.dot(reference, (reference / new).log()).item()
    assert th.dot(new, kl_k3(reference.log(), new.log())).item() == pytest.approx(exact)
    assert th.dot(new, kl_k1(reference.log(), new.log())).item() == pytest.approx(exact)
    swapped = th.dot(new, kl_k3(new.log(), reference.log())).item()
    assert abs(swapped - exact) > 0.01
    assert abs(swapped - other) > 0.01
    assert th.equal(kl_k2(reference.log(), new.log()), kl_k2(new.log(), reference.log()))
