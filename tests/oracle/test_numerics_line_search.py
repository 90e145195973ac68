"""The line search on functions whose answer is found by hand, and what it leaves behind when it fails."""

import math
from collections.abc import Callable, Iterable, Sequence

import pytest
import torch as th
from torch import nn

from sb3_ppo_ext.numerics import LineSearchResult, backtracking_line_search

Evaluate = Callable[[], tuple[th.Tensor | float, th.Tensor | float]]


def point(value: float = 0.0) -> th.Tensor:
    return th.tensor([value], dtype=th.float64)


def search(
    theta: th.Tensor,
    step: float,
    evaluate: Evaluate,
    *,
    objective_before: float = 0.0,
    expected_improvement: float | None = None,
    constraint_limit: float = math.inf,
    shrinking_factor: float = 0.5,
    max_iter: int = 10,
    accept_ratio: float = 0.1,
) -> LineSearchResult:
    """One dimension, from f = 0 with a gradient of 1 unless told otherwise."""
    return backtracking_line_search(
        [theta],
        point(step),
        evaluate,
        objective_before=objective_before,
        expected_improvement=step if expected_improvement is None else expected_improvement,
        constraint_limit=constraint_limit,
        shrinking_factor=shrinking_factor,
        max_iter=max_iter,
        accept_ratio=accept_ratio,
    )


def parabola(theta: th.Tensor) -> Evaluate:
    """f = t - t^2: gradient 1 at 0, and f/t = 1 - t."""
    return lambda: (theta.sum() - (theta * theta).sum(), 0.0)


def test_full_step_is_accepted() -> None:
    theta = point()
    result = search(theta, 0.5, parabola(theta))
    assert result == LineSearchResult(
        accepted=True,
        fraction=1.0,
        objective=0.25,
        constraint=0.0,
        improvement=0.25,
        predicted_improvement=0.5,
        iterations=1,
        reason="accepted",
    )
    assert theta.item() == 0.5


def test_shrinks_as_often_as_the_parabola_demands() -> None:
    # f >= 0.1 t where t <= 0.9: of 4, 2, 1, 1/2 the last.
    theta = point()
    result = search(theta, 4.0, parabola(theta))
    assert result == LineSearchResult(
        accepted=True,
        fraction=0.125,
        objective=0.25,
        constraint=0.0,
        improvement=0.25,
        predicted_improvement=0.5,
        iterations=4,
        reason="accepted",
    )
    assert theta.item() == 0.5


def test_shrinks_by_the_factor_asked_for() -> None:
    # f >= 0.1 t where t <= 0.9: 0.8 ** 3 = 0.512 and 0.8 ** 4 = 0.4096 of 2 are 1.024 and 0.8192.
    theta = point()
    result = search(theta, 2.0, parabola(theta), shrinking_factor=0.8)
    assert result.iterations == 5
    assert result.fraction == pytest.approx(0.4096)
    assert theta.item() == pytest.approx(0.8192)


def test_improvement_is_counted_from_the_objective_before() -> None:
    theta = point()
    result = search(theta, 0.5, lambda: (7.0 + theta.sum(), 0.0), objective_before=7.0)
    assert (result.accepted, result.objective, result.improvement) == (True, 7.5, 0.5)
    # 7.0 itself is no improvement, however large the number.
    assert not search(point(), 0.5, lambda: (7.0, 0.0), objective_before=7.0).accepted


def test_accepted_exactly_at_the_constraint() -> None:
    # c = t^2 on a straight line; 4, 2: c = 16, 4.
    theta = point()
    result = search(theta, 4.0, lambda: (theta.sum(), (theta * theta).sum()), constraint_limit=4.0)
    assert (result.iterations, result.constraint, theta.item()) == (2, 4.0, 2.0)
    theta = point()
    limit = math.nextafter(4.0, 0.0)
    result = search(theta, 4.0, lambda: (theta.sum(), (theta * theta).sum()), constraint_limit=limit)
    assert (result.iterations, result.constraint, theta.item()) == (3, 1.0, 1.0)


def test_accepted_exactly_at_the_improvement() -> None:
    # f = t / 2 where t = 1/2, the fourth trial from 4.
    theta = point()
    result = search(theta, 4.0, parabola(theta), accept_ratio=0.5)
    assert (result.iterations, theta.item()) == (4, 0.5)
    theta = point()
    result = search(theta, 4.0, parabola(theta), accept_ratio=math.nextafter(0.5, 1.0))
    assert (result.iterations, theta.item()) == (5, 0.25)


def test_prediction_is_that_of_the_length_tried() -> None:
    # On a straight line every length reaches what is predicted for it; 1/8 is all that the constraint allows, and less
    # than half of what is predicted for the full step.
    theta = point()
    result = search(theta, 1.0, lambda: (theta.sum(), theta.sum()), constraint_limit=0.125, accept_ratio=1.0)
    assert result.accepted
    assert (result.fraction, result.improvement, result.predicted_improvement) == (0.125, 0.125, 0.125)


def test_prediction_is_not_taken_for_smaller_than_it_is() -> None:
    # f = 0.09 t falls short of 0.1 t at every length.
    theta = point()
    result = search(theta, 1.0, lambda: (0.09 * theta.sum(), 0.0), max_iter=6)
    assert (result.accepted, result.reason, result.iterations) == (False, "improvement", 6)
    assert result.predicted_improvement == 1.0 / 32.0
    assert search(theta, 1.0, lambda: (0.11 * theta.sum(), 0.0), max_iter=6).iterations == 1


def awkward_parameters() -> tuple[list[th.Tensor], th.Tensor]:
    """Parameters and a step such that adding the step and subtracting it again does not lead back."""
    generator = th.Generator().manual_seed(0)
    parameters: list[th.Tensor] = [
        nn.Parameter(th.randn(3, 4, generator=generator).T),
        nn.Parameter(th.tensor(-0.0)),
        nn.Parameter(1e-6 * th.randn(5, generator=generator)),
    ]
    step = 7.3 * th.randn(18, generator=generator)
    flat = th.cat([p.detach().reshape(-1) for p in parameters])
    assert not ((flat + step) - step).equal(flat)
    return parameters, step


def bits(parameters: Iterable[th.Tensor]) -> list[th.Tensor]:
    """A copy of the bits, in which -0 and 0 differ."""
    return [p.detach().clone(memory_format=th.contiguous_format).view(th.int32) for p in parameters]


def same(a: Sequence[th.Tensor], b: Sequence[th.Tensor]) -> bool:
    return all(x.equal(y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize(
    ("objective", "constraint", "reason"),
    [
        (1e9, 2.0, "constraint"),
        (1e9, math.inf, "non_finite"),
        (0.0, 0.0, "improvement"),
        (-1.0, 0.0, "improvement"),
        (math.nan, 0.0, "non_finite"),
        (math.inf, 0.0, "non_finite"),
        (1e9, math.nan, "non_finite"),
        (math.nan, 2.0, "non_finite"),
    ],
)
@pytest.mark.parametrize("tensors", [True, False])
def test_failure_restores_to_the_bit_and_says_why(
    objective: float, constraint: float, reason: str, tensors: bool
) -> None:
    parameters, step = awkward_parameters()
    before, storage = bits(parameters), [p.data_ptr() for p in parameters]
    calls: list[bool] = []

    def evaluate() -> tuple[th.Tensor | float, th.Tensor | float]:
        calls.append(same(bits(parameters), before))
        return (th.tensor(objective), th.tensor(constraint)) if tensors else (objective, constraint)

    result = backtracking_line_search(
        parameters,
        step,
        evaluate,
        objective_before=0.0,
        expected_improvement=1.0,
        constraint_limit=1.0,
        shrinking_factor=0.5,
        max_iter=3,
    )
    assert not result.accepted
    assert result.reason == reason
    assert (result.fraction, result.iterations, result.predicted_improvement) == (0.0, 3, 0.25)
    assert result.objective == pytest.approx(objective, nan_ok=True)
    assert result.constraint == pytest.approx(constraint, nan_ok=True)
    assert calls == [False] * 3  # the parameters had moved in every trial
    assert same(bits(parameters), before)
    assert [p.data_ptr() for p in parameters] == storage


def test_every_trial_starts_from_the_original() -> None:
    parameters, step = awkward_parameters()
    origin = [p.detach().clone() for p in parameters]
    seen: list[list[th.Tensor]] = []

    def evaluate() -> tuple[float, float]:
        seen.append([p.detach().clone() for p in parameters])
        return (1.0 if len(seen) == 4 else 0.0), 0.0

    result = backtracking_line_search(
        parameters, step, evaluate, objective_before=0.0, expected_improvement=1.0, constraint_limit=1.0
    )
    assert (result.accepted, result.iterations) == (True, 4)
    pieces = [step[:12].reshape(4, 3), step[12], step[13:]]
    for fraction, trial in zip([1.0, 0.8, 0.64, 0.512], seen, strict=True):
        for theta, start, piece in zip(trial, origin, pieces, strict=True):
            th.testing.assert_close(theta, start + fraction * piece, rtol=1e-6, atol=1e-7)
    assert same([p.detach() for p in parameters], seen[3])


def test_parameters_stay_trainable_and_evaluation_builds_no_graph() -> None:
    parameter = nn.Parameter(th.zeros(2))
    parameter.grad = th.ones(2)

    def evaluate() -> tuple[th.Tensor, th.Tensor]:
        objective = parameter.sum()
        assert not objective.requires_grad
        return objective, th.zeros(())

    result = backtracking_line_search(
        [parameter],
        th.ones(2, requires_grad=True),
        evaluate,
        objective_before=0.0,
        expected_improvement=2.0,
        constraint_limit=1.0,
    )
    assert result.accepted
    assert parameter.requires_grad
    assert parameter.is_leaf
    assert parameter.grad.equal(th.ones(2))
    assert parameter.detach().equal(th.ones(2))


def test_a_trial_that_is_not_finite_is_followed_by_a_shorter_one() -> None:
    theta = point()
    result = search(theta, 4.0, lambda: (theta.sum() if theta.item() < 4.0 else math.nan, 0.0))
    assert (result.accepted, result.iterations, theta.item()) == (True, 2, 2.0)


def test_reason_is_that_of_the_last_trial() -> None:
    theta = point()
    result = search(theta, 4.0, lambda: (0.0, theta.sum()), constraint_limit=1.5, max_iter=3)
    assert (result.reason, result.iterations, result.constraint) == ("improvement", 3, 1.0)
    result = search(theta, 4.0, lambda: (0.0, theta.sum()), constraint_limit=1.5, max_iter=2)
    assert (result.reason, result.iterations, result.constraint) == ("constraint", 2, 2.0)


@pytest.mark.parametrize(
    ("objective_before", "expected_improvement", "reason"),
    [
        (0.0, 0.0, "improvement"),
        (0.0, -1.0, "improvement"),
        (0.0, math.nan, "non_finite"),
        (0.0, math.inf, "non_finite"),
        (0.0, -math.inf, "non_finite"),
        (math.nan, 1.0, "non_finite"),
        (math.inf, 1.0, "non_finite"),
    ],
)
def test_a_step_that_promises_nothing_is_refused_without_a_trial(
    objective_before: float, expected_improvement: float, reason: str
) -> None:
    def never() -> tuple[float, float]:
        raise AssertionError("there must be no trial")

    theta = point(0.1)
    version = theta._version
    result = search(theta, 1.0, never, objective_before=objective_before, expected_improvement=expected_improvement)
    assert (result.accepted, result.fraction, result.iterations, result.reason) == (False, 0.0, 0, reason)
    assert result.objective == pytest.approx(objective_before, nan_ok=True)
    assert math.isnan(result.constraint)
    assert (result.improvement, result.predicted_improvement) == (0.0, 0.0)
    assert theta.item() == 0.1
    assert theta._version == version


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_exception_restores_and_goes_on(error: type[BaseException]) -> None:
    parameters, step = awkward_parameters()
    before = bits(parameters)
    calls = 0

    def evaluate() -> tuple[float, float]:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise error("from evaluate")
        return 0.0, 0.0

    with pytest.raises(error, match="from evaluate"):
        backtracking_line_search(
            parameters, step, evaluate, objective_before=0.0, expected_improvement=1.0, constraint_limit=1.0
        )
    assert calls == 2
    assert same(bits(parameters), before)


def test_default_number_of_trials_and_factor() -> None:
    result = backtracking_line_search(
        [point()],
        point(1.0),
        lambda: (0.0, 0.0),
        objective_before=0.0,
        expected_improvement=1.0,
        constraint_limit=1.0,
    )
    assert result.iterations == 10
    assert result.predicted_improvement == pytest.approx(0.134217728)  # 0.8 ** 9


def test_one_trial_only() -> None:
    theta = point()
    assert search(theta, 4.0, parabola(theta), max_iter=1).iterations == 1
    assert theta.item() == 0.0
    assert search(theta, 4.0, parabola(theta), max_iter=4).accepted


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"shrinking_factor": 0.0}, r"shrinking_factor=0\.0"),
        ({"shrinking_factor": 1.0}, r"shrinking_factor=1\.0"),
        ({"shrinking_factor": math.nan}, "shrinking_factor=nan"),
        ({"max_iter": 0}, "max_iter=0"),
        ({"accept_ratio": -0.1}, r"accept_ratio=-0\.1"),
        ({"accept_ratio": 1.1}, r"accept_ratio=1\.1"),
        ({"constraint_limit": math.nan}, "constraint_limit=nan"),
        ({"full_step": th.ones(3)}, r"full_step has the shape \(3,\): it must be \(n,\) with n = 2"),
        ({"full_step": th.ones(1, 2)}, r"full_step has the shape \(1, 2\)"),
    ],
)
def test_wrong_arguments(arguments: dict[str, object], message: str) -> None:
    valid: dict[str, object] = {
        "full_step": th.ones(2),
        "objective_before": 0.0,
        "expected_improvement": 1.0,
        "constraint_limit": 1.0,
    }
    parameter = th.zeros(2)
    with pytest.raises(ValueError, match=message):
        backtracking_line_search(
            [parameter],
            evaluate=lambda: (1.0, 0.0),
            **(valid | arguments),  # type: ignore[arg-type]
        )
    assert parameter.equal(th.zeros(2))
