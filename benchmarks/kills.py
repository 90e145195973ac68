"""
Kill one of two processes that train one model, at random moments, and let them go on from the latest checkpoint.

    python -m benchmarks.kills --times 20
    python -m benchmarks.kills --times 3 --torchrun

Each time one of them gets SIGKILL. Then the other must end within 30 seconds, in words, and every checkpoint must be
whole. Both are started again, by this script or, with ``--torchrun``, by ``torchrun --max-restarts``. At last they
complete the training. What is not as it must be ends the script with an error.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

_RANKS = range(2)
_IN_TRAINING = 0.8  # so many are killed after a checkpoint of their own, the others while they begin
_LATEST_END = 30.0  # seconds after the kill
_EACH = 2 * 8 * 64  # steps of a rollout of both


def train(folder: Path, n_steps: int) -> None:
    """
    What each process does: train, or go on from the latest checkpoint.

    :param folder: of the checkpoints
    :param n_steps: in all
    """
    import torch as th
    from stable_baselines3.common.env_util import make_vec_env

    from sb3_ppo_ext import DualClipPPO, SafeCheckpointCallback, latest_checkpoint, resume

    th.set_num_threads(1)
    if "TORCHELASTIC_RESTART_COUNT" not in os.environ:
        # Before they have met, only torchrun can tell a process that another has ended.
        th.distributed.init_process_group("gloo")
    (folder / f"{os.environ['RANK']}.pid").write_text(str(os.getpid()))
    env, path = make_vec_env("CartPole-v1", 8), latest_checkpoint(folder)
    if path is None:
        model = DualClipPPO("MlpPolicy", env, n_steps=64, batch_size=64, n_epochs=4, device="cpu")
    else:
        model = resume(DualClipPPO, path, env, device="cpu")
    checkpoints = SafeCheckpointCallback(64, folder)
    model.learn(n_steps - model.num_timesteps, callback=checkpoints, reset_num_timesteps=False)
    (folder / f"{os.environ['RANK']}.done").write_text(str(model.num_timesteps))


@contextlib.contextmanager
def started(folder: Path, n_steps: int, times: int, *, by_torchrun: bool) -> Iterator[list[subprocess.Popen[str]]]:
    """
    The two processes, or torchrun with them.

    :param folder: of the checkpoints
    :param n_steps: of the training
    :param times: that torchrun is to start them again
    :param by_torchrun: whether it is to start them
    """
    for file in folder.glob("*.pid"):
        file.unlink()
    script = ["-m", "benchmarks.kills", "--train", str(folder), str(n_steps)]
    if by_torchrun:
        script = ["-m", "torch.distributed.run", "--nproc-per-node=2", f"--max-restarts={times}", *script]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        of_group = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    processes = [
        subprocess.Popen(
            [sys.executable, *script],
            env={**os.environ, "OMP_NUM_THREADS": "1", **({} if by_torchrun else {**of_group, "RANK": str(rank)})},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in (_RANKS[:1] if by_torchrun else _RANKS)
    ]
    try:
        yield processes
    finally:
        for process in processes:
            process.terminate()  # torchrun ends its processes then
        for process in processes:
            process.wait()


def kill_one(folder: Path, generator: random.Random) -> tuple[int, float, int]:
    """
    :param folder: where the processes tell their numbers
    :param generator: of the moment and of who is killed
    :return: who was; seconds until the other had ended; the number of checkpoints there
    """
    files = [folder / f"{rank}.pid" for rank in _RANKS]
    while not all(file.exists() and file.read_text() for file in files):
        time.sleep(0.05)
    numbers = [int(file.read_text()) for file in files]
    if generator.random() < _IN_TRAINING:
        before = set(folder.glob("*.zip"))
        while not set(folder.glob("*.zip")) - before:
            time.sleep(0.05)
    time.sleep(generator.uniform(0.0, 2.0))
    rank = generator.choice(_RANKS)
    for file in files:
        file.unlink()  # whoever is started again tells it anew
    os.kill(numbers[rank], signal.SIGKILL)
    start = time.monotonic()
    while _is_there(numbers[1 - rank]):
        if time.monotonic() - start > _LATEST_END:
            sys.exit(f"process {1 - rank} has not ended {_LATEST_END:.0f} seconds after the other was killed")
        time.sleep(0.02)
    return rank, time.monotonic() - start, _n_whole(folder)


def _is_there(number: int) -> bool:
    try:
        return Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def _n_whole(folder: Path) -> int:
    from sb3_ppo_ext import DualClipPPO

    paths = sorted(folder.glob("*.zip"))
    for path in paths:
        if DualClipPPO.load(path, device="cpu").num_timesteps % _EACH:
            sys.exit(f"{path.name} is of the middle of a rollout")
    return len(paths)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=20, help="how often one is killed")
    parser.add_argument("--torchrun", action="store_true", help="let torchrun start them again")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--train", nargs=2, metavar=("FOLDER", "STEPS"), help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.train:
        train(Path(args.train[0]), int(args.train[1]))
        return
    generator = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        folder, endless = Path(name), 10**9
        for i in range(args.times):
            if i == 0 or not args.torchrun:
                running = stack.enter_context(started(folder, endless, args.times, by_torchrun=args.torchrun))
            rank, seconds, n_checkpoints = kill_one(folder, generator)
            said = "" if args.torchrun else running[1 - rank].communicate()[1].strip().splitlines()[-1]
            print(
                f"{i + 1}: process {rank} killed; the other ended after {seconds:.1f} s; {n_checkpoints} checkpoint(s)"
            )
            if not args.torchrun:
                print(f"   it said: {said}", flush=True)
        if args.torchrun:
            while not all((folder / f"{rank}.pid").exists() for rank in _RANKS):
                time.sleep(0.1)
            print("torchrun has started them again after each")
            return
        n_steps = max((int(p.stem.split("_")[-2]) for p in folder.glob("*.zip")), default=0) + 4 * _EACH
        with started(folder, n_steps, 0, by_torchrun=False) as running:
            statuses = [process.wait(timeout=600) for process in running]
        if any(statuses) or {(folder / f"{rank}.done").read_text() for rank in _RANKS} != {str(n_steps)}:
            sys.exit(f"the training was not completed: {statuses}")
        print(f"They completed {n_steps:,} steps")


if __name__ == "__main__":
    main()
