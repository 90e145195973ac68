"""Ctrl-C during a training: it ends the training between two steps, where nothing is half done."""

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
    Counts how often Ctrl-C was pressed, and raises :class:`KeyboardInterrupt` only if that is more than ``patience``.

    An exception that may be raised anywhere breaks what it interrupts: a lock of the progress bar, a compiler, half a
    step of the environments. So a training checks :attr:`count` between its steps and ends in order. A user who presses
    a second time does not want to wait, and the exception is raised.
    """

    def __init__(self) -> None:
        self.count = 0
        self.patience: float = 0  # so many are only counted; the next one raises the exception

    @contextlib.contextmanager
    def handled(self) -> Iterator[None]:
        """Inside of the ``with`` block, Ctrl-C is handled here; unless it is ignored, as in a background process."""
        before = signal.getsignal(signal.SIGINT)
        if before in (signal.SIG_IGN, None) or threading.current_thread() is not threading.main_thread():
            yield
            return
        hook = sys.unraisablehook

        def without_interrupts(unraisable: Any) -> None:
            if not isinstance(unraisable.exc_value, KeyboardInterrupt):
                hook(unraisable)  # an interrupt where no exception can be raised is counted, and checked later

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
            if self.patience:  # what cleans up after the exception is not to be interrupted again
                self.patience = math.inf
            raise KeyboardInterrupt
        if self.patience < math.inf:
            with contextlib.suppress(OSError):  # print() may be what was interrupted, and cannot be entered twice
                os.write(2, b"\nCtrl-C: it ends as soon as nothing is half done; once more to end it at once\n")

    @contextlib.contextmanager
    def stage(self) -> Iterator[None]:
        """The ``with`` block checks :attr:`count` itself; what follows it is not to be interrupted."""
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
        """For a ``with`` block that is quick, and must be done as a whole."""
        patience, self.patience = self.patience, math.inf
        try:
            yield
        finally:
            self.patience = patience

    def caused(self, error: BaseException) -> bool:
        """
        :param error: that has ended a training
        :return: whether Ctrl-C has caused it: directly, while it was being handled, or by ending something else (a
            compiler, a simulator)
        """
        seen: BaseException | None = error
        while seen is not None:
            if isinstance(seen, KeyboardInterrupt):
                return True
            seen = seen.__cause__ or seen.__context__
        return self.count > 0


class StopIfInterrupted(BaseCallback):
    """Ends a training at the step that follows Ctrl-C."""

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
    Ctrl-C waits for the end of the ``with`` block, and never reaches processes that are started in it: in a terminal it
    is sent to all of them, and one that ended before its parent would end that with an error.
    """
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    resource_tracker.ensure_running()  # starting it lets interrupts through again
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
