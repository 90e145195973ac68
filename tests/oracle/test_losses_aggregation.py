"""Reductions against numbers worked out by hand."""

import math
from typing import Any, get_args

import pytest
import torch as th
from hypothesis import given, settings
from hypothesis import strategies as st

from sb3_ppo_ext.losses import AggregationMode, aggregate, masked_mean

MODES: tuple[AggregationMode, ...] = get_args(AggregationMode)
LOSS = th.tensor([[1.0, 2.0, 3.0, 4.0], [5.0, 6.0, 7.0, 8.0], [9.0, 10.0, 11.0, 12.0]])
# row sums that count: 1 + 2 = 3 of 2 tokens; 5 + 6 + 7 + 8 = 26 of 4 tokens; none. Together 29 of 6 tokens, 2 rows.
MASK = th.tensor([[1, 1, 0, 0], [1, 1, 1, 1], [0, 0, 0, 0]])

EXAMPLES: list[tuple[dict[str, Any], float]] = [
    ({"mode": "token-mean"}, 29 / 6),
    ({"mode": "seq-mean-token-sum"}, 14.5),  # 29 / 2
    ({"mode": "seq-mean-token-mean"}, 4.0),  # (3 / 2 + 26 / 4) / 2
    ({"mode": "seq-mean-token-sum-norm"}, 3.625),  # 29 / 2 / 4
    ({"mode": "seq-mean-token-sum-norm", "horizon": 10}, 1.45),  # 29 / 2 / 10
    ({"mode": "seq-mean-token-sum-norm", "horizon": th.tensor(10.0)}, 1.45),
    ({"mode": "token-mean", "total_tokens": 10}, 2.9),  # 29 / 10
    ({"mode": "token-mean", "total_tokens": th.tensor(10)}, 2.9),
    ({"mode": "seq-mean-token-sum", "total_sequences": 5}, 5.8),  # 29 / 5
    ({"mode": "seq-mean-token-mean", "total_sequences": 5}, 1.6),  # (3 / 2 + 26 / 4) / 5
    ({"mode": "seq-mean-token-sum-norm", "total_sequences": th.tensor(5)}, 1.45),  # 29 / 5 / 4
]


@pytest.mark.parametrize(("options", "expected"), EXAMPLES)
@pytest.mark.parametrize("mask", [MASK, MASK.bool(), MASK.float()])
def test_modes_on_a_worked_example(mask: th.Tensor, options: dict[str, Any], expected: float) -> None:
    result = aggregate(LOSS, mask, **options)
    assert result.shape == ()
    assert result.item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    ("mode", "weights"),
    [
        ("token-mean", [[1 / 6, 1 / 6, 0, 0], [1 / 6, 1 / 6, 1 / 6, 1 / 6], [0, 0, 0, 0]]),
        ("seq-mean-token-sum", [[0.5, 0.5, 0, 0], [0.5, 0.5, 0.5, 0.5], [0, 0, 0, 0]]),
        ("seq-mean-token-mean", [[0.25, 0.25, 0, 0], [0.125, 0.125, 0.125, 0.125], [0, 0, 0, 0]]),
        ("seq-mean-token-sum-norm", [[0.125, 0.125, 0, 0], [0.125, 0.125, 0.125, 0.125], [0, 0, 0, 0]]),
    ],
)
def test_what_a_token_weighs(mode: AggregationMode, weights: list[list[float]]) -> None:
    loss = LOSS.clone().requires_grad_()
    (gradient,) = th.autograd.grad(aggregate(loss, MASK, mode=mode), loss)
    th.testing.assert_close(gradient, th.tensor(weights))


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        # row sums 10, 26, 42: 78 of 12 tokens. Sequences of one length make three of the modes the same.
        ("token-mean", 6.5),  # 78 / 12
        ("seq-mean-token-sum", 26.0),  # 78 / 3
        ("seq-mean-token-mean", 6.5),  # (10 / 4 + 26 / 4 + 42 / 4) / 3
        ("seq-mean-token-sum-norm", 6.5),  # 78 / 3 / 4
    ],
)
@pytest.mark.parametrize("mask", [None, th.ones(3, 4)])
def test_without_a_mask(mode: AggregationMode, expected: float, mask: th.Tensor | None) -> None:
    assert aggregate(LOSS, mask, mode=mode).item() == pytest.approx(expected)


def whole_batch_counts(mode: AggregationMode, mask: th.Tensor, as_tensor: bool) -> dict[str, Any]:
    if mode == "token-mean":
        return {"total_tokens": mask.sum() if as_tensor else int(mask.sum())}
    sequences = mask.any(1).sum()
    return {"total_sequences": sequences if as_tensor else int(sequences)}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("as_tensor", [False, True])
def test_pieces_add_up_exactly(mode: AggregationMode, as_tensor: bool) -> None:
    # 4 + 2 + 1 + 1 + 0 = 8 tokens in 4 sequences that count: every quotient is exact in binary.
    loss = th.arange(20.0).reshape(5, 4).requires_grad_()
    mask = th.tensor([[1, 1, 1, 1], [0, 1, 1, 0], [0, 0, 0, 1], [1, 0, 0, 0], [0, 0, 0, 0]])
    counts = whole_batch_counts(mode, mask, as_tensor)
    whole = aggregate(loss, mask, mode=mode)
    for split in ([1, 4], [2, 2, 1], [1, 1, 1, 1, 1]):
        pieces = zip(loss.split(split), mask.split(split), strict=True)
        added = th.stack([aggregate(part, part_mask, mode=mode, **counts) for part, part_mask in pieces]).sum()
        assert th.equal(added, whole)
        assert th.equal(*(th.autograd.grad(total, loss, retain_graph=True)[0] for total in (added, whole)))


@pytest.mark.parametrize("mode", MODES)
@given(data=st.data())
@settings(deadline=None, derandomize=True, max_examples=50)
def test_pieces_add_up_for_any_mask(mode: AggregationMode, data: st.DataObject) -> None:
    rows = data.draw(st.integers(2, 6))
    cells = data.draw(st.lists(st.booleans(), min_size=3 * rows, max_size=3 * rows))
    cut = data.draw(st.integers(1, rows - 1))
    mask = th.tensor(cells).reshape(rows, 3)
    loss = th.linspace(-1, 3, 3 * rows, dtype=th.float64).reshape(rows, 3)
    counts = whole_batch_counts(mode, mask, as_tensor=False)
    added = sum(aggregate(loss[part], mask[part], mode=mode, **counts) for part in (slice(cut), slice(cut, None)))
    th.testing.assert_close(added, aggregate(loss, mask, mode=mode))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_poison_outside_the_mask_reaches_nothing(mode: AggregationMode, poison: float) -> None:
    poisoned = th.where(MASK.bool(), LOSS, poison).requires_grad_()
    clean = LOSS.clone().requires_grad_()
    results = [aggregate(loss, MASK, mode=mode) for loss in (poisoned, clean)]
    assert th.equal(*results)
    gradients = [th.autograd.grad(result, loss)[0] for result, loss in zip(results, (poisoned, clean), strict=True)]
    assert th.equal(*gradients)
    assert (gradients[0][MASK == 0] == 0).all()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("total", [None, 0, th.tensor(0), 7])
def test_empty_mask(mode: AggregationMode, total: int | th.Tensor | None) -> None:
    loss = th.full((2, 3), math.nan, requires_grad=True)
    counts: dict[str, Any] = {"total_tokens" if mode == "token-mean" else "total_sequences": total}
    result = aggregate(loss, th.zeros(2, 3), mode=mode, **counts)
    assert result.item() == 0.0
    assert th.autograd.grad(result, loss)[0].tolist() == [[0.0] * 3] * 2


@pytest.mark.parametrize("mode", MODES)
def test_empty_rows_do_not_count(mode: AggregationMode) -> None:
    # Rows without a token change nothing, whatever is in them.
    padding = th.full((3, 4), 1e9)
    padded = aggregate(th.cat((LOSS, padding)), th.cat((MASK, th.zeros_like(padding, dtype=th.int64))), mode=mode)
    assert th.equal(padded, aggregate(LOSS[:2], MASK[:2], mode=mode))


@pytest.mark.parametrize("mode", MODES)
def test_batch_of_one(mode: AggregationMode) -> None:
    assert aggregate(th.tensor([[5.0]]), mode=mode).item() == 5.0
    assert aggregate(th.tensor([[5.0]]), th.ones(1, 1), mode=mode).item() == 5.0


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shape", [(0, 4), (3, 0)])
def test_no_elements_at_all(mode: AggregationMode, shape: tuple[int, int]) -> None:
    assert aggregate(th.zeros(shape), mode=mode).item() == 0.0
    assert aggregate(th.zeros(shape), th.zeros(shape), mode=mode).item() == 0.0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "mean"}, "mode must be one of token-mean, .*, got 'mean'"),
        ({"mode": "token-mean", "total_tokens": -1}, "total_tokens must be >= 0.0, got -1"),
        ({"mode": "token-mean", "total_tokens": th.ones(3)}, r"total_tokens must be .* 0-d .* shape \(3,\)"),
        ({"mode": "seq-mean-token-sum", "total_sequences": -2}, "total_sequences must be >= 0.0, got -2"),
        ({"mode": "seq-mean-token-sum-norm", "horizon": 0}, "horizon must be > 0.0 and finite, got 0"),
        ({"mode": "seq-mean-token-sum-norm", "horizon": math.inf}, "horizon must be > 0.0 and finite, got inf"),
        ({"mode": "token-mean", "total_sequences": 3}, "total_sequences must be None for mode 'token-mean'.*got 3"),
        ({"mode": "seq-mean-token-mean", "total_tokens": 3}, "total_tokens must be None .*-token-mean'.*got 3"),
        ({"mode": "seq-mean-token-sum", "horizon": 3}, "horizon must be None .*-token-sum'.*got 3"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        aggregate(LOSS, MASK, **options)


def test_bad_shapes() -> None:
    with pytest.raises(ValueError, match=r"loss must have shape \(batch, time\), got \(4,\)"):
        aggregate(th.ones(4), mode="token-mean")
    with pytest.raises(ValueError, match=r"mask must have the shape of loss, \(3, 4\), got \(3, 1\)"):
        aggregate(LOSS, th.ones(3, 1), mode="token-mean")


def test_masked_mean() -> None:
    assert masked_mean(LOSS, MASK).item() == pytest.approx(29 / 6)
    assert masked_mean(LOSS).item() == 6.5
    assert masked_mean(th.tensor(4.0)).item() == 4.0
    assert masked_mean(th.tensor([]), None).item() == 0.0
    assert masked_mean(th.ones(2, 2, 2, dtype=th.float64), th.ones(2, 2, 2)).dtype == th.float64
