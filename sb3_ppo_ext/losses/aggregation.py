"""Reduction of elementwise losses to one number."""

from __future__ import annotations

from typing import Literal, get_args

import torch as th

from sb3_ppo_ext.losses._guards import Scalar, as_floats, check_same_shape, checked_scalar, prepared

AggregationMode = Literal["token-mean", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm"]
_MODES = get_args(AggregationMode)


def masked_mean(x: th.Tensor, mask: th.Tensor | None = None) -> th.Tensor:
    """
    Mean over the elements that count.

    ``sum_i m_i x_i / sum_i m_i``

    :param x: any shape
    :param mask: m, 1 or True where an element counts, same shape; None if all do
    :return: 0-d; 0 with gradient 0 if no element counts. Excluded elements, NaN included, affect neither.
    :raises ValueError: if the shapes differ
    """
    check_same_shape(x=x, mask=mask)
    (x,) = prepared(mask, as_floats(x))
    if mask is None:
        return x.mean() if x.numel() else x.sum()
    return x.sum() / mask.bool().sum().clamp(min=1)


def aggregate(
    loss: th.Tensor,
    mask: th.Tensor | None = None,
    *,
    mode: AggregationMode,
    total_tokens: int | th.Tensor | None = None,
    total_sequences: int | th.Tensor | None = None,
    horizon: Scalar | None = None,
) -> th.Tensor:
    """
    Reduce the losses of a batch of sequences (episodes, or a language model's answers) to one number.

    With ``l_bt`` the loss of step ("token") t of sequence b, ``m_bt`` its mask, ``T_b = sum_t m_bt``, and B the number
    of sequences with ``T_b > 0``:

    - ``"token-mean"``: ``sum_bt m_bt l_bt / sum_b T_b``. Every step weighs the same, so a long sequence weighs more
      (DAPO, Yu et al. 2025, arXiv 2503.14476, section 3.3).
    - ``"seq-mean-token-sum"``: ``1/B sum_b sum_t m_bt l_bt``. The gradient of the expected return of an episode.
    - ``"seq-mean-token-mean"``: ``1/B sum_b (1/T_b) sum_t m_bt l_bt``. Every sequence weighs the same, so a step of a
      long sequence weighs less (GRPO, Shao et al. 2024, arXiv 2402.03300, equation 3).
    - ``"seq-mean-token-sum-norm"``: ``"seq-mean-token-sum"`` divided by the constant ``horizon``, which gives it the
      magnitude of one step and favours no length (Dr. GRPO, Liu et al. 2025, arXiv 2503.20783).

    To process a batch in pieces, give each piece the count of the *whole* batch, and the same ``horizon``: the results
    and their gradients then add up to those of the whole batch. (Where gradients are averaged over N processes instead
    of added, multiply by N.)

    :param loss: shape ``(batch, time)``
    :param mask: m, 1 or True where an element counts, same shape; None if all do
    :param mode: see above
    :param total_tokens: number of elements that count in the whole batch; for ``"token-mean"`` only
    :param total_sequences: number of sequences with an element that counts in the whole batch; for the other modes only
    :param horizon: > 0, for ``"seq-mean-token-sum-norm"`` only; the size of the time dimension by default
    :return: 0-d, to be minimised if ``loss`` is; 0 with gradient 0 if no element counts. Excluded elements, NaN
        included, affect neither.
    :raises ValueError: if ``loss`` is not 2-d, the shapes differ, ``mode`` is unknown, a number is out of range, or an
        argument is given that the mode does not read
    """
    if loss.dim() != 2:
        raise ValueError(f"loss must have shape (batch, time), got {tuple(loss.shape)}")
    check_same_shape(loss=loss, mask=mask)
    if mode not in _MODES:
        raise ValueError(f"mode must be one of {', '.join(_MODES)}, got {mode!r}")
    total_tokens = checked_scalar("total_tokens", total_tokens, optional=True)
    total_sequences = checked_scalar("total_sequences", total_sequences, optional=True)
    horizon = checked_scalar("horizon", horizon, optional=True, exclusive=True, finite=True)
    _check_is_read("total_tokens", total_tokens, mode, mode == "token-mean")
    _check_is_read("total_sequences", total_sequences, mode, mode != "token-mean")
    _check_is_read("horizon", horizon, mode, mode == "seq-mean-token-sum-norm")

    (loss,) = prepared(mask, loss)
    if mode == "token-mean":
        if total_tokens is None:
            total_tokens = loss.numel() if mask is None else mask.bool().sum()
        return loss.sum() / _at_least_one(total_tokens)

    lengths = None if mask is None else mask.bool().sum(1)
    if total_sequences is None:
        total_sequences = len(loss) if lengths is None else lengths.count_nonzero()
    if mode == "seq-mean-token-mean":
        per_sequence = loss.sum(1) / _at_least_one(loss.shape[1] if lengths is None else lengths)
        return per_sequence.sum() / _at_least_one(total_sequences)
    per_batch = loss.sum() / _at_least_one(total_sequences)
    if mode == "seq-mean-token-sum":
        return per_batch
    return per_batch / (_at_least_one(loss.shape[1]) if horizon is None else horizon)


def _check_is_read(name: str, value: object, mode: str, is_read: bool) -> None:
    if value is not None and not is_read:
        raise ValueError(f"{name} must be None for mode {mode!r}, which does not read it, got {value}")


def _at_least_one(count: int | th.Tensor) -> int | th.Tensor:
    """Return a safe divisor for a sum that is 0 where the count is 0."""
    return count.clamp(min=1) if isinstance(count, th.Tensor) else max(count, 1)
