"""A loss of one's own: what it may give is what the docstrings say, and a mistake is answered in words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch as th
from gymnasium import spaces

from sb3_ppo_ext import AdaptiveKLPPO, DualClipPPO
from sb3_ppo_ext.common.proximal import ProximalAlgorithm
from sb3_ppo_ext.common.update.objective import PolicyLoss
from tests.algorithms import ROLLOUT, have_moved, parameters, small
from tests.envs import BOX, BOX_ACTIONS, ScriptedEnv

pytestmark = pytest.mark.usefixtures("without_compiler")


def trained(
    loss: Any, *, base: Any = DualClipPPO, numbers: Any = None, action_space: Any = BOX_ACTIONS, **kwargs: Any
) -> Any:
    """A model of an algorithm that derives from ``base``, after one update by this loss and with these numbers."""
    methods: dict[str, Any] = {"policy_loss": staticmethod(loss)}
    if numbers is not None:
        methods["coefficients"] = lambda self: {**base.coefficients(self), **numbers}
    model = small(type("Own", (base,), methods), "MlpPolicy", ScriptedEnv(BOX, action_space), **kwargs)
    return model.learn(ROLLOUT)


def surrogate(evaluation: Any, samples: Any, coefficients: Any) -> PolicyLoss:
    return PolicyLoss(-samples.mean(evaluation.log_prob * samples.advantages), {})


@pytest.mark.parametrize("torch_compile", [False, True])
@pytest.mark.parametrize(
    "loss",
    [
        lambda e, s, c: surrogate(e, s, c).loss,
        lambda e, s, c: PolicyLoss(e.log_prob, {}),
        lambda e, s, c: PolicyLoss(surrogate(e, s, c).loss, {"mine": 1.0}),  # type: ignore[dict-item]
        lambda e, s, c: PolicyLoss(surrogate(e, s, c).loss, {"mine": e.log_prob.detach()}),
        lambda e, s, c: PolicyLoss(surrogate(e, s, c).loss, None),  # type: ignore[arg-type]
    ],
    ids=["loss alone", "loss of each sample", "float", "number of each sample", "no dict"],
)
def test_what_is_no_loss_is_named(loss: Any, torch_compile: bool) -> None:
    with pytest.raises(TypeError, match=r"policy_loss must return PolicyLoss\(loss, statistics\)"):
        trained(loss, torch_compile=torch_compile)


@pytest.mark.parametrize("torch_compile", [False, True])
def test_a_limit_of_the_kl_divergence_needs_its_statistic(torch_compile: bool) -> None:
    with pytest.raises(ValueError, match=r"\(target_kl\), and the statistics .* have no approx_kl, but none"):
        trained(surrogate, torch_compile=torch_compile, target_kl=0.1)


@pytest.mark.parametrize("torch_compile", [False, True])
@pytest.mark.parametrize("reuse", [{"proximal": "ewma"}, {"proximal": "newest", "target": "gae"}])
def test_a_policy_to_clip_around_must_be_asked_for(reuse: Any, torch_compile: bool) -> None:
    kwargs = {"reuse": reuse, "n_reused_rollouts": int(reuse["proximal"] == "newest"), "torch_compile": torch_compile}

    def by_other_advantages(evaluation: Any, samples: Any, coefficients: Any) -> PolicyLoss:
        samples = samples._replace(advantages=-samples.advantages)
        return DualClipPPO.policy_loss(evaluation, samples, coefficients)

    def by_some_of_them(evaluation: Any, samples: Any, coefficients: Any) -> PolicyLoss:
        return PolicyLoss(samples.rows(slice(0, 2)).proximal_log_prob.mean() + 0.0 * evaluation.log_prob.mean(), {})

    trained(by_other_advantages, **kwargs)
    trained(by_some_of_them, **kwargs)
    with pytest.raises(ValueError, match=r"policy_loss does not read samples\.proximal_log_prob"):
        trained(surrogate, **kwargs)


@pytest.mark.parametrize("torch_compile", [False, True])
def test_what_is_no_number_is_named(torch_compile: bool) -> None:
    with pytest.raises(TypeError, match=r"Own.coefficients\(\) gives mine=None, which is no number"):
        trained(surrogate, numbers={"mine": None}, torch_compile=torch_compile)


@pytest.mark.parametrize("torch_compile", [False, True])
@pytest.mark.parametrize("two", [2, th.tensor(2.0)])
def test_a_number_is_what_float_takes(two: Any, torch_compile: bool) -> None:
    model = trained(
        lambda e, s, c: PolicyLoss(surrogate(e, s, c).loss, {"seen": 1.0 * th.as_tensor(c["mine"])}),
        numbers={"mine": two},
        torch_compile=torch_compile,
    )
    assert model.logger.name_to_value["train/seen"] == 2.0
    assert model.logger.name_to_value["train/mine"] == 2.0


@pytest.mark.parametrize("torch_compile", [False, True])
def test_a_number_that_is_not_there_is_named(torch_compile: bool) -> None:
    with pytest.raises(KeyError, match=r"policy_loss reads coefficients\['epsilon'\], .* no such name: .*'eps'\]"):
        trained(
            lambda e, s, c: PolicyLoss(c["epsilon"] * surrogate(e, s, c).loss, {}),
            numbers={"eps": 0.2},
            torch_compile=torch_compile,
        )


class SetsNothingUp(ProximalAlgorithm):
    def __init__(self, policy: Any, env: Any, *, _init_setup_model: bool = True, **kwargs: Any) -> None:
        super().__init__(policy, env, **kwargs)

    policy_loss = staticmethod(surrogate)


class AlwaysSetsUp(ProximalAlgorithm):
    def __init__(self, policy: Any, env: Any, **kwargs: Any) -> None:
        super().__init__(policy, env, **kwargs)
        self._setup_new_model()

    policy_loss = staticmethod(surrogate)


def test_a_constructor_that_does_not_set_up_the_model_is_told_so(tmp_path: Path) -> None:
    model = SetsNothingUp("MlpPolicy", ScriptedEnv(BOX, BOX_ACTIONS), device="cpu")
    for use in (lambda: model.learn(ROLLOUT), lambda: model.save(tmp_path / "model"), lambda: model.predict(BOX.low)):
        with pytest.raises(AttributeError, match=r"no attribute 'policy': .* self\._setup_new_model\(\)"):
            use()
    with pytest.raises(AttributeError, match=r"object has no attribute 'polici'$"):
        _ = model.polici

    AlwaysSetsUp("MlpPolicy", ScriptedEnv(BOX, BOX_ACTIONS), device="cpu").save(tmp_path / "model")
    with pytest.raises(TypeError, match=r"AlwaysSetsUp's constructor passes _init_setup_model on: .*_setup_new"):
        AlwaysSetsUp.load(tmp_path / "model")


@pytest.mark.parametrize("torch_compile", [False, True])
def test_the_weight_of_the_value_loss_may_follow_a_schedule(torch_compile: bool) -> None:
    model = trained(
        lambda e, s, c: PolicyLoss(0.0 * surrogate(e, s, c).loss, {}),
        numbers={"vf_coef": 0.0},
        torch_compile=torch_compile,
        ent_coef=0.0,
    )
    assert model.logger.name_to_value["train/grad_norm"] == 0.0


@pytest.mark.parametrize("torch_compile", [False, True])
@pytest.mark.parametrize("action_space", [BOX_ACTIONS, spaces.Discrete(3)])
def test_an_exact_kl_divergence_where_the_distributions_are_kept(action_space: Any, torch_compile: bool) -> None:
    def loss(evaluation: Any, samples: Any, coefficients: Any) -> PolicyLoss:
        return PolicyLoss(samples.mean(evaluation.kl_from(samples.old_params)), {})

    trained(loss, base=AdaptiveKLPPO, action_space=action_space, torch_compile=torch_compile)
    if isinstance(action_space, spaces.Box):
        with pytest.raises(ValueError, match="must have the class attribute _needs_old_params = True"):
            trained(loss, torch_compile=torch_compile)


def test_a_negative_weight_of_the_entropy_is_a_weight() -> None:
    """A callback may set one, as with SB3's PPO: it makes the policy more certain."""
    model = small(DualClipPPO, "MlpPolicy", ScriptedEnv(BOX, BOX_ACTIONS), vf_coef=0.0, learning_rate=0.1)
    model.ent_coef = -10.0
    before = parameters(model)
    model.learn(ROLLOUT)
    assert have_moved(model, before)
    assert (model.policy.log_std < -0.1).all()


def test_a_property_that_fails_tells_its_own_error() -> None:
    class Failing(DualClipPPO):
        @property
        def half(self) -> float:
            return self.missing / 2.0  # type: ignore[attr-defined, no-any-return]

    with pytest.raises(AttributeError, match="'missing'"):
        _ = Failing("MlpPolicy", "CartPole-v1").half
