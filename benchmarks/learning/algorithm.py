"""What a run trains with."""

from __future__ import annotations

from typing import Any, NamedTuple


class Algorithm(NamedTuple):
    """
    :param label: for readers
    :param zoo: the key by which rl_zoo3 knows it
    :param entry: what it is given beside the hyper-parameters that its peers have too
    """

    label: str
    zoo: str
    entry: dict[str, Any] = {}  # noqa: RUF012
