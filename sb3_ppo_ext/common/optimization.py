"""One gradient step: gradients, clipping of their norm, optimiser."""

from __future__ import annotations

from collections.abc import Sequence

import torch as th


def use_fused_adam(optimizer: th.optim.Optimizer) -> None:
    """
    Let Adam update all parameters in one kernel, where torch was left to choose how and can.

    :param optimizer: any; one that is not Adam, or whose user chose ``fused``, ``foreach``, ``capturable`` or
        ``differentiable``, stays as it is
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
            if state:  # the fused kernel wants its step count where the parameter is
                state["step"] = state["step"].to(parameter.device)


def gradient_step(
    loss: th.Tensor,
    optimizer: th.optim.Optimizer,
    parameters: Sequence[th.Tensor],
    *,
    max_grad_norm: float,
) -> th.Tensor:
    """
    Descend the gradient of a loss, its norm clipped.

    :param loss: to be minimised, a scalar
    :param optimizer: of the parameters
    :param parameters: whose joint gradient norm is clipped
    :param max_grad_norm: the largest norm that is let through
    :return: the norm before clipping, a scalar on the parameters' device
    """
    optimizer.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    return clip_and_step(optimizer, parameters, max_grad_norm=max_grad_norm)


def clip_and_step(optimizer: th.optim.Optimizer, parameters: Sequence[th.Tensor], *, max_grad_norm: float) -> th.Tensor:
    """
    The second half of :func:`gradient_step`, for gradients that are there already.

    :param optimizer: of the parameters
    :param parameters: whose joint gradient norm is clipped
    :param max_grad_norm: the largest norm that is let through
    :return: the norm before clipping, a scalar on the parameters' device
    """
    grad_norm = th.nn.utils.clip_grad_norm_(parameters, max_grad_norm)
    optimizer.step()
    return grad_norm
