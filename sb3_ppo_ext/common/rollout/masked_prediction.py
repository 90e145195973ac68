"""Actions of a policy that was trained with masks."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch as th
from stable_baselines3.common.policies import ActorCriticPolicy

from sb3_ppo_ext.common.errors import ArgumentError
from sb3_ppo_ext.common.policy_distributions import params_of
from sb3_ppo_ext.common.rollout.acting_env import masks_where_acting
from sb3_ppo_ext.common.rollout.adapters import direct_actor_critic, has_memory, refusal
from sb3_ppo_ext.common.rollout.data import MASK_KEY, PolicyInput
from sb3_ppo_ext.common.rollout.masks import checked_masks, choices_of, flat_mask, of_newest_frame
from sb3_ppo_ext.common.rollout.recurrence import check_states


def predict_masked(
    policy: ActorCriticPolicy,
    observation: Any,
    state: tuple[np.ndarray, ...] | None,
    episode_start: np.ndarray | None,
    *,
    deterministic: bool,
    action_masks: np.ndarray | None,
) -> tuple[np.ndarray, tuple[np.ndarray, ...] | None]:
    """
    Choose an allowed action for each observation.

    :param policy: actor and critic
    :param observation: of one environment, or one for each
    :param state: of a policy with a memory, what the last call returned
    :param episode_start: whether each observation is the first of its episode
    :param deterministic: whether to take the most likely action
    :param action_masks: which actions are allowed, shape ``(n_choices,)`` or ``(n_envs, n_choices)``; None: take the
        masks of the environments in which the caller acts, or from the observations
    :return: the actions, and the state to pass at the next step
    :raises ArgumentError: if no masks are found, or the policy cannot use them
    :raises ValueError: if a mask is wrong
    """
    reason = refusal(policy)
    if reason is not None:
        raise ArgumentError(f"action_masks is not allowed with policy={type(policy).__name__}: it {reason}")
    obs, is_vector = policy.obs_to_tensor(observation)
    n = PolicyInput(obs).n_rows
    masks: Any = action_masks
    choices = choices_of(policy.action_space)
    if masks is None:
        masks, are_heeded = masks_where_acting(observation, n, policy.action_space)
        if masks is not None and isinstance(obs, dict) and MASK_KEY in obs and obs[MASK_KEY].numel() == masks.size:
            # In training VecNormalize leaves the mask as it is; another one, around these environments, may not.
            obs[MASK_KEY] = th.as_tensor(masks, device=policy.device).to(obs[MASK_KEY].dtype).view_as(obs[MASK_KEY])
        if not are_heeded:
            masks = np.ones((n, sum(choices)), dtype=bool)
    if masks is None and isinstance(obs, dict) and MASK_KEY in obs:
        masks = of_newest_frame(obs[MASK_KEY].cpu().numpy(), choices)
    if masks is None:
        raise ArgumentError(
            "action_masks=None is not allowed: this model was trained with action masks, and no environment was found "
            "that says which actions are allowed now (it must be in a variable of the function that calls predict, and "
            "must have returned these observations last). It must be an array of True and False, one for each choice"
        )
    if n == 1 and action_masks is not None:
        is_one = np.ndim(action_masks[0]) == 0 or flat_mask(action_masks).size == sum(choices)
        masks = [action_masks] if is_one else masks
    if len(masks) != n:
        raise ArgumentError(
            f"action_masks of {len(masks)} environments are not allowed: there must be one mask for each of the {n} "
            "observations"
        )
    masks = checked_masks(masks, choices, step=None)
    policy.set_training_mode(False)
    actor_critic = direct_actor_critic(policy)
    family, mask = actor_critic.family, th.as_tensor(masks, device=policy.device)
    with th.no_grad():
        if has_memory(policy):
            params, state = _recurrent_params(policy, obs, n, state, episode_start)
            params = family.masked(params, mask)
        else:
            params = actor_critic.params(PolicyInput(obs, mask))
        actions = (family.mode(params) if deterministic else family.sample(params)).cpu().numpy()
    space = policy.action_space
    shaped: np.ndarray = actions.reshape(-1, *(space.shape or ())).astype(space.dtype)
    return shaped if is_vector else shaped.squeeze(axis=0), state


def _recurrent_params(
    policy: Any, obs: Any, n: int, state: tuple[np.ndarray, ...] | None, episode_start: np.ndarray | None
) -> tuple[th.Tensor, tuple[np.ndarray, ...]]:
    """Parameters of the distributions without masks, and the next state, as sb3-contrib's policies have it."""
    n_layers, _, hidden_size = policy.lstm_hidden_state_shape
    if state is None:
        state = (np.zeros((n_layers, n, hidden_size)),) * 2
    states = tuple(th.as_tensor(part, dtype=th.float32, device=policy.device) for part in state)
    starts = th.as_tensor(np.zeros(n) if episode_start is None else episode_start, device=policy.device)
    check_states(policy.lstm_actor, n, states, starts)
    distribution, states = policy.get_distribution(obs, states, starts.float())
    return params_of(distribution), tuple(part.cpu().numpy() for part in states)
