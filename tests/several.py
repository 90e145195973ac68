"""
Several processes, with the environment variables that torchrun gives them. To import torch and Stable-Baselines3 takes
longer than most of what they do: one process does it, and all of them are forked from that, before it has any threads.
"""

from __future__ import annotations

import importlib
import os
import socket
import subprocess
import sys
import traceback
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]


class Ended(NamedTuple):
    """
    How a process has ended.

    :param status: 0 if without an error
    :param said: what it has written
    """

    status: int
    said: str


def run(module: str, folder: Path, scenarios: dict[str, int], timeout: float = 600.0) -> dict[str, list[Ended]]:
    """
    :param module: that has a ``main(scenario, folder)``
    :param folder: for it to write into
    :param scenarios: the number of processes of each
    :param timeout: seconds; that they have not ended by then is an error
    :return: how the processes of each scenario have ended
    """
    arguments = [f"{name}={n}" for name, n in scenarios.items()]
    subprocess.run(
        [sys.executable, "-m", "tests.several", module, str(folder), *arguments],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=timeout,
        check=True,
    )
    return {
        name: [
            Ended(int((folder / f"{name}.{rank}.status").read_text()), (folder / f"{name}.{rank}.said").read_text())
            for rank in range(n)
        ]
        for name, n in scenarios.items()
    }


def _fork(module: str, folder: Path, scenario: str, rank: int, variables: dict[str, str]) -> int:
    child = os.fork()
    if child:
        return child
    os.environ.update(variables, RANK=str(rank))
    file = os.open(folder / f"{scenario}.{rank}.said", os.O_CREAT | os.O_WRONLY)
    os.dup2(file, 1)
    os.dup2(file, 2)
    status = 1
    try:
        importlib.import_module(module).main(scenario, folder)
        status = 0
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    os._exit(status)


def _main(module: str, folder: Path, scenarios: dict[str, int]) -> None:
    import torch as th

    th.set_num_threads(1)
    for name in (module, "sb3_ppo_ext.common.update.process_group", "torch._dynamo"):  # what each would import
        importlib.import_module(name)
    for scenario, n in scenarios.items():
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        variables = {"WORLD_SIZE": str(n), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        children = [_fork(module, folder, scenario, rank, variables) for rank in range(n)]
        for rank, child in enumerate(children):
            _, status = os.waitpid(child, 0)
            (folder / f"{scenario}.{rank}.status").write_text(str(os.waitstatus_to_exitcode(status)))


if __name__ == "__main__":
    _main(sys.argv[1], Path(sys.argv[2]), {name: int(n) for name, n in (pair.split("=") for pair in sys.argv[3:])})
