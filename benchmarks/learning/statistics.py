"""Estimates with 95 % stratified-bootstrap intervals, by rliable (Agarwal et al. 2021, arXiv 2108.13264)."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from rliable import library, metrics

from benchmarks.learning.results import Floats

N_RESAMPLES = 2000
# Of fewer runs a bootstrap says nothing.
MIN_RUNS = 3

METRICS: dict[str, Callable[[Floats], float]] = {
    "IQM": metrics.aggregate_iqm,
    "median": metrics.aggregate_median,
    "mean": metrics.aggregate_mean,
    "optimality gap": metrics.aggregate_optimality_gap,
}


class Interval(NamedTuple):
    """
    An estimate of one number; as text it has its interval behind it, if it has one.

    :param point: the estimate
    :param low: lower end of the interval; NaN where there are fewer than :data:`MIN_RUNS` runs
    :param high: upper end
    """

    point: float
    low: float
    high: float

    def __format__(self, form: str) -> str:
        if np.isnan(self.low):
            return format(self.point, form)
        return f"{self.point:{form}} [{self.low:{form}}, {self.high:{form}}]"


class Estimate(NamedTuple):
    """
    :param point: the estimate
    :param low: lower end of the interval; NaN where there are fewer than :data:`MIN_RUNS` runs
    :param high: upper end
    """

    point: Floats
    low: Floats
    high: Floats

    @property
    def numbers(self) -> list[Interval]:
        """One by one."""
        return [Interval(*map(float, of_one)) for of_one in zip(*map(np.ravel, self), strict=True)]

    @property
    def number(self) -> Interval:
        """Of an estimate of one number."""
        (of_one,) = self.numbers
        return of_one


def estimate(statistic: Callable[..., Floats], *samples: Floats, n_resamples: int = N_RESAMPLES) -> Estimate:
    """
    :param statistic: of the samples, an array of one dimension
    :param samples: arrays with a line for each run and a column for each task; each is resampled by itself
    :param n_resamples: of the bootstrap
    """
    point = np.asarray(statistic(*samples))
    if min(len(sample) for sample in samples) < MIN_RUNS:
        nothing = np.full_like(point, np.nan)
        return Estimate(point, nothing, nothing)
    np.random.seed(0)  # noqa: NPY002  # rliable draws from numpy's global generator, whatever random_state it is given
    _, intervals = library.get_interval_estimates(
        {"": samples[0] if len(samples) == 1 else list(samples)}, statistic, reps=n_resamples
    )
    return Estimate(point, *intervals[""])


def iqm_curve(returns: Floats, n_resamples: int = N_RESAMPLES) -> Estimate:
    """
    :param returns: a line for each run and a column for each evaluation
    :param n_resamples: of the bootstrap
    :return: the interquartile mean at each evaluation
    """
    return estimate(lambda sample: _iqm(sample[:, 0]), returns[:, None], n_resamples=n_resamples)


def _iqm(sample: Floats) -> Floats:
    """
    The interquartile mean of each column, as :func:`rliable.metrics.aggregate_iqm` has it of all numbers, in a tenth of
    the time.
    """
    n_cut = len(sample) // 4
    return np.asarray(np.sort(sample, axis=0)[n_cut : len(sample) - n_cut].mean(axis=0))


def mean(sample: Floats, n_resamples: int = N_RESAMPLES) -> Estimate:
    """
    :param sample: a number for each run
    :param n_resamples: of the bootstrap
    """
    return estimate(lambda numbers: numbers.mean(axis=0), sample[:, None], n_resamples=n_resamples)


def iqm(scores: Floats, n_resamples: int = N_RESAMPLES) -> Estimate:
    """
    :param scores: a line for each run and a column for each task
    :param n_resamples: of the bootstrap
    :return: the interquartile mean of all
    """
    return estimate(lambda sample: _iqm(sample.reshape(-1, 1)), scores, n_resamples=n_resamples)


def aggregates(scores: Floats, n_resamples: int = N_RESAMPLES) -> dict[str, Estimate]:
    """
    :param scores: a line for each run and a column for each task
    :param n_resamples: of the bootstrap
    :return: the estimates of :data:`METRICS`
    """
    all_of_them = estimate(
        lambda sample: np.array([metric(sample) for metric in METRICS.values()]), scores, n_resamples=n_resamples
    )
    return {name: Estimate(*(part[i] for part in all_of_them)) for i, name in enumerate(METRICS)}


def profile(scores: Floats, thresholds: Floats, n_resamples: int = N_RESAMPLES) -> Estimate:
    """
    :param scores: a line for each run and a column for each task
    :param thresholds: of the score
    :param n_resamples: of the bootstrap
    :return: the share of runs above each threshold
    """
    return estimate(lambda sample: (sample[:, :, None] > thresholds).mean(axis=(0, 1)), scores, n_resamples=n_resamples)


def probability_of_improvement(ours: Floats, peer: Floats, n_resamples: int = N_RESAMPLES) -> Estimate:
    """
    :param ours: scores, a line for each run and a column for each task
    :param peer: likewise, of the same tasks
    :param n_resamples: of the bootstrap
    :return: how probable it is that a run of ours is above one of the peer on the same task; a tie counts one half
    """
    return estimate(share_above, ours, peer, n_resamples=n_resamples)


def share_above(ours: Floats, peer: Floats) -> Floats:
    """
    What :func:`rliable.metrics.probability_of_improvement` returns, in a hundredth of the time.

    :param ours: scores, a line for each run and a column for each task
    :param peer: likewise, of the same tasks
    """
    difference = ours[:, None] - peer[None]
    return np.array([(0.5 * (np.sign(difference) + 1.0)).mean()])
