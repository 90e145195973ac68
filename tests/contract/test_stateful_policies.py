"""
Policies that are no pure function of the observation, or have a distribution of their own.

What is stored of a rollout is what the acting policy said, whatever the policy or a callback does meanwhile.
"""

from __future__ import annotations

import re
from typing import Any, ClassVar

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.distributions import (
    DiagGaussianDistribution,
    Distribution,
    SquashedDiagGaussianDistribution,
)
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from torch import nn

from sb3_ppo_ext import REINFORCE, TRPO, AdaptiveKLPPO, DualClipPPO
from sb3_ppo_ext.common.rollout.purity import impurity
from tests.algorithms import ALGORITHMS, ROLLOUT, assert_close_policies, have_moved, parameters, ppo_and_ours, small
from tests.custom import EveryStepBuffer
from tests.envs import BOX, BOX_ACTIONS, ScriptedEnv, scripted


class Noisy(BaseFeaturesExtractor):
    """Draws noise in each pass."""

    def __init__(self, observation_space: Any) -> None:
        super().__init__(observation_space, observation_space.shape[0])

    def forward(self, x: th.Tensor) -> th.Tensor:
        return x * (1 + 0.5 * th.randn(x.shape[1]))


class Running(BaseFeaturesExtractor):
    """Keeps a mean of what it sees in each pass, also in evaluation mode, and counts its calls."""

    def __init__(self, observation_space: Any) -> None:
        super().__init__(observation_space, observation_space.shape[0])
        self.mean: th.Tensor
        self.seen: th.Tensor
        self.register_buffer("mean", th.zeros(observation_space.shape))
        self.register_buffer("seen", th.zeros(()))

    def forward(self, x: th.Tensor) -> th.Tensor:
        self.seen.add_(len(x))  # in place, as a buffer is
        self.mean += (x.detach().mean(dim=0) - self.mean) * len(x) / self.seen
        return x - self.mean


class BatchStatistics(BaseFeaturesExtractor):
    """Normalises by the batch that it is given: by all environments in a step."""

    def __init__(self, observation_space: Any) -> None:
        super().__init__(observation_space, observation_space.shape[0])

    def forward(self, x: th.Tensor) -> th.Tensor:
        return x - 0.5 * x.mean(dim=0)


def sb3_and_ours(policy_kwargs: dict[str, Any], policy: Any = "MlpPolicy", **kwargs: Any) -> tuple[Any, Any]:
    """After two rollouts in environments with time limits."""
    return ppo_and_ours(policy, scripted, 4 * ROLLOUT, policy_kwargs=policy_kwargs, **kwargs)


def agree(theirs: Any, ours: Any) -> None:
    theirs.rollout_buffer.get().__next__()  # which makes its arrays flat
    for name in ("observations", "actions", "values", "log_probs", "advantages", "returns"):
        flat = ours.rollout_buffer.swap_and_flatten(getattr(ours.rollout_buffer, name))
        np.testing.assert_allclose(flat, getattr(theirs.rollout_buffer, name), atol=2e-5, rtol=1e-4, err_msg=name)
    assert_close_policies(theirs, ours, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("extractor", [Noisy, Running, BatchStatistics])
@pytest.mark.parametrize("share", [True, False])
def test_a_network_that_is_not_pure_is_trained_as_by_sb3(extractor: Any, share: bool) -> None:
    """The random numbers, the statistics and the passes are SB3's, one by one."""
    agree(*sb3_and_ours({"features_extractor_class": extractor, "share_features_extractor": share}))


@pytest.mark.parametrize("algorithm", [AdaptiveKLPPO, TRPO])
@pytest.mark.parametrize("buffer", [None, EveryStepBuffer])
@pytest.mark.parametrize("hooked", [False, True])
def test_the_parameters_of_the_distributions_are_of_the_acting_pass(algorithm: Any, buffer: Any, hooked: bool) -> None:
    env = scripted()
    kwargs = {} if buffer is None else {"rollout_buffer_class": buffer}
    model = small(algorithm, "MlpPolicy", env, policy_kwargs={"features_extractor_class": Noisy}, **kwargs)
    if hooked:
        model.policy.register_forward_hook(lambda *_: None)
    model.learn(2 * ROLLOUT)
    flat = model.rollout_buffer.flat()
    log_prob = model._family.log_prob(flat.old_params, flat.actions)
    th.testing.assert_close(log_prob, flat.old_log_prob, atol=1e-5, rtol=1e-4)


class Anneals(BaseCallback):
    """Changes the policy in each step; as ``hidden`` does it, torch counts no change."""

    hidden = False

    def _on_step(self) -> bool:
        log_std = self.model.policy.log_std
        if self.hidden:
            log_std.data.sub_(0.05)
        else:
            with th.no_grad():
                log_std.sub_(0.05)
        return True


class AnnealsUnseen(Anneals):
    hidden = True


@pytest.mark.usefixtures("without_compiler")
@pytest.mark.parametrize("torch_compile", [False, True])
def test_a_callback_that_changes_the_policy_in_a_rollout(torch_compile: bool) -> None:
    theirs, ours = sb3_and_ours({}, callback=Anneals, of_ours={"torch_compile": torch_compile})
    agree(theirs, ours)


def test_a_change_that_torch_does_not_count_is_said_and_then_followed() -> None:
    """The first rollout cannot be mended; the second has the standard deviation of each of its steps."""
    with pytest.warns(UserWarning, match=r"policy was changed while it collected a rollout, .* \(by .data"):
        _, ours = sb3_and_ours({}, callback=AnnealsUnseen)
    log_std = np.log(ours.rollout_buffer.distribution_params[:, 0, 2])
    np.testing.assert_allclose(np.diff(log_std), -0.05, atol=1e-5)


@pytest.mark.parametrize("algorithm", [TRPO, REINFORCE])
@pytest.mark.parametrize("share", [True, False])
def test_a_normaliser_of_training_mode_sees_each_observation_once_for_the_actor(algorithm: Any, share: bool) -> None:
    class Norm(Running):
        def forward(self, x: th.Tensor) -> th.Tensor:
            if self.training:
                super().forward(x)
            return x - self.mean

    kwargs = {"features_extractor_class": Norm, "share_features_extractor": share}
    model = small(algorithm, "MlpPolicy", "CartPole-v1", policy_kwargs=kwargs)
    model.learn(1)
    n_samples = len(model.rollout_buffer.flat().returns)
    assert model.policy.pi_features_extractor.seen == n_samples
    # Two passes of the critic, over an extractor of its own.
    assert model.policy.vf_features_extractor.seen == (n_samples if share else 2 * n_samples)


# --- distributions ---------------------------------------------------------------------------------------------------


class Squashed(ActorCriticPolicy):
    """SB3 has the distribution, and no policy that uses it."""

    action_space: spaces.Box

    def _build(self, lr_schedule: Any) -> None:
        super()._build(lr_schedule)
        self.action_dist = SquashedDiagGaussianDistribution(self.action_space.shape[0])

    def _get_action_dist_from_latent(self, latent_pi: th.Tensor) -> Distribution:
        return self.action_dist.proba_distribution(self.action_net(latent_pi), self.log_std)


class Laplace(DiagGaussianDistribution):
    """Another distribution, by the class of one that is known."""

    distribution: Any  # type: ignore[assignment]

    def proba_distribution(self, mean_actions: th.Tensor, log_std: th.Tensor) -> Any:
        self.distribution = th.distributions.Laplace(mean_actions, log_std.exp().expand_as(mean_actions))
        return self

    def entropy(self) -> Any:
        return self.distribution.entropy().sum(dim=1)


class BetaDistribution(Distribution):
    def proba_distribution_net(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError

    def proba_distribution(self, logits: th.Tensor) -> Any:
        a, b = (1.0 + nn.functional.softplus(logits)).chunk(2, dim=1)
        self.distribution = th.distributions.Beta(a, b)
        return self

    def log_prob(self, actions: th.Tensor) -> th.Tensor:
        return self.distribution.log_prob(((actions + 1) / 2).clamp(1e-6, 1 - 1e-6)).sum(dim=1)

    def entropy(self) -> th.Tensor:
        return self.distribution.entropy().sum(dim=1)

    def sample(self) -> th.Tensor:
        return 2 * self.distribution.sample() - 1

    def mode(self) -> th.Tensor:
        return 2 * self.distribution.mean - 1

    def actions_from_params(self, *args: Any, **kwargs: Any) -> th.Tensor:
        return self.proba_distribution(*args).sample()

    def log_prob_from_params(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError


class WithLaplace(Squashed):
    def _build(self, lr_schedule: Any) -> None:
        super()._build(lr_schedule)
        self.action_dist = Laplace(self.action_space.shape[0])


class WithBeta(ActorCriticPolicy):
    action_space: spaces.Box

    def _build(self, lr_schedule: Any) -> None:
        super()._build(lr_schedule)
        self.action_dist = BetaDistribution()
        self.action_net = nn.Linear(self.mlp_extractor.latent_dim_pi, 2 * self.action_space.shape[0])
        self.optimizer = th.optim.Adam(self.parameters(), lr=lr_schedule(1), eps=1e-5)

    def _get_action_dist_from_latent(self, latent_pi: th.Tensor) -> Distribution:
        return self.action_dist.proba_distribution(self.action_net(latent_pi))


@pytest.mark.parametrize("policy", [WithLaplace, WithBeta])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_distribution_of_ones_own(algorithm: Any, policy: Any) -> None:
    """It is learnt with by its own formulas, or refused at once where those that are needed are not known."""
    env = ScriptedEnv(BOX, BOX_ACTIONS)
    if algorithm in (AdaptiveKLPPO, TRPO):
        with pytest.raises(ValueError, match=rf"{policy.__name__} is not allowed: .* needs the exact KL divergence"):
            small(algorithm, policy, env)
        return
    model = small(algorithm, policy, env)
    before = parameters(model)
    ratios: list[float] = []
    train = model.train

    def check_and_train() -> None:
        flat = model.rollout_buffer.flat()
        with th.no_grad():
            log_prob = model._actor_critic().evaluate_actor(flat.inputs, flat.actions).log_prob
        ratios.extend((log_prob - flat.old_log_prob).exp().tolist())
        train()

    model.train = check_and_train
    model.learn(2 * ROLLOUT)
    assert ratios == pytest.approx([1.0] * len(ratios), rel=1e-4)
    assert have_moved(model, before)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_the_ratio_of_a_squashed_policy_to_itself_is_one(algorithm: Any) -> None:
    model = small(algorithm, Squashed, ScriptedEnv(BOX, BOX_ACTIONS), policy_kwargs={"log_std_init": -1.0})
    _, callback = model._setup_learn(ROLLOUT, None)
    model.collect_rollouts(model.env, callback, model.rollout_buffer, ROLLOUT)
    flat = model.rollout_buffer.flat()
    with th.no_grad():
        actor = model._actor_critic().evaluate_actor(flat.inputs, flat.actions)
    th.testing.assert_close(actor.log_prob, flat.old_log_prob, atol=1e-4, rtol=1e-4)
    if algorithm in (AdaptiveKLPPO, TRPO):
        th.testing.assert_close(
            model._family.log_prob(actor.params, flat.actions), flat.old_log_prob, atol=1e-3, rtol=1e-3
        )
        assert float(model._family.kl(flat.old_params, actor.params).abs().max()) < 1e-6
    model.train()


class Lies(ActorCriticPolicy):
    """Its log-probabilities are not those of its distribution."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        actions, values, log_prob = super().forward(*args, **kwargs)
        return actions, values, 2.0 * log_prob


def test_log_probabilities_of_another_distribution_are_refused_before_an_update() -> None:
    model = small(TRPO, Lies, ScriptedEnv(BOX, BOX_ACTIONS))
    before = [p.clone() for p in model.policy.parameters()]
    with pytest.raises(ValueError, match="its log-probabilities are not those of its action_dist"):
        model.learn(2 * ROLLOUT)
    assert all(map(th.equal, model.policy.parameters(), before))


# --- purity ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (nn.Tanh(), None),
        (nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.Dropout(0.1), nn.BatchNorm1d(8)), None),
        (nn.BatchNorm1d(8, track_running_stats=False), "normalises by the batch, also in evaluation mode"),
        (nn.Embedding(3, 8, max_norm=1.0), "changes its weights in each pass"),
        (nn.utils.parametrizations.weight_norm(nn.Linear(8, 8)), "is not known to be a pure function"),
        (nn.Sequential(nn.Linear(8, 8), nn.RNN(8, 8)), r"mlp_extractor.policy_net.0.1 \(RNN\) is not known"),
    ],
)
def test_what_is_known_to_be_pure(module: nn.Module, reason: str | None) -> None:
    model = small(DualClipPPO, "MlpPolicy", ScriptedEnv(BOX, BOX_ACTIONS))
    assert impurity(model.policy) is None
    model.policy.mlp_extractor.policy_net[0] = module
    found = impurity(model.policy)
    assert found is None if reason is None else found is not None and re.search(reason, found)


def test_a_layer_that_was_given_another_forward_is_not_known() -> None:
    model = small(DualClipPPO, "MlpPolicy", ScriptedEnv(BOX, BOX_ACTIONS))
    model.policy.action_net.forward = lambda x: x[:, :2]
    assert "action_net (Linear) has hooks, or a method of its own" in str(impurity(model.policy))


def put_methods_on(model: Any, where: str, name: str) -> None:
    module = model.policy.action_dist if where == "action_dist" else model.policy.get_submodule(where)
    method = getattr(module, name)
    setattr(module, name, lambda *args: 0.5 * method(*args))


@pytest.mark.parametrize(
    ("where", "name"),
    [
        ("action_net", "forward"),
        ("value_net", "forward"),
        ("features_extractor", "forward"),
        ("mlp_extractor.policy_net", "forward"),
        ("mlp_extractor.value_net.1", "forward"),
        ("mlp_extractor", "forward_actor"),
        ("action_dist", "log_prob"),
    ],
)
def test_methods_that_were_put_on_a_module_are_called_as_by_sb3(where: str, name: str) -> None:
    agree(*sb3_and_ours({}, prepare=lambda model: put_methods_on(model, where, name)))


class MonteCarloDropout(ActorCriticPolicy):
    """Draws its dropout while it acts, too."""

    def _build_mlp_extractor(self) -> None:
        super()._build_mlp_extractor()
        self.mlp_extractor.policy_net.append(nn.Dropout(0.5))

    def set_training_mode(self, mode: bool) -> None:
        super().set_training_mode(True)


def test_dropout_while_acting_is_drawn_as_by_sb3() -> None:
    agree(*sb3_and_ours({}, policy=MonteCarloDropout))


class Replaces(Anneals):
    """Puts another parameter, layer or hook in place at each step."""

    how: ClassVar[str] = ""

    def _on_step(self) -> bool:
        policy = self.model.policy
        if self.how == "parameter":
            policy.log_std = nn.Parameter(policy.log_std.detach() - 0.05)
        elif self.how == "layer":
            layers: Any = policy.mlp_extractor.policy_net
            layers[1] = nn.ReLU() if self.n_calls % 2 else nn.Sigmoid()
        elif self.n_calls == 20:
            policy.action_net.register_forward_hook(lambda module, args, output: 0.5 * output)
        return True


@pytest.mark.parametrize("kind", ["parameter", "layer", "hook"])
def test_what_is_replaced_in_a_rollout_is_said_and_then_followed(kind: str) -> None:
    """After the first rollout each step is made by what is there."""
    callback = type("Replacing", (Replaces,), {"how": kind})
    with pytest.warns(UserWarning, match="policy was changed while it collected a rollout"):
        _, ours = sb3_and_ours({}, callback=callback)
    assert ours._policy_changes_in_rollouts
    if kind == "parameter":
        log_std = np.log(ours.rollout_buffer.distribution_params[:, 0, 2])
        np.testing.assert_allclose(np.diff(log_std), -0.05, atol=1e-5)


# --- what is said ----------------------------------------------------------------------------------------------------


def test_it_is_said_once_why_it_is_slower(capsys: pytest.CaptureFixture[str]) -> None:
    kwargs = {"policy_kwargs": {"features_extractor_class": Noisy}, "verbose": 1}
    small(DualClipPPO, "MlpPolicy", ScriptedEnv(BOX, BOX_ACTIONS), **kwargs).learn(3 * ROLLOUT)
    out = capsys.readouterr().out
    assert out.count("features_extractor (Noisy) is not known to be a pure function") == 1
    assert "is_pure = True" in out


def test_a_module_that_is_declared_pure_is_taken_for_it(capsys: pytest.CaptureFixture[str]) -> None:
    class Pure(BaseFeaturesExtractor):
        is_pure = True

        def __init__(self, observation_space: Any) -> None:
            super().__init__(observation_space, 3)
            self.layer = nn.Linear(observation_space.shape[0], 3)
            self.calls = 0

        def forward(self, x: th.Tensor) -> th.Tensor:
            self.calls += 1
            return self.layer(x).tanh()

    kwargs = {"features_extractor_class": Pure, "share_features_extractor": False}
    model = small(DualClipPPO, "MlpPolicy", ScriptedEnv(BOX, BOX_ACTIONS), policy_kwargs=kwargs, verbose=1, n_epochs=1)
    model.learn(ROLLOUT)
    assert "pure" not in capsys.readouterr().out
    n_minibatches, at_the_end = 2, 1 + 1 + 1  # evaluation, last values, time limits
    assert model.policy.vf_features_extractor.calls == n_minibatches + at_the_end
