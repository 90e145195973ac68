"""Messages between the processes of one machine, through memory that all of them see."""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch as th

_LINE = 64  # bytes of a cache line: what a process writes into is on one of its own
_SPINS = 50  # looks, of some 50 ns each, before another process may have the core
_YIELDING = 0.005  # seconds of that, before it sleeps in between
_LONGEST_SLEEP = 0.01
_LOOK_AFTER = 0.2  # seconds, for a process that has ended


class SharedMemory:
    """
    A file that is mapped into the memory of all processes: for each a counter, and two places for its message. A
    message between processes takes some microseconds so, where one over a network interface takes a hundred or more.

    A process writes its message into its place, adds one to its counter, and waits until all counters are that far.
    Then it reads all messages. The next one goes into the second place, as the first may still be read. When all have
    written the second, they have read the first, which is then written over.

    A counter is one byte, and a processor of the x86 kind lets others see writes in the order they were made, so that a
    message is there when its counter says so. Whether a process lives is told by a lock on the file, which the system
    takes from a process that ends, however it ends.

    :param path: of a file, whose size is :meth:`size_for`
    :param rank: of this process
    :param n_processes: how many there are
    :param capacity: bytes of the longest message, a multiple of the cache line
    """

    def __init__(self, path: str, rank: int, n_processes: int, capacity: int) -> None:
        self.capacity = capacity
        self._rank = rank
        self._file = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, rank)
        self._memory = mmap.mmap(self._file, self.size_for(n_processes, capacity))
        self._counters = [_LINE * rank for rank in range(n_processes)]
        places = th.frombuffer(self._memory, dtype=th.uint8, offset=_LINE * n_processes)
        self._places = places.view(2, n_processes, capacity)
        self._cut: dict[tuple[th.dtype, int], list[tuple[th.Tensor, ...]]] = {}
        self._n_messages = 0

    @staticmethod
    def size_for(n_processes: int, capacity: int) -> int:
        """Bytes of the file."""
        return (_LINE + 2 * capacity) * n_processes

    def close(self) -> None:
        """Let the others see that this process takes no further part."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def exchanged(self, message: th.Tensor) -> tuple[th.Tensor, ...]:
        """
        The messages of all processes. They stay until the next but one.

        :param message: of this process, with as many numbers as those of the others
        :raises RuntimeError: if one of them has ended
        """
        kind = message.dtype, message.numel()
        if kind not in self._cut:
            n_bytes = message.numel() * message.element_size()
            self._cut[kind] = [place[:, :n_bytes].view(message.dtype).unbind() for place in self._places]
        messages = self._cut[kind][self._n_messages % 2]
        messages[self._rank].copy_(message.flatten())
        self._n_messages += 1
        self._memory[self._counters[self._rank]] = self._n_messages % 256
        for rank in range(len(messages)):
            self._wait_for(rank)
        return messages

    def summed(self, message: th.Tensor) -> th.Tensor:
        """
        The sum of the messages of all processes, with the same bits in each.

        :param message: of this process, of the same shape as those of the others
        :raises RuntimeError: if one of them has ended
        """
        first, second, *others = self.exchanged(message)
        total = first + second
        for other in others:
            total += other
        return total.view_as(message)

    def _wait_for(self, rank: int) -> None:
        """Until a process has written its message."""
        memory, counter, n_messages = self._memory, self._counters[rank], self._n_messages

        def is_there() -> bool:
            return (memory[counter] - n_messages) % 256 <= 1  # it may have written its next one too

        for _ in range(_SPINS):
            if (memory[counter] - n_messages) % 256 <= 1:
                return
        _wait_until(is_there, unless=lambda: self._has_ended(rank), what=f"process {rank} has left")

    def _has_ended(self, rank: int) -> bool:
        if self._file < 0:
            return True
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, rank)
        except OSError:
            return False
        fcntl.lockf(self._file, fcntl.LOCK_UN, 1, rank)
        return True


def shared_by(rank: int, n_processes: int, gathered: Callable[[Any], list[Any]], n_bytes: int) -> SharedMemory | None:
    """
    Memory that all processes share; each calls this at the same time.

    :param rank: of this process
    :param n_processes: how many there are
    :param gathered: tells what each has
    :param n_bytes: of the longest message so far
    :return: None if they are not all on one machine, or it has not that much memory for it
    """
    capacity = -(-n_bytes // _LINE) * _LINE
    own_path = None
    if rank == 0:
        own_path = _new_file(SharedMemory.size_for(n_processes, capacity))
    try:
        path, *_ = gathered(own_path)
        if path is None:
            return None
        memory = None
        with contextlib.suppress(OSError):  # on another machine there is no such file
            memory = SharedMemory(path, rank, n_processes, capacity)
        if all(gathered(memory is not None)):
            return memory
        if memory is not None:
            memory.close()
        return None
    finally:
        if own_path is not None:
            os.unlink(own_path)  # it stays until the last process that has mapped it ends


def _new_file(size: int) -> str | None:
    """
    :param size: bytes of zeros in it
    :return: its path; None if there is no place for it in memory
    """
    path = None
    try:
        file, path = tempfile.mkstemp(dir="/dev/shm", prefix="sb3_ppo_ext-")
        try:
            os.posix_fallocate(file, 0, size)  # or a process would be killed when it writes
        finally:
            os.close(file)  # before it is opened again: closing it takes away all locks
    except OSError:
        if path is not None:
            os.unlink(path)
        return None
    return path


def _wait_until(is_there: Callable[[], bool], *, unless: Callable[[], bool], what: str) -> None:
    """
    Wait ever more patiently.

    :param is_there: what is waited for
    :param unless: what makes that pointless, looked for now and then
    :param what: that is, for a RuntimeError
    """
    start = looked = time.monotonic()
    while not is_there():
        now = time.monotonic()
        if now - start < _YIELDING:
            os.sched_yield()
            continue
        time.sleep(min((now - start) / 10, _LONGEST_SLEEP))
        if now - looked > _LOOK_AFTER:
            looked = now
            if unless() and not is_there():
                raise RuntimeError(what)
