"""What every loss does with its arguments before it computes: check them, and blank what the mask excludes."""

from __future__ import annotations

import math

import torch as th

# A hyper-parameter: a schedule enters a compiled graph as a 0-d tensor, since a new float would recompile it.
Scalar = float | th.Tensor


def check_same_shape(**tensors: th.Tensor | None) -> None:
    """
    Refuse tensors that torch would silently broadcast against each other.

    :param tensors: by argument name; the first one sets the shape, None stands for an argument that was not given
    :raises ValueError: if a shape differs from the first one's
    """
    arguments = iter(tensors.items())
    reference_name, reference = next(arguments)
    assert reference is not None
    for name, tensor in arguments:
        if tensor is not None and tensor.shape != reference.shape:
            raise ValueError(
                f"{name} must have the shape of {reference_name}, {tuple(reference.shape)}, got {tuple(tensor.shape)}"
            )


def check_scalar(
    name: str, value: Scalar | None, *, minimum: float = 0.0, exclusive: bool = False, finite: bool = False
) -> None:
    """
    Refuse a hyper-parameter that is out of range.

    The value of a tensor is not looked at, since that would wait for the device.

    :param name: of the argument
    :param value: a number, a 0-d tensor, or None for "not given"
    :param minimum: the smallest value allowed
    :param exclusive: whether ``minimum`` itself is refused
    :param finite: whether infinity is refused
    :raises ValueError: if a number is out of range (NaN always is) or a tensor is not 0-d
    """
    if value is None:
        return
    if isinstance(value, th.Tensor):
        if value.dim() != 0:
            raise ValueError(f"{name} must be a number or a 0-d tensor, got a tensor of shape {tuple(value.shape)}")
        return
    in_range = value > minimum if exclusive else value >= minimum
    if not in_range or (finite and value == math.inf):
        relation = ">" if exclusive else ">="
        raise ValueError(f"{name} must be {relation} {minimum}{' and finite' if finite else ''}, got {value}")


def zero_outside(mask: th.Tensor | None, *tensors: th.Tensor) -> tuple[th.Tensor, ...]:
    """
    Put 0 where the mask excludes an element.

    To be applied to inputs: a ``th.where`` on a result hides a NaN from the value, but the gradient of what lies before
    it is still 0 * NaN = NaN.

    :param mask: 1 or True where an element counts, or None if all do
    :param tensors: each of the mask's shape
    :return: the tensors, in the same order
    """
    if mask is None:
        return tensors
    keep = mask.bool()
    return tuple(th.where(keep, tensor, 0.0) for tensor in tensors)
