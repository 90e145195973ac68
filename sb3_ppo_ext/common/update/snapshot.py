"""Undo an update."""

from __future__ import annotations

import copy

import torch as th
from torch import nn


class Snapshot:
    """
    Parameters, buffers and what an optimiser remembers of its steps, as they are now; :meth:`restore` puts them back,
    to the bit. The learning rates are left out.

    :param policy: whose parameters and buffers they are
    :param optimizer: of the parameters
    """

    def __init__(self, policy: nn.Module, optimizer: th.optim.Optimizer) -> None:
        self._optimizer = optimizer
        self._tensors = [(tensor, tensor.detach().clone()) for tensor in (*policy.parameters(), *policy.buffers())]
        self._state = {parameter: copy.deepcopy(state) for parameter, state in optimizer.state.items()}

    @th.no_grad()
    def restore(self) -> None:
        """Put everything back; once, as the optimiser goes on with the copies."""
        for tensor, value in self._tensors:
            tensor.copy_(value)
        self._optimizer.state.clear()
        self._optimizer.state.update(self._state)
