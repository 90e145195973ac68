"""
Choices that an infinite logit forbids, against ``torch.distributions`` and the families themselves without them.

What is forbidden is taken out of the support: a categorical variable has fewer choices, a binary one is no variable.
"""

from __future__ import annotations

import itertools
import math
from typing import NamedTuple

import pytest
import torch as th
from stable_baselines3.common import distributions as sb3

from sb3_ppo_ext.common.distributions import Bernoulli, Categorical, Family
from sb3_ppo_ext.common.policy_distributions import params_of

BATCH = 5
LEAST = th.finfo(th.float64).min


class Case(NamedTuple):
    family: Family
    forbidden: dict[int, float]  # by logit
    without: Family

    @property
    def keep(self) -> list[int]:
        return [i for i in range(self.family.n_params) if i not in self.forbidden]


CASES = {
    "one of four": Case(Categorical((4,)), {1: -math.inf}, Categorical((3,))),
    "all but one": Case(Categorical((3,)), {0: -math.inf, 2: -math.inf}, Categorical((1,))),
    "several variables": Case(Categorical((3, 2, 4)), dict.fromkeys((0, 3, 6, 7), -math.inf), Categorical((2, 1, 2))),
    "a one": Case(Bernoulli(3), {1: -math.inf}, Bernoulli(2)),
    "a zero": Case(Bernoulli(3), {2: math.inf}, Bernoulli(2)),
    "a one and a zero": Case(Bernoulli(4), {0: math.inf, 3: -math.inf}, Bernoulli(2)),
    "by a large number": Case(Categorical((4,)), {1: -1e8}, Categorical((3,))),
    "by the smallest number": Case(Categorical((4,)), {0: LEAST, 1: LEAST}, Categorical((2,))),
    "a one by a large number": Case(Bernoulli(3), {1: -1e8}, Bernoulli(2)),
    "a zero by the largest number": Case(Bernoulli(3), {1: -LEAST}, Bernoulli(2)),
}
cases = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def params_of_case(case: Case, seed: int) -> th.Tensor:
    params = th.randn(BATCH, case.family.n_params, generator=th.Generator().manual_seed(seed), dtype=th.float64)
    for index, logit in case.forbidden.items():
        params[:, index] = logit
    return params.requires_grad_()


def without(case: Case, params: th.Tensor) -> th.Tensor:
    return params.detach()[:, case.keep].clone().requires_grad_()


def allowed_actions(case: Case) -> list[tuple[int, ...]]:
    """Every allowed action, in the order of :func:`allowed_actions_without`."""
    if isinstance(case.family, Categorical):
        starts = list(itertools.accumulate(case.family.sizes, initial=0))
        choices = [
            [i for i in range(size) if start + i not in case.forbidden]
            for start, size in zip(starts[:-1], case.family.sizes, strict=True)
        ]
    else:
        certain = {index: [int(logit > 0)] for index, logit in case.forbidden.items()}
        choices = [certain.get(i, [0, 1]) for i in range(case.family.action_dim)]
    return list(itertools.product(*choices))


def allowed_actions_without(case: Case) -> list[tuple[int, ...]]:
    sizes = case.without.sizes if isinstance(case.without, Categorical) else (2,) * case.without.action_dim
    return list(itertools.product(*(range(size) for size in sizes)))


def reference(family: Family, params: th.Tensor) -> list[th.distributions.Distribution]:
    """One object of torch's for each variable."""
    if isinstance(family, Categorical):
        return [th.distributions.Categorical(logits=part) for part in params.split(list(family.sizes), dim=1)]
    return [th.distributions.Bernoulli(logits=part) for part in params.unbind(dim=1)]


def joint(parts: list[th.Tensor]) -> th.Tensor:
    return th.stack(parts).sum(dim=0)


def check_gradient(case: Case, found: th.Tensor, expected: th.Tensor) -> None:
    """Of what is allowed, as expected; of what is forbidden, exactly nothing."""
    th.testing.assert_close(found[:, case.keep], expected, atol=1e-12, rtol=1e-9)
    assert (found[:, list(case.forbidden)] == 0.0).all()


@cases
def test_entropy(case: Case) -> None:
    params = params_of_case(case, 1)
    fewer = without(case, params)
    entropy = case.family.entropy(params)
    assert entropy is not None
    expected = joint([part.entropy() for part in reference(case.without, fewer)])
    th.testing.assert_close(entropy, expected)
    check_gradient(case, th.autograd.grad(entropy.sum(), params)[0], th.autograd.grad(expected.sum(), fewer)[0])


@cases
def test_kl(case: Case) -> None:
    """Where both forbid the same; by both of its arguments."""
    params, other = params_of_case(case, 1), params_of_case(case, 2)
    fewer, other_fewer = without(case, params), without(case, other)
    kl = case.family.kl(params, other)
    pairs = zip(reference(case.without, fewer), reference(case.without, other_fewer), strict=True)
    expected = joint([th.distributions.kl_divergence(p, q) for p, q in pairs])
    th.testing.assert_close(kl, expected)
    found = th.autograd.grad(kl.sum(), (params, other))
    for gradient, wanted in zip(found, th.autograd.grad(expected.sum(), (fewer, other_fewer)), strict=True):
        check_gradient(case, gradient, wanted)
    assert th.equal(case.family.kl(params, params), th.zeros(BATCH, dtype=th.float64))


@cases
def test_log_prob(case: Case) -> None:
    params = params_of_case(case, 1)
    fewer = without(case, params)
    for action, action_without in zip(allowed_actions(case), allowed_actions_without(case), strict=True):
        log_prob = case.family.log_prob(params, th.tensor(action).expand(BATCH, -1))
        expected = case.without.log_prob(fewer, th.tensor(action_without).expand(BATCH, -1))
        th.testing.assert_close(log_prob, expected)
        found, wanted = th.autograd.grad(log_prob.sum(), params)[0], th.autograd.grad(expected.sum(), fewer)[0]
        check_gradient(case, found, wanted)


@cases
def test_fisher_is_the_expectation_of_the_scores_outer_product(case: Case) -> None:
    params = params_of_case(case, 3)
    n = case.family.n_params
    expected = th.zeros(BATCH, n, n, dtype=th.float64)
    for action in allowed_actions(case):
        log_prob = case.family.log_prob(params, th.tensor(action).expand(BATCH, -1))
        (score,) = th.autograd.grad(log_prob.sum(), params)
        expected += log_prob.detach().exp()[:, None, None] * score[:, :, None] * score[:, None, :]
    columns = [case.family.fisher(params.detach(), row.expand(BATCH, -1)) for row in th.eye(n, dtype=th.float64)]
    found = th.stack(columns, dim=2)
    th.testing.assert_close(found, expected)
    assert (found[:, list(case.forbidden)] == 0.0).all()
    assert (found[:, :, list(case.forbidden)] == 0.0).all()


@pytest.mark.parametrize(
    ("family", "index", "logit"),
    [(Categorical((4,)), 1, -math.inf), (Categorical((2, 3)), 4, -math.inf), (Bernoulli(2), 0, -math.inf),
     (Bernoulli(2), 0, math.inf)],
)  # fmt: skip
def test_kl_where_only_one_forbids(family: Family, index: int, logit: float) -> None:
    """Of what the other forbids it is infinite; of what the other allows it is the sum over what is allowed."""
    params = th.randn(BATCH, family.n_params, generator=th.Generator().manual_seed(0), dtype=th.float64)
    narrow = params.clone()
    narrow[:, index] = logit
    assert (family.kl(params, narrow) == math.inf).all()

    wide = (params + 0.3).requires_grad_()
    kl = family.kl(narrow, wide)
    expected = th.zeros(BATCH, dtype=th.float64)
    sizes = family.sizes if isinstance(family, Categorical) else (2,) * family.action_dim
    for action in itertools.product(*(range(size) for size in sizes)):
        actions = th.tensor(action).expand(BATCH, -1)
        log_p, log_q = family.log_prob(narrow, actions), family.log_prob(wide, actions)
        expected = expected + th.where(log_p == -math.inf, 0.0, log_p.exp() * (log_p - log_q).nan_to_num())
    th.testing.assert_close(kl, expected)
    assert th.autograd.gradcheck(lambda q: family.kl(narrow, q), (wide,))


def test_entropy_of_what_one_logit_decides_is_exact() -> None:
    """log 3 where three of four are allowed alike; nothing where all are decided."""
    logits = th.tensor([[0.5, -math.inf, 0.5, 0.5]])
    found = Categorical((4,)).entropy(logits)
    assert found is not None
    assert found.item() == pytest.approx(math.log(3))
    certain = Bernoulli(2).entropy(th.tensor([[math.inf, -math.inf]]))
    assert certain is not None
    assert certain.item() == 0.0


@cases
def test_what_is_forbidden_is_never_drawn(case: Case) -> None:
    params = params_of_case(case, 4).detach()[:1].expand(2000, -1).float()
    th.manual_seed(0)
    drawn = set(map(tuple, case.family.sample(params).int().tolist()))
    assert drawn <= set(allowed_actions(case))
    assert set(map(tuple, case.family.mode(params).int().tolist())) <= set(allowed_actions(case))


@pytest.mark.parametrize("logit", [-math.inf, -1e8, th.finfo(th.float32).min])
def test_draws_are_those_of_sb3(logit: float) -> None:
    params = th.randn(200, 9, generator=th.Generator().manual_seed(0))
    params[:, [0, 4, 8]] = logit
    both: list[tuple[Family, sb3.Distribution]] = [
        (Categorical((9,)), sb3.CategoricalDistribution(9).proba_distribution(params)),
        (Categorical((3, 2, 4)), sb3.MultiCategoricalDistribution([3, 2, 4]).proba_distribution(params)),
        (Bernoulli(9), sb3.BernoulliDistribution(9).proba_distribution(params)),
    ]
    for family, theirs in both:
        th.manual_seed(1)
        expected = theirs.sample()
        th.manual_seed(1)
        assert th.equal(family.sample(params).flatten().float(), expected.flatten().float())
        assert th.equal(family.mode(params).flatten().float(), theirs.mode().flatten().float())


@pytest.mark.parametrize("name", ["one of four", "several variables", "a one", "a zero"])
def test_what_sb3s_objects_hold_is_as_good(name: str) -> None:
    """SB3's categorical objects hold logits that are normalised."""
    case = CASES[name]
    params = params_of_case(case, 1).detach().float().requires_grad_()
    other = params_of_case(case, 2).detach().float()
    family = case.family
    if isinstance(family, Bernoulli):
        theirs: sb3.Distribution = sb3.BernoulliDistribution(family.dim).proba_distribution(params)
    elif len(family.sizes) == 1:
        theirs = sb3.CategoricalDistribution(family.sizes[0]).proba_distribution(params)
    else:
        theirs = sb3.MultiCategoricalDistribution(list(family.sizes)).proba_distribution(params)
    extracted = params_of(theirs)
    for quantity in (family.entropy, lambda p: family.kl(p, other), lambda p: family.kl(other, p)):
        found, expected = quantity(extracted), quantity(params)
        assert found is not None
        assert expected is not None
        th.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)
        (of_theirs,) = th.autograd.grad(found.sum(), params, retain_graph=True)
        (of_ours,) = th.autograd.grad(expected.sum(), params)
        th.testing.assert_close(of_theirs, of_ours, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("family", [Categorical((3,)), Categorical((2, 2)), Bernoulli(2)], ids=str)
def test_a_logit_that_is_not_a_number_is_not_hidden(family: Family) -> None:
    params = th.zeros(1, family.n_params)
    spoilt = params.clone()
    spoilt[0, 0] = math.nan
    entropy = family.entropy(spoilt)
    assert entropy is not None
    assert entropy.isnan().all()
    assert family.kl(spoilt, params).isnan().all()
    assert family.kl(params, spoilt).isnan().all()


@pytest.mark.parametrize("dtype", [th.bool, th.uint8, th.int8, th.int64, th.float32])
def test_binary_actions_of_any_type(dtype: th.dtype) -> None:
    actions = th.tensor([[0, 1], [1, 1]])
    params = th.tensor([[0.5, -2.0], [1.0, 3.0]])
    expected = th.distributions.Bernoulli(logits=params).log_prob(actions.float()).sum(dim=1)
    th.testing.assert_close(Bernoulli(2).log_prob(params, actions.to(dtype)), expected)


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
def test_compiled() -> None:
    """What a compiler makes of them differs in the last bits at most."""
    case, binary = CASES["several variables"], CASES["a one and a zero"]
    inputs = [params_of_case(c, seed).detach().float().requires_grad_() for c in (case, binary) for seed in (1, 2)]
    actions = [th.tensor(allowed_actions(c)[:1]).expand(BATCH, -1).float() for c in (case, binary)]

    def total(p: th.Tensor, q: th.Tensor, binary_p: th.Tensor, binary_q: th.Tensor) -> th.Tensor:
        parts = []
        for family, one, other, action in (
            (case.family, p, q, actions[0]),
            (binary.family, binary_p, binary_q, actions[1]),
        ):
            entropy = family.entropy(one)
            assert entropy is not None
            parts += [entropy, 3.0 * family.kl(one, other), 5.0 * family.log_prob(other, action)]
        return th.stack(parts)

    expected = total(*inputs)
    found = th.compile(total, backend="aot_eager_decomp_partition")(*inputs)  # all but the code generation
    th.testing.assert_close(found, expected)
    of_found, of_expected = (th.autograd.grad(result.sum(), inputs) for result in (found, expected))
    th.testing.assert_close(of_found, of_expected)
