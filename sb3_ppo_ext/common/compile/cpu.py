"""Machine code for the CPU, without any Python around it, kept for later runs."""

from __future__ import annotations

import hashlib
import os
import platform
import tempfile
import zipfile
from pathlib import Path

import torch as th
from torch import fx

from sb3_ppo_ext.common.compile.run import Run


def machine_code(graph: fx.GraphModule, inputs: list[th.Tensor], varies: list[bool]) -> Run:
    """
    Compile a graph for the CPU, or take it from what was compiled before.

    :param graph: its operations
    :param inputs: an example of them
    :param varies: those that may have any number of rows
    """
    path = place_of(graph, inputs, varies)
    if _is_whole(path):
        return _loaded(path)
    any_rows = tuple({0: th.export.Dim.DYNAMIC} if v else None for v in varies)
    program = th.export.export(graph, tuple(inputs), dynamic_shapes=any_rows, strict=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        package = th._inductor.aoti_compile_and_package(program, package_path=str(Path(folder) / path.name))
        os.replace(package, path)
    return _loaded(path)


def place_of(graph: fx.GraphModule, inputs: list[th.Tensor], varies: list[bool]) -> Path:
    """Where the machine code of a graph is kept."""
    return _cache_folder() / "sb3_ppo_ext" / f"{_fingerprint(graph, inputs, varies)}.pt2"


def _is_whole(path: Path) -> bool:
    try:
        with zipfile.ZipFile(path) as package:
            return package.testzip() is None
    except (OSError, zipfile.BadZipFile):
        return False


def _loaded(path: Path) -> Run:
    package = th._inductor.aoti_load_package(str(path), run_single_threaded=True)
    run: Run = package.loader.run  # calling the package itself takes twice as long as a small network
    return run


def _cache_folder() -> Path:
    """Where torch keeps what it has compiled."""
    return Path(th._inductor.runtime.cache_dir_utils.cache_dir())


def _fingerprint(graph: fx.GraphModule, inputs: list[th.Tensor], varies: list[bool]) -> str:
    """Of all that the machine code depends on."""
    forms = [
        (tensor.dtype, tensor.shape[1:] if v else tensor.shape, tensor.stride(), v)
        for tensor, v in zip(inputs, varies, strict=True)
    ]
    cpu = Path("/proc/cpuinfo")
    flags = (
        next((line for line in cpu.read_text().splitlines() if line.startswith(("flags", "Features"))), "")
        if cpu.exists()
        else ""
    )
    of_machine = (th.__version__, platform.platform(), platform.processor(), flags, th.get_num_threads())
    return hashlib.sha256(repr((graph.code, forms, of_machine)).encode()).hexdigest()
