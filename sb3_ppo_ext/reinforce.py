"""REINFORCE (Williams 1992), with the baselines of the field."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any, Literal, cast, get_args

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
from sb3_ppo_ext.common.actor_critic import ActorCritic
from sb3_ppo_ext.common.buffers import RolloutBuffer, RolloutSamples, obs_rows
from sb3_ppo_ext.common.critic import fit_critic, reached
from sb3_ppo_ext.common.episodes import DictEpisodeBuffer, EpisodeBuffer, EpisodeIndex
from sb3_ppo_ext.common.on_policy import ACTION_SPACES, OnPolicyAlgorithm
from sb3_ppo_ext.common.optimization import clip_and_step, use_fused_adam
from sb3_ppo_ext.common.validation import check_bool, check_int, check_one_of, check_real

if TYPE_CHECKING:
    from typing_extensions import Self

Returns = Literal["reward_to_go", "total"]
Baseline = Literal["none", "mean", "optimal", "leave_one_out", "value"]
DiscountFrom = Literal["present", "start"]

_FIRST_BUFFER_SIZE = 256  # it grows with the episodes


def mean_of_other_episodes(returns: th.Tensor, episode: th.Tensor, n_episodes: int) -> th.Tensor:
    """
    For each sample, the mean of the returns at all steps of the other episodes.

    :param returns: shape ``(batch,)``
    :param episode: number of each sample's episode, shape ``(batch,)``
    :param n_episodes: at least 2
    :return: shape ``(batch,)``
    """
    sums, counts = returns.new_zeros(n_episodes), returns.new_zeros(n_episodes)
    sums.index_add_(0, episode, returns)
    counts.index_add_(0, episode, th.ones_like(returns))
    return ((sums.sum() - sums) / (counts.sum() - counts))[episode]


def leave_one_out(returns: th.Tensor, episode: th.Tensor, step: th.Tensor, n_episodes: int) -> th.Tensor:
    """
    For each sample, the mean over the other episodes of their return at the same step. An episode that has ended by
    then counts with the return 0 that it would have had there: Kool et al. 2019, "Buy 4 REINFORCE Samples, Get a
    Baseline for Free!", section 3.1, at every step.

    :param returns: shape ``(batch,)``
    :param episode: number of each sample's episode, shape ``(batch,)``
    :param step: number of the step in its episode, shape ``(batch,)``
    :param n_episodes: at least 2
    :return: shape ``(batch,)``
    """
    sums = returns.new_zeros(int(step.max()) + 1)
    sums.index_add_(0, step, returns)
    return (sums[step] - returns) / (n_episodes - 1)


def optimal_of_other_episodes(score_dot_gradient: th.Tensor, score_square: th.Tensor) -> th.Tensor:
    """
    For each episode, the constant that minimises the variance of the gradient estimate, ``b* = E[S'g] / E[S'S]`` with S
    the sum of the episode's scores and g of its scores times returns, estimated from the other episodes; Peters &
    Schaal 2008, "Reinforcement learning of motor skills with policy gradients", section 3.2.

    :param score_dot_gradient: ``S'g`` of each episode, shape ``(n_episodes,)``
    :param score_square: ``S'S`` of each episode, shape ``(n_episodes,)``
    :return: shape ``(n_episodes,)``; 0 where the other episodes have no score
    """
    numerator = score_dot_gradient.sum() - score_dot_gradient
    denominator = score_square.sum() - score_square
    return th.where(denominator > 0, numerator / denominator.clamp(min=1e-30), th.zeros_like(numerator))


class REINFORCE(OnPolicyAlgorithm):
    """
    Monte-Carlo policy gradient, "Simple Statistical Gradient-Following Algorithms for Connectionist Reinforcement
    Learning", Williams 1992, section 4::

        gradient = 1/n sum over n episodes, sum over their steps t, of grad log pi(a_t|s_t) (G_t - b_t)

    One gradient step for each batch of complete episodes. Their number is fixed *before* they are run: with a fixed
    number of steps whose unfinished tail is dropped, short episodes would be over-represented. An environment that is
    done with its episodes waits for the others, stepping on; those steps count as time steps, and are not learnt from.

    **Baselines.** ``b_t`` must not depend on the episode it is subtracted in, or the estimate is biased. So "mean",
    "optimal" and "leave_one_out" are computed for each episode from the *other* episodes of the batch, which must have
    at least two; "value" comes from a critic that was fitted to earlier batches.

    **Time limits.** An episode that a time limit ends counts as complete: what it would have earned after the limit
    counts as nothing, which makes the objective the return *within* the limit. With ``baseline="value"`` and
    ``bootstrap_timeouts=True`` the critic's value of the final observation is added instead, as SB3's algorithms do.

    :param policy: "MlpPolicy", "CnnPolicy", "MultiInputPolicy", or a class
    :param env: an environment, a vector of them, or the id of a registered one
    :param learning_rate: a number, a schedule, or the RL Zoo's string such as "lin_1e-3"
    :param episodes_per_env: episodes of each environment in a batch
    :param gamma: discount factor
    :param ent_coef: weight of the entropy, added to the reward of each step
    :param max_grad_norm: largest norm of a gradient
    :param use_sde: whether to explore by gSDE (Box actions only)
    :param sde_sample_freq: steps between two noise matrices of gSDE; -1: one a batch
    :param normalize_advantage: whether to normalise ``G_t - b_t`` over the batch (no longer unbiased)
    :param stats_window_size: episodes over which the rollout statistics are averaged
    :param tensorboard_log: where to log for TensorBoard; None: nowhere
    :param policy_kwargs: arguments for the policy
    :param verbose: 0 silent, 1 information, 2 details
    :param seed: of all random generators
    :param device: "cpu", "cuda" or "auto"
    :param _init_setup_model: whether to build the networks
    :param returns: "reward_to_go": G_t is what is earned from step t on; "total": in the whole episode
    :param baseline: "none"; "mean": mean of the returns of the other episodes; "optimal": the constant of least
        variance; "leave_one_out": mean over the other episodes at the same step; "value": a learned value function
    :param discount_from: "present": the reward-to-go of step t is discounted from t on, as practice has it; "start":
        the term of step t is discounted by ``gamma**t`` too, as the derivation for the discounted return has it. A
        total return is discounted from the start.
    :param bootstrap_timeouts: see above; only with ``baseline="value"``
    :param n_critic_updates: passes of the critic over a batch, with ``baseline="value"``
    :param batch_size: samples in a minibatch of the critic, with ``baseline="value"``
    :param max_episode_steps: an episode that is longer is taken for one that never ends, which is an error
    :raises ValueError: for an argument that is out of range or contradicts another, and for an episode that never ends
    """

    def __init__(
        self,
        policy: str | type[ActorCriticPolicy],
        env: GymEnv | str,
        learning_rate: float | str | Schedule = 1e-3,
        episodes_per_env: int = 8,
        gamma: float = 0.99,
        ent_coef: float = 0.0,
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
        max_episode_steps: int = 100_000,
    ) -> None:
        super().__init__(
            policy,
            env,
            learning_rate=learning_rate,  # type: ignore[arg-type]  # _validate turns a string into a schedule
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
        if _init_setup_model:
            self._setup_model()

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
        check_int("max_episode_steps", self.max_episode_steps, minimum=1)
        if self.bootstrap_timeouts and self.baseline != "value":
            raise ValueError(
                f"bootstrap_timeouts=True with baseline={self.baseline!r} is not allowed: only baseline='value' learns "
                "a value to bootstrap with"
            )
        needs_others = self.baseline in ("mean", "optimal", "leave_one_out")
        if needs_others and self.env is not None and self.episodes_per_env * self.n_envs < 2:
            raise ValueError(
                f"episodes_per_env={self.episodes_per_env} with {self.n_envs} environment(s) is not allowed with "
                f"baseline={self.baseline!r}: it is computed from the other episodes, so a batch needs at least two"
            )

    def _setup_model(self) -> None:
        is_dict = isinstance(self.observation_space, spaces.Dict)
        self.rollout_buffer_class = DictEpisodeBuffer if is_dict else EpisodeBuffer
        super()._setup_model()

    def collect_rollouts(
        self, env: VecEnv, callback: BaseCallback, rollout_buffer: SB3RolloutBuffer, n_rollout_steps: int
    ) -> bool:
        """
        Run ``episodes_per_env`` complete episodes in each environment.

        :param env: the training environment
        :param callback: called at each step, and at the beginning and the end of the rollout
        :param rollout_buffer: to fill
        :param n_rollout_steps: not looked at: the episodes decide
        :return: whether all episodes were run; False if the callback ended the rollout
        """
        assert self._last_episode_starts is not None
        if not self._last_episode_starts.all():  # an episode that another policy began does not count
            self._last_obs = env.reset()  # type: ignore[assignment]
            self._last_episode_starts = np.ones(env.num_envs, dtype=bool)
        self._episodes_run = np.zeros(env.num_envs, dtype=np.int64)
        self._episode_length = np.zeros(env.num_envs, dtype=np.int64)
        return super().collect_rollouts(env, callback, rollout_buffer, n_rollout_steps)

    def _rollout_is_complete(self, n_steps: int, n_rollout_steps: int, dones: np.ndarray) -> bool:
        self._episode_length = np.where(dones, 0, self._episode_length + 1)
        self._episodes_run += dones
        running = self._episodes_run < self.episodes_per_env
        if (self._episode_length[running] >= self.max_episode_steps).any():
            raise ValueError(
                f"An episode has not ended within max_episode_steps={self.max_episode_steps} steps. REINFORCE learns "
                "from complete episodes: give the environment a time limit (gymnasium.wrappers.TimeLimit, or "
                "gymnasium.make(..., max_episode_steps=...)), or raise max_episode_steps if they are that long"
            )
        if running.any():
            return False
        cast(EpisodeBuffer, self.rollout_buffer).close(self.episodes_per_env)
        return True

    def _bootstrap_timeouts(
        self, actor_critic: ActorCritic, rollout_buffer: RolloutBuffer, timeouts: list[tuple[int, int, Any]]
    ) -> None:
        if self.bootstrap_timeouts:
            super()._bootstrap_timeouts(actor_critic, rollout_buffer, timeouts)

    def _excluded_save_params(self) -> list[str]:
        return [*super()._excluded_save_params(), "_episodes_run", "_episode_length"]

    def train(self) -> None:
        """Update the policy from the episodes in the buffer: one step of the actor, then epochs of the critic."""
        self.policy.set_training_mode(True)
        self._update_learning_rate(self.policy.optimizer)
        use_fused_adam(self.policy.optimizer)
        actor_critic = self._actor_critic()
        buffer = cast(EpisodeBuffer, self.rollout_buffer)
        rollout, index = buffer.flat(), buffer.episode_index()

        weights = self._weights(actor_critic, rollout, index)
        if self.normalize_advantage and len(weights) > 1:
            weights = (weights - weights.mean()) / (weights.std() + 1e-8)
        if bool(weights.isfinite().all()):
            self._policy_step(actor_critic, rollout, weights)
            if self.baseline == "value":
                self._fit_critic(actor_critic, buffer)
        else:
            warnings.warn("REINFORCE left the policy as it was in this update: a return is not finite", stacklevel=2)

        self._n_updates += 1
        self.logger.record("train/n_updates", self._n_updates, exclude="tensorboard")
        if hasattr(self.policy, "log_std"):
            self.logger.record("train/std", self.policy.log_std.detach().exp().mean().item())

    def _weights(self, actor_critic: ActorCritic, rollout: RolloutSamples, index: EpisodeIndex) -> th.Tensor:
        """
        What the score of each sample is multiplied by: the return less the baseline, discounted if asked for.

        :param actor_critic: the policy
        :param rollout: all samples
        :param index: where in its episode each is
        :return: shape ``(batch,)``
        """
        n_episodes = self.n_envs * self.episodes_per_env
        returns = rollout.returns
        if self.returns == "total":
            totals = returns.new_zeros(n_episodes)
            is_first = index.step == 0
            totals[index.episode[is_first]] = returns[is_first]
            returns = totals[index.episode]
        discount = th.ones_like(returns)
        if self.returns == "reward_to_go" and self.discount_from == "start":
            discount = self.gamma ** index.step.to(returns.dtype)

        if self.baseline == "none":
            baseline = th.zeros_like(returns)
        elif self.baseline == "mean":
            baseline = mean_of_other_episodes(returns, index.episode, n_episodes)
        elif self.baseline == "leave_one_out":
            if self.returns == "total":  # one return an episode, whenever it ends
                baseline = ((totals.sum() - totals) / (n_episodes - 1))[index.episode]
            else:
                baseline = leave_one_out(returns, index.episode, index.step, n_episodes)
        elif self.baseline == "optimal":
            statistics = self._score_statistics(actor_critic, rollout, index.episode, returns, discount, n_episodes)
            baseline = optimal_of_other_episodes(*statistics)[index.episode]
        else:
            baseline = rollout.old_values
        return discount * (returns - baseline)

    def _score_statistics(
        self,
        actor_critic: ActorCritic,
        rollout: RolloutSamples,
        episode: th.Tensor,
        returns: th.Tensor,
        discount: th.Tensor,
        n_episodes: int,
    ) -> tuple[th.Tensor, th.Tensor]:
        """
        ``S'g`` and ``S'S`` of each episode, S being the gradient of the sum of its (discounted) log-probabilities, and
        g of the same weighted by its returns: two backward passes an episode.

        :return: two tensors of shape ``(n_episodes,)``
        """
        parameters = [p for p in self.policy.parameters() if p.requires_grad]
        score_dot_gradient, score_square = returns.new_zeros(n_episodes), returns.new_zeros(n_episodes)
        for i in range(n_episodes):
            rows = (episode == i).nonzero().flatten()
            params = actor_critic.params(obs_rows(rollout.observations, rows))
            log_prob = discount[rows] * self._family.log_prob(params, rollout.actions[rows])
            scores = th.autograd.grad(log_prob.sum(), parameters, retain_graph=True, allow_unused=True)
            gradients = th.autograd.grad((log_prob * returns[rows]).sum(), parameters, allow_unused=True)
            for score, gradient in zip(scores, gradients, strict=True):
                if score is not None and gradient is not None:
                    score_dot_gradient[i] += (score * gradient).sum()
                    score_square[i] += score.square().sum()
        return score_dot_gradient, score_square

    def _policy_step(self, actor_critic: ActorCritic, rollout: RolloutSamples, weights: th.Tensor) -> None:
        """One gradient step of the actor. The graph of one chunk lives at a time; their gradients add up."""
        n_episodes = self.n_envs * self.episodes_per_env
        policy_loss = th.zeros((), device=weights.device)
        entropy_sum = th.zeros((), device=weights.device)
        self.policy.optimizer.zero_grad()
        for rows in self._chunks(len(weights)):
            params = actor_critic.params(obs_rows(rollout.observations, rows))
            log_prob = self._family.log_prob(params, rollout.actions[rows])
            entropy = self._family.entropy(params)
            if entropy is None:
                entropy = -log_prob
            chunk_loss = losses.reinforce_loss(log_prob, weights[rows]).sum() / n_episodes
            loss = chunk_loss - self.ent_coef * entropy.sum() / n_episodes
            loss.backward()  # type: ignore[no-untyped-call]
            policy_loss += chunk_loss.detach()
            entropy_sum += entropy.detach().sum()
        grad_norm = clip_and_step(
            self.policy.optimizer, list(self.policy.parameters()), max_grad_norm=self.max_grad_norm
        )
        self.logger.record("train/policy_gradient_loss", policy_loss.item())
        self.logger.record("train/entropy_loss", -entropy_sum.item() / len(weights))
        self.logger.record("train/grad_norm", grad_norm.item())

    def _fit_critic(self, actor_critic: ActorCritic, buffer: EpisodeBuffer) -> None:
        rollout = buffer.flat()
        first = obs_rows(rollout.observations, slice(0, 2))
        value_losses = fit_critic(
            actor_critic,
            buffer,
            self.policy.optimizer,
            reached(actor_critic.params(first), self.policy.parameters()),
            n_epochs=self.n_critic_updates,
            batch_size=self.batch_size,
        )
        self.logger.record("train/value_loss", th.stack(value_losses).mean().item())
        explained = explained_variance(rollout.old_values.cpu().numpy(), rollout.returns.cpu().numpy())
        self.logger.record("train/explained_variance", explained)

    def learn(
        self,
        total_timesteps: int,
        callback: MaybeCallback = None,
        log_interval: int = 1,
        tb_log_name: str = "REINFORCE",
        reset_num_timesteps: bool = True,
        progress_bar: bool = False,
    ) -> Self:
        return super().learn(
            total_timesteps=total_timesteps,
            callback=callback,
            log_interval=log_interval,
            tb_log_name=tb_log_name,
            reset_num_timesteps=reset_num_timesteps,
            progress_bar=progress_bar,
        )
