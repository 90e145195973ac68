"""Names of processes that a study can store, and that tell whether a process is still running."""

import os
import socket
from pathlib import Path

_GONE = "gone"


def process_name(pid: int) -> str:
    """
    :param pid: id of a process on this machine
    :return: ``host:pid:start``, which is unique even if the system reuses the id
    """
    return f"{socket.gethostname()}:{pid}:{_start_time(pid)}"


def is_local(name: str) -> bool:
    """Whether the process with this name was started on this machine."""
    return name.split(":")[0] == socket.gethostname()


def is_alive(name: str) -> bool:
    """Whether the process with this name, which must be local, is running."""
    _, pid, start = name.split(":")
    return start == _start_time(int(pid)) != _GONE


def _start_time(pid: int) -> str:
    """
    :return: start time of the process in the system's units, empty where the system does not provide it, or "gone" if
        there is no such process
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
