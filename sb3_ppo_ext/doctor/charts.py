"""Line charts as SVG elements of a page."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from typing import NamedTuple

import numpy as np

from sb3_ppo_ext.doctor.run import Series

_WIDTH, _HEIGHT = 360, 170
_LEFT, _RIGHT, _TOP, _BOTTOM = 50, 10, 10, 24
_LARGEST = 1e300  # of the values that are drawn; larger ones, and their differences, overflow


class Limit(NamedTuple):
    """
    A horizontal line across a chart.

    :param value: its height
    :param level: "watch" or "alarm", which decides its colour
    """

    value: float
    level: str


def chart(
    series: Series, label: str, limits: Sequence[Limit] = (), since: int | None = None, until: int | None = None
) -> str:
    """
    :param series: series to draw, with gaps where it is not finite or beyond 1e300
    :param label: text for screen readers
    :param limits: lines across the chart
    :param since: step at which the marked background begins; None for no mark
    :param until: step at which the marked background ends; None for the end of the chart
    :return: an SVG element
    """
    steps, values = series.in_parts()
    values = np.where(np.abs(values) <= _LARGEST, values, np.nan)
    finite = values[np.isfinite(values)]
    if not len(finite):
        return ""
    shown = np.concatenate((finite, [limit.value for limit in limits]))
    is_log = bool(shown.min() >= 1.0 / _LARGEST and shown.max() > 1000.0 * shown.min())
    low, high = _range(np.log10(shown) if is_log else shown)
    first, last = float(steps[0]), float(max(steps[-1], steps[0] + 1))

    def x(step: float) -> float:
        return _LEFT + (min(max(step, first), last) - first) / (last - first) * (_WIDTH - _LEFT - _RIGHT)

    def y(value: float) -> float:
        height = math.log10(value) if is_log else value
        return _HEIGHT - _BOTTOM - (height - low) / (high - low) * (_HEIGHT - _TOP - _BOTTOM)

    parts = [f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(label)}">']
    if since is not None:
        left, right = x(since), x(last if until is None else until)
        parts.append(
            f'<rect class="ill" x="{left:.1f}" y="{_TOP}" width="{max(right - left, 1.0):.1f}" '
            f'height="{_HEIGHT - _TOP - _BOTTOM}"/>'
        )
    for tick in _ticks(low, high, is_log):
        level = y(tick)
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{level:.1f}" y2="{level:.1f}"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{level + 4:.1f}" text-anchor="end">{_short(tick)}</text>')
    for step, anchor in ((first, "start"), ((first + last) / 2, "middle"), (last, "end")):
        parts.append(f'<text x="{x(step):.1f}" y="{_HEIGHT - 6}" text-anchor="{anchor}">{_short(step)}</text>')
    for limit in limits:
        level = y(limit.value)
        parts.append(
            f'<line class="{limit.level}" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{level:.1f}" y2="{level:.1f}"/>'
        )
    for points in _pieces(
        [(x(step), y(value)) if math.isfinite(value) else None for step, value in zip(steps, values, strict=True)]
    ):
        if len(points) == 1:
            parts.append(f'<circle class="dot" cx="{points[0][0]:.1f}" cy="{points[0][1]:.1f}" r="2"/>')
        else:
            parts.append(f'<polyline class="line" points="{" ".join(f"{a:.1f},{b:.1f}" for a, b in points)}"/>')
    return "".join([*parts, "</svg>"])


def _range(shown: np.ndarray) -> tuple[float, float]:
    """The range of the vertical axis, with a margin."""
    low, high = float(shown.min()), float(shown.max())
    margin = 0.06 * (high - low) or 0.5 * max(abs(high), 1e-6)
    return low - margin, high + margin


def _ticks(low: float, high: float, is_log: bool) -> list[float]:
    """Round values between two bounds. For a logarithmic axis, the bounds are exponents and the values powers of 10."""
    if is_log:
        every = max(1, round((high - low) / 4))
        return [10.0**exponent for exponent in range(math.ceil(low), math.floor(high) + 1, every)]
    raw = (high - low) / 4
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= raw)
    return [round(i * step / power, 6) * power for i in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _short(value: float) -> str:
    """A number in few characters: 0.02, 50k, 1.2M, 1e12."""
    if value != 0.0 and not 1e-3 <= abs(value) < 1e9:
        return f"{value:.0e}".replace("e-0", "e-").replace("e+0", "e").replace("e+", "e")
    for size, suffix in ((1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{suffix}"
    return f"{value:.3g}"


def _pieces(points: Sequence[tuple[float, float] | None]) -> list[list[tuple[float, float]]]:
    """Split points at the gaps."""
    pieces: list[list[tuple[float, float]]] = [[]]
    for point in points:
        if point is not None:
            pieces[-1].append(point)
        elif pieces[-1]:
            pieces.append([])
    return [piece for piece in pieces if piece]
