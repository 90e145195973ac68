"""The stateless families against SB3's distributions, torch.distributions, sampling and enumeration."""

import itertools
import math

import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common import distributions as sb3

from sb3_ppo_ext.common.distributions import Bernoulli, Categorical, Family, Gaussian, SquashedGaussian, family_of_space
from sb3_ppo_ext.common.policy_distributions import params_of

BATCH = 7
DISCRETE: list[Family] = [Categorical((4,)), Categorical((3, 2, 4)), Bernoulli(3)]
CONTINUOUS: list[Family] = [Gaussian(3), SquashedGaussian(3)]


def random_params(family: Family, seed: int = 0, batch: int = BATCH) -> th.Tensor:
    generator = th.Generator().manual_seed(seed)
    params = th.randn(batch, family.n_params, generator=generator)
    if isinstance(family, Gaussian):
        params[:, family.dim :] = (0.5 * params[:, family.dim :]).exp()
    return params


def sb3_distribution(family: Family, params: th.Tensor) -> sb3.Distribution:
    """SB3's object for the same parameters."""
    if isinstance(family, Gaussian):
        mean, std = params.chunk(2, dim=1)
        if isinstance(family, SquashedGaussian):
            return sb3.SquashedDiagGaussianDistribution(family.dim).proba_distribution(mean, std.log())
        return sb3.DiagGaussianDistribution(family.dim).proba_distribution(mean, std.log())
    if isinstance(family, Categorical):
        if len(family.sizes) == 1:
            return sb3.CategoricalDistribution(family.sizes[0]).proba_distribution(params)
        return sb3.MultiCategoricalDistribution(list(family.sizes)).proba_distribution(params)
    assert isinstance(family, Bernoulli)
    return sb3.BernoulliDistribution(family.dim).proba_distribution(params)


def all_actions(family: Family) -> th.Tensor:
    """Every action of a discrete family, one a row."""
    sizes = family.sizes if isinstance(family, Categorical) else (2,) * family.action_dim
    return th.tensor(list(itertools.product(*(range(n) for n in sizes))))


@pytest.mark.parametrize("family", DISCRETE + CONTINUOUS, ids=str)
def test_agrees_with_sb3(family: Family) -> None:
    params = random_params(family)
    reference = sb3_distribution(family, params)
    th.manual_seed(1)
    expected_actions = reference.sample()
    th.manual_seed(1)
    actions = family.sample(params)
    assert th.equal(actions.float().flatten(), expected_actions.float().flatten())  # the same draws, to the bit
    assert actions.shape == (BATCH, family.action_dim)
    th.testing.assert_close(family.log_prob(params, actions.float()), reference.log_prob(expected_actions))
    expected_entropy = reference.entropy()
    entropy = family.entropy(params)
    if expected_entropy is None:
        assert entropy is None
    else:
        assert entropy is not None
        th.testing.assert_close(entropy, expected_entropy)
    th.testing.assert_close(family.mode(params).float().flatten(), reference.mode().float().flatten())


@pytest.mark.parametrize("squash_output", [False, True])
@pytest.mark.parametrize("full_std", [False, True])
def test_gsde_agrees_with_sb3(squash_output: bool, full_std: bool) -> None:
    dist = sb3.StateDependentNoiseDistribution(3, full_std=full_std, squash_output=squash_output)
    _, log_std = dist.proba_distribution_net(latent_dim=5, log_std_init=-0.5)
    features, mean = th.randn(BATCH, 5), th.randn(BATCH, 3)
    dist.proba_distribution(mean, log_std, features)
    family = family_of_space(spaces.Box(-1, 1, (3,)), squash_output=squash_output)
    actions = dist.sample()
    params = params_of(dist)
    th.testing.assert_close(family.log_prob(params, actions), dist.log_prob(actions))
    expected_entropy = dist.entropy()
    entropy = family.entropy(params)
    if expected_entropy is None:
        assert entropy is None
    else:
        assert entropy is not None
        th.testing.assert_close(entropy, expected_entropy)
    th.testing.assert_close(family.mode(params), dist.mode())


@pytest.mark.parametrize("family", [f for f in DISCRETE + CONTINUOUS if not isinstance(f, SquashedGaussian)], ids=str)
def test_params_of_an_sb3_distribution_describe_it(family: Family) -> None:
    params = random_params(family)
    extracted = params_of(sb3_distribution(family, params))
    actions = family.sample(params).float()
    th.testing.assert_close(family.log_prob(extracted, actions), family.log_prob(params, actions))
    th.testing.assert_close(family.kl(params, extracted), th.zeros(BATCH), atol=1e-6, rtol=0)


@pytest.mark.parametrize("family", DISCRETE, ids=str)
def test_discrete_by_enumeration(family: Family) -> None:
    p, q = random_params(family, 1).double(), random_params(family, 2).double()
    actions = all_actions(family)
    log_p = th.stack([family.log_prob(p, a.expand(BATCH, -1)) for a in actions])
    log_q = th.stack([family.log_prob(q, a.expand(BATCH, -1)) for a in actions])
    th.testing.assert_close(log_p.exp().sum(0), th.ones(BATCH, dtype=th.float64))
    th.testing.assert_close(family.kl(p, q), (log_p.exp() * (log_p - log_q)).sum(0))
    th.testing.assert_close(family.entropy(p), -(log_p.exp() * log_p).sum(0))


def test_gaussian_kl_against_a_literal() -> None:
    # In one dimension, KL(N(0, 1) || N(1, 2)) = log 2 + (1 + 1) / 8 - 1/2; the dimensions add up.
    p = th.tensor([[0.0, 0.0, 1.0, 1.0]])
    q = th.tensor([[1.0, 0.0, 2.0, 1.0]])
    assert Gaussian(2).kl(p, q).item() == pytest.approx(math.log(2) + 0.25 - 0.5)


@pytest.mark.parametrize("family", CONTINUOUS, ids=str)
def test_continuous_kl_by_sampling(family: Family) -> None:
    """The mean of log p - log q over draws from p, within four standard errors."""
    p, q = random_params(family, 1, batch=1).double(), random_params(family, 2, batch=1).double()
    n = 200_000
    th.manual_seed(0)
    many_p, many_q = p.expand(n, -1), q.expand(n, -1)
    if isinstance(family, SquashedGaussian):  # float64 draws: none is so close to 1 that it has to be moved
        assert (family.sample(many_p).abs() < 1).all()
    actions = family.sample(many_p)
    log_ratio = family.log_prob(many_p, actions) - family.log_prob(many_q, actions)
    standard_error = log_ratio.std() / math.sqrt(n)
    assert abs(log_ratio.mean() - family.kl(p, q)).item() < 4 * standard_error


def test_squashed_density_integrates_to_one() -> None:
    family = SquashedGaussian(1)
    params = th.tensor([[0.3, 0.5]], dtype=th.float64)
    grid = th.linspace(-1, 1, 20_001, dtype=th.float64)[1:-1, None]
    density = family.log_prob(params.expand(len(grid), -1), grid).exp()
    assert th.trapezoid(density, grid[:, 0]).item() == pytest.approx(1.0, abs=1e-4)


@pytest.mark.parametrize("family", DISCRETE + CONTINUOUS, ids=str)
def test_kl_is_zero_at_itself_and_positive_elsewhere(family: Family) -> None:
    p, q = random_params(family, 1), random_params(family, 2)
    assert th.equal(family.kl(p, p), th.zeros(BATCH))
    assert (family.kl(p, q) > 0).all()


@pytest.mark.parametrize("family", DISCRETE + CONTINUOUS, ids=str)
def test_fisher_is_the_second_derivative_of_kl(family: Family) -> None:
    """By central differences: d^2/de^2 KL(p || p + e u) at e = 0 is u' M u."""
    p = random_params(family, 3).double()
    u = th.randn(BATCH, family.n_params, dtype=th.float64)
    e = 1e-4
    second = (family.kl(p, p + e * u) - 2 * family.kl(p, p) + family.kl(p, p - e * u)) / e**2
    th.testing.assert_close((u * family.fisher(p, u)).sum(1), second, atol=1e-4, rtol=1e-4)
    v = th.randn_like(u)  # symmetric
    th.testing.assert_close((v * family.fisher(p, u)).sum(1), (u * family.fisher(p, v)).sum(1))


def test_extreme_parameters_stay_finite() -> None:
    logits = th.tensor([[100.0, -100.0, 0.0]])
    for family in (Categorical((3,)), Bernoulli(3)):
        entropy = family.entropy(logits)
        assert entropy is not None
        assert entropy.isfinite().all()
        assert family.kl(logits, -logits).isfinite().all()
    squashed = SquashedGaussian(1)
    edge = th.tensor([[1.0], [-1.0]])
    assert squashed.log_prob(th.tensor([[0.0, 1.0]]).expand(2, -1), edge).isfinite().all()


def test_families_of_spaces() -> None:
    assert family_of_space(spaces.Box(-1, 1, (2, 3))) == Gaussian(6)
    assert family_of_space(spaces.Box(-1, 1, (2,)), squash_output=True) == SquashedGaussian(2)
    assert family_of_space(spaces.Discrete(5)) == Categorical((5,))
    assert family_of_space(spaces.MultiDiscrete([2, 3])) == Categorical((2, 3))
    assert family_of_space(spaces.MultiBinary(4)) == Bernoulli(4)
    with pytest.raises(ValueError, match="action_space=MultiBinary"):
        family_of_space(spaces.MultiBinary([2, 2]))


def test_one_standard_deviation_for_all_rows_is_a_special_case() -> None:
    th.manual_seed(0)
    mean = th.randn(5, 3, dtype=th.float64)
    actions = th.randn(5, 3, dtype=th.float64)
    log_std = th.tensor([-1.0, 0.3, 2.0], dtype=th.float64)
    family = Gaussian(3)
    log_prob, entropy = family.log_prob_and_entropy_by_log_std(mean, log_std, actions)
    normal = th.distributions.Independent(th.distributions.Normal(mean, log_std.exp().expand_as(mean)), 1)
    th.testing.assert_close(log_prob, normal.log_prob(actions), atol=1e-12, rtol=0.0)
    th.testing.assert_close(entropy, normal.entropy(), atol=1e-12, rtol=0.0)


@pytest.mark.parametrize(
    ("family", "is_masked"), [*((family, False) for family in DISCRETE + CONTINUOUS), *((f, True) for f in DISCRETE)]
)
def test_log_prob_and_entropy_in_one_are_the_two(family: Family, is_masked: bool) -> None:
    params = random_params(family).double()
    mask = None
    if is_masked:
        sizes = family.sizes if isinstance(family, Categorical) else (2,) * family.action_dim
        mask = th.cat([th.arange(size) != 1 for size in sizes]).expand(BATCH, -1)
    actions = family.sample(params if mask is None else family.masked(params, mask))
    weights = th.linspace(-1.0, 2.0, BATCH, dtype=th.float64)

    def objective_and_gradient(in_one: bool) -> tuple[th.Tensor, ...]:
        leaf = params.clone().requires_grad_()
        of = leaf if mask is None else family.masked(leaf, mask)
        if in_one:
            log_prob, entropy = family.log_prob_and_entropy(of, actions)
        else:
            log_prob, entropy = family.log_prob(of, actions), family.entropy(of)
        objective = (weights * (log_prob if entropy is None else log_prob + 0.3 * entropy)).sum()
        return objective.detach(), *th.autograd.grad(objective, leaf)

    th.testing.assert_close(objective_and_gradient(True), objective_and_gradient(False), atol=1e-12, rtol=0.0)
