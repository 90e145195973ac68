"""
Schedules in words: ``"lin_3e-4"``, ``"cos_3e-4_1e-5"``, ``"exp_3e-4_1e-5"``, ``"const_3e-4_warmup_0.1"``.

The first number is the value at the beginning of training, the second the value at its end (0 if it is left out). The
number after "warmup" is the share of the training in which the value first rises linearly from 0 to the first number;
the schedule then takes the rest of the training.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from stable_baselines3.common.type_aliases import Schedule
from stable_baselines3.common.utils import ConstantSchedule, LinearSchedule

EXAMPLES = "'lin_3e-4', 'cos_3e-4_1e-5', 'exp_3e-4_1e-5' or 'const_3e-4_warmup_0.1'"

_WORDS = re.compile(r"(lin|cos|exp|const)_([^_]+)(?:_([^_]+))?(?:_warmup_([^_]+))?")


@dataclass(frozen=True)
class CosineSchedule:
    """
    Half a period of a cosine: ``end + (start - end) * (1 + cos(pi * t)) / 2``, where t is the share of the training
    that is done. Loshchilov & Hutter 2017, arXiv 1608.03983, equation 5, without restarts.

    :param start: value at the beginning of training
    :param end: value at its end
    """

    start: float
    end: float

    def __call__(self, progress_remaining: float) -> float:
        return self.end + (self.start - self.end) * (1.0 + math.cos(math.pi * (1.0 - progress_remaining))) / 2.0


@dataclass(frozen=True)
class ExponentialSchedule:
    """
    Exponential decay or growth: ``start * (end / start) ** t``, where t is the share of the training that is done.

    :param start: value at the beginning of training, > 0
    :param end: value at its end, > 0
    """

    start: float
    end: float

    def __call__(self, progress_remaining: float) -> float:
        return float(self.start * (self.end / self.start) ** (1.0 - progress_remaining))


@dataclass(frozen=True)
class WarmUp:
    """
    A linear rise from 0 to the first value of a schedule, which then takes the rest of the training.

    :param schedule: the schedule after the warm-up
    :param share: share of the training in which the value rises, above 0 and below 1
    """

    schedule: Schedule
    share: float

    def __call__(self, progress_remaining: float) -> float:
        done = 1.0 - progress_remaining
        if done < self.share:
            return self.schedule(1.0) * done / self.share
        return self.schedule(progress_remaining / (1.0 - self.share))


def schedule_in_words(text: str) -> Schedule | None:
    """
    :param text: a schedule in words
    :return: the schedule; None if the text is not a valid one
    """
    match = _WORDS.fullmatch(text)
    if match is None:
        return None
    kind = match[1]
    try:
        start, end, share = (None if word is None else float(word) for word in match.groups()[1:])
    except ValueError:
        return None
    assert start is not None
    if not 0.0 < start < math.inf or not (share is None or 0.0 < share < 1.0):
        return None
    schedule: Schedule
    if kind == "const":
        if end is not None:
            return None
        schedule = ConstantSchedule(start)
    else:
        end = 0.0 if end is None else end
        if not 0.0 <= end < math.inf or (kind == "exp" and end == 0.0):
            return None
        if kind == "lin":
            schedule = LinearSchedule(start, end, 1.0)
        else:
            schedule = CosineSchedule(start, end) if kind == "cos" else ExponentialSchedule(start, end)
    return schedule if share is None else WarmUp(schedule, share)
