"""The four algorithms, with arguments that make a rollout and an update as short as they can be."""

from __future__ import annotations

from typing import Any

from sb3_ppo_ext import REINFORCE, TRPO, AdaptiveKLPPO, DualClipPPO

ALGORITHMS: tuple[Any, ...] = (DualClipPPO, AdaptiveKLPPO, TRPO, REINFORCE)
# What has epochs of minibatches over one rollout, and may have its whole update compiled.
PROXIMAL: tuple[Any, ...] = (DualClipPPO, AdaptiveKLPPO)

ROLLOUT = 16  # steps of one environment, where a rollout is so many steps
SMALL_NET: dict[str, Any] = {"net_arch": [8]}

_SMALL: dict[Any, dict[str, Any]] = {
    DualClipPPO: {"n_steps": ROLLOUT, "batch_size": 8, "n_epochs": 2},
    AdaptiveKLPPO: {"n_steps": ROLLOUT, "batch_size": 8, "n_epochs": 2},
    TRPO: {"n_steps": ROLLOUT, "batch_size": 8, "n_critic_updates": 2},
    REINFORCE: {"episodes_per_env": 4, "batch_size": 8, "n_critic_updates": 2, "baseline": "value"},
}


def small(algorithm: Any, policy: Any, env: Any, **kwargs: Any) -> Any:
    """
    A model on the CPU with a net of one layer.

    :param algorithm: one of :data:`ALGORITHMS`
    :param policy: as its constructor takes it
    :param env: as its constructor takes it
    :param kwargs: what is to be otherwise; ``policy_kwargs`` are added to those of the small net
    """
    policy_kwargs = {**SMALL_NET, **kwargs.pop("policy_kwargs", {})}
    return algorithm(
        policy, env, **{"seed": 0, "device": "cpu", **_SMALL[algorithm], **kwargs, "policy_kwargs": policy_kwargs}
    )


def parameters(model: Any) -> list[Any]:
    """A copy of the policy's parameters."""
    return [parameter.detach().clone() for parameter in model.policy.parameters()]
