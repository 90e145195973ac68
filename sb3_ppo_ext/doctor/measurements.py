"""Values for rules that logs lack and a callback can read: the spread of advantages and returns, and some settings."""

from __future__ import annotations

import math
from typing import Any

import torch as th

SETTINGS = ("gamma", "ent_coef", "max_grad_norm", "kl_coef_min", "kl_coef_max")
"""Hyper-parameters that rules need and that not all algorithms log."""


def measurements(model: Any) -> dict[str, float]:
    """
    :param model: an on-policy algorithm at the end of a rollout
    :return: values by the names under which they are logged, after ``doctor/``
    """
    found: dict[str, float] = {}
    for name in SETTINGS:
        value = getattr(model, name, None)
        if isinstance(value, (int, float)) and math.isfinite(value):
            found[name] = float(value)
    returns = _numbers(model.rollout_buffer.returns)
    found["return_mean"], found["return_std"] = returns.mean().item(), returns.std(correction=0).item()
    if getattr(model, "baseline", "value") == "value":  # the buffer lacks those of REINFORCE's other baselines
        advantages = _numbers(model.rollout_buffer.advantages)
        mean, std = advantages.mean().item(), advantages.std(correction=0).item()
        found["advantage_mean"], found["advantage_std"] = mean, std
        if std > 0.0:
            found["advantage_skew"] = ((advantages - mean) / std).pow(3).mean().item()
    return found


def _numbers(array: Any) -> th.Tensor:
    """An array of a rollout buffer, which may be a tensor on a device."""
    return th.as_tensor(array).to("cpu", th.float64)
