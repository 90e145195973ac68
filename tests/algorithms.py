"""The four algorithms, with arguments that make a rollout and an update as short as they can be."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch as th
from stable_baselines3 import PPO
from stable_baselines3.common.vec_env import VecEnv

from sb3_ppo_ext import REINFORCE, TRPO, AdaptiveKLPPO, DualClipPPO

ALGORITHMS: tuple[Any, ...] = (DualClipPPO, AdaptiveKLPPO, TRPO, REINFORCE)
# What has epochs of minibatches over one rollout, and may have its whole update compiled.
PROXIMAL: tuple[Any, ...] = (DualClipPPO, AdaptiveKLPPO)
# Whose rollouts are a number of steps, in a buffer that the user may choose.
STEP_BASED: tuple[Any, ...] = (DualClipPPO, AdaptiveKLPPO, TRPO)

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

    :param algorithm: one of :data:`ALGORITHMS`, or a child
    :param policy: as its constructor takes it
    :param env: as its constructor takes it
    :param kwargs: what is to be otherwise; ``policy_kwargs`` are added to those of the small net
    """
    policy_kwargs = {**SMALL_NET, **kwargs.pop("policy_kwargs", {})}
    of_base = next(_SMALL[base] for base in algorithm.__mro__ if base in _SMALL)
    return algorithm(policy, env, **{"seed": 0, "device": "cpu", **of_base, **kwargs, "policy_kwargs": policy_kwargs})


def ppo_and_ours(
    policy: Any,
    env: Callable[[], VecEnv],
    total_timesteps: int,
    *,
    callback: Callable[[], Any] = lambda: None,
    prepare: Callable[[Any], None] = lambda model: None,
    of_ours: dict[str, Any] | None = None,
    **kwargs: Any,
) -> tuple[Any, Any]:
    """
    SB3's PPO, and DualClipPPO without the second clip, trained alike: they are one algorithm.

    :param policy: as their constructors take it
    :param env: makes the environments, for each of them
    :param total_timesteps: for which they are trained
    :param callback: makes the callback, for each of them
    :param prepare: does something to each of them before it is trained
    :param of_ours: more arguments of DualClipPPO alone
    :param kwargs: what is to be otherwise for both; ``policy_kwargs`` are added to those of the small net
    """
    policy_kwargs = {**SMALL_NET, **kwargs.pop("policy_kwargs", {})}
    kwargs = {"seed": 0, "device": "cpu", **_SMALL[DualClipPPO], **kwargs, "policy_kwargs": policy_kwargs}
    models = []
    for algorithm, own in ((PPO, {}), (DualClipPPO, {"dual_clip": None, **(of_ours or {})})):
        model: Any = algorithm(policy, env(), **{**kwargs, **own})  # which seeds what the training draws from
        prepare(model)
        models.append(model.learn(total_timesteps, callback=callback()))
    theirs, ours = models
    return theirs, ours


def parameters(model: Any) -> list[th.Tensor]:
    """A copy of the policy's parameters."""
    return [parameter.detach().clone() for parameter in model.policy.parameters()]


def have_moved(model: Any, before: list[th.Tensor]) -> bool:
    """Whether any parameter is another than in ``before``, of :func:`parameters`; all must be finite."""
    after = parameters(model)
    assert all(bool(parameter.isfinite().all()) for parameter in after)
    return not all(map(th.equal, after, before))


def assert_same_policy(one: Any, other: Any) -> None:
    """Two models have the same parameters and buffers, to the bit."""
    assert_close_policies(one, other, atol=0.0)


def assert_close_policies(one: Any, other: Any, *, atol: float, rtol: float = 0.0) -> None:
    """Two models have the same parameters and buffers, but for what numerics allow."""
    th.testing.assert_close(other.policy.state_dict(), one.policy.state_dict(), atol=atol, rtol=rtol)
