"""Names of processes that a study can keep, by which others find out whether a process is still running."""

import os
import socket
from pathlib import Path

_GONE = "gone"


def process_name(pid: int) -> str:
    """
    :param pid: of a process on this machine
    :return: ``host:pid:start``, which no other process ever has
    """
    return f"{socket.gethostname()}:{pid}:{_start_time(pid)}"


def is_local(name: str) -> bool:
    """Whether the process of this name was started on this machine."""
    return name.split(":")[0] == socket.gethostname()


def is_alive(name: str) -> bool:
    """Whether the process of this name, which must be one of this machine, is running."""
    _, pid, start = name.split(":")
    return start == _start_time(int(pid)) != _GONE


def _start_time(pid: int) -> str:
    """
    :return: when the process was started, in the system's own units, and empty where the system does not tell; or
        "gone" if there is no such process
    """
    if os.name != "posix":
        return ""
    if not Path("/proc/self/stat").exists():
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return _GONE
        except PermissionError:
            pass
        return ""
    try:
        state, *numbers = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return _GONE
    return _GONE if state in "ZX" else numbers[18]
