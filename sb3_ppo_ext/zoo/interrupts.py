"""Handling of Ctrl-C: a training ends between two steps, with nothing left half done."""

from __future__ import annotations

import contextlib
import math
import os
import signal
import sys
import threading
from collections.abc import Iterator
from multiprocessing import resource_tracker
from types import FrameType
from typing import Any

from stable_baselines3.common.callbacks import BaseCallback

INTERRUPTED = 130  # the exit code of a program that Ctrl-C has ended


class Interrupts:
    """
    Counts how often Ctrl-C was pressed, and raises :class:`KeyboardInterrupt` only beyond :attr:`patience` times.

    An exception at an arbitrary point can break what it interrupts: a lock of the progress bar, a compiler, a step of
    the environments. So a training checks :attr:`count` between its steps and ends cleanly. If the user presses Ctrl-C
    a second time, the exception is raised.
    """

    def __init__(self) -> None:
        self.count = 0
        self.patience: float = 0  # this many times are only counted; the next time raises the exception

    @contextlib.contextmanager
    def handled(self) -> Iterator[None]:
        """Handle Ctrl-C in the ``with`` block, unless the process ignores it, as background processes do."""
        before = signal.getsignal(signal.SIGINT)
        if before in (signal.SIG_IGN, None) or threading.current_thread() is not threading.main_thread():
            yield
            return
        hook = sys.unraisablehook

        def without_interrupts(unraisable: Any) -> None:
            if not isinstance(unraisable.exc_value, KeyboardInterrupt):
                hook(unraisable)  # an interrupt is already counted, and checked later

        sys.unraisablehook = without_interrupts
        signal.signal(signal.SIGINT, self._handle)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)
            sys.unraisablehook = hook

    def _handle(self, signal_number: int, frame: FrameType | None) -> None:
        self.count += 1
        if self.count > self.patience:
            if self.patience:  # do not interrupt the cleaning up after the exception
                self.patience = math.inf
            raise KeyboardInterrupt
        if self.patience < math.inf:
            with contextlib.suppress(OSError):  # print() may be what was interrupted, and is not reentrant
                os.write(2, b"\nCtrl-C: ending at the next safe point; press Ctrl-C again to end at once\n")

    @contextlib.contextmanager
    def stage(self) -> Iterator[None]:
        """For a ``with`` block that checks :attr:`count` itself; the code after it is not interrupted."""
        self.count, self.patience = 0, 1
        try:
            yield
        finally:
            self.patience = math.inf

    def check(self) -> None:
        """
        :raises KeyboardInterrupt: if Ctrl-C was pressed
        """
        if self.count:
            self.patience = math.inf
            raise KeyboardInterrupt

    @contextlib.contextmanager
    def uninterrupted(self) -> Iterator[None]:
        """For a short ``with`` block that must not be interrupted."""
        patience, self.patience = self.patience, math.inf
        try:
            yield
        finally:
            self.patience = patience

    def caused(self, error: BaseException) -> bool:
        """
        :param error: error that ended a training
        :return: whether Ctrl-C caused it: directly, during its handling, or by ending another process (a compiler, a
            simulator)
        """
        seen: BaseException | None = error
        while seen is not None:
            if isinstance(seen, KeyboardInterrupt):
                return True
            seen = seen.__cause__ or seen.__context__
        return self.count > 0


class StopIfInterrupted(BaseCallback):
    """Ends a training at the first step after Ctrl-C."""

    def __init__(self, interrupts: Interrupts) -> None:
        super().__init__()
        self.interrupts = interrupts

    def _on_step(self) -> bool:
        return self.interrupts.count == 0

    def __reduce__(self) -> tuple[Any, ...]:  # a callback may be saved with a model
        return StopIfInterrupted, (Interrupts(),)


@contextlib.contextmanager
def sigint_blocked() -> Iterator[None]:
    """
    Delay Ctrl-C until the end of the ``with`` block, and keep it from processes that are started in it. A terminal
    sends it to all processes, and a child that ends before its parent would cause an error there.
    """
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    resource_tracker.ensure_running()  # starting it would unblock the signal
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
