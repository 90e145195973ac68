"""Combine gradients and statistics of several processes that train one model."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Protocol, TypeVar

import torch as th

T = TypeVar("T")


class Reducer(Protocol):
    """
    Puts what several processes have together. It stands between the gradients and the clipping of their norm, and
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

    def summed(self, message: th.Tensor) -> th.Tensor:
        """
        The sum of a tensor over the processes, with the same bits in each.

        :param message: of this process, of the same shape in each; it may be written into
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

    def summed(self, message: th.Tensor) -> th.Tensor:
        return message

    def gathered(self, value: T) -> list[T]:
        return [value]


@th.no_grad()
def average(reducer: Reducer, *tensors: th.Tensor, weight: float | th.Tensor = 1.0) -> None:
    """
    Replace each tensor by its mean over the processes. All tensors of one dtype and device go in one message.

    :param reducer: of the processes
    :param tensors: of the same shapes in each process; written into
    :param weight: of this process, as a rule the number of samples that its tensors are means of
    """
    if reducer.is_local:
        return
    for same in of_each_kind(tensors):
        own_weight = th.as_tensor(weight, dtype=same[0].dtype, device=same[0].device).reshape(1)
        total = reducer.summed(th.cat([*(tensor.flatten() * own_weight for tensor in same), own_weight]))
        write(total[:-1] / total[-1], same)


def of_each(tensor: th.Tensor, reducer: Reducer) -> th.Tensor:
    """
    The tensors of all processes, stacked.

    :param tensor: of this process, small, of the same shape in each
    :param reducer: of the processes
    """
    stacked = tensor.new_zeros(reducer.n_processes, *tensor.shape)
    stacked[reducer.rank] = tensor
    return reducer.summed(stacked)


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
        average(reducer, result, weight=weight)
        return result

    return result_of


def of_each_kind(tensors: Iterable[th.Tensor]) -> Iterable[list[th.Tensor]]:
    """The tensors of each dtype and device."""
    kinds: dict[Any, list[th.Tensor]] = {}
    for tensor in tensors:
        kinds.setdefault((tensor.dtype, tensor.device), []).append(tensor)
    return kinds.values()


def write(message: th.Tensor, tensors: list[th.Tensor]) -> None:
    """
    :param message: the numbers of all tensors, in one
    :param tensors: that they are written into
    """
    parts = th.split(message, [tensor.numel() for tensor in tensors])
    for tensor, part in zip(tensors, parts, strict=True):
        tensor.copy_(part.view_as(tensor))
