"""A file is seen whole by everyone, whoever writes it at the same time; otherwise it is as SB3 would make it."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import stat
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

import pytest
from stable_baselines3 import PPO
from stable_baselines3.common.vec_env import DummyVecEnv

from sb3_ppo_ext import DualClipPPO
from sb3_ppo_ext.common.saving.checkpoint import load_weights, resume, save_checkpoint
from sb3_ppo_ext.common.saving.files import _new_temporary, damage_of, write_whole
from tests.envs import limited_walk
from tests.processes import in_new_process

SB3S_AND_OURS = pytest.mark.parametrize("algorithm", [PPO, DualClipPPO])
NAME_OF_A_LEFTOVER = f"{0:032x}.sb3_ppo_ext.tmp"


def make(algorithm: Any = DualClipPPO) -> Any:
    env = DummyVecEnv([limited_walk])
    return algorithm("MlpPolicy", env, n_steps=8, batch_size=8, policy_kwargs={"net_arch": [4]}, device="cpu")


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def together(*tasks: Any) -> list[Exception]:
    """Run tasks in threads that begin at once; what they raised."""
    errors: list[Exception] = []
    barrier = threading.Barrier(len(tasks))

    def run(task: Any) -> None:
        barrier.wait()
        try:
            task()
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(task,)) for task in tasks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return errors


# Two writers.


def test_threads_save_to_one_path_and_read_from_it(tmp_path):
    path = tmp_path / "best.zip"
    models = [make() for _ in range(3)]
    models[0].save(path)

    def read() -> None:
        policy = make().policy
        for _ in range(40):
            assert damage_of(path) is None
            load_weights(path, policy)

    def save(model: Any) -> Any:
        return lambda: [model.save(path) for _ in range(40)]

    assert together(*map(save, models), read) == []
    assert names(tmp_path) == {"best.zip"}


def write_at_random(path: str, seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(100):
        write_whole(Path(path), memoryview(bytes([seed]) * rng.randrange(1, 200_000)))


def write_in_processes(path: str, n_processes: int) -> None:
    """In a process that forks the writers, so that they need not import everything anew."""
    write_whole(Path(path), memoryview(b"0"))
    children = []
    for seed in range(n_processes):
        child = os.fork()
        if child == 0:
            status = 1
            with contextlib.suppress(Exception):
                write_at_random(path, seed)
                status = 0
            os._exit(status)
        children.append(child)
    for _ in range(500):
        content = Path(path).read_bytes()
        assert len(set(content)) == 1
    for child in children:
        assert os.waitpid(child, 0)[1] == 0


def test_processes_write_to_one_path(tmp_path):
    in_new_process(
        "from tests.contract.test_atomic_files import write_in_processes; write_in_processes(sys.argv[1], 3)",
        tmp_path / "best.zip",
    )
    assert names(tmp_path) == {"best.zip"}


def test_a_checkpoint_is_resumed_from_one_file_though_another_takes_its_place(tmp_path):
    path, later = tmp_path / "model.zip", tmp_path / "later.zip"
    model = make()
    save_checkpoint(model.learn(8), path)
    save_checkpoint(model.learn(8, reset_num_timesteps=False), later)

    class Overtaken(DualClipPPO):
        @classmethod
        def load(cls, *args: Any, **kwargs: Any) -> Any:
            os.replace(later, path)  # after the training state was read
            return super().load(*args, **kwargs)

    resumed = resume(Overtaken, path, DummyVecEnv([limited_walk]), device="cpu")
    assert not later.exists()
    assert resumed.num_timesteps == 8


# What a killed process leaves.


def test_a_leftover_is_removed_and_other_files_are_not(tmp_path):
    others = {"model.zip.tmp", "a.tmp", NAME_OF_A_LEFTOVER[1:], f"my_{NAME_OF_A_LEFTOVER}", "other.zip"}
    for name in (NAME_OF_A_LEFTOVER, *others):
        (tmp_path / name).touch()
    make().save(tmp_path / "model")
    assert names(tmp_path) == {*others, "model.zip"}


# As this package opens a temporary file, in a process that starts at once
HOLDS = """
import fcntl, sys, time
file = open(sys.argv[1], "xb")
fcntl.flock(file, fcntl.LOCK_EX)
print("locked", flush=True)
time.sleep(600)
"""


def test_the_file_of_a_living_writer_is_left_alone(tmp_path):
    model = make()
    path, file = _new_temporary(tmp_path)  # another thread's
    held = tmp_path / NAME_OF_A_LEFTOVER
    with subprocess.Popen([sys.executable, "-c", HOLDS, str(held)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "locked\n"
        model.save(tmp_path / "model")
        assert names(tmp_path) == {path.name, held.name, "model.zip"}
        process.kill()
        process.wait()
    model.save(tmp_path / "model")
    assert names(tmp_path) == {path.name, "model.zip"}
    file.close()
    model.save(tmp_path / "model")
    assert names(tmp_path) == {"model.zip"}


# As SB3's files are.


@pytest.fixture
def umask() -> Any:
    before = os.umask(0o027)
    yield
    os.umask(before)


@SB3S_AND_OURS
def test_permissions_of_a_new_file_and_of_one_that_is_replaced(algorithm, tmp_path, umask):
    model, path = make(algorithm), tmp_path / "model.zip"
    model.save(path)
    assert mode(path) == 0o640
    for permissions in (0o600, 0o666, 0o755):
        path.chmod(permissions)
        model.save(path)
        assert mode(path) == permissions


@SB3S_AND_OURS
def test_a_file_that_must_not_be_written_to_is_not(algorithm):
    user = os.geteuid()
    model = make(algorithm)
    folder = Path(tempfile.mkdtemp())
    try:
        path = folder / "model.zip"
        path.write_bytes(b"precious")
        path.chmod(0o444)
        if user == 0:  # who may do anything
            os.chown(folder, 65534, 65534)
            os.chown(path, 65534, 65534)
            os.seteuid(65534)
        with pytest.raises(PermissionError):
            model.save(path)
        assert path.read_bytes() == b"precious"
    finally:
        os.seteuid(user)
        shutil.rmtree(folder)


@pytest.mark.parametrize("save", [PPO.save, DualClipPPO.save, save_checkpoint])
def test_a_symbolic_link_is_followed_and_kept(save, tmp_path):
    model = make(PPO if save is PPO.save else DualClipPPO)
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "old.zip").touch()
    (tmp_path / "link.zip").symlink_to("there/old.zip")
    (tmp_path / "chain.zip").symlink_to("link.zip")
    (tmp_path / "dangling.zip").symlink_to("there/new.zip")
    save(model, tmp_path / "chain.zip")
    save(model, tmp_path / "dangling.zip")
    for name in ("link", "chain", "dangling"):
        assert (tmp_path / f"{name}.zip").is_symlink()
    assert names(tmp_path / "there") == {"old.zip", "new.zip"}
    for name in ("old", "new"):
        assert damage_of(tmp_path / "there" / f"{name}.zip") is None
    (tmp_path / "a.zip").symlink_to("b.zip")
    (tmp_path / "b.zip").symlink_to("a.zip")
    with pytest.raises(OSError, match="symbolic links"):
        save(model, tmp_path / "a.zip")


@SB3S_AND_OURS
def test_the_longest_name_there_is(algorithm, tmp_path):
    make(algorithm).save(tmp_path / ("n" * 251))
    assert names(tmp_path) == {"n" * 251 + ".zip"}


@SB3S_AND_OURS
def test_a_pipe_is_written_to(algorithm, tmp_path):
    path = tmp_path / "pipe.zip"
    os.mkfifo(path)
    read = []
    model = make(algorithm)
    assert together(lambda: model.save(path), lambda: read.append(path.read_bytes())) == []
    assert read[0].startswith(b"PK")
    assert stat.S_ISFIFO(path.stat().st_mode)


def test_a_checkpoint_gets_the_name_and_the_folder_that_save_would_give_it(tmp_path):
    model = make().learn(8)
    with pytest.warns(UserWarning, match="does not exist. Will create it"):
        save_checkpoint(model, tmp_path / "new" / "folder" / "model")
    assert names(tmp_path / "new" / "folder") == {"model.zip"}
    assert resume(DualClipPPO, tmp_path / "new/folder/model", DummyVecEnv([limited_walk])).num_timesteps == 8
