"""The reducer of a model that several processes train, over ``torch.distributed``."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch as th
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from sb3_ppo_ext.common.errors import ProcessError
from sb3_ppo_ext.common.torch_internals import default_store

T = TypeVar("T")

# A process that has ended is noticed by its connection; one that takes long, as it evaluates, is waited for.
_PATIENCE = timedelta(days=1)
_FAILURE = "sb3_ppo_ext/failure"


class ProcessGroup:
    """
    The processes of ``torch.distributed``'s default group.

    An error in one of them ends all: it is told by :meth:`fail`, and each method of the others raises a
    :class:`ProcessError` that says it in words.
    """

    is_local = False

    def __init__(self) -> None:
        self.rank: int = dist.get_rank()
        self.n_processes: int = dist.get_world_size()
        self._store = default_store()

    @classmethod
    def joined(cls, device: th.device) -> ProcessGroup:
        """
        The default group, made of what ``torchrun`` says in environment variables if it is not there yet.

        :param device: of the model
        """
        if not dist.is_initialized():
            backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
            store, rank, n_processes = next(rendezvous("env://", timeout=_PATIENCE))
            if os.environ.get("GROUP_WORLD_SIZE") == "1":
                # On one machine, torchrun may keep the store from one attempt to the next, and in it addresses of dead
                # processes. (For several machines, --rdzv-backend c10d makes a new one.)
                store = PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT')}", store)
            dist.init_process_group(backend, store=store, rank=rank, world_size=n_processes, timeout=_PATIENCE)
        return cls()

    @th.no_grad()
    def average(self, *tensors: th.Tensor, weight: float | th.Tensor = 1.0) -> None:
        """
        As :meth:`Reducer.average`. All tensors of one kind go in one message.

        :param tensors: of the same shapes in each process; written into
        :param weight: of this process
        """
        for same in _kinds(tensors):
            own_weight = th.as_tensor(weight, dtype=same[0].dtype, device=same[0].device).reshape(1)
            message = th.cat([*(tensor.flatten() for tensor in same), own_weight])
            message[:-1] *= own_weight
            with self._explained():
                dist.all_reduce(message)
            _write(message[:-1] / message[-1], same)

    @th.no_grad()
    def take_from_first(self, tensors: Iterable[th.Tensor]) -> None:
        """
        Put in the place of each tensor what the first process has.

        :param tensors: of the same shapes in each process; written into, except in the first one
        """
        for same in _kinds(tensors):
            message = th.cat([tensor.flatten() for tensor in same])
            with self._explained():
                dist.broadcast(message, src=0)
            if self.rank > 0:
                _write(message, same)

    def gathered(self, value: T) -> list[T]:
        """
        As :meth:`Reducer.gathered`.

        :param value: of this process
        """
        values: list[Any] = [None] * self.n_processes
        with self._explained():
            dist.all_gather_object(values, value)
        return values

    def of_first(self, value: T) -> T:
        """
        What the first process has.

        :param value: looked at in the first process only
        """
        values: list[Any] = [value if self.rank == 0 else None]
        with self._explained():
            dist.broadcast_object_list(values, src=0)
        return cast(T, values[0])

    def fail(self, error: BaseException) -> None:
        """
        Tell the other processes that this one has failed, and leave the group: whoever waits for it waits no longer.

        :param error: that ends this process's part
        """
        with contextlib.suppress(Exception):  # the group may be gone already
            if not isinstance(error, ProcessError):
                self._store.compare_set(
                    _FAILURE, "", f"process {self.rank} has failed: {type(error).__name__}: {error}"
                )
        with contextlib.suppress(Exception):
            dist.destroy_process_group()

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            raise ProcessError(f"This process ends, as {self._failure() or _without_a_word(error)}") from error

    def _failure(self) -> str | None:
        """What another process has failed by, if it has told."""
        with contextlib.suppress(Exception):
            if self._store.check([_FAILURE]):
                return str(self._store.get(_FAILURE), "utf-8", "replace")
        return None


def _without_a_word(error: RuntimeError) -> str:
    reason = str(error).strip().partition("\n")[0]
    return f"another one has ended without a word: it was killed, or has lost its connection ({reason})"


def _kinds(tensors: Iterable[th.Tensor]) -> Iterable[list[th.Tensor]]:
    """The tensors of each dtype and device."""
    kinds: dict[Any, list[th.Tensor]] = {}
    for tensor in tensors:
        kinds.setdefault((tensor.dtype, tensor.device), []).append(tensor)
    return kinds.values()


def _write(message: th.Tensor, tensors: list[th.Tensor]) -> None:
    parts = th.split(message, [tensor.numel() for tensor in tensors])
    for tensor, part in zip(tensors, parts, strict=True):
        tensor.copy_(part.view_as(tensor))
