"""Policy losses against tables of literals, limits, and SB3's own lines."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch as th
from hypothesis import given, settings
from hypothesis import strategies as st

from sb3_ppo_ext.losses import (
    SurrogateLoss,
    clipped_surrogate_loss,
    dual_clip_surrogate_loss,
    kl_penalized_surrogate_loss,
    reinforce_loss,
    spo_surrogate_loss,
    surrogate_loss,
)

Loss = Callable[..., SurrogateLoss]


def penalized(log_prob: th.Tensor, old_log_prob: th.Tensor, advantages: th.Tensor, **options: Any) -> SurrogateLoss:
    """The KL-penalised surrogate with a KL of zero, so that it has the others' signature."""
    kl = th.zeros_like(log_prob)
    return kl_penalized_surrogate_loss(log_prob, old_log_prob, advantages, kl, kl_coef=0.5, **options)


SURROGATES: list[Loss] = [
    surrogate_loss,
    clipped_surrogate_loss,
    dual_clip_surrogate_loss,
    penalized,
    spo_surrogate_loss,
]


def objective_and_gradient(loss: Loss, ratio: float, advantage: float, **kwargs: object) -> tuple[float, float]:
    """Objective (what is maximised) at a ratio, and its derivative with respect to that ratio."""
    ratios = th.tensor([ratio], dtype=th.float64, requires_grad=True)
    advantages = th.tensor([advantage], dtype=th.float64)
    objective = -loss(ratios.log(), th.zeros_like(advantages), advantages, **kwargs).loss
    (gradient,) = th.autograd.grad(objective.sum(), ratios)
    return objective.item(), gradient.item()


def random_batch(seed: int, size: int = 64, spread: float = 0.5) -> tuple[th.Tensor, th.Tensor, th.Tensor]:
    generator = th.Generator().manual_seed(seed)
    log_prob = th.randn(size, generator=generator).requires_grad_()
    old_log_prob = log_prob.detach() + spread * th.randn(size, generator=generator)
    return log_prob, old_log_prob, th.randn(size, generator=generator)


# The clipped objective


@pytest.mark.parametrize(
    ("ratio", "advantage", "objective", "gradient"),
    [
        # clip range [0.8, 1.2]; gradient: inside A; below and A < 0: 0; above and A > 0: 0; otherwise A
        (1.1, 2.0, 2.2, 2.0),  # inside: 1.1 * 2
        (0.9, -2.0, -1.8, -2.0),  # inside: 0.9 * -2
        (0.5, 2.0, 1.0, 2.0),  # below, good action: 0.5 * 2, still pulled up
        (0.5, -2.0, -1.6, 0.0),  # below, bad action: 0.8 * -2, let go
        (1.5, 2.0, 2.4, 0.0),  # above, good action: 1.2 * 2, let go
        (1.5, -2.0, -3.0, -2.0),  # above, bad action: 1.5 * -2, still pushed down
        (1.5, 0.0, 0.0, 0.0),
    ],
)
@pytest.mark.parametrize("loss", [clipped_surrogate_loss, dual_clip_surrogate_loss])
def test_six_cases_of_the_clipped_objective(
    loss: Loss, ratio: float, advantage: float, objective: float, gradient: float
) -> None:
    assert objective_and_gradient(loss, ratio, advantage) == pytest.approx((objective, gradient), abs=1e-12)


@pytest.mark.parametrize(
    ("ratio", "advantage", "objective", "gradient"),
    [
        # clip range [0.9, 1.3]
        (1.25, 4.0, 5.0, 4.0),
        (1.40, 4.0, 5.2, 0.0),  # 1.3 * 4
        (1.40, -4.0, -5.6, -4.0),
        (0.85, 4.0, 3.4, 4.0),
        (0.85, -4.0, -3.6, 0.0),  # 0.9 * -4
        (0.95, -4.0, -3.8, -4.0),
    ],
)
def test_asymmetric_range(ratio: float, advantage: float, objective: float, gradient: float) -> None:
    ranges = {"clip_range": 0.1, "clip_range_high": 0.3}
    for loss in (clipped_surrogate_loss, dual_clip_surrogate_loss):
        result = objective_and_gradient(loss, ratio, advantage, **ranges)
        assert result == pytest.approx((objective, gradient), abs=1e-12)


@pytest.mark.parametrize("clip_range", [0.0, 0.1, 0.2, 0.3])
@pytest.mark.parametrize("dtype", [th.float32, th.float64])
def test_clipped_loss_is_sb3s_to_the_bit(clip_range: float, dtype: th.dtype) -> None:
    log_prob, old_log_prob, advantages = (tensor.detach().to(dtype) for tensor in random_batch(0, size=4096))
    log_prob.requires_grad_()
    advantages[::7] = 0.0
    ours = clipped_surrogate_loss(log_prob, old_log_prob, advantages, clip_range=clip_range)

    # These lines are SB3's (stable_baselines3/ppo/ppo.py), and stand here as the reference.
    ratio = th.exp(log_prob - old_log_prob)
    policy_loss_1 = advantages * ratio
    policy_loss_2 = advantages * th.clamp(ratio, 1 - clip_range, 1 + clip_range)
    sb3_loss = -th.min(policy_loss_1, policy_loss_2)
    sb3_clip_fraction = th.mean((th.abs(ratio - 1) > clip_range).to(dtype))
    sb3_approx_kl = th.mean((th.exp(log_prob - old_log_prob) - 1) - (log_prob - old_log_prob))

    assert th.equal(ours.loss, sb3_loss)
    (our_gradient,) = th.autograd.grad(ours.loss.sum(), log_prob)
    (sb3_gradient,) = th.autograd.grad(sb3_loss.sum(), log_prob)
    assert th.equal(our_gradient, sb3_gradient)
    th.testing.assert_close(ours.diagnostics.clip_fraction, sb3_clip_fraction)
    th.testing.assert_close(ours.diagnostics.kl_k3, sb3_approx_kl.detach())


def test_an_infinite_range_clips_nothing() -> None:
    log_prob, old_log_prob, advantages = random_batch(1)
    clipped = clipped_surrogate_loss(log_prob, old_log_prob, advantages, clip_range=math.inf)
    plain = surrogate_loss(log_prob, old_log_prob, advantages)
    assert th.equal(clipped.loss, plain.loss)
    assert clipped.diagnostics.clip_fraction.item() == 0.0
    unbounded = dual_clip_surrogate_loss(log_prob, old_log_prob, advantages, clip_range=math.inf, dual_clip=math.inf)
    assert th.equal(unbounded.loss, plain.loss)


# The dual clip


def test_worked_example_of_an_exploding_ratio() -> None:
    # A = -10, r = 100: PPO's objective is 100 * -10 with slope A; the dual clip's is 3 * -10 with slope 0.
    assert objective_and_gradient(clipped_surrogate_loss, 100.0, -10.0) == pytest.approx((-1000.0, -10.0))
    objective, gradient = objective_and_gradient(dual_clip_surrogate_loss, 100.0, -10.0, dual_clip=3.0)
    assert objective == -30.0
    assert gradient == 0.0


@pytest.mark.parametrize(
    ("ratio", "objective", "gradient"), [(2.9, -5.8, -2.0), (3.1, -6.0, 0.0), (0.5, -1.6, 0.0), (1.0, -2.0, -2.0)]
)
def test_dual_clip_bounds_negative_advantages_past_c_only(ratio: float, objective: float, gradient: float) -> None:
    result = objective_and_gradient(dual_clip_surrogate_loss, ratio, -2.0, dual_clip=3.0)
    assert result == pytest.approx((objective, gradient), abs=1e-12)


@pytest.mark.parametrize("dual_clip", [1.3, 2.0, 3.0, 1e6])
def test_positive_advantages_are_untouched_by_c(dual_clip: float) -> None:
    log_prob, old_log_prob, advantages = random_batch(2, size=512, spread=2.0)
    advantages = advantages.abs()
    dual = dual_clip_surrogate_loss(log_prob, old_log_prob, advantages, dual_clip=dual_clip)
    plain = clipped_surrogate_loss(log_prob, old_log_prob, advantages)
    assert th.equal(dual.loss, plain.loss)
    assert th.equal(*(th.autograd.grad(result.loss.sum(), log_prob)[0] for result in (dual, plain)))
    assert dual.diagnostics.dual_clip_fraction.item() == 0.0


@given(
    log_ratios=st.lists(st.floats(-30, 30, width=32), min_size=1, max_size=8),
    advantage=st.sampled_from([-1e3, -1.0, -0.0, 0.0, 1.0, 1e3]),
    dual_clip=st.sampled_from([None, math.inf, th.tensor(math.inf)]),
)
@settings(deadline=None, derandomize=True)
def test_c_to_infinity_is_ppo_to_the_bit(
    log_ratios: list[float], advantage: float, dual_clip: float | th.Tensor | None
) -> None:
    log_prob = th.tensor(log_ratios, requires_grad=True)
    old_log_prob = th.zeros_like(log_prob)
    advantages = th.full_like(log_prob, advantage)
    dual = dual_clip_surrogate_loss(log_prob, old_log_prob, advantages, dual_clip=dual_clip)
    plain = clipped_surrogate_loss(log_prob, old_log_prob, advantages)
    assert th.equal(dual.loss, plain.loss)
    assert th.equal(*(th.autograd.grad(result.loss.sum(), log_prob)[0] for result in (dual, plain)))
    assert [value.item() for value in dual.diagnostics] == [value.item() for value in plain.diagnostics]


@pytest.mark.timeout(600)
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")  # torch's own import
def test_dual_clip_compiles_whole_and_new_schedule_values_do_not_recompile() -> None:
    th._dynamo.reset()
    compiled = th.compile(dual_clip_surrogate_loss, fullgraph=True, backend="aot_eager")  # all but the code generation
    log_prob, old_log_prob, advantages = random_batch(3, spread=2.0)
    mask = th.arange(64) % 5 != 0
    arguments = (log_prob, old_log_prob, advantages)
    for clip_range, dual_clip, stance in ((0.2, 3.0, "default"), (0.1, 2.0, "fail_on_recompile")):
        options = {"clip_range": th.tensor(clip_range), "dual_clip": th.tensor(dual_clip), "mask": mask}
        with th.compiler.set_stance(stance):
            result = compiled(*arguments, **options)
            (gradient,) = th.autograd.grad(result.loss.sum(), log_prob)
        expected = dual_clip_surrogate_loss(*arguments, **options)
        th.testing.assert_close(result.loss, expected.loss)
        th.testing.assert_close(gradient, th.autograd.grad(expected.loss.sum(), log_prob)[0])
        th.testing.assert_close(tuple(result.diagnostics), tuple(expected.diagnostics))
        assert not any(value.requires_grad for value in result.diagnostics)


# The plain and the penalised surrogate


def test_plain_surrogate_literals() -> None:
    assert objective_and_gradient(surrogate_loss, 1.5, -2.0) == pytest.approx((-3.0, -2.0))
    assert objective_and_gradient(surrogate_loss, 0.5, 4.0) == pytest.approx((2.0, 4.0))


def test_penalized_surrogate_literals() -> None:
    log_prob = th.tensor([2.0, 0.5], dtype=th.float64).log().requires_grad_()
    advantages = th.tensor([3.0, -4.0], dtype=th.float64)
    kl = th.tensor([0.25, 0.5], dtype=th.float64, requires_grad=True)
    loss = kl_penalized_surrogate_loss(log_prob, th.zeros_like(kl), advantages, kl, kl_coef=2.0).loss
    # -(2 * 3 - 2 * 0.25) = -5.5; -(0.5 * -4 - 2 * 0.5) = 3
    th.testing.assert_close(loss, th.tensor([-5.5, 3.0], dtype=th.float64))
    by_log_prob, by_kl = th.autograd.grad(loss.sum(), (log_prob, kl))
    th.testing.assert_close(by_log_prob, th.tensor([-6.0, 2.0], dtype=th.float64))  # -r A
    assert by_kl.tolist() == [2.0, 2.0]


def test_penalty_of_zero_is_the_plain_surrogate() -> None:
    log_prob, old_log_prob, advantages = random_batch(4)
    penalty_free = kl_penalized_surrogate_loss(log_prob, old_log_prob, advantages, th.rand(64), kl_coef=0.0)
    plain = surrogate_loss(log_prob, old_log_prob, advantages)
    assert th.equal(penalty_free.loss, plain.loss)
    assert [value.item() for value in penalty_free.diagnostics] == [value.item() for value in plain.diagnostics]


# Simple policy optimisation


@pytest.mark.parametrize(
    ("ratio", "advantage", "objective", "gradient"),
    [
        # epsilon 0.2: r A - |A| (r - 1)^2 / 0.4, and A - |A| (r - 1) / 0.2
        (1.0, 2.0, 2.0, 2.0),
        (1.1, 2.0, 2.15, 1.0),  # 2.2 - 2 * 0.01 / 0.4
        (1.2, 2.0, 2.2, 0.0),  # 2.4 - 2 * 0.04 / 0.4
        (1.4, 2.0, 2.0, -2.0),  # 2.8 - 2 * 0.16 / 0.4: back
        (1.1, -2.0, -2.25, -3.0),
        (0.8, -2.0, -1.8, 0.0),
        (0.5, -2.0, -2.25, 3.0),  # -1 - 2 * 0.25 / 0.4
        (3.0, 0.0, 0.0, 0.0),
    ],
)
def test_spo_literals(ratio: float, advantage: float, objective: float, gradient: float) -> None:
    found = objective_and_gradient(spo_surrogate_loss, ratio, advantage, epsilon=0.2)
    assert found == pytest.approx((objective, gradient), abs=1e-12)


@pytest.mark.parametrize("epsilon", [0.05, 0.2, 0.7])
@pytest.mark.parametrize("advantage", [3.0, 0.25, -0.25, -3.0])
def test_spo_leads_the_ratio_to_the_edge_and_back(advantage: float, epsilon: float) -> None:
    edge = 1.0 + math.copysign(epsilon, advantage)
    at_edge, gradient = objective_and_gradient(spo_surrogate_loss, edge, advantage, epsilon=epsilon)
    assert gradient == pytest.approx(0.0, abs=1e-12)
    for ratio in (0.01, edge - 0.01, edge + 0.01, 5.0):
        objective, gradient = objective_and_gradient(spo_surrogate_loss, ratio, advantage, epsilon=epsilon)
        assert objective < at_edge
        assert gradient * (edge - ratio) > 0.0


def test_spo_without_a_penalty_is_the_plain_surrogate() -> None:
    log_prob, old_log_prob, advantages = random_batch(5)
    spo = spo_surrogate_loss(log_prob, old_log_prob, advantages, epsilon=math.inf)
    plain = surrogate_loss(log_prob, old_log_prob, advantages)
    assert th.equal(spo.loss, plain.loss)
    assert [value.item() for value in spo.diagnostics] == [value.item() for value in plain.diagnostics]


# REINFORCE


def test_reinforce_literals() -> None:
    log_prob = th.tensor([-0.5, -2.0], requires_grad=True)
    weights = th.tensor([3.0, -1.5], requires_grad=True)
    loss = reinforce_loss(log_prob, weights)
    assert loss.tolist() == [1.5, -3.0]
    by_log_prob, by_weights = th.autograd.grad(loss.sum(), (log_prob, weights), allow_unused=True)
    assert by_log_prob.tolist() == [-3.0, 1.5]
    assert by_weights is None


def test_reinforce_gradient_is_the_policy_gradient_by_enumeration() -> None:
    # d/dz_i sum_a pi_a w_a = pi_i (w_i - sum_a pi_a w_a) for pi = softmax(z): 0.5, 0.25, 0.25 and mean 1.5
    logits = th.tensor([0.5, 0.25, 0.25], dtype=th.float64).log().requires_grad_()
    returns = th.tensor([1.0, 4.0, 0.0], dtype=th.float64)
    log_prob = logits.log_softmax(0)
    expected_loss = (log_prob.detach().exp() * reinforce_loss(log_prob, returns)).sum()
    (gradient,) = th.autograd.grad(expected_loss, logits)
    th.testing.assert_close(-gradient, th.tensor([-0.25, 0.625, -0.375], dtype=th.float64))


# Diagnostics


def test_diagnostics_literals() -> None:
    ratios = th.tensor([0.5, 1.0, 2.0, 4.0], dtype=th.float64)
    advantages = th.tensor([1.0, 1.0, -1.0, -1.0], dtype=th.float64)
    log_prob = ratios.log().requires_grad_()
    diagnostics = dual_clip_surrogate_loss(log_prob, th.zeros_like(ratios), advantages, dual_clip=3.0).diagnostics
    ln2 = math.log(2)
    assert diagnostics.clip_fraction_low.item() == 0.25  # 0.5
    assert diagnostics.clip_fraction_high.item() == 0.5  # 2 and 4
    assert diagnostics.clip_fraction.item() == 0.75
    assert diagnostics.dual_clip_fraction.item() == 0.25  # 4
    assert diagnostics.kl_k1.item() == pytest.approx(-(-1 + 0 + 1 + 2) * ln2 / 4)
    assert diagnostics.kl_k2.item() == pytest.approx((1 + 0 + 1 + 4) * ln2**2 / 8)
    # r - 1 is -1/2, 0, 1, 3, together 3.5; log r is together 2 ln 2
    assert diagnostics.kl_k3.item() == pytest.approx((3.5 - 2 * ln2) / 4)
    assert diagnostics.ratio_min.item() == pytest.approx(0.5)
    assert diagnostics.ratio_max.item() == pytest.approx(4.0)
    assert all(value.shape == () and not value.requires_grad for value in diagnostics)


def test_clip_fraction_goes_by_the_ratio_alone() -> None:
    log_prob = th.tensor([0.5, 0.5, 1.5, 1.5]).log()
    advantages = th.tensor([1.0, -1.0, 1.0, -1.0])
    diagnostics = clipped_surrogate_loss(log_prob, th.zeros(4), advantages).diagnostics
    assert (diagnostics.clip_fraction_low.item(), diagnostics.clip_fraction_high.item()) == (0.5, 0.5)
    assert diagnostics.dual_clip_fraction.item() == 0.0


def test_asymmetric_clip_fractions() -> None:
    log_prob = th.tensor([0.95, 0.85, 1.25, 1.4]).log()
    diagnostics = clipped_surrogate_loss(
        log_prob, th.zeros(4), th.ones(4), clip_range=0.1, clip_range_high=0.3
    ).diagnostics
    assert (diagnostics.clip_fraction_low.item(), diagnostics.clip_fraction_high.item()) == (0.25, 0.25)


@pytest.mark.parametrize("loss", [surrogate_loss, penalized])
def test_nothing_is_clipped_where_there_is_no_clip(loss: Loss) -> None:
    diagnostics = loss(*random_batch(5, spread=3.0)).diagnostics
    assert diagnostics.clip_fraction.item() == 0.0
    assert diagnostics.dual_clip_fraction.item() == 0.0


@pytest.mark.parametrize("loss", SURROGATES)
def test_diagnostics_see_only_what_the_mask_keeps(loss: Loss) -> None:
    log_prob, old_log_prob, advantages = random_batch(6, spread=1.0)
    for keep in (log_prob.detach() - old_log_prob > 0.3, log_prob.detach() - old_log_prob < -0.3):
        masked = loss(log_prob, old_log_prob, advantages, mask=keep).diagnostics
        alone = loss(log_prob[keep], old_log_prob[keep], advantages[keep]).diagnostics
        th.testing.assert_close(tuple(masked), tuple(alone))


@pytest.mark.parametrize("loss", SURROGATES)
def test_diagnostics_of_an_empty_mask(loss: Loss) -> None:
    diagnostics = loss(*random_batch(7), mask=th.zeros(64)).diagnostics
    assert (diagnostics.ratio_min.item(), diagnostics.ratio_max.item()) == (1.0, 1.0)
    assert [value.item() for value in diagnostics[:6]] == [0.0] * 6


# Edges


@pytest.mark.parametrize("loss", SURROGATES)
def test_identical_policies(loss: Loss) -> None:
    _, log_prob, advantages = random_batch(8)
    log_prob.requires_grad_()
    result = loss(log_prob, log_prob.detach().clone(), advantages)
    assert th.equal(result.loss, -advantages)
    assert th.equal(th.autograd.grad(result.loss.sum(), log_prob)[0], -advantages)
    assert [value.item() for value in result.diagnostics] == [0.0] * 6 + [1.0, 1.0]


@pytest.mark.parametrize("loss", SURROGATES)
@pytest.mark.parametrize("size", [19.0, 21.0, 88.0, 100.0, 1e4])
def test_extreme_log_ratios_stay_finite(loss: Loss, size: float) -> None:
    log_prob = th.tensor([size, size, size, -size, -size, -size], requires_grad=True)
    advantages = th.tensor([5.0, 0.0, -5.0, 5.0, 0.0, -5.0])
    result = loss(log_prob, th.zeros(6), advantages)
    (gradient,) = th.autograd.grad(result.loss.sum(), log_prob)
    assert result.loss.isfinite().all()
    assert gradient.isfinite().all()
    assert all(value.isfinite() for value in result.diagnostics)


@pytest.mark.parametrize("loss", SURROGATES)
def test_log_ratio_bound_can_be_chosen(loss: Loss) -> None:
    log_prob = th.tensor([30.0], dtype=th.float64)
    for bound, exponent in ((10.0, 10.0), (20.0, 20.0), (None, 30.0)):
        ratio_max = loss(log_prob, th.zeros_like(log_prob), -log_prob, max_log_ratio=bound).diagnostics.ratio_max
        assert ratio_max.item() == pytest.approx(math.exp(exponent))


@pytest.mark.parametrize("loss", SURROGATES[:-1])  # of SPO, the penalty is everywhere
def test_constant_advantages(loss: Loss) -> None:
    log_prob, old_log_prob, _ = random_batch(9, spread=0.05)
    for advantage in (0.0, 1.0, -1.0):
        result = loss(log_prob, old_log_prob, th.full((64,), advantage))
        (gradient,) = th.autograd.grad(result.loss.sum(), log_prob)
        # Each ratio is within the range, so the gradient, -A r, is the loss itself.
        inside = (log_prob.detach() - old_log_prob).exp().sub(1).abs() < 0.2
        assert th.equal(gradient[inside], result.loss.detach()[inside])
        assert inside.any()


@pytest.mark.parametrize("loss", SURROGATES)
@pytest.mark.parametrize("position", [0, 1, 2])
def test_nan_inside_the_mask_is_not_hidden(loss: Loss, position: int) -> None:
    arguments = [th.tensor([-0.4, -0.7]), th.tensor([-0.5, -0.5]), th.tensor([1.0, -1.0])]
    arguments[position][1] = math.nan
    log_prob = arguments[0].requires_grad_()
    result = loss(*arguments, mask=th.ones(2))
    assert result.loss.isnan().tolist() == [False, True]
    if position == 2:  # the gradient with respect to a NaN log-probability is clamp's, 0
        assert th.autograd.grad(result.loss.sum(), log_prob)[0].isnan().tolist() == [False, True]


@given(
    ratio=st.floats(0.05, 20),
    advantage=st.floats(-10, 10),
    low=st.floats(0, 0.9),
    high=st.floats(0, 0.9),
    margin=st.floats(0.01, 5),
)
@settings(deadline=None, derandomize=True)
def test_clipping_orders_the_objectives(ratio: float, advantage: float, low: float, high: float, margin: float) -> None:
    # PPO's minimum never exceeds the surrogate; the dual clip only lifts it, to c A at least, where A < 0.
    ranges = {"clip_range": low, "clip_range_high": high}
    dual_clip = 1 + high + margin
    plain, slope = objective_and_gradient(surrogate_loss, ratio, advantage)
    clipped, clipped_slope = objective_and_gradient(clipped_surrogate_loss, ratio, advantage, **ranges)
    dual, dual_slope = objective_and_gradient(dual_clip_surrogate_loss, ratio, advantage, dual_clip=dual_clip, **ranges)
    assert clipped <= plain
    assert dual >= clipped
    assert dual >= min(dual_clip * advantage, 0.0) - 1e-12
    assert clipped_slope in (0.0, slope)
    assert dual_slope in (0.0, clipped_slope)
    if advantage >= 0:
        assert (dual, dual_slope) == (clipped, clipped_slope)
