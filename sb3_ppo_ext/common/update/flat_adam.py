"""Adam on flat tensors: a step takes a few operations in all, instead of a few for each parameter."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch as th
from torch import nn

from sb3_ppo_ext.common.torch_internals import has_gradient_hooks, has_step_hooks, version_of


class FlatAdam:
    """
    The parameters of an Adam optimiser, their gradients and their moments, each in one flat tensor. A parameter group
    has several flat tensors if its parameters have made different numbers of steps.

    From construction to :meth:`restore` the parameters are views of :attr:`parameters`, backward passes add to their
    gradients in place, and :attr:`adam` makes the steps. :meth:`restore` gives the parameters their own memory back and
    the moments to the optimiser; the gradients of the last step stay where they are. On the CPU, convolution weights
    are stored channels last, as its convolutions need them.

    :param optimizer: an optimiser that :meth:`supports` accepts; it does not change until :meth:`restore`
    :param parameters: the optimiser's parameters that are updated
    """

    def __init__(self, optimizer: th.optim.Adam, parameters: Iterable[nn.Parameter]) -> None:
        self._optimizer = optimizer
        wanted = set(parameters)
        self._own: list[th.Tensor] = []
        self.members: list[list[nn.Parameter]] = []
        self.parameters: list[nn.Parameter] = []
        self.steps: list[float] = []
        self._sources: list[dict[str, Any]] = []
        groups: list[dict[str, Any]] = []
        for group in optimizer.param_groups:
            in_group = [p for p in group["params"] if p in wanted]
            counts = steps_made(optimizer, in_group)
            for count in sorted(set(counts)):
                members = [p for p, c in zip(in_group, counts, strict=True) if c == count]
                flat = nn.Parameter(_flat([p.detach() for p in members]))
                flat.grad = th.zeros_like(flat)
                self._own += [p.data for p in members]
                shapes = [p.shape for p in members]
                for p, data, grad in zip(members, pieces(flat.data, shapes), pieces(flat.grad, shapes), strict=True):
                    p.data, p.grad = data, grad
                self.members.append(members)
                self.parameters.append(flat)
                self.steps.append(count)
                groups.append({**group, "params": [flat]})
                self._sources.append(group)
        self.adam = th.optim.Adam(groups) if groups else th.optim.Adam([nn.Parameter(th.empty(0))])
        for flat, members in zip(self.parameters, self.members, strict=True):
            states = [optimizer.state.get(p) or _first_state(p) for p in members]
            moments = {name: _flat([state[name] for state in states]) for name in ("exp_avg", "exp_avg_sq")}
            self.adam.state[flat] = {"step": states[0]["step"].clone(), **moments}
        self._ids = {id(p) for members in self.members for p in members}

    @staticmethod
    def supports(optimizer: th.optim.Optimizer, parameters: Sequence[nn.Parameter]) -> bool:
        """
        Whether a flat step changes each parameter as the optimiser would.

        :param optimizer: any optimiser of the parameters
        :param parameters: the parameters that are updated
        """
        if type(optimizer) is not th.optim.Adam or "step" in vars(optimizer):
            return False
        if has_step_hooks(optimizer):
            return False
        # Coupled weight decay would also change parameters without a gradient.
        if any(not group["fused"] or group["amsgrad"] or group["weight_decay"] for group in optimizer.param_groups):
            return False
        in_groups = [id(p) for group in optimizer.param_groups for p in group["params"]]
        if len(in_groups) != len(set(in_groups)) or not {id(p) for p in parameters} <= set(in_groups):
            return False
        # A backward pass may be repeated, but a hook must run only once.
        if has_gradient_hooks(parameters):
            return False
        return len({(p.device, p.dtype) for p in parameters}) == 1

    def __contains__(self, parameter: th.Tensor) -> bool:
        return id(parameter) in self._ids

    def learning_rates(self) -> list[float | th.Tensor]:
        """The optimiser's current learning rate for each of :attr:`parameters`."""
        return [group["lr"] for group in self._sources]

    def take_learning_rates(self) -> None:
        """Take the learning rates from the optimiser, as they may change between two steps."""
        for group, source in zip(self.adam.param_groups, self._sources, strict=False):
            group["lr"] = source["lr"]

    def zero_grad(self) -> None:
        for flat in self.parameters:
            assert flat.grad is not None
            flat.grad.zero_()
        self._versions = [version_of(flat.grad) for flat in self.parameters if flat.grad is not None]

    def all_have_gradients(self) -> bool:
        """Whether the backward pass since :meth:`zero_grad` reached every parameter: it writes once into each piece."""
        return all(
            flat.grad is not None and version_of(flat.grad) - version == len(members)
            for flat, version, members in zip(self.parameters, self._versions, self.members, strict=True)
        )

    def restore(self) -> None:
        """Give the parameters their own memory back, and the moments to the optimiser."""
        own = iter(self._own)
        with th.no_grad():
            for flat, members, count in zip(self.parameters, self.members, self.steps, strict=True):
                state = self.adam.state[flat]
                shapes = [p.shape for p in members]
                moments = (pieces(state[name], shapes) for name in ("exp_avg", "exp_avg_sq"))
                has_made_steps = state["step"].item() != count
                for p, exp_avg, exp_avg_sq in zip(members, *moments, strict=True):
                    p.data = next(own).copy_(p.data)
                    if not has_made_steps:
                        continue
                    self._optimizer.state[p] = {
                        "step": state["step"].clone(),
                        "exp_avg": th.empty_like(p).copy_(exp_avg),
                        "exp_avg_sq": th.empty_like(p).copy_(exp_avg_sq),
                    }


def steps_made(optimizer: th.optim.Optimizer, parameters: Iterable[nn.Parameter]) -> list[float]:
    """
    The number of steps that an Adam optimiser has made for each parameter.

    :param optimizer: Adam
    :param parameters: parameters of the optimiser
    """
    steps = [th.as_tensor(optimizer.state[p]["step"] if p in optimizer.state else 0.0) for p in parameters]
    if len({step.device for step in steps}) > 1:
        steps = [step.cpu() for step in steps]
    counts: list[float] = th.stack(steps).float().tolist() if steps else []  # in one read: each waits for the GPU
    return counts


def pieces(flat: th.Tensor, shapes: Sequence[th.Size]) -> Iterator[th.Tensor]:
    """
    Views of a flat tensor.

    :param flat: shape ``(n,)``
    :param shapes: shapes of the tensors that it was made of, with n elements in all
    """
    for piece, shape in zip(th.split(flat, [shape.numel() for shape in shapes]), shapes, strict=True):
        if _is_convolution(shape, flat.device):
            n_out, n_in, height, width = shape
            yield piece.view(n_out, height, width, n_in).permute(0, 3, 1, 2)
        else:
            yield piece.view(shape)


def _flat(tensors: Sequence[th.Tensor]) -> th.Tensor:
    return th.cat([(x.permute(0, 2, 3, 1) if _is_convolution(x.shape, x.device) else x).flatten() for x in tensors])


def _is_convolution(shape: th.Size, device: th.device) -> bool:
    return len(shape) == 4 and device.type == "cpu"


def _first_state(p: nn.Parameter) -> dict[str, th.Tensor]:
    """Adam's state before the first step."""
    step = th.zeros((), dtype=th.float32, device=p.device)
    return {"step": step, "exp_avg": th.zeros_like(p.data), "exp_avg_sq": th.zeros_like(p.data)}
