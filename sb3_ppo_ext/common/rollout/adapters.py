"""Which adapter runs the networks of a policy."""

from __future__ import annotations

from sb3_contrib.common.recurrent.policies import RecurrentActorCriticPolicy
from stable_baselines3.common.policies import ActorCriticPolicy, BasePolicy

from sb3_ppo_ext.common.rollout.actor_critic import DirectActorCritic
from sb3_ppo_ext.common.rollout.recurrent_actor_critic import RecurrentActorCritic


def has_memory(policy: BasePolicy) -> bool:
    """
    Whether a policy is recurrent, as those of sb3-contrib are.

    :param policy: of any kind
    """
    return isinstance(policy, RecurrentActorCriticPolicy)


def refusal(policy: BasePolicy) -> str | None:
    """
    :param policy: to be run
    :return: why its networks must be run by the policy's methods, as the end of a sentence; None if they need not
    """
    return (RecurrentActorCritic if has_memory(policy) else DirectActorCritic).refusal(policy)


def direct_actor_critic(
    policy: ActorCriticPolicy, *, with_params: bool = True, for_program: bool = False
) -> DirectActorCritic:
    """
    What runs the networks of a policy that is not refused.

    :param policy: to be run
    :param with_params: whether evaluations also give the distribution parameters
    :param for_program: whether it is to be compiled
    """
    if has_memory(policy):
        return RecurrentActorCritic(policy, with_params=with_params, unrolls=for_program)
    return DirectActorCritic(policy, with_params=with_params)
