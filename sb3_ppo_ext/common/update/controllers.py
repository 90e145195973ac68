"""Numbers that follow the KL divergence of the updates."""

from __future__ import annotations


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
