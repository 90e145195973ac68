"""How all figures look, and how they are written."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from sb3_ppo_ext.common.errors import ArgumentError
from sb3_ppo_ext.common.saving.files import write_whole

# Of the palette that Okabe and Ito made for all kinds of colour vision. What has another colour also has another dash
# or marker, for print in black and white.
BLACK, GREY = "#000000", "#7F7F7F"
BLUE, VERMILLION, GREEN, PURPLE = "#0072B2", "#D55E00", "#009E73", "#CC79A7"

SETTINGS: Any = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],  # which comes with matplotlib, so that a figure is the same everywhere
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
    "svg.hashsalt": "sb3_ppo_ext",  # the same names in the file each time
}
"""For all that is drawn: ``@matplotlib.rc_context(SETTINGS)``. The settings of the user come back afterwards."""

WIDTH = 7.0
"""Of a figure, in inches: a page's, and 700 pixels at 100 dots an inch."""

_METADATA: dict[str, dict[str, Any]] = {"png": {"Software": None}, "svg": {"Date": None}, "pdf": {"CreationDate": None}}


def kind_of(path: str | os.PathLike[str]) -> str:
    """
    :param path: of a file that a figure is to be written to
    :return: "png", "svg" or "pdf"
    :raises ArgumentError: if it ends in something else
    """
    kind = Path(path).suffix.removeprefix(".").lower()
    if kind not in _METADATA:
        raise ArgumentError(f"path={os.fspath(path)!r} is not allowed: it must end in .png, .svg or .pdf")
    return kind


@matplotlib.rc_context(SETTINGS)
def save(figure: Figure, path: str | os.PathLike[str]) -> None:
    """
    Write a figure, whole or not at all.

    :param figure: to be written
    :param path: of the file, which ends in .svg or .pdf for lines that stay sharp, or in .png
    :raises ValueError: if it ends in something else
    """
    kind = kind_of(path)
    file = io.BytesIO()
    figure.savefig(file, format=kind, dpi=200, metadata=_METADATA[kind])
    write_whole(Path(path), file.getbuffer())
