"""Dual-clip PPO (Ye et al. 2020); with ``dual_clip=None``, PPO (Schulman et al. 2017)."""

from __future__ import annotations

import os
from typing import Any, Literal

import torch as th
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.type_aliases import GymEnv, Schedule

from sb3_ppo_ext import losses
from sb3_ppo_ext.common.errors import ArgumentError
from sb3_ppo_ext.common.proximal import ProximalAlgorithm
from sb3_ppo_ext.common.rollout.data import RolloutSamples
from sb3_ppo_ext.common.rollout.evaluation import Evaluation
from sb3_ppo_ext.common.update.controllers import KLAdaptiveRate
from sb3_ppo_ext.common.update.objective import Coefficients, PolicyLoss
from sb3_ppo_ext.common.validation import as_schedule, check_bool, check_real


class DualClipPPO(ProximalAlgorithm):
    """
    Proximal policy optimisation with a second clip, "Mastering Complex Control in MOBA Games with Deep Reinforcement
    Learning", Ye et al. 2020, arXiv 1912.09729, equation 5.

    With ratio ``r = pi(a|s) / pi_old(a|s)`` and advantage ``A``, PPO maximises
    ``min(r A, clip(r, 1 - low, 1 + high) A)``. Where ``A < 0``, this objective falls without bound as ``r`` grows, and
    one sample may dominate a whole minibatch. The second clip bounds it: where ``A < 0``, and only there, the objective
    is ``max(min(r A, clip(r, 1 - low, 1 + high) A), c A)`` with ``c = dual_clip``.

    The arguments up to ``_init_setup_model`` are those of :class:`stable_baselines3.PPO`, in its order and with its
    defaults. With ``dual_clip=None``, the algorithm is SB3's PPO.

    :param policy: "MlpPolicy", "CnnPolicy" or "MultiInputPolicy"; "MlpLstmPolicy", "CnnLstmPolicy" or
        "MultiInputLstmPolicy" for a policy with a memory; or a class
    :param env: an environment, a vector of environments, or the id of a registered environment
    :param learning_rate: a number or a schedule. A schedule is a function of the remaining progress (from 1 to 0), or a
        string: "lin_3e-4" falls linearly to 0, "cos_3e-4_1e-5" by a cosine to 1e-5, "exp_3e-4_1e-5" exponentially, and
        "const_3e-4" is constant. Each may have a warm-up: "cos_3e-4_warmup_0.1" first rises linearly from 0, during a
        tenth of the training
    :param n_steps: steps per environment in a rollout
    :param batch_size: samples in a minibatch
    :param n_epochs: passes over a rollout
    :param gamma: discount factor
    :param gae_lambda: trade-off between bias and variance of the advantages
    :param clip_range: how far the ratio may fall below 1 (and, if ``clip_range_high`` is None, rise above it) before
        its gradient ends; a number or a schedule
    :param clip_range_vf: clip range of the value function, as in SB3; a number, a schedule, or None for no clipping
    :param normalize_advantage: whether to normalise the advantages of each minibatch
    :param ent_coef: weight of the entropy in the loss; a number or a schedule
    :param vf_coef: weight of the value loss
    :param max_grad_norm: largest norm of a gradient; a larger one is scaled down to it
    :param use_sde: whether to explore with gSDE (Box actions only)
    :param sde_sample_freq: steps after which gSDE draws a new noise matrix; -1: only at the start of each rollout
    :param rollout_buffer_class: your own buffer class. Unless it derives from
        :class:`sb3_ppo_ext.common.buffers.RolloutBuffer` and keeps its ``add()`` and its computation of advantages, the
        buffer is filled step by step, as in SB3, which is slower
    :param rollout_buffer_kwargs: further arguments for the buffer
    :param target_kl: end the update before a gradient step whose minibatch has an estimated KL divergence (k3) above
        1.5 times this number; None: never
    :param stats_window_size: episodes over which the rollout statistics are averaged
    :param tensorboard_log: folder of the TensorBoard logs; None: no such logs
    :param policy_kwargs: arguments for the policy. Besides those of Stable-Baselines3's policies there are
        ``critic_learning_rate``, a learning rate for the parameters that only the critic uses, ``log_std_bounds``, the
        lowest and the highest logarithm of the standard deviation, and ``layer_norm=True``, which normalises the layers
        of ``net_arch``; see :class:`sb3_ppo_ext.common.policies.ActorCriticPolicy`
    :param verbose: 0: print nothing, 1: print information, 2: print details
    :param seed: seed of all random generators
    :param device: "cpu", "cuda" or "auto"
    :param _init_setup_model: whether to build the networks
    :param dual_clip: c, the lower bound of the objective in units of ``A`` where ``A < 0``: a number above
        ``1 + clip_range_high``, a schedule, or None for PPO
    :param clip_range_high: how far the ratio may rise above 1; a number, a schedule, or None for ``clip_range``
    :param torch_compile: whether to compile the whole gradient step, the evaluation of a rollout and, on the CPU, the
        actor. The first compilation takes a while; then training is much faster. It needs the Adam optimiser and a
        policy that overrides none of SB3's methods
    :param sequence_length: for a policy with a memory, the number of steps that gradients go back in time; it must
        divide ``n_steps`` and ``batch_size``. None: their largest common divisor up to 16
    :param kl_adaptive_lr: adapt the learning rate to the exact KL(old || new) of the minibatches: it is multiplied by
        ``factor`` when the KL is below ``target_kl / tolerance``, and divided by it when the KL is above
        ``target_kl * tolerance``. A dict of the settings that differ from ``{"target_kl": None, "tolerance": 2.0,
        "factor": 1.5, "minimum": 1e-6, "maximum": 1e-2, "every": "minibatch"}``. A ``target_kl`` of None means 0.01 for
        each action dimension; ``"every": "epoch"`` uses the mean KL of each epoch. Then the argument ``learning_rate``
        is the initial learning rate, and the attribute is the current one. None: no adaptation
    :param recompute_advantages: whether to recompute advantages and returns with the current critic before each epoch
        but the first (Andrychowicz et al. 2021, arXiv 2006.05990)
    :param rollback: whether an update that ``target_kl`` ends early also undoes the steps of its last epoch:
        parameters, buffers and the optimiser's moments become what they were before that epoch
    :param reference_policy: a frozen policy to stay close to, by a penalty on KL(pi || pi_ref): a policy, which is
        copied; the path of a saved model; or "initial", the policy with which the model begins to learn. It is saved
        with the model. None: no penalty
    :param reference_kl_coef: weight of that penalty: a number, a schedule, or a dict with the KL to aim at, such as
        ``{"target_kl": 0.05}``, and the settings that differ from ``{"coef": 0.1, "tolerance": 1.5, "factor": 2.0,
        "minimum": 1e-4, "maximum": 1e4}``. After each update, ``coef`` is multiplied by ``factor`` if the KL was above
        ``target_kl * tolerance``, and divided by it if the KL was below ``target_kl / tolerance``
    :param reference_kl: "reward": subtract ``coef * (log pi(a|s) - log pi_ref(a|s))`` from the reward of each step;
        "loss": add ``coef`` times the exact KL to the loss
    :param n_reused_rollouts: K: an update learns from the newest rollout and from the K rollouts before it, which older
        policies collected. It makes K + 1 times as many gradient steps, and the old rollouts take K times the memory of
        the rollout buffer
    :param reuse: how to learn from old rollouts. A dict of the settings that differ from ``{"target": "gae",
        "proximal": "behaviour", "max_importance_weight": 2.0, "ewma_decay": None, "rho_bar": 1.0, "c_bar": 1.0}``.
        ``"target": "vtrace"`` recomputes their advantages and returns for the newest policy, with the bounds
        ``rho_bar`` and ``c_bar``. ``"proximal": "newest"`` clips around the newest policy instead of the policy that
        acted, with truncated importance weights; ``"ewma"`` clips around the moving average of the policies after each
        gradient step, and needs no old rollouts. See :class:`sb3_ppo_ext.common.update.old_rollouts.Reuse`
    :raises ValueError: if an argument is out of range or contradicts another
    """

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
        clip_range: float | str | Schedule = 0.2,
        clip_range_vf: float | str | Schedule | None = None,
        normalize_advantage: bool = True,
        ent_coef: float | str | Schedule = 0.0,
        vf_coef: float = 0.5,
        max_grad_norm: float = 0.5,
        use_sde: bool = False,
        sde_sample_freq: int = -1,
        rollout_buffer_class: type[RolloutBuffer] | None = None,
        rollout_buffer_kwargs: dict[str, Any] | None = None,
        target_kl: float | None = None,
        stats_window_size: int = 100,
        tensorboard_log: str | None = None,
        policy_kwargs: dict[str, Any] | None = None,
        verbose: int = 0,
        seed: int | None = None,
        device: th.device | str = "auto",
        _init_setup_model: bool = True,
        *,
        dual_clip: float | str | Schedule | None = 3.0,
        clip_range_high: float | str | Schedule | None = None,
        torch_compile: bool = False,
        sequence_length: int | None = None,
        kl_adaptive_lr: dict[str, Any] | None = None,
        recompute_advantages: bool = False,
        n_reused_rollouts: int = 0,
        reuse: dict[str, Any] | None = None,
        rollback: bool = False,
        reference_policy: ActorCriticPolicy | str | os.PathLike[str] | None = None,
        reference_kl_coef: float | str | Schedule | dict[str, Any] = 0.1,
        reference_kl: Literal["reward", "loss"] = "reward",
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
        self.clip_range_high = clip_range_high
        self.dual_clip = dual_clip
        self.target_kl = target_kl
        self.rollback = rollback
        if _init_setup_model:
            self._setup_new_model()

    def _validate(self) -> None:
        super()._validate()
        self.clip_range = as_schedule("clip_range", self.clip_range)
        name = "clip_range" if self.clip_range_high is None else "clip_range_high"
        high = as_schedule(name, self.clip_range if self.clip_range_high is None else self.clip_range_high)
        if self.dual_clip is not None:
            dual_clip = as_schedule("dual_clip", self.dual_clip)
            for progress in (1.0, 0.5, 0.0):
                if dual_clip(progress) <= 1.0 + high(progress):
                    raise ArgumentError(
                        f"dual_clip={dual_clip(progress):g} with {name}={high(progress):g} (at progress "
                        f"{progress:g}) is not allowed: it must be above 1 + {name}, or the lower bound would remove "
                        "the gradient of samples that the first clip leaves alone; None turns the bound off"
                    )
        check_bool("rollback", self.rollback)
        if self.rollback and self.target_kl is None:
            raise ArgumentError(
                "rollback=True is not allowed with target_kl=None, which never ends an update early: target_kl must be "
                "a number, or rollback must be False"
            )
        if self.target_kl is not None:
            check_real("target_kl", self.target_kl, above=0.0)
            if self.kl_adaptive_lr is not None:
                rate = KLAdaptiveRate.checked("kl_adaptive_lr", self.kl_adaptive_lr)
                low = self._learning_rate_target_kl(rate) / rate.tolerance
                if 1.5 * self.target_kl <= low:
                    raise ArgumentError(
                        f"target_kl={self.target_kl:g} is not allowed with kl_adaptive_lr={self.kl_adaptive_lr!r}: an "
                        f"update ends at a KL of {1.5 * self.target_kl:g}, and the learning rate rises while the KL is "
                        f"below {low:g}, so it would always rise; target_kl must be above {low / 1.5:g}"
                    )

    @staticmethod
    def policy_loss(evaluation: Evaluation, samples: RolloutSamples, coefficients: Coefficients) -> PolicyLoss:
        """
        The dual-clip surrogate; see :meth:`ProximalAlgorithm.policy_loss`.

        :param evaluation: evaluation of a minibatch by the current policy
        :param samples: the minibatch
        :param coefficients: ``clip_range``; ``clip_range_high`` and ``dual_clip`` unless they are None;
            ``max_importance_weight`` if the samples have a proximal policy
        """
        clips: dict[str, Any] = {
            "dual_clip": coefficients.get("dual_clip"),
            "clip_range": coefficients["clip_range"],
            "clip_range_high": coefficients.get("clip_range_high"),
            "mask": samples.mask,
        }
        if samples.proximal_log_prob is None:
            surrogate = losses.dual_clip_surrogate_loss(
                evaluation.log_prob, samples.old_log_prob, samples.advantages, **clips
            )
        else:
            surrogate = losses.decoupled_surrogate_loss(
                evaluation.log_prob,
                samples.proximal_log_prob,
                samples.old_log_prob,
                samples.advantages,
                max_importance_weight=coefficients["max_importance_weight"],
                **clips,
            )
        diagnostics = surrogate.diagnostics
        return PolicyLoss(
            samples.mean(surrogate.loss),
            {
                "approx_kl": diagnostics.kl_k3,
                "clip_fraction": diagnostics.clip_fraction,
                "dual_clip_fraction": diagnostics.dual_clip_fraction,
                "ratio_max": diagnostics.ratio_max,
            },
        )

    def coefficients(self) -> dict[str, float]:
        numbers = super().coefficients()
        numbers["clip_range"] = self._current_value(self.clip_range)
        if self.clip_range_high is not None:
            numbers["clip_range_high"] = self._current_value(self.clip_range_high)
        if self.dual_clip is not None:
            numbers["dual_clip"] = self._current_value(self.dual_clip)
        return numbers

    def _kl_limit(self) -> float | None:
        return None if self.target_kl is None else 1.5 * self.target_kl
