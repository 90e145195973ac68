"""Value losses against literals."""

import math

import pytest
import torch as th

from sb3_ppo_ext.losses import pessimistic_clipped_value_loss, prediction_clipped_value_loss, value_loss


def value_and_slope(loss: th.Tensor, values: th.Tensor) -> tuple[list[float], list[float]]:
    (slope,) = th.autograd.grad(loss.sum(), values)
    return loss.tolist(), slope.tolist()


def test_squared_error_has_no_half() -> None:
    values = th.tensor([1.0, -2.0, 3.0], requires_grad=True)
    loss = value_loss(values, th.tensor([4.0, -2.0, 1.0]))
    assert value_and_slope(loss, values) == ([9.0, 0.0, 4.0], [-6.0, 0.0, 4.0])


def test_reduction_is_sb3s_value_loss() -> None:
    values, returns = th.randn(64), th.randn(64)
    th.testing.assert_close(value_loss(values, returns).mean(), th.nn.functional.mse_loss(returns, values))


# old value 1, c = 0.5: predictions count within [0.5, 1.5]
#                          V,     R, clipped V
WITHIN = (1.25, 3.00)  # 1.25
ABOVE_RETURN_FURTHER = (2.0, 3.0)  # 1.50
ABOVE_RETURN_BACK = (2.0, 0.0)  # 1.50
BELOW_RETURN_BACK = (0.0, 1.0)  # 0.50
BELOW_RETURN_FURTHER = (0.0, -1.0)  # 0.50


@pytest.mark.parametrize(
    ("case", "loss", "slope"),
    [
        (WITHIN, 3.0625, -3.5),  # (1.25 - 3)^2, 2 (1.25 - 3)
        (ABOVE_RETURN_FURTHER, 2.25, 0.0),  # (1.5 - 3)^2
        (ABOVE_RETURN_BACK, 2.25, 0.0),  # (1.5 - 0)^2
        (BELOW_RETURN_BACK, 0.25, 0.0),  # (0.5 - 1)^2
        (BELOW_RETURN_FURTHER, 2.25, 0.0),  # (0.5 + 1)^2
    ],
)
def test_prediction_clipped(case: tuple[float, float], loss: float, slope: float) -> None:
    values = th.tensor([case[0]], requires_grad=True)
    result = prediction_clipped_value_loss(values, th.ones(1), th.tensor([case[1]]), clip_range_vf=0.5)
    assert value_and_slope(result, values) == ([loss], [slope])


@pytest.mark.parametrize(
    ("case", "loss", "slope"),
    [
        (WITHIN, 3.0625, -3.5),
        (ABOVE_RETURN_FURTHER, 2.25, 0.0),  # max((2 - 3)^2, (1.5 - 3)^2)
        (ABOVE_RETURN_BACK, 4.0, 4.0),  # max((2 - 0)^2, (1.5 - 0)^2), still drawn back
        (BELOW_RETURN_BACK, 1.0, -2.0),  # max((0 - 1)^2, (0.5 - 1)^2), still drawn back
        (BELOW_RETURN_FURTHER, 2.25, 0.0),  # max((0 + 1)^2, (0.5 + 1)^2)
    ],
)
def test_pessimistic(case: tuple[float, float], loss: float, slope: float) -> None:
    values = th.tensor([case[0]], requires_grad=True)
    result = pessimistic_clipped_value_loss(values, th.ones(1), th.tensor([case[1]]), clip_range_vf=0.5)
    assert value_and_slope(result, values) == ([loss], [slope])


@pytest.mark.parametrize("clipped_loss", [prediction_clipped_value_loss, pessimistic_clipped_value_loss])
@pytest.mark.parametrize("clip_range_vf", [1e6, math.inf])
def test_a_wide_range_is_the_plain_loss(clipped_loss: type, clip_range_vf: float) -> None:
    values, old_values, returns = th.tensor([[1.5, -2.0, 3.0], [0.5, 0.25, -1.0], [4.0, -2.0, 1.0]])
    clipped = clipped_loss(values, old_values, returns, clip_range_vf=clip_range_vf)
    assert th.equal(clipped, value_loss(values, returns))


def test_a_range_of_zero_holds_the_old_prediction() -> None:
    values, old_values, returns = th.tensor([[1.5, -2.0], [0.5, 0.25], [4.0, -1.0]])
    held = prediction_clipped_value_loss(values, old_values, returns, clip_range_vf=0.0)
    assert th.equal(held, value_loss(old_values, returns))
