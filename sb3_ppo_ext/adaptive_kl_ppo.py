"""PPO with an adaptive KL penalty (Schulman et al. 2017, section 4)."""

from __future__ import annotations

import os
from typing import Any, ClassVar, Literal, cast

import torch as th
from stable_baselines3.common.buffers import RolloutBuffer as SB3RolloutBuffer
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.type_aliases import GymEnv, Schedule

from sb3_ppo_ext import losses
from sb3_ppo_ext.common.distributions import Family
from sb3_ppo_ext.common.errors import ArgumentError
from sb3_ppo_ext.common.proximal import ProximalAlgorithm
from sb3_ppo_ext.common.rollout.buffers import RolloutBuffer
from sb3_ppo_ext.common.rollout.data import RolloutSamples
from sb3_ppo_ext.common.rollout.evaluation import Evaluation
from sb3_ppo_ext.common.update.controllers import KLAdaptiveRate, adapted_by_kl
from sb3_ppo_ext.common.update.objective import Coefficients, PolicyLoss
from sb3_ppo_ext.common.update.reduce import average
from sb3_ppo_ext.common.validation import as_schedule, check_real

# The default clip range alone keeps the divergence near 0.005 for each dimension (HalfCheetah, at the other defaults).
# A target above that would leave the penalty without effect.
_TARGET_KL_PER_DIMENSION = 0.003


class AdaptiveKLPPO(ProximalAlgorithm):
    """
    Proximal policy optimisation with an adaptive KL penalty, "Proximal Policy Optimization Algorithms", Schulman et al.
    2017, arXiv 1707.06347, section 4, equation 8.

    Maximises ``E[min(r A, clip(r, 1 - clip_range, 1 + clip_range) A) - beta * KL(old || new)]`` with ratio
    ``r = pi(a|s) / pi_old(a|s)``. The KL divergence is that of the whole action, and exact: it is computed from the
    parameters of the distributions that drew the actions. After each update, let d be the mean KL over the *whole*
    rollout with the *final* parameters: ``beta`` is halved when ``d < target_kl / 1.5`` and doubled when
    ``d > 1.5 * target_kl``.

    With ``clip_range=None`` the objective is the paper's, ``E[r A - beta * KL(old || new)]``. It does not bound the
    ratio where actions have many dimensions: if the policy moves its mean action in one state to the action that was
    drawn there, the ratio becomes ``exp(|z|^2 / 2)``, where z is the drawn noise in standard deviations, at a
    divergence of only ``|z|^2 / 2``. A penalty on the mean divergence does not prevent such a move in single states.

    The arguments up to ``_init_setup_model`` are those of :class:`stable_baselines3.PPO`, in its order. Those that are
    not listed below have the same meaning.

    :param clip_range: how far the ratio may move from 1 before its gradient ends; a number, a schedule, or None to use
        the penalty alone
    :param target_kl: the KL(old || new) of the whole action that an update aims at, a number or a schedule; None:
        0.003 for each action dimension
    :param policy_kwargs: arguments for the policy. Besides those of Stable-Baselines3's policies there are
        ``critic_learning_rate``, a learning rate for the parameters that only the critic uses, ``log_std_bounds``, the
        lowest and the highest logarithm of the standard deviation, and ``layer_norm=True``, which normalises the layers
        of ``net_arch``; see :class:`sb3_ppo_ext.common.policies.ActorCriticPolicy`
    :param kl_coef: initial beta. The attribute of this name is the current beta, and is saved with the model
    :param kl_tolerance: how far d may be from the target, as a factor, before beta changes
    :param kl_coef_factor: factor by which beta changes; 1 keeps it fixed
    :param kl_coef_min: lower bound of beta
    :param kl_coef_max: upper bound of beta
    :param torch_compile: whether to compile the gradient step and the rollout, see :class:`DualClipPPO`
    :param sequence_length: for a policy with a memory, the number of steps that gradients go back in time; it must
        divide ``n_steps`` and ``batch_size``. None: their largest common divisor up to 16
    :param kl_adaptive_lr: adapt the learning rate to the KL as well, as in :class:`DualClipPPO`; its target is
        ``target_kl``
    :param recompute_advantages: whether to recompute advantages and returns with the current critic before each epoch
        but the first, see :class:`DualClipPPO`
    :param reference_policy: a frozen policy to stay close to, see :class:`DualClipPPO`
    :param reference_kl_coef: weight of the penalty on KL(pi || pi_ref), see :class:`DualClipPPO`
    :param reference_kl: "reward" or "loss", where that penalty is applied, see :class:`DualClipPPO`
    :param n_reused_rollouts: K: an update learns from the newest rollout and from the K rollouts before it, see
        :class:`DualClipPPO`
    :param reuse: how to learn from old rollouts, see :class:`DualClipPPO`. The KL penalty is measured from the policy
        that acted, with ``{"proximal": "newest"}`` from the newest policy, and with ``"ewma"`` from the moving average.
        d is the mean over the newest rollout only
    :raises ValueError: if an argument is out of range or contradicts another
    """

    _needs_old_params = True
    _none_is_default: ClassVar[tuple[str, ...]] = ("clip_range", "target_kl")

    def __init__(
        self,
        policy: str | type[ActorCriticPolicy],
        env: GymEnv | str,
        learning_rate: float | str | Schedule = 3e-4,
        n_steps: int = 2048,
        batch_size: int = 64,
        n_epochs: int = 10,
        gamma: float = 0.99,
        gae_lambda: float = 0.95,
        clip_range: float | str | Schedule | None = 0.3,
        clip_range_vf: float | str | Schedule | None = None,
        normalize_advantage: bool = True,
        ent_coef: float | str | Schedule = 0.0,
        vf_coef: float = 0.5,
        max_grad_norm: float = 0.5,
        use_sde: bool = False,
        sde_sample_freq: int = -1,
        rollout_buffer_class: type[SB3RolloutBuffer] | None = None,
        rollout_buffer_kwargs: dict[str, Any] | None = None,
        target_kl: float | str | Schedule | None = None,
        stats_window_size: int = 100,
        tensorboard_log: str | None = None,
        policy_kwargs: dict[str, Any] | None = None,
        verbose: int = 0,
        seed: int | None = None,
        device: th.device | str = "auto",
        _init_setup_model: bool = True,
        *,
        kl_coef: float = 1.0,
        kl_tolerance: float = 1.5,
        kl_coef_factor: float = 2.0,
        kl_coef_min: float = 1e-4,
        kl_coef_max: float = 1e4,
        torch_compile: bool = False,
        sequence_length: int | None = None,
        kl_adaptive_lr: dict[str, Any] | None = None,
        recompute_advantages: bool = False,
        reference_policy: ActorCriticPolicy | str | os.PathLike[str] | None = None,
        reference_kl_coef: float | str | Schedule | dict[str, Any] = 0.1,
        reference_kl: Literal["reward", "loss"] = "reward",
        n_reused_rollouts: int = 0,
        reuse: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(
            policy,
            env,
            learning_rate=learning_rate,
            n_steps=n_steps,
            batch_size=batch_size,
            n_epochs=n_epochs,
            gamma=gamma,
            gae_lambda=gae_lambda,
            clip_range_vf=clip_range_vf,
            normalize_advantage=normalize_advantage,
            ent_coef=ent_coef,
            vf_coef=vf_coef,
            max_grad_norm=max_grad_norm,
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
            torch_compile=torch_compile,
            sequence_length=sequence_length,
            kl_adaptive_lr=kl_adaptive_lr,
            recompute_advantages=recompute_advantages,
            reference_policy=reference_policy,
            reference_kl_coef=reference_kl_coef,
            reference_kl=reference_kl,
            n_reused_rollouts=n_reused_rollouts,
            reuse=reuse,
        )
        self.clip_range = clip_range
        self.target_kl = target_kl
        self.kl_coef = kl_coef
        self.kl_tolerance = kl_tolerance
        self.kl_coef_factor = kl_coef_factor
        self.kl_coef_min = kl_coef_min
        self.kl_coef_max = kl_coef_max
        if _init_setup_model:
            self._setup_new_model()

    @classmethod
    def _adapted(cls, origin: str, attributes: dict[str, Any]) -> dict[str, Any]:
        adapted = super()._adapted(origin, attributes)
        # A clip_range of None is not written to the file, because SB3's PPO loads these files too and accepts no None.
        penalty_alone = "kl_coef" in attributes and "clip_range" not in attributes
        return adapted | {"clip_range": None} if penalty_alone else adapted

    def _validate(self) -> None:
        super()._validate()
        if self.clip_range is not None:
            self.clip_range = as_schedule("clip_range", self.clip_range)
        if self.target_kl is not None:
            as_schedule("target_kl", self.target_kl)
        if self.kl_adaptive_lr is not None and self.kl_adaptive_lr.get("target_kl") is not None:
            raise ArgumentError(
                f"kl_adaptive_lr={self.kl_adaptive_lr!r} is not allowed: in AdaptiveKLPPO the learning rate and the "
                "penalty have the same target, the argument target_kl; leave target_kl out of kl_adaptive_lr"
            )
        check_real("kl_tolerance", self.kl_tolerance, at_least=1.0)
        check_real("kl_coef_factor", self.kl_coef_factor, at_least=1.0)
        check_real("kl_coef_min", self.kl_coef_min, at_least=0.0)
        check_real("kl_coef_max", self.kl_coef_max, at_least=self.kl_coef_min)
        check_real("kl_coef", self.kl_coef, at_least=self.kl_coef_min, at_most=self.kl_coef_max)
        if self.kl_coef == 0.0 and self.kl_coef_factor > 1.0:
            raise ArgumentError(
                f"kl_coef={self.kl_coef!r} is not allowed with kl_coef_factor={self.kl_coef_factor!r}: no factor "
                "changes 0. It must be above 0, or kl_coef_factor 1"
            )

    @staticmethod
    def policy_loss(evaluation: Evaluation, samples: RolloutSamples, coefficients: Coefficients) -> PolicyLoss:
        """
        The surrogate with the KL penalty; see :meth:`ProximalAlgorithm.policy_loss`.

        :param evaluation: evaluation of a minibatch by the current policy
        :param samples: the minibatch
        :param coefficients: ``kl_coef``; ``clip_range`` unless it is None; ``max_importance_weight`` if the samples
            have a proximal policy
        """
        kl, kl_coef = evaluation.kl_from(samples.old_params), coefficients["kl_coef"]
        old_log_prob, advantages = samples.old_log_prob, samples.advantages
        if samples.proximal_log_prob is not None:
            # All weights are positive, so weighting the advantages weights the surrogate, clipped or not.
            maximum = coefficients["max_importance_weight"]
            weights = losses.truncated_importance_weights(samples.proximal_log_prob, old_log_prob, maximum=maximum)
            old_log_prob, advantages = samples.proximal_log_prob, advantages * weights
        if "clip_range" not in coefficients:
            loss, diagnostics = losses.kl_penalized_surrogate_loss(
                evaluation.log_prob,
                old_log_prob,
                advantages,
                kl,
                kl_coef=kl_coef,
                mask=samples.mask,
            )
        else:
            clipped, diagnostics = losses.clipped_surrogate_loss(
                evaluation.log_prob,
                old_log_prob,
                advantages,
                clip_range=coefficients["clip_range"],
                mask=samples.mask,
            )
            loss = clipped + kl_coef * kl
        statistics = {"approx_kl": diagnostics.kl_k3, "ratio_max": diagnostics.ratio_max}
        if "clip_range" in coefficients:
            statistics["clip_fraction"] = diagnostics.clip_fraction
        return PolicyLoss(samples.mean(loss), statistics)

    def coefficients(self) -> dict[str, float]:
        numbers = super().coefficients()
        numbers["kl_coef"] = self.kl_coef
        if self.clip_range is not None:
            numbers["clip_range"] = self._current_value(self.clip_range)
        return numbers

    def _learning_rate_target_kl(self, rate: KLAdaptiveRate) -> float:
        return self._whole_action_value(self.target_kl, _TARGET_KL_PER_DIMENSION)

    def _after_update(self) -> None:
        kl = self._measured_kl()
        target_kl = self._whole_action_value(self.target_kl, _TARGET_KL_PER_DIMENSION)
        self.kl_coef = adapted_by_kl(
            self.kl_coef,
            kl,
            target_kl=target_kl,
            tolerance=self.kl_tolerance,
            factor=self.kl_coef_factor,
            minimum=self.kl_coef_min,
            maximum=self.kl_coef_max,
        )
        self.logger.record("train/kl", kl)
        self.logger.record("train/target_kl", target_kl)

    def _measured_kl(self) -> float:
        """Mean KL(old || new) over the whole rollout, with the current parameters."""
        self.policy.set_training_mode(False)  # as during the collection of the rollout
        actor_critic = self._actor_critic()
        family = cast(Family, actor_critic.family)
        rollout = cast(RolloutBuffer, self.rollout_buffer).flat()
        with th.no_grad():
            total = 0.0
            for rows in self._chunks(len(rollout.old_params), rollout.length):
                samples = rollout.rows(rows)
                total += family.kl(samples.old_params, actor_critic.params(samples.inputs)).sum().item()
        mean = th.tensor(total / len(rollout.old_params), dtype=th.float64)
        average(self._reducer, mean, weight=len(rollout.old_params))
        return mean.item()
