"""Samples that a mask excludes count for nothing: means, advantages, losses and gradients are those of the others."""

from __future__ import annotations

from typing import Any

import pytest
import torch as th

from sb3_ppo_ext import AdaptiveKLPPO, DualClipPPO
from sb3_ppo_ext.common.rollout.data import PolicyInput, RolloutSamples
from sb3_ppo_ext.common.update.critic import critic_loss
from sb3_ppo_ext.common.update.objective import ActorCriticLoss

COEFFICIENTS = {"ent_coef": 0.1, "vf_coef": 0.5, "clip_range": 0.2, "dual_clip": 3.0, "clip_range_vf": 0.3}


def samples_of(model: Any) -> RolloutSamples:
    samples: RolloutSamples = model.rollout_buffer.flat()
    return samples._replace(old_log_prob=samples.old_log_prob + 0.3 * th.randn(len(samples.old_log_prob)))


@pytest.mark.parametrize("algorithm", [DualClipPPO, AdaptiveKLPPO])
@pytest.mark.parametrize("normalize_advantage", [False, True])
def test_the_gradient_is_that_of_the_samples_that_count(algorithm: Any, normalize_advantage: bool) -> None:
    model = algorithm("MlpPolicy", "Pendulum-v1", n_steps=32, batch_size=32, seed=0, device="cpu")
    model.train = lambda: None
    samples = samples_of(model.learn(32))
    loss = ActorCriticLoss(algorithm.policy_loss, normalize_advantage)
    coefficients = {**COEFFICIENTS, "kl_coef": 2.0}
    actor_critic, parameters = model._actor_critic(), list(model.policy.parameters())
    mask = th.rand(32, generator=th.Generator().manual_seed(0)) < 0.6
    expected, statistics = loss(actor_critic, samples.rows(mask), coefficients)
    found, found_statistics = loss(actor_critic, samples._replace(mask=mask), coefficients)
    th.testing.assert_close(found, expected)
    for ours, theirs in zip(th.autograd.grad(found, parameters), th.autograd.grad(expected, parameters), strict=True):
        th.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-4)
    assert statistics["value_loss"] > 0.0
    for name, value in found_statistics.items():
        th.testing.assert_close(value, statistics[name], atol=1e-6, rtol=1e-4, msg=name)
    th.testing.assert_close(
        critic_loss(actor_critic, samples._replace(mask=mask), {})[0],
        critic_loss(actor_critic, samples.rows(mask), {})[0],
    )


def test_padding_changes_nothing() -> None:
    model: Any = DualClipPPO("MlpPolicy", "CartPole-v1", n_steps=8, batch_size=8, seed=0, device="cpu")
    model.train = lambda: None
    samples = samples_of(model.learn(8))
    rows = th.tensor([5, 2, 7])
    padded = samples.padded(rows, 6)
    assert padded.mask is not None
    assert padded.mask.tolist() == [True] * 3 + [False] * 3
    assert th.equal(padded.returns[:3], samples.returns[rows])
    assert th.equal(padded.returns[3:], samples.returns[:1].expand(3))
    assert padded.mean(padded.returns).item() == pytest.approx(samples.returns[rows].mean().item())
    whole = samples.padded(None, 10)
    assert whole.mask is not None
    assert whole.mask.sum().item() == 8
    assert padded.padded(th.tensor([0, 4]), 3).mask.tolist() == [True, False, False]  # type: ignore[union-attr]


def test_rows_of_inputs() -> None:
    obs = {"a": th.arange(4.0), "b": th.arange(8).view(4, 2)}
    inputs = PolicyInput(obs, mask=th.eye(4, dtype=th.bool), starts=th.tensor([1.0, 0.0, 0.0, 1.0]))
    some = inputs.rows(th.tensor([3, 0]))
    assert isinstance(some.obs, dict)
    assert some.obs["a"].tolist() == [3.0, 0.0]
    assert some.obs["b"].tolist() == [[6, 7], [0, 1]]
    assert some.mask is not None
    assert some.mask.int().tolist() == [[0, 0, 0, 1], [1, 0, 0, 0]]
    assert some.state is None
    assert (inputs.n_rows, some.n_rows) == (4, 2)
