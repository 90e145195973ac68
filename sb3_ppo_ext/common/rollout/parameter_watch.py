"""Detect changes of a policy while it collects a rollout."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch as th
from torch import nn

from sb3_ppo_ext.common.rollout.purity import has_hooks
from sb3_ppo_ext.common.torch_internals import version_of


def _structure(policy: nn.Module) -> list[tuple[int, ...]]:
    of_modules = [(id(module), int(module.training), int(has_hooks(module))) for module in policy.modules()]
    return [*of_modules, *((id(tensor),) for tensor in (*policy.parameters(), *policy.buffers()))]


class ParameterWatch:
    """
    Keeps a copy of a policy's parameters and buffers and detects whether they have changed. Only if they have not may a
    rollout be evaluated after it is full.

    :param policy: whose parameters and buffers are watched
    """

    def __init__(self, policy: nn.Module) -> None:
        self._policy = policy
        self._structure = _structure(policy)
        self._tensors = [*policy.parameters(), *policy.buffers()]
        self._copies = [tensor.detach().clone() for tensor in self._tensors]
        self._version = self._present_version()

    def _present_version(self) -> int:
        return sum(map(version_of, self._tensors))

    def is_touched(self) -> bool:
        """Whether a tensor was written into since the last call. This is cheap, but misses writes through ``.data``."""
        before, self._version = self._version, self._present_version()
        return before != self._version

    def has_changed(self) -> bool:
        """Whether a tensor differs from its copy."""
        return not all(map(th.equal, self._tensors, self._copies))

    def is_replaced(self, policy: nn.Module) -> bool:
        """
        :param policy: that acts now
        :return: whether it is another policy, or has other tensors, layers, modes or hooks than at first
        """
        return policy is not self._policy or _structure(policy) != self._structure

    @contextmanager
    def as_at_first(self) -> Iterator[None]:
        """Within the ``with`` block the policy has its first values again."""
        present = [tensor.detach().clone() for tensor in self._tensors]
        self._write(self._copies)
        try:
            yield
        finally:
            self._write(present)

    @th.no_grad()
    def _write(self, values: list[th.Tensor]) -> None:
        for tensor, value in zip(self._tensors, values, strict=True):
            tensor.copy_(value)
