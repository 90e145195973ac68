"""Machine code for the CPU, which runs without Python and is cached on the disk for later runs."""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import sys
import tempfile
import zipfile
from pathlib import Path

import torch as th
from torch import fx

from sb3_ppo_ext.common.compile import Run
from sb3_ppo_ext.common.torch_internals import compile_ahead_of_time, compiler_cache_folder, load_compiled

# The compiler computes an intermediate result anew in each loop that needs it, unless that takes more reads of memory
# than this (by default, more than four). Masked logits take three, of which that of the bool mask is slow.
_OPTIONS = {"realize_reads_threshold": 2}


def machine_code(graph: fx.GraphModule, inputs: list[th.Tensor]) -> Run:
    """
    Compile a graph for the CPU, or load it if it was compiled before.

    :param graph: the operations
    :param inputs: example inputs
    """
    path = cache_path(graph, inputs)
    if not _is_whole(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            unfinished = Path(folder) / path.name
            compile_ahead_of_time(graph, inputs, unfinished, _OPTIONS)
            os.replace(unfinished, path)
    return load_compiled(path)


def cache_path(graph: fx.GraphModule, inputs: list[th.Tensor]) -> Path:
    """The file in which the machine code of a graph is cached."""
    return compiler_cache_folder() / "sb3_ppo_ext" / f"{_fingerprint(graph, inputs)}.pt2"


def compiler() -> str:
    """The C++ compiler that torch calls."""
    return os.environ.get("CXX") or {"darwin": "clang++", "win32": "cl"}.get(sys.platform, "g++")


def _is_whole(path: Path) -> bool:
    try:
        with zipfile.ZipFile(path) as package:
            return package.testzip() is None
    except (OSError, zipfile.BadZipFile):
        return False


def _fingerprint(graph: fx.GraphModule, inputs: list[th.Tensor]) -> str:
    """A hash of everything that the machine code depends on."""
    layouts = [(tensor.dtype, tensor.shape, tensor.stride()) for tensor in inputs]
    cpu = Path("/proc/cpuinfo")
    flags = (
        next((line for line in cpu.read_text().splitlines() if line.startswith(("flags", "Features"))), "")
        if cpu.exists()
        else ""
    )
    by = os.path.realpath(shutil.which(compiler()) or "")
    of_machine = (th.__version__, by, platform.platform(), platform.processor(), flags, th.get_num_threads())
    return hashlib.sha256(repr((graph.code, layouts, _OPTIONS, of_machine)).encode()).hexdigest()
