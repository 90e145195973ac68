"""The update that DualClipPPO and AdaptiveKLPPO share: epochs of minibatches over a rollout."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, ClassVar, cast

import numpy as np
import torch as th
from stable_baselines3.common.buffers import RolloutBuffer as SB3RolloutBuffer
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.type_aliases import GymEnv, Schedule
from stable_baselines3.common.utils import explained_variance, obs_as_tensor

from sb3_ppo_ext.common.compile.constants import constants_of
from sb3_ppo_ext.common.construction import ACTION_SPACES, check_no_memory, check_own_buffer
from sb3_ppo_ext.common.errors import ArgumentError
from sb3_ppo_ext.common.reusing import ReusingAlgorithm
from sb3_ppo_ext.common.rollout.buffers import RolloutBuffer, size_to_pad_to, values_and_returns
from sb3_ppo_ext.common.rollout.data import PolicyInput, RolloutSamples
from sb3_ppo_ext.common.rollout.evaluation import Evaluation
from sb3_ppo_ext.common.saving.interchange import MASKABLE_PPO, RECURRENT_PPO
from sb3_ppo_ext.common.spaces import TARGET_KL_PER_DIMENSION
from sb3_ppo_ext.common.update.controllers import KLAdaptiveRate
from sb3_ppo_ext.common.update.fresh_targets import compute_targets_anew
from sb3_ppo_ext.common.update.normalization import observations_of, update_normalization
from sb3_ppo_ext.common.update.objective import ActorCriticLoss, Coefficients, PolicyLoss
from sb3_ppo_ext.common.update.samplers import Epochs, Minibatch
from sb3_ppo_ext.common.update.snapshot import Snapshot
from sb3_ppo_ext.common.update.step import MinibatchStep, raise_if_not_finite
from sb3_ppo_ext.common.validation import as_schedule, check_bool, check_int, check_real

_SETUP = (
    "the constructor of a subclass of ProximalAlgorithm has the argument _init_setup_model=True, and ends with "
    "self._setup_new_model(), unless it is False, as load() sets it"
)


class ProximalAlgorithm(ReusingAlgorithm):
    """
    Epochs of minibatches over a rollout, minimising
    ``policy_loss + ent_coef * entropy_loss + vf_coef * value_loss``.

    A subclass defines :meth:`policy_loss`, and the numbers in it by :meth:`coefficients`. It may limit an update
    (:meth:`_kl_limit`) and act after it (:meth:`_after_update`). The arguments are those of
    :class:`stable_baselines3.PPO`, with its defaults, and those of :class:`ReusingAlgorithm`. The constructor of a
    subclass ends with :meth:`_setup_new_model`, which builds the policy from its attributes, unless its argument
    ``_init_setup_model`` is False: ``load`` sets the attributes in the file first.
    """

    _loads_files_of: ClassVar[tuple[str, ...]] = (
        "stable_baselines3.PPO",
        "stable_baselines3.A2C",
        MASKABLE_PPO,
        RECURRENT_PPO,
    )

    # Whether an update that ends early, at the KL limit, also undoes the steps of its last epoch.
    rollback: bool = False

    def __init__(
        self,
        policy: str | type[ActorCriticPolicy],
        env: GymEnv | str,
        *,
        learning_rate: float | str | Schedule = 3e-4,
        n_steps: int = 2048,
        batch_size: int = 64,
        n_epochs: int = 10,
        gamma: float = 0.99,
        gae_lambda: float = 0.95,
        clip_range_vf: float | str | Schedule | None = None,
        normalize_advantage: bool = True,
        ent_coef: float | str | Schedule = 0.0,
        vf_coef: float = 0.5,
        max_grad_norm: float = 0.5,
        use_sde: bool = False,
        sde_sample_freq: int = -1,
        rollout_buffer_class: type[SB3RolloutBuffer] | None = None,
        rollout_buffer_kwargs: dict[str, Any] | None = None,
        stats_window_size: int = 100,
        tensorboard_log: str | None = None,
        policy_kwargs: dict[str, Any] | None = None,
        verbose: int = 0,
        seed: int | None = None,
        device: th.device | str = "auto",
        torch_compile: bool = False,
        sequence_length: int | None = None,
        kl_adaptive_lr: dict[str, Any] | None = None,
        recompute_advantages: bool = False,
        **more: Any,
    ) -> None:
        if "_init_setup_model" in more:
            raise TypeError(f"{type(self).__name__}'s constructor passes _init_setup_model on: {_SETUP}")
        super().__init__(
            policy,
            env,
            learning_rate=learning_rate,
            n_steps=n_steps,
            gamma=gamma,
            gae_lambda=gae_lambda,
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
            device=device,
            seed=seed,
            _init_setup_model=False,
            supported_action_spaces=ACTION_SPACES,
            **more,
        )
        self.batch_size = batch_size
        self.n_epochs = n_epochs
        self.clip_range_vf = clip_range_vf
        self.normalize_advantage = normalize_advantage
        self.torch_compile = torch_compile
        self.sequence_length = sequence_length
        self.kl_adaptive_lr = kl_adaptive_lr
        self.recompute_advantages = recompute_advantages

    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            if name == "policy":
                raise AttributeError(f"{type(self).__name__!r} object has no attribute 'policy': {_SETUP}")
            return object.__getattribute__(self, name)  # which raises the error that led here, of a property its own

    def _setup_new_model(self) -> None:
        super()._setup_new_model()
        self._check_rollout_size(self.batch_size, self.normalize_advantage)
        if self.kl_adaptive_lr is not None and self.n_epochs == 1 and self.batch_size >= self.n_steps * self.n_envs:
            raise ArgumentError(
                f"kl_adaptive_lr={self.kl_adaptive_lr!r} is not allowed with n_epochs=1 and "
                f"batch_size={self.batch_size}, which is a whole rollout: then an update is one gradient step, and the "
                "KL is measured before this step, where it is 0. kl_adaptive_lr must be None, or an update must have "
                "several steps"
            )

    def _check_can_learn(self) -> None:
        super()._check_can_learn()
        if self.torch_compile:
            constants_of(self.policy_loss)
        if self.recompute_advantages:
            check_own_buffer(self, "recompute_advantages=True is not allowed with")
            check_no_memory(self, "recompute_advantages=True is not allowed with")
        if self._reuse.proximal == "ewma" and self._kl_limit() is not None:
            raise ArgumentError(
                f"target_kl={getattr(self, 'target_kl', None)!r} is not allowed with reuse={self.reuse!r}: the KL is "
                "measured from the moving average, which follows the policy only through gradient steps, so after one "
                "update that ends early all later ones would end at once; target_kl must be None, or 'proximal' must "
                "be another"
            )

    def _validate(self) -> None:
        self._needs_old_params = type(self)._needs_old_params or self.kl_adaptive_lr is not None
        super()._validate()
        if self.kl_adaptive_lr is not None:
            rate = KLAdaptiveRate.checked("kl_adaptive_lr", self.kl_adaptive_lr)
            if callable(self.learning_rate) or isinstance(self.learning_rate, str):
                raise ArgumentError(
                    f"learning_rate={self.learning_rate!r} is not allowed with kl_adaptive_lr: it must be a number, "
                    "the initial learning rate, because the learning rate follows the KL and no schedule"
                )
            if self.learning_rate != 0.0:  # the RL Zoo loads a trained agent with a learning rate of 0
                check_real("learning_rate", self.learning_rate, at_least=rate.minimum, at_most=rate.maximum)
        check_real("vf_coef", self.vf_coef, at_least=0.0)
        check_real("max_grad_norm", self.max_grad_norm, above=0.0, finite=False)
        check_bool("normalize_advantage", self.normalize_advantage)
        check_int("n_epochs", self.n_epochs, minimum=1)
        check_bool("recompute_advantages", self.recompute_advantages)
        if self.recompute_advantages and self.n_epochs == 1:
            raise ArgumentError(
                "recompute_advantages=True is not allowed with n_epochs=1: the first epoch uses the advantages of the "
                "rollout, and there is no later one; n_epochs must be at least 2"
            )
        check_int("batch_size", self.batch_size, minimum=2 if self.normalize_advantage else 1)
        if self.clip_range_vf is not None:
            self.clip_range_vf = as_schedule("clip_range_vf", self.clip_range_vf)

    @classmethod
    def _adapted(cls, origin: str, attributes: dict[str, Any]) -> dict[str, Any]:
        return super()._adapted(origin, attributes) | ({"_is_masked": True} if origin == MASKABLE_PPO else {})

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        for old in ("_policy_loss", "_coefficients"):
            if old in vars(cls):  # it would never be called
                raise TypeError(f"{cls.__name__} defines {old}, which is now named {old[1:]}; policy_loss is static")

    @staticmethod
    @abstractmethod
    def policy_loss(evaluation: Evaluation, samples: RolloutSamples, coefficients: Coefficients) -> PolicyLoss:
        """
        The algorithm's own part of the loss: a pure function, so a static method without ``self``.

        :param evaluation: evaluation of the minibatch by the current policy
        :param samples: the minibatch; its advantages are normalised if ``normalize_advantage`` is True
        :param coefficients: the result of :meth:`coefficients` for this update
        :return: the loss of the minibatch, to be minimised, and the statistics to log
        """

    def coefficients(self) -> dict[str, float]:
        """
        The current values of the numbers in the loss, by name. They are logged under these names. New values need no
        new compilation, new names do. A subclass may add ``vf_coef`` and ``max_grad_norm`` here, to let them follow a
        schedule.
        """
        numbers = {
            "ent_coef": self._current_value(self.ent_coef),
            **self._reference_coefficients(),
            **self._proximal_coefficients(),
        }
        if self.clip_range_vf is not None:
            numbers["clip_range_vf"] = self._current_value(self.clip_range_vf)
        return numbers

    def _as_number(self, name: str, value: Any) -> float:
        try:
            return float(value)
        except (TypeError, ValueError) as error:
            raise TypeError(
                f"{type(self).__name__}.coefficients() gives {name}={value!r}, which is no number"
            ) from error

    def _kl_limit(self) -> float | None:
        """An update ends before the step of a minibatch whose ``approx_kl`` is above this; None: never."""
        return None

    def _learning_rate_target_kl(self, rate: KLAdaptiveRate) -> float:
        """
        The KL that the adaptive learning rate aims at.

        :param rate: the user's settings
        """
        return self._whole_action_value(rate.target_kl, TARGET_KL_PER_DIMENSION)

    def _adapt_learning_rate(self, rate: KLAdaptiveRate, kl: float) -> None:
        """
        Adapt the learning rate of the next gradient steps to the KL.

        :param rate: the user's settings
        :param kl: KL(old || new), the same in all processes
        """
        present = self.lr_schedule(self._current_progress_remaining)
        self.learning_rate = rate.after(kl, present, self._learning_rate_target_kl(rate))
        self._setup_lr_schedule()
        self._update_learning_rate(self.policy.optimizer)

    def _after_update(self) -> None:
        """Called after each update; a subclass may override it."""

    def train(self) -> None:
        """Update the policy from the rollout in the buffer."""
        self._check_old_params()
        rollouts = self._rollouts() if self.n_reused_rollouts else None
        self.policy.set_training_mode(True)
        self._update_learning_rate(self.policy.optimizer)
        numbers = {name: self._as_number(name, value) for name, value in self.coefficients().items()}
        coefficients = {"vf_coef": float(self.vf_coef), "max_grad_norm": float(self.max_grad_norm), **numbers}
        rate = None if self.kl_adaptive_lr is None else KLAdaptiveRate.checked("kl_adaptive_lr", self.kl_adaptive_lr)
        kl_limit = self._kl_limit()
        if kl_limit is not None:
            coefficients["kl_limit"] = float(np.float32(kl_limit))  # float32, as the KL that it is compared with
        step = self._minibatch_step(
            ActorCriticLoss(
                self.policy_loss,
                self.normalize_advantage and self._reducer.is_local,
                measures_kl=rate is not None,
                average=self._average,
            ),
            [parameter for parameter in self.policy.parameters() if parameter.requires_grad],
            coefficients=tuple(coefficients),
            writes_into=self._average,
            pad_to=rollouts.size_to_pad_to if rollouts else size_to_pad_to(self.rollout_buffer, self.batch_size),
        )
        history: list[th.Tensor] = []
        stopped_at: int | None = None

        # The step owns the parameters for all epochs, unless they are read or restored between two epochs.
        at_once = 1 if self.rollback or self.recompute_advantages else self.n_epochs
        targets = self.rollout_buffer.advantages, self.rollout_buffer.returns
        for first in range(0, self.n_epochs, at_once):
            if first > 0 and self.recompute_advantages:
                self._compute_targets_anew()
            epochs = Epochs(
                rollouts or self.rollout_buffer,
                self.batch_size,
                at_once,
                self._reducer,
                normalize_advantage=self.normalize_advantage,
            )
            before = Snapshot(self.policy, self.policy.optimizer) if self.rollback else None
            with step:
                for epoch, minibatches in enumerate(epochs, start=first):
                    if not self._make_epoch(step, minibatches, coefficients, history, rate):
                        stopped_at = epoch
                        break
                    self._n_updates += 1
            if stopped_at is not None:
                if before is None:
                    self._n_updates += 1
                else:
                    before.restore()
                break
        self._project()
        if self.recompute_advantages:  # put the original targets back into the rollout
            self.rollout_buffer.advantages, self.rollout_buffer.returns = targets
            cast(RolloutBuffer, self.rollout_buffer).forget_flat()

        series = dict(zip(step.names, th.stack(history, dim=1).tolist(), strict=True))
        if stopped_at is not None:
            series["grad_norm"].pop()  # the last one belongs to a step that was not made
        self._log_update(series, numbers, stopped_at)
        self._follow_reference()
        self._after_update()
        if getattr(self.policy, "normalize_observations", False):
            update_normalization(self.policy, observations_of(self.rollout_buffer), self._reducer)

    def _compute_targets_anew(self) -> None:
        """Recompute the advantages and returns of the rollout with the current critic."""
        buffer = cast(RolloutBuffer, self.rollout_buffer)
        self.policy.set_training_mode(False)  # as when the rollout was evaluated
        last_inputs = PolicyInput(obs_as_tensor(self._last_obs, self.device))  # type: ignore[arg-type]
        compute_targets_anew(buffer, self._actor_critic(), last_inputs)
        self.policy.set_training_mode(True)

    def _make_epoch(
        self,
        step: MinibatchStep,
        minibatches: Iterable[Minibatch],
        coefficients: dict[str, float],
        history: list[th.Tensor],
        rate: KLAdaptiveRate | None,
    ) -> bool:
        """
        Make the gradient steps of one epoch.

        :param step: makes a gradient step on a minibatch; called inside its ``with`` block
        :param minibatches: minibatches of the epoch
        :param coefficients: coefficients of the loss
        :param history: statistics of each step of the update; those of this epoch are added
        :param rate: settings of the adaptive learning rate; None: it is not adaptive
        :return: False if a minibatch exceeded the KL limit, so that its step and all later ones were not made
        """
        n_before = len(history)
        is_within = True
        is_masked = getattr(self.rollout_buffer, "action_masks", None) is not None
        for rollout, rows in minibatches:
            if is_masked and rollout.action_masks is None:
                raise ArgumentError(
                    f"rollout_buffer_class={type(self.rollout_buffer).__name__} is not allowed where environments mask "
                    "actions: its get() must give RolloutSamples with their action_masks"
                )
            history.append(step(rollout, rows, coefficients))
            if rate is not None and rate.every == "minibatch" and len(history) > 1:
                self._adapt_learning_rate(rate, history[-1][step.names.index("minibatch_kl")].item())
            if "kl_limit" in coefficients:
                is_within = not history[-1][step.names.index("approx_kl")].item() > coefficients["kl_limit"]
                if not is_within:
                    break
        of_epoch = history[max(n_before, 1) :]  # before the first step the KL is 0, whatever the learning rate
        if rate is not None and rate.every == "epoch" and of_epoch:
            mean = th.stack(of_epoch).mean(dim=0)
            self._adapt_learning_rate(rate, mean[step.names.index("minibatch_kl")].item())
        return is_within

    def _log_update(self, series: dict[str, list[float]], numbers: dict[str, float], stopped_at: int | None) -> None:
        """Log the mean of each statistic over all minibatches; for a name that ends with ``_max``, the maximum."""
        for name, values in series.items():
            if not values:
                continue
            self.logger.record(f"train/{name}", max(values) if name.endswith("_max") else sum(values) / len(values))
        buffer = self.rollout_buffer
        self.logger.record("train/explained_variance", explained_variance(*values_and_returns(buffer)))
        if hasattr(self.policy, "log_std"):
            self.logger.record("train/std", self.policy.log_std.detach().exp().mean().item())
        self.logger.record("train/n_updates", self._n_updates, exclude="tensorboard")
        for name, value in numbers.items():
            self.logger.record(f"train/{name}", value)
        if stopped_at is not None:
            self.logger.record("train/early_stop_epoch", stopped_at)
            if self.verbose >= 1:
                undone = ", and the steps of that epoch are undone" if self.rollback else ""
                print(
                    f"Update stopped early, at epoch {stopped_at} of {self.n_epochs}: the policy has moved too far"
                    f"{undone}"
                )
        raise_if_not_finite(series)
