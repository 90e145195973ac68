"""``sb3-ppo-ext study run``: search with several processes at a time, each of which runs one trial."""

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
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np
from optuna.trial import FrozenTrial, TrialState
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from sb3_ppo_ext.zoo.errors import StudyError
from sb3_ppo_ext.zoo.interrupts import INTERRUPTED
from sb3_ppo_ext.zoo.study.processes import is_alive, is_local, process_name
from sb3_ppo_ext.zoo.study.storage import storage_errors
from sb3_ppo_ext.zoo.study.study import ZooStudy, create_study
from sb3_ppo_ext.zoo.study.task import Task
from sb3_ppo_ext.zoo.study.train_arguments import check_train_arguments
from sb3_ppo_ext.zoo.study.trials import BUDGET, REASON, WORKER, duration, failed_with_error
from sb3_ppo_ext.zoo.study.workers import Workers, last_line

_COUNTED_STATES = (TrialState.COMPLETE, TrialState.PRUNED)  # what --max-total-trials counts
_SECONDS_WITHOUT_WORKER = 10.0  # a trial may have no WORKER for this long after its creation


class Search:
    """
    Follows the trials of a study until it has the wanted number.

    Optuna's heartbeats, which find trials whose process has died, only work with databases and not with a journal. So
    each trial stores its process (:data:`WORKER`), and this class checks whether the process is alive.

    :param study: study to search
    :param goal: how many complete and pruned trials the study should have in the end
    :param workers: the processes
    """

    def __init__(self, study: ZooStudy, goal: int, workers: Workers) -> None:
        self.study = study
        self.goal = goal
        self.workers = workers
        self.trials = study.trials()
        self.states = {trial.number: trial.state for trial in self.trials}  # states that were printed
        self.without_worker: dict[int, float] = {}  # time at which they were first seen, by number
        self.console = Console(highlight=False, markup=False)  # error messages may contain brackets

    @property
    def n_counted(self) -> int:
        """Number of trials that count towards the goal."""
        return sum(trial.state in _COUNTED_STATES for trial in self.trials)

    @property
    def best(self) -> FrozenTrial | None:
        complete = [trial for trial in self.trials if trial.state is TrialState.COMPLETE]
        return max(complete, key=lambda trial: trial.value or 0.0, default=None)

    def print(self, line: str) -> None:
        """Print a line, above the table if there is one."""
        self.console.print(line, soft_wrap=True)

    def refresh(self) -> None:
        """Read the study, mark trials without a process as failed, and print the trials that have ended since."""
        with storage_errors(self.study.storage):
            for trial in self.study.trials(TrialState.RUNNING):
                if self._is_lost(trial):  # another `study run` may do the same
                    self.study.optuna_study.tell(trial.number, state=TrialState.FAIL, skip_if_finished=True)
            self.trials = self.study.trials()
        for trial in self.trials:
            if trial.state.is_finished():
                self.without_worker.pop(trial.number, None)
            if trial.state.is_finished() and self.states.get(trial.number) != trial.state:
                self.print(f"trial {trial.number}: {self._describe(trial)}")
            self.states[trial.number] = trial.state

    def _is_lost(self, trial: FrozenTrial) -> bool:
        """Whether a trial is marked as running, but no process runs it."""
        worker = trial.user_attrs.get(WORKER)
        if worker is None:
            first_seen = self.without_worker.setdefault(trial.number, time.monotonic())
            return time.monotonic() - first_seen > _SECONDS_WITHOUT_WORKER
        self.without_worker.pop(trial.number, None)
        return is_local(worker) and not is_alive(worker)

    def _describe(self, trial: FrozenTrial) -> str:
        """How a trial ended."""
        reason = trial.user_attrs.get(REASON)
        if trial.state is TrialState.FAIL:
            return "interrupted or lost; it does not count" if reason is None else f"failed with {reason}"
        end = "pruned" if trial.state is TrialState.PRUNED else f"{trial.value:.2f}"
        end += f" ({reason})" if reason is not None else ""
        return f"{end} after {duration(trial)}; {self.n_counted} of {self.goal}{self._describe_best()}"

    def _describe_best(self) -> str:
        return f"; best {self.best.value:.2f}, trial {self.best.number}" if self.best else ""

    def n_running_elsewhere(self) -> int:
        """Number of trials that other commands run on this machine."""
        ours = {process_name(process.pid or 0) for process in self.workers.running.values()}
        theirs = [trial.user_attrs.get(WORKER) for trial in self.trials if trial.state is TrialState.RUNNING]
        return sum(worker is not None and worker not in ours and is_local(worker) for worker in theirs)

    def summary(self) -> str:
        """The progress of the study in one line."""
        counts = Counter(trial.state.name.lower() for trial in self.trials)
        states = [f"{counts[state]} {state}" for state in ("complete", "pruned", "running") if counts[state]]
        states += [f"{counts['fail']} failed"] if counts["fail"] else []
        trials = f"{self.n_counted} of {self.goal} trials ({', '.join(states) or 'none yet'})"
        return f"study {self.study.name}: {trials}{self._describe_best()}"

    def __rich__(self) -> Group:
        table = Table("worker", "trial", "step", "last evaluation", "for", box=None)
        trials = {trial.user_attrs.get(WORKER): trial for trial in self.trials if trial.state is TrialState.RUNNING}
        for slot, process in self.workers.slots.items():
            trial = None if process is None else trials.get(process_name(process.pid or 0))
            if trial is None:
                table.add_row(str(slot), "idle" if process is None else "-", "", "", "")
                continue
            seen, (n_timesteps, n_evaluations) = list(trial.intermediate_values.values()), trial.user_attrs[BUDGET]
            step = f"{n_timesteps * len(seen) // n_evaluations:,} of {n_timesteps:,}"
            last = f"{seen[-1]:.2f} ({len(seen)} of {n_evaluations})" if seen else "-"
            table.add_row(str(slot), str(trial.number), step, last, duration(trial))
        return Group(Text(self.summary()), table)

    def live_table(self) -> AbstractContextManager[object]:
        """Show a live table of the workers in the ``with`` block, if the output is a terminal."""
        if not self.console.is_terminal:
            return contextlib.nullcontext()
        return Live(self, console=self.console, transient=True)


def search(
    options: argparse.Namespace, train_arguments: Sequence[str], program: Sequence[str], target: Callable[[], int]
) -> int:
    """
    :param options: options of ``study run``
    :param train_arguments: arguments for ``train``
    :param program: command that started ``sb3-ppo-ext``
    :param target: main function of ``sb3-ppo-ext``
    :return: the exit code
    """
    task = Task.from_options(options)
    n_timesteps = int(task.entry()["n_timesteps"])  # raises an error if no trial could start from the entry
    if (options.n_evaluations or 1) > n_timesteps:
        raise StudyError(
            f"--n-evaluations {options.n_evaluations} is not allowed: a trial has {n_timesteps} steps, and can have at "
            "most one evaluation after each"
        )
    trial_arguments = []
    for name in ("n_evaluations", "eval_episodes", "n_startup_trials", "sampler", "pruner", "device"):
        value = getattr(options, name)
        trial_arguments += [] if value is None else [f"--{name.replace('_', '-')}", str(value)]
    train_arguments = [*trial_arguments, *train_arguments]
    check_train_arguments("run", train_arguments)
    study = create_study(options)
    with storage_errors(study.storage):
        study.set_task(task)
    arguments = ["train", "-optimize", "--num-threads", "1", *task.arguments(), *train_arguments]
    arguments += ["--storage", study.storage, "--study-name", study.name, "--n-trials", "1", "--no-optim-plots"]

    with contextlib.closing(Workers(options.workers, target)) as workers:
        running = Search(study, options.max_total_trials, workers)
        running.print(f"{running.summary()}; what the workers say is in {study.folder / 'worker-*.log'}")
        with running.live_table():
            try:
                run_trials(running, arguments, secrets.randbits(32) if options.seed is None else options.seed)
                interrupted = False
            except KeyboardInterrupt:
                running.print("stopping the workers; once more to kill them")
                interrupted = True
            with contextlib.suppress(KeyboardInterrupt):
                workers.close()
            running.refresh()
            while running.without_worker:
                time.sleep(0.5)
                running.refresh()
    print(running.summary(), end="\n\n")
    if interrupted:
        return INTERRUPTED
    print(f"Look at it:\n  {shlex.join([*program, 'study', 'show', *study.arguments])}\n")
    print(f"Train the best again, on fresh seeds:\n  {shlex.join([*program, 'study', 'evaluate', *study.arguments])}")
    return 0


def run_trials(search: Search, arguments: Sequence[str], seed: int) -> None:
    """
    Start a process for each trial until the study has the wanted number of trials.

    :param search: the search, with its workers
    :param arguments: arguments of ``sb3-ppo-ext`` for one trial
    :param seed: seed from which the seeds of all processes are derived
    """
    workers, folder = search.workers, search.study.folder
    before = started = len(search.trials)  # counted on, so that no two processes draw the same numbers
    n_ended, n_counted = 0, 0  # processes that ended since a trial last counted; trials that counted
    with tempfile.TemporaryDirectory(prefix="sb3-ppo-ext-") as scratch:
        while True:
            search.refresh()
            if search.n_counted > n_counted:
                n_ended, n_counted = 0, search.n_counted
            elsewhere = search.n_running_elsewhere()
            for slot in workers.free:
                if search.n_counted + len(workers.running) + elsewhere >= search.goal:
                    break
                trial_seed = int(np.random.SeedSequence((seed, started)).generate_state(1)[0])
                started += 1
                rest = ["--seed", str(trial_seed), "-f", str(Path(scratch, str(slot)))]
                workers.start(slot, [*arguments, *rest], folder / f"worker-{slot}.log")
            if not workers.running and search.n_counted >= search.goal:
                return
            if not workers.running:
                time.sleep(1.0)
            for slot, code in workers.wait(timeout=1.0).items():
                shutil.rmtree(Path(scratch, str(slot)), ignore_errors=True)
                n_ended += 1
                log = folder / f"worker-{slot}.log"
                if code < 0:
                    name = signal.Signals(-code).name
                    search.print(f"worker {slot} was ended by {name}; its trial is lost, and another follows")
                elif code == 2 or n_ended > 3 * len(workers.slots):
                    search.refresh()
                    failed = [trial for trial in search.trials[before:] if failed_with_error(trial)]
                    reason = failed[-1].user_attrs[REASON] if failed else last_line(log)
                    raise StudyError(f"the workers fail: {reason} ({log})")
