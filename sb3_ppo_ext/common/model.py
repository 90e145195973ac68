"""How an SB3 algorithm is constructed, checked, saved and loaded."""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, cast

import gymnasium as gym
import numpy as np
import torch as th
from stable_baselines3.common import buffers as sb3_buffers
from stable_baselines3.common.base_class import maybe_make_env
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm as SB3OnPolicyAlgorithm
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.type_aliases import GymEnv, Schedule
from stable_baselines3.common.vec_env import VecEnv

from sb3_ppo_ext.common import construction
from sb3_ppo_ext.common.compile.program import ProgramCache
from sb3_ppo_ext.common.distributions import Family
from sb3_ppo_ext.common.errors import ArgumentError
from sb3_ppo_ext.common.policies import POLICY_ALIASES, ActorCriticPolicy
from sb3_ppo_ext.common.policy_distributions import family_of_policy
from sb3_ppo_ext.common.recurrent_policies import RECURRENT_POLICY_ALIASES
from sb3_ppo_ext.common.rollout.buffers import RolloutBuffer
from sb3_ppo_ext.common.rollout.masked_prediction import predict_masked
from sb3_ppo_ext.common.rollout.tensor_buffer import own_buffer_class
from sb3_ppo_ext.common.rollout.vec_envs import as_learnable
from sb3_ppo_ext.common.saving.files import opened
from sb3_ppo_ext.common.saving.model_file import replacements, write_model
from sb3_ppo_ext.common.spaces import check_spaces, n_action_dims
from sb3_ppo_ext.common.validation import (
    as_schedule,
    check_bool,
    check_device,
    check_int,
    check_one_of,
    check_output,
    check_real,
    value_at,
)

if TYPE_CHECKING:
    from typing_extensions import Self


class Model(SB3OnPolicyAlgorithm):
    """
    SB3's base class of on-policy algorithms, which checks arguments before it builds anything, writes files whole or
    not at all, and loads only files that fit. :class:`sb3_ppo_ext.common.algorithm.OnPolicyAlgorithm` adds learning.

    Takes the arguments of :class:`stable_baselines3.common.on_policy_algorithm.OnPolicyAlgorithm`.

    :raises ValueError: if an argument cannot be used or contradicts another, before training starts
    """

    policy_aliases: ClassVar[dict[str, type[BasePolicy]]] = {**POLICY_ALIASES, **RECURRENT_POLICY_ALIASES}

    learning_rate: float | str | Schedule  # type: ignore[assignment]
    ent_coef: float | str | Schedule  # type: ignore[assignment]
    torch_compile: bool = False
    sequence_length: int | None = None
    kl_adaptive_lr: dict[str, Any] | None = None

    # Whether the policy was last trained with action masks, and predicts with them.
    _is_masked: bool = False

    # Other algorithms whose files can be loaded, by the names under which they are imported.
    _loads_files_of: ClassVar[tuple[str, ...]] = ()

    # Arguments that may be None here, but not in the algorithm of SB3 or sb3-contrib that has them.
    _none_is_default: ClassVar[tuple[str, ...]] = ()

    # Whether the updates need the parameters of the distributions that drew the actions, as an exact KL does.
    _needs_old_params: bool = False

    # Whether rollouts differ in size.
    _rollouts_vary: ClassVar[bool] = False

    def __init__(
        self,
        policy: str | type[BasePolicy],
        env: GymEnv | str | None,
        *,
        use_sde: bool = False,
        tensorboard_log: str | None = None,
        verbose: int = 0,
        device: th.device | str = "auto",
        **kwargs: Any,
    ) -> None:
        check_output(verbose, tensorboard_log)
        check_device(device)
        if env is not None:
            env = as_learnable(maybe_make_env(env, verbose))
            if isinstance(env, (gym.Env, VecEnv)):  # SB3 adapts an environment of OpenAI Gym
                check_spaces(env, use_sde=use_sde)
        super().__init__(
            policy,  # type: ignore[arg-type]
            env,  # type: ignore[arg-type]
            use_sde=use_sde,
            tensorboard_log=tensorboard_log,
            verbose=verbose,
            device=device,
            **kwargs,
        )
        if "cuda" in str(device) and self.device.type != "cuda":
            warnings.warn(f"device={str(device)!r}: torch finds no CUDA here, so the CPU is used", stacklevel=2)

    def _validate(self) -> None:
        """
        Check the hyper-parameters, before anything is built, for a new model and for one that is loaded.

        An attribute keeps what the user gave: a number, a function or a schedule in words. :meth:`_current_value` gives
        its current value. There are two exceptions, as in SB3: the learning rate also has the schedule ``lr_schedule``,
        and the clip ranges are converted to schedules.

        :raises ValueError: naming the argument, its value and what is allowed
        """
        # The RL Zoo loads a trained agent with a learning rate of 0.
        as_schedule("learning_rate", self.learning_rate, may_be_zero=True)
        check_int("n_steps", self.n_steps, minimum=1)
        check_real("gamma", self.gamma, at_least=0.0, at_most=1.0)
        check_real("gae_lambda", self.gae_lambda, at_least=0.0, at_most=1.0)
        as_schedule("ent_coef", self.ent_coef, may_be_zero=True)
        check_bool("use_sde", self.use_sde)
        check_bool("torch_compile", self.torch_compile)
        check_int("sde_sample_freq", self.sde_sample_freq, minimum=-1)
        check_int("stats_window_size", self._stats_window_size, minimum=1)
        if self.sequence_length is not None:
            check_int("sequence_length", self.sequence_length, minimum=1)
        if self.seed is not None:
            check_int("seed", self.seed, minimum=0, maximum=2**32 - 1)
        buffer_class = self.rollout_buffer_class
        holds_params = isinstance(buffer_class, type) and issubclass(buffer_class, RolloutBuffer)
        if self._needs_old_params and not holds_params:
            raise ArgumentError(
                f"rollout_buffer_class={construction.name_of(buffer_class)} is not allowed: {self._who_needs_kl} "
                "keeps the parameters of the action distributions in the buffer, which must be a subclass of "
                "sb3_ppo_ext.common.buffers.RolloutBuffer"
            )

    def predict(
        self,
        observation: np.ndarray | dict[str, np.ndarray],
        state: tuple[np.ndarray, ...] | None = None,
        episode_start: np.ndarray | None = None,
        deterministic: bool = False,
        action_masks: np.ndarray | None = None,
    ) -> tuple[np.ndarray, tuple[np.ndarray, ...] | None]:
        """
        Choose an action for each observation, as SB3 does. A policy that was last trained with action masks takes only
        allowed actions. Without ``action_masks``, it uses the masks in the observations, or those of the environments
        that the calling function has in a variable, as ``evaluate_policy`` has, and that returned these observations.

        :param observation: one observation, or one for each environment
        :param state: for a policy with a memory, the state that the last call returned; None: an empty memory
        :param episode_start: whether each observation is the first of its episode, so that the memory is cleared, shape
            ``(n_envs,)``; None: none is
        :param deterministic: whether to take the most likely action
        :param action_masks: which actions are allowed, shape ``(n_choices,)`` or ``(n_envs, n_choices)``
        :return: the actions, and the state to pass to the next call; without a memory, ``state``
        :raises ValueError: if the policy needs masks and finds none, or if a mask is wrong
        """
        if action_masks is None and not self._is_masked:
            return super().predict(observation, state, episode_start, deterministic)
        return predict_masked(
            self.policy,
            observation,
            state,
            episode_start,
            deterministic=deterministic,
            action_masks=action_masks,
        )

    def _check_rollout_size(self, batch_size: int, normalize_advantage: bool) -> None:
        """
        Check a new model; a model that is loaded for evaluation may have any number of environments.

        :param batch_size: samples in a minibatch
        :param normalize_advantage: whether the advantages are normalised
        :raises ValueError: if a rollout is too small for that
        """
        if self.env is None:
            return
        n_samples = self.n_steps * self.n_envs
        if normalize_advantage and n_samples < 2:
            raise ArgumentError(
                f"n_steps={self.n_steps} with {self.n_envs} environment(s) is not allowed: the advantages of a "
                "rollout of one sample cannot be normalised; n_steps * n_envs must be at least 2"
            )
        if n_samples % batch_size:
            warnings.warn(
                f"batch_size={batch_size} does not divide n_steps * n_envs = {n_samples}: at the end of each epoch "
                f"there will be a truncated minibatch of size {n_samples % batch_size}. A factor of {n_samples} is "
                f"recommended (n_steps={self.n_steps}, n_envs={self.n_envs}).",
                stacklevel=2,
            )

    def _setup_model(self) -> None:
        if not hasattr(self, "observation_space"):  # a loaded model has it from its file
            raise ArgumentError("env=None is not allowed: it must be an environment, a vector of them, or an id")
        if self.rollout_buffer_class in (None, sb3_buffers.RolloutBuffer, sb3_buffers.DictRolloutBuffer):
            self.rollout_buffer_class = own_buffer_class(self.env, self.observation_space)  # which derives from SB3's
        self._validate()
        self._setup_lr_schedule()
        construction.set_seed(self)
        self.rollout_buffer = construction.make_rollout_buffer(self)
        self.policy = construction.make_policy(self)
        self._set_masked(self._is_masked)
        self._maybe_recommend_cpu()
        self._check_family()
        self._compiled = ProgramCache()
        self._has_said_why_slow = False
        self._policy_changes_in_rollouts = False
        buffer = self.rollout_buffer
        if self.verbose >= 1 and (not isinstance(buffer, RolloutBuffer) or buffer.wants_every_step):
            print(f"{type(buffer).__name__} is filled step by step, as in Stable-Baselines3, which is slower")

    def _set_masked(self, is_masked: bool) -> None:
        """Note whether the policy predicts with action masks: in the model, for its file, and in the policy."""
        self._is_masked = is_masked
        if isinstance(self.policy, ActorCriticPolicy):
            self.policy.is_masked = is_masked

    def _get_policy_from_name(self, policy_name: str) -> type[BasePolicy]:
        check_one_of("policy", policy_name, list(self.policy_aliases))
        return super()._get_policy_from_name(policy_name)

    def _setup_lr_schedule(self) -> None:
        self.lr_schedule = as_schedule("learning_rate", self.learning_rate, may_be_zero=True)

    @staticmethod
    def _wrap_env(env: GymEnv, verbose: int = 0, monitor_wrapper: bool = True) -> VecEnv:
        return SB3OnPolicyAlgorithm._wrap_env(as_learnable(maybe_make_env(env, verbose)), verbose, monitor_wrapper)

    def set_env(self, env: GymEnv, force_reset: bool = True) -> None:
        """
        Replace the training environment, as SB3 does.

        :param env: an environment, its id, or a vector of environments
        :param force_reset: whether ``learn`` resets it first
        :raises ValueError: if ``env`` is none of these
        """
        is_own = self.rollout_buffer_class is own_buffer_class(self.env, self.observation_space)
        super().set_env(env, force_reset)
        if is_own and self.rollout_buffer_class is not (own := own_buffer_class(self.env, self.observation_space)):
            self.rollout_buffer_class = own
            self.rollout_buffer = construction.make_rollout_buffer(self)

    def save(
        self,
        path: str | Path | io.BufferedIOBase,
        exclude: Iterable[str] | None = None,
        include: Iterable[str] | None = None,
    ) -> None:
        """
        Save the model, as SB3 does, but whole or not at all: an existing file stays until the new one replaces it. The
        file names the algorithm, so that another algorithm does not load it by mistake.

        :param path: path of the file, or an open file
        :param exclude: attributes to leave out, besides those that are always left out
        :param include: attributes to save although they would be left out
        :raises OSError: if the file cannot be written
        """
        content = io.BytesIO()
        super().save(content, exclude=exclude, include=include)
        write_model(path, content, type(self))

    @classmethod
    def load(
        cls,
        path: str | Path | io.BufferedIOBase,
        env: GymEnv | None = None,
        device: th.device | str = "auto",
        custom_objects: dict[str, Any] | None = None,
        print_system_info: bool = False,
        force_reset: bool = True,
        **kwargs: Any,
    ) -> Self:
        """
        Load a model from a file, as SB3 does. What only learning needs is checked by ``learn``.

        A model of another algorithm is refused; a class and the classes that derive from it count as one algorithm.
        Files of similar algorithms of SB3 and sb3-contrib can be loaded too: ``DualClipPPO`` and ``AdaptiveKLPPO`` load
        those of ``PPO``, ``A2C``, ``MaskablePPO`` and ``RecurrentPPO``, with defaults for what such a file lacks, and
        ``TRPO`` loads those of sb3-contrib's ``TRPO``.

        :param path: path of the file, ``.zip`` may be left out; or an open file
        :param env: the environment to train in, or its id; None for evaluation only
        :param device: "cpu", "cuda" or "auto"
        :param custom_objects: attributes that replace those in the file, by name
        :param print_system_info: whether to print the system on which the model was saved, and the current one
        :param force_reset: whether ``learn`` resets the environments first
        :param kwargs: attributes to change
        :return: the model
        :raises OSError: if the file cannot be read
        :raises ValueError: if it is truncated, damaged or no model of this algorithm, or an attribute is out of range
        """
        check_device(device)
        with opened(path) as file:
            custom_objects, kwargs = replacements(
                file,
                path,
                cls,
                also=cls._loads_files_of,
                optional=cls._none_is_default,
                adapt=cls._adapted,
                custom_objects=custom_objects or {},
                given=kwargs,
            )
            return super().load(file, env, device, custom_objects, print_system_info, force_reset, **kwargs)

    @classmethod
    def _adapted(cls, origin: str, attributes: dict[str, Any]) -> dict[str, Any]:
        """
        Attributes that must replace those in a file.

        :param origin: name of the algorithm that saved the file
        :param attributes: those in the file, as :func:`attributes_of` gives them, without those that the user replaces
        """
        buffer_class = attributes.get("rollout_buffer_class")
        if isinstance(buffer_class, dict) and str(buffer_class.get("__module__")).startswith("sb3_contrib."):
            return {"rollout_buffer_class": None}  # only sb3-contrib's own algorithm can fill it
        return {}

    def _excluded_save_params(self) -> list[str]:
        excluded = [*super()._excluded_save_params(), "_compiled", "_masks", "_use_masking"]
        excluded += ["_has_said_why_slow", "_policy_changes_in_rollouts", "_reducer", "_together", "_needs_old_params"]
        # The class that loads the file, which may be SB3's or sb3-contrib's, uses its own default instead.
        excluded += [name for name in self._none_is_default if getattr(self, name, 0) is None]
        if self.rollout_buffer_class is own_buffer_class(self.env, self.observation_space) or self._rollouts_vary:
            excluded.append("rollout_buffer_class")
        return excluded

    def _current_value(self, schedule: float | str | Schedule) -> float:
        """The current value of a hyper-parameter, which may be a number, a function or a schedule in words."""
        return value_at(schedule, self._current_progress_remaining)

    @property
    def _family(self) -> Family | None:
        """The formulas of the policy's distributions; None for a user's own distribution."""
        return family_of_policy(self.policy)

    @property
    def _who_needs_kl(self) -> str:
        """For a message: the algorithm or argument that needs the parameters of the distributions that acted."""
        return type(self).__name__ if type(self)._needs_old_params else f"{type(self).__name__} with kl_adaptive_lr"

    def _check_family(self) -> None:
        """
        :raises ValueError: if the updates need an exact KL divergence, and the distribution has no formula for it
        """
        if self._needs_old_params and self._family is None:
            raise ValueError(
                f"policy={construction.policy_name(self)} is not allowed: {self._who_needs_kl} needs the exact KL "
                f"divergence of its distributions, and {type(self.policy.action_dist).__name__} has formulas of its "
                "own; the distribution must be one of stable_baselines3.common.distributions, or derive from one "
                "without overriding its formulas. DualClipPPO and REINFORCE learn with any distribution"
            )

    def _check_old_params(self) -> None:
        """
        :raises ValueError: if the updates need the distributions that acted, and samples in the buffer lack them
        """
        buffer = cast(RolloutBuffer, self.rollout_buffer)
        if self._needs_old_params and buffer.flat().old_params.shape[1] == 0:
            raise ValueError(
                f"A callback adds samples without distribution_params to the rollout buffer, and {self._who_needs_kl} "
                "needs the distributions that acted: extend that array too, as it does observations and actions"
            )

    def _update_info_buffer(self, infos: list[dict[str, Any]], dones: np.ndarray | None = None) -> None:
        # The infos are read at the end of the rollout, when an environment may have overwritten the same dict.
        copied = [
            {**info, "episode": dict(info["episode"])} if isinstance(info.get("episode"), dict) else info
            for info in infos
        ]
        super()._update_info_buffer(copied, dones)

    def _update_current_progress_remaining(self, num_timesteps: int, total_timesteps: int) -> None:
        # The last rollout may exceed total_timesteps, and a schedule that falls to zero must not become negative.
        super()._update_current_progress_remaining(min(num_timesteps, total_timesteps), total_timesteps)

    def _whole_action_value(self, value: float | str | Schedule | None, per_dimension: float) -> float:
        """
        The current value of a setting that is for the whole action.

        :param value: the user's value; None for the default
        :param per_dimension: the default for each action dimension
        """
        if value is None:
            return per_dimension * n_action_dims(self.action_space)
        return self._current_value(value)
