"""REINFORCE's gradient against an enumerated Markov decision process, hand-worked numbers and closed forms."""

from __future__ import annotations

import copy
import itertools
import math
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.vec_env import DummyVecEnv

from sb3_ppo_ext import REINFORCE
from sb3_ppo_ext.common.rollout import data
from sb3_ppo_ext.common.rollout.data import RolloutSamples
from tests.envs import ScriptedEnv
from tests.oracle.tabular import (
    BASELINES,
    RETURNS,
    TRAJECTORIES,
    Trajectory,
    actor_vector,
    agent,
    exact_policy_gradient,
    gradient_estimate,
    gradient_of_practice,
    policy_table,
    probability,
    samples,
    scores,
    weights_of,
)


def test_trajectories() -> None:
    assert len(TRAJECTORIES) == 11
    assert {len(trajectory.states) for trajectory in TRAJECTORIES} == {1, 2, 3}
    assert sum(map(probability, TRAJECTORIES)) == pytest.approx(1.0, abs=1e-12)
    model = agent(1)
    probs = model.policy.get_distribution(th.tensor([0, 1])).distribution.probs
    np.testing.assert_allclose(probs.detach().numpy(), policy_table(), atol=1e-6)


def test_the_two_gradients_differ() -> None:
    """Or the next test could not tell them apart."""
    assert np.abs(exact_policy_gradient() - gradient_of_practice()).max() > 0.02


PAIRS = [(2, *combination) for combination in itertools.product(RETURNS, ("present", "start"), BASELINES)]

TRIPLES = [(3, "reward_to_go", "start", baseline) for baseline in ("mean", "optimal", "leave_one_out")]


@pytest.mark.parametrize(("n_episodes", "returns", "discount_from", "baseline"), PAIRS + TRIPLES)
def test_unbiased(n_episodes: int, returns: Any, discount_from: Any, baseline: Any) -> None:
    """The expectation over all batches of so many episodes is the gradient, to float precision."""
    model = agent(n_episodes, returns=returns, discount_from=discount_from, baseline=baseline)
    expectation = np.zeros(6)
    for batch in itertools.product(TRAJECTORIES, repeat=n_episodes):
        expectation += math.prod(map(probability, batch)) * gradient_estimate(model, list(batch))
    is_practice = returns == "reward_to_go" and discount_from == "present"
    expected = gradient_of_practice() if is_practice else exact_policy_gradient()
    np.testing.assert_allclose(expectation, expected, atol=5e-6)


@pytest.mark.parametrize("baseline", ["mean", "optimal", "leave_one_out"])
@pytest.mark.parametrize("returns", RETURNS)
def test_baseline_is_subtracted(returns: Any, baseline: Any) -> None:
    """Subtracting nothing would be unbiased as well: a return that all episodes share leaves nothing to learn."""
    same = [trajectory for trajectory in TRAJECTORIES if len(trajectory.states) == 1] * 3
    model = agent(3, returns=returns, baseline=baseline)
    np.testing.assert_allclose(weights_of(model, same), 0.0, atol=1e-5)


# States, actions and rewards of three episodes of 2, 1 and 3 steps, for weights by hand with gamma = 0.5.
# Rewards to go: 4 + 0.5 * 2 = 5, 2; 3; 8 + 0.5 * 4 + 0.25 * 8 = 12, 4 + 0.5 * 8 = 8, 8.
BY_HAND = [
    Trajectory((0, 1), (0, 0), (4.0, 2.0), 1.0),
    Trajectory((0,), (1,), (3.0,), 1.0),
    Trajectory((0, 1, 0), (0, 1, 1), (8.0, 4.0, 8.0), 1.0),
]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, [5, 2, 3, 12, 8, 8]),
        ({"returns": "total"}, [5, 5, 3, 12, 12, 12]),
        # times 1, 0.5, 0.25 from the start of each episode
        ({"discount_from": "start"}, [5, 1, 3, 12, 4, 2]),
        ({"returns": "total", "discount_from": "start"}, [5, 5, 3, 12, 12, 12]),
        # less the values 2.5 and -7 of the states 0 and 1
        ({"baseline": "value"}, [2.5, 9, 0.5, 9.5, 15, 5.5]),
        ({"baseline": "value", "discount_from": "start"}, [2.5, 4.5, 0.5, 9.5, 7.5, 1.375]),
        ({"baseline": "value", "returns": "total"}, [2.5, 12, 0.5, 9.5, 19, 9.5]),
        # less (3 + 12 + 8 + 8) / 4, (5 + 2 + 12 + 8 + 8) / 5 and (5 + 2 + 3) / 3
        ({"baseline": "mean"}, [5 - 7.75, 2 - 7.75, 3 - 7, 12 - 10 / 3, 8 - 10 / 3, 8 - 10 / 3]),
        # less (3 + 3 * 12) / 4, (2 * 5 + 3 * 12) / 5 and (2 * 5 + 3) / 3
        ({"baseline": "mean", "returns": "total"}, [-4.75, -4.75, 3 - 9.2, 12 - 13 / 3, 12 - 13 / 3, 12 - 13 / 3]),
        # step 0: less (3 + 12) / 2, (5 + 12) / 2, (5 + 3) / 2; step 1: less (0 + 8) / 2, (2 + 0) / 2; step 2: less 0
        ({"baseline": "leave_one_out"}, [-2.5, -2, -5.5, 8, 7, 8]),
        ({"baseline": "leave_one_out", "discount_from": "start"}, [-2.5, -1, -5.5, 8, 3.5, 2]),
        # at all steps of an episode, less (3 + 12) / 2, (5 + 12) / 2, (5 + 3) / 2
        ({"baseline": "leave_one_out", "returns": "total"}, [-2.5, -2.5, -5.5, 8, 8, 8]),
    ],
)
def test_weights_by_hand(settings: dict[str, Any], expected: list[float]) -> None:
    rollout, index = samples(BY_HAND)
    rollout = rollout._replace(returns=th.tensor([5.0, 2.0, 3.0, 12.0, 8.0, 8.0]))
    model = agent(3, **{"gamma": 0.5, **settings})
    np.testing.assert_allclose(model._weights(model._actor_critic(), rollout, index).numpy(), expected, atol=1e-5)


def test_normalised_before_they_are_discounted() -> None:
    """
    -2, 2, 4, -1, 2, 1 have the mean 1 and, less it, the squares 9, 1, 9, 4, 1, 0: a variance of 24 / 5. Then the steps
    of each episode count 1, 0.5, 0.25.
    """
    rollout, index = samples(BY_HAND)
    rollout = rollout._replace(returns=th.tensor([-2.0, 2.0, 4.0, -1.0, 2.0, 1.0]))
    model = agent(3, gamma=0.5, discount_from="start", normalize_advantage=True)
    found = model._weights(model._actor_critic(), rollout, index).numpy() * math.sqrt(24 / 5)
    np.testing.assert_allclose(found, [-3, 0.5, 3, -2, 0.5, 0], atol=1e-5)


def silent(model: REINFORCE) -> REINFORCE:
    model.set_logger(Logger(folder=None, output_formats=[]))
    return model


def step_of(model: REINFORCE, episodes: list[Trajectory], weights: Any) -> np.ndarray:
    """What the step adds to the actor's parameters: the gradient, as the learning rate is 1."""
    before = actor_vector(model)
    rollout, _ = samples(episodes)
    assert silent(model)._policy_step(model._actor_critic(), rollout, th.tensor(weights, dtype=th.float32))
    return actor_vector(model) - before


def test_short_and_long_episodes_by_hand() -> None:
    """
    Both actions have probability 1/2, so the score of the first is (0.5, -0.5), of the second (-0.5, 0.5).

    One step: state 0, second action, weight 2. Three steps: states 0, 1, 0, actions first, first, second, weights
    1, 4, -3. A step of either counts half, one over the number of episodes:
    state 0: (2 * -0.5 + 1 * 0.5 - 3 * -0.5) / 2 = 0.5 for the first action; state 1: 4 * 0.5 / 2 = 1; bias: 1.5.
    """
    episodes = [Trajectory((0,), (1,), (0.0,), 1.0), Trajectory((0, 1, 0), (0, 0, 1), (0.0, 0.0, 0.0), 1.0)]
    model = agent(2)
    with th.no_grad():
        model.policy.action_net.weight.zero_()
        model.policy.action_net.bias.zero_()
    found = step_of(model, episodes, [2.0, 1.0, 4.0, -3.0])
    np.testing.assert_allclose(found, [0.5, 1.0, -0.5, -1.0, 1.5, -1.5], atol=1e-6)
    # the mean over the episodes of minus the weights times log(1/2): (2 + 1 + 4 - 3) / 2 * log(2)
    assert model.logger.name_to_value["train/policy_gradient_loss"] == pytest.approx(2.0 * math.log(2.0), rel=1e-5)


@pytest.mark.parametrize("chunk", [1, 2, 7, 100])
def test_step_is_the_mean_over_episodes_of_weighted_scores(monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    monkeypatch.setattr(data, "CHUNK_ROWS", chunk)
    stacked = np.concatenate([scores(trajectory) for trajectory in TRAJECTORIES])
    weights = np.random.default_rng(0).normal(size=len(stacked))
    found = step_of(agent(len(TRAJECTORIES)), TRAJECTORIES, weights)
    np.testing.assert_allclose(found, weights @ stacked / len(TRAJECTORIES), atol=1e-6)


def test_gradient_norm_is_clipped() -> None:
    stacked = np.concatenate([scores(trajectory) for trajectory in TRAJECTORIES])
    model = agent(len(TRAJECTORIES), max_grad_norm=0.25)
    found = step_of(model, TRAJECTORIES, np.full(len(stacked), 100.0))
    assert np.linalg.norm(found) == pytest.approx(0.25, rel=1e-4)
    unclipped = np.linalg.norm(100.0 * stacked.sum(axis=0) / len(TRAJECTORIES))
    assert model.logger.name_to_value["train/grad_norm"] == pytest.approx(unclipped, rel=1e-4)


def test_entropy_is_summed_over_the_steps_of_an_episode() -> None:
    """Of softmax, ``dH / dlogit_a = -p_a (log p_a + H)``."""
    table = policy_table()
    entropy = -(table * np.log(table)).sum(axis=1, keepdims=True)
    of_logits = -table * (np.log(table) + entropy)
    expected = np.zeros(6)
    for state in (0, 1, 0):
        expected += 0.5 * np.concatenate((np.outer(of_logits[state], np.eye(2)[state]).ravel(), of_logits[state]))
    expected /= 2  # episodes
    model = agent(2, ent_coef=0.5)
    episodes = [Trajectory((0,), (1,), (0.0,), 1.0), Trajectory((1, 0), (0, 0), (0.0, 0.0), 1.0)]
    np.testing.assert_allclose(step_of(model, episodes, np.zeros(3)), expected, atol=1e-6)
    mean_entropy = entropy[[0, 1, 0]].mean()
    assert model.logger.name_to_value["train/entropy_loss"] == pytest.approx(-mean_entropy, rel=1e-5)


def test_entropy_without_a_closed_form() -> None:
    """
    The entropy of tanh(u), u normal, is that of u plus ``E[log(1 - tanh(u)^2)]``, so its derivative by the mean is
    ``E[-2 tanh(u)]``. The actions are the quantiles of the policy at one state, in place of draws.
    """
    n = 4000
    observation, action_space = spaces.Box(-1.0, 1.0, (1,), np.float32), spaces.Box(-1.0, 1.0, (1,), np.float32)
    policy_kwargs: dict[str, Any] = {"net_arch": [], "squash_output": True, "optimizer_class": th.optim.SGD}
    model = REINFORCE(
        "MlpPolicy", ScriptedEnv(observation, action_space), use_sde=True, learning_rate=1.0, ent_coef=1.0,
        max_grad_norm=math.inf, episodes_per_env=n, policy_kwargs=policy_kwargs, seed=0, device="cpu",
    )  # fmt: skip
    with th.no_grad():
        model.policy.action_net.weight.zero_()
        model.policy.action_net.bias.fill_(0.4)
        model.policy.log_std.fill_(math.log(0.5))
    z = th.distributions.Normal(0.0, 1.0).icdf((th.arange(n, dtype=th.float64) + 0.5) / n)
    u = 0.4 + 0.5 * z  # the only feature is the observation, 1
    nothing = th.zeros(n)
    rollout = RolloutSamples(th.ones(n, 1), u.tanh().float()[:, None], *[nothing] * 5)
    assert silent(model)._policy_step(model._actor_critic(), rollout, nothing)
    assert model.policy.action_net.bias.item() - 0.4 == pytest.approx((-2.0 * u.tanh()).mean().item(), rel=2e-3)


class Recorder(gym.Wrapper[Any, Any, Any, Any]):
    """Keeps what was seen, done and earned, episode by episode."""

    def __init__(self, env: gym.Env[Any, Any]) -> None:
        super().__init__(env)
        self.episodes: list[list[tuple[np.ndarray, np.ndarray, float]]] = []

    def reset(self, **kwargs: Any) -> Any:
        obs, info = super().reset(**kwargs)
        self._obs = obs
        self.episodes.append([])
        return obs, info

    def step(self, action: Any) -> Any:
        obs, reward, *rest = super().step(action)
        self.episodes[-1].append((self._obs, action, float(reward)))
        self._obs = obs
        return (obs, reward, *rest)


@pytest.mark.parametrize("baseline", ["none", "leave_one_out", "value"])
def test_learn_takes_the_step_of_the_definition(baseline: Any) -> None:
    """
    Two updates in two environments against the definition, worked out from what the environments saw, by SB3's own
    ``evaluate_actions`` of the policy as it was. The first ends in the middle of an episode of the second environment,
    which the second update does not learn from.
    """
    box = spaces.Box(-1.0, 1.0, (3,), np.float32)
    wide = spaces.Box(-100.0, 100.0, (2,), np.float32)  # so wide that no action is clipped
    recorders = [Recorder(ScriptedEnv(box, wide, ((2, True, False), (3, False, True), (1, True, False)))),
                 Recorder(ScriptedEnv(box, wide, ((1, True, False), (2, True, False))))]  # fmt: skip
    vec_env = DummyVecEnv([lambda env=env: env for env in recorders])  # type: ignore[misc]
    model = REINFORCE(
        "MlpPolicy", vec_env, learning_rate=0.1, episodes_per_env=2, gamma=0.9, ent_coef=0.01, max_grad_norm=math.inf,
        baseline=baseline, policy_kwargs={"optimizer_class": th.optim.SGD}, seed=0, device="cpu",
    )  # fmt: skip
    for expected_lengths in ([2, 3, 1, 2], [1, 2, 1, 2]):
        policy = copy.deepcopy(model.policy)
        first = [len([e for e in recorder.episodes if e]) for recorder in recorders]  # those that were begun
        model.learn(1, reset_num_timesteps=False)

        episodes = []
        for recorder, start in zip(recorders, first, strict=True):
            episodes += [episode for episode in recorder.episodes if episode][start : start + 2]
        assert [len(episode) for episode in episodes] == expected_lengths
        returns = [
            [sum(0.9 ** (k - t) * episode[k][2] for k in range(t, len(episode))) for t in range(len(episode))]
            for episode in episodes
        ]
        objective = th.zeros(())
        for i, episode in enumerate(episodes):
            for t, (obs, action, _) in enumerate(episode):
                value, log_prob, entropy = policy.evaluate_actions(th.tensor(obs)[None], th.tensor(action)[None])
                subtracted = {
                    "none": 0.0,
                    "value": value.item(),
                    "leave_one_out": sum(g[t] for j, g in enumerate(returns) if j != i and t < len(g)) / 3,
                }[baseline]
                assert entropy is not None
                objective = objective + log_prob.sum() * (returns[i][t] - subtracted) / 4 + 0.01 * entropy.sum() / 4
        (-objective).backward()  # type: ignore[no-untyped-call]
        for (name, before), after in zip(policy.named_parameters(), model.policy.parameters(), strict=True):
            if before.grad is None:
                assert "value" in name
                assert th.equal(before, after) == (baseline != "value"), name
            else:
                th.testing.assert_close(after, before + 0.1 * -before.grad, atol=1e-5, rtol=1e-4)
