"""``torch_compile=True``: compiled actors, evaluations of rollouts, gradient steps and Fisher products."""

from __future__ import annotations

from collections.abc import Callable

import torch as th

Run = Callable[[list[th.Tensor]], list[th.Tensor]]
"""A compiled program: a function of a list of tensors that returns a list of tensors; it may write into its inputs."""
