"""Fitting the critic alone: what the actor depends on stays, and a linear critic ends at the least squares."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from torch import nn

from sb3_ppo_ext import TRPO
from sb3_ppo_ext.common.update.critic import critic_loss, critic_parameters, fit_critic, set_critic_training_mode
from sb3_ppo_ext.common.update.reduce import OneProcess
from sb3_ppo_ext.common.update.step import EagerStep
from tests.algorithms import small
from tests.envs import BOX, DICT, scripted


class Layer(BaseFeaturesExtractor):
    """An extractor with parameters, for vectors."""

    def __init__(self, observation_space: spaces.Box) -> None:
        super().__init__(observation_space, 4)
        self.linear = nn.Linear(4, 4)

    def forward(self, observations: th.Tensor) -> th.Tensor:
        return self.linear(observations).tanh()


def with_rollout(obs_space: spaces.Space[Any] = BOX, **kwargs: Any) -> Any:
    """A model with a rollout of 64 samples that it has not learnt from."""
    policy = "MultiInputPolicy" if isinstance(obs_space, spaces.Dict) else "MlpPolicy"
    model = small(TRPO, policy, scripted(obs_space), n_steps=32, **kwargs)
    _, callback = model._setup_learn(64)
    model.collect_rollouts(model.env, callback, model.rollout_buffer, 32)
    return model


def actor_parameters(model: Any) -> list[nn.Parameter]:
    """By what the distribution of actions depends on."""
    distribution = model.policy.get_distribution(model.rollout_buffer.flat().observations)
    log_prob = distribution.log_prob(distribution.sample())
    named = list(model.policy.parameters())
    grads = th.autograd.grad(log_prob.sum(), named, allow_unused=True)
    return [parameter for parameter, grad in zip(named, grads, strict=True) if grad is not None]


def fit(model: Any, n_epochs: int, batch_size: int = 64) -> float:
    actor, actor_critic = actor_parameters(model), model._actor_critic()
    step = EagerStep(
        model.policy.optimizer,
        critic_parameters(model.policy, actor),
        lambda batch, coefficients: critic_loss(actor_critic, batch, coefficients),
        OneProcess(),
    )
    return fit_critic(
        step, model.policy, actor, model.rollout_buffer, n_epochs=n_epochs, batch_size=batch_size, reducer=OneProcess()
    )


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("obs_space", [BOX, DICT], ids=["box", "dict"])
def test_only_what_the_actor_does_not_depend_on_changes(obs_space: spaces.Space[Any], share: bool) -> None:
    """To the bit, moments included, though the critic's loss depends on a shared extractor."""
    extractor = {} if obs_space is DICT else {"features_extractor_class": Layer}
    model = with_rollout(obs_space, policy_kwargs={"share_features_extractor": share, **extractor})
    actor = {id(parameter) for parameter in actor_parameters(model)}
    before = {name: parameter.detach().clone() for name, parameter in model.policy.named_parameters()}
    fit(model, n_epochs=3, batch_size=16)
    for name, parameter in model.policy.named_parameters():
        assert th.equal(parameter, before[name]) == (id(parameter) in actor), name
        assert (parameter in model.policy.optimizer.state) == (id(parameter) not in actor), name
    of_extractor = {name for name in before if name.startswith("vf_features_extractor") and "pi_" not in name}
    if not share:
        assert of_extractor
        assert not any(id(dict(model.policy.named_parameters())[name]) in actor for name in of_extractor)


def test_a_linear_critic_ends_at_the_least_squares() -> None:
    """The loss that is returned is the mean over the minibatches; at the end it is the mean squared residual."""
    model = with_rollout(learning_rate=0.05, policy_kwargs={"net_arch": [], "optimizer_kwargs": {"eps": 1e-8}})
    rollout = model.rollout_buffer.flat()
    inputs = np.hstack([rollout.observations.double().numpy(), np.ones((64, 1))])
    targets = rollout.returns.double().numpy()
    solution, *_ = np.linalg.lstsq(inputs, targets, rcond=None)
    least = np.square(inputs @ solution - targets).mean()
    before = np.square(rollout.old_values.double().numpy() - targets).mean()
    assert before > 1.2 * least

    assert fit(model, n_epochs=1) == pytest.approx(before, rel=1e-5)  # one minibatch, before its step
    fit(model, n_epochs=1500)
    net = model.policy.value_net
    found = np.append(net.weight.detach().numpy().ravel(), net.bias.item())
    np.testing.assert_allclose(found, solution, atol=1e-3)
    assert fit(model, n_epochs=1) == pytest.approx(least, rel=1e-4)


def test_a_sample_that_does_not_count_is_not_learnt_from() -> None:
    model = with_rollout(policy_kwargs={"net_arch": []})
    rollout = model.rollout_buffer.flat()
    counts = th.arange(64) % 4 != 0
    spoilt = rollout._replace(returns=th.where(counts, rollout.returns, 1e6), mask=counts)
    loss, statistics = critic_loss(model._actor_critic(), spoilt, {})
    expected = (rollout.old_values - rollout.returns)[counts].square().mean()
    th.testing.assert_close(loss, expected)
    assert statistics["value_loss"].item() == pytest.approx(expected.item())
    assert not statistics["value_loss"].requires_grad


def test_what_belongs_to_the_critic_alone_is_in_training_mode() -> None:
    """A layer without parameters, such as dropout, goes with the network that it is in."""
    model = with_rollout(policy_kwargs={"features_extractor_class": Layer})
    policy = model.policy
    policy.mlp_extractor.policy_net.append(nn.Dropout(0.5))
    policy.mlp_extractor.value_net.append(nn.Dropout(0.5))
    set_critic_training_mode(policy, actor_parameters(model))
    assert all(module.training for module in policy.mlp_extractor.value_net.modules())
    assert policy.value_net.training
    for network in (policy.features_extractor, policy.mlp_extractor.policy_net, policy.action_net):
        assert not any(module.training for module in network.modules())
