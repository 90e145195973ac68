"""Conjugate gradient against direct solvers, its exact minimisation property, and what must stop it."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch as th

from sb3_ppo_ext.numerics import conjugate_gradient


def symmetric(eigenvalues: th.Tensor, seed: int = 0) -> th.Tensor:
    """A symmetric matrix with these eigenvalues and random eigenvectors."""
    generator = th.Generator().manual_seed(seed)
    n = len(eigenvalues)
    q, _ = th.linalg.qr(th.randn(n, n, generator=generator, dtype=th.float64))
    a: th.Tensor = q @ th.diag(eigenvalues.double()) @ q.T
    return a


def vector(n: int, seed: int = 1) -> th.Tensor:
    return th.randn(n, generator=th.Generator().manual_seed(seed), dtype=th.float64)


def product(a: th.Tensor) -> Callable[[th.Tensor], th.Tensor]:
    return lambda v: a @ v


def true_residual(a: th.Tensor, x: th.Tensor, b: th.Tensor) -> float:
    return float(np.linalg.norm(b.numpy() - a.numpy() @ x.numpy()) / np.linalg.norm(b.numpy()))


@pytest.mark.parametrize("n", [1, 2, 5, 20, 60])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_equals_a_direct_solver_in_n_steps(n: int, seed: int) -> None:
    generator = th.Generator().manual_seed(seed)
    a = symmetric(0.5 + 9.5 * th.rand(n, generator=generator, dtype=th.float64), seed)
    b = vector(n, seed + 10)
    result = conjugate_gradient(product(a), b, max_steps=n, rtol=1e-10)
    assert result.status == "converged"
    assert 1 <= result.steps <= n
    assert result.residual <= 1e-10
    th.testing.assert_close(result.x, th.linalg.solve(a, b), rtol=0.0, atol=1e-9)


@pytest.mark.parametrize("k", [1, 2, 3, 5])
def test_k_steps_find_the_best_point_of_the_krylov_space(k: int) -> None:
    # The iterate minimises x'Ax/2 - b'x over the span of b, Ab, ..., A^(k-1) b: solved for directly.
    a, b = symmetric(th.linspace(1.0, 8.0, 9)), vector(9)
    basis = np.stack([np.linalg.matrix_power(a.numpy(), i) @ b.numpy() for i in range(k)], axis=1)
    coefficients = np.linalg.solve(basis.T @ a.numpy() @ basis, basis.T @ b.numpy())
    result = conjugate_gradient(product(a), b, max_steps=k, rtol=1e-12)
    assert result.status == "max_steps"
    assert result.steps == k
    np.testing.assert_allclose(result.x.numpy(), basis @ coefficients, rtol=1e-8)
    assert result.residual == pytest.approx(true_residual(a, result.x, b), rel=1e-8)


@pytest.mark.parametrize("distinct", [1, 2, 3, 4])
def test_as_many_steps_as_distinct_eigenvalues(distinct: int) -> None:
    eigenvalues = th.arange(1, distinct + 1).repeat(40)[:40]
    a, b = symmetric(eigenvalues), vector(40)
    result = conjugate_gradient(product(a), b, max_steps=40, rtol=1e-10)
    assert result.status == "converged"
    assert result.steps == distinct
    th.testing.assert_close(result.x, th.linalg.solve(a, b), rtol=0.0, atol=1e-9)


def test_zero_right_hand_side_takes_no_step() -> None:
    def never(v: th.Tensor) -> th.Tensor:
        raise AssertionError("no product is needed")

    result = conjugate_gradient(never, th.zeros(4), max_steps=10)
    assert result.status == "converged"
    assert result.steps == 0
    assert result.residual == 0.0
    assert result.x.equal(th.zeros(4))


def test_stops_at_the_first_step_within_the_tolerance() -> None:
    a, b = symmetric(th.linspace(1.0, 50.0, 30)), vector(30)
    rtol = 1e-3
    result = conjugate_gradient(product(a), b, max_steps=30, rtol=rtol)
    before = conjugate_gradient(product(a), b, max_steps=result.steps - 1, rtol=rtol)
    assert result.status == "converged"
    assert true_residual(a, result.x, b) <= rtol
    assert before.status == "max_steps"
    assert true_residual(a, before.x, b) > rtol


def test_converging_in_the_very_last_step_is_converging() -> None:
    a = symmetric(th.tensor([1.0, 2.0, 5.0]))
    assert conjugate_gradient(product(a), vector(3), max_steps=3, rtol=1e-9).status == "converged"


def test_ill_conditioned_system() -> None:
    a, b = symmetric(th.logspace(-6, 0, 40)), vector(40)
    few = conjugate_gradient(product(a), b, max_steps=5, rtol=1e-10)
    assert few.status == "max_steps"
    assert few.steps == 5
    assert few.residual > 1e-10
    assert few.residual == pytest.approx(true_residual(a, few.x, b), rel=1e-6)
    many = conjugate_gradient(product(a), b, max_steps=2000, rtol=1e-10)
    assert many.status == "converged"
    assert true_residual(a, many.x, b) < 1e-9
    expected = th.linalg.solve(a, b)
    assert (many.x - expected).norm() < 1e-4 * expected.norm()


def test_a_tolerance_below_machine_epsilon_counts_as_epsilon() -> None:
    # Without a floor the squared residual would underflow and p'Ap with it: reported as not positive definite.
    a, b = symmetric(th.linspace(1.0, 4.0, 20)).float(), vector(20).float()
    result = conjugate_gradient(product(a), b, max_steps=1000, rtol=0.0)
    assert result.status == "converged"
    assert result.residual <= th.finfo(th.float32).eps
    assert result.steps < 40
    assert true_residual(a.double(), result.x.double(), b.double()) < 1e-5


@pytest.mark.parametrize(
    ("eigenvalues", "steps"),
    [
        ([1.0, -1.0], 0),  # b = (1, 1): p'Ap is 0 at once
        ([-1.0, -2.0], 0),
        ([0.0, 0.0], 0),
        ([4.0, 2.0, -0.5], 1),  # p'Ap is 5.5, then negative
    ],
)
def test_not_positive_definite_is_reported(eigenvalues: list[float], steps: int) -> None:
    a = th.diag(th.tensor(eigenvalues, dtype=th.float64))
    b = th.ones(len(eigenvalues), dtype=th.float64)
    result = conjugate_gradient(product(a), b, max_steps=10)
    assert result.status == "not_positive_definite"
    assert result.steps == steps
    assert result.x.isfinite().all()
    assert result.residual == pytest.approx(true_residual(a, result.x, b))
    if steps == 0:
        assert result.x.equal(th.zeros_like(b))
    else:
        good = conjugate_gradient(product(a), b, max_steps=steps)
        assert good.status == "max_steps"
        assert result.x.equal(good.x)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("call", [0, 2])
def test_a_product_that_is_not_finite_is_reported(bad: float, call: int) -> None:
    a, b = symmetric(th.linspace(1.0, 9.0, 6)), vector(6)
    calls = 0

    def matvec(v: th.Tensor) -> th.Tensor:
        nonlocal calls
        out = a @ v
        if calls == call:
            out[3] = bad * v[3].sign()  # an infinity of this sign makes p'Ap that infinity
        calls += 1
        return out

    result = conjugate_gradient(matvec, b, max_steps=6, rtol=1e-12)
    assert result.status == "non_finite"
    assert result.steps == call
    assert result.x.isfinite().all()
    assert result.residual == pytest.approx(true_residual(a, result.x, b))


def test_an_overflow_of_the_residual_is_reported() -> None:
    # p'Ap = 1 is fine; the next residual is (0, -1e30), the square of which is infinite in float32.
    result = conjugate_gradient(lambda v: th.tensor([1.0, 1e30]) * v[0], th.tensor([1.0, 0.0]), max_steps=5)
    assert result.status == "non_finite"
    assert result.steps == 0
    assert result.x.equal(th.zeros(2))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_right_hand_side_that_is_not_finite_is_reported(bad: float) -> None:
    result = conjugate_gradient(lambda v: v, th.tensor([1.0, bad, 0.0]), max_steps=5)
    assert result.status == "non_finite"
    assert result.steps == 0
    assert result.residual == 1.0
    assert result.x.equal(th.zeros(3))


def test_draws_no_random_numbers() -> None:
    a, b = symmetric(th.linspace(1.0, 3.0, 8)), vector(8)
    before = th.get_rng_state()
    first = conjugate_gradient(product(a), b, max_steps=3)
    assert th.get_rng_state().equal(before)
    th.manual_seed(12345)
    assert conjugate_gradient(product(a), b, max_steps=3).x.equal(first.x)


@pytest.mark.parametrize("exponent", [-60, -3, 5, 60])
def test_scale_of_the_right_hand_side_changes_nothing_but_the_scale(exponent: int) -> None:
    # In float32 the squares of b underflow or overflow at 2**-60 and 2**60 times these values.
    a, b = symmetric(th.linspace(1.0, 20.0, 12)).float(), 10.0 * vector(12).float()
    scale = 2.0**exponent
    reference = conjugate_gradient(product(a), b, max_steps=4)
    result = conjugate_gradient(product(a), b * scale, max_steps=4)
    assert result[1:] == reference[1:]
    assert result.x.equal(reference.x * scale)


@pytest.mark.parametrize("length", [1e-36, 1e36])
def test_very_small_and_very_large_right_hand_sides(length: float) -> None:
    a, b = symmetric(th.linspace(1.0, 3.0, 5)).float(), vector(5).float() * length
    result = conjugate_gradient(product(a), b, max_steps=10)
    assert result.status == "converged"
    expected = th.linalg.solve(a.double(), b.double())
    assert (result.x - expected).norm() < 1e-5 * expected.norm()


def test_scale_of_the_matrix_scales_the_solution_back() -> None:
    a, b = symmetric(th.linspace(1.0, 20.0, 12)), vector(12)
    reference = conjugate_gradient(product(a), b, max_steps=4)
    result = conjugate_gradient(product(1024.0 * a), b, max_steps=4)
    assert result[1:] == reference[1:]
    assert result.x.equal(reference.x / 1024.0)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(th.float64, 1e-6), (th.float32, 1e-5), (th.bfloat16, 0.05), (th.float16, 0.01)]
)
def test_dtypes(dtype: th.dtype, tolerance: float) -> None:
    diagonal = th.tensor([1.0, 2.0, 4.0], dtype=dtype)
    b = th.tensor([3.0, -1.0, 2.0], dtype=dtype)
    result = conjugate_gradient(lambda v: diagonal * v, b, max_steps=3)
    assert result.x.dtype == dtype
    expected = th.tensor([3.0, -0.5, 0.5], dtype=th.float64)
    assert (result.x.double() - expected).abs().max() < tolerance * 3.0


def test_number_of_products_is_number_of_steps() -> None:
    a, calls = symmetric(th.linspace(1.0, 9.0, 10)), []

    def matvec(v: th.Tensor) -> th.Tensor:
        calls.append(v)
        return a @ v

    result = conjugate_gradient(matvec, vector(10), max_steps=7)
    assert result.steps == len(calls) == 7


def test_no_graph_grows_and_the_right_hand_side_stays() -> None:
    a = symmetric(th.linspace(1.0, 3.0, 4)).requires_grad_()
    b = vector(4).requires_grad_()
    before = b.detach().clone()
    seen: list[bool] = []

    def matvec(v: th.Tensor) -> th.Tensor:
        seen.append(v.requires_grad)
        return a @ v

    result = conjugate_gradient(matvec, b, max_steps=3)
    assert not result.x.requires_grad
    assert seen == [False] * 3
    assert b.detach().equal(before)


def test_a_matvec_that_returns_its_argument() -> None:
    b = vector(5)
    result = conjugate_gradient(lambda v: v, b, max_steps=5)
    assert (result.steps, result.status) == (1, "converged")
    th.testing.assert_close(result.x, b)


def test_default_tolerance_lets_the_usual_15_steps_of_trpo_run() -> None:
    # Spectrum of a damped Fisher matrix: a few large eigenvalues above many at the damping.
    a, b = symmetric(0.1 + th.logspace(-6, 2, 200)), vector(200)
    result = conjugate_gradient(product(a), b, max_steps=15)
    assert (result.steps, result.status) == (15, "max_steps")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_steps": 0}, "max_steps=0"),
        ({"max_steps": 5, "rtol": -1e-3}, "rtol=-0.001"),
        ({"max_steps": 5, "rtol": math.nan}, "rtol=nan"),
        ({"max_steps": 5, "rtol": math.inf}, "rtol=inf"),
        ({"max_steps": 5, "b": th.ones(2, 2)}, r"\(2, 2\)"),
        ({"max_steps": 5, "b": th.ones(0)}, r"\(0,\)"),
        ({"max_steps": 5, "b": th.ones(3, dtype=th.int64)}, "int64"),
        ({"max_steps": 5, "matvec": lambda v: v[:1]}, r"shape \(1,\)"),
        ({"max_steps": 5, "matvec": lambda v: v.double()}, "float64"),
    ],
)
def test_wrong_arguments(arguments: dict[str, object], message: str) -> None:
    valid: dict[str, object] = {"matvec": lambda v: v, "b": th.ones(3)}
    with pytest.raises(ValueError, match=message):
        conjugate_gradient(**(valid | arguments))  # type: ignore[arg-type]
