"""
Recurrent layers over sequences in which episodes may begin.

A *state* is one tensor of shape ``(n_sequences, n_state)``: the output h of each layer and, for an LSTM, the cell c.
Where an episode begins, the state is 0, so that nothing of the previous episode is remembered.

Three functions compute the same outputs. :func:`step_by_step` is the definition. :func:`by_layers` calls torch's own
layer once for all sequences of a minibatch (twice, if episodes begin within some), which on the CPU takes hardly longer
than its matrix products; on a GPU, cuDNN's layers cannot be differentiated twice. :func:`unrolled` is for compiled
programs, whose shapes are fixed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch as th
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F  # noqa: N812  (the name every torch user knows)

from sb3_ppo_ext.common.errors import ArgumentError

Rnn = nn.LSTM | nn.GRU

Recurrence = Callable[[Rnn, th.Tensor, th.Tensor, th.Tensor], th.Tensor]
"""``(layers, features, state, starts) -> outputs``: features of shape ``(n_sequences * length, n_features)``, one
sequence after the other, and starts of shape ``(n_sequences * length,)``; outputs of shape
``(n_sequences * length, hidden_size)``."""

Cell = Callable[..., tuple[th.Tensor, ...]]
"""``(of_input, of_output, h, ...) -> (h, ...)``: the element-wise part of a layer, after its two matrix products."""

Layer = Callable[..., tuple[th.Tensor, ...]]
"""``(cell, of_inputs, keep, weight, bias, h, ...) -> (outputs, h, ...)``: all steps of one layer."""


def _lstm_cell(of_input: th.Tensor, of_output: th.Tensor, h: th.Tensor, c: th.Tensor) -> tuple[th.Tensor, ...]:
    """Hochreiter & Schmidhuber 1997 with the forget gate of Gers et al. 2000, as :class:`torch.nn.LSTM` has it."""
    i, f, g, o = (of_input + of_output).chunk(4, dim=-1)
    c = f.sigmoid() * c + i.sigmoid() * g.tanh()
    return o.sigmoid() * c.tanh(), c


def _gru_cell(of_input: th.Tensor, of_output: th.Tensor, h: th.Tensor) -> tuple[th.Tensor, ...]:
    """Cho et al. 2014, as :class:`torch.nn.GRU` has it."""
    r, z, n = of_input.chunk(3, dim=-1)
    h_r, h_z, h_n = of_output.chunk(3, dim=-1)
    z = (z + h_z).sigmoid()
    n = (n + (r + h_r).sigmoid() * h_n).tanh()
    return ((1.0 - z) * n + z * h,)


def cell_of(rnn: Rnn) -> Cell:
    """
    :param rnn: recurrent layers
    """
    return _lstm_cell if isinstance(rnn, nn.LSTM) else _gru_cell


def n_state(rnn: Rnn) -> int:
    """
    The size of the state of one sequence.

    :param rnn: recurrent layers
    """
    return (2 if isinstance(rnn, nn.LSTM) else 1) * rnn.num_layers * rnn.hidden_size


def as_torch(rnn: Rnn, state: th.Tensor) -> Any:
    """
    Convert a state to the form that torch's own layers take.

    :param rnn: recurrent layers
    :param state: shape ``(n_sequences, n_state)``
    :return: ``(h, c)`` for an LSTM, ``h`` for a GRU, each of shape ``(num_layers, n_sequences, hidden_size)``
    """
    parts = state.view(state.shape[0], -1, rnn.num_layers, rnn.hidden_size).permute(1, 2, 0, 3).contiguous()
    return tuple(parts) if isinstance(rnn, nn.LSTM) else parts[0]


def from_torch(parts: Sequence[th.Tensor]) -> th.Tensor:
    """
    The inverse of :func:`as_torch`.

    :param parts: ``(h, c)``, or ``(h,)``, each of shape ``(num_layers, n_sequences, hidden_size)``
    :return: shape ``(n_sequences, n_state)``
    """
    return th.stack(tuple(parts)).permute(2, 0, 1, 3).flatten(1)


def check_states(rnn: Rnn, n: int, lstm_states: Sequence[th.Tensor], episode_starts: th.Tensor) -> None:
    """
    :param rnn: recurrent layers
    :param n: number of observations, one for each environment
    :param lstm_states: hidden states before the observations
    :param episode_starts: whether each observation is the first of its episode
    :raises ArgumentError: if the number of states or episode starts differs from ``n``
    """
    shape = (rnn.num_layers, n, rnn.hidden_size)
    shapes = [tuple(part.shape) for part in lstm_states]
    if shapes != [shape] * 2:
        raise ArgumentError(
            f"state of the shapes {shapes} is not allowed: for {n} observation(s) it must be two arrays of the shape "
            f"{shape}, as predict() returns it, or None"
        )
    if episode_starts.numel() != n:
        raise ArgumentError(
            f"episode_start of {episode_starts.numel()} environments is not allowed: there must be one for each of the "
            f"{n} observation(s)"
        )


def step_by_step(rnn: Rnn, features: th.Tensor, state: th.Tensor, starts: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
    """
    Outputs, and the state after the last step.

    :param rnn: recurrent layers
    :param features: shape ``(n_sequences * length, n_features)``
    :param state: shape ``(n_sequences, n_state)``
    :param starts: shape ``(n_sequences * length,)``
    """
    return _over_layers(rnn, features, state, starts, _loop)


def one_step(rnn: Rnn, features: th.Tensor, state: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
    """
    :func:`step_by_step` for one step, with torch's cells.

    :param rnn: recurrent layers
    :param features: shape ``(n_sequences, n_features)``
    :param state: shape ``(n_sequences, n_state)``, 0 where an episode begins
    :return: outputs, and the state after the step
    """
    is_lstm, x, new = isinstance(rnn, nn.LSTM), features, []
    parts = state.view(state.shape[0], -1, rnn.num_layers, rnn.hidden_size)
    for i in range(rnn.num_layers):
        if i:
            x = F.dropout(x, rnn.dropout, rnn.training)
        weights = _weights(rnn, i)
        now = parts[:, :, i].unbind(dim=1)
        now = th.lstm_cell(x, now, *weights) if is_lstm else (th.gru_cell(x, now[0], *weights),)
        x = now[0]
        new.append(now)
    return x, th.cat([part for parts in zip(*new, strict=True) for part in parts], dim=1)


def _weights(rnn: Rnn, layer: int) -> list[Any]:
    """Input and output weights, then their biases; looked up at each call, as functional_call swaps them."""
    names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
    return [getattr(rnn, f"{name}_l{layer}", None) for name in names]


def process_sequence(
    features: th.Tensor, lstm_states: tuple[th.Tensor, ...], episode_starts: th.Tensor, lstm: Rnn
) -> tuple[th.Tensor, tuple[th.Tensor, ...]]:
    """
    :func:`step_by_step` with the signature of sb3-contrib's recurrent policies. It replaces their
    ``_process_sequence``: it takes LSTM and GRU layers, and has no data-dependent branch, so that it can be exported.

    :param features: shape ``(n_sequences * length, n_features)``
    :param lstm_states: ``(h, c)``, each of shape ``(num_layers, n_sequences, hidden_size)``; of a GRU, which has no
        cell, h twice
    :param episode_starts: shape ``(n_sequences * length,)``
    :param lstm: recurrent layers
    :return: outputs, and the states after the last step
    """
    is_gru = isinstance(lstm, nn.GRU)
    state = from_torch(lstm_states[:1] if is_gru else lstm_states)
    outputs, state = step_by_step(lstm, features.flatten(1), state, episode_starts)
    parts = as_torch(lstm, state)
    return outputs, (parts, parts) if is_gru else parts


def unrolled(rnn: Rnn, features: th.Tensor, state: th.Tensor, starts: th.Tensor) -> th.Tensor:
    """
    Outputs, where one matrix product over all steps gives the gradient of each weight. Differentiable only once.

    :param rnn: recurrent layers
    :param features: shape ``(n_sequences * length, n_features)``
    :param state: shape ``(n_sequences, n_state)``, constant
    :param starts: shape ``(n_sequences * length,)``
    """
    return _over_layers(rnn, features, state, starts, _UnrolledLayer.apply)[0]


def by_layers(rnn: Rnn, features: th.Tensor, state: th.Tensor, starts: th.Tensor) -> th.Tensor:
    """
    Outputs, by one call of torch's own layers if no episode begins within a sequence. Otherwise the sequences are cut
    where episodes begin; long and short pieces form two groups, each padded to its longest piece, and the outputs of
    the padding are dropped.

    :param rnn: recurrent layers
    :param features: shape ``(n_sequences * length, n_features)``
    :param state: shape ``(n_sequences, n_state)``
    :param starts: shape ``(n_sequences * length,)``
    """
    n = state.shape[0]
    begins = starts.view(n, -1) > 0.0
    length = begins.shape[1]
    state = th.where(begins[:, :1], 0.0, state)
    begins[:, 0] = True
    if int(begins.sum()) == n:
        return _by_torch(rnn, features.view(n, length, -1).transpose(0, 1), state).transpose(0, 1).flatten(0, 1)
    first = begins.flatten().nonzero().flatten()  # row of each piece's beginning
    lengths = th.diff(first, append=first.new_tensor([n * length]))
    states = state.new_zeros(first.shape[0], state.shape[1]).index_put((first % length == 0,), state)
    results, places = [], []
    for of_piece in (lengths > length // 2, lengths <= length // 2):  # two calls, for less padding
        begin, of_group = first[of_piece], lengths[of_piece]
        if not begin.numel():
            continue
        steps = th.arange(int(of_group.max()), device=first.device).unsqueeze(1)
        rows, is_there = begin + steps, steps < of_group
        padded = features[th.where(is_there, rows, begin)]
        results.append(_by_torch(rnn, padded, states[of_piece])[is_there])
        places.append(rows[is_there])
    return th.cat(results)[th.cat(places).argsort()]


def _by_torch(rnn: Rnn, features: th.Tensor, state: th.Tensor) -> th.Tensor:
    """
    Outputs of torch's own layers. cuDNN differentiates only passes in training mode, and in these layers the mode only
    switches dropout. So they always run in training mode, with dropout set to 0 if they were in evaluation mode.

    :param rnn: recurrent layers
    :param features: shape ``(length, n_sequences, n_features)``
    :param state: shape ``(n_sequences, n_state)``
    :return: shape ``(length, n_sequences, hidden_size)``
    """
    training, dropout = rnn.training, rnn.dropout
    rnn.training, rnn.dropout = True, dropout if training else 0.0
    try:
        outputs: th.Tensor = rnn(features, as_torch(rnn, state))[0]
    finally:
        rnn.training, rnn.dropout = training, dropout
    return outputs


def _over_layers(
    rnn: Rnn, features: th.Tensor, state: th.Tensor, starts: th.Tensor, layer: Layer
) -> tuple[th.Tensor, th.Tensor]:
    n, cell = state.shape[0], cell_of(rnn)
    keep = (1.0 - starts).view(n, -1).t().unsqueeze(2)
    x = features.view(n, keep.shape[0], -1).transpose(0, 1)
    parts = state.view(n, -1, rnn.num_layers, rnn.hidden_size)
    new = []
    for i in range(rnn.num_layers):
        if i:
            x = F.dropout(x, rnn.dropout, rnn.training)
        of_input, of_output, bias_of_input, bias_of_output = _weights(rnn, i)
        of_inputs = F.linear(x, of_input, bias_of_input)
        x, *state_of_layer = layer(cell, of_inputs, keep, of_output, bias_of_output, *parts[:, :, i].unbind(dim=1))
        new.append(th.stack(state_of_layer, dim=1))
    return x.transpose(0, 1).flatten(0, 1), th.stack(new, dim=2).flatten(1)


def _steps(
    cell: Cell,
    of_inputs: th.Tensor,
    keep: th.Tensor,
    weight: th.Tensor,
    bias: th.Tensor | None,
    state: tuple[th.Tensor, ...],
) -> tuple[list[th.Tensor], list[tuple[th.Tensor, ...]], list[th.Tensor], tuple[th.Tensor, ...]]:
    """For each step of a layer: output, state before it and product with that state; and the state after the last."""
    outputs, before, of_outputs = [], [], []
    for of_input, kept in zip(of_inputs.unbind(), keep.unbind(), strict=True):
        before.append(tuple(part * kept for part in state))
        of_outputs.append(F.linear(before[-1][0], weight, bias))
        state = cell(of_input, of_outputs[-1], *before[-1])
        outputs.append(state[0])
    return outputs, before, of_outputs, state


def _loop(
    cell: Cell,
    of_inputs: th.Tensor,
    keep: th.Tensor,
    weight: th.Tensor,
    bias: th.Tensor | None,
    *state: th.Tensor,
) -> tuple[th.Tensor, ...]:
    """Outputs of one layer, shape ``(length, n_sequences, hidden_size)``, and its state after the last step."""
    outputs, _, _, state = _steps(cell, of_inputs, keep, weight, bias, state)
    return th.stack(outputs), *state


class _UnrolledLayer(th.autograd.Function):
    """:func:`_loop`, whose weights get their gradients by one product over all steps."""

    @staticmethod
    def forward(
        ctx: Any,
        cell: Cell,
        of_inputs: th.Tensor,
        keep: th.Tensor,
        weight: th.Tensor,
        bias: th.Tensor | None,
        *state: th.Tensor,
    ) -> tuple[th.Tensor, ...]:
        outputs, before, of_outputs, state = _steps(cell, of_inputs, keep, weight, bias, state)
        ctx.cell, ctx.has_bias = cell, bias is not None
        ctx.mark_non_differentiable(*state)
        ctx.save_for_backward(of_inputs, keep, weight, *of_outputs, *(part for parts in before for part in parts))
        return th.stack(outputs), *(part.clone() for part in state)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_outputs: th.Tensor, *_: th.Tensor) -> tuple[Any, ...]:
        of_inputs, keep, weight, *kept = ctx.saved_tensors
        length = len(keep)
        n_parts = len(kept) // length - 1
        of_outputs, before = kept[:length], [kept[i : i + n_parts] for i in range(length, len(kept), n_parts)]
        d_state = [th.zeros_like(d_outputs[0])] * n_parts
        d_products = []
        transposed = weight.t().contiguous()  # once, for libraries that would copy it at each step
        for t in reversed(range(length)):
            d_state[0] = d_state[0] + d_outputs[t]
            with th.enable_grad():
                places = [x.detach().requires_grad_() for x in (of_inputs[t], of_outputs[t], *before[t])]
                after = ctx.cell(*places)
                gradients = th.autograd.grad(after, places, d_state, materialize_grads=True)
            d_products.append(gradients[:2])
            d_state = [gradient * keep[t] for gradient in gradients[2:]]
            d_state[0] = d_state[0] + F.linear(gradients[1], transposed) * keep[t]
        of_input, of_output = (parts[::-1] for parts in zip(*d_products, strict=True))
        d_of_outputs = th.stack(of_output)
        is_same = of_input[0] is of_output[0]  # of an LSTM, whose cell takes the sum of the two products
        d_inputs = d_of_outputs if is_same else th.stack(of_input)
        rows = d_of_outputs.flatten(0, 1)
        d_bias = rows.sum(dim=0) if ctx.has_bias else None
        return None, d_inputs, None, rows.t() @ th.cat([parts[0] for parts in before]), d_bias, *d_state
