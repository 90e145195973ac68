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
    :param target_kl: the KL that is aimed at
    :param tolerance: >= 1, half-width of the band around the target, as a factor
    :param factor: > 0, of one change; 1 holds the number fixed
    :param minimum: lower bound of the result
    :param maximum: upper bound of the result
    :return: the number for the next update
    """
    if kl > target_kl * tolerance:
        value *= factor
    elif kl < target_kl / tolerance:
        value /= factor
    return min(max(value, minimum), maximum)


@dataclass(frozen=True)
class KLAdaptiveRate:
    """
    A learning rate that falls when the policy has moved too far and rises when it has not moved far enough, as in
    rsl_rl, rl_games and skrl, whose defaults it has.

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
        :param given: a dict of what is to be otherwise than by default
        :raises ArgumentError: if it is none, or something in it is not allowed
        """
        known = [field.name for field in fields(cls)]
        if not isinstance(given, dict):
            raise ArgumentError(f"{name}={given!r} is not allowed: it must be None, or a dict of {', '.join(known)}")
        for key in given:
            check_one_of(f"a key of {name}", key, known)
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
        :param kl: that was measured
        :param rate: with which
        :param target_kl: that is aimed at
        :return: the rate from now on
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
