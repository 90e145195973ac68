"""A study of several processes, in a journal and in PostgreSQL: one that dies loses its trial and nothing else."""

import contextlib
import glob
import os
import shutil
import signal
import socket
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import optuna
import pytest
import sqlalchemy.pool
from optuna.trial import TrialState

from tests.contract import held
from tests.contract.zoo import Command, in_background, journal, two_running_trials, wait_for

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


@pytest.fixture(params=["journal", "postgresql"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "postgresql":
        url = request.getfixturevalue("postgresql")
        assert isinstance(url, str)
        return url
    return str(tmp_path / "a" / "study.log")


@pytest.mark.usefixtures("held_space")
def test_a_killed_worker_loses_its_trial_and_nothing_else(storage: str, command: Command, tmp_path: Path) -> None:
    hold = tmp_path / "hold"
    hold.touch()
    killed: list[int] = []

    def load() -> optuna.Study:
        if storage.endswith(".log"):
            return optuna.load_study(storage=journal(Path(storage)), study_name="held")
        backend = optuna.storages.RDBStorage(storage, engine_kwargs={"poolclass": sqlalchemy.pool.NullPool})
        return optuna.load_study(storage=backend, study_name="held")

    def kill_one() -> None:
        try:
            workers = wait_for(lambda: two_running_trials(load))
            victim = min(workers)
            os.kill(int(victim.split(":")[1]), signal.SIGKILL)
            killed.append(workers[victim])
        finally:
            hold.unlink()

    thread = in_background(kill_one)
    run = held.arguments(tmp_path, 3, "--storage", storage, "--study-name", "held")
    output = command(*run)
    thread.join()

    trials = load().trials
    assert Counter(trial.state for trial in trials) == {TrialState.COMPLETE: 3, TrialState.FAIL: 1}
    assert [trial.number for trial in trials if trial.state is TrialState.FAIL] == killed
    assert len({trial.user_attrs["worker"] for trial in trials}) == 4
    assert len({tuple(trial.params.values()) for trial in trials}) == 4  # no two were seeded alike
    assert "was ended by SIGKILL" in output
    assert f"trial {killed[0]}: interrupted or lost" in output
    assert "3 of 3 trials (3 complete, 1 failed)" in output

    command(*run)  # has nothing left to do
    assert len(load().trials) == 4
