"""A compiled step sees every attribute that a loss reads, as the eager one does; what it cannot see is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch as th

from sb3_ppo_ext import REINFORCE, TRPO, AdaptiveKLPPO, DualClipPPO
from sb3_ppo_ext.common.compile import Run
from sb3_ppo_ext.common.compile.program import Program
from sb3_ppo_ext.common.proximal import PolicyLoss


@pytest.fixture(autouse=True)
def programs(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is traced is run as it is: what a compiler makes of it is tested elsewhere, and takes its time."""
    made: list[str] = []

    def built(self: Program, graph: th.fx.GraphModule, inputs: Any) -> Run:
        made.append(self._what)
        return th.no_grad()(lambda inputs: list(graph(*inputs)))

    monkeypatch.setattr(Program, "_built", built)
    return made


SMALL: dict[str, Any] = {"seed": 0, "device": "cpu", "policy_kwargs": {"net_arch": [8]}}


def both_ways(algorithm: Any, changes: list[tuple[str, Any]], **kwargs: Any) -> list[list[dict[str, float]]]:
    """What is logged of an update after each change of an attribute, eager and compiled."""
    results = []
    for torch_compile in (False, True):
        model = algorithm("MlpPolicy", "CartPole-v1", **SMALL, torch_compile=torch_compile, **kwargs)
        logged = []
        for name, value in changes:
            if name:
                setattr(model, name, value)
            np.random.seed(0)  # noqa: NPY002  # the minibatches
            th.manual_seed(0)
            model._last_obs = None
            if model.env is not None:
                model.env.seed(0)
            model.learn(1, reset_num_timesteps=False)
            logged.append(
                {key: float(x) for key, x in model.logger.name_to_value.items() if isinstance(x, (int, float))}
                | {"parameters": th.nn.utils.parameters_to_vector(model.policy.parameters()).norm().item()}
            )
        results.append(logged)
    return results


def agree(results: list[list[dict[str, float]]]) -> None:
    for eager, compiled in zip(*results, strict=True):
        assert eager.keys() == compiled.keys()
        for key, value in eager.items():
            assert compiled[key] == pytest.approx(value, rel=2e-3, abs=2e-5), key


PPO_SIZES = {"n_steps": 32, "batch_size": 16, "n_epochs": 2}
PUBLIC: dict[Any, tuple[dict[str, Any], list[tuple[str, Any]]]] = {
    DualClipPPO: (
        PPO_SIZES,
        [
            ("", None),
            ("vf_coef", 5.0),
            ("ent_coef", 0.5),
            ("max_grad_norm", 0.01),
            ("clip_range", 0.01),
            ("clip_range_high", 0.02),
            ("dual_clip", 1.05),
            ("dual_clip", None),
            ("clip_range_vf", 0.01),
            ("clip_range_vf", None),
            ("normalize_advantage", False),
            ("n_epochs", 3),
            ("batch_size", 8),
            ("target_kl", 1e-6),
        ],
    ),
    AdaptiveKLPPO: (
        PPO_SIZES,
        [
            ("", None),
            ("kl_coef", 100.0),
            ("clip_range", 0.01),
            ("clip_range", None),
            ("target_kl", 1e-4),
            ("vf_coef", 5.0),
            ("normalize_advantage", False),
        ],
    ),
    TRPO: (
        {"n_steps": 32, "batch_size": 16, "n_critic_updates": 2},
        [("", None), ("target_kl", 0.001), ("cg_damping", 1.0), ("ent_coef", 0.5), ("n_critic_updates", 3)],
    ),
    REINFORCE: (
        {"baseline": "value", "episodes_per_env": 2, "n_critic_updates": 2},
        [("", None), ("max_grad_norm", 0.01), ("ent_coef", 0.5), ("batch_size", 8), ("normalize_advantage", True)],
    ),
}


@pytest.mark.parametrize("algorithm", PUBLIC, ids=lambda a: a.__name__)
def test_public_attributes(algorithm: Any) -> None:
    kwargs, changes = PUBLIC[algorithm]
    results = both_ways(algorithm, changes, **kwargs)
    agree(results)
    for before, after in zip(results[0], results[0][1:], strict=False):
        assert before["parameters"] != after["parameters"]


class Strong(DualClipPPO):
    """Multiplies its loss by a number; in a method of its own, and by a property."""

    strength: float = 1
    scales = True

    @property
    def factor(self) -> float:
        return 2 * self.strength

    def _scaled(self, loss: th.Tensor) -> th.Tensor:
        return loss * self.factor if self.scales else loss

    def _policy_loss(self, *args: Any) -> PolicyLoss:
        loss, statistics = super()._policy_loss(*args)
        return PolicyLoss(self._scaled(loss), statistics)


def test_numbers_are_live(programs: list[str]) -> None:
    results = both_ways(Strong, [("strength", 1), ("strength", 1000), ("strength", np.float64(0.1))], **PPO_SIZES)
    agree(results)
    norms = [logged["train/grad_norm"] for logged in results[1]]
    assert norms[1] > 10 * norms[0]
    assert programs.count("the gradient step") == 1


def test_a_setting_that_has_changed_is_compiled_anew(programs: list[str]) -> None:
    changes = [("strength", 50.0), ("scales", False), ("scales", True)]
    agree(both_ways(Strong, changes, **PPO_SIZES))
    assert programs.count("the gradient step") == 3


class Decides(DualClipPPO):
    """Takes one way or another by a number, which no tensor can stand for."""

    threshold = 0.0

    def _policy_loss(self, *args: Any) -> PolicyLoss:
        loss, statistics = super()._policy_loss(*args)
        return PolicyLoss(loss * (100.0 if self.threshold > 1 else 1.0), statistics)


def test_a_number_that_decides_is_compiled_anew() -> None:
    results = both_ways(Decides, [("threshold", 0.0), ("threshold", 2.0), ("threshold", 0.5)], **PPO_SIZES)
    agree(results)
    assert results[1][1]["train/grad_norm"] > 1.5 * results[1][0]["train/grad_norm"]


class Holder:
    value = 1.0


@pytest.mark.parametrize(
    ("name", "value"),
    [("settings", {"strength": 1.0}), ("settings", [1.0]), ("settings", Holder()), ("settings", np.ones(2))],
    ids=["dict", "list", "object", "array"],
)
def test_what_may_change_unseen_is_refused(name: str, value: Any) -> None:
    class Reads(DualClipPPO):
        def _policy_loss(self, *args: Any) -> PolicyLoss:
            assert getattr(self, name) is not None
            return super()._policy_loss(*args)

    Reads.settings = value  # type: ignore[attr-defined]
    model: Any = Reads("MlpPolicy", "CartPole-v1", **SMALL, torch_compile=True, **PPO_SIZES)
    before = [p.clone() for p in model.policy.parameters()]
    with pytest.raises(ValueError, match=f"torch_compile=True is not allowed: the loss reads self.{name}, a "):
        model.learn(32)
    assert all(map(th.equal, model.policy.parameters(), before))


def test_a_loss_that_stores_something_is_refused() -> None:
    class Counts(DualClipPPO):
        count = 0

        def _policy_loss(self, *args: Any) -> PolicyLoss:
            self.count += 1
            return super()._policy_loss(*args)

    model: Any = Counts("MlpPolicy", "CartPole-v1", **SMALL, torch_compile=True, **PPO_SIZES)
    with pytest.raises(ValueError, match=r"torch_compile=True is not allowed: the loss sets self\.count"):
        model.learn(32)
    Counts("MlpPolicy", "CartPole-v1", **SMALL, **PPO_SIZES).learn(32)
