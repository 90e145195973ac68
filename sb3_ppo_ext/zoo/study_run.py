"""``sb3-ppo-ext study run``: one study, several processes, each trial in one of its own."""

from __future__ import annotations

import argparse
import contextlib
import secrets
import shlex
import shutil
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import AbstractContextManager
from datetime import datetime
from pathlib import Path

import numpy as np
from optuna.trial import FrozenTrial, TrialState
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from sb3_ppo_ext.zoo.interrupts import INTERRUPTED
from sb3_ppo_ext.zoo.storage import StudyError, storage_errors
from sb3_ppo_ext.zoo.study import FINISHED, Place, create
from sb3_ppo_ext.zoo.task import Task, check_train_arguments
from sb3_ppo_ext.zoo.trials import REASON, failed_with_error
from sb3_ppo_ext.zoo.workers import Workers, is_alive, is_here, process_name

_UNCLAIMED_SECONDS = 10.0  # between the creation of a trial and the note of the process that runs it


class Search:
    """
    Keeps workers busy with trials until the study has as many as it shall have.

    :param place: the study
    :param goal: how many complete and pruned trials the study shall have
    :param workers: the processes
    """

    def __init__(self, place: Place, goal: int, workers: Workers) -> None:
        self.place = place
        self.goal = goal
        self.workers = workers
        self.trials = place.trials()
        self.known = {trial.number: trial.state for trial in self.trials}
        self.unclaimed: dict[int, float] = {}
        self.console = Console(highlight=False, markup=False)  # what errors say may have brackets

    @property
    def finished(self) -> int:
        """How many trials count for the goal."""
        return sum(trial.state in FINISHED for trial in self.trials)

    @property
    def best(self) -> FrozenTrial | None:
        """The best trial."""
        complete = [trial for trial in self.trials if trial.state is TrialState.COMPLETE]
        return max(complete, key=lambda trial: trial.value or 0.0, default=None)

    def say(self, line: str) -> None:
        """
        :param line: to be printed above the table, where there is one
        """
        self.console.print(line, soft_wrap=True)

    def look(self) -> None:
        """Read the study, mark as failed what no process runs any more, and say what has ended since the last look."""
        with storage_errors(self.place.storage):
            for trial in self.place.trials(TrialState.RUNNING):
                if self._is_lost(trial):  # which another `study run` may be telling, too
                    self.place.study.tell(trial.number, state=TrialState.FAIL, skip_if_finished=True)
            self.trials = self.place.trials()
        for trial in self.trials:
            if trial.state.is_finished():
                self.unclaimed.pop(trial.number, None)
            if trial.state.is_finished() and self.known.get(trial.number) != trial.state:
                self.say(f"trial {trial.number}: {self._said(trial)}")
            self.known[trial.number] = trial.state

    def _is_lost(self, trial: FrozenTrial) -> bool:
        """
        :param trial: that the study takes for running
        """
        worker = trial.user_attrs.get("worker")
        if worker is None:
            first_seen = self.unclaimed.setdefault(trial.number, time.monotonic())
            return time.monotonic() - first_seen > _UNCLAIMED_SECONDS
        self.unclaimed.pop(trial.number, None)
        return is_here(worker) and not is_alive(worker)

    def _said(self, trial: FrozenTrial) -> str:
        """
        :param trial: that has ended
        """
        reason = trial.user_attrs.get(REASON)
        if trial.state is TrialState.FAIL:
            return "interrupted or lost; it does not count" if reason is None else f"failed with {reason}"
        said = "pruned" if trial.state is TrialState.PRUNED else f"{trial.value:.2f}"
        said += f" ({reason})" if reason is not None else ""
        best = f"; best {self.best.value:.2f}, trial {self.best.number}" if self.best else ""
        return f"{said} after {_seconds(trial)}; {self.finished} of {self.goal}{best}"

    def running_elsewhere(self) -> int:
        """How many trials other processes of this machine are running."""
        ours = {process_name(process.pid or 0) for process in self.workers.running.values()}
        theirs = [trial.user_attrs.get("worker") for trial in self.trials if trial.state is TrialState.RUNNING]
        return sum(worker is not None and worker not in ours and is_here(worker) for worker in theirs)

    def summary(self) -> str:
        """How far the study is, in a line."""
        counts = Counter(trial.state.name.lower() for trial in self.trials)
        states = ", ".join(f"{counts[state]} {state}" for state in ("complete", "pruned", "running") if counts[state])
        states += f"{', ' if states else ''}{counts['fail']} failed" if counts["fail"] else ""
        best = f"; best {self.best.value:.2f}, trial {self.best.number}" if self.best else ""
        return f"study {self.place.name}: {self.finished} of {self.goal} trials ({states or 'none yet'}){best}"

    def __rich__(self) -> Group:
        table = Table("worker", "trial", "step", "last evaluation", "for", box=None)
        trials = {trial.user_attrs.get("worker"): trial for trial in self.trials if trial.state is TrialState.RUNNING}
        for slot, process in self.workers.slots.items():
            trial = None if process is None else trials.get(process_name(process.pid or 0))
            if trial is None:
                table.add_row(str(slot), "idle" if process is None else "-", "", "", "")
                continue
            seen, (n_timesteps, n_evaluations) = list(trial.intermediate_values.values()), trial.user_attrs["budget"]
            step = f"{n_timesteps * len(seen) // n_evaluations:,} of {n_timesteps:,}"
            last = f"{seen[-1]:.2f} ({len(seen)} of {n_evaluations})" if seen else "-"
            table.add_row(str(slot), str(trial.number), step, last, _seconds(trial))
        return Group(Text(self.summary()), table)


def _seconds(trial: FrozenTrial) -> str:
    """
    :param trial: that has ended or is running
    :return: how long it took until now
    """
    start, end = trial.datetime_start or datetime.now(), trial.datetime_complete or datetime.now()
    return f"{(end - start).total_seconds():.0f} s"


def _shown(search: Search) -> AbstractContextManager[object]:
    """
    :param search: its table stays in view inside of the ``with`` block, if this is a terminal
    """
    if not search.console.is_terminal:
        return contextlib.nullcontext()
    return Live(search, console=search.console, transient=True)


def last_line(log: Path) -> str:
    """
    :param log: of a worker
    :return: what it said last
    """
    said = log.read_text(errors="replace").strip() if log.exists() else ""
    return said.splitlines()[-1] if said else "nothing"


def run(options: argparse.Namespace, train_arguments: Sequence[str], again: Sequence[str]) -> int:
    """
    :param options: of ``study run``
    :param train_arguments: those of ``train``
    :param again: this command
    :return: the exit code
    """
    is_file = options.conf_file.endswith((".py", ".yaml", ".yml"))  # or else a module
    conf_file = str(Path(options.conf_file).resolve()) if is_file else options.conf_file
    task = Task(**{**{name: getattr(options, name) for name in Task.__annotations__}, "conf_file": conf_file})
    task.entry()  # refuses what no trial could be started from
    how = []
    for name in ("n_evaluations", "eval_episodes", "n_startup_trials", "sampler", "pruner", "device"):
        value = getattr(options, name)
        how += [] if value is None else [f"--{name.replace('_', '-')}", str(value)]
    train_arguments = [*how, *train_arguments]
    check_train_arguments("run", train_arguments)
    place = create(options)
    with storage_errors(place.storage):
        place.set_task(task)
    arguments = ["train", "-optimize", "--num-threads", "1", *task.arguments(), *train_arguments]
    arguments += ["--storage", place.storage, "--study-name", place.name, "--n-trials", "1", "--no-optim-plots"]

    with contextlib.closing(Workers(options.workers)) as workers:
        search = Search(place, options.max_total_trials, workers)
        search.say(f"{search.summary()}; what the workers say is in {place.folder / 'worker-*.log'}")
        with _shown(search):
            try:
                _keep_busy(search, arguments, secrets.randbits(32) if options.seed is None else options.seed)
                interrupted = False
            except KeyboardInterrupt:
                search.say("stopping the workers; once more to kill them")
                interrupted = True
            with contextlib.suppress(KeyboardInterrupt):
                workers.close()
            search.look()
            while search.unclaimed:
                time.sleep(0.5)
                search.look()
    print(search.summary())
    if interrupted:
        print(f"\nGo on:\n  {shlex.join(again)}")
        return INTERRUPTED
    where = ["--study-name", place.name, "-f", options.log_folder]
    where += ["--storage", options.storage] if options.storage else []
    start = shlex.join(again[: again.index("study") + 1])
    print(f"\nLook at it:\n  {start} show {shlex.join(where)}")
    print(f"\nTrain the best again, on fresh seeds:\n  {start} evaluate {shlex.join(where)}")
    return 0


def _keep_busy(search: Search, arguments: Sequence[str], seed: int) -> None:
    """
    :param search: that ends when the study has the trials that it shall have
    :param arguments: of ``sb3-ppo-ext``, for one trial
    :param seed: what the seeds of all processes follow from
    """
    workers, folder = search.workers, search.place.folder
    before = started = len(search.trials)  # no two processes of a study shall draw the same numbers
    in_vain, finished = 0, 0
    with tempfile.TemporaryDirectory(prefix="sb3-ppo-ext-") as scratch:
        while True:
            search.look()
            if search.finished > finished:
                in_vain, finished = 0, search.finished
            elsewhere = search.running_elsewhere()
            for slot in workers.free:
                if search.finished + len(workers.running) + elsewhere >= search.goal:
                    break
                trial_seed = int(np.random.SeedSequence((seed, started)).generate_state(1)[0])
                started += 1
                rest = ["--seed", str(trial_seed), "-f", str(Path(scratch, str(slot)))]
                workers.start(slot, [*arguments, *rest], folder / f"worker-{slot}.log")
            if not workers.running and search.finished >= search.goal:
                return
            if not workers.running:
                time.sleep(1.0)
            for slot, code in workers.ended(timeout=1.0).items():
                shutil.rmtree(Path(scratch, str(slot)), ignore_errors=True)
                in_vain += 1
                log = folder / f"worker-{slot}.log"
                if code < 0:
                    name = signal.Signals(-code).name
                    search.say(f"worker {slot} was ended by {name}; its trial is lost, and another follows")
                elif code == 2 or in_vain > 3 * len(workers.slots):
                    search.look()
                    failed = [trial for trial in search.trials[before:] if failed_with_error(trial)]
                    said = failed[-1].user_attrs[REASON] if failed else last_line(log)
                    raise StudyError(f"the workers fail: {said} ({log})")
