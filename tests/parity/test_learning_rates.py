"""A learning rate that changes within an update is seen by every kind of step."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch as th

from sb3_ppo_ext import DualClipPPO
from sb3_ppo_ext.common.update.objective import ActorCriticLoss

RATES = (0.01, 0.03, 0.0, 0.002)
COEFFICIENTS = {"ent_coef": 0.01, "vf_coef": 0.5, "max_grad_norm": 0.5, "clip_range": 0.2, "dual_clip": 3.0}


def collected(*, torch_compile: bool) -> Any:
    model: Any = DualClipPPO(
        "MlpPolicy",
        "CartPole-v1",
        n_steps=32,
        batch_size=8,
        seed=0,
        device="cpu",
        torch_compile=torch_compile,
        policy_kwargs={"net_arch": [8], "critic_learning_rate": 0.5},
    )
    model.train = lambda: None
    return model.learn(32)


def rates_of(optimizer: Any, rate: float) -> None:
    for i, group in enumerate(optimizer.param_groups):
        group["lr"] = rate * (i + 1)


@pytest.mark.usefixtures("without_compiler")
@pytest.mark.parametrize("kind", ["flat", "tensor by tensor", "compiled"])
def test_a_learning_rate_may_change_between_two_steps(kind: str) -> None:
    model = collected(torch_compile=kind == "compiled")
    reference = copy.deepcopy(model.policy)
    if kind == "tensor by tensor":
        model.policy.optimizer.register_step_post_hook(lambda *args: None)
    loss = ActorCriticLoss(DualClipPPO.policy_loss, normalize_advantage=True)
    parameters = list(model.policy.parameters())
    rollout = model.rollout_buffer.flat()
    minibatches = th.arange(32).split(8)
    step = model._minibatch_step(loss, parameters, tuple(COEFFICIENTS))
    with step:
        for rate, rows in zip(RATES, minibatches, strict=True):
            rates_of(model.policy.optimizer, rate)
            step(rollout, rows, COEFFICIENTS)

    # the same by torch alone
    other = type(model._actor_critic())(reference)
    twin = dict(zip(model.policy.parameters(), reference.parameters(), strict=True))
    groups = [{"params": [twin[p] for p in group["params"]]} for group in model.policy.optimizer.param_groups]
    adam = th.optim.Adam(groups, lr=1.0, eps=1e-5)
    for rate, rows in zip(RATES, minibatches, strict=True):
        rates_of(adam, rate)
        adam.zero_grad()
        loss(other, rollout.rows(rows), COEFFICIENTS)[0].backward()
        th.nn.utils.clip_grad_norm_(reference.parameters(), 0.5)
        adam.step()
    for ours, expected in zip(model.policy.parameters(), reference.parameters(), strict=True):
        th.testing.assert_close(ours, expected, atol=1e-6, rtol=1e-4)
