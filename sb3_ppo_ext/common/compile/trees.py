"""Flatten nested tuples, lists and dicts of tensors for a program, and rebuild them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch as th


def tensors_in(tree: Any) -> list[th.Tensor]:
    """
    The tensors in a tree. This function must be fast, because the actor is called at every step.

    :param tree: a tuple, list or dict of tensors, of None, and of further such trees
    :return: the tensors, in their order
    """
    found: list[th.Tensor] = []
    for part in tree.values() if isinstance(tree, dict) else tree:
        if isinstance(part, th.Tensor):
            found.append(part)
        elif part is not None:
            found += tensors_in(part)
    return found


def with_tensors(tree: Any, tensors: Iterator[th.Tensor]) -> Any:
    """
    :param tree: as in :func:`tensors_in`
    :param tensors: as many tensors as the tree contains
    :return: a copy of the tree with these tensors
    """
    if isinstance(tree, th.Tensor):
        return next(tensors)
    if tree is None:
        return None
    if isinstance(tree, dict):
        return {key: with_tensors(part, tensors) for key, part in tree.items()}
    parts = [with_tensors(part, tensors) for part in tree]
    return tree._make(parts) if hasattr(tree, "_make") else type(tree)(parts)  # _make: a named tuple
