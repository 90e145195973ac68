"""The statistics by which a policy normalises observations, after an update."""

from __future__ import annotations

from typing import Any

import torch as th
from stable_baselines3.common.buffers import RolloutBuffer as SB3RolloutBuffer
from torch import nn

from sb3_ppo_ext.common.rollout.buffers import RolloutBuffer
from sb3_ppo_ext.common.rollout.normalization import NormalizedObservations
from sb3_ppo_ext.common.update.reduce import Reducer


def observations_of(rollout_buffer: SB3RolloutBuffer) -> Any:
    """
    All observations of a rollout.

    :param rollout_buffer: filled, any of SB3's
    """
    if isinstance(rollout_buffer, RolloutBuffer):
        return rollout_buffer.flat().observations
    return next(iter(rollout_buffer.get())).observations


@th.no_grad()
def update_normalization(policy: nn.Module, observations: Any, reducer: Reducer) -> None:
    """
    Add the observations of a rollout, of all processes. It is done when the update from it has been made: the policy
    that drew the actions, and the one whose probabilities are compared with theirs, normalise alike.

    :param policy: which may normalise observations
    :param observations: a batch of tensors or a dict of such
    :param reducer: of the processes
    """
    for module in policy.modules():
        if not isinstance(module, NormalizedObservations):
            continue
        for moments, batch in module.parts(observations):
            wide = batch.float() if batch.device.type == "mps" else batch.double()
            # One message: how many, their sums, and the sums of their squares.
            n = wide.new_tensor([float(len(wide))])
            total = reducer.summed(th.cat((n, wide.sum(dim=0).flatten(), wide.square().sum(dim=0).flatten())))
            mean, mean_square = (total[1:] / total[0]).view(2, *moments.mean.shape)
            moments.add(mean, (mean_square - mean.square()).clamp(min=0.0), total[0])
