"""Python in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def in_new_process(code: str, *arguments: object) -> None:
    """
    :param code: a line of Python, in which ``sys`` is imported
    :param arguments: in its ``sys.argv``
    """
    subprocess.run(
        [sys.executable, "-c", f"import sys, torch; torch.set_num_threads(1); {code}", *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=200,
        check=True,
    )
