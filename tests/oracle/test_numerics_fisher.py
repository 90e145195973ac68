"""
Fisher-vector products against the Fisher matrix by its definition.

The oracle is the expectation of the outer product of the score, for each row: scores by autograd of a log-probability
of ``torch.distributions``, the expectation by enumeration of all actions, or, for Gaussians, by Gauss-Hermite
quadrature (exact here: the outer product is a polynomial of degree 4 in the action). It knows no metric and no second
derivative.
"""

import gc
import itertools
import math
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch as th
from torch import nn
from torch.distributions import Bernoulli, Categorical, Normal

from sb3_ppo_ext.numerics import ChunkedFisherVectorProduct, FisherVectorProduct, flatten

Metric = Callable[[th.Tensor, th.Tensor], th.Tensor]


def gaussian_metric(params: th.Tensor, tangent: th.Tensor) -> th.Tensor:
    _, std = params.chunk(2, dim=1)
    mean_tangent, std_tangent = tangent.chunk(2, dim=1)
    return th.cat((mean_tangent / std**2, 2.0 * std_tangent / std**2), dim=1)


def categorical_metric(params: th.Tensor, tangent: th.Tensor) -> th.Tensor:
    probs = params.softmax(dim=1)
    return probs * (tangent - (probs * tangent).sum(dim=1, keepdim=True))


def multi_categorical_metric(params: th.Tensor, tangent: th.Tensor) -> th.Tensor:
    pairs = zip(params.tensor_split([2], dim=1), tangent.tensor_split([2], dim=1), strict=True)
    return th.cat([categorical_metric(logits, u) for logits, u in pairs], dim=1)


def bernoulli_metric(params: th.Tensor, tangent: th.Tensor) -> th.Tensor:
    probs = params.sigmoid()
    return probs * (1.0 - probs) * tangent


# For one row of parameters: every action that counts, with its weight and its log-probability.
Outcomes = Iterator[tuple[float, th.Tensor]]


def log_prob_of(distribution: Any, action: th.Tensor) -> th.Tensor:
    """Joint log-probability of independent dimensions."""
    log_prob: th.Tensor = distribution.log_prob(action).sum()
    return log_prob


def gaussian_outcomes(row: th.Tensor) -> Outcomes:
    mean, std = row.chunk(2)
    nodes, weights = np.polynomial.hermite_e.hermegauss(3)
    for index in itertools.product(range(3), repeat=len(mean)):
        noise = th.as_tensor(nodes[list(index)], dtype=row.dtype)
        action = (mean + std * noise).detach()
        weight = float(np.prod(weights[list(index)] / math.sqrt(2.0 * math.pi)))
        yield weight, log_prob_of(Normal(mean, std), action)


def categorical_outcomes(row: th.Tensor) -> Outcomes:
    for action in range(len(row)):
        log_prob = log_prob_of(Categorical(logits=row), th.tensor(action))
        yield math.exp(log_prob.item()), log_prob


def multi_categorical_outcomes(row: th.Tensor) -> Outcomes:
    for first, second in itertools.product(range(2), range(3)):
        log_prob = log_prob_of(Categorical(logits=row[:2]), th.tensor(first))
        log_prob = log_prob + log_prob_of(Categorical(logits=row[2:]), th.tensor(second))
        yield math.exp(log_prob.item()), log_prob


def bernoulli_outcomes(row: th.Tensor) -> Outcomes:
    for action in itertools.product((0.0, 1.0), repeat=len(row)):
        log_prob = log_prob_of(Bernoulli(logits=row), th.tensor(action, dtype=row.dtype))
        yield math.exp(log_prob.item()), log_prob


class GaussianNet(nn.Module):
    """Mean by a network; standard deviation a parameter, or by the network too."""

    def __init__(self, state_dependent_std: bool) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 4 if state_dependent_std else 2))
        self.log_std = None if state_dependent_std else nn.Parameter(th.tensor([-0.7, 0.4]))

    def forward(self, x: th.Tensor) -> th.Tensor:
        out: th.Tensor = self.body(x)
        if self.log_std is None:
            mean, log_std = out.chunk(2, dim=1)
            return th.cat((mean, log_std.exp()), dim=1)
        return th.cat((out, self.log_std.exp().expand_as(out)), dim=1)


def mlp(n_params: int) -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, n_params))


@dataclass(frozen=True)
class Case:
    build: Callable[[], nn.Module]
    metric: Metric
    outcomes: Callable[[th.Tensor], Outcomes]


CASES = {
    "gaussian": Case(lambda: GaussianNet(False), gaussian_metric, gaussian_outcomes),
    "gaussian_state_dependent_std": Case(lambda: GaussianNet(True), gaussian_metric, gaussian_outcomes),
    "categorical": Case(lambda: mlp(3), categorical_metric, categorical_outcomes),
    "multi_categorical": Case(lambda: mlp(5), multi_categorical_metric, multi_categorical_outcomes),
    "bernoulli": Case(lambda: mlp(3), bernoulli_metric, bernoulli_outcomes),
}
BATCH = 5


def build(name: str, dtype: th.dtype = th.float64) -> tuple[nn.Module, th.Tensor, list[th.Tensor], Case]:
    with th.random.fork_rng():
        th.manual_seed(3)
        model = CASES[name].build().to(dtype)
        observations = th.randn(BATCH, 3, dtype=dtype)
    return model, observations, list(model.parameters()), CASES[name]


def fisher_matrix(
    outputs: th.Tensor, parameters: Sequence[th.Tensor], outcomes: Callable[[th.Tensor], Outcomes]
) -> np.ndarray:
    """Mean over rows of the expected outer product of the score."""
    n = sum(p.numel() for p in parameters)
    total = np.zeros((n, n))
    for row in outputs:
        weights = []
        for weight, log_prob in outcomes(row):
            grads = th.autograd.grad(log_prob, list(parameters), retain_graph=True, allow_unused=True)
            score = np.concatenate(
                [
                    np.zeros(p.numel()) if g is None else g.double().numpy().ravel()
                    for g, p in zip(grads, parameters, strict=True)
                ]
            )
            total += weight * np.outer(score, score)
            weights.append(weight)
        assert sum(weights) == pytest.approx(1.0, abs=1e-6)
    return total / len(outputs)


def as_matrix(product: Callable[[th.Tensor], th.Tensor], n: int, dtype: th.dtype = th.float64) -> np.ndarray:
    return np.stack([product(column).double().numpy() for column in th.eye(n, dtype=dtype)], axis=1)


@pytest.mark.parametrize("name", CASES)
def test_equals_the_fisher_matrix(name: str) -> None:
    model, observations, parameters, case = build(name)
    outputs = model(observations)
    expected = fisher_matrix(outputs, parameters, case.outcomes)
    product = FisherVectorProduct(outputs, parameters, case.metric)
    matrix = as_matrix(product, len(expected))
    assert np.abs(expected).max() > 0.1
    np.testing.assert_allclose(matrix, expected, rtol=0.0, atol=1e-12)
    np.testing.assert_allclose(matrix, matrix.T, rtol=0.0, atol=1e-13)
    assert np.linalg.eigvalsh(matrix).min() > -1e-12


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(th.float32, 1e-5), (th.float64, 1e-12)])
def test_dense_vectors_in_both_precisions(name: str, dtype: th.dtype, tolerance: float) -> None:
    model, observations, parameters, case = build(name, dtype)
    outputs = model(observations)
    expected = fisher_matrix(outputs, parameters, case.outcomes)
    product = FisherVectorProduct(outputs, parameters, case.metric)
    generator = th.Generator().manual_seed(0)
    for _ in range(3):
        v = th.randn(len(expected), generator=generator, dtype=dtype)
        result = product(v)
        assert result.dtype == dtype
        assert result.shape == v.shape
        error = np.linalg.norm(result.double().numpy() - expected @ v.double().numpy())
        assert error < tolerance * np.linalg.norm(expected, 2) * v.norm().item()


def test_convolution_with_relu_and_pooling() -> None:
    with th.random.fork_rng():
        th.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(1, 2, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(8, 3), nn.LayerNorm(3)
        ).double()
        images = th.randn(4, 1, 6, 6, dtype=th.float64)
    outputs, parameters = model(images), list(model.parameters())
    expected = fisher_matrix(outputs, parameters, categorical_outcomes)
    matrix = as_matrix(FisherVectorProduct(outputs, parameters, categorical_metric), len(expected))
    np.testing.assert_allclose(matrix, expected, rtol=0.0, atol=1e-12)


@pytest.mark.parametrize("chunk_size", [2, 100])
def test_damping_is_added_to_the_true_fisher_matrix(chunk_size: int) -> None:
    model, observations, parameters, case = build("gaussian")
    expected = fisher_matrix(model(observations), parameters, case.outcomes)
    n = len(expected)
    whole = FisherVectorProduct(model(observations), parameters, case.metric, damping=0.3)
    chunked = ChunkedFisherVectorProduct(
        lambda rows: model(observations[rows]), BATCH, parameters, case.metric, chunk_size=chunk_size, damping=0.3
    )
    np.testing.assert_allclose(as_matrix(whole, n), expected + 0.3 * np.eye(n), rtol=0.0, atol=1e-12)
    np.testing.assert_allclose(as_matrix(chunked, n), expected + 0.3 * np.eye(n), rtol=0.0, atol=1e-12)


def test_parameters_that_are_not_reached_get_zeros() -> None:
    model, observations, parameters, case = build("categorical")
    stranger = nn.Parameter(th.ones(2, 2, dtype=th.float64))
    rounded = nn.Parameter(th.ones(3, dtype=th.float64))  # reached, with a gradient that is zero everywhere
    outputs = model(observations) + rounded.round()
    extended = [parameters[0], stranger, *parameters[1:], rounded]
    expected = fisher_matrix(outputs, extended, case.outcomes)
    matrix = as_matrix(FisherVectorProduct(outputs, extended, case.metric), len(expected))
    np.testing.assert_allclose(matrix, expected, rtol=0.0, atol=1e-12)
    assert not matrix[12:16].any()
    assert not matrix[:, 12:16].any()
    assert not matrix[-3:].any()


def test_nothing_reached_leaves_the_damping_alone() -> None:
    model, observations, _, case = build("categorical")
    stranger = nn.Parameter(th.ones(2, dtype=th.float64))
    product = FisherVectorProduct(model(observations), [stranger], case.metric, damping=0.5)
    assert product(th.tensor([2.0, -4.0], dtype=th.float64)).tolist() == [1.0, -2.0]


def test_some_of_the_parameters_give_the_block_of_the_matrix() -> None:
    model, observations, parameters, case = build("bernoulli")
    outputs = model(observations)
    expected = fisher_matrix(outputs, parameters, case.outcomes)
    some = parameters[2:]  # from 16 on
    matrix = as_matrix(FisherVectorProduct(outputs, some, case.metric), sum(p.numel() for p in some))
    np.testing.assert_allclose(matrix, expected[16:, 16:], rtol=0.0, atol=1e-12)


@pytest.mark.parametrize("name", CASES)
def test_fewer_rows_are_the_fisher_matrix_of_those_rows(name: str) -> None:
    model, observations, parameters, case = build(name)
    rows = slice(None, None, 2)
    expected = fisher_matrix(model(observations)[rows], parameters, case.outcomes)
    product = FisherVectorProduct(model(observations[rows]), parameters, case.metric)
    np.testing.assert_allclose(as_matrix(product, len(expected)), expected, rtol=0.0, atol=1e-12)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("chunk_size", [1, 2, 3, 5, 8])
def test_chunks_agree_with_the_whole(name: str, chunk_size: int) -> None:
    model, observations, parameters, case = build(name)
    expected = fisher_matrix(model(observations), parameters, case.outcomes)
    asked: list[tuple[int, int]] = []

    def outputs_of(rows: slice) -> th.Tensor:
        asked.append((rows.start, rows.stop))
        out: th.Tensor = model(observations[rows])
        return out

    product = ChunkedFisherVectorProduct(outputs_of, BATCH, parameters, case.metric, chunk_size=chunk_size)
    assert asked == []
    v = th.randn(len(expected), generator=th.Generator().manual_seed(0), dtype=th.float64)
    np.testing.assert_allclose(product(v).numpy(), expected @ v.numpy(), rtol=0.0, atol=1e-11)
    assert [row for start, stop in asked for row in range(start, stop)] == list(range(BATCH))
    assert max(stop - start for start, stop in asked) == min(chunk_size, BATCH)


def test_chunks_are_built_at_the_parameters_of_the_moment() -> None:
    model, observations, parameters, case = build("categorical")
    product = ChunkedFisherVectorProduct(
        lambda rows: model(observations[rows]), BATCH, parameters, case.metric, chunk_size=2
    )
    v = th.ones(sum(p.numel() for p in parameters), dtype=th.float64)
    product(v)
    with th.no_grad():
        parameters[0].mul_(-2.0)
    expected = fisher_matrix(model(observations), parameters, case.outcomes)
    np.testing.assert_allclose(product(v).numpy(), expected @ v.numpy(), rtol=0.0, atol=1e-12)


class Saved:
    """What autograd keeps of a tensor: it lives exactly as long as the graph."""

    def __init__(self, tensor: th.Tensor) -> None:
        self.tensor = tensor


def test_one_graph_of_a_chunk_lives_at_a_time() -> None:
    model, observations, parameters, case = build("gaussian")
    alive: weakref.WeakSet[Saved] = weakref.WeakSet()
    before_chunk: list[int] = []
    after_chunk: list[int] = []

    def pack(tensor: th.Tensor) -> Saved:
        saved = Saved(tensor.detach())
        alive.add(saved)
        return saved

    def unpack(saved: Saved) -> th.Tensor:
        return saved.tensor

    def outputs_of(rows: slice) -> th.Tensor:
        before_chunk.append(len(alive))
        out: th.Tensor = model(observations[rows])
        after_chunk.append(len(alive))
        return out

    product = ChunkedFisherVectorProduct(outputs_of, BATCH, parameters, case.metric, chunk_size=2)
    v = th.ones(sum(p.numel() for p in parameters), dtype=th.float64)
    gc.disable()  # freed by reference counting alone, not some time later
    try:
        with th.autograd.graph.saved_tensors_hooks(pack, unpack):
            product(v)
            product(v)
        assert len(alive) == 0
    finally:
        gc.enable()
    assert before_chunk == [0] * 6
    assert min(after_chunk) > 0


def test_works_without_ambient_gradients_and_leaves_none_behind() -> None:
    model, observations, parameters, case = build("gaussian")
    outputs = model(observations)
    expected = fisher_matrix(outputs, parameters, case.outcomes)
    v = th.ones(len(expected), dtype=th.float64, requires_grad=True)
    for enabled in (False, True):
        with th.set_grad_enabled(enabled):
            whole = FisherVectorProduct(outputs, parameters, case.metric, damping=1.0)(v)
            chunked = ChunkedFisherVectorProduct(
                lambda rows: model(observations[rows]), BATCH, parameters, case.metric, chunk_size=3, damping=1.0
            )(v)
        for result in (whole, chunked):
            assert not result.requires_grad
            np.testing.assert_allclose(result.numpy(), expected.sum(axis=1) + 1.0, rtol=0.0, atol=1e-12)
    assert v.grad is None
    assert all(p.grad is None for p in parameters)
    flatten(th.autograd.grad(outputs.sum(), parameters))  # the graph of outputs is still there


def test_model_is_called_once_for_any_number_of_products() -> None:
    model, observations, parameters, case = build("bernoulli")
    calls: list[int] = []
    model.register_forward_hook(lambda *_: calls.append(1))
    product = FisherVectorProduct(model(observations), parameters, case.metric)
    v = th.ones(sum(p.numel() for p in parameters), dtype=th.float64)
    assert product(v).equal(product(v))
    assert len(calls) == 1


def test_wrong_arguments() -> None:
    model, observations, parameters, case = build("categorical")
    outputs = model(observations)
    with pytest.raises(ValueError, match=r"outputs has the shape \(5,\)"):
        FisherVectorProduct(outputs[:, 0], parameters, case.metric)
    with pytest.raises(ValueError, match=r"outputs has the shape \(0, 3\)"):
        FisherVectorProduct(outputs[:0], parameters, case.metric)
    with pytest.raises(ValueError, match=r"outputs\.requires_grad=False"):
        FisherVectorProduct(outputs.detach(), parameters, case.metric)
    with pytest.raises(ValueError, match="parameters="):
        FisherVectorProduct(outputs, [], case.metric)
    for damping in (-0.1, math.nan, math.inf):
        with pytest.raises(ValueError, match=f"damping={damping}"):
            FisherVectorProduct(outputs, parameters, case.metric, damping=damping)
    v = th.ones(sum(p.numel() for p in parameters), dtype=th.float64)
    with pytest.raises(ValueError, match=r"flat has the shape"):
        FisherVectorProduct(outputs, parameters, case.metric)(v[1:])
    with pytest.raises(ValueError, match=r"metric returned the shape \(5,\)"):
        FisherVectorProduct(outputs, parameters, lambda params, tangent: tangent.sum(dim=1))(v)


def test_wrong_arguments_of_the_chunked_product() -> None:
    model, observations, parameters, case = build("categorical")

    def make(
        outputs_of: Callable[[slice], th.Tensor] = lambda rows: model(observations[rows]),
        n_rows: int = BATCH,
        chunk_size: int = 2,
        damping: float = 0.0,
        some: Sequence[th.Tensor] = parameters,
    ) -> ChunkedFisherVectorProduct:
        return ChunkedFisherVectorProduct(outputs_of, n_rows, some, case.metric, chunk_size=chunk_size, damping=damping)

    with pytest.raises(ValueError, match="n_rows=0"):
        make(n_rows=0)
    with pytest.raises(ValueError, match="chunk_size=0"):
        make(chunk_size=0)
    with pytest.raises(ValueError, match=r"damping=-1\.0"):
        make(damping=-1.0)
    with pytest.raises(ValueError, match="parameters="):
        make(some=[])
    v = th.ones(sum(p.numel() for p in parameters), dtype=th.float64)
    with pytest.raises(ValueError, match=r"outputs_of\(slice\(4, 6\)\) has 1 rows: it must have 2"):
        make(n_rows=6)(v)
    with pytest.raises(ValueError, match=r"outputs_of\(slice\(0, 2\)\) has 5 rows"):
        make(outputs_of=lambda rows: model(observations))(v)
