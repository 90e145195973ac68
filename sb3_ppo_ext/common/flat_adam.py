"""Adam on parameters that lie side by side: a step is a few operations, not a few for each parameter."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch as th
from torch import nn


class FlatAdam:
    """
    The parameters of an Adam optimiser, their gradients and moments, in one tensor each for a parameter group.

    From construction to :meth:`restore` the parameters are views of :attr:`parameters`, and backward passes add to
    their gradients in place; :attr:`adam` makes the steps. Then they have their own memory again, and the optimiser
    has the moments. Convolution weights lie channels last, which is what the CPU's convolutions compute with.

    :param optimizer: as :meth:`serves` wants it; it is left alone until :meth:`restore`
    :param parameters: what is to be updated, among the optimiser's
    """

    def __init__(self, optimizer: th.optim.Adam, parameters: Iterable[nn.Parameter]) -> None:
        self._optimizer = optimizer
        wanted = set(parameters)
        self._members: list[list[nn.Parameter]] = []
        self._own: list[th.Tensor] = []
        self.parameters: list[nn.Parameter] = []
        groups = []
        for group in optimizer.param_groups:
            members = [p for p in group["params"] if p in wanted]
            if not members:
                continue
            flat = nn.Parameter(_flat([p.detach() for p in members]))
            flat.grad = th.zeros_like(flat)
            self._own += [p.data for p in members]
            for p, data, grad in zip(members, _pieces(flat.data, members), _pieces(flat.grad, members), strict=True):
                p.data, p.grad = data, grad
            self._members.append(members)
            self.parameters.append(flat)
            groups.append({**group, "params": [flat]})
        self.adam = th.optim.Adam(groups)
        for flat, members in zip(self.parameters, self._members, strict=True):
            if members[0] in optimizer.state:
                states = [optimizer.state[p] for p in members]
                moments = {name: _flat([state[name] for state in states]) for name in ("exp_avg", "exp_avg_sq")}
                self.adam.state[flat] = {"step": states[0]["step"].clone(), **moments}

    @staticmethod
    def serves(optimizer: th.optim.Optimizer, parameters: Sequence[nn.Parameter]) -> bool:
        """
        Whether a flat step does to each parameter what the optimiser would do.

        :param optimizer: any
        :param parameters: what is to be updated, among the optimiser's
        """
        if type(optimizer) is not th.optim.Adam or "step" in vars(optimizer):
            return False
        if optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks:
            return False
        # Without a gradient a parameter keeps its weight, where a flat one would still decay.
        if any(not group["fused"] or group["amsgrad"] or group["weight_decay"] for group in optimizer.param_groups):
            return False
        counts = {float(optimizer.state[p]["step"]) if p in optimizer.state else 0.0 for p in parameters}
        return len(counts) == 1 and len({(p.device, p.dtype) for p in parameters}) == 1

    def zero_grad(self) -> None:
        for flat in self.parameters:
            assert flat.grad is not None
            flat.grad.zero_()

    def restore(self) -> None:
        """Give the parameters their own memory back, and the moments to the optimiser."""
        own = iter(self._own)
        with th.no_grad():
            for flat, members in zip(self.parameters, self._members, strict=True):
                for p in members:
                    p.data, p.grad = next(own).copy_(p.data), None
                state = self.adam.state.get(flat)
                if state:
                    moments = (_pieces(state[name], members) for name in ("exp_avg", "exp_avg_sq"))
                    for p, exp_avg, exp_avg_sq in zip(members, *moments, strict=True):
                        self._optimizer.state[p] = {
                            "step": state["step"].clone(),
                            "exp_avg": th.empty_like(p).copy_(exp_avg),
                            "exp_avg_sq": th.empty_like(p).copy_(exp_avg_sq),
                        }


def _is_convolution(p: th.Tensor) -> bool:
    return p.dim() == 4 and p.device.type == "cpu"


def _flat(tensors: Sequence[th.Tensor]) -> th.Tensor:
    return th.cat([(x.permute(0, 2, 3, 1) if _is_convolution(x) else x).flatten() for x in tensors])


def _pieces(flat: th.Tensor, like: Sequence[th.Tensor]) -> Iterator[th.Tensor]:
    """Views of a flat tensor, in the shapes of the tensors that it was made of."""
    for piece, p in zip(th.split(flat, [p.numel() for p in like]), like, strict=True):
        if _is_convolution(p):
            n_out, n_in, height, width = p.shape
            yield piece.view(n_out, height, width, n_in).permute(0, 3, 1, 2)
        else:
            yield piece.view(p.shape)
