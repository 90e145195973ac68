"""Trust region policy optimisation (Schulman et al. 2015)."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable
from typing import Any, ClassVar, Literal, cast

import torch as th
from gymnasium import spaces
from stable_baselines3.common.buffers import RolloutBuffer as SB3RolloutBuffer
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.type_aliases import GymEnv, Schedule
from stable_baselines3.common.utils import explained_variance
from torch import nn

from sb3_ppo_ext.common.compile.policy_programs import CompiledFisherVectorProduct
from sb3_ppo_ext.common.compile.support import cache_key
from sb3_ppo_ext.common.construction import ACTION_SPACES
from sb3_ppo_ext.common.distributions import Family
from sb3_ppo_ext.common.errors import ArgumentError
from sb3_ppo_ext.common.regularized import RegularizedAlgorithm
from sb3_ppo_ext.common.rollout.actor_critic import ActorCritic, DirectActorCritic
from sb3_ppo_ext.common.rollout.buffers import RolloutBuffer, size_to_pad_to, values_and_returns
from sb3_ppo_ext.common.rollout.data import RolloutSamples
from sb3_ppo_ext.common.rollout.transitions import resets_take_steps
from sb3_ppo_ext.common.saving.interchange import whole_action_values
from sb3_ppo_ext.common.spaces import TARGET_KL_PER_DIMENSION, n_action_dims
from sb3_ppo_ext.common.update.critic import critic_loss, critic_parameters, fit_critic, update_statistics
from sb3_ppo_ext.common.update.fisher import fisher_vector_product
from sb3_ppo_ext.common.update.reduce import average, averaged
from sb3_ppo_ext.common.update.samplers import normalized_over_processes
from sb3_ppo_ext.common.update.surrogate import PolicyStep, Surrogate
from sb3_ppo_ext.common.validation import as_schedule, check_bool, check_int, check_real
from sb3_ppo_ext.numerics import backtracking_line_search, conjugate_gradient, unflatten_like

CG_DAMPING_PER_DIMENSION = 0.1

_OF_CONTRIB = "sb3_contrib.TRPO"


class TRPO(RegularizedAlgorithm):
    """
    Trust region policy optimisation, Schulman et al. 2015, arXiv 1502.05477, section 6 and appendix C.

    Maximises the surrogate ``L(theta) = E[r A]`` with ``r = pi(a|s) / pi_old(a|s)``, subject to
    ``E[KL(old || new)] <= target_kl``. Let g be the gradient of L and F the Fisher information of the policy. Conjugate
    gradient solves ``(F + cg_damping I) x = g``. The step is ``sqrt(2 target_kl / x'g) x``; a line search shortens it
    until the constraint holds and L improves by at least ``accept_ratio`` of what g predicts for that length. Then the
    critic is fitted to the returns, without changing parameters that the actor depends on.

    ``target_kl`` is the KL divergence of the whole action, and ``cg_damping`` is added to the true Fisher matrix.
    sb3-contrib averages both over the action dimensions (except for MultiDiscrete). To convert its numbers, multiply
    them by the number of dimensions; :meth:`load` does so for a model of sb3-contrib.

    The policy's step is made in evaluation mode (dropout off, batch statistics fixed), because the trust region is
    around the policy that collected the rollout. Layers that update statistics in training mode (batch normalisation, a
    running normaliser) see the rollout once, after the step.

    The arguments up to ``_init_setup_model`` are in the order of :class:`sb3_contrib.TRPO`.

    :param policy: "MlpPolicy", "CnnPolicy" or "MultiInputPolicy"; "MlpLstmPolicy", "CnnLstmPolicy" or
        "MultiInputLstmPolicy" for a policy with a memory; or a class
    :param env: an environment, a vector of environments, or the id of a registered environment
    :param learning_rate: learning rate of the critic; a number or a schedule, such as "lin_1e-3"; see
        :class:`DualClipPPO`
    :param n_steps: steps per environment in a rollout
    :param batch_size: samples in a minibatch of the critic
    :param gamma: discount factor
    :param cg_max_steps: largest number of steps of conjugate gradient
    :param cg_damping: multiple of the identity that is added to F; None: 0.1 for each action dimension
    :param line_search_shrinking_factor: factor by which the line search shortens the step after each failed try
    :param line_search_max_iter: largest number of step lengths that the line search tries
    :param n_critic_updates: passes of the critic over a rollout
    :param gae_lambda: trade-off between bias and variance of the advantages
    :param use_sde: whether to explore with gSDE (Box actions only)
    :param sde_sample_freq: steps after which gSDE draws a new noise matrix; -1: only at the start of each rollout
    :param rollout_buffer_class: a subclass of :class:`sb3_ppo_ext.common.buffers.RolloutBuffer`
    :param rollout_buffer_kwargs: further arguments for the buffer
    :param normalize_advantage: whether to normalise the advantages of a rollout
    :param target_kl: largest mean KL(old || new) of the whole action; a number or a schedule; None: 0.01 for each
        action dimension
    :param sub_sampling_factor: n: use every n-th sample in the products with F. The gradient and the line search use
        all samples; in sb3-contrib, they use every n-th sample too
    :param stats_window_size: episodes over which the rollout statistics are averaged
    :param tensorboard_log: folder of the TensorBoard logs; None: no such logs
    :param policy_kwargs: arguments for the policy. Besides those of Stable-Baselines3's policies there are
        ``critic_learning_rate``, ``log_std_bounds`` and ``layer_norm``; see
        :class:`sb3_ppo_ext.common.policies.ActorCriticPolicy`
    :param verbose: 0: print nothing, 1: print information, 2: print details
    :param seed: seed of all random generators
    :param device: "cpu", "cuda" or "auto"
    :param _init_setup_model: whether to build the networks
    :param cg_residual_tol: relative residual ``|g - (F + cg_damping I) x| / |g|`` at which conjugate gradient stops
    :param accept_ratio: smallest share of the predicted improvement that a step must make
    :param ent_coef: weight of the entropy in the objective; a number or a schedule
    :param torch_compile: whether to compile the products with F, the gradient step of the critic, the actor and the
        evaluation of a rollout, see :class:`DualClipPPO`
    :param sequence_length: for a policy with a memory, the number of steps that gradients go back in time; it must
        divide ``n_steps`` and ``batch_size``. None: their largest common divisor up to 16
    :param fvp_subsampling: the old name of ``sub_sampling_factor``
    :param reference_policy: a frozen policy to stay close to, see :class:`DualClipPPO`
    :param reference_kl_coef: weight of the penalty on KL(pi || pi_ref), see :class:`DualClipPPO`
    :param reference_kl: "reward" or "loss", where that penalty is applied, see :class:`DualClipPPO`
    :raises ValueError: if an argument is out of range or contradicts another
    """

    _needs_old_params = True
    _loads_files_of: ClassVar[tuple[str, ...]] = (_OF_CONTRIB,)
    _none_is_default: ClassVar[tuple[str, ...]] = ("target_kl", "cg_damping")

    def __init__(
        self,
        policy: str | type[ActorCriticPolicy],
        env: GymEnv | str,
        learning_rate: float | str | Schedule = 1e-3,
        n_steps: int = 2048,
        batch_size: int = 128,
        gamma: float = 0.99,
        cg_max_steps: int = 15,
        cg_damping: float | None = None,
        line_search_shrinking_factor: float = 0.8,
        line_search_max_iter: int = 10,
        n_critic_updates: int = 10,
        gae_lambda: float = 0.95,
        use_sde: bool = False,
        sde_sample_freq: int = -1,
        rollout_buffer_class: type[SB3RolloutBuffer] | None = None,
        rollout_buffer_kwargs: dict[str, Any] | None = None,
        normalize_advantage: bool = True,
        target_kl: float | str | Schedule | None = None,
        sub_sampling_factor: int = 1,
        stats_window_size: int = 100,
        tensorboard_log: str | None = None,
        policy_kwargs: dict[str, Any] | None = None,
        verbose: int = 0,
        seed: int | None = None,
        device: th.device | str = "auto",
        _init_setup_model: bool = True,
        *,
        cg_residual_tol: float = 1e-6,
        accept_ratio: float = 0.1,
        ent_coef: float | str | Schedule = 0.0,
        torch_compile: bool = False,
        sequence_length: int | None = None,
        fvp_subsampling: int | None = None,
        reference_policy: ActorCriticPolicy | str | os.PathLike[str] | None = None,
        reference_kl_coef: float | str | Schedule | dict[str, Any] = 0.1,
        reference_kl: Literal["reward", "loss"] = "reward",
    ) -> None:
        if fvp_subsampling is not None:
            if sub_sampling_factor != 1:
                raise ArgumentError(
                    f"fvp_subsampling={fvp_subsampling!r} with sub_sampling_factor={sub_sampling_factor!r} is not "
                    "allowed: the first is the old name of the second; give only sub_sampling_factor"
                )
            warnings.warn("fvp_subsampling is an old name: write sub_sampling_factor", FutureWarning, stacklevel=2)
            sub_sampling_factor = fvp_subsampling
        super().__init__(
            policy,
            env,
            learning_rate=learning_rate,
            n_steps=n_steps,
            gamma=gamma,
            gae_lambda=gae_lambda,
            ent_coef=ent_coef,
            vf_coef=1.0,  # the critic has a loss of its own
            max_grad_norm=math.inf,
            use_sde=use_sde,
            sde_sample_freq=sde_sample_freq,
            rollout_buffer_class=rollout_buffer_class,
            rollout_buffer_kwargs=rollout_buffer_kwargs,
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
        self.batch_size = batch_size
        self.cg_max_steps = cg_max_steps
        self.cg_damping = cg_damping
        self.cg_residual_tol = cg_residual_tol
        self.line_search_shrinking_factor = line_search_shrinking_factor
        self.line_search_max_iter = line_search_max_iter
        self.accept_ratio = accept_ratio
        self.n_critic_updates = n_critic_updates
        self.normalize_advantage = normalize_advantage
        self.target_kl = target_kl
        self.sub_sampling_factor = sub_sampling_factor
        self.torch_compile = torch_compile
        self.sequence_length = sequence_length
        if _init_setup_model:
            self._setup_new_model()

    def _validate(self) -> None:
        if "fvp_subsampling" in vars(self):  # from an older file
            self.sub_sampling_factor = vars(self).pop("fvp_subsampling")
        super()._validate()
        check_int("batch_size", self.batch_size, minimum=1)
        check_int("cg_max_steps", self.cg_max_steps, minimum=1)
        check_real("cg_residual_tol", self.cg_residual_tol, at_least=0.0)
        if self.cg_damping is not None:
            check_real("cg_damping", self.cg_damping, at_least=0.0)
        check_real("line_search_shrinking_factor", self.line_search_shrinking_factor, above=0.0, below=1.0)
        check_int("line_search_max_iter", self.line_search_max_iter, minimum=1)
        check_real("accept_ratio", self.accept_ratio, at_least=0.0, below=1.0)
        check_int("n_critic_updates", self.n_critic_updates, minimum=1)
        check_int("sub_sampling_factor", self.sub_sampling_factor, minimum=1)
        check_bool("normalize_advantage", self.normalize_advantage)
        if self.target_kl is not None:
            as_schedule("target_kl", self.target_kl)

    def _setup_new_model(self) -> None:
        super()._setup_new_model()
        self._check_rollout_size(self.batch_size, self.normalize_advantage)
        if self.verbose >= 1:
            target_kl = self._whole_action_value(self.target_kl, TARGET_KL_PER_DIMENSION)
            cg_damping = self._whole_action_value(self.cg_damping, CG_DAMPING_PER_DIMENSION)
            print(
                f"target_kl={target_kl:g}, cg_damping={cg_damping:g}, for the whole action of "
                f"{n_action_dims(self.action_space)} dimension(s)"
            )

    @classmethod
    def _adapted(cls, origin: str, attributes: dict[str, Any]) -> dict[str, Any]:
        adapted = super()._adapted(origin, attributes)
        return adapted | whole_action_values(attributes) if origin == _OF_CONTRIB else adapted

    def _check_can_learn(self) -> None:
        super()._check_can_learn()
        if self.torch_compile and self.env is not None and resets_take_steps(self.env):
            raise ArgumentError(
                f"torch_compile=True is not allowed with env={self.env.unwrapped!r:.100}, some of whose steps do not "
                "count (autoreset_mode NEXT_STEP): the Fisher product would be compiled again for each rollout"
            )

    def train(self) -> None:
        """Update the policy from the rollout in the buffer: one step of the actor, then epochs of the critic."""
        self._check_old_params()
        self._update_learning_rate(self.policy.optimizer)
        self.policy.set_training_mode(False)
        actor_critic = self._actor_critic()
        buffer = cast(RolloutBuffer, self.rollout_buffer)
        rollout = buffer.flat()
        if self.normalize_advantage:
            advantages = normalized_over_processes(rollout.advantages, [len(rollout.advantages)], self._reducer)
            rollout = rollout._replace(advantages=advantages)

        step, actor_parameters = self._policy_step(actor_critic, rollout)
        if step.status in ("non_finite", "not_positive_definite", "zero_gradient"):
            warnings.warn(f"TRPO left the policy as it was in this update: {step.status}", stacklevel=2)
        if all(self._reducer.gathered(bool(rollout.returns.isfinite().all()))):
            value_loss = fit_critic(
                self._minibatch_step(
                    critic_loss,
                    critic_parameters(self.policy, actor_parameters),
                    pad_to=size_to_pad_to(buffer, self.batch_size),
                ),
                self.policy,
                actor_parameters,
                buffer,
                n_epochs=self.n_critic_updates,
                batch_size=self.batch_size,
                reducer=self._reducer,
            )
            self.logger.record("train/value_loss", value_loss)
        update_statistics(actor_critic, rollout.inputs, self.batch_size, self._reducer)
        for parameter, gradient in zip(actor_parameters, step.gradients, strict=True):
            parameter.grad = gradient  # of the loss, for logging by the user; the next update does not read it
        self._n_updates += 1
        self._log_update(step)
        self._follow_reference()

    def _policy_step(self, actor_critic: ActorCritic, rollout: RolloutSamples) -> tuple[PolicyStep, list[nn.Parameter]]:
        """
        One natural-gradient step of the actor.

        :param actor_critic: the policy
        :param rollout: all samples; their advantages are normalised if the user asks for it
        :return: the result of the step, and the parameters that the actor depends on
        """
        surrogate = Surrogate(
            actor_critic,
            cast(Family, actor_critic.family),
            rollout,
            ent_coef=self._current_value(self.ent_coef),
            reference_kl_coef=self._reference_coefficients().get("reference_kl_coef", 0.0),
            chunks=self._chunks,
            reducer=self._reducer,
        )
        candidates = [p for p in self.policy.parameters() if p.requires_grad]
        gradient, objective, parameters = surrogate.gradient(candidates)
        of_loss = unflatten_like(-gradient, parameters)
        if not (math.isfinite(objective) and bool(gradient.isfinite().all())):
            return PolicyStep("non_finite", objective, gradients=of_loss), parameters
        if not bool(gradient.any()):
            return PolicyStep("zero_gradient", objective, gradients=of_loss), parameters

        n_samples = len(rollout.advantages)
        product = averaged(self._fisher_vector_product(actor_critic, rollout, parameters), self._reducer, n_samples)
        direction, cg_steps, cg_residual, cg_status = conjugate_gradient(
            product, gradient, max_steps=self.cg_max_steps, rtol=self.cg_residual_tol
        )
        del product  # and the graph that it keeps
        target_kl = self._whole_action_value(self.target_kl, TARGET_KL_PER_DIMENSION)
        # The residual of conjugate gradient from zero is orthogonal to x, so x'(F + damping I)x = x'g.
        curvature = direction.dot(gradient).item()
        if not 0.0 < curvature < math.inf:
            status = "non_finite" if cg_status == "non_finite" else "not_positive_definite"
            return PolicyStep(status, objective, 0.0, 0.0, 0.0, 0.0, cg_steps, cg_residual, of_loss), parameters
        full_step = math.sqrt(2.0 * target_kl / curvature) * direction
        reverse_kl = th.zeros(())

        def evaluate() -> tuple[th.Tensor, th.Tensor]:
            nonlocal reverse_kl
            self._project()  # puts log_std back within its bounds
            objective, kl, reverse_kl = surrogate.value_and_kls()
            return objective, kl

        search = backtracking_line_search(
            parameters,
            full_step,
            evaluate,
            objective_before=objective,
            expected_improvement=gradient.dot(full_step).item(),
            constraint_limit=target_kl,
            shrinking_factor=self.line_search_shrinking_factor,
            max_iter=self.line_search_max_iter,
            accept_ratio=self.accept_ratio,
        )
        step = PolicyStep(
            status=search.reason,
            objective=objective,
            kl=search.constraint if search.accepted else 0.0,
            fraction=search.fraction,
            predicted_improvement=search.predicted_improvement,
            actual_improvement=search.improvement,
            cg_steps=cg_steps,
            cg_residual=cg_residual,
            gradients=of_loss,
            reverse_kl=reverse_kl.item() if search.accepted else 0.0,
        )
        return step, parameters

    def _fisher_vector_product(
        self, actor_critic: ActorCritic, rollout: RolloutSamples, parameters: list[nn.Parameter]
    ) -> Callable[[th.Tensor], th.Tensor]:
        inputs = rollout.inputs.rows(slice(None, None, self.sub_sampling_factor))
        chunks = list(self._chunks(inputs.n_rows, inputs.length))
        damping = self._whole_action_value(self.cg_damping, CG_DAMPING_PER_DIMENSION)
        if not self.torch_compile:
            family = cast(Family, actor_critic.family)
            return fisher_vector_product(actor_critic, family, inputs, parameters, chunks, damping=damping)
        direct = cast(DirectActorCritic, actor_critic)
        product: CompiledFisherVectorProduct = self._compiled.get_or_make(
            "fisher",
            (cache_key(self.policy), tuple(map(id, parameters))),
            lambda: CompiledFisherVectorProduct(direct, parameters, announce=self.verbose >= 1),
        )
        return product.at(inputs, chunks, damping=damping)

    def _log_update(self, step: PolicyStep) -> None:
        accepted = step.status == "accepted"
        if self.verbose >= 1 and step.status in ("constraint", "improvement"):  # the others have a warning
            print(f"TRPO left the policy as it was in this update: the line search failed by the {step.status}")
        record = self.logger.record
        # The next three are also logged by sb3-contrib. Its KL divergence is KL(new || old), averaged over the action
        # dimensions, except for MultiDiscrete.
        is_mean = not isinstance(self.action_space, spaces.MultiDiscrete)
        record("train/policy_objective", step.objective + (step.actual_improvement if accepted else 0.0))
        record("train/kl_divergence_loss", step.reverse_kl / (n_action_dims(self.action_space) if is_mean else 1))
        record("train/is_line_search_success", float(accepted))
        record("train/predicted_improvement", step.predicted_improvement)
        record("train/actual_improvement", step.actual_improvement)
        record("train/kl", step.kl)
        record("train/target_kl", self._whole_action_value(self.target_kl, TARGET_KL_PER_DIMENSION))
        self._log_ent_coef()
        record("train/step_fraction", step.fraction)
        record("train/cg_steps", step.cg_steps)
        record("train/cg_residual", step.cg_residual)
        record("train/cg_damping", self._whole_action_value(self.cg_damping, CG_DAMPING_PER_DIMENSION))
        buffer = cast(RolloutBuffer, self.rollout_buffer)
        # Entropy of the policy that collected the rollout; estimated from its actions if there is no formula.
        entropy = cast(Family, self._family).entropy(buffer.flat().old_params)
        of_samples = buffer.flat().old_log_prob if entropy is None else -entropy
        entropy_loss = of_samples.mean()
        average(self._reducer, entropy_loss, weight=len(of_samples))
        record("train/entropy_loss", entropy_loss.item())
        record("train/explained_variance", explained_variance(*values_and_returns(buffer)))
        if hasattr(self.policy, "log_std"):
            record("train/std", self.policy.log_std.detach().exp().mean().item())
        record("train/n_updates", self._n_updates, exclude="tensorboard")
