"""Collecting a rollout with the actor alone, and evaluating it once."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common import buffers as sb3_buffers
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm as SB3OnPolicyAlgorithm
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.preprocessing import get_flattened_obs_dim
from stable_baselines3.common.type_aliases import PyTorchObs, Schedule
from stable_baselines3.common.utils import obs_as_tensor
from stable_baselines3.common.vec_env import VecEnv

from sb3_ppo_ext.common.actor_critic import ActorCritic, DirectActorCritic, SB3ActorCritic
from sb3_ppo_ext.common.buffers import RolloutBuffer, buffer_class_for
from sb3_ppo_ext.common.policies import POLICY_ALIASES
from sb3_ppo_ext.common.validation import as_schedule, check_bool, check_int, check_real

ACTION_SPACES = (spaces.Box, spaces.Discrete, spaces.MultiDiscrete, spaces.MultiBinary)

# A rollout is evaluated in chunks of at most this many input numbers and rows, which bounds the memory it takes.
_CHUNK_NUMBERS = 2**24
_CHUNK_ROWS = 2**14


class OnPolicyAlgorithm(SB3OnPolicyAlgorithm):
    """
    SB3's base of on-policy algorithms, with a faster rollout.

    SB3 computes the value and the log-probability at every step, for a handful of observations at a time; nothing
    needs them before the rollout is full. Here a step runs the actor only, and one batched pass at the end gives the
    values, the log-probabilities and the parameters of the action distributions. Actions are drawn by the same torch
    calls as SB3 draws them, so a seed gives the trajectory that it gives SB3's PPO.

    Callbacks see SB3's protocol; only ``values`` and ``log_probs`` are missing in ``locals``: they are not known yet.

    A policy that overrides SB3's methods, or a rollout buffer that is not :class:`RolloutBuffer`, is collected SB3's
    way.

    Takes the arguments of :class:`stable_baselines3.common.on_policy_algorithm.OnPolicyAlgorithm`.
    """

    policy_aliases: ClassVar[dict[str, type[BasePolicy]]] = POLICY_ALIASES

    # Whether the updates need the distribution parameters of the rollout (an exact KL divergence does).
    _needs_distribution_params: ClassVar[bool] = False

    def _validate(self) -> None:
        """
        Check the hyper-parameters, and turn what may be a schedule into one. Called before anything is built, for a
        new model and for one that is loaded.

        :raises ValueError: naming the argument, its value and what is allowed
        """
        self.learning_rate = as_schedule("learning_rate", self.learning_rate)
        check_int("n_steps", self.n_steps, minimum=1)
        check_real("gamma", self.gamma, at_least=0.0, at_most=1.0)
        check_real("gae_lambda", self.gae_lambda, at_least=0.0, at_most=1.0)
        check_real("ent_coef", self.ent_coef, at_least=0.0)
        check_real("vf_coef", self.vf_coef, at_least=0.0)
        check_real("max_grad_norm", self.max_grad_norm, above=0.0, finite=False)
        check_bool("use_sde", self.use_sde)
        check_int("sde_sample_freq", self.sde_sample_freq, minimum=-1)

    def _setup_model(self) -> None:
        self._validate()
        if self.rollout_buffer_class is None:
            self.rollout_buffer_class = buffer_class_for(self.observation_space)
        super()._setup_model()
        if self.verbose >= 1 and self._direct() is None:
            print(
                f"{type(self.policy).__name__} with {type(self.rollout_buffer).__name__} is trained through "
                "Stable-Baselines3's own calls: correct, but slower than with a policy and a buffer that override none"
            )

    def _at_present(self, schedule: float | str | Schedule) -> float:
        """The value of a schedule now. A callback may have put a plain number in its place."""
        return float(schedule(self._current_progress_remaining) if callable(schedule) else schedule)

    def _direct(self) -> DirectActorCritic | None:
        """The policy for direct use, if policy and buffer allow the fast way."""
        is_ours = isinstance(self.rollout_buffer, RolloutBuffer)
        overrides_add = type(self.rollout_buffer).add not in (
            sb3_buffers.RolloutBuffer.add,
            sb3_buffers.DictRolloutBuffer.add,
        )
        if not is_ours or overrides_add or not DirectActorCritic.understands(self.policy):
            return None
        return DirectActorCritic(self.policy)

    def _actor_critic(self) -> ActorCritic:
        """The policy as the updates see it. Made anew for each update: a user may have replaced the policy."""
        if DirectActorCritic.understands(self.policy):
            return DirectActorCritic(self.policy)
        return SB3ActorCritic(self.policy, with_params=self._needs_distribution_params)

    def collect_rollouts(
        self,
        env: VecEnv,
        callback: BaseCallback,
        rollout_buffer: sb3_buffers.RolloutBuffer,
        n_rollout_steps: int,
    ) -> bool:
        """
        Fill the rollout buffer with the current policy.

        :param env: the training environment
        :param callback: called at each step, and at the beginning and the end of the rollout
        :param rollout_buffer: to fill
        :param n_rollout_steps: steps to collect from each environment
        :return: whether the rollout was filled; False if the callback ended it
        """
        actor_critic = self._direct()
        if actor_critic is None or not isinstance(rollout_buffer, RolloutBuffer):
            return super().collect_rollouts(env, callback, rollout_buffer, n_rollout_steps)

        assert self._last_obs is not None, "No previous observation was provided"
        assert self._last_episode_starts is not None
        self.policy.set_training_mode(False)
        rollout_buffer.reset()
        if self.use_sde:
            self.policy.reset_noise(env.num_envs)
        shares_work = actor_critic.shares_work
        step_params: list[th.Tensor] = []
        step_values: list[th.Tensor] = []
        timeouts: list[tuple[int, int, Any]] = []
        action_shape = (env.num_envs, *(self.action_space.shape or ()))
        is_box = isinstance(self.action_space, spaces.Box)
        n_steps = 0

        callback.on_rollout_start()

        while n_steps < n_rollout_steps:
            if self.use_sde and self.sde_sample_freq > 0 and n_steps % self.sde_sample_freq == 0:
                self.policy.reset_noise(env.num_envs)

            with th.inference_mode():
                obs_tensor = obs_as_tensor(self._last_obs, self.device)  # type: ignore[arg-type]
                if shares_work:
                    action_tensor, params, values = actor_critic.act_and_evaluate(obs_tensor)
                    step_params.append(params)
                    step_values.append(values)
                else:
                    action_tensor = actor_critic.act(obs_tensor)
            actions = action_tensor.cpu().numpy().reshape(action_shape)
            clipped_actions = self._to_env(actions) if is_box else actions

            new_obs, rewards, dones, infos = env.step(clipped_actions)

            self.num_timesteps += env.num_envs
            callback.update_locals(locals())
            if not callback.on_step():
                return False

            self._update_info_buffer(infos, dones)
            if dones.any():
                for idx in dones.nonzero()[0]:
                    terminal_obs = infos[idx].get("terminal_observation")
                    if terminal_obs is not None and infos[idx].get("TimeLimit.truncated", False):
                        timeouts.append((n_steps, int(idx), terminal_obs))

            rollout_buffer.add_transition(self._last_obs, actions, rewards, self._last_episode_starts)
            n_steps += 1
            self._last_obs = new_obs  # type: ignore[assignment]
            self._last_episode_starts = dones

        with th.no_grad():
            if shares_work:
                params, values = th.cat(step_params), th.cat(step_values)
                log_probs = actor_critic.family.log_prob(params, self._flat_actions(rollout_buffer))
            else:
                params, values, log_probs = self._evaluate(actor_critic, rollout_buffer)
            rollout_buffer.set_evaluation(values, log_probs, params)
            self._bootstrap_timeouts(actor_critic, rollout_buffer, timeouts)
            last_values = actor_critic.values(obs_as_tensor(new_obs, self.device))  # type: ignore[arg-type]
        rollout_buffer.compute_returns_and_advantage(last_values=last_values, dones=dones)

        callback.update_locals(locals())
        callback.on_rollout_end()
        return True

    def _to_env(self, actions: np.ndarray) -> np.ndarray:
        """A Box action as the environment takes it: unscaled if squashed, else clipped to the bounds."""
        if self.policy.squash_output:
            return self.policy.unscale_action(actions)
        assert isinstance(self.action_space, spaces.Box)
        clipped: np.ndarray = np.clip(actions, self.action_space.low, self.action_space.high)
        return clipped

    def _flat_actions(self, rollout_buffer: RolloutBuffer) -> th.Tensor:
        actions = rollout_buffer.actions.reshape(-1, rollout_buffer.action_dim).astype(np.float32, copy=False)
        return th.as_tensor(actions, device=self.device)

    def _chunks(self, n_samples: int) -> Iterator[slice]:
        """Cut a rollout so that the memory its evaluation takes is bounded."""
        size = max(get_flattened_obs_dim(self.observation_space), 1)
        rows = max(1, min(_CHUNK_ROWS, _CHUNK_NUMBERS // size))
        return (slice(start, start + rows) for start in range(0, n_samples, rows))

    def _evaluate(
        self, actor_critic: DirectActorCritic, rollout_buffer: RolloutBuffer
    ) -> tuple[th.Tensor, th.Tensor, th.Tensor]:
        """What the policy says of the whole rollout: distribution parameters, values and log-probabilities."""
        actions = self._flat_actions(rollout_buffer)
        results = []
        for chunk in self._chunks(len(actions)):
            params, values = actor_critic.evaluate(self._flat_obs(rollout_buffer.observations, chunk))
            results.append((params, values, actor_critic.family.log_prob(params, actions[chunk])))
        params, values, log_probs = (th.cat(parts) for parts in zip(*results, strict=True))
        return params, values, log_probs

    def _flat_obs(self, observations: Any, chunk: slice) -> PyTorchObs:
        def flat(array: np.ndarray) -> th.Tensor:
            return th.as_tensor(array.reshape(-1, *array.shape[2:])[chunk], device=self.device)

        if isinstance(observations, dict):
            return {key: flat(array) for key, array in observations.items()}
        return flat(observations)

    def _bootstrap_timeouts(
        self, actor_critic: DirectActorCritic, rollout_buffer: RolloutBuffer, timeouts: list[tuple[int, int, Any]]
    ) -> None:
        """
        Add the discounted value of the final observation to the last reward of each episode that a time limit cut.

        :param timeouts: step, environment and final observation of each
        """
        for chunk in self._chunks(len(timeouts)):
            steps, env_indices, final_obs = zip(*timeouts[chunk], strict=True)
            if isinstance(final_obs[0], dict):
                stacked: Any = {key: np.stack([obs[key] for obs in final_obs]) for key in final_obs[0]}
            else:
                stacked = np.stack(final_obs)
            values = actor_critic.values(self.policy.obs_to_tensor(stacked)[0])
            rollout_buffer.rewards[list(steps), list(env_indices)] += self.gamma * values.cpu().numpy()
