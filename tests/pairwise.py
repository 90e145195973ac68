"""Parametrisations by pairs, where the full product of several factors would say little more and take long."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import Any


def pairwise(*factors: Iterable[Any]) -> list[tuple[Any, ...]]:
    """
    Rows of values, one of each factor, so that each pair of values of two factors is in some row.

    Greedy: the next row is the first of the product that has the most pairs which no row has yet.

    :param factors: the values of each
    """
    values: list[Sequence[Any]] = [list(factor) for factor in factors]
    # By index, as values need not be hashable.
    product = list(itertools.product(*(range(len(factor)) for factor in values)))
    pairs_of = {row: set(itertools.combinations(enumerate(row), 2)) for row in product}
    missing = set().union(*pairs_of.values())
    rows = []
    while missing:
        row = max(product, key=lambda row: len(pairs_of[row] & missing))
        missing -= pairs_of[row]
        rows.append(tuple(factor[index] for factor, index in zip(values, row, strict=True)))
    return rows
