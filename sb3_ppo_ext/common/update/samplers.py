"""The minibatches of an update, where several processes that train one model make each step together."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch as th
from stable_baselines3.common.buffers import RolloutBuffer

from sb3_ppo_ext.common.rollout.buffers import minibatches
from sb3_ppo_ext.common.rollout.data import RolloutSamples, rows_of
from sb3_ppo_ext.common.update.objective import normalized
from sb3_ppo_ext.common.update.reduce import Reducer

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

    def minibatches(self) -> Iterable[Minibatch]:
        """Those of one epoch, drawn anew. Where other processes have more samples, some may be empty."""
        of_epoch = minibatches(self._rollout_buffer, self._batch_size)
        if self._reducer.is_local:
            return of_epoch
        cut = list(of_epoch)
        if self._n_minibatches is None:
            self._n_minibatches = max(self._reducer.gathered(len(cut)))
        cut = _in_as_many(cut, self._n_minibatches)
        return self._normalized(cut) if self._normalize_advantage else cut

    def _normalized(self, cut: list[Minibatch]) -> list[Minibatch]:
        """The minibatches with advantages that are normalised over all processes, each minibatch by itself."""
        parts = normalized_over_processes(
            [
                rollout.advantages if rows is None else rows_of(rollout.advantages, rows, rollout.length)
                for rollout, rows in cut
            ],
            self._reducer,
        )
        if any(rows is None for _, rows in cut):  # of a buffer that has a get() of its own
            return [
                (rollout if rows is not None else rollout._replace(advantages=part), rows)
                for (rollout, rows), part in zip(cut, parts, strict=True)
            ]
        rollout = cut[0][0]
        advantages = rollout.advantages.clone().view(-1, rollout.length)
        for (_, rows), part in zip(cut, parts, strict=True):
            advantages[rows] = part.view(-1, rollout.length)
        rollout = rollout._replace(advantages=advantages.flatten())
        return [(rollout, rows) for _, rows in cut]


def _in_as_many(cut: list[Minibatch], n: int) -> list[Minibatch]:
    if len(cut) == n:
        return cut
    rollout, rows = cut[0]
    if rows is None:
        nothing = th.arange(0, device=rollout.returns.device)
        return [*cut, *[(rollout, nothing)] * (n - len(cut))]
    all_rows = th.cat([rows for _, rows in cut if rows is not None])
    return [(rollout, some) for some in all_rows.tensor_split(n)]


def normalized_over_processes(parts: Sequence[th.Tensor], reducer: Reducer) -> list[th.Tensor]:
    """
    Advantages with mean 0 and standard deviation 1 over all processes, as they are where only one counts.

    :param parts: each is normalised by itself; as many in each process, of different lengths
    :param reducer: of the processes
    """
    if reducer.is_local:
        return [normalized(part) for part in parts]
    wide = [part.double() for part in parts]
    counts = wide[0].new_tensor([len(part) for part in parts])
    means = th.stack([part.sum() for part in wide])
    reducer.average(counts, means)
    means /= counts
    variances = th.stack([(part - mean).square().sum() for part, mean in zip(wide, means, strict=True)])
    reducer.average(variances)
    variances /= (counts - 1.0 / reducer.n_processes).clamp(min=1e-9)  # n - 1, as the counts are means
    is_alone = counts * reducer.n_processes < 1.5
    means, stds = th.where(is_alone, 0.0, means), th.where(is_alone, 1.0, variances.sqrt() + 1e-8)
    return [((w - mean) / std).to(p.dtype) for p, w, mean, std in zip(parts, wide, means, stds, strict=True)]
