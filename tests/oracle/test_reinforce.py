"""
REINFORCE against an enumerated Markov decision process, hand-worked numbers and closed forms.

The process has two states and two actions; an episode ends by its actions or after three steps. Its eleven trajectories
and their probabilities are listed, so expectations over batches of episodes are sums, not estimates. The policy is a
table: a linear layer on the one-hot state, with a bias.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections import Counter
from functools import cache
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv

from sb3_ppo_ext import REINFORCE, reinforce
from sb3_ppo_ext.common.rollout import data
from sb3_ppo_ext.common.rollout.data import RolloutSamples
from sb3_ppo_ext.common.rollout.episode_buffer import EpisodeBuffer, EpisodeIndex
from sb3_ppo_ext.common.update.scores import score_statistics
from sb3_ppo_ext.losses.baselines import leave_one_out, mean_of_other_episodes, optimal_of_other_episodes
from tests.envs import ScriptedEnv

GAMMA = 0.8
HORIZON = 3
END = -1
# What follows (state, action): probability, next state, reward. All rewards are far from 0.
DYNAMICS: dict[tuple[int, int], list[tuple[float, int, float]]] = {
    (0, 0): [(0.3, 0, 6.0), (0.7, 1, 4.0)],
    (0, 1): [(1.0, END, 5.0)],
    (1, 0): [(1.0, END, 3.0)],
    (1, 1): [(1.0, 0, 9.0)],
}
WEIGHT = np.array([[0.4, -0.3], [-0.2, 0.5]])  # (action, state), as in a linear layer
BIAS = np.array([0.3, -0.1])
VALUES = np.array([2.5, -7.0])  # of the states: any numbers

RETURNS = ("reward_to_go", "total")
BASELINES = ("none", "mean", "optimal", "leave_one_out", "value")


class Trajectory(NamedTuple):
    states: tuple[int, ...]
    actions: tuple[int, ...]
    rewards: tuple[float, ...]
    dynamics: float  # the product of the transitions' probabilities


def trajectories(state: int = 0, steps_left: int = HORIZON) -> list[Trajectory]:
    if state == END or steps_left == 0:
        return [Trajectory((), (), (), 1.0)]
    return [
        Trajectory((state, *rest.states), (action, *rest.actions), (reward, *rest.rewards), p * rest.dynamics)
        for action in (0, 1)
        for p, following, reward in DYNAMICS[state, action]
        for rest in trajectories(following, steps_left - 1)
    ]


TRAJECTORIES = trajectories()


@cache
def policy_table() -> np.ndarray:
    """pi(action | state), shape (state, action)."""
    logits = (WEIGHT + BIAS[:, None]).T
    unnormalised = np.exp(logits)
    table: np.ndarray = unnormalised / unnormalised.sum(axis=1, keepdims=True)
    return table


@cache
def probability(trajectory: Trajectory) -> float:
    table = policy_table()
    chosen = math.prod(table[s, a] for s, a in zip(trajectory.states, trajectory.actions, strict=True))
    return float(trajectory.dynamics * chosen)


def rewards_to_go(trajectory: Trajectory) -> list[float]:
    """Discounted from the present step, term by term."""
    rewards = trajectory.rewards
    return [sum(GAMMA ** (k - t) * rewards[k] for k in range(t, len(rewards))) for t in range(len(rewards))]


@cache
def scores(trajectory: Trajectory) -> np.ndarray:
    """Gradients of log pi at each step, by the closed form ``e_a - p``: shape (steps, 6), weight first, then bias."""
    table = policy_table()
    rows = []
    for state, action in zip(trajectory.states, trajectory.actions, strict=True):
        of_logits = np.eye(2)[action] - table[state]
        of_weight = np.outer(of_logits, np.eye(2)[state])
        rows.append(np.concatenate((of_weight.ravel(), of_logits)))
    return np.array(rows)


def differentiated(objective_of: Any) -> np.ndarray:
    """Gradient of a function of ``log pi``, a (state, action) table, by torch's autograd in double precision."""
    weight = th.tensor(WEIGHT, requires_grad=True)
    bias = th.tensor(BIAS, requires_grad=True)
    log_pi = (weight + bias[:, None]).T.log_softmax(dim=1)
    grads = th.autograd.grad(objective_of(log_pi), (weight, bias))
    return np.concatenate([grad.numpy().ravel() for grad in grads])


def exact_policy_gradient() -> np.ndarray:
    """Of the discounted return, ``J = sum over trajectories of probability times return``."""

    def expected_return(log_pi: th.Tensor) -> th.Tensor:
        total = th.zeros((), dtype=th.float64)
        for trajectory in TRAJECTORIES:
            chosen = sum(log_pi[s, a] for s, a in zip(trajectory.states, trajectory.actions, strict=True))
            total = total + trajectory.dynamics * th.as_tensor(chosen).exp() * rewards_to_go(trajectory)[0]
        return total

    return differentiated(expected_return)


def gradient_of_practice() -> np.ndarray:
    """``E[sum over t of grad log pi_t G_t]``, in which the state of step t is not discounted."""

    def surrogate(log_pi: th.Tensor) -> th.Tensor:
        total = th.zeros((), dtype=th.float64)
        for trajectory in TRAJECTORIES:
            steps = zip(trajectory.states, trajectory.actions, rewards_to_go(trajectory), strict=True)
            total = total + probability(trajectory) * sum(log_pi[s, a] * g for s, a, g in steps)
        return total

    return differentiated(surrogate)


def samples(episodes: list[Trajectory]) -> tuple[RolloutSamples, EpisodeIndex]:
    """A batch as the rollout buffer would hold it; NaN where nothing should look."""
    states = [s for episode in episodes for s in episode.states]
    unused = th.full((len(states),), math.nan)
    rollout = RolloutSamples(
        observations=th.tensor(states)[:, None],
        actions=th.tensor([float(a) for episode in episodes for a in episode.actions])[:, None],
        old_values=th.tensor(VALUES[states], dtype=th.float32),
        old_log_prob=unused,
        advantages=unused,
        returns=th.tensor([g for episode in episodes for g in rewards_to_go(episode)]),
        old_params=unused[:, None],
    )
    numbers = [(i, t) for i, episode in enumerate(episodes) for t in range(len(episode.states))]
    episode, step = th.tensor(numbers).T
    return rollout, EpisodeIndex(episode, step)


def agent(n_episodes: int, **kwargs: Any) -> REINFORCE:
    """With the policy above, and an optimiser whose step is minus the gradient."""
    policy_kwargs = {"net_arch": [], "optimizer_class": th.optim.SGD}
    settings = {"learning_rate": 1.0, "max_grad_norm": math.inf, "gamma": GAMMA, "seed": 0, "device": "cpu"}
    env = ScriptedEnv(spaces.Discrete(2), spaces.Discrete(2))
    model = REINFORCE(
        "MlpPolicy", env, episodes_per_env=n_episodes, policy_kwargs=policy_kwargs, **{**settings, **kwargs}
    )
    with th.no_grad():
        model.policy.action_net.weight.copy_(th.tensor(WEIGHT))
        model.policy.action_net.bias.copy_(th.tensor(BIAS))
    return model


def weights_of(model: REINFORCE, episodes: list[Trajectory]) -> np.ndarray:
    rollout, index = samples(episodes)
    return model._weights(model._actor_critic(), rollout, index).double().numpy()


def gradient_estimate(model: REINFORCE, episodes: list[Trajectory]) -> np.ndarray:
    """By the definition: the scores in closed form, times the weights."""
    stacked = np.concatenate([scores(episode) for episode in episodes])
    estimate: np.ndarray = weights_of(model, episodes) @ stacked / len(episodes)
    return estimate


def actor_vector(model: REINFORCE) -> np.ndarray:
    net = model.policy.action_net
    return np.concatenate([p.detach().double().numpy().ravel() for p in (net.weight, net.bias)])


# --- The enumeration itself


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


# --- Unbiased


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


# --- Variance


def variances(n_batches: int, batch_size: int, settings: dict[str, dict[str, Any]]) -> dict[str, float]:
    """Sum over the parameters of the estimates' variances, of the same batches for all."""
    drawn = np.random.default_rng(0).choice(
        len(TRAJECTORIES), size=(n_batches, batch_size), p=[probability(trajectory) for trajectory in TRAJECTORIES]
    )
    result = {}
    for name, kwargs in settings.items():
        model = agent(batch_size, **kwargs)
        estimates = [gradient_estimate(model, [TRAJECTORIES[i] for i in batch]) for batch in drawn]
        result[name] = float(np.var(estimates, axis=0).sum())
    return result


def test_variance_of_returns() -> None:
    """What was earned before an action adds noise only. Found: 21.6 and 6.2."""
    found = variances(
        500,
        8,
        {"total": {"returns": "total"}, "reward_to_go": {"returns": "reward_to_go", "discount_from": "start"}},
    )
    assert found["total"] > 2.0 * found["reward_to_go"], found


@pytest.mark.parametrize("returns", RETURNS)
def test_variance_of_baselines(returns: Any) -> None:
    """Found: 6.7, 2.0, 1.0 and 2.7 for rewards to go; 21.5, 4.3, 3.2 and 3.4 for total returns."""
    names = ("none", "mean", "optimal", "leave_one_out")
    found = variances(
        300, 8, {name: {"returns": returns, "discount_from": "start", "baseline": name} for name in names}
    )
    assert found["none"] > 1.5 * found["mean"], found
    assert found["mean"] > 1.15 * found["optimal"], found
    assert found["none"] > 1.5 * found["leave_one_out"], found


@pytest.mark.parametrize("returns", RETURNS)
def test_optimal_constant_has_the_least_variance(returns: Any) -> None:
    """The exact variance is a parabola in the constant; its minimum, by three of its points, is ``E[S'g] / E[S'S]``."""
    p = np.array([probability(trajectory) for trajectory in TRAJECTORIES])

    def gradient(trajectory: Trajectory, constant: float) -> np.ndarray:
        earned = np.array(rewards_to_go(trajectory))
        if returns == "total":
            return (earned[0] - constant) * scores(trajectory).sum(axis=0)
        return (GAMMA ** np.arange(len(earned)) * (earned - constant)) @ scores(trajectory)

    def variance(constant: float) -> float:
        gradients = np.array([gradient(trajectory, constant) for trajectory in TRAJECTORIES])
        return float(p @ np.square(gradients - p @ gradients).sum(axis=1))

    low, middle, high = variance(0.0), variance(1.0), variance(2.0)
    minimum = 1.0 + 0.5 * (low - high) / (low - 2.0 * middle + high)

    model = agent(len(TRAJECTORIES), returns=returns, discount_from="start", baseline="optimal")
    dots, squares = statistics_of(model, TRAJECTORIES)
    assert p @ dots / (p @ squares) == pytest.approx(minimum, rel=1e-5)


# --- Baselines by hand


def test_mean_of_other_episodes() -> None:
    """
    Episodes of 3, 1 and 2 steps. Others of the first: (10 + 4 + 6) / 3 = 20 / 3; of the second:
    (1 + 2 + 3 + 4 + 6) / 5 = 3.2; of the third: (1 + 2 + 3 + 10) / 4 = 4.
    """
    returns, episode = th.tensor([1.0, 2.0, 3.0, 10.0, 4.0, 6.0]), th.tensor([0, 0, 0, 1, 2, 2])
    expected = th.tensor([20 / 3, 20 / 3, 20 / 3, 3.2, 4.0, 4.0])
    th.testing.assert_close(mean_of_other_episodes(returns, episode, 3), expected)


def test_leave_one_out() -> None:
    """
    Step 0: 1, 10 and 4, so the others' means are 14 / 2, 5 / 2 and 11 / 2. Step 1: 2, nothing and 6, so 6 / 2 and
    2 / 2. Step 2: 3, nothing and nothing, so 0.
    """
    returns, episode = th.tensor([1.0, 2.0, 3.0, 10.0, 4.0, 6.0]), th.tensor([0, 0, 0, 1, 2, 2])
    step = th.tensor([0, 1, 2, 0, 0, 1])
    expected = th.tensor([7.0, 3.0, 0.0, 2.5, 5.5, 1.0])
    th.testing.assert_close(leave_one_out(returns, episode, step, 3), expected)


def test_optimal_of_other_episodes() -> None:
    """(6 - 1) / (2 + 4), (2 - 1) / (1 + 4) and (2 + 6) / (1 + 2)."""
    found = optimal_of_other_episodes(th.tensor([2.0, 6.0, -1.0]), th.tensor([1.0, 2.0, 4.0]))
    th.testing.assert_close(found, th.tensor([5 / 6, 0.2, 8 / 3]))


def test_optimal_where_the_others_have_no_score() -> None:
    found = optimal_of_other_episodes(th.tensor([2.0, 0.0, 0.0]), th.tensor([0.5, 0.0, 0.0]))
    th.testing.assert_close(found, th.tensor([0.0, 4.0, 4.0]))


def test_optimal_beside_an_episode_that_dwarfs_the_others() -> None:
    """(2 + 6) / (1 + 3) for the first, which taking it off the total of 1e9 would round away."""
    found = optimal_of_other_episodes(th.tensor([3e9, 2.0, 6.0]), th.tensor([1e9, 1.0, 3.0]))
    th.testing.assert_close(found, th.tensor([2.0, 3.0, 3.0]))


# --- Scores


def statistics_of(model: REINFORCE, episodes: list[Trajectory]) -> tuple[np.ndarray, np.ndarray]:
    rollout, index = samples(episodes)
    returns, discount = rollout.returns, th.ones_like(rollout.returns)
    if model.returns == "total":
        returns = th.tensor([rewards_to_go(episode)[0] for episode in episodes for _ in episode.states])
    elif model.discount_from == "start":
        discount = GAMMA ** index.step.float()
    dots, squares = score_statistics(
        model._actor_critic(),
        rollout,
        index.episode,
        returns,
        discount,
        parameters=list(model.policy.parameters()),
        chunks=model._chunks,
    )
    return dots.double().numpy(), squares.double().numpy()


@pytest.mark.parametrize("chunk", [1, 2, 100])
def test_score_statistics(monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    monkeypatch.setattr(data, "CHUNK_ROWS", chunk)
    expected = []
    for trajectory in TRAJECTORIES:
        discounted = (GAMMA ** np.arange(len(trajectory.states)))[:, None] * scores(trajectory)
        score, gradient = discounted.sum(axis=0), np.array(rewards_to_go(trajectory)) @ discounted
        expected.append((score @ gradient, score @ score))
    model = agent(len(TRAJECTORIES), discount_from="start", baseline="optimal")
    np.testing.assert_allclose(np.transpose(statistics_of(model, TRAJECTORIES)), expected, rtol=1e-5, atol=1e-6)


# --- The step


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


# --- Collecting


class Script(gym.Env[Any, Any]):
    """
    Episodes with given rewards. The observation is the number of the episode and of the step.

    :param episodes: the rewards of each; the last one is repeated
    :param truncated: numbers of the episodes that a time limit ends
    """

    observation_space = spaces.Box(-1000.0, 1000.0, (2,), np.float32)
    action_space = spaces.Discrete(2)

    def __init__(self, episodes: list[list[float]], truncated: tuple[int, ...] = ()) -> None:
        self._episodes = episodes
        self._truncated = truncated
        self._episode = -1
        self._step = 0

    def _obs(self) -> np.ndarray:
        return np.array([self._episode, self._step], dtype=np.float32)

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        self._episode += 1
        self._step = 0
        return self._obs(), {}

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        rewards = self._episodes[min(self._episode, len(self._episodes) - 1)]
        reward = rewards[self._step]
        self._step += 1
        ends = self._step == len(rewards)
        by_limit = ends and self._episode in self._truncated
        return self._obs(), reward, ends and not by_limit, by_limit, {"is_success": reward > 9.0} if ends else {}


def on(*envs: gym.Env[Any, Any], **kwargs: Any) -> REINFORCE:
    """An agent in several environments that has not learnt yet, ready to collect."""
    vec_env = DummyVecEnv([lambda env=env: Monitor(env) for env in envs])  # type: ignore[misc]
    model = REINFORCE("MlpPolicy", vec_env, **{"seed": 0, "device": "cpu", **kwargs})
    model._setup_learn(1)
    return model


def observations_of(rollout: RolloutSamples) -> th.Tensor:
    assert isinstance(rollout.observations, th.Tensor)
    return rollout.observations


def collect(model: REINFORCE) -> tuple[RolloutSamples, EpisodeIndex]:
    assert model.env is not None
    _, callback = model._setup_learn(1, reset_num_timesteps=False)
    assert model.collect_rollouts(model.env, callback, model.rollout_buffer, model.n_steps)
    buffer = model.rollout_buffer
    assert isinstance(buffer, EpisodeBuffer)
    return buffer.flat(), buffer.episode_index()


@pytest.mark.parametrize("first_size", [1, 4, 256])
def test_collected_by_hand(monkeypatch: pytest.MonkeyPatch, first_size: int) -> None:
    """
    Two episodes of each of three environments; the first is done after 3 steps and waits, in episodes 2 and 3, until
    the second is after 5; the third is after 2.
    """
    monkeypatch.setattr(reinforce, "_FIRST_BUFFER_SIZE", first_size)
    a = Script([[1.0, 2.0], [4.0], [100.0], [100.0, 100.0]])
    b = Script([[3.0], [5.0, 6.0, 7.0, 8.0], [1.0]])
    c = Script([[9.0], [10.0], [100.0] * 50])
    model = on(a, b, c, episodes_per_env=2, gamma=0.5)
    rollout, index = collect(model)
    assert model.num_timesteps == 3 * 5
    expected_obs = [[0, 0], [0, 1], [1, 0], [0, 0], [1, 0], [1, 1], [1, 2], [1, 3], [0, 0], [1, 0]]
    assert observations_of(rollout).tolist() == expected_obs
    # 1 + 2 / 2, 2; 4; 3; 5 + 11.5 / 2, 6 + 11 / 2, 7 + 8 / 2, 8; 9; 10
    expected = [2.0, 2.0, 4.0, 3.0, 10.75, 11.5, 11.0, 8.0, 9.0, 10.0]
    np.testing.assert_allclose(rollout.returns.numpy(), expected, atol=1e-5)
    assert index.episode.tolist() == [0, 0, 1, 2, 3, 3, 3, 3, 4, 5]
    assert index.step.tolist() == [0, 1, 0, 0, 0, 1, 2, 3, 0, 0]
    assert {len(tensor) for tensor in rollout if tensor is not None} == {10}
    minibatches = [len(batch.returns) for batch in model.rollout_buffer.get(4)]
    assert minibatches == [4, 4, 2]
    # Nor are the episodes that a waiting environment ends in the statistics.
    assert model.ep_info_buffer is not None
    assert model.ep_success_buffer is not None
    assert sorted(info["r"] for info in model.ep_info_buffer) == [3.0, 3.0, 4.0, 9.0, 10.0, 26.0]
    assert sorted(model.ep_success_buffer) == [False] * 5 + [True]

    # The first environment stands in its fourth episode, one step before its end; the third in its third, 47 before.
    # They play them to the end, and what counts begins after that.
    rollout, index = collect(model)
    assert model.num_timesteps == 3 * (5 + 47 + 100)
    of_c = [[episode, step] for episode in (3, 4) for step in range(50)]
    assert observations_of(rollout).tolist() == [[4, 0], [4, 1], [5, 0], [5, 1], [2, 0], [3, 0], *of_c]
    assert index.episode.tolist() == [0, 0, 1, 1, 2, 3] + [4] * 50 + [5] * 50
    assert index.step.tolist() == [0, 1, 0, 1, 0, 0, *range(50), *range(50)]
    np.testing.assert_allclose(rollout.returns.numpy()[:6], [150.0, 100.0, 150.0, 100.0, 1.0, 1.0], atol=1e-4)
    assert sorted(info["r"] for info in model.ep_info_buffer)[-4:] == [200.0, 200.0, 5000.0, 5000.0]
    assert len(model.ep_info_buffer) == 12


def test_one_environment_wastes_no_step() -> None:
    model = on(Script([[1.0], [2.0, 3.0], [4.0]]), episodes_per_env=2)
    collect(model)
    rollout, _ = collect(model)
    assert observations_of(rollout)[:, 0].tolist() == [2, 3]
    assert model.num_timesteps == 5


class TwoLengths(gym.Env[Any, Any]):
    """Episodes of one step or of ten, equally likely."""

    observation_space = spaces.Box(-1.0, 1.0, (1,), np.float32)
    action_space = spaces.Discrete(2)

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        self._left = 1 if self.np_random.random() < 0.5 else 10
        return np.zeros(1, dtype=np.float32), {}

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        self._left -= 1
        return np.zeros(1, dtype=np.float32), 1.0, self._left == 0, False, {}


@pytest.mark.parametrize("episodes_per_env", [1, 2])
def test_short_episodes_are_not_over_represented(episodes_per_env: int) -> None:
    """
    600 episodes: the share has a standard deviation of 0.02. The first episodes that any of three environments ends
    would hold some 0.8 short ones.
    """
    model = on(*[TwoLengths() for _ in range(3)], episodes_per_env=episodes_per_env, gamma=1.0)
    model.env.seed(0)  # type: ignore[union-attr]
    short = []
    for _ in range(200 // episodes_per_env):
        rollout, index = collect(model)
        short.extend((rollout.returns[index.step == 0] == 1.0).tolist())
    assert len(short) == 600
    assert np.mean(short) == pytest.approx(0.5, abs=0.06)
    assert model.ep_info_buffer is not None
    logged = np.mean([info["l"] == 1 for info in model.ep_info_buffer])  # of the last hundred
    assert logged == pytest.approx(0.5, abs=0.15)


class GivenLengths(Script):
    """
    Episodes of given lengths, one after the other. It refuses to be reset before an episode has ended.

    :param lengths: of the episodes
    """

    def __init__(self, lengths: tuple[int, ...]) -> None:
        super().__init__([[1.0] * length for length in lengths])
        self._left = 0

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[np.ndarray, dict[str, Any]]:
        assert self._left == 0, "reset in the middle of an episode"
        obs, info = super().reset(seed=seed)
        self._left = len(self._episodes[min(self._episode, len(self._episodes) - 1)])
        return obs, info

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        self._left -= 1
        return super().step(action)


def test_every_batch_is_a_fair_draw() -> None:
    """
    Two environments whose episodes have one step or three, equally likely, and so all 256 ways that the first four
    episodes of each can go. What counts, one episode each, is then short or long as two coins fall, in the second batch
    as in the first. (An episode that the end of the first batch interrupts is always a long one.)
    """
    ways = list(itertools.product((1, 3), repeat=4))
    model = on(GivenLengths(ways[0]), GivenLengths(ways[0]), episodes_per_env=1)
    learnt_from: list[Counter[tuple[int, ...]]] = [Counter(), Counter()]
    n_interrupted = 0
    for pair in itertools.product(ways, repeat=2):
        envs = [Monitor(GivenLengths(way), allow_early_resets=False) for way in pair]
        model.set_env(DummyVecEnv([lambda env=env: env for env in envs]))  # type: ignore[misc]
        for batch in range(2):
            assert model.ep_info_buffer is not None
            model.ep_info_buffer.clear()
            _, index = collect(model)
            lengths = tuple(int((index.episode == i).sum()) for i in range(2))
            learnt_from[batch][lengths] += 1
            assert sorted(info["l"] for info in model.ep_info_buffer) == sorted(lengths)
            n_interrupted += int((~model._last_episode_starts).sum()) if batch == 0 else 0  # type: ignore[operator]
    assert n_interrupted > 30
    assert learnt_from[0] == learnt_from[1] == Counter(dict.fromkeys(itertools.product((1, 3), repeat=2), 64))


def test_a_stopped_rollout_is_not_continued() -> None:
    """A callback ends it in the first step; the episode that was begun is not taken for a whole one."""
    model = on(Script([[1.0, 2.0, 3.0]]), episodes_per_env=1, gamma=1.0)
    model.learn(1, callback=lambda locals_, globals_: False)
    assert model.num_timesteps == 1
    rollout, _ = collect(model)
    assert observations_of(rollout)[:, 1].tolist() == [0, 1, 2]
    assert rollout.returns.tolist() == [6.0, 5.0, 3.0]


# --- Time limits


def test_a_time_limit_completes_an_episode() -> None:
    model = on(Script([[1.0, 2.0], [3.0]], truncated=(0,)), episodes_per_env=2, gamma=0.5, baseline="value")
    rollout, _ = collect(model)
    np.testing.assert_allclose(rollout.returns.numpy(), [2.0, 2.0, 3.0], atol=1e-6)


def test_bootstrapped_time_limits() -> None:
    """
    By V of the observation that follows the last step, (0, 2): 2 + 0.5 V and 1 + 0.5 (2 + 0.5 V). The second episode
    ended by itself; the third, (2, 1) following its only step: 4 + 0.5 V.
    """
    script = Script([[1.0, 2.0], [3.0], [4.0]], truncated=(0, 2))
    model = on(script, episodes_per_env=3, gamma=0.5, baseline="value", bootstrap_timeouts=True)
    rollout, _ = collect(model)
    with th.no_grad():
        v_first, v_third = model.policy.predict_values(th.tensor([[0.0, 2.0], [2.0, 1.0]])).flatten().tolist()
    assert min(abs(v_first), abs(v_third)) > 1e-2
    expected = [2.0 + 0.25 * v_first, 2.0 + 0.5 * v_first, 3.0, 4.0 + 0.5 * v_third]
    np.testing.assert_allclose(rollout.returns.numpy(), expected, atol=1e-5)


# --- All together


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


def test_critic_learns_the_returns() -> None:
    """Rewards of 1, 2, 4 and gamma 0.5: the values of the three observations become 3, 4 and 4."""
    script = Script([[1.0, 2.0, 4.0]])
    policy_kwargs = {"optimizer_kwargs": {"eps": 1e-5}}
    model = on(
        script, episodes_per_env=4, gamma=0.5, baseline="value", n_critic_updates=200, learning_rate=1e-2,
        policy_kwargs=policy_kwargs,
    )  # fmt: skip
    model.learn(1)
    rollout = model.rollout_buffer.flat()  # type: ignore[attr-defined]
    with th.no_grad():
        values = model.policy.predict_values(rollout.observations).flatten().reshape(4, 3)
    np.testing.assert_allclose(values.numpy(), np.tile([3.0, 4.0, 4.0], (4, 1)), atol=0.1)
