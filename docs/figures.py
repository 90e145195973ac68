"""Draws the figures of the pages: ``.venv/bin/python docs/figures.py``."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

from matplotlib.figure import Figure

from sb3_ppo_ext import plots

FIGURES: dict[str, Callable[[], Figure]] = {
    "objectives": plots.surrogate_figure,
    "cases": plots.cases_figure,
    "dual_clip": lambda: plots.surrogate_figure(["clipped", "dual_clip"]),
    "kl_penalty": lambda: plots.surrogate_figure("kl_penalized"),
    "trust_region": plots.trust_region_figure,
}
"""By the names of their files in ``docs/_static``."""


def main(folder: Path) -> None:
    """
    :param folder: for the files
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name, figure in FIGURES.items():
        plots.save(figure(), folder / f"{name}.svg")


if __name__ == "__main__":
    main(
        Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "_static"
    )
