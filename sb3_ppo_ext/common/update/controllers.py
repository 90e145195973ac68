"""Numbers that follow the KL divergence of the updates."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from sb3_ppo_ext.common.errors import ArgumentError
from sb3_ppo_ext.common.validation import check_one_of, check_real


def adapted_by_kl(
    value: float,
    kl: float,
    *,
    target_kl: float,
    tolerance: float,
    factor: float,
    minimum: float,
    maximum: float,
) -> float:
    """
    A number for the next update, after one that moved the policy by ``kl``: multiplied by ``factor`` if that is above
    ``target_kl * tolerance``, divided by it if below ``target_kl / tolerance``, else as it was.

    With a factor > 1 it is the rule for the coefficient of a KL penalty, which grows when the policy moves too far;
    Schulman et al. 2017, arXiv 1707.06347, section 4. With a factor < 1 it is one for a learning rate, which then
    falls.

    :param value: the number in the update
    :param kl: mean KL(old || new) after the update; if it is NaN the number stays
    :param target_kl: the target of the KL
    :param tolerance: >= 1, half-width of the band around the target, as a factor
    :param factor: > 0, of one change; 1 holds the number fixed
    :param minimum: lower bound of the result
    :param maximum: upper bound of the result
    :return: the number for the next update
    """
    if kl > target_kl * tolerance:
        value *= factor
    elif kl < target_kl / tolerance:
        value = value / factor or value  # never 0, which no factor changes
    return min(max(value, minimum), maximum)


@dataclass(frozen=True)
class KLAdaptiveRate:
    """
    A learning rate that falls when the policy has moved too far and rises when it has not moved far enough, as in
    rsl_rl, rl_games and skrl, whose defaults it has (rsl_rl's minimum is 1e-5).

    :param target_kl: the KL(old || present) of the whole action that is aimed at; None: the algorithm's own
    :param tolerance: how far the KL may be from the target, as a factor, before the rate changes
    :param factor: by which it changes
    :param minimum: lower bound of the rate
    :param maximum: upper bound of the rate
    :param every: whether it changes after each ``"minibatch"`` or each ``"epoch"``
    """

    target_kl: float | None = None
    tolerance: float = 2.0
    factor: float = 1.5
    minimum: float = 1e-6
    maximum: float = 1e-2
    every: str = "minibatch"

    @classmethod
    def checked(cls, name: str, given: Any) -> KLAdaptiveRate:
        """
        :param name: of the argument
        :param given: a dict of the settings that differ from the defaults
        :raises ArgumentError: if it is none, or something in it is not allowed
        """
        if not isinstance(given, dict):
            known = ", ".join(field.name for field in fields(cls))
            raise ArgumentError(f"{name}={given!r} is not allowed: it must be None, or a dict of {known}")
        _check_keys(cls, name, given)
        rate = cls(**given)
        if rate.target_kl is not None:
            check_real(f"{name}['target_kl']", rate.target_kl, above=0.0)
        check_real(f"{name}['tolerance']", rate.tolerance, at_least=1.0)
        check_real(f"{name}['factor']", rate.factor, above=1.0)
        check_real(f"{name}['minimum']", rate.minimum, above=0.0)
        check_real(f"{name}['maximum']", rate.maximum, at_least=rate.minimum)
        check_one_of(f"{name}['every']", rate.every, ("minibatch", "epoch"))
        return rate

    def after(self, kl: float, rate: float, target_kl: float) -> float:
        """
        :param kl: the measured KL
        :param rate: the learning rate of the update that led to it
        :param target_kl: the target of the KL
        :return: the next learning rate
        """
        return adapted_by_kl(
            rate,
            kl,
            target_kl=target_kl,
            tolerance=self.tolerance,
            factor=1.0 / self.factor,
            minimum=self.minimum,
            maximum=self.maximum,
        )


@dataclass(frozen=True)
class AdaptiveCoefficient:
    """
    The weight of a penalty on the KL divergence from a reference policy, which grows while that is above a target and
    falls while it is below; Ziegler et al. 2019, arXiv 1909.08593, section 2.2, by the rule of :func:`adapted_by_kl`.

    :param target_kl: the mean KL(policy || reference) of the whole action that is aimed at
    :param coef: the present weight
    :param tolerance: how far the KL may be from the target, as a factor, before the weight changes
    :param factor: by which it changes; 1 holds it fixed
    :param minimum: lower bound of the weight
    :param maximum: upper bound of the weight
    """

    target_kl: float
    coef: float = 0.1
    tolerance: float = 1.5
    factor: float = 2.0
    minimum: float = 1e-4
    maximum: float = 1e4

    @classmethod
    def checked(cls, name: str, given: dict[str, Any]) -> AdaptiveCoefficient:
        """
        :param name: of the argument
        :param given: the target, and the settings that differ from the defaults
        :raises ArgumentError: if there is no target, or something is not allowed
        """
        _check_keys(cls, name, given)
        if "target_kl" not in given:
            raise ArgumentError(f"{name}={given!r} is not allowed: a dict must have a target_kl")
        result = cls(**given)
        check_real(f"{name}['target_kl']", result.target_kl, above=0.0)
        check_real(f"{name}['tolerance']", result.tolerance, at_least=1.0)
        check_real(f"{name}['factor']", result.factor, at_least=1.0)
        check_real(f"{name}['minimum']", result.minimum, at_least=0.0)
        check_real(f"{name}['maximum']", result.maximum, at_least=result.minimum)
        check_real(f"{name}['coef']", result.coef, at_least=result.minimum, at_most=result.maximum)
        if result.coef == 0.0 and result.factor > 1.0:
            raise ArgumentError(
                f"{name}['coef']={result.coef!r} is not allowed with a factor of {result.factor!r}, as no "
                "factor changes 0; it must be above 0, or the factor 1"
            )
        return result

    def after(self, kl: float) -> float:
        """
        :param kl: that was measured with the present weight
        :return: the weight from now on
        """
        return adapted_by_kl(
            self.coef,
            kl,
            target_kl=self.target_kl,
            tolerance=self.tolerance,
            factor=self.factor,
            minimum=self.minimum,
            maximum=self.maximum,
        )


def _check_keys(cls: type[Any], name: str, given: dict[str, Any]) -> None:
    for key in given:
        check_one_of(f"a key of {name}", key, [field.name for field in fields(cls)])
