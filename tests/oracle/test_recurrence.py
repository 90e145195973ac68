"""Recurrent layers over sequences in which episodes begin."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch as th
from torch import nn

from sb3_ppo_ext.common.rollout.recurrence import (
    as_torch,
    by_layers,
    from_torch,
    n_state,
    one_step,
    step_by_step,
    unrolled,
)

N, LENGTH, N_FEATURES, HIDDEN = 4, 6, 3, 5
STARTS = th.tensor(
    [
        [0, 0, 0, 0, 0, 0],  # no episode begins
        [1, 0, 0, 0, 0, 0],
        [0, 0, 1, 0, 0, 1],
        [1, 1, 0, 1, 1, 1],
    ],
    dtype=th.float64,
)

LAYERS = [
    pytest.param(nn.LSTM, {}, id="lstm"),
    pytest.param(nn.LSTM, {"num_layers": 2, "bias": False}, id="lstm, two layers"),
    pytest.param(nn.LSTM, {"num_layers": 2, "dropout": 0.9}, id="lstm, dropout that is off"),
    pytest.param(nn.GRU, {}, id="gru"),
    pytest.param(nn.GRU, {"num_layers": 2, "bias": False}, id="gru, two layers"),
]


def case(kind: Any, kwargs: dict[str, Any]) -> tuple[Any, th.Tensor, th.Tensor]:
    th.manual_seed(0)
    rnn = kind(N_FEATURES, HIDDEN, **kwargs).double().eval()
    features = th.randn(N * LENGTH, N_FEATURES, dtype=th.float64, requires_grad=True)
    return rnn, features, th.randn(N, n_state(rnn), dtype=th.float64)


def episode_by_episode(rnn: Any, features: th.Tensor, state: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
    """Outputs and last states: each piece of a sequence that belongs to one episode is given to torch's layer alone."""
    outputs, states = [], []
    for i, sequence in enumerate(features.view(N, LENGTH, -1)):
        now = as_torch(rnn, state[i : i + 1])
        begins = [t for t in range(LENGTH) if STARTS[i, t]]
        for start, stop in zip([0, *begins], [*begins, LENGTH], strict=True):
            if start in begins:
                now = None  # torch's layers then begin with zeros
            if start < stop:
                out, now = rnn(sequence[start:stop].unsqueeze(1), now)
                outputs.append(out.squeeze(1))
        states.append(from_torch(now if isinstance(now, tuple) else (now,)))
    return th.cat(outputs), th.cat(states)


@pytest.mark.parametrize(("kind", "kwargs"), LAYERS)
def test_an_episode_begins_with_an_empty_memory(kind: Any, kwargs: dict[str, Any]) -> None:
    rnn, features, state = case(kind, kwargs)
    outputs, last = step_by_step(rnn, features, state, STARTS.flatten())
    expected, expected_last = episode_by_episode(rnn, features, state)
    assert th.allclose(outputs, expected)
    assert th.allclose(last, expected_last)


@pytest.mark.parametrize("way", [unrolled, by_layers])
@pytest.mark.parametrize("starts", [STARTS, th.zeros_like(STARTS)], ids=["episodes begin", "none begins"])
@pytest.mark.parametrize(("kind", "kwargs"), LAYERS)
def test_all_ways_agree_gradients_and_all(way: Any, kind: Any, kwargs: dict[str, Any], starts: th.Tensor) -> None:
    rnn, features, state = case(kind, kwargs)
    weights = th.randn(N * LENGTH, HIDDEN, dtype=th.float64)
    results = []
    for outputs in (
        step_by_step(rnn, features, state, starts.flatten())[0],
        way(rnn, features, state, starts.flatten()),
    ):
        results.append([outputs, *th.autograd.grad((weights * outputs).sum(), [features, *rnn.parameters()])])
    for expected, actual in zip(*results, strict=True):
        assert th.allclose(expected, actual)


@pytest.mark.parametrize(("kind", "kwargs"), LAYERS)
def test_one_step_is_the_first_of_many(kind: Any, kwargs: dict[str, Any]) -> None:
    rnn, features, state = case(kind, kwargs)
    one = features.view(N, LENGTH, -1)[:, 0]
    for ours, theirs in zip(
        one_step(rnn, one, state), step_by_step(rnn, one, state, th.zeros(N, dtype=th.float64)), strict=True
    ):
        assert th.allclose(ours, theirs)


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_dropout_between_layers_in_training_is_that_of_torch(kind: Any) -> None:
    """Of all that passes from one layer to the next, so that nothing is left to chance."""
    rnn, features, state = case(kind, {"num_layers": 2, "dropout": 1.0})
    starts = th.zeros(N * LENGTH, dtype=th.float64)
    in_evaluation = step_by_step(rnn, features, state, starts)[0]
    rnn.train()
    expected = rnn(features.view(N, LENGTH, -1).transpose(0, 1), as_torch(rnn, state))[0].transpose(0, 1)
    assert not th.allclose(in_evaluation.view_as(expected), expected)
    for outputs in (
        step_by_step(rnn, features, state, starts)[0],
        unrolled(rnn, features, state, starts),
        by_layers(rnn, features, state, starts),
    ):
        assert th.allclose(outputs.view_as(expected), expected)
    one = one_step(rnn, features.view(N, LENGTH, -1)[:, 0], state)[0]
    assert th.allclose(one, expected[:, 0])


def test_one_step_of_an_lstm_by_hand() -> None:
    rnn = nn.LSTM(1, 1).double()
    with th.no_grad():
        for parameter, values in zip(
            rnn.parameters(), ([1, 2, 3, 4], [0.5, 0.5, 0.5, 0.5], [0, 0, 0, 0], [0.1, 0.2, 0.3, 0.4]), strict=True
        ):
            parameter.copy_(th.tensor(values, dtype=th.float64).view_as(parameter))
    x, h, c = 0.7, 0.2, -0.3

    def sigmoid(z: float) -> float:
        return 1.0 / (1.0 + math.exp(-z))

    i, f, o = (sigmoid(w * x + 0.5 * h + b) for w, b in ((1, 0.1), (2, 0.2), (4, 0.4)))
    new_c = f * c + i * math.tanh(3 * x + 0.5 * h + 0.3)
    outputs, state = step_by_step(
        rnn, th.tensor([[x]]).double(), th.tensor([[h, c]]).double(), th.zeros(1, dtype=th.float64)
    )
    assert outputs.item() == pytest.approx(o * math.tanh(new_c))
    assert state.tolist()[0] == pytest.approx([o * math.tanh(new_c), new_c])


def test_the_definition_can_be_differentiated_twice() -> None:
    rnn = nn.LSTM(2, 2).double()
    features = th.randn(3, 2, dtype=th.float64, requires_grad=True)
    starts = th.tensor([0.0, 1.0, 0.0], dtype=th.float64)

    def outputs(features: th.Tensor) -> th.Tensor:
        return step_by_step(rnn, features, th.zeros(1, 4, dtype=th.float64), starts)[0]

    assert th.autograd.gradgradcheck(outputs, features)


def test_what_cannot_be_differentiated_twice_says_so() -> None:
    rnn, features, state = case(nn.GRU, {})
    outputs = unrolled(rnn, features, state, STARTS.flatten())
    (gradient,) = th.autograd.grad(outputs.square().sum(), features, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_states_in_both_forms() -> None:
    rnn = nn.LSTM(N_FEATURES, HIDDEN, num_layers=2)
    state = th.randn(N, n_state(rnn))
    h, c = as_torch(rnn, state)
    assert h.shape == c.shape == (2, N, HIDDEN)
    assert th.equal(from_torch((h, c)), state)
    assert th.equal(state[1, :HIDDEN], h[0, 1])
    assert th.equal(state[1, -HIDDEN:], c[1, 1])
