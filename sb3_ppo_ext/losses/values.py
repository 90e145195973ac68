"""
Value losses: squared errors, elementwise, to be minimised.

They have no factor 1/2, as in SB3, where the ``vf_coef`` of 0.5 takes its place.
"""

from __future__ import annotations

from typing import Any

import torch as th

from sb3_ppo_ext.losses._guards import Scalar, check_same_shape, checked_scalar, prepared


def value_loss(values: th.Tensor, returns: th.Tensor, *, mask: th.Tensor | None = None) -> th.Tensor:
    """
    Squared error of the value function (Schulman et al. 2017, arXiv 1707.06347, below equation 9).

    ``loss = (V - R)^2``

    :param values: V, what the critic predicts, any shape
    :param returns: R, what it should predict, same shape
    :param mask: 1 or True where an element counts, same shape; None if all do
    :return: the loss, elementwise, to be minimised; 0 with gradient 0 where the mask excludes
    :raises ValueError: if the shapes differ
    """
    check_same_shape(values=values, returns=returns, mask=mask)
    values, returns = prepared(mask, values, returns)
    return (values - returns).square()


def prediction_clipped_value_loss(
    values: th.Tensor,
    old_values: th.Tensor,
    returns: th.Tensor,
    *,
    clip_range_vf: Scalar,
    mask: th.Tensor | None = None,
) -> th.Tensor:
    """
    Squared error of the prediction, clipped to a neighbourhood of the old one, as in SB3's PPO.

    ``loss = (V_old + clamp(V - V_old, -c, c) - R)^2`` with c = ``clip_range_vf``

    Outside the neighbourhood the gradient is 0, wherever the return lies. The PPO paper does not have this clip. Its
    range is in units of the return, so it depends on the scale of the rewards.

    :param values: V, what the critic predicts, any shape
    :param old_values: V_old, what it predicted when the data were collected, same shape
    :param returns: R, what it should predict, same shape
    :param clip_range_vf: c >= 0
    :param mask: 1 or True where an element counts, same shape; None if all do
    :return: the loss, elementwise, to be minimised; 0 with gradient 0 where the mask excludes
    :raises ValueError: if the shapes differ, or ``clip_range_vf`` is a number out of range
    """
    check_same_shape(values=values, old_values=old_values, returns=returns, mask=mask)
    clip_range_vf = checked_scalar("clip_range_vf", clip_range_vf)
    values, old_values, returns = prepared(mask, values, old_values, returns)
    return (_clip_prediction(values, old_values, clip_range_vf) - returns).square()


def pessimistic_clipped_value_loss(
    values: th.Tensor,
    old_values: th.Tensor,
    returns: th.Tensor,
    *,
    clip_range_vf: Scalar,
    mask: th.Tensor | None = None,
) -> th.Tensor:
    """
    The larger of the plain and the clipped squared error, as in OpenAI baselines' ``ppo2/model.py`` (without its 1/2).

    ``loss = max((V - R)^2, (V_old + clamp(V - V_old, -c, c) - R)^2)`` with c = ``clip_range_vf``

    Unlike :func:`prediction_clipped_value_loss`, it still has a gradient where the prediction left the neighbourhood in
    the direction away from the return.

    :param values: V, what the critic predicts, any shape
    :param old_values: V_old, what it predicted when the data were collected, same shape
    :param returns: R, what it should predict, same shape
    :param clip_range_vf: c >= 0
    :param mask: 1 or True where an element counts, same shape; None if all do
    :return: the loss, elementwise, to be minimised; 0 with gradient 0 where the mask excludes
    :raises ValueError: if the shapes differ, or ``clip_range_vf`` is a number out of range
    """
    check_same_shape(values=values, old_values=old_values, returns=returns, mask=mask)
    clip_range_vf = checked_scalar("clip_range_vf", clip_range_vf)
    values, old_values, returns = prepared(mask, values, old_values, returns)
    clipped = _clip_prediction(values, old_values, clip_range_vf)
    return th.maximum((values - returns).square(), (clipped - returns).square())


def _clip_prediction(values: th.Tensor, old_values: th.Tensor, clip_range_vf: Scalar) -> th.Tensor:
    bound: Any = clip_range_vf  # by torch's stubs, clamp takes two numbers or two tensors, but no union of them
    return old_values + (values - old_values).clamp(-bound, bound)
