"""``kl_adaptive_lr``: before each gradient step, the learning rate is what the KL of the steps before makes of it."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch as th
from gymnasium import spaces

from sb3_ppo_ext import AdaptiveKLPPO, DualClipPPO
from sb3_ppo_ext.common.update.controllers import KLAdaptiveRate
from tests.algorithms import ROLLOUT, assert_close_policies, small
from tests.envs import BOX, BOX_ACTIONS, scripted

CRITIC_RATE = 0.0123


class Watched:
    """
    Gradient steps; before each it is noted with which learning rate it is made, and how far the policy has moved.

    :param step: of the model
    :param model: whose policy has acted and not been updated yet
    """

    def __init__(self, step: Any, model: Any) -> None:
        self._step = step
        self._model = model
        self._acted = copy.deepcopy(model.policy)
        self.rates: list[float] = []
        self.kls: list[float] = []

    @property
    def names(self) -> tuple[str, ...]:
        names: tuple[str, ...] = self._step.names
        return names

    def __enter__(self) -> None:
        self._step.__enter__()

    def __exit__(self, *exception: object) -> None:
        self._step.__exit__(*exception)

    def __call__(self, rollout: Any, rows: Any, coefficients: Any) -> th.Tensor:
        policy = self._model.policy
        rate, of_critic = (group["lr"] for group in policy.optimizer.param_groups)
        assert of_critic == CRITIC_RATE
        self.rates.append(rate)
        with th.no_grad():
            obs = rollout.rows(rows).observations
            acted, present = (p.get_distribution(obs).distribution for p in (self._acted, policy))
            if not isinstance(acted, list):
                acted, present = [acted], [present]
            kls = [th.distributions.kl_divergence(p, q) for p, q in zip(acted, present, strict=True)]
            self.kls.append(sum(kl.reshape(len(kl), -1).sum(dim=1) for kl in kls).mean().item())
        statistics: th.Tensor = self._step(rollout, rows, coefficients)
        assert statistics[self.names.index("minibatch_kl")].item() == pytest.approx(self.kls[-1], rel=1e-3, abs=1e-6)
        return statistics


def watched(model: Any) -> list[Watched]:
    """The steps of each update that the model will make."""
    make, steps = model._minibatch_step, list[Watched]()

    def make_watched(*args: Any, **kwargs: Any) -> Watched:
        steps.append(Watched(make(*args, **kwargs), model))
        return steps[-1]

    model._minibatch_step = make_watched
    return steps


def expected_rates(rate: float, kls: list[list[float]], every: int, target: float) -> Iterator[float]:
    """With a tolerance of 2 and a factor of 1.5, between 1e-3 and 0.05: before each step, and after the last one."""
    for of_update in kls:
        for i in range(len(of_update)):
            yield rate
            if (i + 1) % every == 0 and i > 0:
                seen = [kl for j, kl in enumerate(of_update[: i + 1]) if j > i - every and j > 0]
                kl = sum(seen) / len(seen)
                rate = rate * 1.5 if kl < target / 2 else rate / 1.5 if kl > target * 2 else rate
                rate = min(max(rate, 1e-3), 0.05)
    yield rate


@pytest.mark.parametrize(
    ("algorithm", "every", "batch_size", "action_space", "torch_compile", "target"),
    [
        (DualClipPPO, "minibatch", 8, BOX_ACTIONS, False, {"target_kl": 0.01}),
        (DualClipPPO, "minibatch", 8, spaces.MultiDiscrete([3, 2]), True, {}),
        (DualClipPPO, "epoch", 32, spaces.Discrete(3), False, {}),  # an epoch is one step
        (AdaptiveKLPPO, "minibatch", 8, spaces.Discrete(3), False, {}),
        (AdaptiveKLPPO, "epoch", 8, BOX_ACTIONS, True, {}),
    ],
)
@pytest.mark.usefixtures("without_compiler")
def test_the_rate_follows_the_kl(
    algorithm: Any, every: str, batch_size: int, action_space: Any, torch_compile: bool, target: dict[str, float]
) -> None:
    def made(torch_compile: bool) -> Any:
        return small(
            algorithm,
            "MlpPolicy",
            scripted(BOX, action_space, script=((5, True, False),)),
            learning_rate=0.01,
            batch_size=batch_size,
            n_epochs=6,
            torch_compile=torch_compile,
            kl_adaptive_lr={**target, "minimum": 1e-3, "maximum": 0.05, "every": every},
            policy_kwargs={"critic_learning_rate": CRITIC_RATE},
        )

    model = made(torch_compile)
    steps = watched(model)
    model.learn(3 * ROLLOUT, log_interval=100)
    n_dims = {"Box": BOX_ACTIONS.shape[0], "MultiDiscrete": 2, "Discrete": 1}[type(action_space).__name__]
    target_kl = target.get("target_kl", (0.003 if algorithm is AdaptiveKLPPO else 0.01) * n_dims)
    n_of_epoch = {"minibatch": 1, "epoch": model.n_envs * ROLLOUT // batch_size}[every]
    rates = list(expected_rates(0.01, [step.kls for step in steps], n_of_epoch, target_kl))
    assert [rate for step in steps for rate in step.rates] == pytest.approx(rates[:-1])
    assert model.learning_rate == model.lr_schedule(0.5) == pytest.approx(rates[-1])
    assert model.logger.name_to_value["train/learning_rate"] == pytest.approx(rates[-1])
    changes = {(after > before) - (after < before) for before, after in itertools.pairwise(rates)}
    assert changes == {-1, 0, 1}
    if torch_compile:
        assert_close_policies(made(False).learn(3 * ROLLOUT), model, atol=1e-5)


@pytest.mark.parametrize(
    ("kl", "rate"),
    [(0.0, 0.003), (0.0049, 0.003), (0.0051, 0.002), (0.0199, 0.002), (0.0201, 0.002 / 1.5), (float("nan"), 0.002)],
)
def test_the_rule(kl: float, rate: float) -> None:
    assert KLAdaptiveRate().after(kl, 0.002, 0.01) == pytest.approx(rate)


def test_the_bounds() -> None:
    rate = KLAdaptiveRate(minimum=0.001, maximum=0.004, factor=3.0)
    assert rate.after(0.0, 0.002, 0.01) == 0.004
    assert rate.after(1.0, 0.002, 0.01) == 0.001
