"""Choose the adapter that runs the networks of a policy."""

from __future__ import annotations

from sb3_contrib.common.recurrent.policies import RecurrentActorCriticPolicy
from stable_baselines3.common.policies import ActorCriticPolicy, BasePolicy

from sb3_ppo_ext.common.rollout.actor_critic import DirectActorCritic
from sb3_ppo_ext.common.rollout.recurrent_actor_critic import RecurrentActorCritic


def has_memory(policy: BasePolicy) -> bool:
    """
    Whether a policy is one of sb3-contrib's recurrent policies.

    :param policy: of any kind
    """
    return isinstance(policy, RecurrentActorCriticPolicy)


def refusal(policy: BasePolicy) -> str | None:
    """
    :param policy: to be run
    :return: why its networks cannot be called directly, as the end of a sentence; None if they can
    """
    return (RecurrentActorCritic if has_memory(policy) else DirectActorCritic).refusal(policy)


def direct_actor_critic(
    policy: ActorCriticPolicy, *, with_params: bool = True, for_program: bool = False
) -> DirectActorCritic:
    """
    Create the adapter that calls the networks of a policy directly; :func:`refusal` must return None for it.

    :param policy: to be run
    :param with_params: whether evaluations also give the distribution parameters
    :param for_program: whether the adapter will be compiled
    """
    if has_memory(policy):
        return RecurrentActorCritic(policy, with_params=with_params, unrolls=for_program)
    return DirectActorCritic(policy, with_params=with_params)
