"""Making the buffer and the policy of an algorithm; an error is put down to the arguments that it comes from."""

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

    :param algorithm: whose ``seed`` it is
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
    The buffer that the arguments of an algorithm describe.

    :param algorithm: whose ``rollout_buffer_class`` and ``rollout_buffer_kwargs`` are read
    :raises ArgumentError: if the class refuses its arguments, whatever it says it by: SB3 asserts, or stumbles
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
    The policy that the arguments of an algorithm describe, on its device.

    :param algorithm: whose ``policy_class`` and ``policy_kwargs`` are read
    :raises ArgumentError: if it is no policy, or refuses its arguments
    """
    policy_class: Any = algorithm.policy_class
    kwargs = algorithm.policy_kwargs
    given = f"policy={policy_name(algorithm)}"
    check_policy_class(policy_class, given)
    # sb3-contrib's policies that take masks have no gSDE, as no Box of actions can be masked.
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
        check_policy_class(type(policy), given)  # of a function in a class's place, what it returns
        is_dict = isinstance(algorithm.observation_space, spaces.Dict)
        if is_dict and type(getattr(policy, "features_extractor", None)) is FlattenExtractor:
            raise TypeError("its features extractor takes one array, and the observations are several")
    return policy


def check_steps_that_do_not_count(algorithm: OnPolicyAlgorithm) -> None:
    """
    :param algorithm: with its environments, if it has some
    :raises ArgumentError: if these spend steps of their own on beginning episodes, and the algorithm or a wrapper
        cannot tell these from others
    """
    if algorithm.env is None or not resets_take_steps(algorithm.env):
        return
    buffer = algorithm.rollout_buffer
    if whole_steps(algorithm.env) is None:
        reason = f"in a {type(algorithm.env).__name__}, which does not pass on which steps these are"
    elif has_memory(algorithm.policy):
        reason = f"with policy={policy_name(algorithm)}, which has a memory"
    elif not _is_read_as_made(buffer):
        reason = f"with rollout_buffer_class={type(buffer).__name__}, which does not know which steps these are"
    else:
        return
    raise ArgumentError(
        f"env={algorithm.env.unwrapped!r:.100} is not allowed {reason}: each environment spends a step of its own on "
        "beginning an episode, from which nothing can be learnt (autoreset_mode NEXT_STEP). Take one with SAME_STEP or "
        "DISABLED, or gymnasium's SyncVectorEnv or AsyncVectorEnv without a vector wrapper"
    )


def _is_read_as_made(buffer: SB3RolloutBuffer) -> bool:
    """Whether samples are taken from a rollout buffer in this package's way."""
    return isinstance(buffer, RolloutBuffer) and not buffer.wants_every_step and type(buffer).get is RolloutBuffer.get


# A sequence that is not chosen by the user is at most as long.
_LONGEST_SEQUENCE = 16
_SHORT_SEQUENCE = 8


def set_sequence_length(algorithm: Any) -> None:
    """
    Tell the rollout buffer through how many steps gradients go back in time, if the policy has a memory.

    :param algorithm: with its policy and its rollout buffer
    :raises ArgumentError: if ``sequence_length`` does not fit the policy, or the rollout and the minibatches; or if the
        policy has a memory and cannot be trained with it
    """
    given = algorithm.sequence_length
    if not has_memory(algorithm.policy):
        if given is not None:
            raise ArgumentError(
                f"sequence_length={given!r} is not allowed with policy={policy_name(algorithm)}, which has no memory: "
                "it must be None, or the policy MlpLstmPolicy, CnnLstmPolicy or MultiInputLstmPolicy"
            )
        return
    reason = refusal(algorithm.policy)
    if reason is not None:
        raise cannot_remember(algorithm, reason)
    buffer = algorithm.rollout_buffer
    if not _is_read_as_made(buffer):
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
            raise ArgumentError(f"sequence_length={given!r} is not allowed with {name}={size}: it must divide it")
    buffer.sequence_length = int(given)


def cannot_remember(algorithm: OnPolicyAlgorithm, reason: str) -> ArgumentError:
    """
    :param algorithm: whose policy has a memory and cannot be run
    :param reason: why, as :func:`refusal` gives it
    """
    return ArgumentError(
        f"policy={policy_name(algorithm)} is not allowed: it has a memory, and {reason}. It must be one of "
        "sb3_contrib's recurrent policies or of this package as it is"
    )


def say_sequence_length(algorithm: Any) -> None:
    """
    Say how long sequences are, where the user has not; and warn if they are short.

    :param algorithm: whose policy has a memory
    """
    length = algorithm.rollout_buffer.sequence_length
    chosen = f"sequence_length={length}: gradients go back through {length} step(s)"
    if length < min(_SHORT_SEQUENCE, algorithm.n_steps):
        warnings.warn(
            f"{chosen}, the most up to {_LONGEST_SEQUENCE} that divides n_steps={algorithm.n_steps} and "
            f"batch_size={algorithm.batch_size}. Choose multiples of {_LONGEST_SEQUENCE} for both, or say "
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
    :param algorithm: whose spaces it is for
    :param given: what is being made, as the user gave it
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
            f"observation_space={algorithm.observation_space} and action_space={algorithm.action_space}, such as "
            f"{allowed}{did_you_mean(error, keywords)}"
        ) from error


def check_own_buffer(algorithm: OnPolicyAlgorithm, given: str) -> None:
    """
    :param algorithm: that wants to read more of its rollouts than SB3's buffers keep
    :param given: which argument is not allowed otherwise
    :raises ArgumentError: if a derived buffer does some of it in its own way
    """
    buffer: Any = algorithm.rollout_buffer
    is_ours = isinstance(buffer, RolloutBuffer) and type(buffer).get is RolloutBuffer.get
    if not is_ours or buffer.wants_every_step:
        raise ArgumentError(
            f"{given} rollout_buffer_class={type(buffer).__name__}: it must be a subclass of "
            "sb3_ppo_ext.common.buffers.RolloutBuffer without an add(), a get() or a "
            "compute_returns_and_advantage() of its own"
        )


def check_no_memory(algorithm: OnPolicyAlgorithm, given: str) -> None:
    """
    :param algorithm: that wants values of a rollout by other parameters
    :param given: which argument is not allowed otherwise
    :raises ArgumentError: if the policy has a memory
    """
    if has_memory(algorithm.policy):
        raise ArgumentError(
            f"{given} policy={policy_name(algorithm)}: what it remembers in the midst of a rollout is known of the "
            "parameters alone that it was collected with, so that there are no values of others"
        )


def policy_name(algorithm: OnPolicyAlgorithm) -> str:
    """
    The policy of an algorithm as its user names it.

    :param algorithm: whose ``policy_class`` it is
    """
    policy_class: Any = algorithm.policy_class
    aliases = (alias for alias, aliased in algorithm.policy_aliases.items() if aliased is policy_class)
    return next(aliases, name_of(policy_class))


def name_of(factory: Any) -> str:
    """
    The name of a class, or of what a user has put in a class's place.

    :param factory: what makes objects
    """
    return getattr(factory, "__name__", repr(factory))


ACTION_SPACES = (spaces.Box, spaces.Discrete, spaces.MultiDiscrete, spaces.MultiBinary)
