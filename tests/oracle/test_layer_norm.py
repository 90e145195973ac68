"""``policy_kwargs=dict(layer_norm=True)``: what the networks compute, and that all else goes on with it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch as th
from stable_baselines3 import PPO
from stable_baselines3.common.torch_layers import MlpExtractor
from torch import nn

from sb3_ppo_ext import DualClipPPO
from sb3_ppo_ext.common.policies import ActorCriticPolicy
from tests.algorithms import ALGORITHMS, ROLLOUT, assert_close_policies, have_moved, parameters, small
from tests.envs import BOX, IMAGE, scripted


def by_hand(module: nn.Sequential, x: np.ndarray) -> np.ndarray:
    """Of tanh layers: linear, to mean 0 and variance 1 over the outputs, scaled and shifted, tanh."""
    layers = list(module)
    assert [type(layer) for layer in layers] == [nn.Linear, nn.LayerNorm, nn.Tanh] * (len(layers) // 3)
    for linear, norm in zip(layers[::3], layers[1::3], strict=True):
        weight, bias, scale, shift = (p.detach().double().numpy() for p in (*linear.parameters(), *norm.parameters()))
        x = x @ weight.T + bias
        x = (x - x.mean(axis=1, keepdims=True)) / np.sqrt(x.var(axis=1, keepdims=True) + 1e-5)
        x = np.tanh(x * scale + shift)
    return x


def test_the_networks_of_actor_and_critic() -> None:
    policy = small(
        DualClipPPO, "MlpPolicy", scripted(), policy_kwargs={"layer_norm": True, "net_arch": {"pi": [5], "vf": [6, 7]}}
    ).policy
    with th.no_grad():
        for name, parameter in policy.mlp_extractor.named_parameters():
            parameter.add_(0.1 * th.randn(parameter.shape, generator=th.Generator().manual_seed(len(name))))
    obs = np.random.default_rng(0).normal(size=(9, 4))
    tensor = th.as_tensor(obs, dtype=th.float32)
    for net, outputs in (
        ("policy_net", policy.mlp_extractor.forward_actor(tensor)),
        ("value_net", policy.mlp_extractor.forward_critic(tensor)),
    ):
        np.testing.assert_allclose(
            outputs.detach().numpy(), by_hand(getattr(policy.mlp_extractor, net), obs), atol=1e-5
        )


def test_all_other_layers_begin_as_they_did() -> None:
    plain, normalized = (
        small(DualClipPPO, "MlpPolicy", scripted(), policy_kwargs={"layer_norm": layer_norm}).policy
        for layer_norm in (False, True)
    )
    linear = [[layer.weight for layer in p.modules() if isinstance(layer, nn.Linear)] for p in (plain, normalized)]
    assert all(map(th.equal, *linear))
    assert not any(isinstance(layer, nn.LayerNorm) for layer in plain.modules())


@pytest.mark.parametrize(
    ("policy", "obs_space", "kwargs"),
    [
        ("MlpPolicy", BOX, {"critic_learning_rate": 1e-3}),
        ("MlpLstmPolicy", BOX, {"lstm_hidden_size": 4, "rnn_type": "gru"}),
        ("CnnPolicy", IMAGE, {"activation_fn": nn.ReLU}),
    ],
)
@pytest.mark.usefixtures("without_compiler")
def test_compiled_equals_eager(policy: str, obs_space: Any, kwargs: dict[str, Any]) -> None:
    def made(torch_compile: bool) -> Any:
        net = {"layer_norm": True, **kwargs}
        return small(DualClipPPO, policy, scripted(obs_space), policy_kwargs=net, torch_compile=torch_compile)

    eager, compiled = made(False), made(True)
    norms = [layer for layer in eager.policy.mlp_extractor.modules() if isinstance(layer, nn.LayerNorm)]
    assert len(norms) == 2
    if "critic_learning_rate" in kwargs:
        of_critic = eager.policy.optimizer.param_groups[1]["params"]
        assert any(p is norms[1].weight for p in of_critic)
        assert not any(p is norms[0].weight for p in of_critic)
    for model in (eager, compiled):
        model.set_random_seed(0)
        model.learn(2 * ROLLOUT)
    assert all(not th.equal(norm.weight, th.ones_like(norm.weight)) for norm in norms)
    assert_close_policies(eager, compiled, atol=2e-5)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_it_is_trained_saved_and_loaded(algorithm: Any, tmp_path: Path) -> None:
    model = small(algorithm, "MlpPolicy", scripted(), policy_kwargs={"layer_norm": True})
    before = parameters(model)
    assert have_moved(model.learn(ROLLOUT), before)
    model.save(tmp_path / "model")
    model.policy.save(tmp_path / "policy")
    others = [algorithm.load(tmp_path / "model", device="cpu").policy, type(model.policy).load(tmp_path / "policy")]
    if algorithm is DualClipPPO:
        others.append(PPO.load(tmp_path / "model", device="cpu").policy)
    obs = np.random.default_rng(0).normal(size=(5, 4)).astype(np.float32)
    for other in others:
        expected, got = (policy.predict(obs, deterministic=True)[0] for policy in (model.policy, other))
        np.testing.assert_array_equal(got, expected)


class OwnNetworks(ActorCriticPolicy):
    """As SB3's documentation has it, with networks in which there is no norm."""

    def _build_mlp_extractor(self) -> None:
        self.mlp_extractor = MlpExtractor(self.features_dim, [4], nn.Tanh)


def test_networks_of_ones_own_are_not_normalised() -> None:
    with pytest.raises(ValueError, match=r"layer_norm=True is not allowed with .* of OwnNetworks"):
        small(DualClipPPO, OwnNetworks, scripted(), policy_kwargs={"layer_norm": True})


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        (
            {"net_arch": []},
            "layer_norm=True is not allowed with net_arch=[] of ActorCriticPolicy, which has no",
        ),
        ({"layer_norm": "yes"}, "layer_norm='yes' is not allowed: it must be True or False"),
    ],
)
def test_what_is_refused(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        small(DualClipPPO, "MlpPolicy", scripted(), policy_kwargs={"layer_norm": True, **kwargs})
