"""Products with the Fisher information matrix of an actor, over a rollout."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch as th
from torch import nn

from sb3_ppo_ext.common.distributions import Family
from sb3_ppo_ext.common.rollout.actor_critic import ActorCritic
from sb3_ppo_ext.common.rollout.data import PolicyInput
from sb3_ppo_ext.numerics import ChunkedFisherVectorProduct, FisherVectorProduct


def fisher_vector_product(
    actor_critic: ActorCritic,
    family: Family,
    inputs: PolicyInput,
    parameters: Sequence[nn.Parameter],
    chunks: Sequence[slice],
    *,
    damping: float,
) -> Callable[[th.Tensor], th.Tensor]:
    """
    By the present parameters, and by torch's own means.

    :param actor_critic: the policy
    :param family: the formulas of its distributions
    :param inputs: whose distributions it is the Fisher information of
    :param parameters: theta, among the policy's
    :param chunks: ranges of the inputs, to be multiplied one after the other; of sequences, where there is a memory
    :param damping: multiple of the identity that is added
    :return: ``v -> F v + damping * v``, v of shape ``(n,)``
    """
    if len(chunks) == 1:
        return FisherVectorProduct(actor_critic.params(inputs), parameters, family.fisher, damping=damping)
    length = inputs.length
    return ChunkedFisherVectorProduct(
        lambda rows: actor_critic.params(inputs.rows(slice(rows.start // length, rows.stop // length))),
        chunks[-1].stop * length,
        parameters,
        family.fisher,
        chunk_size=chunks[0].stop * length,
        damping=damping,
    )
