"""Values that a loss reads besides its arguments: a compiled program of the loss would keep them as constants."""

from __future__ import annotations

import dis
import functools
import sys
import types
from collections.abc import Callable, Hashable, Iterator
from enum import Enum
from numbers import Real
from typing import Any

import torch as th
from torch import nn

from sb3_ppo_ext.common.compile.support import REFUSED

# The contents of these libraries are assumed not to change.
_LIBRARIES = sys.stdlib_module_names | {"torch", "numpy", "stable_baselines3", "sb3_ppo_ext"}


def constants_of(loss: Callable[..., Any]) -> Hashable:
    """
    Everything that a compiled loss depends on besides its arguments: its code; the numbers and settings that it reads
    in its defaults, its closure, its module, other modules and classes; and the same for the functions that it calls.
    If any of these changes, the loss must be compiled again.

    Values that it reads through a local variable (``c = config; c.x``) or by ``getattr`` are not seen.

    :param loss: a function, or an :class:`ActorCriticLoss` of one
    :return: a key for the cache of compiled programs
    :raises ValueError: if it reads something that may change without being seen: a method, an object or a container
    """
    found: list[Hashable] = []
    _note_function(getattr(loss, "policy_loss", loss), found, set())
    return loss, tuple(found)


class _Same:
    """Equal only for the same object. A tensor's values may change, because it is an input of the program."""

    def __init__(self, value: object) -> None:
        self._value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self._value is other._value

    def __hash__(self) -> int:
        return id(self._value)


def _note_function(function: Any, found: list[Hashable], seen: set[int]) -> None:
    while isinstance(function, functools.partial):
        for name, value in (*enumerate(function.args), *function.keywords.items()):
            _note(f"argument {name} of a partial", value, found, seen)
        function = function.func
    if not isinstance(function, types.FunctionType):
        raise ValueError(
            f"{REFUSED} with a policy_loss that is no plain function ({function!r:.100}): the attributes that it reads "
            "would become constants when it is compiled. Make it a @staticmethod, and give its numbers by "
            "coefficients(); or use torch_compile=False"
        )
    if id(function) in seen or _is_of_library(function):
        return
    seen.add(id(function))
    found.append(function.__code__)
    for i, value in enumerate(function.__defaults__ or ()):
        _note(f"default {i} of {function.__qualname__}", value, found, seen)
    for name, value in (function.__kwdefaults__ or {}).items():
        _note(name, value, found, seen)
    closure = dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=True))
    for path in sorted(set(_paths(function.__code__))):
        first, *rest = path
        try:
            value = closure[first].cell_contents if first in closure else function.__globals__[first]
        except (KeyError, ValueError):  # a builtin, a local variable, or not defined yet
            continue
        name = first
        while rest and isinstance(value, (type, types.ModuleType)) and not _is_of_library(value):
            if not hasattr(value, rest[0]):
                break
            value, name = getattr(value, rest[0]), f"{name}.{rest.pop(0)}"
        _note(name, value, found, seen)


def _note(name: str, value: Any, found: list[Hashable], seen: set[int]) -> None:
    """
    :param name: name under which the loss reads the value
    :param value: the value
    :param found: the result so far; the value is added to it
    :param seen: ids of the functions that have been visited
    """
    if isinstance(value, (types.FunctionType, functools.partial)):
        _note_function(value, found, seen)
    elif _is_constant(value):
        found.append((name, value))
    elif isinstance(value, (th.Tensor, nn.Module, type, types.ModuleType)) or (
        callable(value) and _is_of_library(value)
    ):
        found.append((name, _Same(value)))
    else:
        raise ValueError(
            f"{REFUSED} with a loss that reads {name}, a {type(value).__name__}: a change of it would not be seen. "
            "Give its numbers by coefficients(), or use torch_compile=False"
        )


def _paths(code: types.CodeType) -> Iterator[tuple[str, ...]]:
    """The global and closure names that a function reads, with attributes: ``config.x`` is ``("config", "x")``."""
    path: tuple[str, ...] = ()
    for instruction in dis.get_instructions(code):
        if instruction.opname in ("LOAD_ATTR", "LOAD_METHOD") and path:
            path = (*path, instruction.argval)
        elif instruction.opname != "EXTENDED_ARG":
            if path:
                yield path
            path = (instruction.argval,) if instruction.opname in ("LOAD_GLOBAL", "LOAD_DEREF") else ()
    for part in code.co_consts:  # nested functions
        if isinstance(part, types.CodeType):
            yield from _paths(part)


def _is_constant(value: object) -> bool:
    if isinstance(value, (tuple, frozenset)):
        return all(map(_is_constant, value))
    return value is None or isinstance(value, (Real, str, Enum, th.dtype, th.device))


def _is_of_library(value: Any) -> bool:
    """Whether a module, class or function, or the class of an object or method, belongs to a library."""
    if isinstance(value, types.MethodType):
        return _is_of_library(value.__self__)
    if isinstance(value, types.ModuleType):
        home = value.__name__
    else:
        home = (value if isinstance(value, (type, types.FunctionType)) else type(value)).__module__
    return home.partition(".")[0] in _LIBRARIES
