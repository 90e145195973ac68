"""The reducer for a model that several processes train together, over ``torch.distributed``."""

from __future__ import annotations

import contextlib
import os
import pickle
import platform
import sys
from collections.abc import Iterable, Iterator, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch as th
import torch.distributed as dist
from torch import nn
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from sb3_ppo_ext.common.errors import ProcessError
from sb3_ppo_ext.common.torch_internals import default_store, set_patience
from sb3_ppo_ext.common.update.reduce import of_each_kind, write

if TYPE_CHECKING:
    from sb3_ppo_ext.common.update.shared_memory import SharedMemory

T = TypeVar("T")

# A process that does not arrive may have ended, which only torchrun, or whatever started it, can know.
_MEETING = timedelta(minutes=5)
# Later, a lost connection shows that a process has ended, and one that is only slow, as it evaluates, needs patience.
_PATIENCE = timedelta(days=1)
_FAILURE = "sb3_ppo_ext/failure"


class ProcessGroup:
    """
    The processes of ``torch.distributed``'s default group.

    An error in one process ends all of them: it reports the error by :meth:`fail`, and the methods of the other
    processes raise a :class:`ProcessError` that quotes it.
    """

    is_local = False

    failure: str | None = None
    """The error by which this process has left the group; None: it has not."""

    def __init__(self) -> None:
        self.rank: int = dist.get_rank()
        self.n_processes: int = dist.get_world_size()
        self._store = default_store()
        self._shared: SharedMemory | None = None
        # Only x86 processors guarantee that a process sees the writes of another in the order they were made.
        self._shares_memory = all(self._gathered(sys.platform == "linux" and platform.machine() == "x86_64"))

    @classmethod
    def joined(cls, device: th.device) -> ProcessGroup:
        """
        The default group; if there is none yet, it is created from the environment variables that ``torchrun`` sets.

        :param device: the model's device
        :raises ProcessError: if the processes do not meet in time
        """
        if not dist.is_initialized():
            backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
            try:
                store, rank, n_processes = next(rendezvous("env://", timeout=_MEETING))
                if os.environ.get("GROUP_WORLD_SIZE") == "1":
                    # On one machine, torchrun may keep the store after a restart, with addresses of dead processes.
                    # (On several machines, --rdzv-backend c10d makes a new store.)
                    store = PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT')}", store)
                dist.init_process_group(backend, store=store, rank=rank, world_size=n_processes, timeout=_MEETING)
            except RuntimeError as error:
                raise ProcessError(
                    f"Not all of the {os.environ['WORLD_SIZE']} processes have connected within "
                    f"{_MEETING.total_seconds():.0f} seconds: one has not started, or has ended ({_first_line(error)})"
                ) from error
            set_patience(_PATIENCE)
        return cls()

    def summed(self, message: th.Tensor) -> th.Tensor:
        """
        See :meth:`Reducer.summed`.

        :param message: this process's tensor; it may be written into
        """
        shared = self._shared_by_all(message)
        try:  # the method is called at each gradient step, and `with` takes a few microseconds
            if shared is not None:
                return shared.summed(message)
            dist.all_reduce(message)
        except RuntimeError as error:
            raise self._explanation(error) from error
        return message

    @th.no_grad()
    def take_from_first(self, tensors: Iterable[th.Tensor]) -> None:
        """
        Overwrite each tensor with the first process's values.

        :param tensors: tensors of the same shapes in each process; those of the first process do not change
        """
        for same in of_each_kind(tensors):
            message = th.cat([tensor.flatten() for tensor in same])
            shared = self._shared_by_all(message)
            with self._explained():
                if shared is not None:
                    message = shared.exchanged(message)[0]
                else:
                    dist.broadcast(message, src=0)
            if self.rank > 0:
                write(message, same)

    def gathered(self, value: T) -> list[T]:
        """
        See :meth:`Reducer.gathered`.

        :param value: this process's value
        """
        if not self._shares_memory:
            return self._gathered(value)
        pickled = th.frombuffer(bytearray(pickle.dumps(value)), dtype=th.uint8)
        sizes = [int(size) for size in self._of_each(th.tensor([len(pickled)]))]
        padded = nn.functional.pad(pickled, (0, max(sizes) - len(pickled)))
        parts = zip(self._of_each(padded), sizes, strict=True)
        return [pickle.loads(part[:size].numpy().tobytes()) for part, size in parts]

    def _of_each(self, message: th.Tensor) -> Sequence[th.Tensor]:
        shared = self._shared_by_all(message)
        if shared is None:
            return self._gathered(message)
        with self._explained():
            return shared.exchanged(message)

    def _gathered(self, value: T) -> list[T]:
        values: list[Any] = [None] * self.n_processes
        with self._explained():
            dist.all_gather_object(values, value)
        return values

    def _shared_by_all(self, message: th.Tensor) -> SharedMemory | None:
        """
        The memory through which the processes exchange messages if they run on one machine.

        :param message: this process's message, as long as those of the others
        :return: the memory; None if the processes share none, or the message is not on the CPU
        """
        if message.device.type != "cpu" or not self._shares_memory:
            return None
        n_bytes = message.numel() * message.element_size()
        if self._shared is None or self._shared.capacity < n_bytes:
            from sb3_ppo_ext.common.update.shared_memory import shared_by

            if self._shared is not None:
                self._shared.close()
            self._shared = shared_by(self.rank, self.n_processes, self._gathered, n_bytes)
            self._shares_memory = self._shared is not None
        return self._shared

    def of_first(self, value: T) -> T:
        """
        The first process's value.

        :param value: this process's value; ignored in all processes but the first
        """
        values: list[Any] = [value if self.rank == 0 else None]
        with self._explained():
            dist.broadcast_object_list(values, src=0)
        return cast(T, values[0])

    def fail(self, error: BaseException) -> None:
        """
        Tell the other processes that this one has failed, and leave the group, so that nobody waits for it.

        :param error: the error that ends this process's training
        """
        self.failure = type(error).__name__
        with contextlib.suppress(Exception):  # an error may have no words
            self.failure = f"{self.failure}: {error}"
        with contextlib.suppress(Exception):  # the group may be gone already
            if not isinstance(error, ProcessError):
                self._store.compare_set(_FAILURE, "", f"process {self.rank} has failed: {self.failure}")
        if self._shared is not None:
            self._shared.close()
        with contextlib.suppress(Exception):
            dist.destroy_process_group()

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            raise self._explanation(error) from error

    def _explanation(self, error: RuntimeError) -> ProcessError:
        return ProcessError(f"This process ends, because {self._failure() or _unreported(error)}")

    def _failure(self) -> str | None:
        """The failure that another process has reported by :meth:`fail`, if any."""
        with contextlib.suppress(Exception):
            if self._store.check([_FAILURE]):
                return str(self._store.get(_FAILURE), "utf-8", "replace")
        return None


def _unreported(error: RuntimeError) -> str:
    return (
        "another process has ended without reporting an error: it was killed, or lost its connection "
        f"({_first_line(error)})"
    )


def _first_line(error: RuntimeError) -> str:
    return str(error).strip().partition("\n")[0]
