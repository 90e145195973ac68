"""Messages about a compilation, for users who wait for it."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator


@contextlib.contextmanager
def announced(what: str, announce: bool) -> Iterator[None]:
    """
    :param what: name of what the ``with`` block compiles
    :param announce: whether to print a message, and how long it took
    """
    if announce:
        _say(f"Compiling {what}, for this run and later ones; this may take up to a minute")
    start = time.perf_counter()
    yield
    if announce:
        _say(f"Compiled {what} in {time.perf_counter() - start:.1f} seconds")


def is_bar_shown() -> bool:
    """Whether there is a progress bar. Then a message explains why it stands still, even with ``verbose=0``."""
    tqdm = sys.modules.get("tqdm")
    return tqdm is not None and len(getattr(tqdm.tqdm, "_instances", ())) > 0


def _say(text: str) -> None:
    """Print a line, above a progress bar if there is one."""
    if is_bar_shown():
        sys.modules["tqdm"].tqdm.write(text)
    else:
        print(text, flush=True)
