"""Collect a rollout with the actor alone, and evaluate it once at its end."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch as th
from stable_baselines3.common.callbacks import BaseCallback, ConvertCallback
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv

from sb3_ppo_ext.common.rollout.actor_critic import ActorCritic
from sb3_ppo_ext.common.rollout.buffers import RolloutBuffer
from sb3_ppo_ext.common.rollout.data import PolicyInput, chunks, rows_of, to_arrays, to_tensors
from sb3_ppo_ext.common.rollout.env_actions import EnvActions
from sb3_ppo_ext.common.rollout.env_copies import copy_quickly
from sb3_ppo_ext.common.rollout.evaluation import StepEvaluation
from sb3_ppo_ext.common.rollout.failures import raise_if_misshapen, raise_if_rollout_not_finite
from sb3_ppo_ext.common.rollout.final_values import FinalValues
from sb3_ppo_ext.common.rollout.masks import ActionMasks, check_no_masks
from sb3_ppo_ext.common.rollout.parameter_watch import ParameterWatch
from sb3_ppo_ext.common.rollout.stop_rules import StopRule
from sb3_ppo_ext.common.rollout.tensor_buffer import TensorRolloutBuffer
from sb3_ppo_ext.common.rollout.transitions import Episodes, Transition, gives_tensors, whole_steps

Act = Callable[[PolicyInput], tuple[th.Tensor, StepEvaluation | None]]


class Collector:
    """
    Collects one rollout of an algorithm: :meth:`collect` steps the environments, :meth:`evaluate` puts values,
    log-probabilities and distribution parameters into the buffer.

    While a pure policy acts, only its actor runs; the policy evaluates the steps when the rollout is complete. If a
    callback changes the policy meanwhile, the policy as it was evaluates the steps so far, and each later step is
    evaluated at once.

    :param algorithm: whose last observations and ``num_timesteps`` are updated
    :param env: the training environment
    :param callback: called at each step
    :param rollout_buffer: an empty buffer to fill
    :param stop: when the rollout ends
    :param masks: reads which actions the environments allow; None: all actions are allowed
    :param acting_policy: returns the current policy; ``step_by_step=True`` if it must evaluate each step at once
    :param heeds_masks: whether to raise an error if masks appear that were not there when the environments were reset
    :param keeps_final_values: whether to evaluate the final observations of episodes that a time limit ended
    :param step_by_step: whether to evaluate each step at once, because a callback changes the policy within rollouts;
        the attribute becomes True when such a change is detected
    """

    def __init__(
        self,
        algorithm: OnPolicyAlgorithm,
        env: VecEnv,
        callback: BaseCallback,
        rollout_buffer: RolloutBuffer,
        stop: StopRule,
        masks: ActionMasks | None,
        acting_policy: Callable[..., ActorCritic],
        *,
        heeds_masks: bool,
        keeps_final_values: bool,
        step_by_step: bool,
    ) -> None:
        self.step_by_step = step_by_step
        self._algorithm = algorithm
        self._env = env
        self._callback = callback
        self._buffer = rollout_buffer
        self._stop = stop
        self._masks = masks
        self._acting_policy = acting_policy
        self._heeds_masks = heeds_masks
        self._keeps_final_values = keeps_final_values
        self.actor_critic = acting_policy(step_by_step=step_by_step)
        # With a memory, each step is evaluated at once in any case, but not the final observations.
        self._watch = ParameterWatch(algorithm.policy) if self.actor_critic.is_pure else None
        self._final_values = FinalValues()
        self._steps: list[StepEvaluation] = []
        self.last_masks: np.ndarray | None = None
        self.last_state: th.Tensor | None = None

    def collect(
        self, n_rollout_steps: int, first_masks: np.ndarray | None = None, first_state: th.Tensor | None = None
    ) -> bool:
        """
        Step the environments until the rollout is complete. Afterwards ``last_masks`` and ``last_state`` are the action
        masks and the hidden state that belong to the algorithm's last observations.

        :param n_rollout_steps: the argument of ``collect_rollouts``, shown to callbacks
        :param first_masks: which actions are allowed in the first observations
        :param first_state: hidden state before the first step, shape ``(n_envs, n_state)``; None: no recurrent policy
        :return: False if the callback ended the rollout early
        """
        algorithm = self._algorithm
        try:
            return self._collect(n_rollout_steps, first_masks, first_state)
        finally:  # between rollouts the algorithm keeps numpy arrays, as in SB3
            algorithm._last_obs = to_arrays(algorithm._last_obs)
            algorithm._last_episode_starts = to_arrays(algorithm._last_episode_starts)

    def _collect(self, n_rollout_steps: int, first_masks: np.ndarray | None, first_state: th.Tensor | None) -> bool:
        algorithm, env, callback, rollout_buffer = self._algorithm, self._env, self._callback, self._buffer
        policy, device, use_sde = algorithm.policy, algorithm.device, algorithm.use_sde
        action_shape = (env.num_envs, *(algorithm.action_space.shape or ()))
        step_whole = whole_steps(env)
        stays_on_device = isinstance(rollout_buffer, TensorRolloutBuffer) and gives_tensors(env)
        env_actions = EnvActions(algorithm.action_space, device if stays_on_device else None)
        all_count = self._stop.counted is None
        copy_quickly(env)
        # Without a callback nothing reads the local variables or changes the policy during a rollout.
        is_alone = type(callback) is ConvertCallback and callback.callback is None
        act: Act = self.actor_critic.act
        self.last_masks = masks = first_masks
        self.last_state = state = first_state
        mask_tensor = starts = None
        n_steps = 0

        while True:
            if use_sde and algorithm.sde_sample_freq > 0 and n_steps % algorithm.sde_sample_freq == 0:
                algorithm.policy.reset_noise(env.num_envs)
            if self.step_by_step:  # the policy may have other layers by now
                policy = algorithm.policy
                act = self._take_policy()

            obs_tensor = to_tensors(algorithm._last_obs, device)
            if masks is not None:
                mask_tensor = th.as_tensor(masks, device=device)
            if state is not None:
                starts = self._starts()
            action_tensor, step = act(PolicyInput(obs_tensor, mask_tensor, state, starts))
            if step is not None:
                self._steps.append(step._replace(state=None))
            actions: Any = action_tensor if stays_on_device else action_tensor.cpu().numpy()
            actions = actions.reshape(action_shape)
            clipped_actions = env_actions(actions, policy)
            # Before the step, because an environment may write its next observation into the same array.
            rollout_buffer.add_observation(
                obs_tensor if stays_on_device else algorithm._last_obs,
                algorithm._last_episode_starts,  # type: ignore[arg-type]
            )

            if masks is not None:
                rollout_buffer.add_masks(masks)
            if state is not None:
                assert step is not None
                rollout_buffer.add_state(state)
                state = step.state

            transition = None
            infos: Any
            if step_whole is None:
                new_obs, rewards, dones, infos = env.step(clipped_actions)
            else:
                transition = step_whole(clipped_actions)
                new_obs, rewards, dones, infos = transition.obs, transition.rewards, transition.dones, transition.infos

            if self._masks is not None:
                self.last_masks = self._masks.read(new_obs)
            elif n_steps == 0 and self._heeds_masks:
                check_no_masks(infos if transition is None else infos[:1])
            algorithm.num_timesteps += env.num_envs
            if not is_alone:
                callback.update_locals(
                    {
                        "self": algorithm,
                        "env": env,
                        "callback": callback,
                        "rollout_buffer": rollout_buffer,
                        "n_rollout_steps": n_rollout_steps,
                        "n_steps": n_steps,
                        "obs_tensor": obs_tensor,
                        "actions": actions,
                        "clipped_actions": clipped_actions,
                        "new_obs": new_obs,
                        "rewards": to_arrays(rewards),
                        "dones": to_arrays(dones),
                        "infos": infos,
                        "action_masks": masks,
                        "next_state": state,
                    }
                )
            masks = self.last_masks
            if not callback.on_step():
                return False

            if transition is not None:
                self._note_ends(n_steps, transition, state)
            else:
                if all_count:
                    algorithm._update_info_buffer(infos, dones)
                else:
                    self._note_counted_infos(infos, dones)
                if dones.any():
                    self._note_ends_by_infos(n_steps, dones, infos, state)

            rollout_buffer.add_transition(actions, rewards)
            n_steps += 1
            algorithm._last_obs = new_obs  # type: ignore[assignment]
            algorithm._last_episode_starts = dones
            self.last_state = state
            if not is_alone and self._watch is not None and self._watch.is_touched() and self._watch.has_changed():
                self._follow_change()
            if self._stop.is_complete(n_steps, dones, None if transition is None else transition.counts):
                break

        self._stop.close(rollout_buffer)
        if self._watch is not None and (self._watch.is_replaced(algorithm.policy) or self._watch.has_changed()):
            self.step_by_step = True
            warnings.warn(
                "The policy was changed while it collected a rollout, in a way that is seen only at the end of it (by "
                ".data, by another tensor, layer or hook, or by an environment instead of a callback). This rollout "
                "was evaluated without following the change, unlike in Stable-Baselines3. From the next rollout on, "
                "each step is evaluated at once, which follows such changes",
                stacklevel=2,
            )
        return True

    @th.no_grad()
    def evaluate(self) -> th.Tensor:
        """
        Put values, log-probabilities and distribution parameters of the steps into the buffer, and the values of final
        observations.

        :return: the values of the observations after the last step, shape ``(n_envs,)``
        :raises NonFiniteError: if a reward is not finite, or an observation leads to a value that is not
        """
        buffer, last_obs = self._buffer, self._algorithm._last_obs
        self._evaluate_steps()
        inputs = PolicyInput(to_tensors(last_obs, self._algorithm.device))
        if self.last_state is not None:
            inputs = inputs._replace(state=self.last_state, starts=self._starts())
        last_values = self.actor_critic.values(inputs)
        raise_if_rollout_not_finite(buffer, last_values, last_obs)
        self._final_values.evaluate(self.actor_critic)
        self._final_values.write_into(buffer)
        buffer.final_observations = self._final_values
        return last_values

    def _starts(self) -> th.Tensor:
        """1 where the present observation is the first of an episode."""
        return th.as_tensor(self._algorithm._last_episode_starts, dtype=th.float32, device=self._algorithm.device)

    def _take_policy(self) -> Act:
        """Take the current policy, to act and to evaluate each step at once."""
        self.actor_critic = self._acting_policy(step_by_step=True)
        return self.actor_critic.act

    @th.no_grad()
    def _follow_change(self) -> None:
        """After a callback has changed the policy, evaluate the steps so far by the policy as it was."""
        assert self._watch is not None
        with self._watch.as_at_first():
            self._steps = self._steps or self._evaluations_so_far()
            self._final_values.evaluate(self.actor_critic)
        self._watch = None
        self.step_by_step = True

    def _note_ends(self, n_steps: int, transition: Transition, state: th.Tensor | None) -> None:
        """Record which episodes a step ended, from a transition of all environments."""
        buffer, truncated = self._buffer, transition.truncated
        if transition.episodes is not None:
            self._note_episodes(transition.episodes)
        if transition.counts is not None:
            buffer.add_counts(transition.counts)
        buffer.stored("truncated")[n_steps] = truncated
        if self._keeps_final_values and transition.final_obs is not None and truncated.any():
            rows = truncated.nonzero().flatten() if isinstance(truncated, th.Tensor) else truncated.nonzero()[0]
            of_envs = None if state is None else state[rows]
            self._final_values.add_rows(n_steps, rows, rows_of(transition.final_obs, rows), of_envs)
            self._note_final_values()

    def _note_ends_by_infos(
        self, n_steps: int, dones: np.ndarray, infos: list[dict[str, Any]], state: th.Tensor | None
    ) -> None:
        """Record which episodes a step ended, from the info of each environment."""
        is_as_made = type(self._env) is DummyVecEnv  # a wrapper may reshape observations but not final ones
        for idx in dones.nonzero()[0]:
            final_obs = infos[idx].get("terminal_observation")
            if is_as_made:
                raise_if_misshapen(final_obs, self._algorithm.observation_space, int(idx))
            if infos[idx].get("TimeLimit.truncated", False):
                self._buffer.truncated[n_steps, idx] = True
                if final_obs is not None and self._keeps_final_values:
                    of_env = None if state is None else state[idx]
                    self._final_values.add(n_steps, int(idx), final_obs, of_env)
                    self._note_final_values()

    def _note_final_values(self) -> None:
        """Evaluate final observations at once, as SB3 does, if the time of the pass may change the result."""
        if not self.actor_critic.is_pure:
            self._final_values.evaluate(self.actor_critic)

    def _note_episodes(self, episodes: Episodes) -> None:
        """Record returns and lengths for the logs."""
        of_infos, of_successes = self._algorithm.ep_info_buffer, self._algorithm.ep_success_buffer
        assert of_infos is not None
        assert of_successes is not None
        if self._stop.counted is not None:
            episodes = episodes.some(self._stop.counted[episodes.env_indices])
        episodes = episodes.some(slice(-(of_infos.maxlen or 0), None))  # the deque would drop the others anyway
        of_infos.extend(episodes.infos())
        if episodes.successes is not None:
            of_successes.extend(success for success in episodes.successes.tolist() if success is not None)

    def _note_counted_infos(self, infos: list[dict[str, Any]], dones: np.ndarray) -> None:
        counted = self._stop.counted
        assert counted is not None
        infos = [info for info, counts in zip(infos, counted, strict=True) if counts]
        self._algorithm._update_info_buffer(infos, dones[counted])

    def _evaluations_so_far(self) -> list[StepEvaluation]:
        """Values and distribution parameters of each step that the rollout has so far."""
        inputs, actions = self._buffer.inputs_so_far()
        parts = [
            self.actor_critic.evaluate_actions(inputs.rows(rows), actions[rows])
            for rows in chunks(len(actions), self._algorithm.observation_space)
        ]
        values = th.split(th.cat([part.values for part in parts]), self._env.num_envs)
        params = th.split(th.cat([part.params for part in parts]), self._env.num_envs)
        return [StepEvaluation(of_values, None, of_params) for of_values, of_params in zip(values, params, strict=True)]

    def _evaluate_steps(self) -> None:
        """Put values, log-probabilities and distribution parameters of all steps into the buffer."""
        inputs, actions = self._buffer.flat_inputs()
        if not self._steps:
            evaluate_actions, space = self.actor_critic.evaluate_actions, self._algorithm.observation_space
            parts = [evaluate_actions(inputs.rows(rows), actions[rows]) for rows in chunks(len(actions), space)]
            self._buffer.set_evaluation(
                th.cat([part.values for part in parts]),
                th.cat([part.log_prob for part in parts]),
                th.cat([part.params for part in parts]),
            )
            return
        values, log_probs, params, _ = (env_by_env(parts) for parts in zip(*self._steps, strict=True))
        if params is not None:
            family = self.actor_critic.family
            assert family is not None
            of_params = family.log_prob(params, actions)
            if log_probs is None:
                log_probs = of_params
            else:
                self._check_params(of_params, log_probs)
        assert values is not None
        assert log_probs is not None
        self._buffer.set_evaluation(values, log_probs, params)

    def _check_params(self, of_params: th.Tensor, log_probs: th.Tensor) -> None:
        """
        :param of_params: log-probabilities of the actions, computed from the distribution parameters
        :param log_probs: log-probabilities that the policy returned
        :raises ValueError: if the two clearly differ
        """
        # Rounding alone makes them differ for single actions, at the end of a squashed range.
        differs = (of_params - log_probs).abs() > 0.01 * (1.0 + log_probs.abs())
        if differs.float().mean() > 0.5:
            policy = self.actor_critic.policy
            raise ValueError(
                f"policy={type(policy).__name__} is not allowed: its log-probabilities are not those of its "
                f"action_dist (a {type(policy.action_dist).__name__}), whose exact KL divergence "
                f"{type(self._algorithm).__name__} needs. No update was made. DualClipPPO and REINFORCE learn with any "
                "distribution"
            )


def env_by_env(steps: Sequence[th.Tensor | None]) -> th.Tensor | None:
    """
    Join the tensors of all steps in the order of the flat rollout; None if the steps have no tensors.

    :param steps: for each step a tensor of shape ``(n_envs, ...)``, or None
    """
    present = [step for step in steps if step is not None]
    return th.stack(present, dim=1).flatten(0, 1) if present else None
