"""Conjugate gradient: solve A x = b for a positive definite A that is known only by its products with vectors."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import torch as th

CGStatus = Literal["converged", "max_steps", "not_positive_definite", "non_finite"]


class CGResult(NamedTuple):
    """What :func:`conjugate_gradient` found, and how it ended."""

    x: th.Tensor
    """The solution, or the last good iterate; shape ``(n,)``."""
    steps: int
    """Number of steps after which ``x`` was reached."""
    residual: float
    """Relative residual ``||b - A x|| / ||b||``, from the recurrence; equal to the true residual up to rounding."""
    status: CGStatus
    """``converged``: the residual is at most ``rtol``. ``max_steps``: it is still larger after ``max_steps`` steps.
    ``not_positive_definite``: a direction p had ``p'Ap <= 0``. ``non_finite``: ``b`` or a product contained a NaN or an
    infinity."""


def conjugate_gradient(
    matvec: Callable[[th.Tensor], th.Tensor], b: th.Tensor, *, max_steps: int, rtol: float = 1e-6
) -> CGResult:
    """
    Solve ``A x = b`` for a symmetric positive definite A, starting from x = 0::

        x = 0,  r = p = b
        repeat:  alpha = r'r / p'Ap
                 x <- x + alpha p
                 r_new = r - alpha Ap
                 p <- r_new + (r_new'r_new / r'r) p
                 r <- r_new

    Hestenes & Stiefel (1952); Nocedal & Wright, Numerical Optimization, 2nd edition, Algorithm 5.2.

    It differs from the textbook algorithm as follows:

    - ``b`` is first scaled to length 1, and the solution is scaled back, so that the squares neither overflow nor
      underflow, and the vectors passed to ``matvec`` do not depend on the length of ``b``.
    - It stops when the relative residual is at most ``rtol``. A tolerance below the machine epsilon of the dtype is
      replaced by the epsilon: below it, the recurrence still falls, but the true residual does not.
    - It also stops at ``p'Ap <= 0`` (as in Algorithm 7.1) and at a number that is not finite. That step is not taken:
      ``x`` is the previous iterate (0 at the first step), so it never contains a NaN, and ``status`` gives the reason.

    Each step transfers data from the device to the host once, and there is one transfer before the first step.

    The default of ``rtol`` is 1e-6 because the relative error of ``x`` is at most the condition number of A times the
    relative residual: up to a condition number of 1e4, which is large for a damped Fisher matrix, TRPO's step is
    accurate to 1%.

    :param matvec: the product with A; it gets a vector of the shape, dtype and device of ``b``, which it must not
        change, and returns such a vector
    :param b: right-hand side, shape ``(n,)``, any floating dtype
    :param max_steps: largest number of steps, at least 1; n steps suffice in exact arithmetic
    :param rtol: relative residual at which to stop, at least 0
    :return: the solution, the number of steps, the relative residual and the status
    :raises ValueError: if an argument is out of range, or ``matvec`` returns another shape or dtype
    """
    if b.ndim != 1 or b.numel() == 0 or not b.is_floating_point():
        raise ValueError(f"b is {b.dtype} of shape {tuple(b.shape)}: it must be floating and of shape (n,), n >= 1")
    if max_steps < 1:
        raise ValueError(f"max_steps={max_steps} is out of range: it must be at least 1")
    if not 0.0 <= rtol < math.inf:
        raise ValueError(f"rtol={rtol} is out of range: it must be finite and at least 0")

    b = b.detach()
    x = th.zeros_like(b)
    largest = b.abs().amax()
    r = b / largest
    length = th.linalg.vector_norm(r)
    host_largest, host_length = _to_host(largest, length)
    if host_largest == 0.0:
        return CGResult(x, 0, 0.0, "converged")
    if not math.isfinite(host_largest) or not math.isfinite(host_length):
        return CGResult(x, 0, 1.0, "non_finite")
    r = r / length

    p = r
    rr = 1.0
    steps = 0
    tolerance = max(rtol, th.finfo(b.dtype).eps)
    status: CGStatus = "max_steps"
    while steps < max_steps:
        a_p = matvec(p).detach()
        if a_p.shape != b.shape or a_p.dtype != b.dtype:
            raise ValueError(
                f"matvec returned {a_p.dtype} of shape {tuple(a_p.shape)}: "
                f"it must be {b.dtype} of shape {tuple(b.shape)}, as b is"
            )
        curvature = p.dot(a_p)
        alpha = rr / curvature
        next_x = x + alpha * p
        next_r = r - alpha * a_p
        host_curvature, next_rr = _to_host(curvature, next_r.dot(next_r))
        if -math.inf < host_curvature <= 0.0:
            status = "not_positive_definite"
            break
        if not math.isfinite(host_curvature) or not math.isfinite(next_rr):
            status = "non_finite"
            break
        x, r = next_x, next_r
        p = r + (next_rr / rr) * p
        rr = next_rr
        steps += 1
        if math.sqrt(rr) <= tolerance:
            status = "converged"
            break
    return CGResult(x * length * largest, steps, math.sqrt(rr), status)


def _to_host(*scalars: th.Tensor) -> list[float]:
    """Read 0-d tensors in one transfer."""
    return [float(number) for number in th.stack(scalars).tolist()]
