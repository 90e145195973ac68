"""A frozen reference policy: evaluated once per rollout and saved within the model."""

from __future__ import annotations

import os
from typing import Any

import torch as th
from sb3_contrib.common.maskable.policies import MaskableActorCriticPolicy
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.save_util import load_from_zip_file
from stable_baselines3.common.utils import ConstantSchedule

from sb3_ppo_ext.common.distributions import Family
from sb3_ppo_ext.common.errors import ArgumentError, NonFiniteError
from sb3_ppo_ext.common.policy_distributions import family_of_policy
from sb3_ppo_ext.common.rollout.actor_critic import ActorCritic, SB3ActorCritic
from sb3_ppo_ext.common.rollout.adapters import direct_actor_critic, has_memory, refusal
from sb3_ppo_ext.common.rollout.buffers import RolloutBuffer
from sb3_ppo_ext.common.rollout.data import PolicyInput, chunks
from sb3_ppo_ext.common.rollout.episode_buffer import EpisodeBuffer

INITIAL = "initial"
"""Names the policy that a model has when it begins to learn."""

_ALLOWED = (
    "it must be None, a policy of Stable-Baselines3's kind (such as model.policy), the path of a saved model, or "
    f"{INITIAL!r}"
)


class FrozenPolicy:
    """
    A copy of a policy that never changes: its parameters have no gradients and no optimiser, it stays in evaluation
    mode, and its running statistics are fixed. It is pickled as its class, the constructor's arguments, and its
    weights, moved to the CPU.

    :param policy: the policy to copy; its class must be able to rebuild it, as ``policy.save`` and ``policy.load`` do
    """

    def __init__(self, policy: ActorCriticPolicy | MaskableActorCriticPolicy) -> None:
        self._make(type(policy), _arguments_of(policy), policy.state_dict())

    def _make(self, policy_class: Any, arguments: dict[str, Any], state: dict[str, th.Tensor]) -> None:
        with th.random.fork_rng(devices=[]):  # its constructor draws random weights, which are replaced
            self.policy: ActorCriticPolicy = policy_class(**arguments)
        self.policy.load_state_dict(state)
        self.policy.requires_grad_(False)
        self.policy.set_training_mode(False)

    def __getstate__(self) -> tuple[Any, dict[str, Any], dict[str, th.Tensor]]:
        state = {name: tensor.cpu() for name, tensor in self.policy.state_dict().items()}
        return type(self.policy), _arguments_of(self.policy), state

    def __setstate__(self, state: tuple[Any, dict[str, Any], dict[str, th.Tensor]]) -> None:
        self._make(*state)

    @property
    def family(self) -> Family | None:
        """The formulas of its distributions."""
        return family_of_policy(self.policy)

    @th.no_grad()
    def params(self, inputs: PolicyInput) -> th.Tensor:
        """
        The parameters of its distributions, with action masks applied if there are any.

        :param inputs: inputs of the rollout's policy
        :return: shape ``(batch, n_params)``
        """
        inputs = PolicyInput(inputs.obs, inputs.mask)  # without a recurrent state, as this policy has no memory
        actor_critic: ActorCritic
        if refusal(self.policy) is None:
            actor_critic = direct_actor_critic(self.policy)
        else:
            actor_critic = SB3ActorCritic(self.policy, with_params=True)
        of_chunks = chunks(inputs.n_rows, self.policy.observation_space)
        return th.cat([actor_critic.params(inputs.rows(rows)) for rows in of_chunks])


def _arguments_of(policy: ActorCriticPolicy | MaskableActorCriticPolicy) -> dict[str, Any]:
    arguments = {**policy._get_constructor_parameters(), "lr_schedule": ConstantSchedule(0.0)}
    if not getattr(policy, "share_features_extractor", True):  # Stable-Baselines3 omits it
        arguments["share_features_extractor"] = False
    return arguments


def frozen(given: Any) -> FrozenPolicy:
    """
    Make a frozen copy of a reference policy.

    :param given: a policy, a frozen policy (returned as it is), or the path of a saved model
    :raises ArgumentError: if it is none of these, or cannot be read or copied
    """
    if isinstance(given, FrozenPolicy):
        return given
    if isinstance(given, (str, os.PathLike)):
        name, policy = f"reference_policy={os.fspath(given)!r}", None
        try:
            policy = _policy_of_file(given)
        except Exception as error:  # a file that is no saved model may raise anything
            raise ArgumentError(
                f"{name} is not allowed: {_ALLOWED}; from this path, no model with a policy can be read "
                f"({type(error).__name__}: {error})"
            ) from error
    else:
        name, policy = f"reference_policy={type(given).__name__}(...)", given
    if not isinstance(policy, (ActorCriticPolicy, MaskableActorCriticPolicy)):
        raise ArgumentError(f"{name} is not allowed: {_ALLOWED}")
    try:
        return FrozenPolicy(policy)
    except Exception as error:  # a user's own class may raise anything
        raise ArgumentError(
            f"{name} is not allowed: it cannot be copied ({type(error).__name__}: {error}); it must be a policy that "
            "its class can rebuild, as policy.save() and policy.load() do"
        ) from error


def _policy_of_file(path: str | os.PathLike[str]) -> Any:
    data, params, _ = load_from_zip_file(os.fspath(path), device="cpu")
    assert data is not None
    with th.random.fork_rng(devices=[]):
        policy = data["policy_class"](
            data["observation_space"],
            data["action_space"],
            ConstantSchedule(0.0),
            **({"use_sde": True} if data.get("use_sde") else {}),
            **data["policy_kwargs"],
        )
    policy.load_state_dict(params["policy"])
    return policy


def check_reference(reference: Any, policy: Any, rollout_buffer: Any) -> None:
    """
    :param reference: the policy to stay close to
    :param policy: the policy that learns
    :param rollout_buffer: the buffer for its rollouts
    :raises ArgumentError: if the two policies cannot be compared in such a buffer
    """
    given = "reference_policy is not allowed"
    for name in ("observation_space", "action_space"):
        of_reference, own = getattr(reference, name), getattr(policy, name)
        if of_reference != own:
            raise ArgumentError(
                f"{given}: its {name} is {of_reference}, and the model's is {own}; both must be the same"
            )
    if has_memory(reference):
        raise ArgumentError(
            f"{given}: {type(reference).__name__} has a memory, and its state in the middle of a rollout is not known; "
            "it must be a policy without memory"
        )
    if family_of_policy(reference) != family_of_policy(policy):
        raise ArgumentError(
            f"{given}: its distributions, of {type(reference.action_dist).__name__}, have other parameters than the "
            f"model's, of {type(policy.action_dist).__name__}; both must be of one kind"
        )
    if (
        not isinstance(rollout_buffer, RolloutBuffer)
        or rollout_buffer.wants_every_step
        or type(rollout_buffer).get not in (RolloutBuffer.get, EpisodeBuffer.get)
    ):
        raise ArgumentError(
            f"rollout_buffer_class={type(rollout_buffer).__name__} is not allowed with a reference_policy: it must be "
            "a subclass of sb3_ppo_ext.common.buffers.RolloutBuffer without an add(), a get() or a "
            "compute_returns_and_advantage() of its own"
        )


def compare(rollout_buffer: RolloutBuffer, reference: FrozenPolicy, reward_coef: float | None) -> None:
    """
    Compute the reference policy's distributions in a rollout, after its log-probabilities and before its advantages and
    returns. Sets the buffer's ``reference_params``, and its ``penalties``, which are subtracted from the rewards, to
    ``reward_coef * (log pi(a|s) - log pi_ref(a|s))``.

    :param rollout_buffer: filled
    :param reference: the policy to stay close to
    :param reward_coef: penalty on the reward per nat of the log-ratio; None: no penalties
    :raises NonFiniteError: if the reference gives an action that was taken the probability 0
    """
    family = reference.family
    assert family is not None
    inputs, actions = rollout_buffer.flat_inputs()
    rollout_buffer.reference_params = params = reference.params(inputs)
    log_ratios = rollout_buffer._flat_of("log_probs").flatten() - family.log_prob(params, actions)
    if not bool(log_ratios.isfinite().all()):
        raise NonFiniteError(
            "The reference policy gives an action that was taken the probability 0 (or a log-probability that is not "
            "finite), so that the KL divergence from it is not finite. No update was made"
        )
    rollout_buffer.penalties = None if reward_coef is None else rollout_buffer._unflat(reward_coef * log_ratios)


def measured(rollout_buffer: RolloutBuffer, family: Family) -> tuple[th.Tensor, int]:
    """
    Means over the steps of a rollout that count.

    :param rollout_buffer: a buffer after :func:`compare`
    :param family: the formulas of the distributions
    :return: the means of the exact ``KL(pi || pi_ref)`` of the policy that acted, of the reward and of the penalty,
        shape ``(3,)``; and the number of these steps
    """
    samples = rollout_buffer.flat()
    assert samples.reference_params is not None
    kl = samples.counted(family.kl(samples.old_params, samples.reference_params))
    rewards = _counted(rollout_buffer, rollout_buffer.stored("rewards"))
    penalties = rollout_buffer.penalties
    of_penalties = th.zeros_like(rewards) if penalties is None else _counted(rollout_buffer, penalties)
    means = [x.mean().item() for x in (kl, rewards, of_penalties)]
    return th.tensor(means, dtype=th.float64), len(rewards)


def _counted(rollout_buffer: RolloutBuffer, stored: Any) -> th.Tensor:
    """The stored values of the steps that count, flat."""
    flat = rollout_buffer._to_flat(stored).flatten()
    if isinstance(rollout_buffer, EpisodeBuffer):
        return flat[rollout_buffer._counts]
    return flat if rollout_buffer.counts is None else flat[rollout_buffer._flat_of("counts").flatten()]
