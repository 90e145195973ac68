"""The penalised optimum in closed form, identities with PPO, and the coefficient from update to update."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces

from sb3_ppo_ext import AdaptiveKLPPO, DualClipPPO, losses
from tests.envs import BOX, scripted

SMALL: dict[str, Any] = {"n_steps": 64, "batch_size": 32, "n_epochs": 4, "seed": 0, "device": "cpu"}


def filled(action_space: spaces.Space, n_envs: int = 2, **kwargs: Any) -> AdaptiveKLPPO:
    env = scripted(BOX, action_space, n_envs)
    model = AdaptiveKLPPO("MlpPolicy", env, **{**SMALL, **kwargs})
    _, callback = model._setup_learn(64)
    model.collect_rollouts(model.env, callback, model.rollout_buffer, model.n_steps)
    return model


@pytest.mark.parametrize(
    "action_space",
    [spaces.Box(-1, 1, (3,)), spaces.Discrete(3), spaces.MultiDiscrete([3, 2]), spaces.MultiBinary(3)],
    ids=["box", "discrete", "multi-discrete", "multi-binary"],
)
def test_kl_is_zero_before_the_first_step_and_positive_after(action_space: spaces.Space) -> None:
    model = filled(action_space)
    assert model._measured_kl() == 0.0
    model.train()
    assert model._measured_kl() > 0.0
    assert model.logger.name_to_value["train/kl"] == model._measured_kl()


def test_kl_coef_zero_with_clipping_is_ppo() -> None:
    """The penalty turned off and held off leaves the clipped surrogate."""
    for env in ("CartPole-v1", "Pendulum-v1"):
        fixed = AdaptiveKLPPO(
            "MlpPolicy", env, clip_range=0.2, kl_coef=0.0, kl_coef_min=0.0, kl_coef_factor=1.0, **SMALL
        ).learn(128)
        ppo = DualClipPPO("MlpPolicy", env, dual_clip=None, **SMALL).learn(128)
        assert fixed.kl_coef == 0.0
        for p, q in zip(fixed.policy.parameters(), ppo.policy.parameters(), strict=True):
            th.testing.assert_close(p, q, atol=1e-6, rtol=0.0)  # they write the log-probability differently


def test_penalty_holds_the_policy_back() -> None:
    """With all else equal, a larger coefficient leaves the policy nearer to the old one."""
    kls = []
    for kl_coef in (0.01, 1.0, 100.0):
        model = filled(spaces.Box(-1, 1, (3,)), kl_coef=kl_coef, n_epochs=30, learning_rate=3e-3)
        model.train()
        kls.append(model._measured_kl())
    assert kls[0] > 2 * kls[1] > 8 * kls[2]


class Bandits(gym.Env[Any, Any]):
    """Two states, two actions, one step an episode; the reward is given by a table."""

    REWARDS = ((1.0, 0.0), (0.2, 0.8))

    def __init__(self) -> None:
        self.observation_space = spaces.Discrete(2)
        self.action_space = spaces.Discrete(2)
        self._state = 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[int, dict[str, Any]]:
        super().reset(seed=seed)
        self._state = int(self.np_random.integers(2))
        return self._state, {}

    def step(self, action: int) -> tuple[int, float, bool, bool, dict[str, Any]]:
        return self._state, self.REWARDS[self._state][int(action)], True, False, {}


def test_penalised_optimum_in_closed_form() -> None:
    """
    In each state the update maximises ``sum_a q(a) w(a) - beta KL(p || q)`` over q, with p the old policy and
    ``w(a) = A(a) f(a) / p(a)``, f being the share of a in the rollout. Its optimum is ``q(a) = beta p(a) / (m - w(a))``
    with m such that q sums to one: for two actions the larger root of a quadratic.
    """
    beta = 0.7
    model = AdaptiveKLPPO(
        "MlpPolicy",
        Bandits(),
        learning_rate=0.03,
        n_steps=256,
        batch_size=256,
        n_epochs=1500,
        normalize_advantage=False,
        vf_coef=0.0,
        max_grad_norm=1e9,
        policy_kwargs={"net_arch": []},
        seed=0,
        device="cpu",
        kl_coef=beta,
        clip_range=None,
    )
    with th.no_grad():
        model.policy.action_net.weight.copy_(th.tensor([[0.3, -0.4], [-0.3, 0.1]]))
        model.policy.value_net.weight.zero_()
    _, callback = model._setup_learn(256)
    model.collect_rollouts(model.env, callback, model.rollout_buffer, model.n_steps)
    states = model.rollout_buffer.observations.flatten()
    actions = model.rollout_buffer.actions.flatten()
    with th.no_grad():
        old = model.policy.get_distribution(th.tensor([0, 1])).distribution.probs.double().numpy()
    model.train()
    with th.no_grad():
        new = model.policy.get_distribution(th.tensor([0, 1])).distribution.probs.double().numpy()

    for state in (0, 1):
        share = np.array([(actions[states == state] == a).mean() for a in (0, 1)])
        p = old[state]
        w = np.array(Bandits.REWARDS[state]) * share / p
        # (m - w0)(m - w1) = beta p0 (m - w1) + beta p1 (m - w0)
        roots = np.roots([1.0, -(w[0] + w[1] + beta), w[0] * w[1] + beta * (p[0] * w[1] + p[1] * w[0])])
        q = beta * p / (roots.max() - w)
        assert q.sum() == pytest.approx(1.0)
        assert abs(q - p).max() > 0.1  # it is somewhere else
        np.testing.assert_allclose(new[state], q, atol=2e-3)


def test_what_one_sample_gains_by_being_learnt_by_heart() -> None:
    """The mean moved to the action that was drawn: r = exp(|z|^2 / 2) at KL = |z|^2 / 2, and a clip ends the gain."""
    z = th.linspace(-2.0, 2.0, 8)
    std = th.full((8,), 0.3)
    old, new = th.distributions.Normal(th.zeros(8), std), th.distributions.Normal(z * std, std)
    log_prob, old_log_prob = (policy.log_prob(z * std).sum().unsqueeze(0) for policy in (new, old))
    kl = th.distributions.kl_divergence(old, new).sum().unsqueeze(0)
    gain = z.square().sum().item() / 2
    assert kl.item() == pytest.approx(gain, rel=1e-5)
    one = th.ones(1)
    alone, _ = losses.kl_penalized_surrogate_loss(log_prob, old_log_prob, one, kl, kl_coef=1.0)
    assert alone.item() == pytest.approx(gain - math.exp(gain), rel=1e-4)
    assert losses.clipped_surrogate_loss(log_prob, old_log_prob, one, clip_range=0.5)[0].item() == -1.5


@pytest.mark.parametrize(
    ("env", "kwargs"), [("CartPole-v1", {}), ("Pendulum-v1", {"learning_rate": 3e-3, "vf_coef": 0.01})]
)
def test_measured_kl_settles_at_the_target(env: str, kwargs: dict[str, Any]) -> None:
    model = AdaptiveKLPPO("MlpPolicy", env, n_steps=256, n_epochs=10, target_kl=0.01, seed=0, device="cpu", **kwargs)
    kls: list[float] = []
    adapt = model._after_update

    def watched() -> None:
        adapt()
        kls.append(model.logger.name_to_value["train/kl"])

    model._after_update = watched  # type: ignore[method-assign]
    model.learn(256 * 20)
    assert 0.005 < np.median(kls[10:]) < 0.02


def test_default_target_is_per_dimension() -> None:
    model = filled(spaces.MultiBinary(4))
    model.train()
    assert model.logger.name_to_value["train/target_kl"] == pytest.approx(4 * 0.003)


def test_coefficient_survives_save_and_load(tmp_path: Path) -> None:
    model = AdaptiveKLPPO("MlpPolicy", "CartPole-v1", target_kl=1e-6, **SMALL).learn(192)
    assert model.kl_coef == 8.0  # three updates, each far above the target
    model.save(tmp_path / "model")
    loaded = AdaptiveKLPPO.load(tmp_path / "model", env=model.env)
    assert loaded.kl_coef == 8.0
    loaded.learn(64, reset_num_timesteps=False)
    assert loaded.kl_coef == 16.0


def test_coefficient_is_logged_as_used() -> None:
    model = AdaptiveKLPPO("MlpPolicy", "CartPole-v1", target_kl=1e-6, kl_coef=3.0, **SMALL).learn(64)
    assert model.logger.name_to_value["train/kl_coef"] == 3.0
    assert model.kl_coef == 6.0


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"target_kl": 1e-6, "kl_coef_factor": 3.0, "kl_coef_max": 5.0}, 5.0),  # 1, 3, 9
        ({"target_kl": 1e3, "kl_coef_factor": 4.0, "kl_coef_min": 0.125}, 0.125),  # 1, 1/4, 1/16
        ({"target_kl": 1e-6, "kl_tolerance": 1e9}, 1.0),
    ],
)
def test_coefficient_by_other_settings(settings: dict[str, Any], expected: float) -> None:
    assert AdaptiveKLPPO("MlpPolicy", "CartPole-v1", **SMALL, **settings).learn(128).kl_coef == expected
