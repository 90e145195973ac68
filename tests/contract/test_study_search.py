"""``sb3-ppo-ext study run``: several processes search one study; an interrupted search loses nothing and goes on."""

import multiprocessing.forkserver
import os
import re
import shlex
import signal
import sys
import threading
from contextlib import closing
from pathlib import Path

import optuna
import pytest
from rich.console import Console

from sb3_ppo_ext.zoo.cli import main
from sb3_ppo_ext.zoo.study import search
from sb3_ppo_ext.zoo.study.processes import is_alive, process_name
from sb3_ppo_ext.zoo.study.workers import Workers
from tests.contract import held
from tests.contract.zoo import (
    SCRIPT,
    STUDY,
    STUDY_FOLDER,
    Command,
    finished_study,
    in_background,
    load_study,
    trial_states,
    two_running_trials,
    wait_for,
)

pytestmark = pytest.mark.usefixtures("held_space")


def test_an_interrupted_search_goes_on_with_the_command_that_it_prints(command: Command, tmp_path: Path) -> None:
    Path("hold").touch()
    workers: list[str] = []

    def interrupt() -> None:
        workers.extend(wait_for(two_running_trials))
        os.kill(os.getpid(), signal.SIGINT)

    thread = in_background(interrupt)
    output = command(*held.arguments(tmp_path, 3), code=130)
    thread.join()
    assert trial_states() == {"FAIL": 2}  # nothing is left running
    assert not any(map(is_alive, workers))
    assert f"study {STUDY}: 0 of 3 trials (2 failed)" in output

    Path("hold").unlink()
    resume = shlex.split(output.splitlines()[-1])
    assert resume[0] == SCRIPT
    output = command(*resume[1:])
    assert trial_states() == {"FAIL": 2, "COMPLETE": 3}
    assert len({tuple(trial.params.values()) for trial in load_study().trials}) == 5
    assert "trial 4: " in output
    assert "3 of 3 trials (3 complete, 2 failed); best" in output

    command(*resume[1:-1], "4")  # and on to a higher number
    assert trial_states() == {"FAIL": 2, "COMPLETE": 4}


def test_workers_whose_parent_is_killed_give_back_their_trials(command: Command, tmp_path: Path) -> None:
    Path("hold").touch()
    with closing(Workers(1, main)) as workers:
        workers.start(1, held.arguments(tmp_path, 2), tmp_path / "log")
        parent = workers.running[1]
        trials = wait_for(two_running_trials)
        # Ctrl-C in a terminal reaches the parent's group, and none of the workers.
        groups = {os.getpgid(int(worker.split(":")[1])) for worker in trials}
        assert len(groups - {os.getpgid(parent.pid or 0), os.getpgid(0)}) == 2
        parent.kill()
        wait_for(lambda: not any(map(is_alive, trials)))
    assert trial_states() == {"FAIL": 2}


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the signal mask from /proc")
def test_ctrl_c_does_not_reach_the_server_that_processes_are_forked_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In its first seconds it imports torch, and would end in a traceback of its own."""
    server = multiprocessing.forkserver.ForkServer()  # none that another test has started
    server.set_forkserver_preload(["signal"])
    monkeypatch.setattr(multiprocessing.forkserver, "connect_to_new_process", server.connect_to_new_process)
    workers = Workers(1, main)
    workers.start(1, ["--version"], tmp_path / "log")
    status = Path(f"/proc/{vars(server)['_forkserver_pid']}/status").read_text()
    workers.close(interrupt=False)
    server._stop()  # type: ignore[attr-defined]
    blocked = int(next(line.split()[1] for line in status.splitlines() if line.startswith("SigBlk")), 16)
    assert blocked >> (signal.SIGINT - 1) & 1


def test_what_nobody_runs_any_more_is_failed_and_what_somebody_runs_is_left_alone(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In SQLite, which has one writer at a time."""
    monkeypatch.setattr(search, "_SECONDS_WITHOUT_WORKER", 0.0)
    storage = "sqlite:///study.db"
    before = optuna.create_study(storage=storage, study_name=STUDY, direction="maximize")
    gone = process_name(os.getpid()).replace(":", ":999999", 1)
    reused = process_name(os.getpid())[:-1] + "x"  # the same number as this process, another start
    for worker in (gone, reused, "elsewhere:1:1", None):
        trial = before.ask()
        if worker is not None:
            trial.set_user_attr("worker", worker)
    output = command(*held.arguments(tmp_path, 3, "--workers", "3", "--storage", storage))
    assert [trial.state.name for trial in before.trials[:4]] == ["FAIL", "FAIL", "RUNNING", "FAIL"]
    # More than these three may have failed: a trial is seen for a moment before its worker has noted itself.
    assert re.search(r"3 of 3 trials \(3 complete, 1 running, \d+ failed\)", output)


def test_trials_that_other_processes_run_count_before_they_end(command: Command, tmp_path: Path) -> None:
    study = finished_study(tmp_path)
    trial = study.optuna_study.ask()
    trial.set_user_attr("worker", process_name(os.getpid()))
    with closing(Workers(1, main)) as workers:
        running = search.Search(study, 1, workers)
        with running.console.capture() as printed:
            running.print("failed with tensor([[nan]])")
        assert printed.get() == "failed with tensor([[nan]])\n"
        running.refresh()
        assert running.n_running_elsewhere() == 1
        threading.Timer(0.5, study.optuna_study.tell, (trial, 1.0)).start()
        search.run_trials(running, ["train", "--help"], seed=0)  # waits, and starts none
        assert not (STUDY_FOLDER / "worker-1.log").exists()
        trial = study.optuna_study.ask()
        trial.set_user_attr("worker", process_name(os.getpid()))
        trial.set_user_attr("budget", [100, 2])
        trial.report(3.5, 1)
        running.refresh()
        console = Console(width=120, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
        console.print(running)
        console.file.close()
        assert re.search(r"1 +idle", console.export_text())

        class StandIn:
            pid = os.getpid()

        workers.slots[1] = StandIn()  # type: ignore[assignment]
        assert running.n_running_elsewhere() == 0
        with console.capture() as table:
            console.file = sys.stdout
            console.print(running)
        workers.slots[1] = None
    assert re.search(r"1 +1 +50 of 100 +3\.50 \(1 of 2\) +\d s", table.get())


def test_trials_that_always_fail_end_the_search_with_the_reason(command: Command, tmp_path: Path) -> None:
    output = command(*held.arguments(tmp_path, 2, "-params", "n_epochs:0", "--workers", "1"), code=2)
    reason = next(trial.user_attrs["reason"] for trial in load_study().trials)
    assert reason.startswith("ArgumentError: n_epochs=0 ")
    assert f"trial 0: failed with {reason}" in output
    assert f"the workers fail: {reason}" in output
    assert "worker-1.log" in output
    assert trial_states() == {"FAIL": 4}
    output = command("study", "show")
    assert f"study {STUDY}: 4 failed. No trial is complete yet." in output
    assert f"trials 0, 1, 2, 3: {reason}" in output
    output = command("study", "evaluate", code=2)
    assert f"has no complete trial yet; the last of 4 ended with {reason}" in output


def test_another_task_needs_another_study(command: Command, tmp_path: Path) -> None:
    finished_study(tmp_path, 1.0)
    run = held.arguments(tmp_path, 1)
    output = command(*run, "-n", "128", code=2)
    assert f"study '{STUDY}' was begun with n_timesteps=0, not 128; another --study-name" in output
    command(*run, "-n", "128", "--study-name", "longer")
    assert load_study(STUDY_FOLDER.with_name("longer"), "longer").trials[0].user_attrs["budget"] == [128, 1]
    assert "which study of logs/studies is meant: dual_clip_ppo_Held-v0, longer" in command("study", "show", code=2)
    assert "study longer: 1 complete" in command("study", "show", "--study-name", "longer")
