"""Messages between the processes of one machine, through shared memory."""

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

_LINE = 64  # bytes of a cache line: each process writes its counter into a line of its own
_SPINS = 50  # checks, of some 50 ns each, before another process may have the core
_YIELDING = 0.005  # seconds of checking and giving up the core, before it sleeps between two checks
_LONGEST_SLEEP = 0.01
_LOOK_AFTER = 0.2  # seconds between two checks whether the other process has ended


class SharedMemory:
    """
    A file that is mapped into the memory of all processes, with a counter and two places for messages for each process.
    A message takes some microseconds, where one over a network interface takes a hundred or more.

    A process writes its message into its first place, adds one to its counter, and waits until all counters have that
    value. Then it reads all messages. Its next message goes into its second place, as others may still read the first.
    When all processes have written their second message, they have read the first ones, whose places are then reused.

    A counter is one byte, and x86 processors let others see writes in the order they were made, so a message is
    complete when its counter says so. Each process holds a lock on the file, which the system releases when the process
    ends, however it ends; so the others can see that it has ended.

    :param path: path of a file of :meth:`size_for` bytes
    :param rank: number of this process
    :param n_processes: number of processes
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
        """The size of the file in bytes."""
        return (_LINE + 2 * capacity) * n_processes

    def close(self) -> None:
        """Let the others see that this process takes no further part."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def exchanged(self, message: th.Tensor) -> tuple[th.Tensor, ...]:
        """
        The messages of all processes, which stay valid until the next exchange but one.

        :param message: this process's message, with as many numbers as those of the others
        :raises RuntimeError: if another process has ended
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

        :param message: this process's message, of the same shape as those of the others
        :raises RuntimeError: if another process has ended
        """
        first, second, *others = self.exchanged(message)
        total = first + second
        for other in others:
            total += other
        return total.view_as(message)

    def _wait_for(self, rank: int) -> None:
        """Wait until a process has written its message."""
        memory, counter, n_messages = self._memory, self._counters[rank], self._n_messages

        def is_there() -> bool:
            return (memory[counter] - n_messages) % 256 <= 1  # it may also have written its next message

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
    Create memory that all processes share. All of them must call this together.

    :param rank: number of this process
    :param n_processes: number of processes
    :param gathered: returns the values of all processes, given the value of this one
    :param n_bytes: bytes of the longest message so far
    :return: the memory; None if the processes are not all on one machine, or it has too little shared memory
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
            os.unlink(own_path)  # the memory stays until the last process that has mapped it ends


def _new_file(size: int) -> str | None:
    """
    Create a file of zeros in shared memory.

    :param size: its size in bytes
    :return: its path; None if there is not enough shared memory
    """
    path = None
    try:
        file, path = tempfile.mkstemp(dir="/dev/shm", prefix="sb3_ppo_ext-")
        try:
            os.posix_fallocate(file, 0, size)  # without reserved memory, a process could be killed when it writes
        finally:
            os.close(file)  # before it is opened again and locked: closing it would release the locks
    except OSError:
        if path is not None:
            os.unlink(path)
        return None
    return path


def _wait_until(is_there: Callable[[], bool], *, unless: Callable[[], bool], what: str) -> None:
    """
    Wait until a condition holds, with checks that become rarer.

    :param is_there: the condition
    :param unless: whether waiting is pointless; checked now and then
    :param what: the message of the error if it is
    :raises RuntimeError: if waiting is pointless
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
