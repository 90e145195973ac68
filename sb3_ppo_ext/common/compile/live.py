"""An algorithm as its own loss sees it while a gradient step is compiled."""

from __future__ import annotations

import types
from collections.abc import Mapping
from enum import Enum
from numbers import Real
from typing import Any

import torch as th
from torch import nn

_SETTINGS = (bool, str, bytes, type(None), Enum, type)


class LiveView:
    """
    Stands for an algorithm in its own methods, and sees to it that no attribute they read is kept by a compiled step.

    A compiled step is recorded once, and a number that is read meanwhile would stay what it was. So a number is given
    as a tensor, whose value is set anew for each update. What cannot be a tensor (a setting such as a bool or a string,
    a function, a module) is noted: when it has changed, the step is compiled anew. Anything else may change without
    anyone seeing it, and is refused.

    :param owner: the algorithm
    :param numbers: tensors for its numbers, by the name of the attribute; what is not among them is noted as it is
    """

    def __init__(self, owner: Any, numbers: Mapping[str, th.Tensor] | None = None) -> None:
        noted: dict[str, Any] = {}
        vars(self).update(_owner=owner, _numbers=numbers or {}, _noted=noted)

    @property  # type: ignore[misc]
    def __class__(self) -> type:  # so that super() works in methods
        return type(vars(self)["_owner"])

    def __getattr__(self, name: str) -> Any:
        owner, numbers, noted = (vars(self)[key] for key in ("_owner", "_numbers", "_noted"))
        if name not in vars(owner):
            in_class = next((vars(c)[name] for c in type(owner).__mro__ if name in vars(c)), None)
            if isinstance(in_class, property) and in_class.fget is not None:
                return in_class.fget(self)
            if isinstance(in_class, types.FunctionType):
                return types.MethodType(in_class, self)
        if name in numbers:
            return numbers[name]
        value = getattr(owner, name)
        if not is_number(value) and not _is_setting(value):
            raise ValueError(
                f"the loss reads self.{name}, a {type(value).__name__}, and a change of it would not be seen. Keep the "
                "numbers that it holds in attributes of the algorithm, or give them in _coefficients()"
            )
        noted[name] = value
        return value

    def __setattr__(self, name: str, value: Any) -> None:
        raise ValueError(f"the loss sets self.{name}, which would be done once only, when it is compiled")


def noted_by(view: LiveView) -> dict[str, Any]:
    """
    :param view: that a loss has been computed with
    :return: the attributes that were read, other than those that were given as tensors, and their values
    """
    noted: dict[str, Any] = vars(view)["_noted"]
    return noted


def is_number(value: object) -> bool:
    """Whether an attribute can be given as a tensor."""
    return isinstance(value, Real) and not isinstance(value, bool)


def has_changed(owner: object, noted: Mapping[str, Any]) -> bool:
    """
    :param owner: the algorithm
    :param noted: attributes and their values
    :return: whether it has another value for one of them
    """
    for name, value in noted.items():
        present = getattr(owner, name, None)
        if present is not value and not (is_number(value) or _is_constant(value)):
            return True
        if type(present) is not type(value) or (present is not value and present != value):
            return True
    return False


def _is_constant(value: object) -> bool:
    return isinstance(value, _SETTINGS) or (isinstance(value, (tuple, frozenset)) and all(map(_is_constant, value)))


def _is_setting(value: object) -> bool:
    return _is_constant(value) or isinstance(value, (nn.Module, th.Tensor, th.device, th.dtype)) or callable(value)
