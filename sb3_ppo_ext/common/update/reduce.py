"""What several processes that train one model have to put together."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, TypeVar

import torch as th

T = TypeVar("T")


class Reducer(Protocol):
    """
    Puts tensors of several processes together. It stands between the gradients and the clipping of their norm, and
    wherever a mean over the rollout is taken.
    """

    @property
    def is_local(self) -> bool:
        """Whether there is one process only, so that nothing has to be done."""
        ...

    @property
    def rank(self) -> int:
        """The number of this process, from 0."""
        ...

    @property
    def n_processes(self) -> int:
        """How many there are."""
        ...

    def average(self, *tensors: th.Tensor, weight: float | th.Tensor = 1.0) -> None:
        """
        Put in the place of each tensor its mean over the processes.

        :param tensors: of the same shapes in each process; written into
        :param weight: of this process, as a rule the number of samples that its tensors are means of
        """
        ...

    def gathered(self, value: T) -> list[T]:
        """
        What each process has, in the order of their ranks.

        :param value: of this process, small: it is pickled
        """
        ...


class OneProcess:
    """The reducer of a model that is trained by one process: there is nothing to put together."""

    is_local = True
    rank = 0
    n_processes = 1

    def average(self, *tensors: th.Tensor, weight: float | th.Tensor = 1.0) -> None:
        pass

    def gathered(self, value: T) -> list[T]:
        return [value]


def concatenated(reducer: Reducer, *tensors: th.Tensor) -> tuple[th.Tensor, ...]:
    """
    Tensors of all processes, one process after the other.

    :param reducer: of the processes
    :param tensors: small; the first dimension may have another size in each process
    """
    if reducer.is_local:
        return tensors
    gathered = reducer.gathered([tensor.cpu() for tensor in tensors])
    return tuple(th.cat(parts).to(tensors[0].device) for parts in zip(*gathered, strict=True))


def averaged(
    function: Callable[[th.Tensor], th.Tensor], reducer: Reducer, weight: float = 1.0
) -> Callable[[th.Tensor], th.Tensor]:
    """
    The mean of a function over the processes.

    :param function: of a tensor that all processes have
    :param reducer: of its results
    :param weight: of this process
    """

    def result_of(x: th.Tensor) -> th.Tensor:
        result = function(x)
        reducer.average(result, weight=weight)
        return result

    return result_of
