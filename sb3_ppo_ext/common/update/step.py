"""One gradient step: backward pass, clipping of the gradient norm, and the optimiser's step."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch as th
from torch import nn

from sb3_ppo_ext.common.errors import NonFiniteError
from sb3_ppo_ext.common.rollout.data import RolloutSamples, rows_of
from sb3_ppo_ext.common.torch_internals import fused_step
from sb3_ppo_ext.common.update.flat_adam import FlatAdam
from sb3_ppo_ext.common.update.objective import Coefficients, Statistics
from sb3_ppo_ext.common.update.reduce import Reducer
from sb3_ppo_ext.common.update.step_message import StepMessage


class MinibatchStep(Protocol):
    """
    A gradient step on the loss of a minibatch. Call it inside its ``with`` block, where it may hold the parameters in
    memory of its own; after the block, the policy and its optimiser hold the result.
    """

    names: tuple[str, ...]
    """The names of the statistics that a step returns; known after the first step."""

    def __enter__(self) -> object: ...

    def __call__(self, rollout: RolloutSamples, rows: th.Tensor | None, coefficients: Mapping[str, float]) -> th.Tensor:
        """
        Make one step, unless the gradient is not finite.

        :param rollout: the samples from which the minibatch is taken
        :param rows: the rows of the minibatch; None: all
        :param coefficients: the coefficients of the loss; ``max_grad_norm``, the largest norm of the gradient; and
            optionally ``kl_limit``: if the statistic ``approx_kl`` exceeds it, no step is made
        :return: the statistics of the loss and ``grad_norm``, the norm before clipping (0 if ``kl_limit`` was
            exceeded), in one tensor of shape ``(len(names),)``
        """
        ...

    def __exit__(self, *exception: object) -> None: ...


class _Step(NamedTuple):
    """The optimiser of a step, its parameters, and whether to clip their gradients in place."""

    optimizer: th.optim.Optimizer
    parameters: Sequence[th.Tensor]
    clips_in_place: bool


class EagerStep:
    """
    A step that is not compiled.

    If the optimiser allows it, parameters, gradients and moments are kept in flat tensors (:class:`FlatAdam`), as long
    as the same parameters get gradients in each minibatch. As in SB3, a parameter without a gradient does not change,
    and neither do its moments. So if the parameters with gradients change, the rest of the update is made tensor by
    tensor.

    :param optimizer: the policy's optimiser
    :param parameters: the parameters to update; their gradients are clipped together
    :param loss: the loss of a minibatch, to be minimised
    :param reducer: combines the gradients of several processes, before they are clipped
    """

    def __init__(
        self,
        optimizer: th.optim.Optimizer,
        parameters: Sequence[nn.Parameter],
        loss: Callable[[RolloutSamples, Coefficients], tuple[th.Tensor, Statistics]],
        reducer: Reducer,
    ) -> None:
        self._parameters = list(parameters)
        updated = set(parameters)
        others = any(p not in updated for group in optimizer.param_groups for p in group["params"])
        self._inputs = self._parameters if others else None  # None is faster than a list of all parameters
        self._optimizer = optimizer
        self._loss = loss
        self._reducer = reducer
        self._message: StepMessage | None = None
        self._flat: FlatAdam | None = None
        self.names: tuple[str, ...] = ()

    def __enter__(self) -> object:
        use_fused_adam(self._optimizer)
        self._optimizer.zero_grad()  # or each step would apply gradients that were there before
        # cuDNN wants the weights of a recurrent layer in one block of memory; otherwise it copies them at each call.
        share_memory = len({p.untyped_storage().data_ptr() for p in self._parameters}) < len(self._parameters)
        self._may_be_flat = not share_memory and FlatAdam.supports(self._optimizer, self._parameters)
        in_groups = [id(p) for group in self._optimizer.param_groups for p in group["params"]]
        self._clips_in_place = sorted(in_groups) != sorted(set(in_groups) | set(map(id, self._parameters)))
        return self

    def __exit__(self, *exception: object) -> None:
        self._leave_flat()

    def __call__(self, rollout: RolloutSamples, rows: th.Tensor | None, coefficients: Mapping[str, float]) -> th.Tensor:
        weight: int | th.Tensor = 0
        if not self._reducer.is_local:
            weight = n_counted(rollout, rows)
            rollout, rows = without_nothing(rollout, rows)
        loss, statistics = self._loss(rollout if rows is None else rollout.rows(rows), coefficients)
        self.names = (*statistics, "grad_norm")
        kl_limit = coefficients.get("kl_limit", math.inf)
        numbers = list(statistics.values())
        if self._reducer.is_local and self._is_above(kl_limit, numbers):
            return th.stack([*numbers, th.zeros_like(loss)])  # before the backward pass
        of_step = self._gradients(loss)
        of_all = None
        if not self._reducer.is_local:
            of_all = self._of_all(gradients_of(of_step.parameters), numbers, weight)
            if self._is_above(kl_limit, of_all):
                return th.cat([of_all, of_all.new_zeros(1)])
        grad_norm = clip_and_step(
            of_step.optimizer,
            of_step.parameters,
            max_grad_norm=coefficients["max_grad_norm"],
            in_place=of_step.clips_in_place,
        )
        with th.no_grad():
            return th.stack([*numbers, grad_norm]) if of_all is None else th.cat([of_all, grad_norm.view(1)])

    def _is_above(self, kl_limit: float, numbers: Sequence[th.Tensor] | th.Tensor) -> bool:
        return kl_limit < math.inf and numbers[self.names.index("approx_kl")].item() > kl_limit

    def _gradients(self, loss: th.Tensor) -> _Step:
        """Make a backward pass. Return the parameters that now have gradients, and the optimiser of their step."""
        if self._may_be_flat:
            if self._flat is None:
                self._make_flat(self._parameters)
            if self._has_flat_gradients(loss):
                assert self._flat is not None
                self._flat.take_learning_rates()
                return _Step(self._flat.adam, self._flat.parameters, clips_in_place=False)
            self._take_gradients_from_flat(loss)
        else:
            self._optimizer.zero_grad()
            loss.backward(inputs=self._inputs)  # type: ignore[no-untyped-call]
        return _Step(self._optimizer, self._parameters, self._clips_in_place)

    @th.no_grad()
    def _of_all(
        self, gradients: Sequence[th.Tensor], numbers: Sequence[th.Tensor], weight: int | th.Tensor
    ) -> th.Tensor:
        """Replace the gradients by their means over the processes, and return the statistics of all processes."""
        if self._message is None or self._message.names != self.names[:-1]:
            self._message = StepMessage(self._reducer, self.names[:-1], numbers[0].device)
        total = self._reducer.summed(self._message.written(gradients, th.stack(list(numbers)), weight))
        sums, weight_of_all, statistics = self._message.read(total, gradients)
        for gradient, of_all in zip(gradients, sums, strict=True):
            th.div(of_all, weight_of_all, out=gradient)
        return statistics

    def _make_flat(self, parameters: Sequence[nn.Parameter]) -> None:
        assert isinstance(self._optimizer, th.optim.Adam)
        self._flat = FlatAdam(self._optimizer, parameters)
        self._outside = [p for p in self._parameters if p not in self._flat]
        self._has_made_flat_steps = False

    def _leave_flat(self) -> None:
        if self._flat is not None:
            self._flat.restore()
            self._flat = None

    def _has_flat_gradients(self, loss: th.Tensor) -> bool:
        """
        Make a backward pass into the flat gradients.

        :return: whether it reached exactly the flat parameters, so that a flat step is right
        """
        assert self._flat is not None
        self._flat.zero_grad()
        # The first pass keeps the graph, because a second one may be needed. Later passes free its memory as they go.
        loss.backward(inputs=self._inputs, retain_graph=not self._has_made_flat_steps)  # type: ignore[no-untyped-call]
        if self._flat.all_have_gradients() and not any(p.grad is not None for p in self._outside):
            self._has_made_flat_steps = True
            return True
        if self._has_made_flat_steps or self._outside:
            return False
        self._leave_flat()  # start again with the parameters that the loss reaches
        self._optimizer.zero_grad()
        self._make_flat(reached(loss, self._parameters))
        return self._has_flat_gradients(loss)

    def _take_gradients_from_flat(self, loss: th.Tensor) -> None:
        """Stop using flat steps, as this pass has reached other parameters; keep the gradients that it computed."""
        gradients = [(p, p.grad) for p in leaves_of(loss, self._parameters) if p.grad is not None]
        self._leave_flat()
        self._may_be_flat = False
        self._optimizer.zero_grad()
        for parameter, gradient in gradients:
            parameter.grad = gradient.clone()


def n_counted(rollout: RolloutSamples, rows: th.Tensor | None) -> int | th.Tensor:
    """
    How many samples of a minibatch count.

    :param rollout: the samples from which the minibatch is taken
    :param rows: the rows of the minibatch; None: all
    """
    if rollout.mask is None:
        return rollout.returns.shape[0] if rows is None else rows.shape[0] * rollout.length
    return (rollout.mask if rows is None else rows_of(rollout.mask, rows, rollout.length)).sum()


def without_nothing(rollout: RolloutSamples, rows: th.Tensor | None) -> tuple[RolloutSamples, th.Tensor | None]:
    """
    Replace an empty minibatch, which a process with fewer samples may get, by one sample that does not count.

    :param rollout: the samples from which the minibatch is taken
    :param rows: the rows of the minibatch; None: all
    """
    return (rollout, rows) if rows is None or rows.shape[0] else (rollout.padded(rows, 1), None)


def reached(output: th.Tensor, parameters: Iterable[nn.Parameter]) -> list[nn.Parameter]:
    """
    The parameters that a tensor depends on, by its autograd graph.

    :param output: a tensor with its graph, which is kept
    :param parameters: candidates
    :return: the candidates that require grad and that the graph reaches, in their order
    """
    candidates = [parameter for parameter in parameters if parameter.requires_grad]
    if not candidates or not output.requires_grad:
        return []
    grads = th.autograd.grad(output.sum(), candidates, retain_graph=True, allow_unused=True)
    return [parameter for parameter, grad in zip(candidates, grads, strict=True) if grad is not None]


def leaves_of(output: th.Tensor, parameters: Iterable[nn.Parameter]) -> list[nn.Parameter]:
    """
    Like :func:`reached`, but without a backward pass: the graph's buffers may have been freed.

    :param output: a tensor with its graph
    :param parameters: candidates
    """
    nodes, found = [output.grad_fn], set()
    seen = set(nodes)
    while nodes:
        node: Any = nodes.pop()
        found.add(id(getattr(node, "variable", None)))
        following = {child for child, _ in getattr(node, "next_functions", ())} - seen
        seen |= following
        nodes += following
    return [parameter for parameter in parameters if id(parameter) in found]


def gradients_of(parameters: Iterable[th.Tensor]) -> list[th.Tensor]:
    """
    The gradients of the parameters that have one.

    :param parameters: leaves of the autograd graph
    """
    return [parameter.grad for parameter in parameters if parameter.grad is not None]


def clip_and_step(
    optimizer: th.optim.Optimizer, parameters: Iterable[th.Tensor], *, max_grad_norm: float, in_place: bool = False
) -> th.Tensor:
    """
    Clip the gradients, and make the optimiser's step unless they are not finite.

    :param optimizer: the optimiser of the parameters
    :param parameters: the parameters whose joint gradient norm is clipped; those without a gradient are skipped
    :param max_grad_norm: the largest norm after clipping
    :param in_place: whether to clip in a pass of its own, before the step. The fused kernel, which does both, would
        clip twice where a parameter is in two groups, and not at all where it is in none
    :return: the norm before clipping, a scalar on the parameters' device
    """
    if in_place or not all(group.get("fused") for group in optimizer.param_groups):
        grad_norm: th.Tensor = th.nn.utils.clip_grad_norm_(parameters, max_grad_norm)
        if math.isfinite(grad_norm.item()):
            optimizer.step()
        return grad_norm

    # The fused kernel can divide the gradients by a number (meant for loss scaling).
    grads = [gradient.flatten() for gradient in gradients_of(parameters)]
    grad_norm = th.linalg.vector_norm(grads[0] if len(grads) == 1 else th.cat(grads))
    scale = ((grad_norm + 1e-6) / max_grad_norm).clamp(min=1.0)
    if grad_norm.device.type == "cuda":
        # With found_inf=1 the kernel changes nothing, so that the host need not wait for the norm.
        fused_step(optimizer, grad_scale=scale, found_inf=grad_norm.isfinite().logical_not().float())
    elif math.isfinite(grad_norm.item()):
        fused_step(optimizer, grad_scale=scale)
    return grad_norm


def raise_if_not_finite(history: Mapping[str, Sequence[float]]) -> None:
    """
    Check the statistics of an update.

    :param history: one number per minibatch for each statistic; ``grad_norm`` has one for each step that was due
    :raises NonFiniteError: if any is NaN or infinite; it names them and the first minibatch, and says how many steps
        were made nevertheless
    """
    first = {
        name: next(i for i, value in enumerate(series) if not math.isfinite(value))
        for name, series in history.items()
        if not all(map(math.isfinite, series))
    }
    if first:
        names = ", ".join(f"{name}={history[name][i]}" for name, i in first.items())
        due = history["grad_norm"]
        n_made = sum(map(math.isfinite, due))
        if n_made == 0:
            steps = "No step of this update was made: the policy is as it was before it"
        elif n_made == len(due):
            steps = (
                f"The gradients were finite: all {n_made} steps of this update were made, and the policy has changed"
            )
        else:
            steps = (
                f"The {len(due) - n_made} steps with such a gradient were not made; the other {n_made} of this update "
                "were, and the policy has changed"
            )
        raise NonFiniteError(
            f"Not finite, first in minibatch {min(first.values())} of the update: {names}. {steps}. Look for NaN or "
            "infinite rewards and observations, and for a learning rate that is too large"
        )


def use_fused_adam(optimizer: th.optim.Optimizer) -> None:
    """
    Let Adam update all parameters in one fused kernel, if the user left that choice to torch and torch can do it.

    :param optimizer: any optimiser; it stays as it is if it is neither Adam nor AdamW, or if the user set ``fused``,
        ``foreach``, ``capturable`` or ``differentiable``
    """
    if type(optimizer) not in (th.optim.Adam, th.optim.AdamW):
        return
    for group in optimizer.param_groups:
        chosen = group["fused"] is not None or group["foreach"] is not None
        supported = all(p.device.type in ("cpu", "cuda") and p.is_floating_point() for p in group["params"])
        if chosen or group["capturable"] or group["differentiable"] or not supported:
            continue
        group["fused"] = True
        for parameter in group["params"]:
            state = optimizer.state.get(parameter)
            if state:  # the fused kernel needs the step count on the parameter's device
                state["step"] = state["step"].to(parameter.device)
