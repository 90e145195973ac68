"""REINFORCE (Williams 1992), with a choice of baselines."""

from __future__ import annotations

import math
import os
import warnings
from typing import Any, ClassVar, Literal, cast, get_args

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.buffers import RolloutBuffer as SB3RolloutBuffer
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.type_aliases import GymEnv, MaybeCallback, Schedule
from stable_baselines3.common.utils import explained_variance
from stable_baselines3.common.vec_env import VecEnv

from sb3_ppo_ext import losses
from sb3_ppo_ext.common.construction import ACTION_SPACES
from sb3_ppo_ext.common.processes import n_processes
from sb3_ppo_ext.common.regularized import RegularizedAlgorithm
from sb3_ppo_ext.common.rollout.actor_critic import ActorCritic
from sb3_ppo_ext.common.rollout.data import RolloutSamples
from sb3_ppo_ext.common.rollout.episode_buffer import DictEpisodeBuffer, EpisodeBuffer, EpisodeIndex
from sb3_ppo_ext.common.rollout.stop_rules import AfterEpisodes, StopRule
from sb3_ppo_ext.common.rollout.vec_envs import time_limit
from sb3_ppo_ext.common.update.all_episodes import AllEpisodes
from sb3_ppo_ext.common.update.critic import critic_loss, critic_parameters, fit_critic, update_statistics
from sb3_ppo_ext.common.update.reduce import average, concatenated
from sb3_ppo_ext.common.update.scores import add_up_gradients, score_statistics
from sb3_ppo_ext.common.update.step import clip_and_step, gradients_of, reached, use_fused_adam
from sb3_ppo_ext.common.validation import check_bool, check_int, check_one_of, check_real
from sb3_ppo_ext.losses import baselines

Returns = Literal["reward_to_go", "total"]
Baseline = Literal["none", "mean", "optimal", "leave_one_out", "value"]
DiscountFrom = Literal["present", "start"]

_FIRST_BUFFER_SIZE = 256  # it grows with the episodes
_MIN_EPISODE_LIMIT = 10_000


class REINFORCE(RegularizedAlgorithm):
    """
    Monte-Carlo policy gradient, "Simple Statistical Gradient-Following Algorithms for Connectionist Reinforcement
    Learning", Williams 1992, sections 4 and 5::

        gradient = 1/n sum over n episodes, sum over their steps t, of grad log pi(a_t|s_t) (G_t - b_t)

    Each batch of complete episodes gives one gradient step. The number of episodes is fixed *before* they run: with a
    fixed number of steps whose unfinished episodes are dropped, short episodes would be over-represented. An
    environment that has completed its episodes goes on stepping until the others have theirs. No environment is reset
    in the middle of an episode: if a batch ends there, the environment first plays this episode to its end, under the
    next policy. Such an episode does not count, because two policies have acted in it, and because the episodes that
    the end of a batch interrupts are longer than most. So one policy acts in all of each episode that counts, and the
    gradient is unbiased. The steps that do not count are added to ``num_timesteps``, but nothing is learnt from them
    and they are not in the episode statistics. Fewer environments make fewer such steps; one environment makes none.

    **Baselines.** ``b_t`` must not depend on the episode that it is subtracted in, or the estimate is biased. So
    "mean", "optimal" and "leave_one_out" are computed for each episode from the *other* episodes of the batch, which
    must have at least two; "value" comes from a critic that was fitted to earlier batches. (Fitting it does not change
    parameters that the actor depends on, such as a shared features extractor.)

    **Time limits.** An episode that a time limit ends counts as complete, and rewards after the limit count as 0. So
    the objective is the return *within* the limit. With ``baseline="value"`` and ``bootstrap_timeouts=True``, the
    critic's value of the final observation is added instead, as in SB3's algorithms.

    **gSDE** keeps its noise for many steps, so the actions of these steps depend on each other. As in SB3's algorithms,
    they are treated as independent draws, which is exact only with ``sde_sample_freq=1``.

    :param policy: "MlpPolicy", "CnnPolicy" or "MultiInputPolicy"; "MlpLstmPolicy", "CnnLstmPolicy" or
        "MultiInputLstmPolicy" for a policy with a memory; or a class
    :param env: an environment, a vector of environments, or the id of a registered environment
    :param learning_rate: a number or a schedule, such as "lin_1e-3"; see :class:`DualClipPPO`
    :param episodes_per_env: episodes per environment in a batch
    :param gamma: discount factor
    :param ent_coef: weight of the entropy of the policy, summed over the states of an episode; a number or a schedule
    :param max_grad_norm: largest norm of a gradient; a larger one is scaled down to it. The gradient is a sum over the
        steps of an episode, so long episodes usually exceed it; ``float("inf")`` keeps the estimate unbiased
    :param use_sde: whether to explore with gSDE (Box actions only)
    :param sde_sample_freq: steps after which gSDE draws a new noise matrix; -1: only at the start of each batch
    :param normalize_advantage: whether to normalise ``G_t - b_t`` over the samples of a batch (no longer unbiased)
    :param stats_window_size: episodes over which the rollout statistics are averaged
    :param tensorboard_log: folder of the TensorBoard logs; None: no such logs
    :param policy_kwargs: arguments for the policy. Besides those of Stable-Baselines3's policies there are
        ``critic_learning_rate``, ``log_std_bounds`` and ``layer_norm``; see
        :class:`sb3_ppo_ext.common.policies.ActorCriticPolicy`
    :param verbose: 0: print nothing, 1: print information, 2: print details
    :param seed: seed of all random generators
    :param device: "cpu", "cuda" or "auto"
    :param _init_setup_model: whether to build the networks
    :param returns: "reward_to_go": G_t is the return from step t on; "total": G_t is the return of the whole episode
    :param baseline: "none"; "mean": mean of the returns at all steps of the other episodes; "optimal": the constant of
        least variance, estimated from the other episodes; "leave_one_out": mean over the other episodes of their return
        at the same step, or of their total return; "value": a learned value function
    :param discount_from: "present": the reward-to-go of step t is discounted from step t on, as is usual in practice;
        "start": the term of step t is also multiplied by ``gamma**t``, as in the derivation for the discounted return.
        A total return is always discounted from the start
    :param bootstrap_timeouts: see above; only with ``baseline="value"``
    :param n_critic_updates: passes of the critic over a batch, with ``baseline="value"``
    :param batch_size: samples in a minibatch of the critic, with ``baseline="value"``
    :param max_episode_steps: a longer episode is an error, because it seems never to end. None: as many steps as
        ``total_timesteps`` of ``learn`` gives each environment, because a longer episode could not be completed within
        them; but at least 10,000, for scripts that call ``learn`` for a few steps at a time, and at least the time
        limit that an environment was registered or made with
    :param torch_compile: whether to compile the actor, the evaluation of a batch and, with ``baseline="value"``, the
        gradient step of the critic, whose minibatches are padded to ``batch_size``. It needs the Adam optimiser and a
        policy that overrides none of SB3's methods
    :param sequence_length: for a policy with a memory, the number of steps that gradients go back in time; it must
        divide ``batch_size``. None: its largest divisor up to 16
    :param reference_policy: a frozen policy to stay close to, see :class:`DualClipPPO`
    :param reference_kl_coef: weight of the penalty on KL(pi || pi_ref), see :class:`DualClipPPO`
    :param reference_kl: "reward" or "loss", where that penalty is applied, see :class:`DualClipPPO`
    :raises ValueError: if an argument is out of range or contradicts another, or if an episode never ends
    """

    _rollouts_vary: ClassVar[bool] = True

    def __init__(
        self,
        policy: str | type[ActorCriticPolicy],
        env: GymEnv | str,
        learning_rate: float | str | Schedule = 1e-3,
        episodes_per_env: int = 8,
        gamma: float = 0.99,
        ent_coef: float | str | Schedule = 0.0,
        max_grad_norm: float = 0.5,
        use_sde: bool = False,
        sde_sample_freq: int = -1,
        normalize_advantage: bool = False,
        stats_window_size: int = 100,
        tensorboard_log: str | None = None,
        policy_kwargs: dict[str, Any] | None = None,
        verbose: int = 0,
        seed: int | None = None,
        device: th.device | str = "auto",
        _init_setup_model: bool = True,
        *,
        returns: Returns = "reward_to_go",
        baseline: Baseline = "none",
        discount_from: DiscountFrom = "present",
        bootstrap_timeouts: bool = False,
        n_critic_updates: int = 10,
        batch_size: int = 128,
        max_episode_steps: int | None = None,
        torch_compile: bool = False,
        sequence_length: int | None = None,
        reference_policy: ActorCriticPolicy | str | os.PathLike[str] | None = None,
        reference_kl_coef: float | str | Schedule | dict[str, Any] = 0.1,
        reference_kl: Literal["reward", "loss"] = "reward",
    ) -> None:
        super().__init__(
            policy,
            env,
            learning_rate=learning_rate,
            n_steps=_FIRST_BUFFER_SIZE,
            gamma=gamma,
            gae_lambda=1.0,  # the buffer's returns are then the Monte-Carlo returns
            ent_coef=ent_coef,
            vf_coef=1.0,  # the critic has a loss of its own
            max_grad_norm=max_grad_norm,
            use_sde=use_sde,
            sde_sample_freq=sde_sample_freq,
            stats_window_size=stats_window_size,
            tensorboard_log=tensorboard_log,
            policy_kwargs=policy_kwargs,
            verbose=verbose,
            seed=seed,
            device=device,
            _init_setup_model=False,
            supported_action_spaces=ACTION_SPACES,
            reference_policy=reference_policy,
            reference_kl_coef=reference_kl_coef,
            reference_kl=reference_kl,
        )
        self.episodes_per_env = episodes_per_env
        self.normalize_advantage = normalize_advantage
        self.returns = returns
        self.baseline = baseline
        self.discount_from = discount_from
        self.bootstrap_timeouts = bootstrap_timeouts
        self.n_critic_updates = n_critic_updates
        self.batch_size = batch_size
        self.max_episode_steps = max_episode_steps
        self.torch_compile = torch_compile
        self.sequence_length = sequence_length
        if _init_setup_model:
            self._setup_new_model()

    @property
    def _n_episodes(self) -> int:
        """Number of episodes in a batch."""
        return self.n_envs * self.episodes_per_env

    def _validate(self) -> None:
        super()._validate()
        check_int("episodes_per_env", self.episodes_per_env, minimum=1)
        check_real("max_grad_norm", self.max_grad_norm, above=0.0, finite=False)
        check_bool("normalize_advantage", self.normalize_advantage)
        check_one_of("returns", self.returns, get_args(Returns))
        check_one_of("baseline", self.baseline, get_args(Baseline))
        check_one_of("discount_from", self.discount_from, get_args(DiscountFrom))
        check_bool("bootstrap_timeouts", self.bootstrap_timeouts)
        check_int("n_critic_updates", self.n_critic_updates, minimum=1)
        check_int("batch_size", self.batch_size, minimum=1)
        if self.max_episode_steps is not None:
            check_int("max_episode_steps", self.max_episode_steps, minimum=1)
        if self.bootstrap_timeouts and self.baseline != "value":
            raise ValueError(
                f"bootstrap_timeouts=True with baseline={self.baseline!r} is not allowed: only baseline='value' learns "
                "values to bootstrap with"
            )

    def _check_can_learn(self) -> None:
        super()._check_can_learn()
        of_others = self.baseline in ("mean", "optimal", "leave_one_out") and self.env is not None
        if of_others and self._n_episodes * n_processes() < 2:
            raise ValueError(
                f"episodes_per_env={self.episodes_per_env} with {self.n_envs} environment(s) is not allowed with "
                f"baseline={self.baseline!r}, which is computed from the other episodes: a batch needs at least two"
            )

    def _setup_model(self) -> None:
        is_dict = isinstance(getattr(self, "observation_space", None), spaces.Dict)
        self.rollout_buffer_class = DictEpisodeBuffer if is_dict else EpisodeBuffer
        super()._setup_model()

    def _setup_learn(
        self, total_timesteps: int, callback: MaybeCallback = None, *args: Any, **kwargs: Any
    ) -> tuple[int, BaseCallback]:
        result = super()._setup_learn(total_timesteps, callback, *args, **kwargs)
        assert self.env is not None
        self._episode_limit = self.max_episode_steps or max(
            math.ceil(total_timesteps / self.n_envs), _MIN_EPISODE_LIMIT, time_limit(self.env)
        )
        return result

    def collect_rollouts(
        self,
        env: VecEnv,
        callback: BaseCallback,
        rollout_buffer: SB3RolloutBuffer,
        n_rollout_steps: int,
        *,
        stop: StopRule | None = None,
    ) -> bool:
        """
        Run ``episodes_per_env`` complete episodes in each environment.

        :param env: the training environment
        :param callback: called at each step, and at the beginning and the end of the rollout
        :param rollout_buffer: the buffer to fill
        :param n_rollout_steps: ignored, because the number of episodes is fixed
        :param stop: None; this algorithm has its own rule
        :return: whether all episodes were run; False if the callback ended the rollout
        """
        starts = cast(np.ndarray, self._last_episode_starts)
        assert stop is None
        if starts.all():
            self._episode_length = np.zeros(env.num_envs, dtype=np.int64)
        stop = AfterEpisodes(
            self.episodes_per_env,
            starts,
            self._episode_length,
            max_episode_steps=self._episode_limit,
            limit_in_words=self._limit_in_words(),
        )
        is_complete = is_stopped = False
        try:
            is_complete = super().collect_rollouts(env, callback, rollout_buffer, n_rollout_steps, stop=stop)
            is_stopped = not (is_complete or stop.is_closed)
        finally:
            if is_stopped:  # by the callback, after a step: the next learn() goes on after that step
                dones, state = callback.locals["dones"], callback.locals["next_state"]
                self._last_obs, self._last_episode_starts = callback.locals["new_obs"], dones
                self._last_state = None if state is None else state.cpu().numpy()
                stop.count(dones)
            elif not is_complete:  # the state of the environments is unknown: the next learn() resets them
                self._last_obs = None
        return is_complete

    def _limit_in_words(self) -> str:
        if self.max_episode_steps is not None:
            return f"max_episode_steps={self.max_episode_steps} steps"
        return (
            f"{self._episode_limit} steps, the limit of max_episode_steps=None with total_timesteps="
            f"{self._total_timesteps - self._num_timesteps_at_start} and {self.n_envs} environment(s)"
        )

    def train(self) -> None:
        """Update the policy from the episodes in the buffer: one step of the actor, then epochs of the critic."""
        self.policy.set_training_mode(False)  # as during the rollout, so that the probabilities are the same
        self._update_learning_rate(self.policy.optimizer)
        use_fused_adam(self.policy.optimizer)
        actor_critic = self._actor_critic()
        buffer = cast(EpisodeBuffer, self.rollout_buffer)
        rollout = buffer.flat()
        weights = self._weights(actor_critic, rollout, buffer.episode_index())
        if self._policy_step(actor_critic, rollout, weights):
            self._project()
            if self.baseline == "value":
                of_actor = [(p, p.grad) for p in self.policy.parameters() if p.grad is not None]
                self._fit_critic(actor_critic, buffer)
                for parameter, gradient in of_actor:
                    parameter.grad = gradient  # for logging by the user; the next update does not read it
            update_statistics(actor_critic, rollout.inputs, self.batch_size, self._reducer)
        else:
            warnings.warn("REINFORCE left the policy as it was in this update: non-finite gradient", stacklevel=2)
        self._follow_reference()
        self._n_updates += 1
        self.logger.record("train/n_updates", self._n_updates, exclude="tensorboard")
        if hasattr(self.policy, "log_std"):
            self.logger.record("train/std", self.policy.log_std.detach().exp().mean().item())

    def _weights(self, actor_critic: ActorCritic, rollout: RolloutSamples, index: EpisodeIndex) -> th.Tensor:
        """
        Weights of the samples' scores: the return minus the baseline, normalised and discounted if the user asks for
        it; 0 for samples that do not count. The baselines are computed from the episodes of all processes.

        :param index: episode, and step in it, of each sample that counts
        """
        n_episodes = self._n_episodes * self._reducer.n_processes
        returns, values, episode, step, is_own = AllEpisodes.of(rollout, index, self._n_episodes, self._reducer)
        discount = th.ones_like(returns)
        if self.returns == "total":
            totals = returns.new_zeros(n_episodes)
            totals[episode[step == 0]] = returns[step == 0]
            returns = totals[episode]
        elif self.discount_from == "start":
            discount = self.gamma ** step.to(returns.dtype)

        if self.baseline == "none":
            baseline = th.zeros_like(returns)
        elif self.baseline == "mean":
            baseline = baselines.mean_of_other_episodes(returns, episode, n_episodes)
        elif self.baseline == "optimal":
            statistics = score_statistics(
                actor_critic,
                rollout,
                rollout.scattered(index.episode, elsewhere=-1),
                rollout.scattered(returns[is_own]),
                rollout.scattered(discount[is_own]),
                parameters=[p for p in self.policy.parameters() if p.requires_grad],
                chunks=self._chunks,
            )
            baseline = baselines.optimal_of_other_episodes(*concatenated(self._reducer, *statistics))[episode]
        elif self.baseline == "leave_one_out" and self.returns == "total":  # one return per episode, whenever it ends
            baseline = ((totals.sum() - totals) / (n_episodes - 1))[episode]
        elif self.baseline == "leave_one_out":
            baseline = baselines.leave_one_out(returns, episode, step, n_episodes)
        else:
            baseline = values
        advantages = losses.masked_whiten(returns - baseline) if self.normalize_advantage else returns - baseline
        return rollout.scattered((discount * advantages)[is_own])

    def _policy_step(self, actor_critic: ActorCritic, rollout: RolloutSamples, weights: th.Tensor) -> bool:
        """
        One gradient step of the actor.

        :return: whether the gradient was finite; if not, the policy is unchanged
        """
        self.policy.optimizer.zero_grad()
        totals = add_up_gradients(
            actor_critic,
            rollout._replace(advantages=weights),
            self._n_episodes,
            ent_coef=self._current_value(self.ent_coef),
            reference_kl_coef=self._reference_coefficients().get("reference_kl_coef", 0.0),
            chunks=self._chunks,
        )
        parameters = list(self.policy.parameters())
        average(self._reducer, *gradients_of(parameters), totals)
        grad_norm = clip_and_step(self.policy.optimizer, parameters, max_grad_norm=self.max_grad_norm).item()
        self.logger.record("train/policy_gradient_loss", totals[0].item() / self._n_episodes)
        self.logger.record("train/entropy_loss", -(totals[1] / totals[2]).item())
        self.logger.record("train/grad_norm", grad_norm)
        self._log_ent_coef()
        return math.isfinite(grad_norm)

    def _fit_critic(self, actor_critic: ActorCritic, buffer: EpisodeBuffer) -> None:
        rollout = buffer.flat()
        one = rollout.rows(slice(0, 1))
        log_prob = actor_critic.evaluate_actor(one.inputs, one.actions).log_prob
        actor_parameters = reached(log_prob, self.policy.parameters())
        pad_to = max(1, self.batch_size // rollout.length)
        value_loss = fit_critic(
            self._minibatch_step(critic_loss, critic_parameters(self.policy, actor_parameters), pad_to=pad_to),
            self.policy,
            actor_parameters,
            buffer,
            n_epochs=self.n_critic_updates,
            batch_size=self.batch_size,
            reducer=self._reducer,
        )
        self.logger.record("train/value_loss", value_loss)
        values, returns = (rollout.counted(x).cpu().numpy() for x in (rollout.old_values, rollout.returns))
        self.logger.record("train/explained_variance", explained_variance(values, returns))
