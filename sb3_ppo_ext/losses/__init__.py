"""
Losses of policy-gradient methods, and the advantages and returns they learn from: pure functions of tensors that need
only torch.

A ``*_loss`` is elementwise and is to be minimised; the caller reduces it. All tensors of a call have the same shape,
which may be any; ``mask`` is 1 or True where an element counts. A hyper-parameter is a number, which is checked, or a
0-d tensor, whose value is not read on the host, so that schedules can enter a compiled graph. Advantages and returns
are computed from whole rollouts of shape ``(T, n_envs)``; see :mod:`sb3_ppo_ext.losses.targets`.

Inputs of 16 bits (float16, bfloat16) are converted to float32, and the results are float32: the ratio e^20 and the sum
over a long batch overflow in float16. Their gradients have the dtype of the inputs, as always in autograd; a gradient
beyond 65504 is infinite in float16. All other dtypes are kept.

On the CPU, a mask with values other than 0 and 1 is refused. On other devices, and in a graph that is traced or
compiled, the values are not checked, and everything except 0 counts as 1::

    import torch as th
    from sb3_ppo_ext import losses

    policy_loss, diagnostics = losses.dual_clip_surrogate_loss(
        log_prob, old_log_prob, advantages, clip_range=0.2, dual_clip=3.0, mask=mask
    )
    value_loss = losses.value_loss(values, returns, mask=mask)
    loss = losses.masked_mean(policy_loss + 0.5 * value_loss, mask)
    loss.backward()
    print(diagnostics.clip_fraction, diagnostics.kl_k3)
"""

from sb3_ppo_ext.losses.aggregation import AggregationMode, aggregate, masked_mean
from sb3_ppo_ext.losses.decoupled import decoupled_surrogate_loss
from sb3_ppo_ext.losses.kl import kl_abs, kl_k1, kl_k2, kl_k3
from sb3_ppo_ext.losses.ratios import log_ratio, probability_ratio, truncated_importance_weights
from sb3_ppo_ext.losses.surrogates import (
    Diagnostics,
    SurrogateLoss,
    clipped_surrogate_loss,
    dual_clip_surrogate_loss,
    kl_penalized_surrogate_loss,
    reinforce_loss,
    spo_surrogate_loss,
    surrogate_loss,
)
from sb3_ppo_ext.losses.targets import VTrace, generalized_advantages, n_step_returns, vtrace
from sb3_ppo_ext.losses.token_sequences import masked_entropy, masked_whiten, token_gae, token_rewards
from sb3_ppo_ext.losses.values import pessimistic_clipped_value_loss, prediction_clipped_value_loss, value_loss

__all__ = [
    "AggregationMode",
    "Diagnostics",
    "SurrogateLoss",
    "VTrace",
    "aggregate",
    "clipped_surrogate_loss",
    "decoupled_surrogate_loss",
    "dual_clip_surrogate_loss",
    "generalized_advantages",
    "kl_abs",
    "kl_k1",
    "kl_k2",
    "kl_k3",
    "kl_penalized_surrogate_loss",
    "log_ratio",
    "masked_entropy",
    "masked_mean",
    "masked_whiten",
    "n_step_returns",
    "pessimistic_clipped_value_loss",
    "prediction_clipped_value_loss",
    "probability_ratio",
    "reinforce_loss",
    "spo_surrogate_loss",
    "surrogate_loss",
    "token_gae",
    "token_rewards",
    "truncated_importance_weights",
    "value_loss",
    "vtrace",
]
