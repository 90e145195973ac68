"""Runs, each in a process of its own: those that are missing, and how long they will take."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import statistics
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from benchmarks.learning.cases import Run, entry
from benchmarks.learning.run import make_run

if sys.platform != "win32":
    import fcntl


def make_runs(runs: Sequence[Run], overrides: dict[str, Any], folder: Path, jobs: int) -> list[Run]:
    """
    :param runs: that are wanted, in this order; those whose files are there are not made
    :param overrides: of their hyper-parameters
    :param folder: for the files of the set
    :param jobs: processes at a time
    :return: those that failed
    """
    todo = [run for run in runs if not _is_finished(run, overrides, folder)]
    print(f"{len(runs) - len(todo)} of {len(runs)} runs are there", flush=True)
    times = _Times(folder, overrides)
    failed: list[Run] = []
    running: list[tuple[Run, BaseProcess, float]] = []
    # A process that is forked would have torch's threads as they were.
    context = multiprocessing.get_context("spawn")
    total, waiting = len(todo), list(reversed(todo))
    while waiting or running:
        while waiting and len(running) < jobs:
            run = waiting.pop()
            process = context.Process(target=_work, args=(run, entry(run, overrides), run.path(folder)))
            process.start()
            running.append((run, process, time.perf_counter()))
        ended = wait([process.sentinel for _, process, _ in running])
        for each in [each for each in running if each[1].sentinel in ended]:
            running.remove(each)
            run, worker, start = each
            worker.join()
            seconds = time.perf_counter() - start
            if run.path(folder).exists():
                times.add(run, seconds)
                said = f"{_final_return(run.path(folder)):.4g} after {seconds:.0f} s"
            else:
                failed.append(run)
                said = f"FAILED with status {worker.exitcode}, see {run.path(folder).with_suffix('.log')}"
            n_left = len(waiting) + len(running)
            left = times.expected([*waiting, *(r for r, _, _ in running)]) / jobs
            print(f"{total - n_left} of {total}: {run}: {said}; {_duration(left)} left", flush=True)
    return failed


def _work(run: Run, hyper_parameters: dict[str, Any], path: Path) -> None:
    """
    Make a run, in a process of its own, which ends with the one that started it.

    :param run: to be made
    :param hyper_parameters: of its training
    :param path: of its file; beside it stands a log, as long as the run is made or if it has failed
    """
    parent = multiprocessing.parent_process()
    assert parent is not None
    threading.Thread(target=_end_with, args=(parent.sentinel,), daemon=True).start()
    path.parent.mkdir(parents=True, exist_ok=True)
    log = path.with_suffix(".log")
    with log.open("w") as file:
        os.dup2(file.fileno(), sys.stderr.fileno())  # MuJoCo warns of its own models, by C
    make_run(run, hyper_parameters, path)
    log.unlink()


def _end_with(sentinel: int) -> None:
    wait([sentinel])
    os._exit(1)


def _is_finished(run: Run, overrides: dict[str, Any], folder: Path) -> bool:
    path = run.path(folder)
    if not path.exists():
        return False
    made_with, wanted = json.loads(path.read_text())["entry"], entry(run, overrides)
    if made_with != wanted:
        raise SystemExit(
            f"{path} was made with other hyper-parameters: {made_with}, and wanted are {wanted}; "
            "choose another --name, or remove the file"
        )
    return True


def _final_return(path: Path) -> float:
    return float(json.loads(path.read_text())["evaluation"]["mean"][-1])


class _Times:
    """
    How long a run takes, from those that are there.

    :param folder: of the files of the set
    :param overrides: of the hyper-parameters of those to come
    """

    def __init__(self, folder: Path, overrides: dict[str, Any]) -> None:
        self._overrides = overrides
        self._per_step: dict[tuple[str, ...], list[float]] = defaultdict(list)
        for path in folder.parent.glob("*/*/*.json"):
            record = json.loads(path.read_text())
            run = Run(*(record[name] for name in Run._fields))
            self.add(run, record["seconds"]["wall"][-1] + record["evaluation"]["seconds"])

    def add(self, run: Run, seconds: float) -> None:
        """
        :param run: that is finished
        :param seconds: that it took
        """
        for key in self._keys(run):
            self._per_step[key].append(seconds / self._steps(run))

    def expected(self, runs: Iterable[Run]) -> float:
        """:param runs: that are still to be made; the seconds of all of them"""
        total = 0.0
        for run in runs:
            known = next((self._per_step[key] for key in self._keys(run) if key in self._per_step), [0.0])
            total += statistics.median(known) * self._steps(run)
        return total

    def _steps(self, run: Run) -> float:
        return float(entry(run, self._overrides)["n_timesteps"])

    @staticmethod
    def _keys(run: Run) -> list[tuple[str, ...]]:
        """Like what the run is, the most alike first."""
        return [(run.set, run.algo, run.env), (run.set, run.algo), (run.set,), ()]


def _duration(seconds: float) -> str:
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min"


@contextlib.contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Two that make the same runs at the same time would make each of them twice."""
    folder.mkdir(parents=True, exist_ok=True)
    if sys.platform == "win32":
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise SystemExit(f"{folder} is what another benchmarks.learning is writing to") from None
    try:
        yield
    finally:
        os.close(descriptor)
