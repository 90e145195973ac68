"""What several processes tell each other at a gradient step, in one message."""

from __future__ import annotations

from collections.abc import Sequence

import torch as th

from sb3_ppo_ext.common.update.reduce import Reducer


class StepMessage:
    """
    Numbers to be summed over the processes: gradients and statistics, each times the number of samples that they are
    means of; that number; and of each statistic whose name ends in ``_max``, which is a maximum, those of all.

    :param reducer: of the processes
    :param names: of the statistics
    :param device: of the gradients
    """

    def __init__(self, reducer: Reducer, names: Sequence[str], device: th.device) -> None:
        self.names = tuple(names)
        self._maxima = [i for i, name in enumerate(names) if name.endswith("_max")]
        self._n_processes = reducer.n_processes
        self._is_own = th.arange(reducer.n_processes, device=device) == reducer.rank

    def written(self, gradients: Sequence[th.Tensor], statistics: th.Tensor, weight: int | th.Tensor) -> th.Tensor:
        """
        :param gradients: of this process
        :param statistics: shape ``(len(names),)``
        :param weight: the number of samples
        """
        one = statistics.new_ones(1)
        weighted = th.cat([*(gradient.flatten() for gradient in gradients), statistics, one]) * weight
        return th.cat([weighted, *(th.where(self._is_own, statistics[i], 0.0) for i in self._maxima)])

    def read(self, total: th.Tensor, gradients: Sequence[th.Tensor]) -> tuple[list[th.Tensor], th.Tensor]:
        """
        :param total: of the messages of all processes
        :param gradients: of the same shapes as those that were written
        :return: the gradients and the statistics of all
        """
        sizes = [*(gradient.numel() for gradient in gradients), len(self.names)]
        n = sum(sizes)
        *parts, statistics = th.split(total[:n] / total[n], sizes)
        for i, maxima in zip(self._maxima, total[n + 1 :].view(-1, self._n_processes), strict=True):
            statistics[i] = maxima.amax()
        return [part.view_as(gradient) for part, gradient in zip(parts, gradients, strict=True)], statistics
