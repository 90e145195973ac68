"""The log of a training."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

N_PARTS = 50
"""A longer series is judged and drawn by the medians of this many parts."""

STEP = "time/total_timesteps"


class Series(NamedTuple):
    """
    The values that were logged under one key.

    :param steps: environment step of each row
    :param values: value in each row
    """

    steps: np.ndarray
    values: np.ndarray

    def in_parts(self) -> Series:
        """At most :data:`N_PARTS` medians of consecutive rows, each with the first of their steps."""
        if len(self.values) <= N_PARTS:
            return self
        steps, values = (np.array_split(array, N_PARTS) for array in self)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # a part with NaN alone
            medians = [np.nanmedian(part) for part in values]
        return Series(np.array([part[0] for part in steps]), np.array(medians))


@dataclass(frozen=True)
class Run:
    """
    The log of a training.

    :param name: name of the run
    :param series: series by their keys
    """

    name: str
    series: Mapping[str, Series]

    @property
    def n_rows(self) -> int:
        """Number of rows of the longest series."""
        return max((len(series.steps) for series in self.series.values()), default=0)

    @property
    def n_steps(self) -> int:
        """Environment steps until the last row."""
        return max((int(series.steps[-1]) for series in self.series.values()), default=0)

    def last(self, *keys: str) -> float | None:
        """The last value of the first of these keys that the log has; None if it has none of them."""
        return next((float(self.series[key].values[-1]) for key in keys if key in self.series), None)


def run_of_rows(name: str, rows: Iterable[tuple[int, Mapping[str, Any]]]) -> Run:
    """
    :param name: name of the run
    :param rows: rows with their steps, and values by their keys; values that are not numbers are left out
    :return: the run. Where the steps of a series go back, a training has begun again or gone on from a checkpoint: the
        rows beyond that step, which came before, are left out
    """
    columns: dict[str, list[tuple[int, float]]] = {}
    for step, row in rows:
        for key, value in row.items():
            if isinstance(value, (int, float, np.number)):
                columns.setdefault(key, []).append((step, float(value)))
    series = {}
    for key, column in columns.items():
        kept: list[tuple[int, float]] = []
        for row_of_key in column:
            while kept and kept[-1][0] > row_of_key[0]:
                kept.pop()
            kept.append(row_of_key)
        steps, values = zip(*kept, strict=True)
        series[key] = Series(np.array(steps), np.array(values))
    return Run(name, series)
