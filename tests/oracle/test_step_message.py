"""What several processes exchange at a gradient step, against means and maxima computed by hand."""

from __future__ import annotations

from typing import NamedTuple, cast

import pytest
import torch as th

from sb3_ppo_ext.common.update.reduce import Reducer
from sb3_ppo_ext.common.update.step_message import StepMessage


class OneOfTwo(NamedTuple):
    rank: int
    n_processes: int = 2


@pytest.mark.parametrize(
    ("names", "of_first", "of_second", "of_all"),
    [
        (("loss", "kl"), [1.0, 2.0], [5.0, -2.0], [4.0, -1.0]),
        (("ratio_max", "loss", "kl_max"), [7.0, 1.0, -2.0], [3.0, 5.0, -1.0], [7.0, 4.0, -1.0]),
    ],
)
def test_means_count_samples_and_maxima_are_of_all(
    names: tuple[str, ...], of_first: list[float], of_second: list[float], of_all: list[float]
) -> None:
    device = th.device("cpu")
    first, second = (StepMessage(cast(Reducer, OneOfTwo(rank)), names, device) for rank in (0, 1))
    gradients = [[th.full((2, 3), value), th.tensor(-value)] for value in (1.0, 5.0)]
    total = first.written(gradients[0], th.tensor(of_first), 2)
    total = total + second.written(gradients[1], th.tensor(of_second), th.tensor(6))
    sums, weight, statistics = second.read(total, gradients[0])
    assert weight == 8
    th.testing.assert_close([part / weight for part in sums], [th.full((2, 3), 4.0), th.tensor(-4.0)])
    th.testing.assert_close(statistics, th.tensor(of_all))
