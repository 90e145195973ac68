"""Conversion between a list of parameters and one vector, in the order of the list."""

from __future__ import annotations

from collections.abc import Sequence

import torch as th


def flatten(tensors: Sequence[th.Tensor]) -> th.Tensor:
    """
    Concatenate tensors into a new vector.

    :param tensors: at least one tensor, of any shapes
    :return: shape ``(n,)``, n being the number of elements of all tensors
    :raises ValueError: if there is no tensor
    """
    if len(tensors) == 0:
        raise ValueError("tensors=[] is empty: at least one tensor is needed")
    return th.cat([tensor.reshape(-1) for tensor in tensors])


def unflatten_like(flat: th.Tensor, tensors: Sequence[th.Tensor]) -> list[th.Tensor]:
    """
    Cut a vector into pieces of the shapes of ``tensors``: the inverse of :func:`flatten`.

    :param flat: shape ``(n,)``, n being the number of elements of all tensors
    :param tensors: tensors that have the wanted shapes
    :return: one view of ``flat`` for each of ``tensors``
    :raises ValueError: if ``flat`` has another shape
    """
    sizes = [tensor.numel() for tensor in tensors]
    if flat.shape != (sum(sizes),):
        raise ValueError(
            f"flat has the shape {tuple(flat.shape)}: it must be {(sum(sizes),)}, as tensors have elements"
        )
    return [piece.view(tensor.shape) for piece, tensor in zip(flat.split_with_sizes(sizes), tensors, strict=True)]


def flat_grad(
    output: th.Tensor,
    parameters: Sequence[th.Tensor],
    *,
    grad_output: th.Tensor | None = None,
    retain_graph: bool | None = None,
    create_graph: bool = False,
) -> th.Tensor:
    """
    Gradient of ``output`` as one vector, with zeros for parameters that ``output`` does not depend on.

    :param output: tensor to differentiate; part of an autograd graph
    :param parameters: at least one tensor that requires grad
    :param grad_output: the vector of a vector-Jacobian product, of the shape of ``output``;
        may be left out if ``output`` has a single element
    :param retain_graph: keep the graph for another call; default: the value of ``create_graph``
    :param create_graph: make the gradient differentiable
    :return: shape ``(n,)``, n being the number of elements of all parameters
    :raises ValueError: if there are no parameters
    """
    grads = th.autograd.grad(
        output,
        parameters,
        grad_output,
        retain_graph=retain_graph,
        create_graph=create_graph,
        allow_unused=True,
        materialize_grads=True,
    )
    return flatten(grads)


@th.no_grad()
def assign_flat_(parameters: Sequence[th.Tensor], flat: th.Tensor) -> None:
    """
    Write a vector into parameters, in place; they stay the same tensors with the same storage.

    :param parameters: tensors to overwrite
    :param flat: shape ``(n,)``, n being the number of elements of all parameters
    :raises ValueError: if ``flat`` has another shape; nothing is written then
    """
    for parameter, values in zip(parameters, unflatten_like(flat, parameters), strict=True):
        parameter.copy_(values)
