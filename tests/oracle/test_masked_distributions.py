"""Masked distributions: what is not allowed has probability and gradient 0, and the rest is as if it was not there."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch as th

from sb3_ppo_ext.common.distributions import Bernoulli, Categorical, Gaussian

DISCRETE = Categorical((4,))
MULTI = Categorical((3, 2))
BINARY = Bernoulli(2)


def mask_of(*allowed: int, size: int) -> th.Tensor:
    mask = th.zeros(1, size, dtype=th.bool)
    mask[0, list(allowed)] = True
    return mask


CASES: list[tuple[Any, th.Tensor, list[list[int]]]] = [
    (DISCRETE, mask_of(0, 2, 3, size=4), [[0], [2], [3]]),
    (MULTI, mask_of(0, 2, 3, 4, size=5), [[a, b] for a in (0, 2) for b in (0, 1)]),
    (MULTI, mask_of(1, 4, size=5), [[1, 1]]),
    (BINARY, mask_of(0, 1, 3, size=4), [[0, 1], [1, 1]]),  # the second must be 1
    (BINARY, mask_of(0, 2, size=4), [[0, 0]]),
]
NAMES = ["discrete", "multi-discrete", "one is left", "binary", "binary, one is left"]


def params_of(family: Any, seed: int = 0) -> th.Tensor:
    generator = th.Generator().manual_seed(seed)
    return th.randn(1, family.n_params, dtype=th.float64, generator=generator)


def all_actions(family: Any) -> list[list[int]]:
    sizes = family.sizes if isinstance(family, Categorical) else [2] * family.dim
    return [list(action) for action in itertools.product(*map(range, sizes))]


@pytest.mark.parametrize(("family", "mask", "allowed"), CASES, ids=NAMES)
def test_probabilities_entropy_and_kl_by_enumeration(family: Any, mask: th.Tensor, allowed: list[list[int]]) -> None:
    params, other = (family.masked(params_of(family, seed), mask) for seed in (0, 1))
    log_probs = {
        tuple(a): [family.log_prob(p, th.tensor([a], dtype=th.float64)).item() for p in (params, other)]
        for a in all_actions(family)
    }
    for action, (log_prob, _) in log_probs.items():
        assert (math.exp(log_prob) > 0.0) == (list(action) in allowed)
    pairs = [(math.exp(p), p, q) for p, q in (log_probs[tuple(a)] for a in allowed)]
    assert sum(p for p, *_ in pairs) == pytest.approx(1.0)
    assert family.entropy(params).item() == pytest.approx(-sum(p * log_p for p, log_p, _ in pairs), abs=1e-12)
    assert family.kl(params, other).item() == pytest.approx(sum(p * (log_p - q) for p, log_p, q in pairs), abs=1e-12)
    if len(allowed) == 1:
        assert family.entropy(params).item() == family.kl(params, other).item() == 0.0


@pytest.mark.parametrize(("family", "mask", "allowed"), CASES, ids=NAMES)
def test_no_gradient_reaches_what_is_not_allowed(family: Any, mask: th.Tensor, allowed: list[list[int]]) -> None:
    params = params_of(family).requires_grad_()
    masked, old = family.masked(params, mask), family.masked(params_of(family, 1), mask)
    actions = th.tensor(allowed[:1], dtype=th.float64)
    outputs = family.log_prob(masked, actions) + family.entropy(masked) + family.kl(old, masked)
    (gradient,) = th.autograd.grad(outputs.sum(), params)
    assert gradient.isfinite().all()
    if isinstance(family, Categorical):
        assert (gradient[~mask] == 0.0).all()
    tangent = th.ones_like(params)
    assert family.fisher(masked.detach(), tangent).isfinite().all()
    if len(allowed) == 1:
        assert (gradient == 0.0).all()


@pytest.mark.parametrize(("family", "mask", "allowed"), CASES, ids=NAMES)
def test_only_what_is_allowed_is_drawn(family: Any, mask: th.Tensor, allowed: list[list[int]]) -> None:
    th.manual_seed(0)
    params = family.masked(params_of(family).expand(5000, -1), mask.expand(5000, -1))
    drawn = {tuple(int(x) for x in action) for action in family.sample(params).tolist()}
    assert drawn == {tuple(action) for action in allowed}
    assert [int(x) for x in family.mode(params)[0]] in allowed


def test_the_gradient_is_that_of_the_problem_without_the_actions() -> None:
    """Three choices of which one is masked, and two choices."""
    logits = th.tensor([[0.3, -1.2, 0.8]], dtype=th.float64, requires_grad=True)
    mask = mask_of(0, 2, size=3)
    full, rest = Categorical((3,)), Categorical((2,))
    few = logits.detach()[:, [0, 2]].requires_grad_()
    masked = full.masked(logits, mask)
    ours = full.log_prob(masked, th.tensor([[2.0]])) + 0.1 * full.entropy(masked)
    theirs = rest.log_prob(few, th.tensor([[1.0]])) + 0.1 * rest.entropy(few)
    assert ours.item() == pytest.approx(theirs.item())
    (gradient,), (expected,) = th.autograd.grad(ours, logits), th.autograd.grad(theirs, few)
    th.testing.assert_close(gradient[:, [0, 2]], expected)
    assert gradient[0, 1].item() == 0.0


def test_a_box_cannot_be_masked() -> None:
    with pytest.raises(NotImplementedError, match="Box"):
        Gaussian(1).masked(th.zeros(1, 2), th.ones(1, 1, dtype=th.bool))
