"""Checkpoints are written whole or not at all, kept, found again, and lose nothing to a full disk or a SIGKILL."""

from __future__ import annotations

import base64
import contextlib
import errno
import io
import json
import multiprocessing
import os
import pickle
import random
import resource
import signal
import time
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from stable_baselines3.common.callbacks import BaseCallback, CallbackList, EveryNTimesteps
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

from sb3_ppo_ext import TRPO, DualClipPPO
from sb3_ppo_ext.common.saving.checkpoint import (
    SafeCheckpointCallback,
    latest_checkpoint,
    load_vec_normalize,
    load_weights,
    resume,
    save_checkpoint,
)
from tests.algorithms import ALGORITHMS, assert_same_policy, small
from tests.envs import limited_walk
from tests.processes import in_new_process

N_STEPS = 8


def make_env() -> VecNormalize:
    return VecNormalize(DummyVecEnv([limited_walk]))


def make_model(**arguments: Any) -> DualClipPPO:
    return DualClipPPO(
        "MlpPolicy", make_env(), n_steps=N_STEPS, batch_size=N_STEPS, n_epochs=1, device="cpu", **arguments
    )


def resumed(path: Path) -> DualClipPPO:
    return resume(DualClipPPO, path, make_env(), device="cpu")


def statistics_of(path: Path) -> VecNormalize | None:
    return load_vec_normalize(path, DummyVecEnv([limited_walk]))


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def steps_of(path: Path | None) -> int:
    assert path is not None
    return int(path.name.split("_")[-2])


@pytest.fixture
def written(tmp_path) -> Path:
    """A folder with one checkpoint."""
    make_model().learn(N_STEPS, callback=SafeCheckpointCallback(1, tmp_path))
    assert names(tmp_path) == {"rl_model_8_steps.zip"}
    return tmp_path


# What is written, and when.


@pytest.mark.parametrize(
    ("save_freq", "steps"),
    [(1, [8, 16, 24, 32, 40]), (8, [8, 16, 24, 32, 40]), (9, [16, 32, 40]), (24, [24, 40]), (1000, [40])],
)
def test_written_between_rollouts_and_at_the_end(save_freq, steps, tmp_path):
    folder = tmp_path / "new" / "folder"
    make_model().learn(40, callback=SafeCheckpointCallback(save_freq, folder, keep_last=None))
    assert names(folder) == {f"rl_model_{n}_steps.zip" for n in steps}


@pytest.mark.parametrize(("keep_last", "steps"), [(1, [40]), (2, [32, 40]), (3, [24, 32, 40])])
def test_the_last_ones_are_kept(keep_last, steps, tmp_path):
    (tmp_path / "another_8_steps.zip").touch()
    make_model().learn(40, callback=SafeCheckpointCallback(1, tmp_path, "a[b]", keep_last=keep_last))
    assert names(tmp_path) == {f"a[b]_{n}_steps.zip" for n in steps} | {"another_8_steps.zip"}


def test_the_model_and_its_statistics_are_where_sb3_looks_for_them(tmp_path):
    model = make_model()
    model.learn(16, callback=SafeCheckpointCallback(1, tmp_path))
    path = latest_checkpoint(tmp_path)
    assert path is not None
    assert_same_policy(DualClipPPO.load(path, device="cpu"), model)
    with zipfile.ZipFile(path) as archive:
        archive.extract("vecnormalize.pkl", tmp_path)
    statistics = VecNormalize.load(str(tmp_path / "vecnormalize.pkl"), DummyVecEnv([limited_walk]))
    env = model.get_vec_normalize_env()
    assert env is not None
    np.testing.assert_array_equal(statistics.obs_rms.mean, env.obs_rms.mean)


def test_the_name_is_printed(tmp_path, capsys):
    make_model().learn(8, callback=SafeCheckpointCallback(1, tmp_path, verbose=2))
    assert str(tmp_path / "rl_model_8_steps.zip") in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [{"save_freq": 0}, {"save_freq": 2.5}, {"keep_last": 0}, {"keep_last": True}])
def test_arguments_out_of_range(arguments, tmp_path):
    with pytest.raises(ValueError, match=f"{next(iter(arguments))}=.*integer of at least 1"):
        SafeCheckpointCallback(**{"save_freq": 1, "save_path": tmp_path, **arguments})


def test_inside_another_callback_it_would_never_write(tmp_path):
    callback = EveryNTimesteps(4, CallbackList([SafeCheckpointCallback(1, tmp_path)]))
    with pytest.raises(ValueError, match=r"not allowed inside EveryNTimesteps: pass it to learn\(\)"):
        make_model().learn(8, callback=callback)


def test_another_run_is_not_written_over(written):
    content = (written / "rl_model_8_steps.zip").read_bytes()
    with pytest.raises(ValueError, match=r"save_path=.*0 steps, and rl_model_8_steps.zip has more.*Resume"):
        make_model().learn(8, callback=SafeCheckpointCallback(1, written))
    assert (written / "rl_model_8_steps.zip").read_bytes() == content


# Whole or not at all.


class Killed(BaseException):
    pass


def operations(monkeypatch: pytest.MonkeyPatch, killed_at: int | None = None) -> list[tuple[str, str]]:
    """
    Record what is done to the disk, by name of the operation and of the file.

    :param killed_at: number of the operation before which the process dies, in that nothing is done any more
    """
    done: list[tuple[str, str]] = []

    def recorded(function: Any) -> Any:
        def record(target: Any, *args: Any, **kwargs: Any) -> Any:
            if killed_at is not None and len(done) >= killed_at:
                raise Killed
            path = os.readlink(f"/proc/self/fd/{target}") if isinstance(target, int) else target
            done.append((function.__name__, Path(path).name))
            return function(target, *args, **kwargs)

        return record

    for name in ("fsync", "replace", "unlink"):
        monkeypatch.setattr(os, name, recorded(getattr(os, name)))
    return done


@pytest.mark.parametrize("save", [save_checkpoint, DualClipPPO.save])
def test_on_the_disk_before_it_is_seen(save, tmp_path, monkeypatch):
    model = make_model()
    with monkeypatch.context() as context:
        done = operations(context)
        save(model, tmp_path / "x.zip")
    (synced, temporary), (replaced, source) = done[:2]
    assert (synced, replaced) == ("fsync", "replace")
    assert temporary == source != "x.zip"
    assert done[-1] == ("fsync", tmp_path.name)


def test_killed_before_any_operation(tmp_path, monkeypatch):
    killed_at, survived = 0, False
    while not survived:
        folder = tmp_path / str(killed_at)
        model = make_model()
        model.learn(16, callback=SafeCheckpointCallback(1, folder, keep_last=1))
        with monkeypatch.context() as context:
            operations(context, killed_at)
            try:
                model.learn(8, callback=SafeCheckpointCallback(1, folder, keep_last=1), reset_num_timesteps=False)
                survived = True
            except Killed:
                pass
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # a damaged file would be passed over with a warning
            assert steps_of(latest_checkpoint(folder)) in ({24} if survived else {16, 24})
        killed_at += 1
    assert killed_at > 3


@contextlib.contextmanager
def disk_full_at_once() -> Iterator[None]:
    def no_space(fd: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", no_space)
        yield


@contextlib.contextmanager
def disk_full_in_the_middle() -> Iterator[None]:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize(
    ("full_disk", "reason"), [(disk_full_at_once, "No space left"), (disk_full_in_the_middle, "File too large")]
)
def test_a_full_disk_costs_one_checkpoint(full_disk, reason, written):
    path = written / "rl_model_8_steps.zip"
    content = path.read_bytes()
    assert len(content) > 40_000
    model = resumed(path)
    with full_disk(), pytest.warns(UserWarning, match=rf"rl_model_16_steps.zip failed: .*{reason}.*Training goes on"):
        model.learn(8, callback=SafeCheckpointCallback(1, written, keep_last=1), reset_num_timesteps=False)
    assert model.num_timesteps == 16
    assert names(written) == {path.name}
    assert path.read_bytes() == content

    with full_disk(), pytest.raises(OSError, match=reason):
        save_checkpoint(model, path)
    assert names(written) == {path.name}
    assert path.read_bytes() == content

    model.learn(8, callback=SafeCheckpointCallback(1, written, keep_last=1), reset_num_timesteps=False)
    assert names(written) == {"rl_model_24_steps.zip"}


@pytest.mark.parametrize(
    ("full_disk", "reason"), [(disk_full_at_once, "No space left"), (disk_full_in_the_middle, "File too large")]
)
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_full_disk_leaves_the_model_that_was_saved(algorithm, full_disk, reason, tmp_path):
    model = small(algorithm, "MlpPolicy", make_env(), policy_kwargs={"net_arch": [64]}).learn(1)
    path = tmp_path / "model.zip"
    model.save(path)
    content = path.read_bytes()
    assert len(content) > 22_000
    model.learn(1)
    for name in ("model", "other"):
        with full_disk(), pytest.raises(OSError, match=reason):
            model.save(tmp_path / name)
        assert names(tmp_path) == {path.name}
        assert path.read_bytes() == content
    model.learn(1)
    model.save(path)
    assert_same_policy(algorithm.load(path, device="cpu"), model)


def test_a_full_disk_is_said_of_an_open_file_too():
    with pytest.raises(OSError, match="No space left"), open("/dev/full", "wb") as file:
        make_model().save(file)


def train_until_killed(folder: str) -> None:
    class Log(BaseCallback):
        """Notes the steps after each checkpoint."""

        def _on_step(self) -> bool:
            return True

        def _on_rollout_start(self) -> None:
            with Path(folder, "log").open("a") as file:
                file.write(f"{self.model.num_timesteps}\n")

    model = make_model(policy_kwargs={"net_arch": [256, 256]})  # several megabytes, of which a part may be written
    model.learn(10**9, callback=[SafeCheckpointCallback(1, folder), Log()])


def kill_at_random_moments(root: str, n_kills: int) -> None:
    """In a process that forks those it kills, so that they need not import everything anew."""
    context = multiprocessing.get_context("fork")
    make_model()  # imports what is imported late, once for all
    for seed in range(n_kills):
        folder = Path(root, str(seed))
        folder.mkdir()
        process = context.Process(target=train_until_killed, args=(str(folder),))
        process.start()
        while not list(folder.glob("*.zip")):
            assert process.is_alive()
            time.sleep(0.001)
        time.sleep(random.Random(seed).uniform(0.0, 0.2))
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL


@pytest.mark.slow
def test_sigkill_at_random_moments(tmp_path):
    n_kills = 10
    in_new_process(
        "from tests.contract.test_checkpoints import kill_at_random_moments;"
        "kill_at_random_moments(sys.argv[1], int(sys.argv[2]))",
        tmp_path,
        n_kills,
    )
    for seed in range(n_kills):
        folder = tmp_path / str(seed)
        log = folder / "log"
        logged = [int(line) for line in log.read_text().split()] if log.exists() else [0]
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # a damaged file would be passed over with a warning
            path = latest_checkpoint(folder)
        assert path is not None
        assert logged[-1] <= steps_of(path) <= logged[-1] + N_STEPS
        model = resumed(path)
        assert model.num_timesteps == steps_of(path)
        model.learn(N_STEPS, callback=SafeCheckpointCallback(1, folder), reset_num_timesteps=False)
        assert not list(folder.glob("*.tmp"))


# Files that are damaged.


def test_the_newest_is_found(tmp_path):
    assert latest_checkpoint(tmp_path / "nowhere") is None
    assert latest_checkpoint(tmp_path) is None
    make_model().learn(104, callback=SafeCheckpointCallback(48, tmp_path, keep_last=None))
    assert names(tmp_path) == {"rl_model_48_steps.zip", "rl_model_96_steps.zip", "rl_model_104_steps.zip"}
    assert latest_checkpoint(tmp_path) == tmp_path / "rl_model_104_steps.zip"
    assert latest_checkpoint(tmp_path, "model") is None


def test_a_truncated_file_is_passed_over_and_named(written):
    path = written / "rl_model_8_steps.zip"
    whole = path.read_bytes()
    truncated = written / "rl_model_16_steps.zip"
    for size in [0, 1, 100, *range(5_000, len(whole), 10_000), len(whole) - 1]:
        truncated.write_bytes(whole[:size])
        with pytest.warns(UserWarning, match=r"rl_model_16_steps.zip was skipped: .* truncated or damaged"):
            assert latest_checkpoint(written) == path
        with pytest.raises(ValueError, match=r"rl_model_16_steps.zip cannot be resumed: .* truncated or damaged"):
            resumed(truncated)


def test_a_flipped_bit_is_found(written):
    path = written / "rl_model_8_steps.zip"
    whole = path.read_bytes()
    with zipfile.ZipFile(io.BytesIO(whole)) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    flipped = written / "rl_model_16_steps.zip"
    rng = random.Random(0)
    found = 0
    for position in [*rng.sample(range(len(whole)), 100), *range(len(whole) - 600, len(whole), 2)]:
        damaged = bytearray(whole)
        damaged[position] ^= 1 << rng.randrange(8)
        flipped.write_bytes(damaged)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            latest = latest_checkpoint(written)
        if latest == path:
            assert "rl_model_16_steps.zip was skipped" in str(caught[-1].message)
            found += 1
        else:  # it was in what nothing depends on, such as the time of day
            with zipfile.ZipFile(flipped) as archive:
                for name in ("data", "policy.pth", "policy.optimizer.pth", "training_state.pkl"):
                    assert archive.read(name) == members[name]
    assert found > 150


def test_what_cannot_be_read_is_named(written):
    with pytest.raises(ValueError, match=r"nothing.zip cannot be resumed: .*No such file"):
        resumed(written / "nothing.zip")
    (written / "rl_model_9_steps.zip").mkdir()
    with pytest.warns(UserWarning, match=r"rl_model_9_steps.zip was skipped: .*directory"):
        assert latest_checkpoint(written) == written / "rl_model_8_steps.zip"


@pytest.mark.parametrize("member", ["training_state.pkl", "vecnormalize.pkl"])
def test_a_state_of_a_class_that_is_not_here_is_named(member, written):
    path = written / "rl_model_8_steps.zip"
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in {**members, member: b"cmodule_of_another_machine\nState\n."}.items():
            archive.writestr(name, content)
    read = resumed if member == "training_state.pkl" else statistics_of
    with pytest.raises(ValueError, match=f"{member} in .*rl_model_8_steps.zip cannot be read here .*another_machine"):
        read(path)


def test_training_goes_on_past_a_damaged_file(written):
    (written / "rl_model_16_steps.zip").write_bytes(b"damaged")
    (written / "rl_model_1000_steps.zip").write_bytes(b"damaged")
    model = resumed(written / "rl_model_8_steps.zip")
    model.learn(8, callback=SafeCheckpointCallback(1, written, keep_last=1), reset_num_timesteps=False)
    assert names(written) == {"rl_model_16_steps.zip", "rl_model_1000_steps.zip"}
    with pytest.warns(UserWarning, match=r"rl_model_1000_steps.zip was skipped"):
        assert latest_checkpoint(written) == written / "rl_model_16_steps.zip"


# The statistics alone.


def test_the_statistics_around_other_environments(tmp_path):
    model = make_model()
    model.learn(16)
    trained = model.get_vec_normalize_env()
    assert trained is not None
    trained.clip_obs = 2.0
    save_checkpoint(model, tmp_path / "a.zip")
    for name in ("a.zip", "a"):
        other = load_vec_normalize(tmp_path / name, DummyVecEnv([limited_walk] * 3))
        assert other is not None
        assert other.num_envs == 3
        assert other.clip_obs == 2.0
        assert other.obs_rms.count == trained.obs_rms.count > 16
        np.testing.assert_array_equal(other.obs_rms.mean, trained.obs_rms.mean)
        assert other.ret_rms.var == trained.ret_rms.var
        assert other.reset().shape == (3, 3)


def test_a_file_without_statistics_gives_none(tmp_path):
    make_model().save(tmp_path / "model")  # which SB3 does not put them into
    assert load_vec_normalize(tmp_path / "model", DummyVecEnv([limited_walk])) is None


def test_statistics_that_cannot_be_taken_are_refused(written):
    path = written / "rl_model_8_steps.zip"
    with pytest.raises(ValueError, match="normalised twice"):
        load_vec_normalize(path, make_env())
    with pytest.raises(ValueError, match=r"rl_model_8_steps.zip does not fit.*\(3,\).*\(4,\)"):
        load_vec_normalize(path, DummyVecEnv([lambda: gym.make("CartPole-v1")]))
    (written / "short.zip").write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(ValueError, match=r"short.zip has no VecNormalize that can be read"):
        load_vec_normalize(written / "short.zip", DummyVecEnv([limited_walk]))
    with pytest.raises(FileNotFoundError):
        load_vec_normalize(written / "nothing", DummyVecEnv([limited_walk]))


# Weights alone.


class Trap:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def rewritten(source: Path, target: Path, **members: bytes) -> Path:
    """A model file with other members (of which ``_`` stands for the dot in their names)."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        for name in old.namelist():
            new.writestr(name, members.get(name.replace(".", "_"), old.read(name)))
    return target


@pytest.mark.parametrize("suffix", [".zip", ""])
def test_weights_are_loaded_without_running_code(suffix, written):
    trap, source = written / "caught", make_model(seed=1)
    source.save(written / "model.zip")
    pickled = base64.b64encode(pickle.dumps(Trap(trap))).decode()
    with zipfile.ZipFile(written / "model.zip") as archive:
        data = json.loads(archive.read("data"))
    data["ep_info_buffer"] = {":type:": "deque", ":serialized:": pickled}
    rewritten(written / "model.zip", written / "evil.zip", data=json.dumps(data).encode())

    model = make_model(seed=2)
    load_weights(written / f"evil{suffix}", model.policy)
    assert_same_policy(model, source)
    assert not trap.exists()
    DualClipPPO.load(written / "evil.zip", device="cpu")
    assert trap.exists()  # the trap works


def test_weights_that_would_run_code_are_refused(written):
    trap, model, policy = written / "caught", make_model(), io.BytesIO()
    th.save({"log_std": Trap(trap)}, policy)
    path = rewritten(written / "rl_model_8_steps.zip", written / "evil.zip", policy_pth=policy.getvalue())
    with pytest.raises(ValueError, match=r"evil.zip has no weights that can be read"):
        load_weights(path, model.policy)
    assert not trap.exists()


def test_weights_of_another_algorithm(tmp_path):
    source = TRPO("MlpPolicy", make_env(), n_steps=8, batch_size=8, device="cpu")
    source.save(tmp_path / "trpo")
    model = make_model()
    load_weights(tmp_path / "trpo.zip", model.policy)
    assert_same_policy(model, source)


@pytest.mark.parametrize("net_arch", [[64, 32], [64], [64, 64, 64]])
def test_weights_that_do_not_fit_leave_the_policy_as_it_was(net_arch, written):
    model, before = make_model(policy_kwargs={"net_arch": net_arch}), io.BytesIO()
    th.save(model.policy.state_dict(), before)
    with pytest.raises(ValueError, match=r"rl_model_8_steps.zip does not fit.*mlp_extractor.policy_net"):
        load_weights(written / "rl_model_8_steps.zip", model.policy)
    after = io.BytesIO()
    th.save(model.policy.state_dict(), after)
    assert after.getvalue() == before.getvalue()


def test_weights_of_a_damaged_file_are_refused(written):
    policy = make_model().policy
    path = written / "rl_model_8_steps.zip"
    whole = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        content = archive.read("policy.pth")
    flipped = whole.replace(content, bytes([*content[:5000], content[5000] ^ 1, *content[5001:]]))
    not_weights = io.BytesIO()
    th.save([1, 2], not_weights)
    other = rewritten(path, written / "other.zip", policy_pth=not_weights.getvalue()).read_bytes()
    for damaged in (b"", whole[:-1000], flipped, other):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"rl_model_8_steps.zip has no weights that can be read"):
            load_weights(path, policy)
    with pytest.raises(FileNotFoundError, match=r"nothing.zip"):
        load_weights(written / "nothing", policy)
