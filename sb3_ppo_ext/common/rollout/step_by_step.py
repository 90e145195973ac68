"""Collect a rollout by SB3's own method, for a buffer that needs each step at once."""

from __future__ import annotations

from collections.abc import Callable

import torch as th
from stable_baselines3.common import buffers as sb3_buffers
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.vec_env import VecEnv

from sb3_ppo_ext.common.policy_distributions import params_of
from sb3_ppo_ext.common.rollout.buffers import RolloutBuffer
from sb3_ppo_ext.common.rollout.collector import env_by_env
from sb3_ppo_ext.common.rollout.failures import raise_if_rollout_not_finite

Collect = Callable[[VecEnv, BaseCallback, sb3_buffers.RolloutBuffer, int], bool]


def collect_as_sb3(
    algorithm: OnPolicyAlgorithm,
    collect: Collect,
    env: VecEnv,
    callback: BaseCallback,
    rollout_buffer: sb3_buffers.RolloutBuffer,
    n_rollout_steps: int,
    *,
    needs_old_params: bool,
) -> bool:
    """
    Collect by SB3's own method.

    :param algorithm: the algorithm that collects
    :param collect: SB3's ``collect_rollouts`` of the algorithm
    :param env: the training environment
    :param callback: called at each step, and at the beginning and the end of the rollout
    :param rollout_buffer: to fill
    :param n_rollout_steps: steps to collect from each environment
    :param needs_old_params: whether the updates need the parameters of the distributions that drew the actions
    :return: whether the rollout was filled; False if the callback ended it
    :raises ValueError: if these parameters are needed but not known for each step
    """
    steps: list[th.Tensor] = []
    policy = algorithm.policy
    if needs_old_params:
        hook = policy.register_forward_hook(lambda *_: steps.append(params_of(policy.action_dist)))
    try:
        is_full = collect(env, callback, rollout_buffer, n_rollout_steps)
    finally:
        if needs_old_params:
            hook.remove()
    if not is_full:
        return False
    raise_if_rollout_not_finite(rollout_buffer, rollout_buffer.advantages, algorithm._last_obs)
    if needs_old_params:
        assert isinstance(rollout_buffer, RolloutBuffer)
        if len(steps) != rollout_buffer.buffer_size:
            raise ValueError(
                f"The policy was called {len(steps)} times in a rollout of {rollout_buffer.buffer_size} steps, so "
                "that the parameters of the distributions that acted are not known. Let callbacks use "
                "policy.predict() instead"
            )
        params = env_by_env(steps)
        assert params is not None
        rollout_buffer.set_params(params)
    return True
