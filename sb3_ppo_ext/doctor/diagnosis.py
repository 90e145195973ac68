"""Compares a run with the rules, and describes the findings in words."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

from sb3_ppo_ext.doctor import measures
from sb3_ppo_ext.doctor.algorithms import LARGE_RETURNS, Algorithm, algorithm_of
from sb3_ppo_ext.doctor.measurements import SETTINGS
from sb3_ppo_ext.doctor.rules import FAR_BEYOND, N_START, RULES, Rule
from sb3_ppo_ext.doctor.run import Run, Series

Level = Literal["alarm", "watch"]

FEWEST_ROWS = 5
"""With fewer rows, the log says too little for a diagnosis."""

_WATCH = {rule.name: rule.watch for rule in RULES}


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
    :param short: rules for which the log is too short, with the number of rows that it has for them
    :param blind: rules that could not be checked without what :class:`DoctorCallback` logs
    """

    run: Run
    algorithm: Algorithm
    findings: list[Finding]
    fine: list[Rule]
    short: dict[Rule, int]
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
        if self.short:
            n_rules = _count(len(self.short) + len(self.fine), "rule")
            return f"Nothing unusual so far, but the log is too short for {len(self.short)} of {n_rules}."
        return "Nothing unusual."


def diagnose(run: Run) -> Diagnosis:
    """
    :param run: the log of a training
    :return: what the rules say about it
    """
    algorithm = algorithm_of(run)
    findings: list[Finding] = []
    fine, blind = [], []
    short: dict[Rule, int] = {}
    for rule in RULES:
        series = measured(rule, run)
        if series is None:
            others = [key for key in rule.keys if not key.startswith("doctor/")]
            if rule.needs and (not others or any(key in run.series for key in others)):
                blind.append(rule)
            continue
        finding = _finding(rule, series, run, algorithm)
        if finding is not None:
            findings.append(finding)
        elif len(series.values) < rule.fewest_rows:
            short[rule] = len(series.values)
        elif np.count_nonzero(~np.isnan(_judged(rule, series)[1].values)) >= rule.streak:
            fine.append(rule)
    findings.sort(key=lambda finding: finding.level != "alarm")
    return Diagnosis(run, algorithm, findings, fine, short, blind)


def measured(rule: Rule, run: Run) -> Series | None:
    """What a rule measures. A log of NaN and infinity causes no warning of numpy's."""
    with np.errstate(all="ignore"):
        return rule.measure(run)


def _judged(rule: Rule, series: Series) -> tuple[Series, Series]:
    """The rows of a series that are left out at its start, and the part that is compared with the limits."""
    n_start = 0
    if rule.after_start and not _is_far_beyond(rule, series):
        n_start = max(N_START, len(series.values) // 10)
    left_out, judged = (Series(series.steps[rows], series.values[rows]) for rows in (np.s_[:n_start], np.s_[n_start:]))
    return left_out, judged.in_parts()


def _is_far_beyond(rule: Rule, series: Series) -> bool:
    """Whether all rows, enough for the rule, are so far above the alarm that its start needs no patience."""
    if rule.below or rule.alarm is None or len(series.values) < rule.streak:
        return False
    return bool((series.values > FAR_BEYOND * rule.alarm).all())


def _finding(rule: Rule, measured: Series, run: Run, algorithm: Algorithm) -> Finding | None:
    left_out, judged = _judged(rule, measured)
    n_start, series = len(left_out.values), Series(*map(np.concatenate, zip(left_out, judged, strict=True)))
    limits: list[tuple[Level, float | None]] = [("alarm", rule.alarm), ("watch", rule.watch)]
    for level, limit in limits:
        if limit is None:
            continue
        is_beyond = series.values < limit if rule.below else series.values > limit
        found = _streaks(is_beyond[n_start:], rule.streak)
        if not found:
            continue
        start, end = n_start + found[0][0], n_start + found[-1][1]
        if start == n_start:  # it may have been so from the beginning
            start -= next((i for i, was in enumerate(is_beyond[:n_start][::-1]) if not was), n_start)
        beyond = series.values[start:end]
        worst, last = float(np.nanmin(beyond) if rule.below else np.nanmax(beyond)), float(series.values[-1])
        since = int(series.steps[start])
        until = int(series.steps[end]) if end < len(series.values) else None
        note = ", where judging begins," if rule.warm_up and since <= measured.steps[rule.warm_up] else ""
        seen = _seen(rule, limit, f"step {since:,}{note}", until, worst, last)
        return Finding(rule, level, limit, since, until, worst, last, seen, _first(rule, run, algorithm))
    return None


def _streaks(beyond: np.ndarray, shortest: int) -> list[tuple[int, int]]:
    """Where at least ``shortest`` consecutive values are true: start and end of each slice."""
    edges = np.flatnonzero(np.diff(np.concatenate(([False], beyond, [False])).astype(np.int8)))
    return [(int(start), int(end)) for start, end in edges.reshape(-1, 2) if end - start >= shortest]


def _seen(rule: Rule, limit: float, since: str, until: int | None, worst: float, last: float) -> str:
    """What was seen, as one sentence."""
    if rule.is_flag:
        when = f"Since {since}" if until is None else f"From {since} to step {until:,}"
        return f"{when}: {rule.quantity[0].lower()}{rule.quantity[1:]}."
    write = percentage if rule.is_percentage else number
    beyond = f"{'below' if rule.below else 'above'} {write(limit)}"
    extreme = f"{write(worst)} at {'least' if rule.below else 'most'}"
    if until is not None:
        return f"{rule.quantity} was {beyond} from {since} to step {until:,}, {extreme}. It is {write(last)} now."
    was = "" if write(last) == write(worst) else f", and was {extreme}"
    return f"{rule.quantity} has been {beyond} since {since.rstrip(',')}. It is {write(last)} now{was}."


def _words(run: Run, algorithm: Algorithm) -> dict[str, str]:
    """
    The words of the algorithm. Where the returns are so large that no other change helps the critic, its words say so,
    and none of several findings contradicts another.
    """

    def exceeds(measure: measures.Measure, name: str) -> bool:
        series = measure(run)
        return series is not None and bool(series.values[-1] > _WATCH[name])

    words = dict(algorithm.words)
    if exceeds(measures.critic_error, "reward_scale"):
        words |= LARGE_RETURNS
    elif exceeds(measures.gradient_over_limit, "gradient_clipping"):
        words["critic"] = LARGE_RETURNS["critic"]
    return words


def _first(rule: Rule, run: Run, algorithm: Algorithm) -> str:
    """What to change first, with the present value of each argument that was logged."""
    text = rule.first.format_map(_words(run, algorithm)).strip()
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
    return f"{100.0 * share + 0.0:.2g}%" if abs(share) < 1.0 else f"{100.0 * share:.0f}%"


def _count(n: int, what: str) -> str:
    return f"{n} {what}" if n == 1 else f"{n} {what}s"


def in_words(diagnosis: Diagnosis) -> Sequence[str]:
    """The lines of a report."""
    run, algorithm = diagnosis.run, diagnosis.algorithm
    lines = [f"{run.name}: {algorithm.name}, {run.n_steps:,} steps. {diagnosis.verdict()}"]
    for finding in diagnosis.findings:
        lines += ["", *finding_in_words(finding)]
    if diagnosis.short and run.n_rows >= FEWEST_ROWS:
        lines += ["", f"The log is too short to look for: {'; '.join(too_short(diagnosis))}."]
    if diagnosis.blind:
        lacking = dict.fromkeys(key.partition("/")[2] for rule in diagnosis.blind for key in rule.needs)
        settings = " ".join(f"{name}:VALUE" for name in lacking if name in SETTINGS)
        given = f"; the command takes settings by -params {settings}" if settings else ""
        lacks = f"Some rules need keys that this log lacks: {', '.join(lacking)}. DoctorCallback logs them{given}."
        lines += ["", lacks]
    return lines


def too_short(diagnosis: Diagnosis) -> list[str]:
    """What was not looked for, because the log is too short: each with the rows that there are and that it takes."""
    return [
        f"{rule.title[0].lower()}{rule.title[1:]} ({n_rows} of {rule.fewest_rows} rows)"
        for rule, n_rows in diagnosis.short.items()
    ]


def finding_in_words(finding: Finding) -> list[str]:
    """The lines of one finding."""
    return [
        f"{finding.level.upper()}  {finding.rule.title}",
        f"  seen    {finding.seen}",
        f"  means   {finding.rule.meaning}",
        f"  change  {finding.first}",
    ]
