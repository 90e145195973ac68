"""The minibatches of an update, where several processes that train one model make each step together."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch as th
from stable_baselines3.common.buffers import RolloutBuffer

from sb3_ppo_ext.common.rollout.buffers import minibatches
from sb3_ppo_ext.common.rollout.data import RolloutSamples, rows_of
from sb3_ppo_ext.common.update.objective import normalized
from sb3_ppo_ext.common.update.reduce import Reducer, of_each

Minibatch = tuple[RolloutSamples, th.Tensor | None]
"""Samples, and which rows of them; None: all."""


class Epochs:
    """
    Epochs of minibatches over one rollout. Each process cuts its own samples; a step is made on what all of them have
    in their minibatches together, so all cut as many as the one that has the most samples.

    :param rollout_buffer: filled
    :param batch_size: samples in a minibatch of this process
    :param reducer: of the processes
    :param normalize_advantage: whether to normalise the advantages here, over all processes; where there is one only,
        the loss does it
    """

    def __init__(
        self, rollout_buffer: RolloutBuffer, batch_size: int, reducer: Reducer, *, normalize_advantage: bool = False
    ) -> None:
        self._rollout_buffer = rollout_buffer
        self._batch_size = batch_size
        self._reducer = reducer
        self._normalize_advantage = normalize_advantage
        self._n_minibatches: int | None = None
        self._normalized: RolloutSamples | None = None

    def minibatches(self) -> Iterable[Minibatch]:
        """Those of one epoch, drawn anew. Where other processes have more samples, some may be empty."""
        of_epoch = minibatches(self._rollout_buffer, self._batch_size)
        if self._reducer.is_local:
            return of_epoch
        cut = list(of_epoch)
        if self._n_minibatches is None:
            self._n_minibatches = max(self._reducer.gathered(len(cut)))
        cut = _in_as_many(cut, self._n_minibatches)
        if not self._normalize_advantage:
            return cut
        if any(rows is None for _, rows in cut):  # of a buffer that has a get() of its own
            return self._normalized_each(cut)
        return self._normalized_rows(cut[0][0], [rows for _, rows in cut if rows is not None])

    def _normalized_rows(self, rollout: RolloutSamples, rows: list[th.Tensor]) -> list[Minibatch]:
        """
        Minibatches with advantages that are normalised over all processes, each minibatch by itself.

        :param rollout: that they are all cut out of
        :param rows: of each
        """
        in_order = th.cat(rows)
        values = normalized_over_processes(
            rows_of(rollout.advantages, in_order, rollout.length),
            [len(some) * rollout.length for some in rows],
            self._reducer,
        )
        if self._normalized is None:  # the same in each epoch, as whoever computes with it prepares for it
            self._normalized = rollout._replace(advantages=rollout.advantages.clone())
        self._normalized.advantages.view(-1, rollout.length)[in_order] = values.view(-1, rollout.length)
        return [(self._normalized, some) for some in rows]

    def _normalized_each(self, cut: list[Minibatch]) -> list[Minibatch]:
        parts = [r.advantages if rows is None else rows_of(r.advantages, rows, r.length) for r, rows in cut]
        sizes = [len(part) for part in parts]
        values = th.split(normalized_over_processes(th.cat(parts), sizes, self._reducer), sizes)
        return [
            (rollout if rows is not None else rollout._replace(advantages=part), rows)
            for (rollout, rows), part in zip(cut, values, strict=True)
        ]


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
    Advantages with mean 0 and standard deviation 1 over all processes, as they are where only one counts. The moments
    of all parts go in one message, and are put together by the formula of Chan et al. (1979).

    :param advantages: of parts, one after the other, each of which is normalised by itself, shape ``(batch,)``
    :param sizes: of the parts, which there are as many of in each process
    :param reducer: of the processes
    """
    if reducer.is_local:
        return th.cat([normalized(part) for part in th.split(advantages, list(sizes))])
    wide = advantages.double()
    of_process = th.tensor(sizes, device=wide.device)
    part = th.arange(len(sizes), device=wide.device).repeat_interleave(of_process, output_size=len(wide))

    def sums(values: th.Tensor) -> th.Tensor:
        return values.new_zeros(len(sizes)).index_add_(0, part, values)

    means = sums(wide) / of_process.clamp(min=1)
    squares = sums((wide - means[part]).square())
    counts, means, squares = of_each(th.stack((of_process.double(), means, squares)), reducer).unbind(1)
    count = counts.sum(0)
    mean = (counts * means).sum(0) / count
    squares = squares.sum(0) + (counts * (means - mean).square()).sum(0)
    std = (squares / (count - 1).clamp(min=1)).sqrt() + 1e-8
    mean, std = th.where(count > 1, mean, 0.0), th.where(count > 1, std, 1.0)
    return ((wide - mean[part]) / std[part]).to(advantages.dtype)
