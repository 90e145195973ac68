"""Action distributions without state.

SB3's ``Distribution`` objects are mutable and a policy owns one of them, so two calls of ``get_distribution()`` return
the same object and the KL between "both" is zero. Here a distribution is a tensor of parameters, shape
``(batch, n_params)``, that can be stored in a rollout buffer, and a *family* is the set of formulas that read it.
All quantities are for the whole action: they are summed over its independent dimensions.

The formulas are written out, because ``torch.distributions`` builds objects that cost more than the arithmetic when
a batch has 64 rows. The tests compare them with ``torch.distributions``, SB3, sampling and enumeration.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch as th
from gymnasium import spaces
from stable_baselines3.common import distributions as sb3
from stable_baselines3.common.preprocessing import get_action_dim
from torch.nn import functional as F  # noqa: N812  (the name every torch user knows)

_HALF_LOG_2PI = 0.5 * math.log(2 * math.pi)


@dataclass(frozen=True)
class Family(ABC):
    """
    A family of action distributions. ``params`` of shape ``(batch, n_params)`` are the parameters of its members.

    Actions have the shape ``(batch, action_dim)``, as in SB3's rollout buffer, and any dtype.
    """

    @property
    @abstractmethod
    def n_params(self) -> int:
        """Number of parameters of one distribution."""

    @property
    @abstractmethod
    def action_dim(self) -> int:
        """Number of independent dimensions of the action."""

    @abstractmethod
    def noise(self, n: int, like: th.Tensor) -> th.Tensor:
        """
        The random numbers for :meth:`draw`. They are the same numbers that SB3 draws, in the same order, so that a seed
        gives the same actions as in SB3.

        :param n: number of actions
        :param like: a tensor with the dtype and device of the numbers
        :return: shape ``(n, n_numbers)``
        """

    @abstractmethod
    def draw(self, params: th.Tensor, noise: th.Tensor) -> th.Tensor:
        """
        Compute one action from each distribution, as a function of random numbers.

        :param params: shape ``(batch, n_params)``
        :param noise: from :meth:`noise`, shape ``(batch, n_numbers)``
        :return: actions, shape ``(batch, action_dim)``
        """

    def sample(self, params: th.Tensor) -> th.Tensor:
        """
        Draw one action from each distribution.

        :param params: shape ``(batch, n_params)``
        :return: actions, shape ``(batch, action_dim)``
        """
        return self.draw(params, self.noise(params.shape[0], params))

    def masked(self, params: th.Tensor, mask: th.Tensor) -> th.Tensor:
        """
        Mask the distributions: actions that are not allowed get probability 0 and gradient 0.

        :param params: shape ``(batch, n_params)``
        :param mask: True where a choice is allowed, shape ``(batch, n_choices)``; the choices of all action dimensions
            are concatenated
        :return: shape ``(batch, n_params)``
        """
        raise NotImplementedError("actions of a Box cannot be masked")

    @abstractmethod
    def mode(self, params: th.Tensor) -> th.Tensor:
        """
        The most likely action (of a squashed Gaussian, as in SB3: the squashed mean).

        :param params: shape ``(batch, n_params)``
        :return: actions, shape ``(batch, action_dim)``
        """

    @abstractmethod
    def log_prob(self, params: th.Tensor, actions: th.Tensor) -> th.Tensor:
        """
        Log-probability (density) of the whole action.

        :param params: shape ``(batch, n_params)``
        :param actions: shape ``(batch, action_dim)``
        :return: shape ``(batch,)``
        """

    @abstractmethod
    def entropy(self, params: th.Tensor) -> th.Tensor | None:
        """
        Entropy of the whole action, in nats; ``None`` where there is no closed form (squashed Gaussian).

        :param params: shape ``(batch, n_params)``
        :return: shape ``(batch,)``
        """

    def log_prob_and_entropy(self, params: th.Tensor, actions: th.Tensor) -> tuple[th.Tensor, th.Tensor | None]:
        """
        :meth:`log_prob` and :meth:`entropy`, of which a family may compute the common part once.

        :param params: shape ``(batch, n_params)``
        :param actions: shape ``(batch, action_dim)``
        :return: two tensors of shape ``(batch,)``
        """
        return self.log_prob(params, actions), self.entropy(params)

    @abstractmethod
    def kl(self, params: th.Tensor, other: th.Tensor) -> th.Tensor:
        """
        Exact KL divergence KL(params || other) of the whole action: the sum over its independent dimensions.

        :param params: shape ``(batch, n_params)``; the distribution of the expectation, usually the old policy
        :param other: shape ``(batch, n_params)``
        :return: shape ``(batch,)``, in nats
        """

    @abstractmethod
    def fisher(self, params: th.Tensor, tangent: th.Tensor) -> th.Tensor:
        """
        Fisher information with respect to ``params``, times a vector: ``M(params) @ tangent`` for each row. It is the
        second derivative of ``kl(params, other)`` in ``other`` at ``other = params``.

        :param params: shape ``(batch, n_params)``
        :param tangent: shape ``(batch, n_params)``
        :return: shape ``(batch, n_params)``
        """


@dataclass(frozen=True)
class Gaussian(Family):
    """
    Diagonal Gaussian; ``params`` are the mean, then the standard deviation. It is also the family of gSDE: given the
    features, its actions are Gaussian with a standard deviation that depends on the state.

    :param dim: number of action dimensions
    """

    dim: int

    @property
    def n_params(self) -> int:
        return 2 * self.dim

    @property
    def action_dim(self) -> int:
        return self.dim

    def noise(self, n: int, like: th.Tensor) -> th.Tensor:
        return like.new_empty((n, self.dim)).normal_()

    def draw(self, params: th.Tensor, noise: th.Tensor) -> th.Tensor:
        mean, std = params.chunk(2, dim=1)
        return mean + noise * std

    def mode(self, params: th.Tensor) -> th.Tensor:
        return params[:, : self.dim]

    def log_prob(self, params: th.Tensor, actions: th.Tensor) -> th.Tensor:
        mean, std = params.chunk(2, dim=1)
        z = (actions - mean) / std
        return (-0.5 * z * z - std.log()).sum(dim=1) - self.dim * _HALF_LOG_2PI

    def entropy(self, params: th.Tensor) -> th.Tensor | None:
        return params[:, self.dim :].log().sum(dim=1) + self.dim * (0.5 + _HALF_LOG_2PI)

    def log_prob_and_entropy_by_log_std(
        self, mean: th.Tensor, log_std: th.Tensor, actions: th.Tensor
    ) -> tuple[th.Tensor, th.Tensor]:
        """
        :meth:`log_prob` and :meth:`entropy` in half as many operations, if all rows have the same standard deviation.

        :param mean: shape ``(batch, dim)``
        :param log_std: shape ``(dim,)``
        :param actions: shape ``(batch, dim)``
        :return: two tensors of shape ``(batch,)``
        """
        z = (actions - mean) * (-log_std).exp()
        log_volume = log_std.sum() + self.dim * _HALF_LOG_2PI
        return -0.5 * z.square().sum(dim=1) - log_volume, (log_volume + 0.5 * self.dim).expand(mean.shape[0])

    def kl(self, params: th.Tensor, other: th.Tensor) -> th.Tensor:
        mean, std = params.chunk(2, dim=1)
        other_mean, other_std = other.chunk(2, dim=1)
        variance_ratio = (std / other_std).square()
        z = (mean - other_mean) / other_std
        return 0.5 * (variance_ratio + z * z - 1.0 - variance_ratio.log()).sum(dim=1)

    def fisher(self, params: th.Tensor, tangent: th.Tensor) -> th.Tensor:
        mean_tangent, std_tangent = tangent.chunk(2, dim=1)
        precision = params[:, self.dim :].pow(-2)
        return th.cat((precision * mean_tangent, 2.0 * precision * std_tangent), dim=1)


@dataclass(frozen=True)
class SquashedGaussian(Gaussian):
    """
    ``tanh`` of a diagonal Gaussian; ``params`` are those of the Gaussian. KL and Fisher information are the Gaussian's,
    because a bijection of the action changes neither. As in SB3, an action within float precision of +-1 is moved
    inside before ``tanh`` is inverted, and 1e-6 keeps the logarithm of the Jacobian finite.
    """

    def draw(self, params: th.Tensor, noise: th.Tensor) -> th.Tensor:
        return super().draw(params, noise).tanh()

    def mode(self, params: th.Tensor) -> th.Tensor:
        return super().mode(params).tanh()

    def log_prob(self, params: th.Tensor, actions: th.Tensor) -> th.Tensor:
        gaussian_actions = sb3.TanhBijector.inverse(actions)
        correction = (1.0 - gaussian_actions.tanh().square() + 1e-6).log().sum(dim=1)
        return super().log_prob(params, gaussian_actions) - correction

    def entropy(self, params: th.Tensor) -> th.Tensor | None:
        return None


class _Discrete(Family):
    """
    Independent variables with finitely many choices each. A logit of minus infinity forbids a choice: its probability
    and its gradient are exactly 0, and it adds nothing to the entropy (0 log 0 = 0). The KL divergence is infinite if
    ``other`` forbids a choice that ``params`` allow.
    """

    @abstractmethod
    def _log_probs(self, params: th.Tensor) -> th.Tensor:
        """Log-probabilities of all choices of all variables, one row per distribution."""

    def entropy(self, params: th.Tensor) -> th.Tensor | None:
        return self._entropy_by(self._log_probs(params))

    def _entropy_by(self, log_probs: th.Tensor) -> th.Tensor:
        """The entropy, from the log-probabilities of all choices."""
        # 0 times infinity would be NaN, 0 times the lowest finite number is 0; so it is in the gradient.
        return -(log_probs.exp() * log_probs.clamp(min=th.finfo(log_probs.dtype).min)).sum(dim=1)

    def kl(self, params: th.Tensor, other: th.Tensor) -> th.Tensor:
        log_probs = self._log_probs(params)
        probs = log_probs.exp()
        # Fill before the product: if filled afterwards, the gradient would be 0 times infinity.
        log_ratios = (log_probs - self._log_probs(other)).masked_fill(probs == 0.0, 0.0)
        return (probs * log_ratios).sum(dim=1)


@dataclass(frozen=True)
class Categorical(_Discrete):
    """
    Independent categorical variables (a single one for ``Discrete``); ``params`` are the concatenated logits of all of
    them, not normalised.

    :param sizes: number of choices of each variable
    """

    sizes: tuple[int, ...]

    @property
    def n_params(self) -> int:
        return sum(self.sizes)

    @property
    def action_dim(self) -> int:
        return len(self.sizes)

    def masked(self, params: th.Tensor, mask: th.Tensor) -> th.Tensor:
        return params.masked_fill(~mask, -math.inf)

    def _split(self, params: th.Tensor) -> tuple[th.Tensor, ...]:
        return (params,) if len(self.sizes) == 1 else th.split(params, list(self.sizes), dim=1)

    def _log_probs(self, params: th.Tensor) -> th.Tensor:
        if len(self.sizes) == 1:
            return params.log_softmax(dim=1)
        return th.cat([logits.log_softmax(dim=1) for logits in self._split(params)], dim=1)

    def noise(self, n: int, like: th.Tensor) -> th.Tensor:
        draws = [like.new_empty((n, size)).exponential_() for size in self.sizes]
        return draws[0] if len(draws) == 1 else th.cat(draws, dim=1)

    def draw(self, params: th.Tensor, noise: th.Tensor) -> th.Tensor:
        # An exponential race: of exponential clocks with rates p, choice i rings first with probability p_i. This is
        # how torch.multinomial draws, without its check that the inputs are probabilities. Categorical(logits=...), as
        # SB3 uses it, subtracts the logsumexp first; so does this code, so that the draws agree to the bit.
        draws = [
            ((logits - logits.logsumexp(dim=1, keepdim=True)).softmax(dim=1) / clocks).argmax(dim=1, keepdim=True)
            for logits, clocks in zip(self._split(params), self._split(noise), strict=True)
        ]
        return draws[0] if len(draws) == 1 else th.cat(draws, dim=1)

    def mode(self, params: th.Tensor) -> th.Tensor:
        return th.stack([logits.argmax(dim=1) for logits in self._split(params)], dim=1)

    def log_prob(self, params: th.Tensor, actions: th.Tensor) -> th.Tensor:
        return self._log_prob_by(self._log_probs(params), actions)

    def log_prob_and_entropy(self, params: th.Tensor, actions: th.Tensor) -> tuple[th.Tensor, th.Tensor | None]:
        log_probs = self._log_probs(params)
        return self._log_prob_by(log_probs, actions), self._entropy_by(log_probs)

    def _log_prob_by(self, log_probs: th.Tensor, actions: th.Tensor) -> th.Tensor:
        """The log-probability of the whole action, from those of all choices."""
        index = actions.long()
        chosen = [of_one.gather(1, index[:, i : i + 1]) for i, of_one in enumerate(self._split(log_probs))]
        return (chosen[0] if len(chosen) == 1 else th.cat(chosen, dim=1).sum(dim=1, keepdim=True)).squeeze(1)

    def fisher(self, params: th.Tensor, tangent: th.Tensor) -> th.Tensor:
        products = []
        for logits, u in zip(self._split(params), self._split(tangent), strict=True):
            probs = logits.softmax(dim=1)
            products.append(probs * (u - (probs * u).sum(dim=1, keepdim=True)))
        return th.cat(products, dim=1)


@dataclass(frozen=True)
class Bernoulli(_Discrete):
    """
    Independent binary variables; ``params`` are the logits of 1, so a logit of plus infinity forbids 0.

    :param dim: number of binary variables
    """

    dim: int

    @property
    def n_params(self) -> int:
        return self.dim

    @property
    def action_dim(self) -> int:
        return self.dim

    def masked(self, params: th.Tensor, mask: th.Tensor) -> th.Tensor:
        zero, one = mask.view(-1, self.dim, 2).unbind(dim=2)
        return params.masked_fill(~zero, math.inf).masked_fill(~one, -math.inf)

    def noise(self, n: int, like: th.Tensor) -> th.Tensor:
        return like.new_empty((n, self.dim)).uniform_()

    def draw(self, params: th.Tensor, noise: th.Tensor) -> th.Tensor:
        return (noise < params.sigmoid()).to(params.dtype)  # as torch.bernoulli on the CPU

    def mode(self, params: th.Tensor) -> th.Tensor:
        return params.sigmoid().round()

    def _log_probs(self, params: th.Tensor) -> th.Tensor:
        return F.logsigmoid(th.cat((params, -params), dim=1))  # of 1, then of 0

    def log_prob(self, params: th.Tensor, actions: th.Tensor) -> th.Tensor:
        return F.logsigmoid(params * (2.0 * actions - 1.0)).sum(dim=1)

    def fisher(self, params: th.Tensor, tangent: th.Tensor) -> th.Tensor:
        probs = params.sigmoid()
        return probs * (1.0 - probs) * tangent


def family_of_space(action_space: spaces.Space[Any], *, squash_output: bool = False) -> Family:
    """
    The family that SB3's policies use for an action space.

    :param action_space: Box, Discrete, MultiDiscrete or MultiBinary
    :param squash_output: whether a Box action is squashed by ``tanh`` (gSDE only)
    :return: the family
    :raises ValueError: for any other space, and for MultiBinary of more than one axis
    """
    if isinstance(action_space, spaces.Box):
        return (SquashedGaussian if squash_output else Gaussian)(get_action_dim(action_space))
    if isinstance(action_space, spaces.Discrete):
        return Categorical((int(action_space.n),))
    if isinstance(action_space, spaces.MultiDiscrete) and action_space.nvec.ndim == 1:
        return Categorical(tuple(int(n) for n in action_space.nvec))
    if isinstance(action_space, spaces.MultiBinary) and isinstance(action_space.n, int):
        return Bernoulli(action_space.n)
    raise ValueError(
        f"action_space={action_space} is not supported: it must be Box, Discrete, "
        "MultiDiscrete of one axis or MultiBinary of one axis"
    )
