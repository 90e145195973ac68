"""What a run is made on: the processor, its memory, the versions of the packages, the commit."""

from __future__ import annotations

import contextlib
import importlib.metadata
import platform
import re
import resource
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

MAXRSS_PER_MIB = 2**20 if sys.platform == "darwin" else 2**10


def processor() -> str:
    """The processor's name."""
    with contextlib.suppress(OSError, IndexError):
        return str(re.findall(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)[0])
    return platform.processor() or platform.machine()


def peak_mib() -> float:
    """The most memory that this process has had so far, in MiB."""
    with contextlib.suppress(OSError, IndexError):
        # getrusage's maximum begins, on Linux, with the memory that the parent had.
        status = Path("/proc/self/status").read_text()
        return int(re.findall(r"^VmHWM:\s*(\d+) kB", status, re.MULTILINE)[0]) / 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / MAXRSS_PER_MIB


def reset_peak() -> None:
    """Let the most memory of this process be what it has now, where the kernel can forget (Linux)."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def versions(packages: Iterable[str]) -> dict[str, str]:
    """:param packages: whose versions are wanted; those that are not installed are left out"""
    found = {"python": platform.python_version()}
    for package in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def commit(folder: Path) -> str:
    """:param folder: a checkout; elsewhere the commit is "unknown" """
    if (folder / ".git").exists():  # or it would be that of a repository around the folder
        with contextlib.suppress(OSError, subprocess.CalledProcessError):
            describe = ["git", "describe", "--always", "--dirty=, with changes"]
            return subprocess.run(describe, cwd=folder, capture_output=True, text=True, check=True).stdout.strip()
    return "unknown"
