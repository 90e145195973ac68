"""
The eager gradient step of a minibatch, against torch's own Adam and ``clip_grad_norm_``, worked out by hand.

Two steps are made of the same losses: one by :class:`EagerStep`, one by the few lines of :func:`plain_step`.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch as th
from torch import nn

from sb3_ppo_ext.common.rollout.data import RolloutSamples
from sb3_ppo_ext.common.update.reduce import OneProcess
from sb3_ppo_ext.common.update.step import EagerStep

NO_LIMIT = {"max_grad_norm": math.inf}


class Net(nn.Module):
    """Two layers, of which the second takes part where the input's last number is positive, and a lonely number."""

    def __init__(self) -> None:
        super().__init__()
        th.manual_seed(0)
        self.first, self.second = nn.Linear(3, 4), nn.Linear(3, 4)
        self.never_used = nn.Parameter(th.ones(2))

    def forward(self, x: th.Tensor) -> th.Tensor:
        y = self.first(x)
        return y + self.second(x).tanh() if x[0, -1] > 0.0 else y


def samples(*rows: Sequence[float]) -> RolloutSamples:
    """The observations; the returns are 1."""
    nothing = th.zeros(len(rows))
    return RolloutSamples(
        observations=th.tensor(rows),
        actions=nothing[:, None],
        old_values=nothing,
        old_log_prob=nothing,
        advantages=nothing,
        returns=th.ones(len(rows)),
        old_params=nothing[:, None],
    )


BOTH_LAYERS = samples([1.0, -2.0, 0.5], [3.0, 0.0, 0.5])
FIRST_LAYER = samples([1.0, -2.0, -0.5], [2.0, 0.0, -0.5])


def loss_of(net: Net, batch: RolloutSamples, scale: float = 1.0) -> th.Tensor:
    assert isinstance(batch.observations, th.Tensor)
    return scale * (net(batch.observations).sum(dim=1) - batch.returns).square().mean()


def plain_step(net: Net, optimizer: th.optim.Optimizer, batch: RolloutSamples, max_grad_norm: float) -> float:
    """As a text book has it."""
    optimizer.zero_grad()
    loss_of(net, batch).backward()
    norm = nn.utils.clip_grad_norm_(net.parameters(), max_grad_norm).item()
    optimizer.step()
    return norm


def eager_step(
    net: Net, optimizer: th.optim.Optimizer, loss: Callable[..., th.Tensor] = loss_of, parameters: Any = None
) -> EagerStep:
    def minibatch_loss(batch: RolloutSamples, coefficients: Any) -> tuple[th.Tensor, dict[str, th.Tensor]]:
        value = loss(net, batch, *([coefficients["scale"]] if "scale" in coefficients else []))
        return value, {"loss": value.detach(), "approx_kl": batch.old_log_prob.mean()}

    return EagerStep(
        optimizer, list(net.parameters()) if parameters is None else parameters, minibatch_loss, OneProcess()
    )


def pair(
    make_optimizer: Callable[..., th.optim.Optimizer],
) -> tuple[tuple[Net, th.optim.Optimizer], tuple[Net, th.optim.Optimizer]]:
    """The same network twice, each with an optimiser."""
    theirs, ours = Net(), Net()
    return (theirs, make_optimizer(theirs.parameters())), (ours, make_optimizer(ours.parameters()))


def assert_same(theirs: tuple[Net, th.optim.Optimizer], ours: tuple[Net, th.optim.Optimizer]) -> None:
    """Parameters, and the optimiser's state of each: the same numbers, and none where the other has none."""
    th.testing.assert_close(ours[0].state_dict(), theirs[0].state_dict(), atol=1e-6, rtol=1e-5)
    for (name, p), q in zip(theirs[0].named_parameters(), ours[0].parameters(), strict=True):
        state, our_state = theirs[1].state.get(p, {}), ours[1].state.get(q, {})
        assert state.keys() == our_state.keys(), name
        for key, number in state.items():
            th.testing.assert_close(th.as_tensor(our_state[key]), th.as_tensor(number), atol=1e-6, rtol=1e-5)


def adam(parameters: Any) -> th.optim.Optimizer:
    return th.optim.Adam(parameters, lr=0.02, eps=1e-5)


def adam_with_weight_decay(parameters: Any) -> th.optim.Optimizer:
    return th.optim.Adam(parameters, lr=0.02, weight_decay=0.1)


def momentum(parameters: Any) -> th.optim.Optimizer:
    return th.optim.SGD(parameters, lr=0.02, momentum=0.9)


# The first can have its parameters side by side, the others cannot.
OPTIMIZERS = pytest.mark.parametrize("make_optimizer", [adam, adam_with_weight_decay, momentum])


@OPTIMIZERS
@pytest.mark.parametrize("max_grad_norm", [math.inf, 0.5])
def test_steps_are_those_of_the_optimiser_on_clipped_gradients(make_optimizer: Any, max_grad_norm: float) -> None:
    theirs, ours = pair(make_optimizer)
    step = eager_step(*ours)
    for _ in range(2):  # two updates, of three minibatches each
        with step:
            for rows in (None, th.tensor([0]), th.tensor([1, 0])):
                batch = BOTH_LAYERS if rows is None else BOTH_LAYERS.rows(rows)
                expected = loss_of(theirs[0], batch).item()
                norm = plain_step(*theirs, batch, max_grad_norm)
                assert norm > 0.5  # the limit matters
                numbers = step(BOTH_LAYERS, rows, {"max_grad_norm": max_grad_norm})
                logged = dict(zip(step.names, numbers.tolist(), strict=True))
                assert logged == pytest.approx({"loss": expected, "approx_kl": 0.0, "grad_norm": norm}, rel=1e-4)
        assert_same(theirs, ours)
    assert ours[0].never_used.tolist() == [1.0, 1.0]
    assert ours[0].never_used not in ours[1].state


@OPTIMIZERS
def test_layers_that_take_part_in_some_minibatches_are_left_alone_in_the_others(make_optimizer: Any) -> None:
    """With their moments, which a gradient of zero would let shrink; in whatever order they come."""
    for batches in ((BOTH_LAYERS, FIRST_LAYER, BOTH_LAYERS), (FIRST_LAYER, BOTH_LAYERS, FIRST_LAYER)):
        theirs, ours = pair(make_optimizer)
        with (step := eager_step(*ours)):
            for batch in batches:
                plain_step(*theirs, batch, 0.5)
                step(batch, None, {"max_grad_norm": 0.5})
        assert_same(theirs, ours)


def test_the_result_is_in_the_tensors_that_were_there() -> None:
    _, (net, optimizer) = pair(adam)
    before = [p.data_ptr() for p in net.parameters()]
    with (step := eager_step(net, optimizer)):
        step(BOTH_LAYERS, None, NO_LIMIT)
    assert [p.data_ptr() for p in net.parameters()] == before
    assert all(p.is_leaf and p.requires_grad for p in net.parameters())


def test_only_the_parameters_that_are_named_are_changed_and_clipped() -> None:
    """As of a critic: the gradient of what else the loss depends on is not even computed."""
    (theirs, their_optimizer), (net, optimizer) = pair(adam)
    with (step := eager_step(net, optimizer, parameters=list(net.second.parameters()))):
        numbers = step(BOTH_LAYERS, None, {"max_grad_norm": 0.5})
    theirs.first.requires_grad_(False)
    norm = plain_step(theirs, their_optimizer, BOTH_LAYERS, 0.5)
    assert dict(zip(step.names, numbers.tolist(), strict=True))["grad_norm"] == pytest.approx(norm, rel=1e-5)
    assert_same((theirs, their_optimizer), (net, optimizer))
    assert net.first.weight.grad is None
    assert net.first.weight not in optimizer.state


@OPTIMIZERS
def test_a_gradient_that_was_left_somewhere_is_not_applied(make_optimizer: Any) -> None:
    """Nor does it stay there."""
    theirs, (net, optimizer) = pair(make_optimizer)
    for p in net.parameters():
        p.grad = th.full_like(p, 100.0)
    theirs[0].first.requires_grad_(False)
    plain_step(*theirs, BOTH_LAYERS, math.inf)
    with (step := eager_step(net, optimizer, parameters=list(net.second.parameters()))):
        step(BOTH_LAYERS, None, NO_LIMIT)
    assert_same(theirs, (net, optimizer))
    assert net.first.weight.grad is None


@OPTIMIZERS
def test_above_the_limit_of_the_kl_no_step_is_made(make_optimizer: Any) -> None:
    _, (net, optimizer) = pair(make_optimizer)
    batch = BOTH_LAYERS._replace(old_log_prob=th.tensor([0.2, 0.4]))  # its mean is what the loss calls approx_kl
    with (step := eager_step(net, optimizer)):
        before = copy.deepcopy(net.state_dict())
        numbers = step(batch, None, {**NO_LIMIT, "kl_limit": 0.29})
        assert dict(zip(step.names, numbers.tolist(), strict=True))["grad_norm"] == 0.0
        assert all(th.equal(before[name], tensor) for name, tensor in net.state_dict().items())
        assert not optimizer.state
        numbers = step(batch, None, {**NO_LIMIT, "kl_limit": 0.31})
        assert dict(zip(step.names, numbers.tolist(), strict=True))["grad_norm"] > 0.0
    assert not th.equal(before["first.weight"], net.first.weight)


@OPTIMIZERS
@pytest.mark.parametrize("scale", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_makes_no_step_and_the_next_one_does(make_optimizer: Any, scale: float) -> None:
    theirs, ours = pair(make_optimizer)
    step = eager_step(*ours)
    with step:
        for of_minibatch in (1.0, scale, 1.0):
            if of_minibatch == 1.0:
                plain_step(*theirs, BOTH_LAYERS, 0.5)
            numbers = step(BOTH_LAYERS, None, {"max_grad_norm": 0.5, "scale": of_minibatch})
            norm = dict(zip(step.names, numbers.tolist(), strict=True))["grad_norm"]
            assert math.isfinite(norm) == (of_minibatch == 1.0)
    assert_same(theirs, ours)


def test_a_learning_rate_that_changes_within_an_update_is_used_from_then_on() -> None:
    theirs, ours = pair(adam)
    with (step := eager_step(*ours)):
        for rate in (0.02, 0.5, 0.0):
            for _, optimizer in (theirs, ours):
                optimizer.param_groups[0]["lr"] = rate
            plain_step(*theirs, BOTH_LAYERS, math.inf)
            step(BOTH_LAYERS, None, NO_LIMIT)
    assert_same(theirs, ours)


def test_an_error_in_the_middle_leaves_the_steps_that_were_made() -> None:
    theirs, ours = pair(adam)

    def fails(*_: Any) -> th.Tensor:
        raise KeyboardInterrupt

    losses = iter([loss_of, fails])
    plain_step(*theirs, BOTH_LAYERS, math.inf)
    with (step := eager_step(*ours, loss=lambda *args: next(losses)(*args))):
        step(BOTH_LAYERS, None, NO_LIMIT)
        with pytest.raises(KeyboardInterrupt):
            step(BOTH_LAYERS, None, NO_LIMIT)
    assert_same(theirs, ours)
