"""The update that the proximal policy optimisations share: epochs of minibatches over one rollout."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, ClassVar

import numpy as np
import torch as th
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.type_aliases import GymEnv, Schedule
from stable_baselines3.common.utils import explained_variance

from sb3_ppo_ext.common.algorithm import OnPolicyAlgorithm
from sb3_ppo_ext.common.compile.constants import constants_of
from sb3_ppo_ext.common.construction import ACTION_SPACES
from sb3_ppo_ext.common.rollout.buffers import size_to_pad_to, values_and_returns
from sb3_ppo_ext.common.rollout.data import RolloutSamples
from sb3_ppo_ext.common.rollout.evaluation import Evaluation
from sb3_ppo_ext.common.saving.interchange import MASKABLE_PPO, RECURRENT_PPO
from sb3_ppo_ext.common.update.objective import ActorCriticLoss, Coefficients, PolicyLoss
from sb3_ppo_ext.common.update.samplers import Epochs
from sb3_ppo_ext.common.update.step import raise_if_not_finite
from sb3_ppo_ext.common.validation import as_schedule, check_bool, check_int, check_real


class ProximalAlgorithm(OnPolicyAlgorithm):
    """
    Epochs of minibatches over one rollout, minimising
    ``policy_loss + ent_coef * entropy_loss + vf_coef * value_loss``.

    A child gives its :meth:`policy_loss`, and the numbers in it by :meth:`coefficients`; it may limit an update
    (:meth:`_kl_limit`) and act after it (:meth:`_after_update`). The arguments are those of
    :class:`stable_baselines3.PPO`, with its defaults; the constructor of a child ends with :meth:`_setup_new_model`,
    unless ``_init_setup_model`` is false.
    """

    _loads_files_of: ClassVar[tuple[str, ...]] = (
        "stable_baselines3.PPO",
        "stable_baselines3.A2C",
        MASKABLE_PPO,
        RECURRENT_PPO,
    )

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
        rollout_buffer_class: type[RolloutBuffer] | None = None,
        rollout_buffer_kwargs: dict[str, Any] | None = None,
        stats_window_size: int = 100,
        tensorboard_log: str | None = None,
        policy_kwargs: dict[str, Any] | None = None,
        verbose: int = 0,
        seed: int | None = None,
        device: th.device | str = "auto",
        torch_compile: bool = False,
        sequence_length: int | None = None,
    ) -> None:
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
        )
        self.batch_size = batch_size
        self.n_epochs = n_epochs
        self.clip_range_vf = clip_range_vf
        self.normalize_advantage = normalize_advantage
        self.torch_compile = torch_compile
        self.sequence_length = sequence_length

    def _setup_new_model(self) -> None:
        super()._setup_new_model()
        self._check_rollout_size(self.batch_size, self.normalize_advantage)

    def _check_can_learn(self) -> None:
        super()._check_can_learn()
        if self.torch_compile:
            constants_of(self.policy_loss)

    def _validate(self) -> None:
        super()._validate()
        check_real("vf_coef", self.vf_coef, at_least=0.0)
        check_real("max_grad_norm", self.max_grad_norm, above=0.0, finite=False)
        check_bool("normalize_advantage", self.normalize_advantage)
        check_int("n_epochs", self.n_epochs, minimum=1)
        check_int("batch_size", self.batch_size, minimum=2 if self.normalize_advantage else 1)
        if self.clip_range_vf is not None:
            self.clip_range_vf = as_schedule("clip_range_vf", self.clip_range_vf)

    @classmethod
    def _adapted(cls, origin: str, attributes: dict[str, Any]) -> dict[str, Any]:
        adapted = super()._adapted(origin, attributes)
        return {**adapted, "_is_masked": True} if origin == MASKABLE_PPO else adapted

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        for old in ("_policy_loss", "_coefficients"):
            if old in vars(cls):  # it would never be called
                raise TypeError(f"{cls.__name__} defines {old}, which is called {old[1:]} now; policy_loss is static")

    @staticmethod
    @abstractmethod
    def policy_loss(evaluation: Evaluation, samples: RolloutSamples, coefficients: Coefficients) -> PolicyLoss:
        """
        The algorithm's own part of the loss, a pure function: a static method, which has no ``self``.

        :param evaluation: of the minibatch by the present policy
        :param samples: the minibatch, its advantages normalised if asked for
        :param coefficients: what :meth:`coefficients` gave for this update
        :return: the loss of the minibatch, to be minimised, and what to log of it
        """

    def coefficients(self) -> dict[str, float]:
        """
        The numbers in the loss, now. They are logged by these names, and a compiled step sees each of them change; with
        other names, it is another step. To let ``vf_coef`` and ``max_grad_norm`` follow a schedule, a child gives them
        here too.
        """
        numbers = {"ent_coef": self._current_value(self.ent_coef)}
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

    def _after_update(self) -> None:
        """What follows an update."""

    def train(self) -> None:
        """Update the policy from the rollout in the buffer."""
        self._check_old_params()
        self.policy.set_training_mode(True)
        self._update_learning_rate(self.policy.optimizer)
        numbers = {name: self._as_number(name, value) for name, value in self.coefficients().items()}
        coefficients = {"vf_coef": float(self.vf_coef), "max_grad_norm": float(self.max_grad_norm), **numbers}
        kl_limit = self._kl_limit()
        if kl_limit is not None:
            coefficients["kl_limit"] = kl_limit = float(np.float32(kl_limit))  # as what it is compared with
        step = self._minibatch_step(
            ActorCriticLoss(self.policy_loss, self.normalize_advantage and self._reducer.is_local),
            [parameter for parameter in self.policy.parameters() if parameter.requires_grad],
            coefficients=tuple(coefficients),
            pad_to=size_to_pad_to(self.rollout_buffer, self.batch_size),
        )
        epochs = Epochs(
            self.rollout_buffer,
            self.batch_size,
            self.n_epochs,
            self._reducer,
            normalize_advantage=self.normalize_advantage,
        )
        history: list[th.Tensor] = []
        stopped_at: int | None = None

        with step:
            for epoch, minibatches in enumerate(epochs):
                for rollout, rows in minibatches:
                    history.append(step(rollout, rows, coefficients))
                    if kl_limit is not None and history[-1][step.names.index("approx_kl")].item() > kl_limit:
                        stopped_at = epoch
                        break
                self._n_updates += 1
                if stopped_at is not None:
                    break
        self._project()

        series = dict(zip(step.names, th.stack(history, dim=1).tolist(), strict=True))
        if stopped_at is not None:
            series["grad_norm"].pop()  # of a step that was not made
        self._log_update(series, numbers, stopped_at)
        self._after_update()

    def _log_update(self, series: dict[str, list[float]], numbers: dict[str, float], stopped_at: int | None) -> None:
        """Log the mean of each statistic over all minibatches (of one that is called a maximum, the maximum)."""
        for name, values in series.items():
            if not values:
                continue
            self.logger.record(f"train/{name}", max(values) if name.endswith("_max") else sum(values) / len(values))
        buffer = self.rollout_buffer
        explained = explained_variance(*values_and_returns(buffer))
        self.logger.record("train/explained_variance", explained)
        if hasattr(self.policy, "log_std"):
            self.logger.record("train/std", self.policy.log_std.detach().exp().mean().item())
        self.logger.record("train/n_updates", self._n_updates, exclude="tensorboard")
        for name, value in numbers.items():
            self.logger.record(f"train/{name}", value)
        if stopped_at is not None:
            self.logger.record("train/early_stop_epoch", stopped_at)
            if self.verbose >= 1:
                print(f"Update stopped early, at epoch {stopped_at} of {self.n_epochs}: the policy has moved too far")
        raise_if_not_finite(series)
