"""CUDA graphs."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch as th

from sb3_ppo_ext.common.compile import Run


class Recording:
    """
    A CUDA graph of a program.

    :param run: the program
    :param inputs: to record it with
    :param n_fixed: how many of these, the first, it may write into
    :param n_bound: how many stay where they are; the others are copied at each call
    """

    def __init__(self, run: Run, inputs: list[th.Tensor], n_fixed: int, n_bound: int) -> None:
        self._run = run  # and with it what only the recording would not keep
        self._n_bound = n_bound
        self._places = [leaf.clone() for leaf in inputs[n_bound:]]
        inputs = [*inputs[:n_bound], *self._places]
        before = [leaf.clone() for leaf in inputs[:n_fixed]]
        try:
            self._outputs, self._replay = _recorded(run, inputs)
        finally:
            copied(inputs[:n_fixed], before)  # the program was run, for its own sake

    def __call__(self, inputs: list[th.Tensor]) -> list[th.Tensor]:
        copied(self._places, inputs[self._n_bound :])
        self._replay()
        return [output.clone() for output in self._outputs]


def can_record(device: th.device) -> bool:
    return device.type == "cuda"


def _recorded(run: Run, inputs: list[th.Tensor]) -> tuple[list[th.Tensor], Callable[[], None]]:
    """
    Run a program some times, and record one.

    :param run: the program
    :param inputs: that it reads and writes, then and in each replay
    :return: what each replay writes its results into, and what replays it
    """
    with th.cuda.device(inputs[0].device):
        stream = th.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(th.cuda.current_stream())
        with th.cuda.stream(stream):  # what is set up at the first runs cannot be recorded
            for _ in range(3):
                run(inputs)
        th.cuda.current_stream().wait_stream(stream)
        graph = th.cuda.CUDAGraph()
        with th.cuda.graph(graph, capture_error_mode="thread_local"):
            outputs = run(inputs)
    return list(outputs), graph.replay


@th.no_grad()
def copied(places: list[th.Tensor], tensors: Sequence[th.Tensor]) -> list[th.Tensor]:
    """The places, holding what the tensors hold."""
    for place, tensor in zip(places, tensors, strict=True):
        if place is not tensor:
            place.copy_(tensor)
    return places
