"""Policies that forbid actions by infinite logits, the usual way, learn what is left."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.policies import ActorCriticPolicy
from torch import nn

from sb3_ppo_ext import REINFORCE
from tests.algorithms import ALGORITHMS, small
from tests.envs import BOX, ScriptedEnv
from tests.pairwise import pairwise


class Forbidding(nn.Module):
    """Some logits of a linear layer, replaced."""

    def __init__(self, linear: nn.Module, logits: dict[int, float]) -> None:
        super().__init__()
        self.linear = linear
        self.logits = logits

    def forward(self, features: th.Tensor) -> th.Tensor:
        columns = list(self.linear(features).unbind(dim=1))
        for index, logit in self.logits.items():
            columns[index] = th.full_like(columns[index], logit)
        return th.stack(columns, dim=1)


class Policy(ActorCriticPolicy):
    """
    :param logits: what some logits are replaced by
    """

    def __init__(self, *args: Any, logits: dict[int, float], **kwargs: Any) -> None:
        self._logits = logits
        super().__init__(*args, **kwargs)

    def _build(self, lr_schedule: Any) -> None:
        super()._build(lr_schedule)
        self.action_net = Forbidding(self.action_net, self._logits)


class OwnMethods(Policy):
    """Goes the way of policies that override something."""

    def forward(self, obs: Any, deterministic: bool = False) -> Any:
        return super().forward(obs, deterministic)


class Watched(ScriptedEnv):
    """
    :param allowed: for each number of an action, what it may be
    """

    def __init__(self, action_space: spaces.Space[Any], allowed: list[set[int]]) -> None:
        super().__init__(BOX, action_space)
        self._allowed = allowed

    def step(self, action: Any) -> Any:
        numbers = th.as_tensor(action).flatten().tolist()
        assert all(number in allowed for number, allowed in zip(numbers, self._allowed, strict=True))
        return super().step(action)


# Space, what replaces logits, what is left to do, and the logits that are left to learn.
CASES: dict[str, tuple[spaces.Space[Any], dict[int, float], list[set[int]], list[int]]] = {
    "discrete": (spaces.Discrete(3), {2: -math.inf}, [{0, 1}], [0, 1]),
    "multi-discrete": (spaces.MultiDiscrete([3, 2]), {2: -math.inf, 3: -math.inf}, [{0, 1}, {1}], [0, 1]),
    "multi-binary": (spaces.MultiBinary(3), {0: -math.inf, 1: math.inf}, [{0}, {1}, {0, 1}], [2]),
}


def learn(algorithm: Any, policy: Any, case: str, **kwargs: Any) -> None:
    space, logits, allowed, learnt = CASES[case]
    model = small(algorithm, policy, Watched(space, allowed), policy_kwargs={"logits": logits}, **kwargs)
    before = model.policy.action_net.linear.weight.detach().clone()
    model.learn(16)
    change = (model.policy.action_net.linear.weight - before).abs().sum(dim=1)
    assert (change[learnt] > 0.0).all()
    others = [i for i in range(len(change)) if i not in learnt]
    assert (change[others] == 0.0).all()
    logged = model.logger.name_to_value
    assert all(math.isfinite(value) for value in logged.values() if isinstance(value, float)), logged


@pytest.mark.parametrize(("algorithm", "case", "ent_coef"), pairwise(ALGORITHMS, CASES, [0.0, 0.01]))
def test_what_is_left_is_learnt(algorithm: Any, case: str, ent_coef: float) -> None:
    learn(algorithm, Policy, case, ent_coef=ent_coef)


@pytest.mark.parametrize(
    ("algorithm", "case", "ent_coef"),
    pairwise(ALGORITHMS, ["discrete", "multi-discrete"], [0.0, 0.01]),  # SB3's entropy of binary ones is not finite
)
def test_what_is_left_is_learnt_by_a_policy_that_overrides_methods(algorithm: Any, case: str, ent_coef: float) -> None:
    learn(algorithm, OwnMethods, case, ent_coef=ent_coef)


def test_the_scores_of_reinforces_optimal_baseline_are_finite() -> None:
    learn(REINFORCE, Policy, "discrete", baseline="optimal")
