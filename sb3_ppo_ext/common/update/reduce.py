"""What several processes that train one model have to put together."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch as th


class Reducer(Protocol):
    """
    Puts tensors of several processes together. It stands between the gradients and the clipping of their norm, and
    wherever a mean over the rollout is taken.
    """

    @property
    def is_local(self) -> bool:
        """Whether there is one process only, so that nothing has to be done."""
        ...

    def average(self, *tensors: th.Tensor) -> None:
        """
        Put in the place of each tensor its mean over the processes.

        :param tensors: of the same shapes in each process; written into
        """
        ...


class OneProcess:
    """The reducer of a model that is trained by one process: there is nothing to put together."""

    is_local = True

    def average(self, *tensors: th.Tensor) -> None:
        pass


def averaged(function: Callable[[th.Tensor], th.Tensor], reducer: Reducer) -> Callable[[th.Tensor], th.Tensor]:
    """
    The mean of a function over the processes.

    :param function: of a tensor that all processes have
    :param reducer: of its results
    """

    def result_of(x: th.Tensor) -> th.Tensor:
        result = function(x)
        reducer.average(result)
        return result

    return result_of
