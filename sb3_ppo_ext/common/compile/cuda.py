"""Programs that are recorded as CUDA graphs."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch as th

from sb3_ppo_ext.common.compile import Run


class Recording:
    """
    A CUDA graph of a program.

    :param run: the program
    :param inputs: inputs with which it is recorded
    :param n_fixed: the program may write into the first ``n_fixed`` inputs
    :param n_bound: the first ``n_bound`` inputs stay in their memory; the others are copied at each call
    """

    def __init__(self, run: Run, inputs: list[th.Tensor], n_fixed: int, n_bound: int) -> None:
        self._run = run  # keeps tensors alive that the recording uses
        self._n_bound = n_bound
        self._places = [leaf.clone() for leaf in inputs[n_bound:]]
        inputs = [*inputs[:n_bound], *self._places]
        before = [leaf.clone() for leaf in inputs[:n_fixed]]
        try:
            self._outputs, self._replay = _recorded(run, inputs)
        finally:
            copied(inputs[:n_fixed], before)  # undo what recording has written

    def __call__(self, inputs: list[th.Tensor]) -> list[th.Tensor]:
        copied(self._places, inputs[self._n_bound :])
        self._replay()
        return [output.clone() for output in self._outputs]


def can_record(device: th.device) -> bool:
    return device.type == "cuda"


def _recorded(run: Run, inputs: list[th.Tensor]) -> tuple[list[th.Tensor], Callable[[], None]]:
    """
    Run a program some times, then record it.

    :param run: the program
    :param inputs: tensors that it reads and writes, now and in each replay
    :return: the tensors into which each replay writes its results, and the function that replays it
    """
    with th.cuda.device(inputs[0].device):
        stream = th.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(th.cuda.current_stream())
        with th.cuda.stream(stream):  # the set-up in the first runs cannot be recorded
            for _ in range(3):
                run(inputs)
        th.cuda.current_stream().wait_stream(stream)
        graph = th.cuda.CUDAGraph()
        with th.cuda.graph(graph, capture_error_mode="thread_local"):
            outputs = run(inputs)
    return list(outputs), graph.replay


@th.no_grad()
def copied(places: list[th.Tensor], tensors: Sequence[th.Tensor]) -> list[th.Tensor]:
    """Copy the tensors into the places, and return the places."""
    for place, tensor in zip(places, tensors, strict=True):
        if place is not tensor:
            place.copy_(tensor)
    return places
