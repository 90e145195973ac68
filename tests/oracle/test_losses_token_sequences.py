"""Rewards, advantages, whitening and entropy of token sequences against numbers worked out by hand and identities."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch as th
from torch.fx.experimental.proxy_tensor import make_fx

from sb3_ppo_ext.losses import (
    generalized_advantages,
    masked_entropy,
    masked_mean,
    masked_whiten,
    token_gae,
    token_rewards,
)

GAE = {"gamma": 0.5, "gae_lambda": 0.5}
# A prompt before the response; one of full length; padding on both sides and a gap; nothing at all.
MASK = th.tensor([[0, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1], [0, 1, 0, 1, 1, 0], [0, 0, 0, 0, 0, 0]]).bool()


def rewards_of(log_prob: th.Tensor, ref_log_prob: th.Tensor, mask: th.Tensor | None = None) -> th.Tensor:
    scores = th.tensor([1.0, -2.0, 3.0, math.nan], dtype=log_prob.dtype, device=log_prob.device)
    return token_rewards(scores[: len(log_prob)], log_prob, ref_log_prob, kl_coef=0.25, mask=mask)


def gae_of(rewards: th.Tensor, values: th.Tensor, mask: th.Tensor | None = None) -> th.Tensor:
    return token_gae(rewards, values, mask=mask, **GAE)


def entropy_of(first: th.Tensor, second: th.Tensor, mask: th.Tensor | None = None) -> th.Tensor:
    """Of tokens out of two."""
    return masked_entropy(th.stack((first, second), -1), mask)


def whitened(x: th.Tensor, _: th.Tensor, mask: th.Tensor | None = None) -> th.Tensor:
    return masked_whiten(x, mask)


FUNCTIONS: list[Callable[..., th.Tensor]] = [rewards_of, gae_of, entropy_of, whitened]
every_function = pytest.mark.parametrize("function", FUNCTIONS)


def tensors(shape: tuple[int, ...] = (4, 6), dtype: th.dtype = th.float64) -> list[th.Tensor]:
    generator = th.Generator().manual_seed(0)
    return [th.randn(shape, generator=generator, dtype=th.float64).to(dtype) for _ in range(2)]


# By hand


def test_rewards_by_hand() -> None:
    log_prob = th.tensor([[-1.0, -2.0, -3.0], [-1.0, -1.0, -4.0]])
    ref_log_prob = th.tensor([[-2.0, -2.0, -1.0], [-5.0, 0.0, -4.0]])
    scores = th.tensor([10.0, -3.0])
    found = token_rewards(scores, log_prob, ref_log_prob, kl_coef=0.5)
    assert found.tolist() == [[-0.5, 0.0, 11.0], [-2.0, 0.5, -3.0]]
    mask = th.tensor([[1, 1, 0], [0, 1, 0]])
    assert token_rewards(scores, log_prob, ref_log_prob, kl_coef=0.5, mask=mask).tolist() == [
        [-0.5, 10.0, 0.0],  # the score has moved to what is the last token now
        [0.0, -2.5, 0.0],
    ]
    without = token_rewards(scores, log_prob, ref_log_prob, kl_coef=0.0, mask=mask)
    assert without.tolist() == [[0.0, 10.0, 0.0], [0.0, -3.0, 0.0]]


def test_the_penalties_add_up_to_the_kl_divergence_of_whole_sequences() -> None:
    """By enumeration of all texts of two tokens out of two, whose second depends on the first."""
    policy, reference = (th.tensor(p, dtype=th.float64) for p in ([0.8, 0.3, 0.6], [0.5, 0.9, 0.2]))

    def log_probs(p: th.Tensor) -> th.Tensor:
        """Of the texts 00, 01, 10, 11: P(first is 1), P(second is 1 | first is 0), P(second is 1 | first is 1)."""
        first, after_0, after_1 = p
        return th.stack(
            [
                th.stack((1 - first, 1 - after_0)),
                th.stack((1 - first, after_0)),
                th.stack((first, 1 - after_1)),
                th.stack((first, after_1)),
            ]
        ).log()

    log_prob, ref_log_prob = log_probs(policy), log_probs(reference)
    rewards = token_rewards(th.zeros(4, dtype=th.float64), log_prob, ref_log_prob, kl_coef=1.0)
    p, q = log_prob.sum(1).exp(), ref_log_prob.sum(1).exp()
    assert p.sum().item() == pytest.approx(1.0)
    expected = th.distributions.kl_divergence(
        th.distributions.Categorical(probs=p), th.distributions.Categorical(probs=q)
    )
    assert (p * rewards.sum(1)).sum().item() == pytest.approx(-expected.item())


def test_advantages_by_hand() -> None:
    rewards = th.tensor([[9.0, 1.0, 2.0, 9.0], [4.0, 9.0, 9.0, 8.0]])
    values = th.tensor([[9.0, 2.0, 4.0, 9.0], [2.0, 9.0, 9.0, 4.0]])
    mask = th.tensor([[0, 1, 1, 0], [1, 0, 0, 1]])
    # First row: delta = 2 - 4 = -2 at the end, and 1 + 4/2 - 2 = 1 before it, so A = 1 - 2/4.
    # Second: delta = 8 - 4 = 4 and 4 + 4/2 - 2 = 4, so A = 4 + 4/4; what stands between is no step.
    assert token_gae(rewards, values, mask=mask, **GAE).tolist() == [[0.0, 0.5, -2.0, 0.0], [5.0, 0.0, 0.0, 4.0]]


def test_with_lambda_1_the_advantage_is_the_sum_of_what_follows_less_the_value() -> None:
    rewards, values = tensors()
    found = token_gae(rewards, values, gamma=1.0, gae_lambda=1.0, mask=MASK)
    for row in range(4):
        for t in range(6):
            to_come = rewards[row, t:][MASK[row, t:]].sum()
            expected = to_come - values[row, t] if MASK[row, t] else th.zeros(())
            assert found[row, t].item() == pytest.approx(expected.item())


def test_each_row_is_a_rollout_of_its_own() -> None:
    rewards, values = tensors()
    found = gae_of(rewards, values, MASK)
    for row, mask in enumerate(MASK[:3]):
        ends = th.zeros(int(mask.sum()), 1, dtype=th.bool)
        ends[-1] = True
        expected = generalized_advantages(
            rewards[row, mask, None], values[row, mask, None], th.full((1,), math.nan), ends, ~ends & ends, **GAE
        )
        th.testing.assert_close(found[row, mask], expected[:, 0])


def test_whitening_by_hand() -> None:
    mask = th.tensor([[True, True], [False, True]])
    found = masked_whiten(th.tensor([[1.0, 3.0], [1e6, 5.0]]), mask)
    assert found.flatten().tolist() == pytest.approx([-1.0, 0.0, 0.0, 1.0])  # mean 3, deviation 2
    assert masked_whiten(th.tensor([1.0, 3.0, 5.0])).tolist() == pytest.approx([-1.0, 0.0, 1.0])


@pytest.mark.parametrize("x", [th.tensor([1, 2, 6]), th.tensor([True, False, True])])
def test_integers_and_bools_have_a_mean_too(x: th.Tensor) -> None:
    """Such as rewards, or which ratios are beyond a bound; with and without a mask."""
    for function in (masked_mean, masked_whiten):
        for mask in (None, th.ones(3)):
            th.testing.assert_close(function(x, mask), function(x.float()))


def test_what_is_alone_or_without_spread_can_be_whitened() -> None:
    assert masked_whiten(th.tensor([7.0])).tolist() == [7.0]
    assert masked_whiten(th.tensor([7.0, 9.0]), th.tensor([True, False])).tolist() == [7.0, 0.0]
    same = th.tensor([2.0, 2.0, 9.0], requires_grad=True)
    found = masked_whiten(same, th.tensor([1, 1, 0]))
    assert found.tolist() == [0.0, 0.0, 0.0]
    assert th.autograd.grad(found.sum(), same)[0].isfinite().all()


def test_entropy_by_hand() -> None:
    logits = th.tensor([[0.5, 0.25, 0.25], [1.0, 1.0, 1.0], [0.0, 0.5, 0.5]]).log()
    expected = [1.5 * math.log(2), math.log(3), math.log(2)]
    assert masked_entropy(logits + 7.0).tolist() == pytest.approx(expected)
    assert masked_entropy(logits, th.tensor([1, 0, 1])).tolist() == pytest.approx([expected[0], 0.0, expected[2]])


def test_the_gradient_of_the_entropy_by_finite_differences() -> None:
    first, second = (tensor.requires_grad_() for tensor in tensors((2, 3)))
    assert th.autograd.gradcheck(lambda x, y: entropy_of(x, y, MASK[:2, :3]), (first, second))
    forbidden = th.tensor([0.3, -math.inf, 0.1], dtype=th.float64, requires_grad=True)
    (gradient,) = th.autograd.grad(masked_entropy(forbidden), forbidden)
    assert gradient.isfinite().all()
    assert gradient[1] == 0


# What every one of them promises


@every_function
@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf, 1e300])
@pytest.mark.parametrize("mask_dtype", [th.bool, th.float32])
def test_padding_never_matters(function: Callable[..., th.Tensor], poison: float, mask_dtype: th.dtype) -> None:
    results = []
    for filled in (0.0, poison):
        inputs = [th.where(MASK, tensor, filled).requires_grad_() for tensor in tensors()]
        found = function(*inputs, mask=MASK.to(mask_dtype))
        assert (found[~MASK] == 0).all()
        weights = th.arange(24.0).reshape(4, 6)
        result = [found]
        if found.requires_grad:
            result += th.autograd.grad((weights * found).sum(), inputs, allow_unused=True, materialize_grads=True)
            assert all((gradient[~MASK] == 0).all() for gradient in result[1:])
        results.append(result)
    assert all(th.equal(clean, poisoned) for clean, poisoned in zip(*results, strict=True))
    assert results[0][0][MASK].isfinite().all()


@every_function
def test_no_mask_is_a_mask_of_ones(function: Callable[..., th.Tensor]) -> None:
    inputs = [tensor[:3] for tensor in tensors()]
    th.testing.assert_close(function(*inputs), function(*inputs, mask=th.ones(3, 6)))


@pytest.mark.parametrize("function", [rewards_of, gae_of, entropy_of])
def test_more_padding_and_other_rows_change_nothing(function: Callable[..., th.Tensor]) -> None:
    inputs, row = tensors(), MASK[0, 1:4]
    alone = function(*(tensor[:1, 1:4] for tensor in inputs), mask=row[None])
    th.testing.assert_close(function(*inputs, mask=MASK)[:1, 1:4], alone)


@pytest.mark.parametrize("function", [rewards_of, gae_of])
def test_rewards_and_advantages_have_no_gradient(function: Callable[..., th.Tensor]) -> None:
    assert not function(*(tensor.requires_grad_() for tensor in tensors()), mask=MASK).requires_grad


@every_function
@pytest.mark.parametrize("dtype", [th.float16, th.bfloat16])
def test_what_has_16_bits_is_computed_in_32(function: Callable[..., th.Tensor], dtype: th.dtype) -> None:
    inputs = tensors(dtype=dtype)
    found = function(*inputs, mask=MASK)
    assert found.dtype == th.float32
    th.testing.assert_close(found, function(*(tensor.float() for tensor in inputs), mask=MASK))


@every_function
@pytest.mark.parametrize("shape", [(0, 3), (3, 0)])
def test_of_nothing_comes_nothing(function: Callable[..., th.Tensor], shape: tuple[int, int]) -> None:
    assert function(*tensors(shape)).shape == shape
    assert function(*tensors(shape), mask=th.ones(shape)).shape == shape


@every_function
def test_no_value_is_read_on_the_host_and_it_can_be_traced(function: Callable[..., th.Tensor]) -> None:
    on_meta = [tensor.to("meta") for tensor in tensors()]
    assert function(*on_meta, mask=MASK.to("meta")).is_meta

    def masked(*inputs: th.Tensor) -> th.Tensor:
        return function(*inputs[:-1], mask=inputs[-1])

    traced = make_fx(masked)(*tensors(), th.ones(4, 6))  # with another mask
    th.testing.assert_close(traced(*tensors(), MASK.float()), masked(*tensors(), MASK))


X, FLAT, OTHER = th.zeros(2, 3), th.zeros(6), th.zeros(2, 4)
REFUSED: list[tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any], str]] = [
    (token_rewards, (th.zeros(2), FLAT, FLAT), {"kl_coef": 0.1}, r"log_prob must have shape \(batch, time\), got \(6,"),
    (token_rewards, (th.zeros(2), X, OTHER), {"kl_coef": 0.1}, "ref_log_prob must have the shape of log_prob"),
    (token_rewards, (th.zeros(2), X, X), {"kl_coef": 0.1, "mask": OTHER}, "mask must have the shape of log_prob"),
    (token_rewards, (th.zeros(2), X, X), {"kl_coef": 0.1, "mask": X + 0.5}, "mask must hold nothing but 0 and 1"),
    (token_rewards, (th.zeros(3), X, X), {"kl_coef": 0.1}, r"scores must have shape \(batch,\) = \(2,\), got \(3,\)"),
    (token_rewards, (th.zeros(2, 1), X, X), {"kl_coef": 0.1}, r"scores must have shape .* got \(2, 1\)"),
    (token_rewards, (th.zeros(2), X, X), {"kl_coef": -0.1}, "kl_coef must be >= 0.0 and finite, got -0.1"),
    (token_rewards, (th.zeros(2), X, X), {"kl_coef": math.inf}, "kl_coef must be >= 0.0 and finite, got inf"),
    (token_gae, (FLAT, FLAT), GAE, r"rewards must have shape \(batch, time\), got \(6,\)"),
    (token_gae, (X, OTHER), GAE, "values must have the shape of rewards"),
    (token_gae, (X, X), {**GAE, "mask": FLAT}, "mask must have the shape of rewards"),
    (token_gae, (X, X), {**GAE, "gamma": 1.5}, "gamma must be >= 0.0 and <= 1.0, got 1.5"),
    (token_gae, (X, X), {**GAE, "gae_lambda": math.nan}, "gae_lambda must be >= 0.0 and <= 1.0, got nan"),
    (masked_whiten, (X, FLAT), {}, "mask must have the shape of x"),
    (masked_whiten, (X, X - 1), {}, "mask must hold nothing but 0 and 1, or be of dtype bool, got -1.0"),
    (masked_entropy, (X, OTHER), {}, r"mask must have the shape of logits without its last dimension, \(2,\), got"),
    (masked_entropy, (X, X), {}, r"mask must have the shape of logits without its last dimension, \(2,\), got"),
    (masked_entropy, (X, th.full((2,), 3)), {}, "mask must hold nothing but 0 and 1, or be of dtype bool, got 3"),
    (masked_entropy, (th.zeros(2, 0),), {}, r"logits must have shape \(..., n_tokens\) with n_tokens >= 1, got"),
    (masked_entropy, (th.zeros(()),), {}, r"logits must have shape \(..., n_tokens\) with n_tokens >= 1, got \(\)"),
]


@pytest.mark.parametrize(("function", "args", "kwargs", "message"), REFUSED)
def test_bad_arguments_are_refused(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        function(*args, **kwargs)
