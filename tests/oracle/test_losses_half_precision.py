"""
In 16 bits every loss, gradient and diagnostic is what it is in float64 of the same numbers.

Results are float32, so they agree to its precision; gradients arrive in 16 bits, so they agree to theirs.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch as th
from hypothesis import given, settings
from hypothesis import strategies as st

from sb3_ppo_ext import losses
from sb3_ppo_ext.losses import SurrogateLoss

HALVES = (th.float16, th.bfloat16)
# Log-probabilities of discrete actions and of densities, and some whose ratio is past every bound; advantages and
# returns as large as rewards that nobody scaled.
log_probs = st.floats(-40.0, 5.0)
numbers = st.one_of(st.floats(-5.0, 5.0), st.floats(-3000.0, 3000.0))
N = 6

FUNCTIONS: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {
    "log_ratio": (("log_prob", "log_prob"), {}),
    "probability_ratio": (("log_prob", "log_prob"), {}),
    "surrogate_loss": (("log_prob", "log_prob", "number"), {}),
    "clipped_surrogate_loss": (("log_prob", "log_prob", "number"), {"clip_range": 0.2, "clip_range_high": 0.3}),
    "dual_clip_surrogate_loss": (("log_prob", "log_prob", "number"), {"clip_range": 0.2, "dual_clip": 3.0}),
    "kl_penalized_surrogate_loss": (("log_prob", "log_prob", "number", "number"), {"kl_coef": 0.7}),
    "spo_surrogate_loss": (("log_prob", "log_prob", "number"), {"epsilon": 0.2}),
    "reinforce_loss": (("log_prob", "weight"), {}),
    "value_loss": (("number", "number"), {}),
    "prediction_clipped_value_loss": (("number", "number", "number"), {"clip_range_vf": 0.2}),
    "pessimistic_clipped_value_loss": (("number", "number", "number"), {"clip_range_vf": 0.2}),
    "kl_k1": (("log_prob", "log_prob"), {}),
    "kl_k2": (("log_prob", "log_prob"), {}),
    "kl_k3": (("log_prob", "log_prob"), {}),
    "kl_abs": (("log_prob", "log_prob"), {}),
}


def results(
    name: str, tensors: list[th.Tensor], options: dict[str, Any]
) -> tuple[th.Tensor, list[th.Tensor], list[th.Tensor]]:
    """The loss, gradients of its elements by each input, and diagnostics."""
    inputs = [tensor.clone().requires_grad_() for tensor in tensors]
    result = getattr(losses, name)(*inputs, **options)
    loss = result.loss if isinstance(result, SurrogateLoss) else result
    gradients = th.autograd.grad(loss.sum(), inputs, allow_unused=True, materialize_grads=True)
    return loss.detach(), list(gradients), list(result.diagnostics) if isinstance(result, SurrogateLoss) else []


def at_a_kink(tensors: list[th.Tensor], kinds: tuple[str, ...]) -> bool:
    """Where float32 and float64 may take different branches: a ratio or a value within rounding of where one ends."""
    first, second = tensors[0], tensors[1]
    if kinds[:2] == ("log_prob", "log_prob"):
        ratio = (first - second).clamp(-20, 20).exp()
        return any(bool(((ratio - bound).abs() < 1e-5).any()) for bound in (0.8, 1.2, 1.3, 3.0))
    if len(tensors) == 3:
        clipped = second + (first - second).clamp(-0.2, 0.2)
        kinks = ((first - second).abs() - 0.2, (first - tensors[2]).abs() - (clipped - tensors[2]).abs())
        return any(bool(((kink.abs() < 1e-3) & (kink != 0.0)).any()) for kink in kinks)
    return False


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("by_tensor", [False, True])
@given(data=st.data())
@settings(deadline=None, derandomize=True, max_examples=20)
def test_as_in_double_precision(name: str, dtype: th.dtype, by_tensor: bool, data: st.DataObject) -> None:
    kinds, options = FUNCTIONS[name]
    drawn = [
        data.draw(st.lists(log_probs if kind == "log_prob" else numbers, min_size=N, max_size=N)) for kind in kinds
    ]
    narrow = [th.tensor(values, dtype=dtype) for values in drawn]
    wide = [tensor.double() for tensor in narrow]
    wide_options = dict(options)
    if by_tensor:
        options = {key: th.tensor(value, dtype=dtype) for key, value in options.items()}
        wide_options = {key: value.double() for key, value in options.items()}
    if name not in ("kl_k1", "kl_k2", "kl_abs") and at_a_kink(wide, kinds):
        return
    if data.draw(st.booleans()) and "ratio" not in name:
        mask = th.tensor(data.draw(st.lists(st.booleans(), min_size=N, max_size=N)))
        options, wide_options = {**options, "mask": mask}, {**wide_options, "mask": mask}

    loss, gradients, diagnostics = results(name, narrow, options)
    expected_loss, expected_gradients, expected_diagnostics = results(name, wide, wide_options)
    assert loss.dtype == th.float32
    assert loss.isfinite().all()
    # Of float32: a difference of large numbers is no better than they are, and its square by that times itself.
    rounding = 4.0 * th.finfo(th.float32).eps * sum(tensor.abs() for tensor in wide)
    allowed = 1e-5 + 1e-5 * expected_loss.abs() + rounding * expected_loss.abs().sqrt()
    assert ((loss.double() - expected_loss).abs() <= allowed).all(), (loss, expected_loss)
    for found, expected in zip(diagnostics, expected_diagnostics, strict=True):
        assert found.dtype == th.float32
        th.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
    info = th.finfo(dtype)
    for found, expected in zip(gradients, expected_gradients, strict=True):
        assert found.dtype == dtype
        allowed = 1.01 * info.eps * expected.abs() + rounding + max(info.tiny, 2.0 * th.finfo(th.float32).eps)
        wrong = ~((found.double() - expected).abs() <= allowed) & (expected.abs() <= info.max)
        assert not wrong.any(), (found, expected)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("size", [1, 300, 70_000])
@pytest.mark.parametrize("mask_dtype", [None, th.bool, th.float16, th.bfloat16, th.float32])
def test_reductions_count_every_element(dtype: th.dtype, size: int, mask_dtype: th.dtype | None) -> None:
    ones = th.ones(2, size, dtype=dtype, requires_grad=True)
    mask = None if mask_dtype is None else th.ones(2, size, dtype=mask_dtype)
    expected = {
        "token-mean": 1.0,
        "seq-mean-token-sum": float(size),
        "seq-mean-token-mean": 1.0,
        "seq-mean-token-sum-norm": 1.0,
    }
    found = {mode: losses.aggregate(ones, mask, mode=mode) for mode in expected}  # type: ignore[arg-type]
    assert {mode: value.item() for mode, value in found.items()} == expected
    found["masked_mean"] = losses.masked_mean(ones, mask)
    assert found["masked_mean"].item() == 1.0
    for value in found.values():
        assert value.dtype == th.float32
        (gradient,) = th.autograd.grad(value, ones)
        assert gradient.dtype == dtype
        assert gradient.isfinite().all()


@pytest.mark.parametrize("dtype", HALVES)
@given(data=st.data())
@settings(deadline=None, derandomize=True, max_examples=50)
def test_reductions_as_in_double_precision(dtype: th.dtype, data: st.DataObject) -> None:
    values = data.draw(st.lists(st.floats(-30_000, 30_000), min_size=12, max_size=12))
    mask = th.tensor(data.draw(st.lists(st.booleans(), min_size=12, max_size=12))).reshape(3, 4)
    loss = th.tensor(values, dtype=dtype).reshape(3, 4)
    for mode in ("token-mean", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm"):
        found = losses.aggregate(loss, mask, mode=mode)  # type: ignore[arg-type]
        expected = losses.aggregate(loss.double(), mask, mode=mode)  # type: ignore[arg-type]
        th.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-2)
    th.testing.assert_close(
        losses.masked_mean(loss, mask).double(), losses.masked_mean(loss.double(), mask), rtol=1e-5, atol=1e-2
    )


@pytest.mark.parametrize("dtype", HALVES)
def test_mixed_with_other_dtypes(dtype: th.dtype) -> None:
    """Whichever argument is narrow; double precision stays what it is."""
    for other in (*HALVES, th.float32, th.float64):
        log_prob = th.tensor([-1.0, -2.0], dtype=dtype, requires_grad=True)
        loss = losses.surrogate_loss(log_prob, th.tensor([-13.0, -2.0], dtype=other), th.ones(2, dtype=other)).loss
        assert loss.dtype == (th.float64 if other == th.float64 else th.float32)
        th.testing.assert_close(
            loss.detach().double(), -th.tensor([12.0, 0.0], dtype=th.float64).exp(), rtol=1e-5, atol=0
        )


def test_float32_is_not_copied() -> None:
    x = th.ones(3)
    assert losses._guards.widened(x) is x
    assert losses._guards.prepared(None, x)[0] is x


def test_a_gradient_past_the_range_of_float16() -> None:
    """e^20 is no float16, and is a bfloat16."""
    for dtype, expected in ((th.float16, math.inf), (th.bfloat16, math.exp(19.0))):
        log_prob = th.tensor([-1.0], dtype=dtype, requires_grad=True)
        loss = losses.surrogate_loss(log_prob, th.tensor([-20.0], dtype=dtype), th.tensor([-1.0], dtype=dtype)).loss
        assert loss.item() == pytest.approx(math.exp(19.0), rel=1e-5)
        (gradient,) = th.autograd.grad(loss.sum(), log_prob)
        assert gradient.item() == pytest.approx(expected, rel=1e-2)
