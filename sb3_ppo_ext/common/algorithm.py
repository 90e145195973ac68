"""Collecting a rollout with the actor alone, and evaluating it once."""

from __future__ import annotations

import io
import warnings
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, cast

import gymnasium as gym
import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common import buffers as sb3_buffers
from stable_baselines3.common.base_class import maybe_make_env
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm as SB3OnPolicyAlgorithm
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.preprocessing import get_flattened_obs_dim
from stable_baselines3.common.save_util import open_path
from stable_baselines3.common.type_aliases import GymEnv, MaybeCallback, PyTorchObs, Schedule
from stable_baselines3.common.utils import obs_as_tensor
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv
from torch import nn

from sb3_ppo_ext.common.compile.policy_programs import CompiledActor, CompiledEvaluation
from sb3_ppo_ext.common.compile.program import ProgramCache
from sb3_ppo_ext.common.compile.programs import CompiledStep
from sb3_ppo_ext.common.compile.support import cache_key, check_can_compile, check_compiler
from sb3_ppo_ext.common.distributions import Family, family_of_policy, params_of
from sb3_ppo_ext.common.errors import ArgumentError
from sb3_ppo_ext.common.policies import POLICY_ALIASES, ActorCriticPolicy, check_policy_class, keywords_of
from sb3_ppo_ext.common.rollout.actor_critic import ActorCritic, DirectActorCritic, Evaluation, Kept, SB3ActorCritic
from sb3_ppo_ext.common.rollout.buffers import RolloutBuffer, RolloutSamples, buffer_class_for, obs_rows
from sb3_ppo_ext.common.rollout.failures import (
    explained,
    raise_if_misshapen,
    raise_if_rollout_not_finite,
)
from sb3_ppo_ext.common.rollout.parameter_watch import ParameterWatch
from sb3_ppo_ext.common.rollout.purity import draws_noise, impurity
from sb3_ppo_ext.common.rollout.timeouts import Timeouts
from sb3_ppo_ext.common.saving.files import opened, save_whole
from sb3_ppo_ext.common.saving.interchange import (
    ALGORITHM,
    attributes_of,
    check_origin,
    name_of,
    origin_of,
    why_missing,
)
from sb3_ppo_ext.common.spaces import check_env, check_no_masks, check_spaces, fitting_policies, n_action_dims
from sb3_ppo_ext.common.update.step import Coefficients, EagerStep, MinibatchStep, Statistics
from sb3_ppo_ext.common.validation import (
    as_schedule,
    check_bool,
    check_device,
    check_int,
    check_one_of,
    check_output,
    check_real,
    did_you_mean,
    value_at,
)

if TYPE_CHECKING:
    from typing_extensions import Self

Act = Callable[[PyTorchObs], tuple[th.Tensor, Kept | None]]
EvaluateActions = Callable[[PyTorchObs, th.Tensor], Evaluation]

ACTION_SPACES = (spaces.Box, spaces.Discrete, spaces.MultiDiscrete, spaces.MultiBinary)

# A rollout is evaluated in chunks of at most this many input numbers and rows, which bounds the memory it takes.
_CHUNK_NUMBERS = 2**24
_CHUNK_ROWS = 2**14

# Where no two rollouts have the same size, a compiled program evaluates so many rows at a time.
_COMPILED_ROWS = 256


class OnPolicyAlgorithm(SB3OnPolicyAlgorithm):
    """
    SB3's base of on-policy algorithms, with a faster rollout.

    SB3 computes the value and the log-probability at every step, for a handful of observations at a time; nothing
    needs them before the rollout is full. Here a step runs the actor only, and one batched pass at the end gives the
    values, the log-probabilities and the parameters of the action distributions. Actions are drawn by the same torch
    calls as SB3 draws them, so a seed gives the trajectory that it gives SB3's PPO.

    Callbacks see SB3's protocol; only ``values`` and ``log_probs`` are missing in ``locals``: they are not known yet.

    That is right for networks that are known to be pure (:mod:`sb3_ppo_ext.common.rollout.purity`). Any other network,
    a policy that overrides SB3's methods and a policy that a callback changes within a rollout are evaluated at each
    step, and a rollout buffer that is not :class:`RolloutBuffer` is filled SB3's way.

    Takes the arguments of :class:`stable_baselines3.common.on_policy_algorithm.OnPolicyAlgorithm`.

    :raises ValueError: for what cannot be used or cannot be used together, before anything is trained
    """

    policy_aliases: ClassVar[dict[str, type[BasePolicy]]] = POLICY_ALIASES

    learning_rate: float | str | Schedule  # type: ignore[assignment]
    ent_coef: float | str | Schedule  # type: ignore[assignment]
    torch_compile: bool = False

    # Other algorithms whose files are loaded, by the names that are imported.
    _reads: ClassVar[tuple[str, ...]] = ()

    # Arguments that may be None here, and may not in SB3's or sb3-contrib's algorithm that takes them.
    _none_is_default: ClassVar[tuple[str, ...]] = ()

    # Whether the updates need the parameters of the distributions that drew the actions (an exact KL divergence does).
    _needs_old_params: ClassVar[bool] = False

    # Whether one rollout has more samples than another.
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
            env = maybe_make_env(env, verbose)
            check_env(env)
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
        Check the hyper-parameters. Called before anything is built, for a new model and for one that is loaded.

        An attribute keeps what the user gave, be it a number, a function or the RL Zoo's string; :meth:`_at_present`
        reads it. Only the learning rate has a schedule beside it, ``lr_schedule``, and only the clip ranges become
        schedules themselves, because SB3 has it so.

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
        if self.seed is not None:
            check_int("seed", self.seed, minimum=0, maximum=2**32 - 1)
        buffer_class = self.rollout_buffer_class
        keeps_params = isinstance(buffer_class, type) and issubclass(buffer_class, RolloutBuffer)
        if self._needs_old_params and not keeps_params:
            name = getattr(buffer_class, "__name__", repr(buffer_class))
            raise ArgumentError(
                f"rollout_buffer_class={name} is not allowed: {type(self).__name__} keeps the parameters of the action "
                "distributions in the buffer, which must be a subclass of sb3_ppo_ext.common.buffers.RolloutBuffer"
            )

    def _check_rollout_size(self, batch_size: int, normalize_advantage: bool) -> None:
        """
        For a new model only: one that is loaded to be watched may have any number of environments.

        :param batch_size: samples in a minibatch
        :param normalize_advantage: whether the advantages are to be normalised
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
                f"there will be a truncated mini-batch of size {n_samples % batch_size}. A factor of {n_samples} is "
                "recommended "
                f"(n_steps={self.n_steps}, n_envs={self.n_envs}).",
                stacklevel=2,
            )

    def _setup_model(self) -> None:
        if not hasattr(self, "observation_space"):  # what a loaded model has from its file
            raise ArgumentError(
                "env=None is not allowed: it must be an environment, a vector of them, or the id of one"
            )
        if self.rollout_buffer_class in (None, sb3_buffers.RolloutBuffer, sb3_buffers.DictRolloutBuffer):
            self.rollout_buffer_class = buffer_class_for(self.observation_space)  # which derives from SB3's
        self._validate()
        self._build()
        self._check_family()
        self._compiled = ProgramCache()
        self._has_said_why_slow = False
        self._policy_changes_in_rollouts = False
        buffer = self.rollout_buffer
        if self.verbose >= 1 and (not isinstance(buffer, RolloutBuffer) or buffer.wants_every_step):
            print(f"{type(buffer).__name__} is filled as Stable-Baselines3 does it, which is slower")

    def _get_policy_from_name(self, policy_name: str) -> type[BasePolicy]:
        check_one_of("policy", policy_name, list(self.policy_aliases))
        return super()._get_policy_from_name(policy_name)

    def _setup_lr_schedule(self) -> None:
        self.lr_schedule = as_schedule("learning_rate", self.learning_rate, may_be_zero=True)

    def _build(self) -> None:
        """
        As SB3's ``_setup_model``, piece by piece, so that an error is put down to the piece that it comes from.

        :raises ArgumentError: if one of them refuses its arguments, whatever it says it by: SB3 asserts, or stumbles
        """
        self._setup_lr_schedule()
        try:
            self.set_random_seed(self.seed)
        except (AttributeError, NotImplementedError) as error:
            raise ArgumentError(
                f"seed={self.seed!r} is not allowed with this vector of environments, {_name(type(self.env))}: its "
                f"seed() does not work ({type(error).__name__}: {error}); it must be None, or seed() must work"
            ) from error

        buffer_class, buffer_kwargs = cast(Any, self.rollout_buffer_class), self.rollout_buffer_kwargs
        with self._refusal(
            f"rollout_buffer_class={_name(buffer_class)} with rollout_buffer_kwargs={buffer_kwargs!r}",
            "a subclass of Stable-Baselines3's RolloutBuffer, of DictRolloutBuffer for Dict observations",
            lambda: keywords_of(buffer_class),
        ):
            self.rollout_buffer = buffer_class(
                self.n_steps,
                self.observation_space,
                self.action_space,
                device=self.device,
                gamma=self.gamma,
                gae_lambda=self.gae_lambda,
                n_envs=self.n_envs,
                **buffer_kwargs,
            )

        policy_class, policy_kwargs = cast(Any, self.policy_class), self.policy_kwargs
        given = f"policy={self._policy_name()}"
        check_policy_class(policy_class, given)
        with self._refusal(
            f"{given} with policy_kwargs={policy_kwargs!r}",
            fitting_policies(self.observation_space),
            lambda: keywords_of(policy_class, *policy_kwargs.values()),
        ):
            policy = policy_class(
                self.observation_space, self.action_space, self.lr_schedule, use_sde=self.use_sde, **policy_kwargs
            )
            self.policy = policy.to(self.device)
            check_policy_class(type(policy), given)  # of a function in a class's place, what it returns
            self._maybe_recommend_cpu()

    @contextmanager
    def _refusal(self, given: str, allowed: str, keywords: Callable[[], set[str]]) -> Iterator[None]:
        """
        :param given: what is being built, as the user gave it
        :param allowed: what is as a rule
        :param keywords: gives the names of the arguments that there are
        :raises ArgumentError: in place of an error by which a constructor shows that it cannot take its arguments
        """
        try:
            yield
        except ArgumentError:
            raise
        except (AssertionError, AttributeError, NotImplementedError, RuntimeError, TypeError) as error:
            if isinstance(error, (th.OutOfMemoryError, th.AcceleratorError)):
                raise
            raise ArgumentError(
                f"{given} is not allowed ({type(error).__name__}: {error}); it must be what takes "
                f"observation_space={self.observation_space} and action_space={self.action_space}, such as {allowed}"
                f"{did_you_mean(error, keywords)}"
            ) from error

    def _policy_name(self) -> str:
        aliases = (alias for alias, policy_class in self.policy_aliases.items() if policy_class is self.policy_class)
        return next(aliases, _name(self.policy_class))

    def set_env(self, env: GymEnv, force_reset: bool = True) -> None:
        """
        As SB3: put another training environment in place of the present one.

        :param env: an environment, or a vector of them
        :param force_reset: whether ``learn`` resets it first
        :raises ValueError: for what is neither
        """
        check_env(env)
        super().set_env(env, force_reset)

    def save(
        self,
        path: str | Path | io.BufferedIOBase,
        exclude: Iterable[str] | None = None,
        include: Iterable[str] | None = None,
    ) -> None:
        """
        As SB3, but a file is written whole or not at all (what was there before stays until then), and names the
        algorithm, so that no other takes it for its own.

        :param path: of the file, or an open file
        :param exclude: attributes to leave out, besides those that always are
        :param include: attributes to put in, of those that would be left out
        :raises OSError: if it cannot be written
        """
        content = io.BytesIO()
        super().save(content, exclude=exclude, include=include)
        with zipfile.ZipFile(content, "a") as archive:
            archive.writestr(ALGORITHM, name_of(type(self)))
        if isinstance(path, (str, Path)):
            save_whole(path, content.getbuffer())
        else:
            open_path(path, "w").write(content.getbuffer())

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
        As SB3: the model of a file, made anew. Nothing is checked that only learning needs.

        A model of another algorithm is refused. A class and those that derive from it are one algorithm; files of SB3
        and sb3-contrib are taken where the algorithms are of one kind: of ``PPO`` and ``A2C`` by ``DualClipPPO`` and
        ``AdaptiveKLPPO``, which have defaults of their own for what such a file lacks, and of sb3-contrib's ``TRPO`` by
        ``TRPO``.

        :param path: of the file, ``.zip`` may be left out; or an open file
        :param env: to train on in; None if it is to be watched only
        :param device: "cpu", "cuda" or "auto"
        :param custom_objects: attributes to put in place of those in the file, by name
        :param print_system_info: whether to print on what the model was saved, and what this is
        :param force_reset: whether ``learn`` resets the environments first
        :param kwargs: attributes to change
        :return: the model
        :raises OSError: if the file cannot be read
        :raises ValueError: if it is truncated, damaged or no model of this algorithm, or for an attribute that is out
            of range
        """
        check_device(device)
        with opened(path) as file:
            custom_objects = custom_objects or {}
            replaced = custom_objects.keys() | kwargs.keys()
            origin = origin_of(file, replaced)
            check_origin(origin, cls, cls._reads, path)
            attributes = attributes_of(file)
            missing = why_missing(attributes, "rollout_buffer_class")
            if missing is not None and "rollout_buffer_class" not in replaced:  # only learning needs it
                custom_objects = {**custom_objects, "rollout_buffer_class": None, "rollout_buffer_kwargs": {}}
                warnings.warn(
                    f"The rollout_buffer_class of {path} was left out ({missing}). To train on, give it again: "
                    "load(..., custom_objects={'rollout_buffer_class': ...})",
                    stacklevel=2,
                )
            # A space that is put in the place of the file's is of the same kind.
            kept = attributes.keys() - replaced | {"action_space"}
            adapted = cls._adapted(origin, {name: attributes[name] for name in kept & attributes.keys()})
            for name in {"rollout_buffer_class", *cls._none_is_default} & custom_objects.keys() - attributes.keys():
                adapted[name] = custom_objects[name]  # SB3 replaces only what is in the file
            kwargs = adapted | kwargs
            return super().load(file, env, device, custom_objects, print_system_info, force_reset, **kwargs)

    @classmethod
    def _adapted(cls, origin: str, attributes: dict[str, Any]) -> dict[str, Any]:
        """
        What has to be put in place of the attributes in a file.

        :param origin: the algorithm whose model it is
        :param attributes: in the file, as :func:`attributes_of` gives them, without those that the user replaces
        """
        buffer_class = attributes.get("rollout_buffer_class")
        if isinstance(buffer_class, dict) and str(buffer_class.get("__module__")).startswith("sb3_contrib."):
            return {"rollout_buffer_class": None}  # it is filled by an algorithm of its own
        return {}

    def _check_can_learn(self) -> None:
        """
        For a new model, and when one is to learn: to be watched, it may be loaded where nothing can be compiled, and
        with environments that it could not learn.

        :raises ValueError: if ``torch_compile=True`` cannot be had, or if actions would have to be masked, saying what
            to change
        """
        if self.env is not None:
            check_no_masks(self.env)
        if self.torch_compile:
            check_can_compile(self._actor_critic(), self.policy.optimizer)
            check_compiler(self.device)

    def _setup_learn(
        self, total_timesteps: int, callback: MaybeCallback = None, *args: Any, **kwargs: Any
    ) -> tuple[int, BaseCallback]:
        self._check_can_learn()
        try:
            return super()._setup_learn(total_timesteps, callback, *args, **kwargs)
        except Exception as error:
            more = None if self.env is None else explained(error, self.env, None)
            if more is None:
                raise
            raise more from error

    def _excluded_save_params(self) -> list[str]:
        excluded = [*super()._excluded_save_params(), "_compiled", "_has_said_why_slow", "_policy_changes_in_rollouts"]
        # What is left out is the default of the class that loads the file, be it SB3's or sb3-contrib's.
        excluded += [name for name in self._none_is_default if getattr(self, name, 0) is None]
        if self.rollout_buffer_class is buffer_class_for(self.observation_space) or self._rollouts_vary:
            excluded.append("rollout_buffer_class")
        return excluded

    def _update_info_buffer(self, infos: list[dict[str, Any]], dones: np.ndarray | None = None) -> None:
        # They are read at the end of the rollout, when an environment may have written the next one into the same dict.
        copied = [{**info, "episode": dict(info["episode"])} if "episode" in info else info for info in infos]
        super()._update_info_buffer(copied, dones)

    def _update_current_progress_remaining(self, num_timesteps: int, total_timesteps: int) -> None:
        # The last rollout overshoots, and a linear schedule that goes to zero must not go below it.
        super()._update_current_progress_remaining(min(num_timesteps, total_timesteps), total_timesteps)

    def _update_learning_rate(self, optimizers: list[th.optim.Optimizer] | th.optim.Optimizer) -> None:
        super()._update_learning_rate(optimizers)  # which writes one number into every group
        if isinstance(self.policy, ActorCriticPolicy) and self.policy.critic_learning_rate is not None:
            learning_rate = self._at_present(self.policy.critic_learning_rate)
            self.policy.set_critic_learning_rate(learning_rate)
            self.logger.record("train/critic_learning_rate", learning_rate)

    def _project(self) -> None:
        """Put what has bounds back within them; for :meth:`train`, when it has changed the actor."""
        if isinstance(self.policy, ActorCriticPolicy):
            self.policy.project()

    def _at_present(self, schedule: float | str | Schedule) -> float:
        """The present value of a hyper-parameter: of what the user gave, or a callback has put in its place."""
        return value_at(schedule, self._current_progress_remaining)

    def _log_ent_coef(self) -> None:
        """Log the weight of the entropy."""
        self.logger.record("train/ent_coef", self._at_present(self.ent_coef))

    def _joint(self, value: float | str | Schedule | None, per_dimension: float) -> float:
        """
        A quantity of the whole action, now.

        :param value: as the user gave it, joint; None for the default
        :param per_dimension: the default, for each action dimension
        """
        return per_dimension * n_action_dims(self.action_space) if value is None else self._at_present(value)

    @property
    def _family(self) -> Family | None:
        """The formulas of the policy's distributions; None for a distribution of the user's own."""
        return family_of_policy(self.policy)

    def _check_family(self) -> None:
        """
        :raises ValueError: if the updates need the KL divergence of a distribution that has no formula for it
        """
        if self._needs_old_params and self._family is None:
            raise ValueError(
                f"policy={self._policy_name()} is not allowed: {type(self).__name__} needs the exact KL divergence of "
                f"its distributions, and {type(self.policy.action_dist).__name__} has formulas of its own; it must be "
                "one of stable_baselines3.common.distributions, or derive from one without overriding its formulas. "
                "DualClipPPO and REINFORCE learn with any distribution"
            )

    def _check_old_params(self) -> None:
        """
        :raises ValueError: if the updates need the distributions that acted, and samples in the buffer have none
        """
        buffer = cast(RolloutBuffer, self.rollout_buffer)
        if self._needs_old_params and buffer.flat().old_params.shape[1] == 0:
            raise ValueError(
                f"A callback adds samples without distribution_params to the rollout buffer, and {type(self).__name__} "
                "needs the distributions that acted: extend that array too, as it does observations and actions"
            )

    def _actor_critic(self, *, for_update: bool = False) -> ActorCritic:
        """
        The policy as the core sees it. Made anew for each rollout and each update: a user may have replaced it.

        :param for_update: whether distribution parameters are needed only if the algorithm's updates need them
        """
        self._check_family()
        refusal = DirectActorCritic.refusal(self.policy)
        if refusal is None:
            return DirectActorCritic(self.policy, with_params=self._needs_old_params or not for_update)
        self._say_why_slow(f"{type(self.policy).__name__} {refusal}: it acts and is trained through its own methods")
        return SB3ActorCritic(self.policy, with_params=self._needs_old_params)

    def _say_why_slow(self, reason: str) -> None:
        """Say once why the fast way is not taken, to those who want to be told."""
        if self.verbose >= 1 and not self._has_said_why_slow:
            print(f"{reason}, which is slower")
        self._has_said_why_slow = True

    def _minibatch_step(
        self,
        minibatch_loss: Callable[[ActorCritic, RolloutSamples, Coefficients], tuple[th.Tensor, Statistics]],
        parameters: Sequence[nn.Parameter],
        coefficients: Sequence[str] = (),
        pad_to: int | None = None,
    ) -> MinibatchStep:
        """
        :param minibatch_loss: to be minimised, given the policy
        :param parameters: what is updated, among the policy's
        :param coefficients: the names of those that the loss will be given: a compiled step is for the same ones
        :param pad_to: what a compiled step pads the minibatches to, for a loss that heeds their mask
        :return: what makes a gradient step on a minibatch
        """
        actor_critic = self._actor_critic(for_update=True)
        if not self.torch_compile:
            return EagerStep(self.policy.optimizer, parameters, partial(minibatch_loss, actor_critic))
        check_can_compile(actor_critic, self.policy.optimizer)  # a user may have replaced them
        optimizer = self.policy.optimizer
        settings = [(group.get("betas"), group.get("eps")) for group in optimizer.param_groups]
        return self._compiled.get_or_make(
            "step",
            (
                cache_key(self.policy),
                optimizer,
                tuple(settings),
                tuple(map(id, parameters)),
                tuple(coefficients),
                pad_to,
            ),
            lambda: CompiledStep(
                cast(DirectActorCritic, actor_critic),
                optimizer,
                parameters,
                minibatch_loss,
                pad_to=pad_to,
                announce=self.verbose >= 1,
            ),
        )

    def _act(self, actor_critic: ActorCritic) -> Act:
        """How to draw actions: by the policy, or what was compiled of it."""
        # Elsewhere than on the CPU a step waits for its actions anyway.
        if not self.torch_compile or not actor_critic.is_pure or self.device.type != "cpu":
            return actor_critic.act
        direct = cast(DirectActorCritic, actor_critic)
        actor = self._compiled.get_or_make(
            "actor", cache_key(self.policy), lambda: CompiledActor(direct, announce=self.verbose >= 1)
        )
        actor.bind()
        return actor.act

    def _evaluate_actions(self, actor_critic: ActorCritic) -> EvaluateActions:
        """How to evaluate a rollout: by the policy, or what was compiled of it."""
        if not self.torch_compile:
            return actor_critic.evaluate_actions
        direct = cast(DirectActorCritic, actor_critic)
        evaluation = self._compiled.get_or_make(
            "evaluation",
            cache_key(self.policy),
            lambda: CompiledEvaluation(
                direct, chunk_size=_COMPILED_ROWS if self._rollouts_vary else None, announce=self.verbose >= 1
            ),
        )
        evaluation.bind()
        return evaluation

    @property
    def _bootstraps_timeouts(self) -> bool:
        """Whether the value of what would have followed is added where a time limit ends an episode."""
        return True

    def _rollout_is_complete(self, n_steps: int, n_rollout_steps: int, dones: np.ndarray) -> bool:
        """
        Whether to end the rollout, asked after each step.

        :param n_steps: steps taken
        :param n_rollout_steps: steps that a rollout has
        :param dones: the environments in which the step ended an episode
        """
        return n_steps >= n_rollout_steps

    def collect_rollouts(
        self,
        env: VecEnv,
        callback: BaseCallback,
        rollout_buffer: sb3_buffers.RolloutBuffer,
        n_rollout_steps: int,
    ) -> bool:
        """
        Fill the rollout buffer with the current policy.

        :param env: the training environment
        :param callback: called at each step, and at the beginning and the end of the rollout
        :param rollout_buffer: to fill
        :param n_rollout_steps: steps to collect from each environment
        :return: whether the rollout was filled; False if the callback ended it
        """
        try:
            return self._collect(env, callback, rollout_buffer, n_rollout_steps)
        except Exception as error:
            obs, self._last_obs = self._last_obs, None  # in whatever state the environments are, learn() resets them
            more = explained(error, env, obs)
            if more is None:
                raise
            raise more from error

    def _collect(
        self,
        env: VecEnv,
        callback: BaseCallback,
        rollout_buffer: sb3_buffers.RolloutBuffer,
        n_rollout_steps: int,
    ) -> bool:
        if not isinstance(rollout_buffer, RolloutBuffer) or rollout_buffer.wants_every_step:
            return self._collect_as_sb3(env, callback, rollout_buffer, n_rollout_steps)

        assert self._last_obs is not None, "No previous observation was provided"
        assert self._last_episode_starts is not None
        self.policy.set_training_mode(False)
        rollout_buffer.reset()
        kept: list[Kept] = []
        action_shape = (env.num_envs, *(self.action_space.shape or ()))
        is_box = isinstance(self.action_space, spaces.Box)
        is_as_made = type(env) is DummyVecEnv  # a wrapper may change an observation and not the final one
        n_steps = 0

        callback.on_rollout_start()
        if self.use_sde:  # after the callback, so that one that saves the random state saves it before this draw
            self.policy.reset_noise(env.num_envs)
        actor_critic = self._actor_critic()
        if isinstance(actor_critic, DirectActorCritic) and not actor_critic.is_pure:
            self._say_why_slow(
                f"{impurity(self.policy)}: each step computes values and distributions too. If a module is pure, say "
                "so by its attribute is_pure = True; if not, this is needed"
            )
        if self.torch_compile:
            check_can_compile(actor_critic, self.policy.optimizer)
        actor_critic.is_pure &= not (self._policy_changes_in_rollouts or draws_noise(self.policy))
        watch = ParameterWatch(self.policy) if actor_critic.is_pure else None
        timeouts = Timeouts(actor_critic, rollout_buffer)
        act = self._act(actor_critic)

        while True:
            if self.use_sde and self.sde_sample_freq > 0 and n_steps % self.sde_sample_freq == 0:
                self.policy.reset_noise(env.num_envs)

            if self._policy_changes_in_rollouts:  # what acts now may have other layers
                actor_critic = self._actor_critic()
                actor_critic.is_pure = False
                timeouts.actor_critic, act = actor_critic, actor_critic.act
            obs_tensor = obs_as_tensor(self._last_obs, self.device)  # type: ignore[arg-type]
            action_tensor, yielded = act(obs_tensor)
            if yielded is not None:
                kept.append(yielded)
            actions = action_tensor.cpu().numpy().reshape(action_shape)
            clipped_actions = (
                self._to_env(actions) if is_box else actions.copy()
            )  # which the environment may write into
            # Now, as an environment may write its next observation into the same array.
            rollout_buffer.add_observation(self._last_obs, self._last_episode_starts)

            new_obs, rewards, dones, infos = env.step(clipped_actions)

            self.num_timesteps += env.num_envs
            callback.update_locals(locals())
            if not callback.on_step():
                return False

            self._update_info_buffer(infos, dones)
            if dones.any():
                for idx in dones.nonzero()[0]:
                    terminal_obs = infos[idx].get("terminal_observation")
                    if is_as_made:
                        raise_if_misshapen(terminal_obs, self.observation_space, int(idx))
                    is_cut = terminal_obs is not None and infos[idx].get("TimeLimit.truncated", False)
                    if is_cut and self._bootstraps_timeouts:
                        timeouts.add(n_steps, int(idx), terminal_obs)

            rollout_buffer.add_transition(actions, rewards)
            n_steps += 1
            self._last_obs = new_obs  # type: ignore[assignment]
            self._last_episode_starts = dones
            if watch is not None and watch.is_touched() and watch.has_changed():
                # By a callback. The steps so far are evaluated by the policy that made them, each later one at once.
                with th.no_grad(), watch.as_at_first():
                    kept = kept or self._evaluate_steps(actor_critic, rollout_buffer)
                    timeouts.evaluate(self._chunks)
                watch = None
                self._policy_changes_in_rollouts = True
            if self._rollout_is_complete(n_steps, n_rollout_steps, dones):
                break

        if watch is not None and (watch.is_replaced(self.policy) or watch.has_changed()):
            self._policy_changes_in_rollouts = True
            warnings.warn(
                "The policy was changed while it collected a rollout, in a way that is seen only at the end of it (by "
                ".data, or by another tensor, layer or hook). In this one rollout the change was not followed as "
                "Stable-Baselines3 would follow it; from the next rollout on it is, as each step is evaluated at once",
                stacklevel=2,
            )

        with th.no_grad():
            self._evaluate_rollout(actor_critic, rollout_buffer, kept)
            values = actor_critic.values(obs_as_tensor(new_obs, self.device))  # type: ignore[arg-type]
            raise_if_rollout_not_finite(rollout_buffer, values.cpu().numpy(), new_obs)
            timeouts.evaluate(self._chunks)
            timeouts.bootstrap(self.gamma)
        rollout_buffer.compute_returns_and_advantage(last_values=values, dones=dones)

        callback.update_locals(locals())
        callback.on_rollout_end()
        rollout_buffer.forget_flat()  # a callback may have edited any of its arrays
        return True

    def _collect_as_sb3(
        self,
        env: VecEnv,
        callback: BaseCallback,
        rollout_buffer: sb3_buffers.RolloutBuffer,
        n_rollout_steps: int,
    ) -> bool:
        """Collect by SB3's own method, which gives a buffer of the user's own each step when it is made."""
        steps: list[th.Tensor] = []
        policy = self.policy
        if self._needs_old_params:
            self._check_family()
            hook = policy.register_forward_hook(lambda *_: steps.append(params_of(policy.action_dist)))
        try:
            is_full = super().collect_rollouts(env, callback, rollout_buffer, n_rollout_steps)
        finally:
            if self._needs_old_params:
                hook.remove()
        if not is_full:
            return False
        raise_if_rollout_not_finite(rollout_buffer, rollout_buffer.advantages, self._last_obs)
        if self._needs_old_params:
            assert isinstance(rollout_buffer, RolloutBuffer)
            if len(steps) != rollout_buffer.buffer_size:
                raise ValueError(
                    f"The policy was called {len(steps)} times in a rollout of {rollout_buffer.buffer_size} steps, so "
                    "that the parameters of the distributions that acted are not known. Let callbacks use "
                    "policy.predict() instead"
                )
            params = _env_by_env(steps)
            assert params is not None
            rollout_buffer.set_params(params)
        return True

    def _to_env(self, actions: np.ndarray) -> np.ndarray:
        """A Box action as the environment takes it: unscaled if squashed, else clipped to the bounds."""
        if self.policy.squash_output:
            return self.policy.unscale_action(actions)
        assert isinstance(self.action_space, spaces.Box)
        # np.clip does the same in three times the time
        clipped: np.ndarray = np.minimum(np.maximum(actions, self.action_space.low), self.action_space.high)
        return clipped

    def _chunks(self, n_samples: int) -> Iterator[slice]:
        """Cut a rollout so that the memory a pass through the networks takes is bounded."""
        size = max(get_flattened_obs_dim(self.observation_space), 1)
        rows = max(1, min(_CHUNK_ROWS, _CHUNK_NUMBERS // size))
        return (slice(start, min(start + rows, n_samples)) for start in range(0, n_samples, rows))

    def _evaluate_rollout(self, actor_critic: ActorCritic, rollout_buffer: RolloutBuffer, kept: list[Kept]) -> None:
        """
        Put values, log-probabilities and distribution parameters of all steps into the buffer.

        :param actor_critic: the policy
        :param rollout_buffer: holding the transitions
        :param kept: what the steps already yielded, one a step, or empty
        """
        observations, actions = rollout_buffer.flat_inputs()
        if kept:
            values, log_probs, params = (_env_by_env(parts) for parts in zip(*kept, strict=True))
        else:
            parts = []
            evaluate_actions = self._evaluate_actions(actor_critic)
            for rows in self._chunks(len(actions)):
                evaluation = evaluate_actions(obs_rows(observations, rows), actions[rows])
                parts.append((evaluation.values, evaluation.log_prob, evaluation.params))
            values, log_probs, params = (th.cat(chunked) for chunked in zip(*parts, strict=True))
        if kept and params is not None:
            assert actor_critic.family is not None
            of_params = actor_critic.family.log_prob(params, actions)
            if log_probs is None:
                log_probs = of_params
            else:
                self._check_params(of_params, log_probs)
        assert values is not None
        assert log_probs is not None
        rollout_buffer.set_evaluation(values, log_probs, params)

    def _evaluate_steps(self, actor_critic: ActorCritic, rollout_buffer: RolloutBuffer) -> list[Kept]:
        """Values and distribution parameters of the steps that a rollout has so far, for each."""
        observations, actions = rollout_buffer.inputs_so_far()
        chunks = [
            actor_critic.evaluate_actions(obs_rows(observations, rows), actions[rows])
            for rows in self._chunks(len(actions))
        ]
        values = th.split(th.cat([chunk.values for chunk in chunks]), self.n_envs)
        params = th.split(th.cat([chunk.params for chunk in chunks]), self.n_envs)
        return [Kept(of_values, None, of_params) for of_values, of_params in zip(values, params, strict=True)]

    def _check_params(self, of_params: th.Tensor, log_probs: th.Tensor) -> None:
        """
        :param of_params: log-probabilities of the actions by the parameters of the policy's distributions
        :param log_probs: by the policy itself
        :raises ValueError: if they are not of the same distributions
        """
        # Rounding alone makes them differ for single actions, at the end of a squashed range.
        differs = (of_params - log_probs).abs() > 0.01 * (1.0 + log_probs.abs())
        if differs.float().mean() > 0.5:
            raise ValueError(
                f"policy={self._policy_name()} is not allowed: its log-probabilities are not those of its action_dist "
                f"(a {type(self.policy.action_dist).__name__}), whose exact KL divergence {type(self).__name__} needs. "
                "No update was made. DualClipPPO and REINFORCE learn with any distribution"
            )


def _name(factory: Any) -> str:
    """Of a class, or of what a user has put in a class's place."""
    return getattr(factory, "__name__", repr(factory))


def _env_by_env(steps: Sequence[th.Tensor | None]) -> th.Tensor | None:
    """What each step gave for all environments, in the order of the flat rollout; None if the steps did not give it."""
    present = [step for step in steps if step is not None]
    return th.stack(present, dim=1).flatten(0, 1) if present else None
