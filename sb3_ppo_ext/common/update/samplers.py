"""The minibatches of an update, for one process or for several that train one model together."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch as th
from stable_baselines3.common.buffers import RolloutBuffer

from sb3_ppo_ext import losses
from sb3_ppo_ext.common.rollout.buffers import minibatches
from sb3_ppo_ext.common.rollout.data import RolloutSamples, rows_of
from sb3_ppo_ext.common.update.old_rollouts import Rollouts
from sb3_ppo_ext.common.update.reduce import Reducer, of_each

_AT_ONCE = 2**20  # samples

Minibatch = tuple[RolloutSamples, th.Tensor | None]
"""Samples, and the rows of the minibatch; None: all rows."""


class Epochs:
    """
    Epochs of minibatches over one rollout, shuffled in each epoch. Each process cuts its own samples into minibatches,
    and each gradient step uses one minibatch of every process. So all processes make the same number of minibatches,
    that of the process with the most samples, and some minibatches may be empty.

    :param rollout_buffer: a filled buffer, or the newest rollout together with older ones
    :param batch_size: samples in a minibatch of this process
    :param n_epochs: number of epochs
    :param reducer: combines what several processes have
    :param normalize_advantage: whether to normalise the advantages here, over all processes; with a single process,
        the loss does it
    """

    def __init__(
        self,
        rollout_buffer: RolloutBuffer | Rollouts,
        batch_size: int,
        n_epochs: int,
        reducer: Reducer,
        *,
        normalize_advantage: bool = False,
    ) -> None:
        self._rollout_buffer = rollout_buffer
        self._batch_size = batch_size
        self._n_epochs = n_epochs
        self._reducer = reducer
        self._normalize_advantage = normalize_advantage

    def __iter__(self) -> Iterator[Iterable[Minibatch]]:
        if self._reducer.is_local:
            for _ in range(self._n_epochs):
                yield self._minibatches()
            return
        cut = self._cut()
        n_minibatches = max(self._reducer.gathered(len(cut)))
        cut = _in_as_many(cut, n_minibatches)
        rollout, rows = cut[0]
        if not self._normalize_advantage or rows is None:
            for epoch in range(self._n_epochs):
                cut = _in_as_many(self._cut(), n_minibatches) if epoch else cut
                yield self._normalized(cut) if self._normalize_advantage else cut
            return
        # One message for many epochs takes less time than a message for each.
        at_once = max(1, _AT_ONCE // len(rollout.advantages))
        together = rollout._replace(advantages=th.empty_like(rollout.advantages))  # the same object in each epoch
        for first in range(0, self._n_epochs, at_once):
            rows_of_epochs = [
                [rows for _, rows in (_in_as_many(self._cut(), n_minibatches) if epoch else cut) if rows is not None]
                for epoch in range(first, min(first + at_once, self._n_epochs))
            ]
            for rows_of_epoch, advantages in self._normalized_epochs(rollout, rows_of_epochs):
                together.advantages.copy_(advantages)
                yield [(together, rows) for rows in rows_of_epoch]

    def _minibatches(self) -> Iterable[Minibatch]:
        if isinstance(self._rollout_buffer, Rollouts):
            return self._rollout_buffer.minibatches()
        return minibatches(self._rollout_buffer, self._batch_size)

    def _cut(self) -> list[Minibatch]:
        return list(self._minibatches())

    def _normalized(self, cut: list[Minibatch]) -> list[Minibatch]:
        """The minibatches of a buffer that overrides ``get``, with normalised advantages."""
        parts = [r.advantages if rows is None else rows_of(r.advantages, rows, r.length) for r, rows in cut]
        sizes = [len(part) for part in parts]
        normalized_parts = th.split(normalized_over_processes(th.cat(parts), sizes, self._reducer), sizes)
        return [
            (rollout if rows is not None else rollout._replace(advantages=part), rows)
            for (rollout, rows), part in zip(cut, normalized_parts, strict=True)
        ]

    def _normalized_epochs(
        self, rollout: RolloutSamples, epochs: list[list[th.Tensor]]
    ) -> Iterator[tuple[list[th.Tensor], th.Tensor]]:
        """
        Normalise the advantages of each minibatch by itself, over all processes.

        :param rollout: the samples from which all minibatches are taken
        :param epochs: the rows of the minibatches of each epoch
        :return: for each epoch, the rows of its minibatches and the normalised advantages of all samples
        """
        rows = [th.cat(of_epoch) for of_epoch in epochs]
        values = normalized_over_processes(
            rows_of(rollout.advantages, th.cat(rows), rollout.length),
            [len(some) * rollout.length for of_epoch in epochs for some in of_epoch],
            self._reducer,
        )
        for of_epoch, in_order, part in zip(epochs, rows, values.chunk(len(epochs)), strict=True):
            advantages = th.empty_like(rollout.advantages).view(-1, rollout.length)
            advantages[in_order] = part.view(-1, rollout.length)
            yield of_epoch, advantages.flatten()


def _in_as_many(cut: list[Minibatch], n: int) -> list[Minibatch]:
    if len(cut) == n:
        return cut
    rollout, rows = cut[0]
    if rows is None:
        nothing = th.arange(0, device=rollout.returns.device)
        return [*cut, *[(rollout, nothing)] * (n - len(cut))]
    all_rows = th.cat([rows for _, rows in cut if rows is not None])
    return [(rollout, some) for some in all_rows.tensor_split(n)]


def normalized_over_processes(advantages: th.Tensor, sizes: Sequence[int], reducer: Reducer) -> th.Tensor:
    """
    Normalise advantages to mean 0 and standard deviation 1 over all processes; a single sample keeps its value. The
    moments of all parts are sent in one message and combined by the formula of Chan et al. (1979).

    :param advantages: parts, one after the other, each of which is normalised by itself, shape ``(batch,)``
    :param sizes: sizes of the parts; each process has the same number of parts
    :param reducer: combines what several processes have
    :return: the normalised advantages, shape ``(batch,)``
    """
    if reducer.is_local:
        return th.cat([losses.masked_whiten(part) for part in th.split(advantages, list(sizes))])
    wide = advantages.double()
    of_process = th.tensor(sizes, device=wide.device)

    def sums(values: th.Tensor) -> th.Tensor:
        return th.segment_reduce(values, "sum", lengths=of_process)

    def of_each_sample(of_part: th.Tensor) -> th.Tensor:
        return of_part.repeat_interleave(of_process, output_size=len(wide))

    means = sums(wide) / of_process.clamp(min=1)
    squares = sums((wide - of_each_sample(means)).square())
    counts, means, squares = of_each(th.stack((of_process.double(), means, squares)), reducer).unbind(1)
    count = counts.sum(0)
    mean = (counts * means).sum(0) / count
    squares = squares.sum(0) + (counts * (means - mean).square()).sum(0)
    std = (squares / (count - 1).clamp(min=1)).sqrt() + 1e-8
    mean, std = th.where(count > 1, mean, 0.0), th.where(count > 1, std, 1.0)
    return ((wide - of_each_sample(mean)) / of_each_sample(std)).to(advantages.dtype)
