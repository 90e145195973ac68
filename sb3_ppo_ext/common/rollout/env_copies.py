"""Copies of what a ``DummyVecEnv`` hands out at each step, in a fraction of the time that ``copy.deepcopy`` takes."""

from __future__ import annotations

from collections import OrderedDict
from copy import deepcopy
from typing import Any

import numpy as np
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv

# Exactly these types, as a derived one may have attributes that change.
_IMMUTABLE = frozenset(
    {bool, int, float, complex, str, bytes, type(None), np.bool_, np.float32, np.float64, np.int32, np.int64}
)


class _Observations(OrderedDict[Any, np.ndarray]):
    """The observations of all environments: arrays of numbers."""

    def __deepcopy__(self, memo: dict[int, Any]) -> OrderedDict[Any, np.ndarray]:
        return OrderedDict([(key, array.copy()) for key, array in self.items()])

    def __reduce__(self) -> tuple[type[OrderedDict[Any, Any]], tuple[list[tuple[Any, np.ndarray]]]]:
        return OrderedDict, (list(self.items()),)  # so that a pickle of the environments needs nothing of this package


class _Infos(list[dict[str, Any]]):
    """The infos of all environments. A deep copy shares numbers and strings, which nobody can change."""

    def __deepcopy__(self, memo: dict[int, Any]) -> list[dict[str, Any]]:
        return [
            {key: value if type(value) in _IMMUTABLE else deepcopy(value, memo) for key, value in info.items()}
            if type(info) is dict
            else deepcopy(info, memo)
            for info in self
        ]

    def __reduce__(self) -> tuple[type[list[Any]], tuple[list[dict[str, Any]]]]:
        return list, (list(self),)


def copy_quickly(env: VecEnv) -> None:
    """
    Let a ``DummyVecEnv`` copy the observations and infos of its environments faster. What it hands out stays the same.

    :param env: the environments, in wrappers or not
    """
    inner = env.unwrapped
    if not isinstance(inner, DummyVecEnv):
        return
    if type(getattr(inner, "buf_infos", None)) is list:
        inner.buf_infos = _Infos(inner.buf_infos)
    observations = getattr(inner, "buf_obs", None)
    if type(observations) is OrderedDict and all(map(_holds_numbers, observations.values())):
        inner.buf_obs = _Observations(observations)


def _holds_numbers(array: object) -> bool:
    return type(array) is np.ndarray and not array.dtype.hasobject
