"""Recompute advantages and returns of a rollout with the current critic, during an update."""

from __future__ import annotations

import torch as th

from sb3_ppo_ext.common.rollout.actor_critic import ActorCritic
from sb3_ppo_ext.common.rollout.buffers import RolloutBuffer
from sb3_ppo_ext.common.rollout.data import PolicyInput, chunks


@th.no_grad()
def compute_targets_anew(rollout_buffer: RolloutBuffer, actor_critic: ActorCritic, last_inputs: PolicyInput) -> None:
    """
    Replace a rollout's ``advantages`` and ``returns`` by those of the current critic. Everything else stays, including
    ``values``, which remain those of the policy that acted.

    :param rollout_buffer: filled
    :param actor_critic: the policy, in evaluation mode, without a memory
    :param last_inputs: the observations after the last step
    """
    buffer = rollout_buffer
    of_acting_policy = buffer.values, buffer.last_values, buffer.final_values
    inputs, _ = buffer.flat_inputs()
    of_chunks = chunks(inputs.n_rows, actor_critic.policy.observation_space)
    buffer.values = buffer._unflat(th.cat([actor_critic.values(inputs.rows(rows)) for rows in of_chunks]))
    if buffer.final_observations is not None:
        buffer.final_values = buffer.final_values.copy()
        buffer.final_observations.evaluate_again(actor_critic)
        buffer.final_observations.write_into(buffer)
    buffer.compute_returns_and_advantage(actor_critic.values(last_inputs), buffer._last_dones)
    buffer.values, buffer.last_values, buffer.final_values = of_acting_policy
