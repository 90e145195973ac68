"""The sides take turns, A B C A B C, each in a process of its own."""

from __future__ import annotations

import contextlib
import math
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing import Pipe
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.cases import OURS, ROOT, SBX_PYTHON, Settings, Side, Suite, Workload
from benchmarks.tasks import Turn

# What the environments, and the parts of SB3 that all sides use, depend on.
_SAME = ("python", "numpy", "gymnasium", "mujoco", "stable-baselines3", "torch")


class Spread(NamedTuple):
    """Median, least and greatest of some numbers; not numbers, if there are none."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, numbers: Iterable[float]) -> Spread:
        """:param numbers: whose spread it is"""
        values = list(numbers) or [math.nan]
        return cls(statistics.median(values), min(values), max(values))

    def __str__(self) -> str:
        return "-" if math.isnan(self.median) else f"{self.median:.2f} ({self.low:.2f} to {self.high:.2f})"


@dataclass
class Measured:
    """
    What was measured of a side.

    :param first_run: warm-up of a process that found nothing compiled; empty if that was not measured apart
    :param warm_up: of the process that was measured
    :param turns: that count; none if the side failed
    :param peaks: memory, in MiB, of the "host" and perhaps of the "device"
    :param versions: of what it ran on
    :param device: its name
    :param failure: why it could not do its work
    :param messages: seconds of messages between processes, where there are several
    """

    first_run: list[Turn] = field(default_factory=list)
    warm_up: list[Turn] = field(default_factory=list)
    turns: list[Turn] = field(default_factory=list)
    peaks: dict[str, float] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    device: str = ""
    failure: str = ""
    messages: dict[str, float] = field(default_factory=dict)

    def per_step(self, part: str = "seconds") -> float:
        """:param part: of :class:`Turn`; the median of its seconds for one step of an environment"""
        return Spread.of(getattr(turn, part) / turn.steps for turn in self.turns).median

    def per_second(self) -> Spread:
        """Steps a second."""
        return Spread.of(turn.steps / turn.seconds for turn in self.turns)

    def compile_seconds(self, warm_up: list[Turn]) -> float:
        """
        :param warm_up: one of the two
        :return: what its iterations took above what they take later: all that was compiled in rollouts and updates
        """
        return sum(turn.seconds - turn.steps * self.per_step() for turn in warm_up) if warm_up else math.nan

    def processor_share(self) -> float:
        """Part of the time in which the process was given a processor: below 1, another one had it."""
        share = Spread.of(turn.cpu / turn.seconds for turn in self.turns).median
        return 1.0 if math.isnan(share) else share


def ratio(ours: Measured, peer: Measured, part: str = "seconds") -> Spread:
    """
    How many times faster ours is, from the turns of the same round.

    :param ours: measured together with the peer
    :param peer: the other
    :param part: of :class:`Turn`
    """
    pairs = zip(ours.turns, peer.turns, strict=False)  # a side that failed has none
    return Spread.of((getattr(b, part) / b.steps) / (getattr(a, part) / a.steps) for a, b in pairs)


def ratio_of_all(ours: Measured, peer: Measured) -> float:
    """
    How many times faster ours is in all turns together; not a number if one of the two has none.

    :param ours: measured together with the peer
    :param peer: the other
    """
    if not ours.turns or not peer.turns:
        return math.nan
    a, b = (sum(turn.seconds for turn in m.turns) / sum(turn.steps for turn in m.turns) for m in (ours, peer))
    return b / a


class Worker:
    """
    The process of a side, which waits for its turns.

    :param side: that it is for
    :param settings: of the run
    :param folder: for its temporary files, what torch compiles among them
    """

    def __init__(self, side: Side, settings: Settings, folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        self._errors = folder / "errors"
        self._connection, its_end = Pipe()
        code = "import sys; from benchmarks import sides; sides.serve(int(sys.argv[1]))"
        python = str(SBX_PYTHON) if side.who == "sbx" else sys.executable
        with self._errors.open("w") as errors, its_end:
            self._process = subprocess.Popen(
                [python, "-c", code, str(its_end.fileno())],
                cwd=ROOT,
                env=_environment_variables(side, settings, folder),
                pass_fds=[its_end.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=errors,
                stderr=errors,
            )

    def ask(self, what: str, *arguments: Any) -> Any:
        """
        :param what: "make", or a method of :class:`benchmarks.tasks.Task`
        :param arguments: of :func:`benchmarks.sides.make_task`
        :return: what it returned
        """
        self.tell(what, *arguments)
        return self.answer()

    def tell(self, what: str, *arguments: Any) -> None:
        """As :meth:`ask`, without waiting for :meth:`answer`."""
        with contextlib.suppress(OSError):  # answer() says that it has ended
            self._connection.send((what, *arguments))

    def answer(self) -> Any:
        """What was returned by what it was told to do."""
        try:
            value, error = self._connection.recv()
        except (EOFError, OSError):
            said = "\n".join(self._errors.read_text().strip().splitlines()[-5:])
            raise RuntimeError(f"ended with status {self._process.wait()}; it said: {said}") from None
        if error is not None:
            raise RuntimeError(error)
        return value

    def close(self) -> None:
        """End it; a second time does nothing."""
        self._connection.close()
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def _environment_variables(side: Side, settings: Settings, folder: Path) -> dict[str, str]:
    """
    The environment variables of a side.

    :param side: that they are for
    :param settings: of the run
    :param folder: for temporary files: torch keeps there what it has compiled, which the first run must not find
    """
    variables = dict(os.environ)
    if side.who in ("sbx", "cleanrl"):
        variables.pop("PYTHONPATH", None)  # they run in another Python environment
    if settings.device == "cpu":
        variables["JAX_PLATFORMS"] = "cpu"
    else:
        variables["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"  # the others need memory of the device too
    if settings.threads == 1:
        variables["XLA_FLAGS"] = "--xla_cpu_multi_thread_eigen=false"
    variables |= dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), str(settings.threads))
    return variables | {
        "TMPDIR": str(folder),
        "TORCHINDUCTOR_CACHE_DIR": str(folder / "torchinductor"),
        "PYGAME_HIDE_SUPPORT_PROMPT": "1",
    }


class Crew(contextlib.ExitStack):
    """
    The processes of the sides, alive until the ``with`` block ends.

    :param settings: of the run
    :param first_runs: whether compiled sides are first warmed up in a process that finds nothing compiled, to tell its
        compile time from that of later processes, which find what torch has kept
    """

    def __init__(self, settings: Settings, *, first_runs: bool) -> None:
        super().__init__()
        self._settings = settings
        self._first_runs = first_runs
        self._folder = Path(self.enter_context(tempfile.TemporaryDirectory()))
        self._workers: dict[Side, Worker] = {}

    def measure(self, workload: Workload, sides: Sequence[Side]) -> dict[Side, Measured]:
        """
        :param workload: of all sides
        :param sides: in the order of their turns; the environment alone comes last
        :return: what was measured
        """
        actions = self._folder / "actions.npy"
        actions.unlink(missing_ok=True)
        results = {side: Measured() for side in sides}
        versions: dict[str, str] = {}
        for side, result in results.items():
            _say(f"  warm-up of {side} ...")
            start = time.perf_counter()
            with self._may_fail(side, result):
                if self._first_runs and side.torch_compile:
                    self._start(side)
                    result.first_run = self._warm_up(side, workload, actions, result)
                    self._workers.pop(side).close()
                if side not in self._workers:
                    self._start(side)
                result.warm_up = self._warm_up(side, workload, actions, result)
                _check_same(result.versions, versions)
                _say(f" {time.perf_counter() - start:.1f} s\n")
        for repeat in range(self._settings.repeats):
            _say(f"  turn {repeat + 1}/{self._settings.repeats}, steps/s:")
            for side, result in results.items():
                if not result.failure:
                    with self._may_fail(side, result):
                        result.turns.append(self._workers[side].ask("turn"))
                        _say(f" {result.turns[-1].steps / result.turns[-1].seconds:.0f}")
            _say("\n")
        for side, result in results.items():
            if not result.failure:
                with self._may_fail(side, result):
                    result.peaks = self._workers[side].ask("peak_memory")
                    if side.n_processes > 1 and side.who in OURS:
                        result.messages = self._workers[side].ask("messages")
        return results

    def _start(self, side: Side) -> None:
        self._workers[side] = Worker(side, self._settings, self._folder / re.sub(r"\W+", "-", str(side)))
        self.callback(self._workers[side].close)

    def _warm_up(self, side: Side, workload: Workload, actions: Path, result: Measured) -> list[Turn]:
        ask = self._workers[side].ask
        result.versions, result.device = ask("make", side, workload, self._settings, actions)
        # CleanRL's turns have a warm-up of their own.
        return [ask("turn") for _ in range(0 if side.who == "cleanrl" else self._settings.n_warm_up)]

    @contextlib.contextmanager
    def _may_fail(self, side: Side, result: Measured) -> Iterator[None]:
        """The others go on without a side that fails."""
        try:
            yield
        except (RuntimeError, OSError) as error:
            _say(f" {side} FAILED: {error}\n")
            result.failure = str(error)
            result.turns = []
            if side in self._workers:
                self._workers.pop(side).close()


def _check_same(versions: dict[str, str], on_others: dict[str, str]) -> None:
    """The two Python environments must have the same environment code."""
    for name in _SAME:
        if name in versions and on_others.setdefault(name, versions[name]) != versions[name]:
            raise RuntimeError(
                f"{name} is {versions[name]} here and {on_others[name]} on the other sides, and the ratio would be of "
                "those too; install constraints.txt, and remove .venv-sbx and run make sbx-env again"
            )


def _say(text: str) -> None:
    print(text, end="", file=sys.stderr, flush=True)


def measure(suite: Suite, settings: Settings) -> Iterator[tuple[Workload, dict[Side, Measured]]]:
    """
    :param suite: whose cases are measured
    :param settings: of the run
    :return: each case with what was measured, as soon as it was
    """
    keep = bool(suite.axes)
    with contextlib.ExitStack() as stack:
        crew: Crew | None = None
        for number, (workload, sides) in enumerate(suite.cases.items(), 1):
            _say(f"\nCase {number}/{len(suite.cases)}: {workload}\n")
            if crew is None or not keep:
                stack.close()
                crew = stack.enter_context(Crew(settings, first_runs=not keep))
            yield workload, crew.measure(workload, sides)
