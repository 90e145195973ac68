"""TRPO's step against sb3-contrib's, a closed form, and an independent recomputation of its constraint."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import pytest
import sb3_contrib
import torch as th
from gymnasium import spaces
from stable_baselines3.common.distributions import kl_divergence as sb3_kl_divergence
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from torch.distributions import Independent, Normal, kl_divergence

from sb3_ppo_ext import TRPO
from sb3_ppo_ext.common.rollout import data
from sb3_ppo_ext.common.update.surrogate import PolicyStep, Surrogate
from tests.custom import OverridesForward
from tests.envs import BOX, DICT, IMAGE, scripted

TORQUES = spaces.Box(-1.0, 1.0, (6,), np.float32)


def make_model(
    action_space: spaces.Space[Any], obs_space: spaces.Space[Any] = BOX, n_envs: int = 1, **kwargs: Any
) -> TRPO:
    """A model with a filled rollout buffer, not yet updated."""
    env = scripted(obs_space, action_space, n_envs)
    policy = kwargs.pop("policy", "MultiInputPolicy" if isinstance(obs_space, spaces.Dict) else "MlpPolicy")
    kwargs = {"n_steps": 256 // n_envs, "batch_size": 64, "seed": 0, "device": "cpu", **kwargs}
    return collect(TRPO(policy, env, **kwargs))


def collect(model: Any) -> Any:
    _, callback = model._setup_learn(model.n_steps)
    model.collect_rollouts(model.env, callback, model.rollout_buffer, model.n_steps)
    return model


def policy_step(model: TRPO) -> PolicyStep:
    """The actor's half of ``train()``, with advantages normalised."""
    model.policy.set_training_mode(False)
    rollout = model.rollout_buffer.flat()
    advantages = (rollout.advantages - rollout.advantages.mean()) / (rollout.advantages.std() + 1e-8)
    return model._policy_step(model._actor_critic(), rollout._replace(advantages=advantages))[0]


def flat_parameters(policy: Any) -> th.Tensor:
    return th.cat([p.detach().flatten() for p in policy.parameters()])


def logged(model: TRPO) -> dict[str, Any]:
    assert isinstance(model.logger, Logger)
    return model.logger.name_to_value


@pytest.mark.parametrize(
    ("action_space", "dims"),
    [(TORQUES, 6), (spaces.Box(-1, 1, (1,), np.float32), 1), (spaces.Discrete(4), 1)],
    ids=["box of 6", "box of 1", "discrete"],
)
def test_step_is_contribs(action_space: spaces.Space[Any], dims: int) -> None:
    """contrib averages KL and damping over the dimensions: with both times d, direction and length are the same."""
    env = scripted(BOX, action_space, 1)
    settings: dict[str, Any] = {"n_steps": 512, "seed": 0, "device": "cpu"}
    theirs = collect(sb3_contrib.TRPO("MlpPolicy", env, target_kl=0.01, cg_damping=0.1, **settings))
    env = scripted(BOX, action_space, 1)
    ours = collect(TRPO("MlpPolicy", env, target_kl=0.01 * dims, cg_damping=0.1 * dims, **settings))
    before = flat_parameters(ours.policy)
    assert th.equal(before, flat_parameters(theirs.policy))

    theirs.n_critic_updates = 0
    with np.errstate(all="ignore"), pytest.warns(RuntimeWarning, match="Mean of empty slice"):
        theirs.train()
    assert policy_step(ours).status == "accepted"
    their_step, our_step = (flat_parameters(model.policy) - before for model in (theirs, ours))
    cosine = th.nn.functional.cosine_similarity(their_step, our_step, dim=0).item()
    length_ratio = (our_step.norm() / their_step.norm()).item()
    print(f"cosine {cosine:.7f}, ratio of lengths {length_ratio:.5f}")
    assert cosine >= 0.9999
    assert length_ratio == pytest.approx(1.0, abs=0.01)


def test_step_is_the_natural_gradient_in_closed_form() -> None:
    """
    Observations of zero leave a softmax over the biases: F = diag(p) - p p', of which numpy solves
    ``(F + damping I) x = g`` exactly; the step is sqrt(2 target / x'g) x.
    """
    nothing = spaces.Box(0.0, 0.0, (3,), np.float32)
    model = make_model(
        spaces.Discrete(5), nothing, target_kl=1e-5, cg_damping=0.05, policy_kwargs={"net_arch": []}, gamma=0.0
    )
    with th.no_grad():
        model.policy.action_net.bias.copy_(th.tensor([0.5, -0.3, 0.0, 1.0, -1.0]))
    collect(model)
    rollout = model.rollout_buffer.flat()
    actions = rollout.actions.flatten().numpy().astype(int)
    advantages = rollout.advantages.numpy().astype(np.float64)
    advantages = (advantages - advantages.mean()) / (advantages.std(ddof=1) + 1e-8)
    before = model.policy.action_net.bias.detach().numpy().astype(np.float64)
    p = np.exp(before) / np.exp(before).sum()
    g = ((np.eye(5)[actions] - p) * advantages[:, None]).mean(0)
    x = np.linalg.solve(np.diag(p) - np.outer(p, p) + 0.05 * np.eye(5), g)
    expected = math.sqrt(2e-5 / (x @ g)) * x

    step = policy_step(model)
    assert step.status == "accepted"
    assert step.fraction == 1.0  # so small a trust region is quadratic, and the damping keeps the KL below its limit
    taken = model.policy.action_net.bias.detach().numpy() - before
    np.testing.assert_allclose(taken, expected, rtol=2e-3, atol=1e-7)
    assert step.predicted_improvement == pytest.approx(g @ expected, rel=1e-3)
    assert step.actual_improvement == pytest.approx(step.predicted_improvement, rel=0.02)


def joint_gaussian(model: TRPO, observations: th.Tensor) -> Independent:
    normal = model.policy.get_distribution(observations).distribution
    return Independent(Normal(normal.mean.detach().clone(), normal.stddev.detach().clone()), 1)


def test_every_accepted_step_keeps_the_constraint() -> None:
    """Joint KL(old || new) on a 6-dimensional Box, recomputed by torch.distributions, over 50 updates."""
    model = make_model(TORQUES, n_envs=2, target_kl=0.02, learning_rate=1e-3)
    accepted = 0
    for _ in range(50):
        collect(model)
        observations = model.rollout_buffer.flat().observations
        old = joint_gaussian(model, observations)
        step = policy_step(model)
        kl = kl_divergence(old, joint_gaussian(model, observations)).mean().item()
        assert kl <= 0.02 * (1 + 1e-4)
        assert kl == pytest.approx(step.kl, rel=1e-3, abs=1e-7)
        accepted += step.status == "accepted"
        assert (step.status == "accepted") == (kl > 0)
    assert accepted >= 45


@pytest.mark.parametrize("n_dims", [1, 3])
def test_defaults_are_per_dimension(n_dims: int, capsys: pytest.CaptureFixture[str]) -> None:
    model = make_model(spaces.MultiDiscrete([3] * n_dims), verbose=1)
    model.train()
    assert f"target_kl={0.01 * n_dims:g}, cg_damping={0.1 * n_dims:g}" in capsys.readouterr().out
    assert logged(model)["train/target_kl"] == pytest.approx(0.01 * n_dims)
    assert logged(model)["train/cg_damping"] == pytest.approx(0.1 * n_dims)


class ValueEmbed(BaseFeaturesExtractor):
    """An extractor of the actor with a layer whose name says value."""

    def __init__(self, observation_space: spaces.Space[Any]) -> None:
        super().__init__(observation_space, features_dim=8)
        self.value_embed = th.nn.Linear(4, 8)

    def forward(self, observations: th.Tensor) -> th.Tensor:
        return self.value_embed(observations).tanh()


def test_parameters_are_found_by_reachability_not_by_name() -> None:
    model = make_model(TORQUES, policy_kwargs={"features_extractor_class": ValueEmbed})
    before = model.policy.features_extractor.value_embed.weight.detach().clone()
    assert policy_step(model).status == "accepted"
    assert not th.equal(model.policy.features_extractor.value_embed.weight, before)


@pytest.mark.parametrize(
    ("obs_space", "policy"), [(DICT, "MultiInputPolicy"), (IMAGE, "CnnPolicy")], ids=["dict", "image"]
)
def test_critic_leaves_a_shared_extractor_alone(
    obs_space: spaces.Space[Any], policy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the actor's step refused, a whole update leaves the action distribution as it is, to the bit."""
    model = make_model(spaces.Discrete(3), obs_space, policy=policy, n_steps=64)
    monkeypatch.setattr(Surrogate, "value_and_kls", lambda *_: (th.tensor(1.0), th.tensor(1e9), th.tensor(1e9)))
    observations = model.rollout_buffer.flat().observations
    with th.no_grad():
        before = model.policy.get_distribution(observations).distribution.logits.clone()
        values = model.policy.predict_values(observations)
    model.train()
    with th.no_grad():
        after = model.policy.get_distribution(observations).distribution.logits
        assert th.equal(before, after)
        assert not th.equal(values, model.policy.predict_values(observations))


def test_a_failed_line_search_leaves_parameters_and_moments(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model(TORQUES)
    model.train()  # so that the optimiser has moments
    collect(model)
    parameters = flat_parameters(model.policy)
    moments = copy.deepcopy(model.policy.optimizer.state_dict())
    monkeypatch.setattr(Surrogate, "value_and_kls", lambda *_: (th.tensor(-1.0), th.tensor(0.0), th.tensor(0.0)))
    step = policy_step(model)
    assert step.status == "improvement"
    assert (step.kl, step.fraction) == (0.0, 0.0)
    assert th.equal(parameters, flat_parameters(model.policy))
    after = model.policy.optimizer.state_dict()
    assert moments["param_groups"] == after["param_groups"]
    for index, state in moments["state"].items():
        for name, moment in state.items():
            assert th.equal(moment, after["state"][index][name])


def test_nan_rewards_skip_the_update_with_a_warning() -> None:
    model = make_model(TORQUES)
    model.rollout_buffer.advantages[3] = math.nan
    model.rollout_buffer.returns[3] = math.nan
    before = flat_parameters(model.policy)
    with pytest.warns(UserWarning, match="left the policy as it was in this update: non_finite"):
        model.train()
    assert th.equal(before, flat_parameters(model.policy))
    assert logged(model)["train/is_line_search_success"] == 0.0


def test_a_zero_gradient_skips_the_actor_only() -> None:
    model = make_model(TORQUES)
    model.rollout_buffer.advantages[:] = 1.0
    with pytest.warns(UserWarning, match="zero_gradient"):
        model.train()
    assert logged(model)["train/is_line_search_success"] == 0.0
    assert "train/value_loss" in logged(model)


def test_log_says_what_happened() -> None:
    model = make_model(TORQUES)
    model.train()
    log = logged(model)
    assert log["train/is_line_search_success"] == 1.0
    assert 0.0 < log["train/kl"] <= log["train/target_kl"] == pytest.approx(0.06)
    assert log["train/predicted_improvement"] > 0.0
    assert log["train/actual_improvement"] >= 0.1 * log["train/predicted_improvement"]
    assert log["train/step_fraction"] in [pytest.approx(0.8**k) for k in range(10)]
    assert 1 <= log["train/cg_steps"] <= 15
    assert 0.0 < log["train/cg_residual"] < 1.0


@pytest.mark.parametrize(
    "action_space",
    [TORQUES, spaces.Discrete(4), spaces.MultiDiscrete([3, 4]), spaces.MultiBinary(3)],
    ids=["box", "discrete", "multi-discrete", "multi-binary"],
)
def test_log_has_contribs_numbers(action_space: spaces.Space[Any]) -> None:
    """By SB3's distribution objects and contrib's expressions, of the policy before and after the update."""
    model = make_model(action_space, target_kl=0.2)
    before = copy.deepcopy(model.policy)
    rollout = model.rollout_buffer.flat()
    model.train()
    with th.no_grad():
        old, new = (policy.get_distribution(rollout.observations) for policy in (before, model.policy))
        actions = rollout.actions.flatten() if isinstance(action_space, spaces.Discrete) else rollout.actions
        advantages = (rollout.advantages - rollout.advantages.mean()) / (rollout.advantages.std() + 1e-8)
        objective = (advantages * (new.log_prob(actions) - old.log_prob(actions)).exp()).mean().item()
        kl = sb3_kl_divergence(new, old).mean().item()
        entropy = old.entropy().mean().item()
    log = logged(model)
    assert log["train/is_line_search_success"] == 1.0
    assert log["train/policy_objective"] == pytest.approx(objective, rel=1e-4)
    assert log["train/kl_divergence_loss"] == pytest.approx(kl, rel=1e-4)
    assert log["train/entropy_loss"] == pytest.approx(-entropy, rel=1e-5)


@pytest.mark.parametrize("subsampling", [1, 4])
def test_chunks_add_up_to_the_whole(subsampling: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rollout that is too large for one pass gives the same step as one that is not."""
    steps = []
    for rows in (2**14, 60):
        monkeypatch.setattr(data, "CHUNK_ROWS", rows)
        model = make_model(TORQUES, sub_sampling_factor=subsampling, ent_coef=0.01)
        before = flat_parameters(model.policy)
        assert policy_step(model).status == "accepted"
        steps.append(flat_parameters(model.policy) - before)
    th.testing.assert_close(steps[0], steps[1], atol=1e-6, rtol=1e-3)


def test_subsampling_is_of_the_products_alone() -> None:
    """Objective and improvement are of all samples; the step differs a little from that of all."""
    steps = {}
    for subsampling in (1, 4):
        model = make_model(TORQUES, sub_sampling_factor=subsampling)
        before = flat_parameters(model.policy)
        step = policy_step(model)
        assert step.objective == pytest.approx(0.0, abs=1e-6)  # of normalised advantages, over all samples
        steps[subsampling] = flat_parameters(model.policy) - before
    cosine = th.nn.functional.cosine_similarity(steps[1], steps[4], dim=0).item()
    assert 0.8 < cosine < 1.0 - 1e-6


def test_a_policy_that_overrides_methods_makes_the_same_step() -> None:
    steps = []
    for policy in ("MlpPolicy", OverridesForward):
        model = make_model(TORQUES, policy=policy)
        before = flat_parameters(model.policy)
        assert policy_step(model).status == "accepted"
        steps.append(flat_parameters(model.policy) - before)
    th.testing.assert_close(steps[0], steps[1], atol=1e-6, rtol=1e-3)
