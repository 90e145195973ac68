"""A study of several processes on each kind of storage: whoever dies takes one trial along, and nothing else."""

import contextlib
import glob
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import optuna
import pytest
import sqlalchemy.pool
from optuna.trial import TrialState

from sb3_ppo_ext.zoo.cli import main
from tests.contract import held

APT_SECONDS = 100  # for each of two commands; a test has 300 in all


def postgresql_programs() -> Path:
    """The folder of ``initdb``; Debian's package is installed if it is not there and this process may do so."""

    def found() -> Path | None:
        on_path = shutil.which("initdb")
        folders = sorted(glob.glob("/usr/lib/postgresql/*/bin/initdb"))
        return Path(on_path or folders[-1]).resolve().parent if on_path or folders else None

    if found() is None:
        if os.name != "posix" or os.geteuid() != 0 or shutil.which("apt-get") is None:
            pytest.skip("there is no PostgreSQL, and this process cannot install it")
        environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
        for command in (["update"], ["install", "-y", "--no-install-recommends", "postgresql"]):
            with contextlib.suppress(subprocess.TimeoutExpired):
                subprocess.run(["apt-get", *command], env=environment, capture_output=True, timeout=APT_SECONDS)
    folder = found()
    if folder is None:
        pytest.skip("there is no PostgreSQL, and apt-get cannot install it")
    return folder


def unprivileged_user() -> str:
    import pwd

    known = {entry.pw_name for entry in pwd.getpwall()}
    return "postgres" if "postgres" in known else "nobody"


@pytest.fixture(scope="module")
def postgresql() -> Iterator[str]:
    """The URL of a database on a server of this test's own."""
    pytest.importorskip("psycopg", reason="psycopg is not installed")
    programs = postgresql_programs()
    user = unprivileged_user() if os.name == "posix" and os.geteuid() == 0 else None  # it refuses to run as root
    folder = Path(tempfile.mkdtemp(prefix="pg-"))  # not below pytest's, which the other user may not enter
    if user is not None:
        shutil.chown(folder, user)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def run(program: str, *arguments: str) -> None:
        # Not to a pipe: the server keeps what it is started with.
        with (Path(tempfile.gettempdir()) / f"{folder.name}.log").open("w+") as said:
            command = [str(programs / program), *arguments]
            done = subprocess.run(command, user=user, cwd=folder, stdout=said, stderr=said, stdin=subprocess.DEVNULL)
            said.seek(0)
            assert done.returncode == 0, said.read()
        Path(said.name).unlink()

    data = str(folder / "data")
    run("initdb", "-D", data, "-U", "study", "-A", "trust", "--no-sync")
    options = f"-p {port} -k {folder} -c listen_addresses=127.0.0.1 -c fsync=off"
    run("pg_ctl", "-D", data, "-w", "-l", str(folder / "log"), "-o", options, "start")
    try:
        yield f"postgresql+psycopg://study@127.0.0.1:{port}/postgres"
    finally:
        run("pg_ctl", "-D", data, "-m", "immediate", "stop")
        shutil.rmtree(folder)


@pytest.fixture(params=["journal", "sqlite", "postgresql"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "postgresql":
        url = request.getfixturevalue("postgresql")
        assert isinstance(url, str)
        return url
    return {"journal": str(tmp_path / "a" / "study.log"), "sqlite": f"sqlite:///{tmp_path}/study.db"}[request.param]


def opened(storage: str) -> optuna.Study:
    if storage.endswith(".log"):
        backend: Any = optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(storage))
    else:
        backend = optuna.storages.RDBStorage(storage, engine_kwargs={"poolclass": sqlalchemy.pool.NullPool})
    return optuna.load_study(storage=backend, study_name="held")


def in_background(act: Callable[[], None]) -> threading.Thread:
    thread = threading.Thread(target=act, daemon=True)
    thread.start()
    return thread


def test_a_killed_worker_loses_its_trial_and_nothing_else(
    storage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    hold = tmp_path / "hold"
    hold.touch()
    killed: list[int] = []

    def kill_one() -> None:
        try:
            workers: dict[str, int] = {}
            deadline = time.monotonic() + 60
            while len(workers) < 2 and time.monotonic() < deadline:
                time.sleep(0.1)
                if Path("logs/studies/held/worker-2.log").exists():  # and the study, hence
                    trials = opened(storage).get_trials(states=[TrialState.RUNNING])
                    workers = {t.user_attrs["worker"]: t.number for t in trials if "worker" in t.user_attrs}
            victim = min(workers)
            os.kill(int(victim.split(":")[1]), signal.SIGKILL)
            killed.append(workers[victim])
        finally:
            hold.unlink()

    thread = in_background(kill_one)
    command = held.arguments(tmp_path, 5, "--workers", "2", "--storage", storage, "--study-name", "held")
    monkeypatch.setattr(sys, "argv", ["sb3-ppo-ext", *command])
    assert main() == 0
    thread.join()

    trials = opened(storage).trials
    assert Counter(trial.state for trial in trials) == {TrialState.COMPLETE: 5, TrialState.FAIL: 1}
    assert [trial.number for trial in trials if trial.state is TrialState.FAIL] == killed
    workers = [trial.user_attrs["worker"] for trial in trials]
    assert len(set(workers)) == 6
    assert len({tuple(trial.params.values()) for trial in trials}) == 6  # no two were seeded alike
    output = capsys.readouterr().out
    assert "was ended by SIGKILL" in output
    assert f"trial {killed[0]}: interrupted or lost" in output
    assert "5 of 5 trials (5 complete, 1 failed)" in output

    monkeypatch.setattr(sys, "argv", ["sb3-ppo-ext", *command])
    assert main() == 0  # has nothing left to do
    assert len(opened(storage).trials) == 6
