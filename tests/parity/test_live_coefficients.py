"""A compiled step sees each number of a loss change, as the eager one does; what it cannot see is refused."""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch as th

from sb3_ppo_ext import REINFORCE, TRPO, AdaptiveKLPPO, DualClipPPO
from sb3_ppo_ext.common.rollout.data import RolloutSamples
from sb3_ppo_ext.common.rollout.evaluation import Evaluation
from sb3_ppo_ext.common.update.objective import Coefficients, PolicyLoss

# What is traced is run as it is: what a compiler makes of it is tested elsewhere, and takes its time.
pytestmark = pytest.mark.usefixtures("without_compiler")

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
    """Multiplies its loss by a number of its own."""

    strength: float = 1

    def coefficients(self) -> dict[str, float]:
        return {**super().coefficients(), "strength": self.strength}

    @staticmethod
    def policy_loss(evaluation: Evaluation, samples: RolloutSamples, coefficients: Coefficients) -> PolicyLoss:
        loss, statistics = DualClipPPO.policy_loss(evaluation, samples, coefficients)
        return PolicyLoss(loss * coefficients["strength"], statistics)


def test_numbers_are_live(programs: list[str]) -> None:
    results = both_ways(Strong, [("strength", 1), ("strength", 1000), ("strength", np.float64(0.1))], **PPO_SIZES)
    agree(results)
    norms = [logged["train/grad_norm"] for logged in results[1]]
    assert norms[1] > 10 * norms[0]
    assert programs.count("the gradient step") == 1


SCALE = 1.0
scales = True


def scaled(loss: th.Tensor) -> th.Tensor:
    return loss * SCALE if scales else loss


class ReadsGlobals(DualClipPPO):
    """What its loss reads stands in its module, and in a function there."""

    @staticmethod
    def policy_loss(evaluation: Evaluation, samples: RolloutSamples, coefficients: Coefficients) -> PolicyLoss:
        loss, statistics = DualClipPPO.policy_loss(evaluation, samples, coefficients)
        return PolicyLoss(scaled(loss), statistics)


def test_what_a_loss_reads_of_its_module_is_compiled_anew(programs: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    norms: dict[bool, list[float]] = {False: [], True: []}
    for torch_compile in norms:
        monkeypatch.setitem(globals(), "scales", True)
        model: Any = ReadsGlobals("MlpPolicy", "CartPole-v1", **SMALL, torch_compile=torch_compile, **PPO_SIZES)
        for name, value in (("SCALE", 1.0), ("SCALE", 1000.0), ("scales", False), ("scales", False)):
            monkeypatch.setitem(globals(), name, value)
            np.random.seed(0)  # noqa: NPY002  # the minibatches
            model.learn(1, reset_num_timesteps=False)
            norms[torch_compile].append(model.logger.name_to_value["train/grad_norm"])
    assert norms[True] == pytest.approx(norms[False], rel=2e-3)
    assert norms[True][1] > 10 * norms[True][0]
    assert programs.count("the gradient step") == 3


def of_dual_clip(factor: Callable[[], Any]) -> Callable[..., PolicyLoss]:
    """A loss that is the one of DualClipPPO times a number, which it finds anew each time that it is called."""

    def policy_loss(evaluation: Evaluation, samples: RolloutSamples, coefficients: Coefficients) -> PolicyLoss:
        loss, statistics = DualClipPPO.policy_loss(evaluation, samples, coefficients)
        return PolicyLoss(loss * factor(), statistics)

    return policy_loss


def unchanged(function: Callable[..., Any]) -> Callable[..., Any]:
    """A decorator."""

    @functools.wraps(function)
    def wrapper(*args: Any) -> Any:
        return function(*args)

    return wrapper


class Settings:
    scale = 1.0


settings: Any = ModuleType("settings")
settings.scale = 1.0
settings.inner = Settings
WEIGHT: Any = th.tensor(1.0)


def one() -> float:
    return 1.0


def thousand() -> float:
    return 1000.0


def default(*, scale: float = 1.0) -> float:
    return scale


# How a loss reads a number, and how that becomes another.
WAYS: dict[str, tuple[Callable[..., Any], Any, str, Any]] = {
    "in a function inside of it": (of_dual_clip(lambda: (lambda: SCALE)()), None, "SCALE", 1000.0),
    "of another module": (of_dual_clip(lambda: settings.scale), settings, "scale", 1000.0),
    "of a class": (of_dual_clip(lambda: Settings.scale), Settings, "scale", 1000.0),
    "of a class of a module": (of_dual_clip(lambda: settings.inner.scale), Settings, "scale", 1000.0),
    "by the loss of a class": (lambda *args: ReadsGlobals.policy_loss(*args), None, "SCALE", 1000.0),
    "behind a decorator": (unchanged(of_dual_clip(lambda: SCALE)), None, "SCALE", 1000.0),
    "by a function that is replaced": (of_dual_clip(lambda: one()), None, "one", thousand),
    "of a tensor that is replaced": (of_dual_clip(lambda: WEIGHT), None, "WEIGHT", th.tensor(1000.0)),
    "as a default": (of_dual_clip(default), default, "__kwdefaults__", {"scale": 1000.0}),
}


@pytest.mark.parametrize("way", WAYS)
def test_what_a_loss_reads_elsewhere_is_compiled_anew(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    loss, where, name, value = WAYS[way]
    algorithm: Any = type("Reads", (DualClipPPO,), {"policy_loss": staticmethod(loss)})
    norms: dict[bool, list[float]] = {False: [], True: []}
    for torch_compile in norms:
        with monkeypatch.context() as changes:
            model = algorithm("MlpPolicy", "CartPole-v1", **SMALL, torch_compile=torch_compile, **PPO_SIZES)
            for has_changed in (False, True):
                if has_changed and where is None:
                    changes.setitem(globals(), name, value)
                elif has_changed:
                    changes.setattr(where, name, value)
                np.random.seed(0)  # noqa: NPY002  # the minibatches
                model.learn(1, reset_num_timesteps=False)
                norms[torch_compile].append(model.logger.name_to_value["train/grad_norm"])
    assert norms[True] == pytest.approx(norms[False], rel=2e-3)
    assert norms[True][1] > 10 * norms[True][0]


class Method(DualClipPPO):
    """A loss that reads its object."""

    strength = 1.0

    def policy_loss(self, *args: Any) -> PolicyLoss:  # type: ignore[override]
        loss, statistics = super().policy_loss(*args)
        return PolicyLoss(loss * self.strength, statistics)


class LossObject:
    strength = 1.0

    def __call__(self, *args: Any) -> PolicyLoss:
        loss, statistics = DualClipPPO.policy_loss(*args)
        return PolicyLoss(loss * self.strength, statistics)


class OfAnObject(DualClipPPO):
    policy_loss = LossObject()  # type: ignore[assignment]


@pytest.mark.parametrize("algorithm", [Method, OfAnObject])
def test_a_loss_that_reads_an_object_is_refused(algorithm: Any) -> None:
    with pytest.raises(ValueError, match="torch_compile=True is not allowed with a policy_loss that is no plain"):
        algorithm("MlpPolicy", "CartPole-v1", **SMALL, torch_compile=True, **PPO_SIZES)
    algorithm("MlpPolicy", "CartPole-v1", **SMALL, **PPO_SIZES).learn(32)


class Holder:
    value = 1.0

    def number(self) -> float:
        return self.value

    @classmethod
    def of_class(cls) -> float:
        return cls.value

    def __call__(self) -> float:
        return self.value


HOLDER = Holder()


def of_a_dict(*, numbers: dict[str, float] = {"scale": 1.0}) -> float:  # noqa: B006  (that is what is tested)
    return numbers["scale"]


@pytest.mark.parametrize(
    "value",
    [
        {"strength": 1.0},
        [1.0],
        np.ones(2),
        HOLDER,
        HOLDER.number,
        Holder.of_class,
        of_a_dict,
        functools.partial(max, [1.0]),
    ],
    ids=lambda v: getattr(v, "__name__", type(v).__name__),
)
def test_what_may_change_unseen_is_refused(value: Any) -> None:
    class Reads(DualClipPPO):
        @staticmethod
        def policy_loss(evaluation: Evaluation, samples: RolloutSamples, coefficients: Coefficients) -> PolicyLoss:
            assert value is not None
            return DualClipPPO.policy_loss(evaluation, samples, coefficients)

    model: Any = Reads("MlpPolicy", "CartPole-v1", **SMALL, **PPO_SIZES)
    model.torch_compile = True
    with pytest.raises(ValueError, match=r"torch_compile=True is not allowed with a loss that reads .*, a "):
        model.learn(32)
    assert model.num_timesteps == 0


@pytest.mark.parametrize("name", ["_policy_loss", "_coefficients"])
def test_the_names_of_the_first_edition_are_not_ignored(name: str) -> None:
    with pytest.raises(TypeError, match=rf"Old defines {name}, which is now named {name[1:]}"):
        type("Old", (DualClipPPO,), {name: lambda self, *args: None})
