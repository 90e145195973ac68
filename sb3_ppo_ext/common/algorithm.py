"""The base class of the four algorithms: collect a rollout, evaluate it, compute the targets, update the policy."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch as th
from stable_baselines3.common import buffers as sb3_buffers
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.type_aliases import MaybeCallback
from stable_baselines3.common.vec_env import VecEnv
from torch import nn

from sb3_ppo_ext.common import construction
from sb3_ppo_ext.common.compile.constants import constants_of
from sb3_ppo_ext.common.compile.policy_programs import CompiledActorCritic
from sb3_ppo_ext.common.compile.step import CompiledStep
from sb3_ppo_ext.common.compile.support import cache_key, check_can_compile, check_compiler
from sb3_ppo_ext.common.errors import ArgumentError
from sb3_ppo_ext.common.model import Model
from sb3_ppo_ext.common.policies import ActorCriticPolicy
from sb3_ppo_ext.common.processes import Together, training_together
from sb3_ppo_ext.common.rollout.actor_critic import ActorCritic, DirectActorCritic, SB3ActorCritic
from sb3_ppo_ext.common.rollout.adapters import direct_actor_critic, has_memory, refusal
from sb3_ppo_ext.common.rollout.buffers import RolloutBuffer
from sb3_ppo_ext.common.rollout.collector import Collector
from sb3_ppo_ext.common.rollout.data import chunks
from sb3_ppo_ext.common.rollout.failures import explained
from sb3_ppo_ext.common.rollout.masks import ActionMasks, convention_of, keep_from_normalizing
from sb3_ppo_ext.common.rollout.present_infos import present_infos
from sb3_ppo_ext.common.rollout.purity import draws_noise, impurity
from sb3_ppo_ext.common.rollout.step_by_step import collect_as_sb3
from sb3_ppo_ext.common.rollout.stop_rules import AfterSteps, StopRule
from sb3_ppo_ext.common.update.objective import Loss
from sb3_ppo_ext.common.update.reduce import OneProcess, Reducer
from sb3_ppo_ext.common.update.step import EagerStep, MinibatchStep
from sb3_ppo_ext.common.validation import check_bool

if TYPE_CHECKING:
    from typing_extensions import Self


class OnPolicyAlgorithm(Model):
    """
    SB3's base class of on-policy algorithms, with a faster rollout.

    SB3 computes the value and the log-probability at every step, for a few observations at a time, although they are
    only needed when the rollout is full. Here a step runs the actor only, and one batched pass at the end computes the
    values, the log-probabilities and the parameters of the action distributions. Actions are drawn by the same torch
    calls as in SB3, so a seed gives the same trajectory as with SB3's PPO.

    Callbacks are called as in SB3; only ``values`` and ``log_probs``, not known yet, are missing in ``locals``.

    This needs networks that are known to be pure (:mod:`sb3_ppo_ext.common.rollout.purity`). Any other network, a
    policy that overrides SB3's methods, and a policy that a callback changes within a rollout are evaluated at each
    step. A rollout buffer that is not a :class:`RolloutBuffer` is filled as in SB3.

    Takes the arguments of :class:`stable_baselines3.common.on_policy_algorithm.OnPolicyAlgorithm`.

    :raises ValueError: if an argument cannot be used or contradicts another, before training starts
    """

    # Whether the value of the final observation is added where a time limit ends an episode.
    bootstrap_timeouts: bool = True

    # Reads the action masks of the environments; None if they have none, or if masks are not used.
    _masks: ActionMasks | None = None
    _last_masks: np.ndarray | None = None  # which actions the environments allow in the next step
    _use_masking: bool = True
    _last_state: np.ndarray | None = None  # the memory of a recurrent policy, for each environment

    # Combines gradients and statistics of several processes.
    _reducer: Reducer = OneProcess()
    _together: Together | None = None  # this process's part in training with several processes

    def learn(
        self,
        total_timesteps: int,
        callback: MaybeCallback = None,
        log_interval: int = 1,
        tb_log_name: str | None = None,
        reset_num_timesteps: bool = True,
        progress_bar: bool = False,
        *,
        use_masking: bool = True,
    ) -> Self:
        """
        Train, as SB3 does. If the environments say which actions are allowed, only those are taken; see
        :mod:`sb3_ppo_ext.common.rollout.masks`. Under ``torchrun``, all processes train one model; see
        :mod:`sb3_ppo_ext.common.processes`.

        :param total_timesteps: steps to make; the last rollout may exceed them
        :param callback: called at each step, and at the beginning and the end of each rollout
        :param log_interval: rollouts between two logs; None: nothing is logged
        :param tb_log_name: name of the run in TensorBoard; None: the name of the class
        :param reset_num_timesteps: whether to count from 0; otherwise the steps are added to those made before
        :param progress_bar: whether to show a progress bar
        :param use_masking: whether to use the action masks of the environments
        :return: the model
        :raises ValueError: if the model cannot learn in these environments, or an observation or reward is not finite
        """
        construction.check_can_start(self, log_interval)
        check_bool("use_masking", use_masking)
        self._use_masking = use_masking
        compared = {"total_timesteps": total_timesteps, "reset_num_timesteps": reset_num_timesteps}
        with training_together(self, callback, progress_bar, compared) as (callback, progress_bar):
            return super().learn(
                total_timesteps=total_timesteps,
                callback=callback,
                log_interval=log_interval,
                tb_log_name=type(self).__name__ if tb_log_name is None else tb_log_name,
                reset_num_timesteps=reset_num_timesteps,
                progress_bar=progress_bar,
            )

    def _setup_new_model(self) -> None:
        """Build a new model, and check what only learning needs: a model that is loaded for evaluation skips this."""
        self._setup_model()
        self._check_can_learn()
        if self.sequence_length is None and has_memory(self.policy):
            construction.say_sequence_length(self)

    def _check_can_learn(self) -> None:
        """
        Check what only learning needs, for a new model and in ``learn``. A model for evaluation may be loaded on a
        machine without a compiler, and with environments that it could not learn.

        :raises ValueError: if ``torch_compile=True``, the sequence length or the environments' way to begin episodes
            is not possible here; the message says what to change
        """
        construction.check_steps_that_do_not_count(self)
        construction.set_sequence_length(self)
        if self.torch_compile:
            check_can_compile(self._actor_critic(), self.policy.optimizer)
            check_compiler(self.device)

    def _setup_learn(
        self, total_timesteps: int, callback: MaybeCallback = None, *args: Any, **kwargs: Any
    ) -> tuple[int, BaseCallback]:
        self._check_can_learn()
        is_reset = self._last_obs is None or (args[0] if args else kwargs.get("reset_num_timesteps", True))
        if self.env is not None:
            keep_from_normalizing(self.env)
        try:
            result = super()._setup_learn(total_timesteps, callback, *args, **kwargs)
        except Exception as error:
            more = None if self.env is None else explained(error, self.env, None)
            if more is None:
                raise
            raise more from error
        if self.env is not None and convention_of(self.env) == "info":
            present_infos(self.env)  # observes the infos from now on, with or without masks
        before, self._masks = self._masks, None
        if self.env is not None and self._use_masking:
            self._masks = ActionMasks.of(self.env)
        if is_reset:
            self._last_state = None
        if is_reset or self._masks is None or self._masks.sees_others(before):
            self._last_masks = None
        if self._masks is not None:
            self._start_masking(self._masks)
        self._set_masked(self._masks is not None)
        return result

    def _start_masking(self, masks: ActionMasks) -> None:
        """Find out which actions are allowed now; an ArgumentError if the policy cannot use masks."""
        buffer = self.rollout_buffer
        if not isinstance(buffer, RolloutBuffer) or buffer.wants_every_step:
            raise ArgumentError(
                f"rollout_buffer_class={type(buffer).__name__} is not allowed where environments mask actions: it must "
                "be a subclass of sb3_ppo_ext.common.buffers.RolloutBuffer without an add() of its own"
            )
        reason = refusal(self.policy)
        if reason is not None:
            raise self._cannot_mask(reason)
        if not self._is_masked and self.verbose >= 1:
            print(f"Using the action masks of the environments ({masks.convention}); use_masking=False turns this off")
        if self._last_masks is None:
            self._last_masks = masks.read(self._last_obs)

    def _cannot_mask(self, reason: str) -> ArgumentError:
        return ArgumentError(
            f"env is not allowed with policy={type(self.policy).__name__}: the environments mask actions, and the "
            f"policy {reason}. Use an unchanged Stable-Baselines3 policy, or learn(..., use_masking=False)"
        )

    def collect_rollouts(
        self,
        env: VecEnv,
        callback: BaseCallback,
        rollout_buffer: sb3_buffers.RolloutBuffer,
        n_rollout_steps: int,
        *,
        stop: StopRule | None = None,
    ) -> bool:
        """
        Fill the rollout buffer with the current policy, evaluate it, and compute the targets.

        :param env: the training environment
        :param callback: called at each step, and at the beginning and the end of the rollout
        :param rollout_buffer: the buffer to fill
        :param n_rollout_steps: steps to collect from each environment
        :param stop: when the rollout ends; None: after ``n_rollout_steps``
        :return: whether the rollout was filled; False if the callback ended it
        """
        if self._together is not None:
            self._together.start_rollout(self)
        try:
            if not isinstance(rollout_buffer, RolloutBuffer) or rollout_buffer.wants_every_step:
                assert stop is None, "a buffer that is filled as SB3 does it ends after n_rollout_steps"
                is_complete = collect_as_sb3(
                    self,
                    super().collect_rollouts,
                    env,
                    callback,
                    rollout_buffer,
                    n_rollout_steps,
                    needs_old_params=self._needs_old_params,
                )
            else:
                stop = stop or AfterSteps(n_rollout_steps)
                is_complete = self._collect(env, callback, rollout_buffer, n_rollout_steps, stop)
        except Exception as error:
            obs, self._last_obs = self._last_obs, None  # the next learn() resets the environments
            more = explained(error, env, obs)
            if more is None:
                raise
            raise more from error
        return is_complete if self._together is None else self._together.end_rollout(self, is_complete)

    def _collect(
        self, env: VecEnv, callback: BaseCallback, rollout_buffer: RolloutBuffer, n_rollout_steps: int, stop: StopRule
    ) -> bool:
        assert self._last_obs is not None, "No previous observation was provided"
        assert self._last_episode_starts is not None
        self.policy.set_training_mode(False)
        rollout_buffer.reset()
        callback.on_rollout_start()
        if self.use_sde:  # after the callback, so that a checkpoint has the random state before this draw
            self.policy.reset_noise(env.num_envs)
        collector = Collector(
            self,
            env,
            callback,
            rollout_buffer,
            stop,
            self._masks,
            self._acting_policy,
            heeds_masks=self._use_masking,
            keeps_final_values=self.bootstrap_timeouts,
            step_by_step=self._policy_changes_in_rollouts,
        )
        try:
            is_complete = collector.collect(n_rollout_steps, self._last_masks, self._state_of(collector))
        finally:  # also after an interrupt: the next learn() may go on with the environments as they are
            self._last_masks = collector.last_masks
            self._last_state = None if collector.last_state is None else collector.last_state.cpu().numpy()
        self._policy_changes_in_rollouts = collector.step_by_step
        if not is_complete:
            return False
        values = collector.evaluate()
        self._compute_targets(rollout_buffer, values)
        callback.update_locals({"values": values.reshape(-1, 1), "n_steps": rollout_buffer.pos})  # in SB3's shape
        callback.on_rollout_end()
        rollout_buffer.forget_flat()  # a callback may have edited any of its arrays
        return True

    def _state_of(self, collector: Collector) -> th.Tensor | None:
        """The memory of the policy when a rollout begins; zeros if it is empty."""
        n_state = collector.actor_critic.n_state
        if not n_state:
            return None
        if self._last_state is None or self._last_state.shape != (self.n_envs, n_state):
            return th.zeros(self.n_envs, n_state, device=self.device)
        return th.as_tensor(self._last_state, device=self.device)

    def _compute_targets(self, rollout_buffer: RolloutBuffer, last_values: th.Tensor) -> None:
        """
        Compute advantages and returns of a rollout that has been evaluated.

        :param rollout_buffer: the buffer that holds the rollout
        :param last_values: values of the observations after the last step, shape ``(n_envs,)``
        """
        assert self._last_episode_starts is not None
        rollout_buffer.compute_returns_and_advantage(last_values=last_values, dones=self._last_episode_starts)

    def _acting_policy(self, *, step_by_step: bool = False) -> ActorCritic:
        """
        The policy that acts and evaluates the rollout, compiled if possible.

        :param step_by_step: whether each step must be evaluated when it is made
        """
        actor_critic = self._actor_critic()
        if isinstance(actor_critic, DirectActorCritic) and not actor_critic.is_pure:
            self._say_why_slow(
                f"{impurity(self.policy)}: set is_pure = True on a module that is pure. Otherwise each step must "
                "compute values and distributions too"
            )
        if self.torch_compile:
            check_can_compile(actor_critic, self.policy.optimizer)
        actor_critic.is_pure &= not (step_by_step or draws_noise(self.policy))
        if not self.torch_compile or not actor_critic.is_pure:
            return actor_critic
        direct = cast(DirectActorCritic, actor_critic)
        return CompiledActorCritic(
            direct, self._compiled, rollouts_vary=self._rollouts_vary, announce=self.verbose >= 1
        )

    def _actor_critic(self, *, for_update: bool = False) -> ActorCritic:
        """
        The policy behind the interface that rollouts and updates use. It is made for each rollout and each update,
        because a user may have replaced the policy.

        :param for_update: whether it is for an update, which may need no distribution parameters
        """
        self._check_family()
        reason = refusal(self.policy)
        if reason is None:
            return direct_actor_critic(
                self.policy,
                with_params=self._needs_old_params or not for_update,
                for_program=for_update and self.torch_compile,
            )
        if self._masks is not None:  # a callback has changed the policy, which could use masks before
            raise self._cannot_mask(reason)
        if has_memory(self.policy):
            raise construction.cannot_remember(self, reason)
        self._say_why_slow(f"{type(self.policy).__name__} {reason}: it acts and is trained through its own methods")
        return SB3ActorCritic(self.policy, with_params=self._needs_old_params)

    def _say_why_slow(self, reason: str) -> None:
        """With ``verbose``, print once why a slower way is taken."""
        if self.verbose >= 1 and not self._has_said_why_slow:
            print(f"{reason}, which is slower")
        self._has_said_why_slow = True

    def _minibatch_step(
        self,
        loss: Loss,
        parameters: Sequence[nn.Parameter],
        coefficients: Sequence[str] = (),
        pad_to: int | None = None,
        writes_into: nn.Module | None = None,
    ) -> MinibatchStep:
        """
        :param loss: a pure function to minimise
        :param parameters: the parameters of the policy to update
        :param coefficients: names of the coefficients of the loss; a compiled step is only for these names
        :param pad_to: size to which a compiled step pads the minibatches, for a loss that uses their mask
        :param writes_into: a module that the loss writes into, besides the policy's buffers
        :return: an object that makes a gradient step on a minibatch
        """
        actor_critic, optimizer = self._actor_critic(for_update=True), self.policy.optimizer
        if not self.torch_compile:
            return EagerStep(optimizer, parameters, partial(loss, actor_critic), self._reducer)
        check_can_compile(actor_critic, optimizer)  # a user may have replaced them
        settings = [(group.get("betas"), group.get("eps")) for group in optimizer.param_groups]
        key = (cache_key(self.policy), optimizer, tuple(settings), tuple(map(id, parameters)), tuple(coefficients))
        return self._compiled.get_or_make(
            "step",
            (*key, pad_to, self._reducer, constants_of(loss)),
            lambda: CompiledStep(
                cast(DirectActorCritic, actor_critic),
                optimizer,
                parameters,
                loss,
                self._reducer,
                pad_to=pad_to,
                writes_into=writes_into,
                announce=self.verbose >= 1,
            ),
        )

    def _chunks(self, n_samples: int, length: int = 1) -> Iterator[slice]:
        """
        Split a batch, to bound the memory that a pass through the networks takes.

        :param n_samples: number of samples in the batch
        :param length: length of its sequences
        """
        return chunks(n_samples, self.observation_space, length)

    def _update_learning_rate(self, optimizers: list[th.optim.Optimizer] | th.optim.Optimizer) -> None:
        super()._update_learning_rate(optimizers)  # which writes one number into every group
        if isinstance(self.policy, ActorCriticPolicy) and self.policy.critic_learning_rate is not None:
            learning_rate = self._current_value(self.policy.critic_learning_rate)
            self.policy.set_critic_learning_rate(learning_rate)
            self.logger.record("train/critic_learning_rate", learning_rate)

    def _project(self) -> None:
        """Put ``log_std`` back within its bounds; :meth:`train` calls this when it has changed the actor."""
        if isinstance(self.policy, ActorCriticPolicy):
            self.policy.project()

    def _log_ent_coef(self) -> None:
        self.logger.record("train/ent_coef", self._current_value(self.ent_coef))
