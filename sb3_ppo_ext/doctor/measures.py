"""The series that rules compare with their limits, computed from the log; None where the log lacks what they need."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from sb3_ppo_ext.doctor.run import Run, Series

Measure = Callable[[Run], Series | None]

WINDOW = 10  # updates over which failures are counted
FOR_SLOPE = 10  # fewest rows for a slope
_EPISODES = 10  # fewest episodes whose equal returns mean something
FIRST = 5  # rows that count as the beginning
# Bounds of AdaptiveKLPPO's coefficient where they were not logged: its defaults.
KL_COEF_MIN, KL_COEF_MAX = 1e-4, 1e4


def logged(*keys: str) -> Measure:
    """The logged series of the first of these keys that the log has."""
    return lambda run: next((run.series[key] for key in keys if key in run.series), None)


def _aligned(run: Run, *keys: str) -> tuple[np.ndarray, ...] | None:
    """Steps at which all of these keys were logged, and their values; None if there are no such steps."""
    if any(key not in run.series for key in keys):
        return None
    columns = [dict(zip(*run.series[key], strict=True)) for key in keys]
    steps = [step for step in columns[0] if all(step in column for column in columns)]
    if not steps:
        return None
    return np.array(steps), *(np.array([column[step] for step in steps]) for column in columns)


def until_learnt(measure: Measure, at_least: float = np.nan) -> Measure:
    """
    Relax a measure where the task is learnt: where the mean return is well above its beginning and near its best.
    Returns then hardly vary, so that values divided by their spread say nothing, and a policy may be nearly
    deterministic.

    :param measure: the measure
    :param at_least: lower bound of the measure where the task is learnt; by default, the measure is NaN there, which is
        beyond no limit
    :return: the relaxed measure
    """

    def until(run: Run) -> Series | None:
        found, returns = measure(run), logged("rollout/ep_rew_mean")(run)
        if found is None or returns is None:
            return found
        gain, first = returns.values - returns.values[0], abs(returns.values[0])
        best = np.fmax.accumulate(gain)
        is_learnt = (best > 0.0) & (best >= 0.5 * first) & (gain >= 0.8 * best)
        row = np.searchsorted(returns.steps, found.steps, side="right") - 1
        is_learnt = (row >= 0) & is_learnt[row]
        return Series(found.steps, np.where(is_learnt, np.maximum(found.values, at_least), found.values))

    return until


def not_finite(run: Run) -> Series | None:
    """1 where a loss, a statistic or a return is NaN or infinite, else 0."""
    # The explained variance is NaN where returns do not vary, the success rate before an episode has ended.
    exempt = ("train/explained_variance", "rollout/success_rate")
    checked = [run.series[key] for key in run.series if key.startswith(("train/", "rollout/")) and key not in exempt]
    if not checked:
        return None
    steps, row = np.unique(np.concatenate([series.steps for series in checked]), return_inverse=True)
    flags = np.zeros(len(steps))
    np.maximum.at(flags, row, ~np.isfinite(np.concatenate([series.values for series in checked])))
    return Series(steps, flags)


def kl(run: Run) -> Series | None:
    """The KL divergence of an update, where no target was logged to compare it with."""
    if "train/target_kl" in run.series:
        return None
    return logged("train/approx_kl", "train/kl", "train/kl_divergence_loss")(run)


def kl_over_target(run: Run) -> Series | None:
    """The exact KL divergence of an update as a multiple of its target."""
    found = _aligned(run, "train/kl", "train/target_kl")
    return None if found is None else Series(found[0], found[1] / found[2])


def _entropy(run: Run) -> Series | None:
    """The entropy of policies with discrete actions. With Box actions it may be below 0, and `train/std` is logged."""
    if "train/entropy_loss" not in run.series or "train/std" in run.series:
        return None
    steps, values = run.series["train/entropy_loss"]
    return Series(steps, -values)


def entropy_left(run: Run) -> Series | None:
    """The entropy as a share of the largest so far."""
    entropy = _entropy(run)
    if entropy is None:
        return None
    largest = np.maximum.accumulate(entropy.values)
    return Series(entropy.steps, np.divide(entropy.values, largest, out=np.ones_like(largest), where=largest > 0.0))


def entropy_slope(run: Run) -> Series | None:
    """
    How far the entropy has fallen: the fall of a straight line fitted to the rows so far, as a share of the first
    entropy; the largest value so far. NaN for the first rows, which are too few for a slope.
    """
    entropy = _entropy(run)
    if entropy is None or entropy.values[0] <= 0.0:
        return None
    row, y = np.arange(1, len(entropy.values) + 1), entropy.values
    mean_x, mean_y = (row + 1) / 2, np.cumsum(y) / row
    covariance = np.cumsum(row * y) / row - mean_x * mean_y
    variance = (row * row - 1) / 12
    slope = np.divide(covariance, variance, out=np.zeros_like(variance), where=variance > 0.0)
    lost = np.where(row < FOR_SLOPE, np.nan, -slope * (row - 1) / y[0])
    return Series(entropy.steps, np.fmax.accumulate(lost))


def std_growth(run: Run) -> Series | None:
    """The standard deviation of Box actions as a multiple of the first."""
    found = logged("train/std")(run)
    return None if found is None or found.values[0] <= 0.0 else Series(found.steps, found.values / found.values[0])


def best_explained_variance(run: Run) -> Series | None:
    """
    The largest explained variance so far. NaN where the critic's loss has halved since the beginning (medians of five
    rows): such a critic is still learning the scale of the returns, before their variation.
    """
    found = logged("train/explained_variance")(run)
    if found is None:
        return None
    best = Series(found.steps, np.fmax.accumulate(found.values))
    aligned = _aligned(run, "train/explained_variance", "train/value_loss")
    if aligned is None or len(aligned[0]) != len(found.steps):
        return best
    losses = aligned[2]
    padded = np.pad(losses, (FIRST - 1, 0), mode="edge")
    medians = np.median(np.lib.stride_tricks.sliding_window_view(padded, FIRST), axis=1)
    return Series(best.steps, np.where(medians < 0.5 * np.median(losses[:FIRST]), np.nan, best.values))


def no_explained_variance(run: Run) -> Series | None:
    """1 where the returns of a rollout do not vary, so that there is nothing to explain, else 0."""
    found = logged("train/explained_variance")(run)
    return None if found is None else Series(found.steps, np.isnan(found.values).astype(float))


def critic_error(run: Run) -> Series | None:
    """The error of the critic: the root of its mean squared error."""
    found = logged("train/value_loss")(run)
    return None if found is None else Series(found.steps, np.sqrt(np.abs(found.values)))


def advantage_bias(run: Run) -> Series | None:
    """The distance of the advantages' mean from 0, in their standard deviations."""
    found = _aligned(run, "doctor/advantage_mean", "doctor/advantage_std")
    if found is None:
        return None
    steps, mean, std = found
    return Series(steps, np.abs(mean) / np.maximum(std, 1e-12))


def advantage_skew(run: Run) -> Series | None:
    """The absolute skewness of the advantages."""
    found = logged("doctor/advantage_skew")(run)
    return None if found is None else Series(found.steps, np.abs(found.values))


def gradient_over_limit(run: Run) -> Series | None:
    """The mean norm of the gradients before clipping, as a multiple of ``max_grad_norm``."""
    limit = run.last("doctor/max_grad_norm")
    found = logged("train/grad_norm")(run)
    return None if found is None or not limit else Series(found.steps, found.values / limit)


def line_search_failures(run: Run) -> Series | None:
    """The share of failed line searches among the last ten. NaN for the first rows."""
    found = logged("train/is_line_search_success")(run)
    if found is None:
        return None
    shares = np.full(len(found.values), np.nan)
    if len(shares) >= WINDOW:
        shares[WINDOW - 1 :] = np.convolve(1.0 - found.values, np.ones(WINDOW), mode="valid") / WINDOW
    return Series(found.steps, shares)


def at_bound(run: Run) -> Series | None:
    """2 where the coefficient of the KL penalty is at its upper bound, 1 where it is at its lower bound, else 0."""
    found = logged("train/kl_coef")(run)
    if found is None:
        return None
    low, high = run.last("doctor/kl_coef_min"), run.last("doctor/kl_coef_max")
    low, high = KL_COEF_MIN if low is None else low, KL_COEF_MAX if high is None else high
    return Series(found.steps, np.select([found.values >= high, found.values <= low], [2.0, 1.0], 0.0))


def _horizon(run: Run) -> tuple[float, Series] | None:
    """The horizon of gamma, 1 / (1 - gamma) steps, and the mean lengths of episodes."""
    gamma = run.last("doctor/gamma")
    lengths = logged("rollout/ep_len_mean")(run)
    if gamma is None or lengths is None:
        return None
    return (np.inf if gamma >= 1.0 else 1.0 / (1.0 - gamma)), lengths


def horizon_steps(run: Run) -> Series | None:
    """The horizon of gamma in steps; infinite where it is at least half an episode."""
    found = _horizon(run)
    if found is None:
        return None
    horizon, (steps, lengths) = found
    return Series(steps, np.where(lengths > 2.0 * horizon, horizon, np.inf))


def horizon_share(run: Run) -> Series | None:
    """The horizon of gamma as a share of an episode's length."""
    found = _horizon(run)
    if found is None:
        return None
    horizon, (steps, lengths) = found
    return Series(steps, horizon / np.maximum(lengths, 1.0))


def unchanged_returns(run: Run) -> Series | None:
    """1 while all episodes since the beginning have had the same return, after at least ten of them; else 0."""
    found = _aligned(run, "rollout/ep_rew_mean", "rollout/ep_len_mean")
    if found is None:
        return None
    steps, returns, lengths = found
    same = np.abs(returns - returns[0]) <= 1e-6 * max(1.0, abs(returns[0]))
    n_episodes = (steps - steps[0]) / np.maximum(lengths, 1.0)
    return Series(steps, (np.logical_and.accumulate(same) & (n_episodes >= _EPISODES)).astype(float))


def speed(run: Run) -> Series | None:
    """Steps per second since the beginning, as a share of the best value so far. NaN for the first rows."""
    found = logged("time/fps")(run)
    if found is None:
        return None
    values = np.where(np.arange(len(found.values)) < FIRST, np.nan, found.values)
    return Series(found.steps, values / np.maximum(np.fmax.accumulate(values), 1e-12))
