"""The families and parameters of the distributions in SB3's and sb3-contrib's policies."""

from __future__ import annotations

import torch as th
from sb3_contrib.common.maskable import distributions as maskable
from sb3_contrib.common.maskable.policies import MaskableActorCriticPolicy
from stable_baselines3.common import distributions as sb3
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.preprocessing import get_action_dim

from sb3_ppo_ext.common.distributions import Bernoulli, Categorical, Family, Gaussian, family_of_space


def family_of_policy(policy: ActorCriticPolicy | MaskableActorCriticPolicy) -> Family | None:
    """
    The family of the distributions that a policy makes.

    :param policy: a policy of SB3, of sb3-contrib or of the user
    :return: the family; None if its distribution overrides formulas of SB3 or sb3-contrib, or derives from none of
        their classes
    """
    space, kind = policy.action_space, type(policy.action_dist)
    base = next((c for c in kind.__mro__ if c in _SB3_DISTRIBUTIONS), None)
    if (
        base is None
        or any(name in vars(policy.action_dist) for name in _FORMULAS)
        or any(name in vars(c) for c in kind.__mro__[: kind.__mro__.index(base)] for name in _FORMULAS)
    ):
        return None
    if base is maskable.MaskableBernoulliDistribution:  # it has two logits per bit: for 0 and for 1
        return Categorical((2,) * get_action_dim(space))
    squashes = base is sb3.SquashedDiagGaussianDistribution or getattr(policy.action_dist, "bijector", None) is not None
    family = family_of_space(space, squash_output=squashes)
    return family if isinstance(family, _SB3_DISTRIBUTIONS[base]) else None


_SB3_DISTRIBUTIONS: dict[type[sb3.Distribution], type[Family]] = {
    sb3.DiagGaussianDistribution: Gaussian,
    sb3.SquashedDiagGaussianDistribution: Gaussian,
    sb3.StateDependentNoiseDistribution: Gaussian,
    sb3.CategoricalDistribution: Categorical,
    sb3.MultiCategoricalDistribution: Categorical,
    sb3.BernoulliDistribution: Bernoulli,
    maskable.MaskableCategoricalDistribution: Categorical,
    maskable.MaskableBernoulliDistribution: Categorical,
    maskable.MaskableMultiCategoricalDistribution: Categorical,
}

# A derived class that overrides one of these is another distribution.
_FORMULAS = (
    "proba_distribution",
    "log_prob",
    "entropy",
    "sample",
    "get_actions",
    "actions_from_params",
    "log_prob_from_params",
    "get_std",
    "get_noise",
)


def params_of(distribution: sb3.Distribution) -> th.Tensor:
    """
    Parameters of a distribution object of SB3 or sb3-contrib, in the layout of its family.

    :param distribution: what ``policy.get_distribution(obs)`` returns
    :return: shape ``(batch, n_params)``, part of the same autograd graph
    :raises ValueError: for any other class
    """
    if isinstance(distribution, (sb3.DiagGaussianDistribution, sb3.StateDependentNoiseDistribution)):
        normal = distribution.distribution
        return th.cat((normal.mean, normal.stddev), dim=1)
    if isinstance(
        distribution,
        (sb3.CategoricalDistribution, sb3.BernoulliDistribution, maskable.MaskableCategoricalDistribution),
    ):
        return distribution.distribution.logits
    if isinstance(distribution, sb3.MultiCategoricalDistribution):
        return th.cat([categorical.logits for categorical in distribution.distribution], dim=1)
    if isinstance(distribution, maskable.MaskableMultiCategoricalDistribution):
        return th.cat([categorical.logits for categorical in distribution.distributions], dim=1)
    raise ValueError(
        f"distribution={type(distribution).__name__} is not supported where an exact KL divergence is needed: "
        "it must be one of the classes of stable_baselines3.common.distributions"
    )
