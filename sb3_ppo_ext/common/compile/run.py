"""What a compiled program is, whatever compiled it."""

from __future__ import annotations

from collections.abc import Callable

import torch as th

Run = Callable[[list[th.Tensor]], list[th.Tensor]]
"""A compiled program: flat tensors in, flat tensors out; it may write into what it is given."""
