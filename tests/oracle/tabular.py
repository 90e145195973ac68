"""
A Markov decision process whose trajectories can be listed, for what REINFORCE is held against.

The process has two states and two actions; an episode ends by its actions or after three steps. Its eleven trajectories
and their probabilities are listed, so expectations over batches of episodes are sums, not estimates. The policy is a
table: a linear layer on the one-hot state, with a bias.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch as th
from gymnasium import spaces

from sb3_ppo_ext import REINFORCE
from sb3_ppo_ext.common.rollout.data import RolloutSamples
from sb3_ppo_ext.common.rollout.episode_buffer import EpisodeIndex
from sb3_ppo_ext.common.update.scores import score_statistics
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
