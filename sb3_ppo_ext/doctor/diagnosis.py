"""Compares a run with the rules, and describes the findings in words."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

from sb3_ppo_ext.doctor.algorithms import Algorithm, algorithm_of
from sb3_ppo_ext.doctor.rules import RULES, Rule
from sb3_ppo_ext.doctor.run import Run, Series

Level = Literal["alarm", "watch"]

FEWEST_ROWS = 5
"""With fewer rows, the log says too little for a diagnosis."""


@dataclass(frozen=True)
class Finding:
    """
    A rule whose limit a run has passed.

    :param rule: the rule
    :param level: "alarm": change something; "watch": have a look
    :param limit: the limit that was passed
    :param since: environment step at which the series first passed the limit
    :param until: environment step at which it came back; None if it has not
    :param worst: the value that is furthest beyond the limit
    :param last: the present value
    :param seen: what was seen, in words
    :param first: what to change first, in the terms of the algorithm
    """

    rule: Rule
    level: Level
    limit: float
    since: int
    until: int | None
    worst: float
    last: float
    seen: str
    first: str


class Diagnosis(NamedTuple):
    """
    What the rules say about a run.

    :param run: the run
    :param algorithm: the algorithm that logged it
    :param findings: alarms first, and causes before their consequences
    :param fine: rules that had enough values to compare, and found nothing
    :param blind: rules that could not be checked without what :class:`DoctorCallback` logs
    """

    run: Run
    algorithm: Algorithm
    findings: list[Finding]
    fine: list[Rule]
    blind: list[Rule]

    def verdict(self) -> str:
        """The result in one sentence."""
        if not self.findings and self.run.n_rows < FEWEST_ROWS:
            return f"The log has only {_count(self.run.n_rows, 'row')}: too few to say anything."
        n_alarms = sum(finding.level == "alarm" for finding in self.findings)
        n_watch = len(self.findings) - n_alarms
        if n_alarms:
            also = f", and {_count(n_watch, 'thing')} to watch" if n_watch else ""
            return f"{_count(n_alarms, 'alarm')}{also}. Begin with the first."
        if n_watch:
            return f"No alarm; {_count(n_watch, 'thing')} to watch."
        return "Nothing unusual."


def diagnose(run: Run) -> Diagnosis:
    """
    :param run: the log of a training
    :return: what the rules say about it
    """
    algorithm = algorithm_of(run)
    findings: list[Finding] = []
    fine, blind = [], []
    for rule in RULES:
        series = measured(rule, run)
        if series is None:
            others = [key for key in rule.keys if not key.startswith("doctor/")]
            if rule.needs and (not others or any(key in run.series for key in others)):
                blind.append(rule)
            continue
        series = _judged(rule, series)
        if np.count_nonzero(~np.isnan(series.values)) < rule.streak:
            continue  # too few values to meet the rule
        finding = _finding(rule, series, run, algorithm)
        if finding is None:
            fine.append(rule)
        else:
            findings.append(finding)
    findings.sort(key=lambda finding: finding.level != "alarm")
    return Diagnosis(run, algorithm, findings, fine, blind)


def measured(rule: Rule, run: Run) -> Series | None:
    """What a rule measures. A log of NaN and infinity causes no warning of numpy's."""
    with np.errstate(all="ignore"):
        return rule.measure(run)


def _judged(rule: Rule, series: Series) -> Series:
    """The part of a series that is compared with the limits."""
    if rule.after_start:
        n_start = max(FEWEST_ROWS, len(series.values) // 10)
        series = Series(*(array[n_start:] for array in series))
    return series.in_parts()


def _finding(rule: Rule, series: Series, run: Run, algorithm: Algorithm) -> Finding | None:
    limits: list[tuple[Level, float | None]] = [("alarm", rule.alarm), ("watch", rule.watch)]
    for level, limit in limits:
        if limit is None:
            continue
        found = _streaks(series.values < limit if rule.below else series.values > limit, rule.streak)
        if not found:
            continue
        start, end = found[0][0], found[-1][1]
        beyond = series.values[start:end]
        worst, last = float(np.nanmin(beyond) if rule.below else np.nanmax(beyond)), float(series.values[-1])
        since = int(series.steps[start])
        until = int(series.steps[end]) if end < len(series.values) else None
        seen = _seen(rule, limit, since, until, worst, last)
        return Finding(rule, level, limit, since, until, worst, last, seen, _first(rule, run, algorithm))
    return None


def _streaks(beyond: np.ndarray, shortest: int) -> list[tuple[int, int]]:
    """Where at least ``shortest`` consecutive values are true: start and end of each slice."""
    edges = np.flatnonzero(np.diff(np.concatenate(([False], beyond, [False])).astype(np.int8)))
    return [(int(start), int(end)) for start, end in edges.reshape(-1, 2) if end - start >= shortest]


def _seen(rule: Rule, limit: float, since: int, until: int | None, worst: float, last: float) -> str:
    """What was seen, as one sentence."""
    if rule.is_flag:
        when = f"Since step {since:,}" if until is None else f"From step {since:,} to step {until:,}"
        return f"{when}: {rule.quantity[0].lower()}{rule.quantity[1:]}."
    write = percentage if rule.is_percentage else number
    beyond = f"{'below' if rule.below else 'above'} {write(limit)}"
    extreme = f"{write(worst)} at {'least' if rule.below else 'most'}"
    if until is not None:
        return (
            f"{rule.quantity} was {beyond} from step {since:,} to step {until:,}, {extreme}. It is {write(last)} now."
        )
    was = "" if write(last) == write(worst) else f", and was {extreme}"
    return f"{rule.quantity} has been {beyond} since step {since:,}. It is {write(last)} now{was}."


def _first(rule: Rule, run: Run, algorithm: Algorithm) -> str:
    """What to change first, with the present value of each argument that was logged."""
    text = rule.first.format_map(algorithm.words).strip()
    text = re.sub(r"(^|[.] )([a-z])", lambda match: match[1] + match[2].upper(), text)
    named: set[str] = set()

    def with_value(match: re.Match[str]) -> str:
        value = run.last(f"train/{match[1]}", f"doctor/{match[1]}")
        if value is None or match[1] in named:
            return match[0]
        named.add(match[1])
        return f"{match[0]} (now {number(value)})"

    return re.sub(r"`(\w+)`", with_value, text)


def number(value: float) -> str:
    """A number as a person reads it: 0.0003, 12.5, 1,234,000."""
    if not math.isfinite(value):
        return str(value)
    if 1000.0 <= abs(value) < 1e9:
        return f"{value:,.0f}"
    return f"{value:.3g}"


def percentage(share: float) -> str:
    """A share as a person reads it."""
    return f"{100.0 * share:.2g}%" if abs(share) < 1.0 else f"{100.0 * share:.0f}%"


def _count(n: int, what: str) -> str:
    return f"{n} {what}" if n == 1 else f"{n} {what}s"


def in_words(diagnosis: Diagnosis) -> Sequence[str]:
    """The lines of a report."""
    run, algorithm = diagnosis.run, diagnosis.algorithm
    lines = [f"{run.name}: {algorithm.name}, {run.n_steps:,} steps. {diagnosis.verdict()}"]
    for finding in diagnosis.findings:
        lines += ["", *finding_in_words(finding)]
    if diagnosis.blind:
        lacking = dict.fromkeys(key.partition("/")[2] for rule in diagnosis.blind for key in rule.needs)
        lines += ["", f"Some rules need keys that this log lacks: {', '.join(lacking)}. DoctorCallback logs them."]
    return lines


def finding_in_words(finding: Finding) -> list[str]:
    """The lines of one finding."""
    return [
        f"{finding.level.upper()}  {finding.rule.title}",
        f"  seen    {finding.seen}",
        f"  means   {finding.rule.meaning}",
        f"  change  {finding.first}",
    ]
