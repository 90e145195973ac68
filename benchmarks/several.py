"""Several processes that train one model, as one side; and a model of how that goes on with more of them."""

from __future__ import annotations

import os
import socket
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

from benchmarks.cases import Settings, Side, Workload
from benchmarks.measuring import Measured, Worker
from benchmarks.tasks import Training, Turn

_N_MESSAGES = 400
_NUMBERS_OF_PROCESSES = (2, 8, 64, 512)


class OneOfSeveral(Training):
    """
    The part of one process.

    :param model: that it trains with the others
    :param n_samples: in the rollouts of a turn, of all processes
    :param actions: file with those that the environment is stepped with
    :param followers: the other processes, if this is the first
    """

    def __init__(self, model: Any, n_samples: int, actions: Path, followers: list[Worker]) -> None:
        super().__init__(model, n_samples, actions, "cpu", lambda: None)
        self._followers = followers

    def turn(self) -> Turn:
        """Iterations of all processes; the steps are those of all."""
        return cast(Turn, self._together("turn", super().turn))

    def messages(self) -> dict[str, float]:
        """What a sum over the processes takes, in seconds, of one number and of as many as there are parameters."""
        return cast(dict[str, float], self._together("messages", self._messages))

    def _together(self, what: str, part: Callable[[], Any]) -> Any:
        for follower in self._followers:
            follower.tell(what)
        result = part()
        for follower in self._followers:
            follower.answer()
        return result

    def _messages(self) -> dict[str, float]:
        import torch as th
        import torch.distributed as dist

        model: Any = self.model
        group = model._reducer
        n_parameters = sum(parameter.numel() for parameter in self.model.policy.parameters())
        return {
            f"{way} {what}": _median_seconds(sum_up, th.zeros(n))
            for what, n in (("number", 1), ("gradient", n_parameters))
            for way, sum_up in (("shared memory", group.summed), ("gloo", dist.all_reduce))
        } | {"gradient bytes": 4.0 * n_parameters}


def _median_seconds(function: Callable[[Any], object], argument: Any) -> float:
    seconds = []
    for _ in range(_N_MESSAGES):
        start = time.perf_counter()
        function(argument)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def followers(side: Side, workload: Workload, settings: Settings, actions: Path) -> list[Worker]:
    """
    The other processes, if this is not one of them: their environment variables are those that torchrun gives.

    :param side: that all of them are
    :param workload: of each
    :param settings: of the run
    :param actions: not looked at
    """
    if "RANK" in os.environ:
        return []
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    os.environ |= {"WORLD_SIZE": str(side.n_processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    workers = []
    for rank in range(1, side.n_processes):
        os.environ["RANK"] = str(rank)
        workers.append(Worker(side, settings, Path(os.environ["TMPDIR"]) / f"rank-{rank}"))
        workers[-1].ask("make", side, workload, settings, actions)
    os.environ["RANK"] = "0"
    return workers


def model_on_paper(side: Side, workload: Workload, one: Measured, several: Measured) -> Iterator[list[str]]:
    """
    What a step of the environments would take with more processes, each on a core of its own, from measured parts.

    The messages of a gradient step are exchanged by shared memory on one machine, where each process adds up those of
    all; and by gloo over many, in a ring of 2 (N - 1) hops, of which each takes half of what a message of one number
    takes two processes, and 2 (N - 1) / N of the gradient goes through each.

    :param side: of several processes
    :param workload: of each process
    :param one: measured of one process
    :param several: of ``side``
    :return: rows of a table
    """
    parts = several.messages
    if not parts or not one.turns or not several.turns:
        return
    n_samples = workload.n_envs * workload.n_steps
    n_gradients = workload.n_epochs * -(-n_samples // workload.batch_size)
    alone = one.per_step() * n_samples
    of_two = several.per_step() * n_samples * side.n_processes
    by_shared_memory = parts["shared memory gradient"]
    rest = max(of_two - alone - n_gradients * by_shared_memory, 0.0)
    by_each = (by_shared_memory - parts["shared memory number"]) / side.n_processes
    hop = parts["gloo number"] / 2
    for_bytes = parts["gloo gradient"] - parts["gloo number"]
    for n in _NUMBERS_OF_PROCESSES:
        messages = {
            "shared memory": parts["shared memory number"] + n * by_each,
            "gloo": 2 * (n - 1) * hop + 2 * (n - 1) / n * for_bytes,
        }
        iterations = {way: alone + rest + n_gradients * seconds for way, seconds in messages.items()}
        yield [
            str(side),
            workload.env,
            str(n),
            *(
                cell
                for way in messages
                for cell in (f"{messages[way] * 1e6:,.0f}", f"{n * alone / iterations[way]:,.1f}")
            ),
        ]
