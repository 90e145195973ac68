"""What ``torch_compile=True`` makes of the actor, the evaluation of rollouts, the gradient step and TRPO's products."""

from __future__ import annotations

from collections.abc import Callable

import torch as th

Run = Callable[[list[th.Tensor]], list[th.Tensor]]
"""A compiled program: flat tensors in, flat tensors out; it may write into what it is given."""
