"""Check arguments before training starts, with errors that name the argument, its value and what is allowed."""

from __future__ import annotations

import difflib
import math
import os
import re
from collections.abc import Callable, Sequence
from numbers import Integral, Real

import torch as th
from stable_baselines3.common.type_aliases import Schedule
from stable_baselines3.common.utils import FloatSchedule, get_device

from sb3_ppo_ext.common.errors import ArgumentError
from sb3_ppo_ext.common.schedules import EXAMPLES, schedule_in_words


def check_int(name: str, value: object, *, minimum: int, maximum: float = math.inf) -> None:
    """
    :param name: of the argument
    :param value: given
    :param minimum: the least that is allowed
    :param maximum: the most that is allowed
    :raises ArgumentError: unless ``value`` is an integer from ``minimum`` to ``maximum``
    """
    if isinstance(value, bool) or not isinstance(value, Integral) or not minimum <= int(value) <= maximum:
        at_most = "" if maximum == math.inf else f" and at most {maximum}"
        raise ArgumentError(f"{name}={value!r} is not allowed: it must be an integer of at least {minimum}{at_most}")


def check_bool(name: str, value: object) -> None:
    """
    :param name: of the argument
    :param value: given
    :raises ArgumentError: unless ``value`` is True or False
    """
    if not isinstance(value, bool):
        raise ArgumentError(f"{name}={value!r} is not allowed: it must be True or False")


def check_real(
    name: str,
    value: object,
    *,
    above: float = -math.inf,
    at_least: float = -math.inf,
    at_most: float = math.inf,
    below: float = math.inf,
    finite: bool = True,
) -> None:
    """
    :param name: of the argument
    :param value: given
    :param above: exclusive lower bound
    :param at_least: inclusive lower bound
    :param at_most: inclusive upper bound
    :param below: exclusive upper bound, if finite
    :param finite: whether infinity is refused
    :raises ArgumentError: unless ``value`` is a number within the bounds
    """
    if (
        isinstance(value, bool)
        or not isinstance(value, Real)
        or math.isnan(value)
        or (finite and math.isinf(value))
        or (math.isfinite(below) and not float(value) < below)
        or not (above < float(value) and at_least <= float(value) <= at_most)
    ):
        bounds = [f"above {above:g}"] if above > -math.inf else []
        bounds += [f"at least {at_least:g}"] if at_least > -math.inf else []
        bounds += [f"at most {at_most:g}"] if at_most < math.inf else []
        bounds += [f"below {below:g}"] if below < math.inf else []
        allowed = " ".join(["a finite number" if finite else "a number", " and ".join(bounds)]).strip()
        raise ArgumentError(f"{name}={value!r} is not allowed: it must be {allowed}")


def check_one_of(name: str, value: object, allowed: Sequence[str]) -> None:
    """
    :param name: of the argument
    :param value: given
    :param allowed: what it may be
    :raises ArgumentError: unless ``value`` is one of ``allowed``
    """
    if value not in allowed:
        raise ArgumentError(f"{name}={value!r} is not allowed: it must be one of {', '.join(map(repr, allowed))}")


def check_device(device: object) -> None:
    """
    :param device: given
    :raises ArgumentError: unless it is "auto", or names a device that torch can use. As in SB3, "cuda" means the CPU
        where there is no GPU
    """
    try:
        th.zeros(1, device=get_device(device)).item()  # type: ignore[arg-type]
    except (AssertionError, RuntimeError, TypeError) as error:  # which one depends on device and build
        reason = str(error).partition("\n")[0]
        raise ArgumentError(
            f"device={device!r} is not allowed: it must be 'auto', 'cpu', 'cuda' or another device that torch can use "
            f"here ({reason})"
        ) from None


def check_output(verbose: object, tensorboard_log: object) -> None:
    """
    :param verbose: given
    :param tensorboard_log: given
    :raises ArgumentError: unless ``verbose`` is an integer or a bool, and ``tensorboard_log`` a path or None
    """
    if not isinstance(verbose, Integral):
        raise ArgumentError(f"verbose={verbose!r} is not allowed: it must be 0, 1 or 2")
    if not (tensorboard_log is None or isinstance(tensorboard_log, (str, os.PathLike))):
        raise ArgumentError(
            f"tensorboard_log={tensorboard_log!r} is not allowed: it must be the path of a folder, or None"
        )


def as_schedule(name: str, value: float | str | Schedule, *, may_be_zero: bool = False) -> FloatSchedule:
    """
    Convert an argument to a schedule.

    :param name: of the argument
    :param value: a positive number, a schedule in words (:mod:`sb3_ppo_ext.common.schedules`), or a function of the
        remaining progress (1 at the beginning of training, 0 at its end)
    :param may_be_zero: whether a number may be 0; the values of a function always may
    :return: the schedule
    :raises ArgumentError: for anything else, and for a function that does not return finite numbers of at least 0
    """
    if isinstance(value, str):
        return FloatSchedule(_in_words(name, value))
    if callable(value):
        _check_function(name, value)
        return FloatSchedule(value)
    if may_be_zero:
        check_real(name, value, at_least=0.0)
    else:
        check_real(name, value, above=0.0)
    return FloatSchedule(float(value))


def value_at(value: float | str | Schedule, progress_remaining: float) -> float:
    """
    :param value: what :func:`as_schedule` takes
    :param progress_remaining: 1 at the beginning of training, 0 at its end
    :return: the value at that moment
    """
    if isinstance(value, str):
        value = _in_words("schedule", value)
    return float(value(progress_remaining) if callable(value) else value)


def _in_words(name: str, value: str) -> Schedule:
    schedule = schedule_in_words(value)
    if schedule is None:
        raise ArgumentError(
            f"{name}={value!r} is not allowed: it must be a number, a function, or a schedule in words such as "
            f"{EXAMPLES}"
        )
    return schedule


def _check_function(name: str, schedule: Schedule) -> None:
    for progress in (1.0, 0.5, 0.0):
        what = "raises an error"
        try:
            result = schedule(progress)
            what = f"returns {result!r}"
            check_real(name, float(result), at_least=0.0)  # as in SB3, which accepts a tensor of one number
        except (ArithmeticError, RuntimeError, TypeError, ValueError) as error:
            raise ArgumentError(
                f"{name}={schedule!r} is not allowed: at progress {progress:g} it {what}, and a schedule must return a "
                f"finite number of at least 0 ({error})"
            ) from error


def did_you_mean(error: Exception, keywords: Callable[[], set[str]]) -> str:
    """
    :param error: raised by a constructor
    :param keywords: returns the names of the arguments that the constructor has
    :return: if the error is about an unknown argument, a sentence that suggests a similar name; else an empty string
    """
    unknown = re.search(r"unexpected keyword argument '(\w+)'", str(error))
    nearest = difflib.get_close_matches(unknown[1], keywords(), n=1) if unknown else []
    return f". Did you mean {nearest[0]!r}?" if unknown and nearest and nearest[0] != unknown[1] else ""
