"""A loss or a gradient that is not finite never reaches the parameters."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import pytest
import torch as th

from sb3_ppo_ext import AdaptiveKLPPO, DualClipPPO
from sb3_ppo_ext.common.optimization import NonFiniteError

SMALL: dict[str, Any] = {"n_steps": 64, "batch_size": 32, "n_epochs": 2, "seed": 0, "device": "cpu"}


class LargeReward(gym.RewardWrapper):
    """The 100th reward is a number whose square is none."""

    def __init__(self, env: gym.Env[Any, Any]) -> None:
        super().__init__(env)
        self.count = 0

    def reward(self, reward: Any) -> float:
        self.count += 1
        return 1e30 if self.count == 100 else float(reward)


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning", "ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("algorithm", [DualClipPPO, AdaptiveKLPPO])
@pytest.mark.parametrize("torch_compile", [False, True])
@pytest.mark.usefixtures("without_compiler")
def test_a_loss_that_is_not_finite(algorithm: Any, torch_compile: bool) -> None:
    model = algorithm("MlpPolicy", LargeReward(gym.make("CartPole-v1")), torch_compile=torch_compile, **SMALL)
    model.learn(64)
    with pytest.raises(NonFiniteError, match="value_loss=") as error:
        model.learn(64, reset_num_timesteps=False)
    assert "grad_norm=" in str(error.value)
    assert all(p.isfinite().all() for p in model.policy.parameters())
    for state in model.policy.optimizer.state.values():
        assert state["exp_avg"].isfinite().all()
    before = [p.detach().clone() for p in model.policy.parameters()]
    model.learn(64, reset_num_timesteps=False)  # the model is still usable
    assert all(not th.equal(p, q) for p, q in zip(model.policy.parameters(), before, strict=True))


def test_it_is_an_error_that_the_rl_zoo_prunes() -> None:
    assert issubclass(NonFiniteError, ValueError)
