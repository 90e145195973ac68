"""Keep freed memory for reuse, where thousands of environments make tensors of megabytes."""

from __future__ import annotations

import ctypes
import os
import sys

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of mallopt(3)
_SETTINGS = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TOP_PAD_", "GLIBC_TUNABLES")


def keep_freed_memory() -> None:
    """
    Let the C library keep the memory of freed tensors, for the whole process. By default it returns this memory to the
    system and requests it again in each minibatch, which for tensors of a few megabytes costs more than computing them.
    Only on Linux with glibc, and not if the user has set one of its environment variables (mallopt(3)).
    """
    if not sys.platform.startswith("linux") or any(name in os.environ for name in _SETTINGS):
        return
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):  # another C library
        return
    mallopt(_M_MMAP_THRESHOLD, 32 * 2**20)  # the most that all versions take
    mallopt(_M_TRIM_THRESHOLD, 2**30)
