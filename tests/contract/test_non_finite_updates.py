"""A loss or a gradient that is not finite never reaches the parameters."""

from __future__ import annotations

import math
import re
from collections.abc import Container
from typing import Any

import gymnasium as gym
import pytest
import torch as th

from sb3_ppo_ext import AdaptiveKLPPO, DualClipPPO
from sb3_ppo_ext.common.errors import NonFiniteError
from sb3_ppo_ext.common.update.step import raise_if_not_finite
from tests.algorithms import have_moved, parameters
from tests.envs import LargeReward

SMALL: dict[str, Any] = {"n_steps": 64, "batch_size": 32, "n_epochs": 2, "seed": 0, "device": "cpu"}


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning", "ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("algorithm", [DualClipPPO, AdaptiveKLPPO])
@pytest.mark.parametrize("torch_compile", [False, True])
@pytest.mark.usefixtures("without_compiler")
def test_a_loss_that_is_not_finite(algorithm: Any, torch_compile: bool) -> None:
    env = LargeReward(gym.make("CartPole-v1"), {100})
    model = algorithm("MlpPolicy", env, torch_compile=torch_compile, **SMALL)
    model.learn(64)
    with pytest.raises(NonFiniteError, match="value_loss=") as error:
        model.learn(64, reset_num_timesteps=False)
    assert "grad_norm=" in str(error.value)
    assert all(p.isfinite().all() for p in model.policy.parameters())
    for state in model.policy.optimizer.state.values():
        assert state["exp_avg"].isfinite().all()
    before = parameters(model)
    model.learn(64, reset_num_timesteps=False)  # the model is still usable
    assert have_moved(model, before)


def update_that_fails(steps: Container[int], **kwargs: Any) -> tuple[str, float]:
    """What the error says of rewards that are too large, and how far the parameters have moved."""
    env = LargeReward(gym.make("CartPole-v1"), steps)
    policy_kwargs = {"optimizer_class": th.optim.SGD}
    settings = {**SMALL, "policy_kwargs": policy_kwargs, **kwargs}
    model = DualClipPPO("MlpPolicy", env, **settings)
    model.learn(64)
    before = th.nn.utils.parameters_to_vector(model.policy.parameters()).detach()
    with pytest.raises(NonFiniteError) as error:
        model.learn(64, reset_num_timesteps=False)
    after = th.nn.utils.parameters_to_vector(model.policy.parameters()).detach()
    return str(error.value), (after - before).abs().max().item()


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning", "ignore:invalid value:RuntimeWarning")
def test_it_is_said_whether_the_policy_has_changed() -> None:
    message, moved = update_that_fails(range(65, 10_000))
    assert "No step of this update was made: the policy is as it was before it." in message
    assert moved == 0.0

    message, moved = update_that_fails({100}, batch_size=4, n_epochs=1)
    found = re.search(
        r"The (\d+) steps with such a gradient were not made; the other (\d+) of this update were", message
    )
    assert found is not None, message
    assert int(found[1]) + int(found[2]) == 16
    assert "the policy has changed" in message
    assert moved > 0.0


def test_it_is_said_if_all_gradients_were_finite() -> None:
    """A statistic without a weight in the loss may be infinite alone."""
    with pytest.raises(
        NonFiniteError, match=r"minibatch 1 .*: entropy_loss=-inf\. The gradients were finite: all 2 steps"
    ):
        raise_if_not_finite({"entropy_loss": [1.0, -math.inf], "grad_norm": [0.5, 0.5]})
    with pytest.raises(NonFiniteError, match=r"The 1 steps .* not made; the other 1 of this update were"):
        raise_if_not_finite({"approx_kl": [0.0, math.nan, 2.0], "grad_norm": [0.5, math.nan]})  # stopped at the third
    raise_if_not_finite({"approx_kl": [0.0], "grad_norm": []})


def test_it_is_an_error_that_the_rl_zoo_prunes() -> None:
    assert issubclass(NonFiniteError, ValueError)
