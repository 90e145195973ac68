"""Backtracking line search: how far to go along a step that is only correct to first order."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import torch as th

from sb3_ppo_ext.numerics.flat import unflatten_like

LineSearchReason = Literal["accepted", "constraint", "improvement", "non_finite"]


class LineSearchResult(NamedTuple):
    """
    What :func:`backtracking_line_search` did. The fields after ``fraction`` describe the last trial, whether it was
    accepted or not. If there was no trial, ``objective`` is its value before the search, the improvements are 0, and
    ``constraint`` is NaN.
    """

    accepted: bool
    """Whether the parameters have moved."""
    fraction: float
    """The part of the full step that was taken; 0 if none was."""
    objective: float
    """f at the last trial."""
    constraint: float
    """c at the last trial."""
    improvement: float
    """f at the last trial minus f before the search."""
    predicted_improvement: float
    """The improvement predicted to first order for the length of the last trial."""
    iterations: int
    """Number of trials, each one call of ``evaluate``."""
    reason: LineSearchReason
    """``accepted``, or why the last trial was refused: ``constraint`` (c above the limit), ``improvement`` (f improved
    too little, or no improvement was predicted), ``non_finite`` (f, c or an argument is NaN or infinite)."""


@th.no_grad()
def backtracking_line_search(
    parameters: Sequence[th.Tensor],
    full_step: th.Tensor,
    evaluate: Callable[[], tuple[th.Tensor | float, th.Tensor | float]],
    *,
    objective_before: float,
    expected_improvement: float,
    constraint_limit: float,
    shrinking_factor: float = 0.8,
    max_iter: int = 10,
    accept_ratio: float = 0.1,
) -> LineSearchResult:
    """
    Maximise ``f(theta)`` subject to ``c(theta) <= constraint_limit`` along ``theta0 + fraction * full_step``.

    The fractions 1, ``shrinking_factor``, ``shrinking_factor**2``, ... are tried in turn. The first one is accepted for
    which::

        c(theta) <= constraint_limit
        f(theta) - f(theta0) >= accept_ratio * fraction * (gradient of f at theta0)' full_step

    Schulman et al. (2015), Trust Region Policy Optimization, section 6 and appendix C, with the sufficient increase of
    Nocedal & Wright, Numerical Optimization, 2nd edition, Algorithm 3.1 and (3.4), instead of requiring any increase.
    The improvement of a trial is compared with the prediction for its own length, because a short step can never reach
    the prediction for the full step.

    Every trial starts from a saved copy of theta0. If the search fails, or ``evaluate`` raises, the copy is restored,
    so that the parameters are the same as before, to the bit. A step without a predicted improvement
    (``expected_improvement`` not positive, or not finite) is refused without a trial. After a trial that is not finite,
    the search goes on, as a shorter step may be finite.

    Each trial transfers data from the device to the host once.

    :param parameters: theta, changed in place, under ``no_grad``
    :param full_step: the step of fraction 1, shape ``(n,)``, n being the number of elements of all parameters
    :param evaluate: f and c at the present theta, as numbers or tensors of one element; called without gradients
    :param objective_before: f at theta0
    :param expected_improvement: first-order improvement of the *full* step: (gradient of f at theta0)' ``full_step``
    :param constraint_limit: largest c that is accepted
    :param shrinking_factor: ratio of two successive fractions, between 0 and 1, both exclusive
    :param max_iter: largest number of trials, at least 1
    :param accept_ratio: share of the predicted improvement that must be reached, 0 to 1
    :return: what happened; ``parameters`` hold the accepted theta, or theta0
    :raises ValueError: if an argument is out of range or of the wrong shape
    """
    if math.isnan(constraint_limit):
        raise ValueError(f"constraint_limit={constraint_limit} is out of range: it must be a number")
    if not 0.0 < shrinking_factor < 1.0:
        raise ValueError(
            f"shrinking_factor={shrinking_factor} is out of range: it must be between 0 and 1, both exclusive"
        )
    if max_iter < 1:
        raise ValueError(f"max_iter={max_iter} is out of range: it must be at least 1")
    if not 0.0 <= accept_ratio <= 1.0:
        raise ValueError(f"accept_ratio={accept_ratio} is out of range: it must be between 0 and 1")
    if full_step.shape != (sum(parameter.numel() for parameter in parameters),):
        raise ValueError(
            f"full_step has the shape {tuple(full_step.shape)}: it must be (n,) with n = "
            f"{sum(parameter.numel() for parameter in parameters)}, the number of elements of parameters"
        )

    result = LineSearchResult(False, 0.0, objective_before, math.nan, 0.0, 0.0, 0, "improvement")
    if not math.isfinite(objective_before) or not math.isfinite(expected_improvement):
        return result._replace(reason="non_finite")
    if expected_improvement <= 0.0:
        return result

    saved = [parameter.clone() for parameter in parameters]
    steps = unflatten_like(full_step, parameters)
    try:
        for trial in range(max_iter):
            fraction = shrinking_factor**trial
            for parameter, origin, step in zip(parameters, saved, steps, strict=True):
                parameter.copy_(origin + fraction * step)
            objective, constraint = _to_host(*evaluate())
            improvement = objective - objective_before
            predicted = fraction * expected_improvement
            reason: LineSearchReason
            if not math.isfinite(objective) or not math.isfinite(constraint):
                reason = "non_finite"
            elif constraint > constraint_limit:
                reason = "constraint"
            elif improvement < accept_ratio * predicted:
                reason = "improvement"
            else:
                reason = "accepted"
            accepted = reason == "accepted"
            result = LineSearchResult(
                accepted=accepted,
                fraction=fraction if accepted else 0.0,
                objective=objective,
                constraint=constraint,
                improvement=improvement,
                predicted_improvement=predicted,
                iterations=trial + 1,
                reason=reason,
            )
            if accepted:
                break
    finally:
        if not result.accepted:
            for parameter, origin in zip(parameters, saved, strict=True):
                parameter.copy_(origin)
    return result


def _to_host(objective: th.Tensor | float, constraint: th.Tensor | float) -> tuple[float, float]:
    """Read both numbers, in one transfer if both are tensors of one device."""
    if isinstance(objective, th.Tensor) and isinstance(constraint, th.Tensor) and objective.device == constraint.device:
        objective, constraint = th.stack((objective.reshape(()), constraint.reshape(()))).tolist()
    return float(objective), float(constraint)
