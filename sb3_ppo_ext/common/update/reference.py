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
"""The name of the policy that a model has when it begins to learn."""

_ALLOWED = (
    "it must be None, a policy of Stable-Baselines3's kind (such as model.policy), the path of a saved model, or "
    f"{INITIAL!r}"
)


class FrozenPolicy:
    """
    A copy of a policy that nothing changes: its parameters have no gradients and no optimiser knows them, it stays in
    evaluation mode, and its running statistics stand still. It is pickled as its class, the arguments of that and its
    weights, which are on the CPU then.

    :param policy: to be copied; its class must be able to make it anew, as ``policy.save`` and ``policy.load`` do
    """

    def __init__(self, policy: ActorCriticPolicy | MaskableActorCriticPolicy) -> None:
        self._make(type(policy), _arguments_of(policy), policy.state_dict())

    def _make(self, policy_class: Any, arguments: dict[str, Any], state: dict[str, th.Tensor]) -> None:
        with th.random.fork_rng(devices=[]):  # the weights that it is made with are drawn, and replaced
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
        Parameters of its distributions, under the masks if there are some.

        :param inputs: of a rollout
        :return: shape ``(batch, n_params)``
        """
        inputs = PolicyInput(inputs.obs, inputs.mask)  # the state of a recurrent policy is none of its own
        actor_critic: ActorCritic
        if refusal(self.policy) is None:
            actor_critic = direct_actor_critic(self.policy)
        else:
            actor_critic = SB3ActorCritic(self.policy, with_params=True)
        of_chunks = chunks(inputs.n_rows, self.policy.observation_space)
        return th.cat([actor_critic.params(inputs.rows(rows)) for rows in of_chunks])


def _arguments_of(policy: ActorCriticPolicy | MaskableActorCriticPolicy) -> dict[str, Any]:
    arguments = {**policy._get_constructor_parameters(), "lr_schedule": ConstantSchedule(0.0)}
    if not getattr(policy, "share_features_extractor", True):  # which Stable-Baselines3 forgets
        arguments["share_features_extractor"] = False
    return arguments


def frozen(given: Any) -> FrozenPolicy:
    """
    :param given: a policy, a frozen one, or the path of a saved model
    :raises ArgumentError: if it is none of them, or cannot be copied or read
    """
    if isinstance(given, FrozenPolicy):
        return given
    if isinstance(given, (str, os.PathLike)):
        name, policy = f"reference_policy={os.fspath(given)!r}", None
        try:
            policy = _policy_of_file(given)
        except Exception as error:  # whatever comes of a file that is no model's
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
    except Exception as error:  # of a class of the user's own
        raise ArgumentError(
            f"{name} is not allowed: it cannot be copied ({type(error).__name__}: {error}); it must be a policy that "
            "its class can make anew, as policy.save() and policy.load() do"
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
    :param policy: that is to learn
    :param rollout_buffer: of its rollouts
    :raises ArgumentError: if the two cannot be compared in such a rollout
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
            f"{given}: {type(reference).__name__} has a memory, and what it would remember in the midst of a rollout "
            "is not known; it must be a policy without one"
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
    Ask the reference for its distributions in a rollout that has been evaluated, before targets are computed. They are
    the buffer's ``reference_params``; its ``penalties`` are ``coef * (log pi(a|s) - log pi_ref(a|s))``.

    :param rollout_buffer: filled
    :param reference: to stay close to
    :param reward_coef: what is taken off the rewards, in units of nats; None: nothing
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

    :param rollout_buffer: with what :func:`compare` has put there
    :param family: of the distributions
    :return: exact ``KL(pi || pi_ref)`` of the policy that acted, the reward, and what is taken off it, shape ``(3,)``;
        and how many steps they are of
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
    """What stands in the buffer for the steps that count."""
    flat = rollout_buffer._to_flat(stored).flatten()
    if isinstance(rollout_buffer, EpisodeBuffer):
        return flat[rollout_buffer._counts]
    return flat if rollout_buffer.counts is None else flat[rollout_buffer._flat_of("counts").flatten()]
