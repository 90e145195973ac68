"""``as_schedule`` and ``value_at``: numbers, the RL Zoo's strings and functions, and what is refused."""

from __future__ import annotations

import math
import pickle
from typing import Any

import numpy as np
import pytest
import torch as th
from stable_baselines3.common.utils import ConstantSchedule, FloatSchedule, LinearSchedule

from sb3_ppo_ext.common.errors import ArgumentError
from sb3_ppo_ext.common.validation import as_schedule, value_at

PROGRESS = (1.0, 0.75, 0.5, 0.0)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (0.25, [0.25, 0.25, 0.25, 0.25]),
        (3, [3.0, 3.0, 3.0, 3.0]),
        (np.float32(0.5), [0.5, 0.5, 0.5, 0.5]),
        ("lin_0.2", [0.2, 0.15, 0.1, 0.0]),
        ("lin_4", [4.0, 3.0, 2.0, 0.0]),
        ("lin_1e-3", [1e-3, 7.5e-4, 5e-4, 0.0]),
        (lambda progress: progress**2, [1.0, 0.5625, 0.25, 0.0]),
        (lambda progress: th.tensor(2.0 * progress), [2.0, 1.5, 1.0, 0.0]),
        (lambda progress: np.array(progress), [1.0, 0.75, 0.5, 0.0]),
        (lambda _: 0, [0.0, 0.0, 0.0, 0.0]),
        (ConstantSchedule(0.7), [0.7, 0.7, 0.7, 0.7]),
        (LinearSchedule(0.4, 0.2, 0.5), [0.4, 0.3, 0.2, 0.2]),
        (FloatSchedule(0.125), [0.125, 0.125, 0.125, 0.125]),
    ],
)
def test_what_is_taken(given: Any, expected: list[float]) -> None:
    schedule = as_schedule("rate", given)
    values = [schedule(progress) for progress in PROGRESS]
    assert values == pytest.approx(expected)
    assert all(type(value) is float for value in values)
    assert isinstance(schedule, FloatSchedule)
    assert [value_at(given, progress) for progress in PROGRESS] == pytest.approx(expected)


@pytest.mark.parametrize("number", [0, 0.0, np.float64(0.0)])
def test_zero_is_taken_where_it_may_be(number: Any) -> None:
    assert as_schedule("weight", number, may_be_zero=True)(0.5) == 0.0
    with pytest.raises(ArgumentError, match=r"weight=.*0.* is not allowed: it must be a finite number above 0"):
        as_schedule("weight", number)


def test_a_schedule_of_a_number_or_a_string_can_be_pickled() -> None:
    """So that a saved model holds no code."""
    for given in (0.5, "lin_1"):
        content = pickle.dumps(as_schedule("rate", given))
        assert pickle.loads(content)(0.5) == 0.5


@pytest.mark.parametrize("may_be_zero", [False, True])
@pytest.mark.parametrize("number", [-1e-3, math.nan, math.inf, -math.inf, True, None, (0.1, 0.2), [0.1], 1j, b"lin_1"])
def test_what_is_no_such_number_is_refused(number: Any, may_be_zero: bool) -> None:
    with pytest.raises(ArgumentError) as error:
        as_schedule("rate", number, may_be_zero=may_be_zero)
    bound = "at least 0" if may_be_zero else "above 0"
    assert str(error.value) == f"rate={number!r} is not allowed: it must be a finite number {bound}"


@pytest.mark.parametrize(
    "string", ["", "lin", "lin_", "lin_x", "lin_0", "lin_-1", "lin_nan", "lin_inf", "exp_0.1", "0.1", "LIN_1"]
)
def test_a_string_that_says_no_schedule_is_refused(string: str) -> None:
    with pytest.raises(ArgumentError) as error:
        as_schedule("rate", string, may_be_zero=True)
    assert str(error.value) == (
        f"rate={string!r} is not allowed: it must be a number, a function, or 'lin_' and a positive number"
    )


def raises(progress: float) -> float:
    raise ZeroDivisionError("by nothing")


@pytest.mark.parametrize(
    ("function", "progress", "what"),
    [
        (lambda _: -0.1, "1", "returns -0.1"),
        (lambda progress: progress - 0.1, "0", "returns -0.1"),
        (lambda progress: math.nan if progress == 0.5 else 1.0, "0.5", "returns nan"),
        (lambda _: math.inf, "1", "returns inf"),
        (lambda _: None, "1", "returns None"),
        (lambda _: "a", "1", "returns 'a'"),
        (lambda _: th.zeros(2), "1", r"returns tensor\(\[0., 0.\]\)"),
        (lambda: 0.1, "1", "raises an error"),
        (raises, "1", "raises an error"),
    ],
)
def test_a_function_that_returns_no_such_number_is_refused(function: Any, progress: str, what: str) -> None:
    with pytest.raises(ArgumentError, match=f"rate=<function .*is not allowed: at progress {progress} it {what}, and"):
        as_schedule("rate", function)
