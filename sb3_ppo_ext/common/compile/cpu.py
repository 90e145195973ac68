"""Machine code for the CPU, which runs without Python and is cached on the disk for later runs."""

from __future__ import annotations

import functools
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


@functools.cache
def is_mkl_slow() -> bool:
    """
    Whether torch's matrix products take twice the time they could. They are MKL's, which uses the wide registers of
    Intel's processors only (AVX-512); oneDNN, which torch has too, uses those of all.
    """
    by_line = _processor()
    is_intel = "GenuineIntel" in by_line.get("vendor_id", "")
    has_both = th.backends.mkl.is_available() and th.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    return has_both and not is_intel and "avx512f" in by_line.get("flags", "").split()


def _processor() -> dict[str, str]:
    """What Linux says about the processor; empty elsewhere."""
    path = Path("/proc/cpuinfo")
    text = path.read_text() if path.exists() else ""
    of_first = text.partition("\n\n")[0].splitlines()
    return {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in of_first)}


def _is_whole(path: Path) -> bool:
    try:
        with zipfile.ZipFile(path) as package:
            return package.testzip() is None
    except (OSError, zipfile.BadZipFile):
        return False


def _fingerprint(graph: fx.GraphModule, inputs: list[th.Tensor]) -> str:
    """A hash of everything that the machine code depends on."""
    layouts = [(tensor.dtype, tensor.shape, tensor.stride()) for tensor in inputs]
    processor = _processor()
    flags = processor.get("flags", processor.get("Features", ""))
    by = os.path.realpath(shutil.which(compiler()) or "")
    of_machine = (th.__version__, by, platform.platform(), platform.processor(), flags, th.get_num_threads())
    return hashlib.sha256(repr((graph.code, layouts, _OPTIONS, of_machine)).encode()).hexdigest()
