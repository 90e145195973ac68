"""The one message that several processes exchange at a gradient step."""

from __future__ import annotations

from collections.abc import Sequence

import torch as th

from sb3_ppo_ext.common.update.reduce import Reducer


class StepMessage:
    """
    The layout of a vector that is summed over the processes. It holds the gradients and the statistics, both times the
    number of samples over which they are means; this number; and, for each statistic whose name ends in ``_max``, one
    number per process, of which the maximum is taken.

    :param reducer: the reducer that sums the messages
    :param names: names of the statistics
    :param device: the device of the gradients
    """

    def __init__(self, reducer: Reducer, names: Sequence[str], device: th.device) -> None:
        self.names = tuple(names)
        maxima = [i for i, name in enumerate(names) if name.endswith("_max")]
        self._maxima = th.tensor(maxima, dtype=th.int64, device=device)
        self._n_processes = reducer.n_processes
        self._n_of_maxima = len(maxima) * self._n_processes
        self._is_own = th.arange(self._n_processes, device=device) == reducer.rank
        self._zero, self._one = th.zeros(1, device=device), th.ones(1, device=device)

    def written(self, gradients: Sequence[th.Tensor], statistics: th.Tensor, weight: int | th.Tensor) -> th.Tensor:
        """
        Build this process's message.

        :param gradients: gradients of this process
        :param statistics: statistics of this process, shape ``(len(names),)``
        :param weight: number of samples that count
        :return: the message, a vector
        """
        parts = [*(gradient.flatten() for gradient in gradients), statistics, self._one]
        if not self._n_of_maxima:
            return th.cat(parts).mul_(weight)
        maxima = th.where(self._is_own, statistics.index_select(0, self._maxima).unsqueeze(1), self._zero)
        message = th.cat([*parts, maxima.flatten()])
        message[: -self._n_of_maxima].mul_(weight)
        return message

    def read(self, total: th.Tensor, gradients: Sequence[th.Tensor]) -> tuple[list[th.Tensor], th.Tensor, th.Tensor]:
        """
        Take the sum of the messages apart.

        :param total: the sum of the messages of all processes
        :param gradients: tensors of the same shapes as the gradients in the message
        :return: the sums of the gradients, each times its number of samples; the sum of these numbers, of shape ``()``;
            and the statistics over all processes
        """
        sizes = [*(gradient.numel() for gradient in gradients), len(self.names), 1, self._n_of_maxima]
        *sums, statistics, weight, of_maxima = total.split_with_sizes(sizes)
        statistics = statistics / weight
        if self._n_of_maxima:
            statistics.index_copy_(0, self._maxima, of_maxima.view(-1, self._n_processes).amax(dim=1))
        return [part.view_as(gradient) for part, gradient in zip(sums, gradients, strict=True)], weight[0], statistics
