"""Construct the buffer and the policy of an algorithm, with errors that name the arguments that cause them."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch as th
from gymnasium import spaces
from sb3_contrib.common.maskable.policies import MaskableActorCriticPolicy
from stable_baselines3.common.buffers import RolloutBuffer as SB3RolloutBuffer
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.torch_layers import FlattenExtractor

from sb3_ppo_ext.common.errors import ArgumentError
from sb3_ppo_ext.common.policies import check_policy_class, keywords_of
from sb3_ppo_ext.common.rollout.adapters import has_memory, refusal
from sb3_ppo_ext.common.rollout.buffers import RolloutBuffer
from sb3_ppo_ext.common.rollout.transitions import resets_take_steps, whole_steps
from sb3_ppo_ext.common.spaces import fitting_policies
from sb3_ppo_ext.common.validation import did_you_mean


def set_seed(algorithm: OnPolicyAlgorithm) -> None:
    """
    Seed everything that draws random numbers.

    :param algorithm: has the attribute ``seed``
    :raises ArgumentError: if the environments cannot be seeded
    """
    try:
        algorithm.set_random_seed(algorithm.seed)
    except (AttributeError, NotImplementedError) as error:
        raise ArgumentError(
            f"seed={algorithm.seed!r} is not allowed with this vector of environments, "
            f"{name_of(type(algorithm.env))}: its seed() does not work ({type(error).__name__}: {error}); it must be "
            "None, or seed() must work"
        ) from error


def make_rollout_buffer(algorithm: OnPolicyAlgorithm) -> SB3RolloutBuffer:
    """
    Construct the rollout buffer of an algorithm.

    :param algorithm: has ``rollout_buffer_class`` and ``rollout_buffer_kwargs``
    :raises ArgumentError: if the class refuses its arguments, with any kind of error
    """
    buffer_class: Any = algorithm.rollout_buffer_class
    kwargs = algorithm.rollout_buffer_kwargs
    with _refusal(
        algorithm,
        f"rollout_buffer_class={name_of(buffer_class)} with rollout_buffer_kwargs={kwargs!r}",
        "a subclass of Stable-Baselines3's RolloutBuffer, of DictRolloutBuffer for Dict observations",
        lambda: keywords_of(buffer_class),
    ):
        buffer: SB3RolloutBuffer = buffer_class(
            algorithm.n_steps,
            algorithm.observation_space,
            algorithm.action_space,
            device=algorithm.device,
            gamma=algorithm.gamma,
            gae_lambda=algorithm.gae_lambda,
            n_envs=algorithm.n_envs,
            **kwargs,
        )
    return buffer


def make_policy(algorithm: OnPolicyAlgorithm) -> ActorCriticPolicy:
    """
    Construct the policy of an algorithm, on its device.

    :param algorithm: has ``policy_class`` and ``policy_kwargs``
    :raises ArgumentError: if the class is no policy, or refuses its arguments
    """
    policy_class: Any = algorithm.policy_class
    kwargs = algorithm.policy_kwargs
    given = f"policy={policy_name(algorithm)}"
    check_policy_class(policy_class, given)
    # sb3-contrib's policies with action masks have no gSDE, because Box actions cannot be masked.
    is_maskable = isinstance(policy_class, type) and issubclass(policy_class, MaskableActorCriticPolicy)
    with _refusal(
        algorithm,
        f"{given} with policy_kwargs={kwargs!r}",
        fitting_policies(algorithm.observation_space),
        lambda: keywords_of(policy_class, *kwargs.values()),
    ):
        policy: ActorCriticPolicy = policy_class(
            algorithm.observation_space,
            algorithm.action_space,
            algorithm.lr_schedule,
            **({} if is_maskable else {"use_sde": algorithm.use_sde}),
            **kwargs,
        ).to(algorithm.device)
        check_policy_class(type(policy), given)  # policy_class may be a function that returns a policy
        is_dict = isinstance(algorithm.observation_space, spaces.Dict)
        if is_dict and type(getattr(policy, "features_extractor", None)) is FlattenExtractor:
            raise TypeError("its features extractor takes one array, and Dict observations are several")
    return policy


def check_can_start(algorithm: OnPolicyAlgorithm, log_interval: int | None) -> None:
    """
    :param algorithm: that is to learn
    :param log_interval: argument of ``learn``
    :raises ArgumentError: if it has no environment, or the argument is not allowed
    """
    if algorithm.env is None:
        raise ArgumentError(
            f"env=None is not allowed in learn(): this {type(algorithm).__name__} has no environment, as it was loaded "
            "without one. load(..., env=...) or set_env(...) gives it one"
        )
    if log_interval == 0:
        raise ArgumentError("log_interval=0 is not allowed: it must be an integer of at least 1, or None")


def check_steps_that_do_not_count(algorithm: OnPolicyAlgorithm) -> None:
    """
    :param algorithm: with its environments, if it has any
    :raises ArgumentError: if the environments spend whole steps on beginning episodes, and a wrapper, the policy or the
        buffer cannot skip such steps
    """
    if algorithm.env is None or not resets_take_steps(algorithm.env):
        return
    buffer = algorithm.rollout_buffer
    if whole_steps(algorithm.env) is None:
        reason = f"in a {type(algorithm.env).__name__}, which does not pass on which steps begin an episode"
    elif has_memory(algorithm.policy):
        reason = f"with policy={policy_name(algorithm)}, which has a memory"
    elif not _uses_own_methods(buffer):
        reason = f"with rollout_buffer_class={type(buffer).__name__}, which cannot tell which steps begin an episode"
    else:
        return
    raise ArgumentError(
        f"env={algorithm.env.unwrapped!r:.100} is not allowed {reason}: each environment spends a whole step on "
        "beginning an episode, and nothing can be learnt from that step (autoreset_mode NEXT_STEP). Use autoreset_mode "
        "SAME_STEP or DISABLED, or gymnasium's SyncVectorEnv or AsyncVectorEnv without a vector wrapper"
    )


def _uses_own_methods(buffer: SB3RolloutBuffer) -> bool:
    """Whether a rollout buffer is filled and read by this package's own methods."""
    return isinstance(buffer, RolloutBuffer) and not buffer.wants_every_step and type(buffer).get is RolloutBuffer.get


_LONGEST_SEQUENCE = 16  # the largest default of sequence_length
_SHORT_SEQUENCE = 8  # a shorter default is a warning


def set_sequence_length(algorithm: Any) -> None:
    """
    Set the sequence length of the rollout buffer, if the policy has a memory.

    :param algorithm: with its policy and its rollout buffer
    :raises ArgumentError: if ``sequence_length`` does not fit the policy, the rollout or the minibatches; or if the
        policy has a memory that cannot be trained
    """
    given = algorithm.sequence_length
    if not has_memory(algorithm.policy):
        if given is not None:
            raise ArgumentError(
                f"sequence_length={given!r} is not allowed with policy={policy_name(algorithm)}, which has no memory: "
                "it must be None, or the policy must be MlpLstmPolicy, CnnLstmPolicy or MultiInputLstmPolicy"
            )
        return
    reason = refusal(algorithm.policy)
    if reason is not None:
        raise cannot_remember(algorithm, reason)
    buffer = algorithm.rollout_buffer
    if not _uses_own_methods(buffer):
        raise ArgumentError(
            f"rollout_buffer_class={type(buffer).__name__} is not allowed with policy={policy_name(algorithm)}, which "
            "has a memory: it must be a subclass of sb3_ppo_ext.common.buffers.RolloutBuffer without an add(), a get() "
            "or a compute_returns_and_advantage() of its own"
        )
    sizes = {"batch_size": algorithm.batch_size}
    if not algorithm._rollouts_vary:
        sizes["n_steps"] = algorithm.n_steps
    if given is None:
        common = math.gcd(*sizes.values())
        given = max(n for n in range(1, _LONGEST_SEQUENCE + 1) if common % n == 0)
    for name, size in sizes.items():
        if size % given:
            raise ArgumentError(f"sequence_length={given!r} is not allowed with {name}={size}: it must divide {name}")
    buffer.sequence_length = int(given)


def cannot_remember(algorithm: OnPolicyAlgorithm, reason: str) -> ArgumentError:
    """
    :param algorithm: its policy has a memory and cannot be run
    :param reason: why not, as :func:`refusal` gives it
    :return: the error to raise
    """
    return ArgumentError(
        f"policy={policy_name(algorithm)} is not allowed: it has a memory, and {reason}. It must be an unchanged "
        "recurrent policy of sb3_contrib or of this package"
    )


def say_sequence_length(algorithm: Any) -> None:
    """
    Print the default sequence length, with ``verbose``; warn if it is short.

    :param algorithm: its policy has a memory
    """
    length = algorithm.rollout_buffer.sequence_length
    chosen = f"sequence_length={length}: gradients go back through {length} step(s)"
    if length < min(_SHORT_SEQUENCE, algorithm.n_steps):
        warnings.warn(
            f"{chosen}, the largest number up to {_LONGEST_SEQUENCE} that divides n_steps={algorithm.n_steps} and "
            f"batch_size={algorithm.batch_size}. Choose multiples of {_LONGEST_SEQUENCE} for both, or set "
            "sequence_length",
            stacklevel=2,
        )
    elif algorithm.verbose >= 1:
        print(chosen)


@contextmanager
def _refusal(
    algorithm: OnPolicyAlgorithm, given: str, allowed: str, keywords: Callable[[], set[str]]
) -> Iterator[None]:
    """
    Replace an error of a constructor that cannot take its arguments by an error that names them.

    :param algorithm: has the spaces that the constructor must fit
    :param given: the class and its arguments, as the user gave them
    :param allowed: an example of what is allowed
    :param keywords: returns the names of the arguments that the class has
    :raises ArgumentError: for an error in the ``with`` block
    """
    try:
        yield
    except ArgumentError:
        raise
    except (AssertionError, AttributeError, NotImplementedError, RuntimeError, TypeError) as error:
        if isinstance(error, (th.OutOfMemoryError, th.AcceleratorError)):
            raise
        raise ArgumentError(
            f"{given} is not allowed ({type(error).__name__}: {error}); it must fit "
            f"observation_space={algorithm.observation_space} and action_space={algorithm.action_space}, such as "
            f"{allowed}{did_you_mean(error, keywords)}"
        ) from error


def check_own_buffer(algorithm: OnPolicyAlgorithm, given: str) -> None:
    """
    :param algorithm: it needs more of its rollouts than SB3's buffers keep
    :param given: beginning of the message, which names the argument that needs it
    :raises ArgumentError: if its rollout buffer is not filled and read by this package's own methods
    """
    buffer = algorithm.rollout_buffer
    if not _uses_own_methods(buffer):
        raise ArgumentError(
            f"{given} rollout_buffer_class={type(buffer).__name__}: it must be a subclass of "
            "sb3_ppo_ext.common.buffers.RolloutBuffer without an add(), a get() or a "
            "compute_returns_and_advantage() of its own"
        )


def check_no_memory(algorithm: OnPolicyAlgorithm, given: str) -> None:
    """
    :param algorithm: it needs the values of a rollout by other parameters than those that collected it
    :param given: beginning of the message, which names the argument that needs them
    :raises ArgumentError: if the policy has a memory
    """
    if has_memory(algorithm.policy):
        raise ArgumentError(
            f"{given} policy={policy_name(algorithm)}, which has a memory: within a rollout, the memory is known only "
            "for the parameters that collected it, so values by other parameters cannot be computed"
        )


def policy_name(algorithm: OnPolicyAlgorithm) -> str:
    """
    The policy of an algorithm by the name that the user would give.

    :param algorithm: has ``policy_class`` and ``policy_aliases``
    """
    policy_class: Any = algorithm.policy_class
    aliases = (alias for alias, aliased in algorithm.policy_aliases.items() if aliased is policy_class)
    return next(aliases, name_of(policy_class))


def name_of(factory: Any) -> str:
    """
    The name of a class, or of a function in its place.

    :param factory: makes the objects
    """
    return getattr(factory, "__name__", repr(factory))


ACTION_SPACES = (spaces.Box, spaces.Discrete, spaces.MultiDiscrete, spaces.MultiBinary)
