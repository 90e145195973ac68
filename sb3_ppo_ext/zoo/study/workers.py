"""Runs several ``sb3-ppo-ext`` commands at a time, each in a process that can be killed without harm to the others."""

from __future__ import annotations

import contextlib
import multiprocessing
import multiprocessing.connection
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from sb3_ppo_ext.zoo.interrupts import sigint_blocked

_ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}

# torch's optimisers and rl_zoo3's report would import the last two on first use.
_PRELOADED = ["rl_zoo3.train", "torch._dynamo", "pandas"]


class Workers:
    """
    A number of slots for one process each; use it with :func:`contextlib.closing`.

    The processes are forked from a server that has already imported torch and rl_zoo3, so that a new process starts at
    once. Each is the leader of a session: Ctrl-C in the terminal reaches only this process, which then ends the others
    cleanly.

    :param n_slots: how many processes run at a time
    :param target: function that each process runs, with its arguments in ``sys.argv``; it is defined in a module and
        returns the exit code
    :param grace: seconds after which an interrupted process is killed
    """

    def __init__(self, n_slots: int, target: Callable[[], int], grace: float = 20.0) -> None:
        self.slots: dict[int, BaseProcess | None] = dict.fromkeys(range(1, n_slots + 1))
        self.target = target
        self.grace = grace
        for name, value in _ONE_THREAD.items():
            os.environ.setdefault(name, value)
        self._context: Any = multiprocessing.get_context("spawn")
        if "forkserver" in multiprocessing.get_all_start_methods():
            self._context = multiprocessing.get_context("forkserver")
            self._context.set_forkserver_preload([target.__module__, *_PRELOADED])

    @property
    def free(self) -> list[int]:
        """The slots without a process, in order."""
        return [slot for slot, process in self.slots.items() if process is None]

    @property
    def running(self) -> dict[int, BaseProcess]:
        """The processes by their slots."""
        return {slot: process for slot, process in self.slots.items() if process is not None}

    def start(self, slot: int, arguments: Sequence[str], log: Path) -> None:
        """
        :param slot: a free slot
        :param arguments: arguments of ``sb3-ppo-ext``
        :param log: file to which the process appends its output
        """
        process = self._context.Process(
            target=_run_in_process, args=(self.target, list(arguments), str(log.resolve()), os.getcwd())
        )
        with sigint_blocked():  # the first process starts the server, which inherits the blocked signal
            process.start()
        self.slots[slot] = process

    def wait(self, timeout: float = 0.0) -> dict[int, int]:
        """
        Wait until a process ends, and free the slots of all processes that have ended.

        :param timeout: longest wait, in seconds
        :return: exit codes by slot; if a signal ended the process, minus the number of the signal
        """
        multiprocessing.connection.wait([process.sentinel for process in self.running.values()], timeout)
        codes: dict[int, int] = {}
        for slot, process in self.running.items():
            if not process.is_alive():
                process.join()
                assert process.exitcode is not None
                codes[slot] = process.exitcode
                self._kill(process)  # and the processes that it started itself
                self.slots[slot] = None
        return codes

    def close(self, interrupt: bool = True) -> None:
        """
        End all processes.

        :param interrupt: whether to interrupt them first, like Ctrl-C; a second Ctrl-C kills them at once
        """
        try:
            if interrupt:
                for process in self.running.values():
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(_pid(process), signal.SIGINT)
                deadline = time.monotonic() + self.grace
                while self.running and time.monotonic() < deadline:
                    self.wait(deadline - time.monotonic())
        finally:
            for slot, process in self.running.items():
                self._kill(process)
                process.join()
                self.slots[slot] = None

    @staticmethod
    def _kill(process: BaseProcess) -> None:
        """Kill a process and the processes that it started."""
        process.kill()
        if hasattr(os, "killpg"):
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(_pid(process), signal.SIGKILL)


def last_line(log: Path) -> str:
    """The last line of a worker's log."""
    content = log.read_text(errors="replace").strip() if log.exists() else ""
    return content.splitlines()[-1] if content else "nothing"


def _pid(process: BaseProcess) -> int:
    assert process.pid is not None  # it was started
    return process.pid


def _run_in_process(target: Callable[[], int], arguments: list[str], log: str, folder: str) -> None:
    """
    Main function of a process.

    :param target: function to run
    :param arguments: arguments of ``sb3-ppo-ext``
    :param log: absolute path of the file for the output
    :param folder: working folder, from which relative paths in the arguments start
    """
    if hasattr(os, "setsid"):
        os.setsid()
    os.chdir(folder)
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.close(output)
    sys.argv = ["sb3-ppo-ext", *arguments]
    sys.orig_argv = list(sys.argv)  # rl_zoo3 stores it in the study and beside a model
    threading.Thread(target=_interrupt_with_parent, daemon=True).start()
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    print(f"\n$ sb3-ppo-ext {' '.join(arguments)}", flush=True)
    sys.exit(target())


def _interrupt_with_parent() -> None:
    """Interrupt this process, like Ctrl-C, when its parent ends."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os.kill(os.getpid(), signal.SIGINT)
