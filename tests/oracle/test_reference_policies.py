"""The KL divergence from a reference policy, in the rewards and in the loss, by hand and in closed form."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv

from sb3_ppo_ext import REINFORCE, TRPO, AdaptiveKLPPO, DualClipPPO
from sb3_ppo_ext.common.update.controllers import AdaptiveCoefficient
from sb3_ppo_ext.common.update.objective import ActorCriticLoss, PolicyLoss
from sb3_ppo_ext.common.update.reduce import OneProcess
from sb3_ppo_ext.common.update.scores import add_up_gradients
from sb3_ppo_ext.common.update.surrogate import Surrogate
from tests.algorithms import ALGORITHMS, small
from tests.envs import BOX, BOX_ACTIONS, scripted
from tests.vectors import NativeVector, scripted_envs

REWARDS = (1.0, 0.0, 0.5)
ACTING = (0.5, 0.25, 0.25)
REFERENCE = (0.25, 0.25, 0.5)
LOG_2 = 0.6931472
LOG_RATIOS = (LOG_2, 0.0, -LOG_2)  # of ACTING to REFERENCE
KL = 0.1732868  # 0.5 log 2 + 0.25 * 0 - 0.25 log 2
KL_GRADIENT = (0.2599302, -0.0433217, -0.2166085)  # in the logits of ACTING, p (log-ratio - KL)


class Bandit(VecEnv):
    """
    Each step is an episode, whose reward the action decides.

    :param n_envs: how many there are
    :param mask: which actions are allowed; None: all, and nothing says so
    """

    def __init__(self, n_envs: int = 4, mask: tuple[bool, ...] | None = None) -> None:
        super().__init__(n_envs, BOX, spaces.Discrete(3))
        self._mask = mask

    def reset(self) -> Any:
        return np.zeros((self.num_envs, 4), np.float32)

    def step_async(self, actions: np.ndarray) -> None:
        self._actions = actions

    def step_wait(self) -> Any:
        obs = self.reset()
        infos: list[dict[str, Any]] = [{"terminal_observation": obs[0]} for _ in range(self.num_envs)]
        return obs, np.array(REWARDS, np.float32)[self._actions], np.ones(self.num_envs, bool), infos

    def has_attr(self, attr_name: str) -> bool:
        return attr_name == "action_masks" and self._mask is not None

    def env_method(self, method_name: str, *args: Any, indices: Any = None, **kwargs: Any) -> list[Any]:
        if method_name != "action_masks" or self._mask is None:
            raise AttributeError(method_name)
        return [np.array(self._mask)] * self.num_envs

    def get_attr(self, attr_name: str, indices: Any = None) -> list[Any]:
        if attr_name == "action_masks" and self._mask is None:
            raise AttributeError(attr_name)
        return [None] * self.num_envs

    def set_attr(self, attr_name: str, value: Any, indices: Any = None) -> None: ...

    def env_is_wrapped(self, wrapper_class: Any, indices: Any = None) -> list[bool]:
        return [False] * self.num_envs

    def close(self) -> None: ...


@th.no_grad()
def set_probabilities(policy: Any, probabilities: tuple[float, ...]) -> None:
    """Let a policy draw its actions with these, whatever it sees; the logits are the bias of its last layer."""
    policy.action_net.weight.zero_()
    policy.action_net.bias.copy_(th.tensor(probabilities).log())


def reference() -> Any:
    policy = small(DualClipPPO, "MlpPolicy", Bandit()).policy
    set_probabilities(policy, REFERENCE)
    return policy


def with_reference(algorithm: Any, n_envs: int = 4, mask: Any = None, **kwargs: Any) -> Any:
    model = small(algorithm, "MlpPolicy", Bandit(n_envs, mask), **{"reference_policy": reference(), **kwargs})
    set_probabilities(model.policy, ACTING)
    return model


def collected(model: Any) -> Any:
    """A model with a rollout of the policy as it is, and no update."""
    model.train = lambda: None
    return model.learn(1)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_the_penalty_is_taken_off_the_reward_of_each_step(algorithm: Any) -> None:
    model = collected(with_reference(algorithm, reference_kl_coef=0.5))
    buffer = model.rollout_buffer
    actions = buffer.actions.astype(int)[..., 0]
    assert set(actions.flatten()) == {0, 1, 2}
    np.testing.assert_array_equal(buffer.rewards, np.array(REWARDS, np.float32)[actions])  # those of the environment
    expected = np.array([1.0 - 0.5 * LOG_2, 0.0, 0.5 + 0.5 * LOG_2])[actions]
    np.testing.assert_allclose(buffer.returns, expected, atol=1e-6)
    np.testing.assert_allclose(buffer.advantages, expected - buffer.values, atol=1e-6)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_in_the_loss_the_returns_are_those_of_the_environment(algorithm: Any) -> None:
    buffer = collected(with_reference(algorithm, reference_kl="loss")).rollout_buffer
    np.testing.assert_allclose(buffer.returns, buffer.rewards, atol=1e-6)


def test_penalties_of_later_steps_count_in_the_return() -> None:
    """GAE and the returns are those of an environment whose rewards are less by the penalties."""
    kwargs: dict[str, Any] = {"reference_kl_coef": 0.3, "gamma": 0.9, "gae_lambda": 0.8}
    model = small(DualClipPPO, "MlpPolicy", scripted(), reference_policy="initial", **kwargs)
    model.learn(32)
    with th.no_grad():  # another policy than the reference
        model.policy.action_net.bias.add_(0.5)
    buffer = collected(model).rollout_buffer
    assert np.abs(buffer.penalties).max() > 0.1
    advantages, returns = buffer.advantages, buffer.returns
    buffer.rewards, buffer.penalties = buffer.rewards - buffer.penalties, None
    buffer.compute_returns_and_advantage(th.as_tensor(buffer.last_values), buffer._last_dones)
    np.testing.assert_allclose(advantages, buffer.advantages, atol=1e-6)
    np.testing.assert_allclose(returns, buffer.returns, atol=1e-6)


SEEN: list[th.Tensor] = []


class Sees(DualClipPPO):
    @staticmethod
    def policy_loss(evaluation: Any, samples: Any, coefficients: Any) -> PolicyLoss:
        SEEN.append(samples.returns)
        return DualClipPPO.policy_loss(evaluation, samples, coefficients)


def test_advantages_that_are_computed_anew_have_the_penalty_too() -> None:
    SEEN.clear()
    with_reference(Sees, reference_kl_coef=0.5, recompute_advantages=True).learn(64)
    assert len(SEEN) == 16
    possible = th.tensor([1.0 - 0.5 * LOG_2, 0.0, 0.5 + 0.5 * LOG_2])
    assert (th.cat(SEEN)[:, None] - possible).abs().min(dim=1).values.max() < 1e-5


@pytest.mark.parametrize("form", ["reward", "loss"])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_what_is_logged(algorithm: Any, form: str) -> None:
    model = with_reference(algorithm, reference_kl_coef=2.0, reference_kl=form).learn(1)
    logged = model.logger.name_to_value
    assert logged["train/reference_kl"] == pytest.approx(KL, abs=1e-6)
    assert logged["train/reference_kl_coef"] == 2.0
    buffer = model.rollout_buffer
    actions = buffer.actions.astype(int).flatten()
    if algorithm is not REINFORCE:  # whose buffer has a step more, which does not count
        assert logged["train/reward_mean"] == pytest.approx(buffer.rewards.mean(), abs=1e-6)
        penalty = 2.0 * (KL if form == "loss" else np.array(LOG_RATIOS)[actions].mean())
        assert logged["train/penalized_reward_mean"] == pytest.approx(buffer.rewards.mean() - penalty, abs=1e-5)


def test_only_steps_that_count_are_in_the_means() -> None:
    """With 3 + 2 steps one environment waits for the other, which has 2 + 4."""
    env = DummyVecEnv(list(scripted_envs(2)))
    model = small(REINFORCE, "MlpPolicy", env, episodes_per_env=2, reference_policy="initial").learn(1)
    buffer, n_counted = model.rollout_buffer, len(model.rollout_buffer.flat().returns)
    assert n_counted == 11 < buffer.rewards.size == 12
    expected = buffer.rewards.swapaxes(0, 1).flatten()[buffer._counts.numpy()].mean()
    assert model.logger.name_to_value["train/reward_mean"] == pytest.approx(expected, rel=1e-5)


def test_steps_on_which_an_environment_only_begins_an_episode_are_in_no_mean() -> None:
    model = small(DualClipPPO, "MlpPolicy", NativeVector(scripted_envs(2)), reference_policy="initial").learn(1)
    buffer = model.rollout_buffer
    assert 0 < buffer.counts.sum() < buffer.rewards.size
    expected = buffer.rewards[buffer.counts].mean()
    assert model.logger.name_to_value["train/reward_mean"] == pytest.approx(expected, rel=1e-5)


def by_torch(policy: Any, obs: th.Tensor) -> list[Any]:
    distribution = policy.get_distribution(obs).distribution
    return distribution if isinstance(distribution, list) else [distribution]


@pytest.mark.parametrize(
    "space", [BOX_ACTIONS, spaces.Discrete(3), spaces.MultiDiscrete([2, 3]), spaces.MultiBinary(2)], ids=str
)
def test_the_kl_is_that_of_torch_distributions(space: spaces.Space[Any]) -> None:
    other = small(DualClipPPO, "MlpPolicy", scripted(action_space=space), seed=1, policy_kwargs={"log_std_init": -0.5})
    with th.no_grad():
        other.policy.action_net.weight.normal_()
    model = small(DualClipPPO, "MlpPolicy", scripted(action_space=space), reference_policy=other.policy)
    model.learning_rate = 0.0
    model.lr_schedule = lambda _: 0.0
    model.learn(32)
    obs = model.rollout_buffer.flat().observations
    with th.no_grad():
        pairs = zip(by_torch(model.policy, obs), by_torch(other.policy, obs), strict=True)
        kls = [th.distributions.kl_divergence(p, q) for p, q in pairs]
    expected = sum(kl.view(len(obs), -1).sum(dim=1) for kl in kls)
    assert isinstance(expected, th.Tensor)
    assert expected.mean() > 0.05
    assert model.logger.name_to_value["train/reference_kl"] == pytest.approx(expected.mean().item(), rel=1e-4)


@pytest.mark.parametrize("form", ["reward", "loss"])
def test_under_a_mask_both_are_distributions_over_what_is_allowed(form: str) -> None:
    """(2/3, 1/3) against (1/2, 1/2)."""
    model = with_reference(DualClipPPO, mask=(True, True, False), reference_kl_coef=1.0, reference_kl=form).learn(64)
    expected = math.log(4 / 3) * 2 / 3 + math.log(2 / 3) / 3
    assert model.logger.name_to_value["train/reference_kl"] == pytest.approx(expected, abs=1e-6)
    buffer = model.rollout_buffer
    actions = buffer.actions.astype(int)[..., 0]
    assert set(actions.flatten()) == {0, 1}
    if form == "reward":
        np.testing.assert_allclose(buffer.penalties, np.log([4 / 3, 2 / 3])[actions], atol=1e-6)
    assert all(bool(p.isfinite().all()) for p in model.policy.parameters())


def nothing(evaluation: Any, samples: Any, coefficients: Any) -> PolicyLoss:
    return PolicyLoss(0.0 * evaluation.log_prob.mean(), {})


def kl_loss(model: Any, coef: float) -> th.Tensor:
    """The loss of a minibatch without all but the KL divergence from the reference."""
    coefficients = {"ent_coef": 0.0, "vf_coef": 0.0, "reference_kl_coef": coef}
    loss, _ = ActorCriticLoss(nothing, False)(
        model._actor_critic(for_update=True), model.rollout_buffer.flat(), coefficients
    )
    return loss


def test_the_gradient_of_the_loss_of_ppo() -> None:
    model = collected(with_reference(DualClipPPO, reference_kl="loss"))
    loss = kl_loss(model, 0.5)
    loss.backward()
    assert loss.item() == pytest.approx(0.5 * KL, abs=1e-6)
    th.testing.assert_close(model.policy.action_net.bias.grad, 0.5 * th.tensor(KL_GRADIENT), atol=1e-6, rtol=0.0)


def test_the_gradient_of_the_objective_of_trpo() -> None:
    model = collected(with_reference(TRPO, reference_kl="loss"))
    actor_critic, rollout = model._actor_critic(), model.rollout_buffer.flat()
    bias = model.policy.action_net.bias
    gradients = []
    for coef in (0.5, 0.0):
        surrogate = Surrogate(
            actor_critic,
            actor_critic.family,
            rollout,
            ent_coef=0.0,
            reference_kl_coef=coef,
            chunks=model._chunks,
            reducer=model._reducer,
        )
        gradients.append(surrogate.gradient([bias])[0])
    th.testing.assert_close(gradients[1] - gradients[0], 0.5 * th.tensor(KL_GRADIENT), atol=1e-6, rtol=0.0)


def test_the_gradient_of_the_loss_of_reinforce_adds_up_over_an_episode() -> None:
    model = collected(with_reference(REINFORCE, reference_kl="loss"))
    rollout = model.rollout_buffer.flat()
    bias = model.policy.action_net.bias
    gradients = []
    for coef in (0.5, 0.0):
        bias.grad = None
        add_up_gradients(
            model._actor_critic(),
            rollout,
            n_episodes=len(rollout.returns) // 3,  # as if each had three steps
            ent_coef=0.0,
            reference_kl_coef=coef,
            chunks=model._chunks,
        )
        gradients.append(bias.grad)
    n_steps = len(rollout.returns) / (len(rollout.returns) // 3)
    th.testing.assert_close(gradients[0] - gradients[1], n_steps * 0.5 * th.tensor(KL_GRADIENT), atol=1e-5, rtol=0.0)


def test_the_gradient_of_the_loss_by_finite_differences() -> None:
    other = small(DualClipPPO, "MlpPolicy", scripted(), seed=1, policy_kwargs={"log_std_init": -0.5})
    model = collected(small(DualClipPPO, "MlpPolicy", scripted(), reference_policy=other.policy, reference_kl="loss"))
    with th.no_grad():
        model.policy.action_net.weight.normal_()
    kl_loss(model, 1.0).backward()
    for parameter in (model.policy.log_std, model.policy.action_net.bias):
        for i in range(len(parameter)):
            values = []
            for step in (1e-2, -1e-2):
                with th.no_grad():
                    parameter[i] += step
                    values.append(kl_loss(model, 1.0).item())
                    parameter[i] -= step
            assert parameter.grad[i].item() == pytest.approx((values[0] - values[1]) / 2e-2, rel=2e-3, abs=1e-4)


def large(algorithm: Any) -> dict[str, Any]:
    """Arguments for updates of few steps, of many samples each, that go far."""
    if algorithm is REINFORCE:
        return {"episodes_per_env": 16, "baseline": "mean", "learning_rate": 0.05}
    of_trpo = {"n_critic_updates": 1, "target_kl": 0.003}
    return {"learning_rate": 0.02, "batch_size": 256, **(of_trpo if algorithm is TRPO else {"n_epochs": 4})}


def kl_after(model: Any, steps: int) -> float:
    model.learn(steps)
    policy, given = model.policy, model.reference_policy.policy
    obs = th.zeros(1, 4)
    with th.no_grad():
        return float(th.distributions.kl_divergence(by_torch(policy, obs)[0], by_torch(given, obs)[0]))


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_with_a_large_coefficient_the_policy_stays_at_the_reference(algorithm: Any) -> None:
    kwargs = {**large(algorithm), "reference_policy": "initial", "reference_kl": "loss"}
    free, bound = (with_reference(algorithm, 16, reference_kl_coef=coef, **kwargs) for coef in (0.0, 1e3))
    assert kl_after(free, 16 * 16 * 8) > 0.02
    assert kl_after(bound, 16 * 16 * 8) < 0.002


def test_at_the_optimum_the_penalised_reward_is_the_same_for_all_actions() -> None:
    """``pi* ~ pi_ref exp(r / coef)``: nothing is left to be learnt."""
    coef = 0.5
    model = with_reference(DualClipPPO, reference_kl_coef=coef)
    weights = th.tensor(REFERENCE) * (th.tensor(REWARDS) / coef).exp()
    set_probabilities(model.policy, tuple((weights / weights.sum()).tolist()))
    returns = collected(model).rollout_buffer.returns
    np.testing.assert_allclose(returns, 0.5 * math.log(3.4564049), atol=1e-5)  # coef * log of the sum of the weights


@pytest.mark.parametrize(
    ("algorithm", "form"),
    [(DualClipPPO, "reward"), (AdaptiveKLPPO, "loss"), (TRPO, "loss"), (REINFORCE, "reward"), (REINFORCE, "loss")],
)
def test_the_optimum_of_a_bandit_is_reached(algorithm: Any, form: str) -> None:
    """With the coefficient 0.5: (0.25 e^2, 0.25, 0.5 e) / 3.4564."""
    kwargs = large(algorithm)
    if algorithm is not REINFORCE:
        kwargs["normalize_advantage"] = False  # so that the coefficient is in units of the reward
    model = with_reference(algorithm, 32, reference_kl_coef=0.5, reference_kl=form, **kwargs)
    model.learn(32 * 16 * 30)
    with th.no_grad():
        (distribution,) = by_torch(model.policy, th.zeros(1, 4))
    np.testing.assert_allclose(distribution.probs[0], [0.53445, 0.07233, 0.39322], atol=0.05)


def test_the_coefficient_follows_the_kl() -> None:
    """To a target far below the KL, which is 0.17: it is doubled; far above it: halved; up to its bounds."""
    for target, expected in ((0.01, 0.2), (1.0, 0.05), (0.15, 0.1)):
        given = {"target_kl": target, "coef": 0.1}
        model = with_reference(DualClipPPO, reference_kl_coef=given).learn(64)
        assert model.reference_kl_coef == {"target_kl": target, "coef": pytest.approx(expected)}
        assert given["coef"] == 0.1
        assert model.logger.name_to_value["train/reference_kl_coef"] == 0.1  # of the update before
    bounds = AdaptiveCoefficient(target_kl=0.1, coef=1.0, factor=3.0, minimum=0.5, maximum=2.0)
    assert [bounds.after(kl) for kl in (0.16, 0.14, 0.07, 0.06)] == [2.0, 1.0, 1.0, 0.5]


def test_a_schedule_is_followed() -> None:
    model = collected(with_reference(DualClipPPO, reference_kl_coef="lin_2.0"))
    buffer = model.rollout_buffer
    actions = buffer.actions.astype(int)[..., 0]
    np.testing.assert_allclose(buffer.penalties, 2.0 * np.array(LOG_RATIOS)[actions], atol=1e-5)


class WithAnother(OneProcess):
    """Of two processes: the other has measured a KL of 0.5, a reward of 2 and no penalty, over 48 steps."""

    is_local = False

    def summed(self, message: th.Tensor) -> th.Tensor:
        return message + 48.0 * th.tensor([0.5, 2.0, 0.0, 1.0], dtype=message.dtype)


def test_the_means_are_those_of_all_processes() -> None:
    """Of 16 steps here: a quarter of this process's KL and three of the other's."""
    model = collected(with_reference(DualClipPPO, 1, reference_kl_coef={"target_kl": 0.3, "coef": 1.0}))
    own_reward = model.rollout_buffer.rewards.mean()
    model._reducer = WithAnother()
    model._follow_reference()
    logged = model.logger.name_to_value
    assert logged["train/reference_kl"] == pytest.approx((KL + 3 * 0.5) / 4, abs=1e-6)
    assert logged["train/reward_mean"] == pytest.approx((own_reward + 3 * 2.0) / 4, abs=1e-6)
    assert model.reference_kl_coef["coef"] == 1.0  # 0.418 is within 1.5 times 0.3
