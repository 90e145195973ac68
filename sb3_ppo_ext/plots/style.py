"""The style of all figures, and how they are written to files."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from sb3_ppo_ext.common.errors import ArgumentError
from sb3_ppo_ext.common.saving.files import write_whole

# From the palette by Okabe and Ito for all kinds of colour vision. Lines of different colours also have different
# dashes or markers, for print in black and white.
BLACK, GREY = "#000000", "#7F7F7F"
BLUE, VERMILLION, GREEN, PURPLE = "#0072B2", "#D55E00", "#009E73", "#CC79A7"

SETTINGS: Any = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],  # comes with matplotlib, so that a figure looks the same everywhere
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.labelsize": 9,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "legend.fontsize": 8.5,
    "legend.frameon": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.alpha": 0.25,
    "lines.linewidth": 1.8,
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
    "svg.hashsalt": "sb3_ppo_ext",  # so that a file has the same ids each time
}
"""Settings for ``@matplotlib.rc_context(SETTINGS)``, which restores those of the user afterwards."""

WIDTH = 7.0
"""Width of a figure in inches: that of a page, and 700 pixels at 100 dots per inch."""

_METADATA: dict[str, dict[str, Any]] = {"png": {"Software": None}, "svg": {"Date": None}, "pdf": {"CreationDate": None}}


def kind_of(path: str | os.PathLike[str]) -> str:
    """
    :param path: file for a figure
    :return: "png", "svg" or "pdf"
    :raises ArgumentError: if the path has another ending
    """
    kind = Path(path).suffix.removeprefix(".").lower()
    if kind not in _METADATA:
        raise ArgumentError(f"path={os.fspath(path)!r} is not allowed: it must end in .png, .svg or .pdf")
    return kind


@matplotlib.rc_context(SETTINGS)
def save(figure: Figure, path: str | os.PathLike[str]) -> None:
    """
    Write a figure to a file, completely or not at all.

    :param figure: the figure
    :param path: path of the file; it ends in .svg or .pdf (for vector graphics) or in .png
    :raises ValueError: if the path has another ending
    """
    kind = kind_of(path)
    file = io.BytesIO()
    figure.savefig(file, format=kind, dpi=200, metadata=_METADATA[kind])
    write_whole(Path(path), file.getbuffer())
