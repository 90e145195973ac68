"""What all tests share."""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
from typing import Any

import pytest
import torch as th
from torch import fx

from sb3_ppo_ext.common.compile import Run, cpu
from sb3_ppo_ext.common.compile.program import Program

th.set_num_threads(1)  # small networks run fastest on one thread, and sums then always add in one order


def pytest_configure(config: pytest.Config) -> None:
    """
    What processes inherit, pytest-xdist's workers and the programs that tests run.

    A folder for what is compiled, one a run: no run rests on an earlier one. One for the logger, which SB3 makes anew
    for each training otherwise. And Ctrl-C, which some tests send: a shell that runs pytest in the background has it
    ignored.
    """
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    # A wrapper that is compiled without optimisation is compiled in less time; kernels are optimised as ever.
    os.environ.setdefault("AOT_INDUCTOR_COMPILE_WRAPPER_OPT_LEVEL", "O0")
    if "PYTEST_XDIST_WORKER" not in os.environ:
        folder = tempfile.mkdtemp(prefix="sb3-ppo-ext-tests-")
        config.add_cleanup(lambda: shutil.rmtree(folder, ignore_errors=True))
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", f"{folder}/compiled")
        os.environ["SB3_LOGDIR"] = f"{folder}/logs"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if th.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(autouse=True)
def gpu_for_its_tests_alone(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there is a GPU, ``device="auto"`` means it; the other tests are about the CPU."""
    if "gpu" not in request.keywords and th.cuda.is_available():
        monkeypatch.setattr(th.cuda, "is_available", lambda: False)


class RunAsTraced:
    """In place of :func:`cpu.machine_code`, which cannot be copied either."""

    def __init__(self, graph: fx.GraphModule, inputs: list[th.Tensor]) -> None:
        self._graph = graph
        self._layouts = [(x.dtype, x.stride(), x.shape) for x in inputs]

    @th.no_grad()
    def __call__(self, inputs: list[th.Tensor]) -> list[th.Tensor]:
        assert self._layouts == [(x.dtype, x.stride(), x.shape) for x in inputs]
        return list(self._graph(*inputs))

    def __reduce__(self) -> tuple[Any, ...]:
        raise TypeError("machine code is not copied")


@pytest.fixture
def without_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """
    Programs run as they were traced, one operation after the other, in the layouts only that machine code would be for.

    For what does not depend on the machine code: to make it takes seconds a program.
    """
    monkeypatch.setattr(cpu, "machine_code", RunAsTraced)


@pytest.fixture
def programs(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the programs that are compiled, as it happens."""
    made: list[str] = []
    built = Program._built

    def noted(self: Program, *args: Any) -> Run:
        made.append(self._what)
        return built(self, *args)

    monkeypatch.setattr(Program, "_built", noted)
    return made
