"""What the runs say of each hypothesis of ``results/staleness/hypotheses.md``."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np

from benchmarks.learning import statistics
from benchmarks.learning.conditions import Condition
from benchmarks.learning.results import Floats
from benchmarks.learning.statistics import Interval
from benchmarks.staleness.__main__ import LAGS, RESULTS, REUSED
from benchmarks.staleness.results import Pair, Runs, Study, comparable, logged, matrix

HOW_DECIDED = """\
Each is answered from the tasks on which all that it compares have three runs or more. A claim that something is better,
worse, rarer or of more effect holds where its interval leaves out no difference; one of "at least", and one with a
number of its own, where the estimate says so. P(a > b) is the probability that a run of a ends above one of b on the
same task. Intervals of three runs are narrower than they should be: what they leave out is a first impression, and no
finding."""


class Answer(NamedTuple):
    """
    :param numbers: that decide it
    :param claims: what it says, and whether that is so
    """

    numbers: str
    claims: dict[str, bool]

    @property
    def outcome(self) -> str:
        """In words; of several claims, also which are not so."""
        wrong = [claim for claim, is_so in self.claims.items() if not is_so]
        if not wrong:
            return "**holds**"
        return "**does not hold**" + (f": not {', not '.join(wrong)}" if len(self.claims) > 1 else "")


class NotEnoughRunsError(Exception):
    """There is no task on which all that is compared have runs enough."""


class Evidence:
    """
    :param study: the runs that are there
    :param n_resamples: of the bootstraps
    """

    def __init__(self, study: Study, n_resamples: int) -> None:
        self._study, self._n_resamples = study, n_resamples

    def means(self, pairs: Sequence[Pair], *names: str) -> tuple[list[Interval], str]:
        """
        :param pairs: that are compared
        :param names: what the updates measured: of each pair one, or one of all
        :return: the mean of each over runs and tasks, and in words how many these are
        """
        estimates, said = [], ""
        for i, name in enumerate(names if len(names) > 1 else names * len(pairs)):
            samples, said = self._samples(pairs, logged(name))
            estimates.append(self._estimate(lambda sample: sample.mean(axis=(0, 1)), samples[i]))
        return estimates, said

    def improvement(self, pair: Pair, on: Pair) -> tuple[Interval, str]:
        """
        :param pair: that may be better
        :param on: than this
        :return: the probability of improvement, and in words that with the IQMs
        """
        samples, said = self._samples((pair, on), lambda runs: runs.scores)
        probability = statistics.probability_of_improvement(samples[0], samples[1], self._n_resamples).number
        iqms = [statistics.iqm(sample, self._n_resamples).number for sample in samples]
        return probability, f"{probability:.2f}; IQM {iqms[0]:.2f} and {iqms[1]:.2f} ({said})"

    def gain_of_improvement(self, arm: str, condition: Condition, to: Condition) -> tuple[Interval, str]:
        """
        :param arm: that is compared with PPO
        :param condition: in which it may be better
        :param to: in which it may be so by more
        :return: by how much the probability of improvement grows, and in words that
        """
        pairs = [Pair(c, of) for c in (to, condition) for of in (arm, "ppo")]
        samples, said = self._samples(pairs, lambda runs: runs.scores)

        def difference(a: Floats, b: Floats, c: Floats, d: Floats) -> Floats:
            return np.asarray(statistics.share_above(a, b) - statistics.share_above(c, d))

        gain = self._estimate(difference, *samples)
        after, before = (statistics.share_above(*samples[i : i + 2]).item() for i in (0, 2))
        return gain, f"from {before:.2f} to {after:.2f}, by {gain:.2f} ({said})"

    def collapse(self, pair: Pair, than: Pair) -> tuple[Interval, str]:
        """
        :param pair: that may collapse less often
        :param than: this
        :return: the difference of the rates, and in words both
        """
        samples, said = self._samples((pair, than), lambda runs: runs.collapsed)
        difference = self._estimate(lambda a, b: np.array([a.mean() - b.mean()]), *samples)
        rates = f"{samples[0].mean():.0%} and {samples[1].mean():.0%}"
        return difference, f"{rates}, difference {difference:.2f} ({said})"

    def _samples(self, pairs: Sequence[Pair], what: Callable[[Runs], Floats]) -> tuple[list[Floats], str]:
        """Of each pair a line a run and a column a task; and how many these are."""
        envs = comparable(self._study, pairs)
        if not envs:
            raise NotEnoughRunsError
        samples = [matrix(self._study[pair], envs, what) for pair in pairs]
        counts = sorted({len(sample) for sample in samples})
        of_each = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
        return samples, f"{len(envs)} task{'s' * (len(envs) > 1)}, {of_each} runs of each"

    def _estimate(self, statistic: Callable[..., Floats], *samples: Floats) -> Interval:
        return statistics.estimate(statistic, *samples, n_resamples=self._n_resamples).number


FRESH, OLD, REUSE_7 = Condition(), Condition(lag=16), Condition(reuse=7)
_SHARE, _GRADIENT = "end_cut_share_3", "end_cut_gradient_3"


def _activation_on_fresh_data(evidence: Evidence) -> Answer:
    (share, gradient), said = evidence.means([Pair(FRESH, "ppo")] * 2, _SHARE, _GRADIENT)
    numbers = f"PPO: {share:.2g} of the samples, {gradient:.2g} of the gradient's norm ({said})"
    return Answer(numbers, {"below 1 in 10,000": share.point < 1e-4, "below 1 % of the norm": gradient.point < 0.01})


def _activation_with_lag(evidence: Evidence) -> Answer:
    pairs = [Pair(Condition(lag=lag), "ppo") for lag in LAGS]
    shares, said = evidence.means(pairs, _SHARE)
    gradients, _ = evidence.means(pairs, _GRADIENT)
    share, gradient = _points(shares), _points(gradients)
    faster = gradient[-1] * share[1] > gradient[1] * share[-1]  # from lag 1 on, as with lag 0 there may be none
    numbers = f"PPO, lags {_listed(LAGS)}: {_listed(shares)} of the samples, {_listed(gradients)} of the norm ({said})"
    return Answer(numbers, {**_grows(share), "faster of the norm": faster})


def _activation_with_reuse(evidence: Evidence) -> Answer:
    shares, said = evidence.means([Pair(Condition(reuse=k), "ppo") for k in REUSED], _SHARE)
    numbers = f"PPO, K = {_listed(REUSED)}: {_listed(shares)} of the samples ({said})"
    return Answer(numbers, _grows(_points(shares)))


def _grows(share: list[float]) -> dict[str, bool]:
    return {"growing at each step": bool((np.diff(share) > 0.0).all()), "above 1 in 1,000": share[-1] > 1e-3}


def _no_effect(evidence: Evidence, condition: Condition) -> Answer:
    probability, said = evidence.improvement(Pair(condition, "dual_clip_3"), Pair(condition, "ppo"))
    return Answer(f"P(c = 3 > PPO) {said}", {"no effect": probability.low <= 0.5 <= probability.high})


def _improves(evidence: Evidence, pair: Pair, on: Pair, names: str) -> Answer:
    probability, said = evidence.improvement(pair, on)
    return Answer(f"P({names}) {said}", {"better": probability.low > 0.5})


def _at_least(evidence: Evidence, pair: Pair, on: Pair, names: str) -> Answer:
    probability, said = evidence.improvement(pair, on)
    return Answer(f"P({names}) {said}", {"at least as good": probability.point >= 0.5})


def _worse(evidence: Evidence, pair: Pair, than: Pair, names: str) -> Answer:
    probability, said = evidence.improvement(pair, than)
    return Answer(f"P({names}) {said}", {"worse": probability.high < 0.5})


def _lower_c(evidence: Evidence) -> Answer:
    pairs = [Pair(OLD, "dual_clip_1.5"), Pair(OLD, "dual_clip_3")]
    shares, _ = evidence.means(pairs, "end_cut_share_1.5", _SHARE)
    low, high = _points(shares)
    as_good = _at_least(evidence, pairs[0], pairs[1], "c = 1.5 > c = 3")
    numbers = f"{low:.2g} and {high:.2g} of the samples; {as_good.numbers}"
    return Answer(numbers, {"ten times as many": low >= 10 * high, **as_good.claims})


def _without_clipping_of_the_norm(evidence: Evidence) -> Answer:
    gain, said = evidence.gain_of_improvement("dual_clip_3", OLD, OLD._replace(check="no_gradient_clipping"))
    return Answer(f"P(c = 3 > PPO) {said}", {"larger": gain.low > 0.0})


def _collapse(evidence: Evidence) -> Answer:
    difference, said = evidence.collapse(Pair(OLD, "dual_clip_3"), Pair(OLD, "ppo"))
    return Answer(f"c = 3 and PPO: {said}", {"rarer": difference.high < 0.0})


def _larger_steps(evidence: Evidence) -> Answer:
    larger = OLD._replace(check="learning_rate_x3")
    shares, _ = evidence.means([Pair(OLD, "ppo"), Pair(larger, "ppo")], _SHARE)
    gain, said = evidence.gain_of_improvement("dual_clip_3", OLD, larger)
    usual, with_larger = _points(shares)
    numbers = f"PPO: {usual:.2g} and {with_larger:.2g} of the samples; P(c = 3 > PPO) {said}"
    return Answer(numbers, {"twice as many": with_larger >= 2 * usual, "of more effect": gain.low > 0.0})


ANSWERS: dict[int, Callable[[Evidence], Answer]] = {
    1: _activation_on_fresh_data,
    2: _activation_with_lag,
    3: partial(_no_effect, condition=FRESH),
    4: partial(_improves, pair=Pair(OLD, "dual_clip_3"), on=Pair(OLD, "ppo"), names="c = 3 > PPO"),
    5: _lower_c,
    6: partial(_at_least, pair=Pair(OLD, "target_kl"), on=Pair(OLD, "dual_clip_3"), names="target_kl > c = 3"),
    7: partial(_worse, pair=Pair(OLD, "truncated"), than=Pair(OLD, "dual_clip_3"), names="truncated > c = 3"),
    8: _without_clipping_of_the_norm,
    9: _collapse,
    10: _activation_with_reuse,
    11: partial(_no_effect, condition=REUSE_7),
    12: partial(_improves, pair=Pair(Condition(reuse=3), "ppo"), on=Pair(FRESH, "ppo"), names="K = 3 > K = 0"),
    13: partial(_improves, pair=Pair(OLD, "decoupled"), on=Pair(OLD, "dual_clip_3"), names="decoupled > c = 3"),
    14: partial(_at_least, pair=Pair(REUSE_7, "decoupled"), on=Pair(REUSE_7, "ppo"), names="decoupled > PPO"),
    15: _larger_steps,
}


def hypotheses() -> dict[int, str]:
    """Their names by their numbers, as the page has them that is older than the runs."""
    text = (RESULTS / "hypotheses.md").read_text()
    return {int(number): name for number, name in re.findall(r"^(\d+)\. \*\*(.+?)\.?\*\*", text, re.MULTILINE)}


def answers(study: Study, n_resamples: int) -> list[list[str]]:
    """
    :param study: the runs that are there
    :param n_resamples: of the bootstraps
    :return: of each hypothesis its name, the numbers that decide it, and the outcome
    """
    evidence = Evidence(study, n_resamples)
    rows = []
    for number, name in hypotheses().items():
        try:
            answer = ANSWERS[number](evidence)
            rows.append([f"{number}. {name}", answer.numbers, answer.outcome])
        except NotEnoughRunsError:
            rows.append([f"{number}. {name}", "-", "not enough runs"])
    return rows


def _points(intervals: Sequence[Interval]) -> list[float]:
    return [interval.point for interval in intervals]


def _listed(values: Sequence[int] | Sequence[Interval]) -> str:
    return ", ".join(str(value) if isinstance(value, int) else f"{value:.2g}" for value in values)
