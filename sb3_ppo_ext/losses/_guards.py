"""
What every loss does with its arguments first: check them, convert 16-bit tensors to float32, and zero the elements that
the mask excludes.
"""

from __future__ import annotations

import math
from numbers import Real
from typing import TypeVar, cast

import torch as th

# A hyper-parameter: a schedule enters a compiled graph as a 0-d tensor, since a new float would recompile it.
Scalar = float | th.Tensor
ScalarOrNone = TypeVar("ScalarOrNone", bound=Scalar | None)

_NARROW = (th.float16, th.bfloat16)
_NUMBERS = (Real, th.SymInt, th.SymFloat)  # the symbolic numbers occur while a graph is traced


def check_same_shape(**tensors: th.Tensor | None) -> None:
    """
    Refuse tensors that torch would silently broadcast against each other.

    :param tensors: tensors by argument name; the first one sets the shape, None is an argument that was not given
    :raises ValueError: if a shape differs from that of the first tensor
    """
    arguments = iter(tensors.items())
    reference_name, reference = next(arguments)
    assert reference is not None
    for name, tensor in arguments:
        if tensor is not None and tensor.shape != reference.shape:
            raise ValueError(
                f"{name} must have the shape of {reference_name}, {tuple(reference.shape)}, got {tuple(tensor.shape)}"
            )


def check_not_empty(**tensors: th.Tensor) -> None:
    """
    Refuse a tensor without elements, which has no minimum and no maximum.

    :param tensors: tensors by argument name
    :raises ValueError: if a tensor has no element
    """
    for name, tensor in tensors.items():
        if tensor.numel() == 0:
            raise ValueError(f"{name} must have at least one element, got a tensor of shape {tuple(tensor.shape)}")


def checked_scalar(
    name: str,
    value: ScalarOrNone,
    *,
    minimum: float = 0.0,
    maximum: float = math.inf,
    exclusive: bool = False,
    finite: bool = False,
    optional: bool = False,
) -> ScalarOrNone:
    """
    Refuse a hyper-parameter that is not a number or is out of range.

    The value of a tensor is not read, since the host would have to wait for the device.

    :param name: name of the argument
    :param value: a number, a 0-d tensor, or None for "not given" where that is allowed
    :param minimum: the smallest value allowed
    :param maximum: the largest value allowed
    :param exclusive: whether ``minimum`` itself is refused
    :param finite: whether infinity is refused
    :param optional: whether None is allowed
    :return: the value; a tensor of 16 bits in float32
    :raises ValueError: if the value is neither a number nor a tensor, is a number out of range (NaN always is), or is a
        tensor that is not 0-d
    """
    if value is None and optional:
        return value
    if isinstance(value, th.Tensor):
        if value.dim() != 0:
            raise ValueError(f"{name} must be a number or a 0-d tensor, got a tensor of shape {tuple(value.shape)}")
        return cast(ScalarOrNone, widened(value))
    given: object = value  # whatever the annotation says
    if isinstance(given, bool) or not isinstance(given, _NUMBERS):
        raise ValueError(f"{name} must be a number or a 0-d tensor, got {value!r}")
    number = cast(float, given)
    in_range = number > minimum if exclusive else number >= minimum
    if not in_range or number > maximum or (finite and number == math.inf):
        relation = ">" if exclusive else ">="
        and_finite = " and finite" if finite else ""
        and_at_most = f" and <= {maximum}" if maximum < math.inf else ""
        raise ValueError(f"{name} must be {relation} {minimum}{and_finite}{and_at_most}, got {value}")
    return value


def widened(tensor: th.Tensor) -> th.Tensor:
    """
    Convert a tensor of 16 bits to float32, and return any other unchanged. In 16 bits a ratio of e^12 overflows, and a
    sum of ones stops at 2048 (float16) or 256 (bfloat16).
    """
    return tensor.float() if tensor.dtype in _NARROW else tensor


def as_floats(tensor: th.Tensor) -> th.Tensor:
    """Convert integers and bools, of which torch takes no mean, to the default dtype; return others unchanged."""
    return tensor if tensor.is_floating_point() or tensor.is_complex() else tensor.to(th.get_default_dtype())


def prepared(mask: th.Tensor | None, *tensors: th.Tensor) -> tuple[th.Tensor, ...]:
    """
    Set the elements that the mask excludes to 0, and convert tensors of 16 bits to float32.

    This must be applied to the inputs: ``th.where`` on a result keeps a NaN out of the value, but its gradient with
    respect to the inputs is still 0 * NaN = NaN.

    :param mask: 1 or True where an element counts, or None if all do
    :param tensors: each of the mask's shape
    :return: the tensors, in the same order
    :raises ValueError: if the mask has other values, where they can be checked: see :func:`_check_mask`
    """
    if mask is None:
        return tuple(widened(tensor) for tensor in tensors)
    keep = mask.bool()
    _check_mask(mask, keep)
    return tuple(th.where(keep, widened(tensor), 0.0) for tensor in tensors)


def _check_mask(mask: th.Tensor, keep: th.Tensor) -> None:
    """
    Refuse a mask with a value other than 0 and 1: it would count as 1, whatever the caller meant.

    Only masks on the CPU are checked, as the host would have to wait for another device. A graph that is traced,
    compiled or mapped over a batch (``vmap``) has no values to check.

    :param mask: the mask as the caller gave it
    :param keep: the mask as bool
    :raises ValueError: naming a value that is neither 0 nor 1
    """
    if mask.dtype == th.bool or mask.device.type != "cpu" or th.compiler.is_compiling():
        return
    try:
        is_binary = th.equal(mask, keep.to(mask.dtype))
    except RuntimeError:  # there are no values
        return
    if not is_binary:
        other = mask[mask != keep.to(mask.dtype)][0].item()
        raise ValueError(f"mask must hold nothing but 0 and 1, or be of dtype bool, got {other}")
