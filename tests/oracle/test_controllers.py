"""Literals of the rule by which a number follows the KL of the updates."""

from __future__ import annotations

import math
from typing import Any

import pytest

from sb3_ppo_ext.common.update.controllers import adapted_by_kl

PENALTY: dict[str, Any] = {"target_kl": 0.01, "tolerance": 1.5, "factor": 2.0, "minimum": 0.0, "maximum": math.inf}
LEARNING_RATE: dict[str, Any] = {**PENALTY, "factor": 0.5}


@pytest.mark.parametrize(
    ("kl", "coefficient", "learning_rate"),
    [
        (-1e-9, 0.5, 2.0),  # by rounding
        (0.0, 0.5, 2.0),
        (0.0066, 0.5, 2.0),  # below 0.01 / 1.5 = 0.00666...
        (0.0067, 1.0, 1.0),
        (0.01, 1.0, 1.0),
        (0.0149, 1.0, 1.0),
        (0.0151, 2.0, 0.5),  # above 0.01 * 1.5
        (math.inf, 2.0, 0.5),
        (math.nan, 1.0, 1.0),
    ],
)
def test_rule(kl: float, coefficient: float, learning_rate: float) -> None:
    """After too long a step a penalty grows and a learning rate falls; after too short a one the other way round."""
    assert adapted_by_kl(1.0, kl, **PENALTY) == coefficient
    assert adapted_by_kl(1.0, kl, **LEARNING_RATE) == learning_rate


def test_the_edges_of_the_band_belong_to_it() -> None:
    exact = {**PENALTY, "target_kl": 0.5, "tolerance": 2.0}
    assert adapted_by_kl(1.0, 1.0, **exact) == 1.0
    assert adapted_by_kl(1.0, 0.25, **exact) == 1.0


@pytest.mark.parametrize("rule", [PENALTY, LEARNING_RATE], ids=["penalty", "learning rate"])
def test_bounds(rule: dict[str, Any]) -> None:
    bounded = {**rule, "minimum": 0.3, "maximum": 3.0}
    too_long, too_short = (1.0, 0.0) if rule is PENALTY else (0.0, 1.0)
    assert adapted_by_kl(0.5, too_short, **bounded) == 0.3
    assert adapted_by_kl(0.3, too_short, **bounded) == 0.3
    assert adapted_by_kl(2.0, too_long, **bounded) == 3.0
    assert adapted_by_kl(3.0, too_long, **bounded) == 3.0
    assert adapted_by_kl(0.1, math.nan, **bounded) == 0.3  # a number that lies outside is brought in


def test_other_settings() -> None:
    wide = {**PENALTY, "tolerance": 2.0, "factor": 1.2}
    assert adapted_by_kl(1.0, 0.021, **wide) == 1.2
    assert adapted_by_kl(1.0, 0.019, **wide) == 1.0
    assert adapted_by_kl(7.0, 5.0, **{**PENALTY, "factor": 1.0}) == 7.0  # held fixed


def test_a_penalty_that_has_fallen_for_long_can_still_grow() -> None:
    """The smallest number divided by 2 is 0, and no factor would change that."""
    smallest = adapted_by_kl(5e-324, 0.0, **PENALTY)
    assert smallest == 5e-324
    assert adapted_by_kl(smallest, 1.0, **PENALTY) == 1e-323


def test_one_change_undoes_another() -> None:
    doubled = adapted_by_kl(0.7, 1.0, **PENALTY)
    assert adapted_by_kl(doubled, 0.0, **PENALTY) == 0.7
