"""What logs lack and a callback can see: the spread of advantages and returns, and limits that a rule compares with."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

SETTINGS = ("gamma", "max_grad_norm", "kl_coef_min", "kl_coef_max")
"""Hyper-parameters that rules compare with, and that no algorithm logs."""


def measurements(model: Any) -> dict[str, float]:
    """
    :param model: an on-policy algorithm at the end of a rollout
    :return: by the name that they are logged under, after ``doctor/``
    """
    found: dict[str, float] = {}
    for name in SETTINGS:
        value = getattr(model, name, None)
        if isinstance(value, (int, float)) and math.isfinite(value):
            found[name] = float(value)
    returns = np.asarray(model.rollout_buffer.returns, dtype=np.float64)
    found["return_mean"], found["return_std"] = float(returns.mean()), float(returns.std())
    if getattr(model, "baseline", "value") == "value":  # REINFORCE's other baselines do not go into the buffer
        advantages = np.asarray(model.rollout_buffer.advantages, dtype=np.float64)
        mean, std = float(advantages.mean()), float(advantages.std())
        found["advantage_mean"], found["advantage_std"] = mean, std
        if std > 0.0:
            found["advantage_skew"] = float((((advantages - mean) / std) ** 3).mean())
    return found
