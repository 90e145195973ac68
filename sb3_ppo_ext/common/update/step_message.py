"""What several processes tell each other at a gradient step, in one message."""

from __future__ import annotations

from collections.abc import Sequence

import torch as th

from sb3_ppo_ext.common.update.objective import Statistics
from sb3_ppo_ext.common.update.reduce import Reducer


class StepMessage:
    """
    Numbers to be summed over the processes: gradients and means, each times the number of samples that they are means
    of; that number; and a row for each process with its maxima, which are the statistics whose names end in ``_max``.

    :param reducer: of the processes
    :param device: of the gradients
    """

    def __init__(self, reducer: Reducer, device: th.device) -> None:
        self._is_own = (th.arange(reducer.n_processes, device=device) == reducer.rank).unsqueeze(1)

    def written(self, gradients: Sequence[th.Tensor], statistics: Statistics, weight: int | th.Tensor) -> th.Tensor:
        """
        :param gradients: of this process
        :param statistics: scalars, by name
        :param weight: the number of samples
        """
        means = [value for name, value in statistics.items() if not _is_maximum(name)]
        maxima = [value for name, value in statistics.items() if _is_maximum(name)]
        parts = [gradient.flatten() for gradient in gradients]
        parts += [th.stack(means)] if means else []
        one = parts[0].new_ones(1)
        weighted = th.cat([*parts, one]) * weight
        return th.cat([weighted, th.where(self._is_own, th.stack(maxima), 0.0).flatten()]) if maxima else weighted

    def read(
        self, total: th.Tensor, gradients: Sequence[th.Tensor], names: Sequence[str]
    ) -> tuple[list[th.Tensor], Statistics]:
        """
        :param total: of the messages of all processes
        :param gradients: of the same shapes as those that were written
        :param names: of the statistics that were written
        :return: the gradients and the statistics of all
        """
        of_means = [name for name in names if not _is_maximum(name)]
        of_maxima = [name for name in names if _is_maximum(name)]
        sizes = [*(gradient.numel() for gradient in gradients), len(of_means), 1]
        weighted, of_each = th.split(total, [sum(sizes), total.numel() - sum(sizes)])
        *parts, means, _ = th.split(weighted / weighted[-1], sizes)
        values = dict(zip(of_means, means.unbind(), strict=True))
        if of_maxima:
            maxima = of_each.view(-1, len(of_maxima)).amax(0)
            values.update(zip(of_maxima, maxima.unbind(), strict=True))
        averaged = [part.view_as(gradient) for part, gradient in zip(parts, gradients, strict=True)]
        return averaged, {name: values[name] for name in names}


def _is_maximum(name: str) -> bool:
    return name.endswith("_max")
