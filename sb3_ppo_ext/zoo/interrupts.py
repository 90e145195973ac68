"""Ctrl-C during a training: a wish that is granted where nothing is half done."""

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
    Counts how often Ctrl-C was pressed, and raises :class:`KeyboardInterrupt` only when patience is at its end.

    An exception that may come anywhere breaks what it comes into: a lock of the progress bar, a compiler, half a step
    of the environments. So a training looks at :attr:`count` between its steps and ends in order. Who presses a second
    time does not want to wait, and gets the exception.
    """

    def __init__(self) -> None:
        self.count = 0
        self.patience: float = 0  # as many are counted only; the next one is an exception

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
                hook(unraisable)  # else it came where no exception can leave; it is counted, and looked at later

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
            if self.patience:  # what cleans up, and whoever is told by the count, is not to be interrupted again
                self.patience = math.inf
            raise KeyboardInterrupt
        if self.patience < math.inf:
            with contextlib.suppress(OSError):  # print() may be what was interrupted, and cannot be entered twice
                os.write(2, b"\nCtrl-C: it ends as soon as nothing is half done; once more to end it at once\n")

    @contextlib.contextmanager
    def stage(self) -> Iterator[None]:
        """What is inside of the ``with`` block looks at :attr:`count`; what follows it is not to be interrupted."""
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
    def undisturbed(self) -> Iterator[None]:
        """What is inside of the ``with`` block is quick, and is done as a whole."""
        patience, self.patience = self.patience, math.inf
        try:
            yield
        finally:
            self.patience = patience

    def caused(self, error: BaseException) -> bool:
        """
        :param error: that has ended a training
        :return: whether Ctrl-C is behind it: it was raised for that, on the way out from that, or by something that
            Ctrl-C has ended too, such as a compiler or a simulator
        """
        seen: BaseException | None = error
        while seen is not None:
            if isinstance(seen, KeyboardInterrupt):
                return True
            seen = seen.__cause__ or seen.__context__
        return self.count > 0


class StopIfInterrupted(BaseCallback):
    """
    Ends a training at the step that follows Ctrl-C.

    :param interrupts: to look at
    """

    def __init__(self, interrupts: Interrupts) -> None:
        super().__init__()
        self.interrupts = interrupts

    def _on_step(self) -> bool:
        return self.interrupts.count == 0

    def __reduce__(self) -> tuple[Any, ...]:  # a callback may be saved with what it belongs to
        return StopIfInterrupted, (Interrupts(),)


@contextlib.contextmanager
def not_inherited() -> Iterator[None]:
    """
    Ctrl-C waits for the end of the ``with`` block, and never reaches processes that are started in it: in a terminal it
    is sent to all of them, and an environment that ended before the training would end the training with an error.
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
