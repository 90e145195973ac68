"""
Which networks are pure functions of their parameters and the observations.

The fast way to collect runs only the actor at each step and evaluates the whole rollout once, after it is full. This
gives the same results only if no pass through the network changes the result of a later pass, and if no pass draws
random numbers. It is therefore used for networks that are *known* to be pure: the extractors of Stable-Baselines3 and
plain layers of torch, in evaluation mode, without hooks. Every other network is evaluated at each step, as in
Stable-Baselines3.

An attribute declares a custom module pure::

    class Extractor(BaseFeaturesExtractor):
        is_pure = True

It applies to the module and all modules in it. It promises that in evaluation mode each row of the outputs depends
only on the parameters and the same row of the inputs, and that passes change no state.
"""

from __future__ import annotations

from stable_baselines3.common import torch_layers as sb3
from stable_baselines3.common.policies import ActorCriticPolicy
from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from sb3_ppo_ext.common.rollout.normalization import NormalizedObservations, RunningMoments
from sb3_ppo_ext.common.rollout.observation_groups import ObservationGroup
from sb3_ppo_ext.common.torch_internals import has_module_hooks

_PURE: frozenset[type[nn.Module]] = frozenset(
    {
        sb3.CombinedExtractor,
        sb3.FlattenExtractor,
        sb3.MlpExtractor,
        sb3.NatureCNN,
        NormalizedObservations,
        ObservationGroup,
        RunningMoments,
        nn.Sequential,
        nn.ModuleList,
        nn.ModuleDict,
        nn.Identity,
        nn.Flatten,
        nn.Unflatten,
        nn.Linear,
        nn.LSTM,
        nn.GRU,
        nn.Conv1d,
        nn.Conv2d,
        nn.Conv3d,
        nn.ConvTranspose1d,
        nn.ConvTranspose2d,
        nn.ConvTranspose3d,
        nn.Embedding,
        nn.LayerNorm,
        nn.GroupNorm,
        nn.RMSNorm,
        nn.BatchNorm1d,
        nn.BatchNorm2d,
        nn.BatchNorm3d,
        nn.Dropout,
        nn.Dropout1d,
        nn.Dropout2d,
        nn.Dropout3d,
        nn.AlphaDropout,
        nn.AvgPool1d,
        nn.AvgPool2d,
        nn.AvgPool3d,
        nn.MaxPool1d,
        nn.MaxPool2d,
        nn.MaxPool3d,
        nn.AdaptiveAvgPool1d,
        nn.AdaptiveAvgPool2d,
        nn.AdaptiveAvgPool3d,
        nn.AdaptiveMaxPool1d,
        nn.AdaptiveMaxPool2d,
        nn.AdaptiveMaxPool3d,
        nn.CELU,
        nn.ELU,
        nn.GELU,
        nn.GLU,
        nn.Hardsigmoid,
        nn.Hardswish,
        nn.Hardtanh,
        nn.LeakyReLU,
        nn.LogSigmoid,
        nn.LogSoftmax,
        nn.Mish,
        nn.PReLU,
        nn.ReLU,
        nn.ReLU6,
        nn.SELU,
        nn.SiLU,
        nn.Sigmoid,
        nn.Softmax,
        nn.Softplus,
        nn.Softsign,
        nn.Tanh,
    }
)


BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)

# Layers that draw random numbers in training mode.
_NOISY = (
    nn.Dropout,
    nn.Dropout1d,
    nn.Dropout2d,
    nn.Dropout3d,
    nn.AlphaDropout,
    nn.FeatureAlphaDropout,
    nn.RReLU,
)

_METHODS = frozenset({"forward", "forward_actor", "forward_critic"})


def has_hooks(module: nn.Module) -> bool:
    """
    Whether calling a module does more than its class defines, because of hooks or methods set on the instance.

    :param module: only this module is checked, not its children
    """
    return not _METHODS.isdisjoint(vars(module)) or has_module_hooks(module)


def has_hooks_inside(module: nn.Module) -> bool:
    """
    Whether a module or anything in it has hooks.

    :param module: checked with all modules in it
    """
    return any(has_hooks(part) for part in module.modules())


def keeps_statistics(policy: ActorCriticPolicy) -> bool:
    """
    Whether a pass in training mode may change the results of later passes, as in batch normalisation.

    :param policy: whose modules are looked at
    """
    known = _PURE | {type(policy)}
    return any(type(module) not in known or isinstance(module, BATCH_NORMS) for module in policy.modules())


def draws_noise(policy: nn.Module) -> bool:
    """
    Whether a layer that draws random numbers in training mode is in training mode.

    :param policy: while it acts
    """
    return any(module.training and _is_noisy(module) for module in policy.modules())


def _is_noisy(module: nn.Module) -> bool:
    return isinstance(module, _NOISY) or (isinstance(module, nn.RNNBase) and module.dropout > 0.0)


def impurity(policy: ActorCriticPolicy) -> str | None:
    """
    Why the networks of a policy are not known to be pure.

    :param policy: one that computes by Stable-Baselines3's own methods
    :return: a sentence about the first module that is not known to be pure; None if all are
    """
    if is_parametrized(policy):
        return "policy has parametrizations of its own parameters"
    names = ["pi_features_extractor", "mlp_extractor", "action_net", "value_net"]
    if not policy.share_features_extractor:
        names.insert(1, "vf_features_extractor")
    for name in names:
        found = _impurity(name.removeprefix("pi_") if len(names) == 4 else name, getattr(policy, name))
        if found is not None:
            return found
    for name in ("lstm_actor", "lstm_critic", "critic"):  # of a policy with a memory
        module = getattr(policy, name, None)
        if isinstance(module, nn.Module) and (found := _impurity(name, module)) is not None:
            return found
    return None


def _impurity(name: str, module: nn.Module) -> str | None:
    if has_hooks(module):
        return f"{name} ({type(module).__name__}) has hooks, or a method of its own"
    if type(module) not in _PURE:
        if getattr(module, "is_pure", False) is not True:
            return f"{name} ({type(module).__name__}) is not known to be a pure function of parameters and observations"
        return f"{name} ({type(module).__name__}) has hooks inside" if has_hooks_inside(module) else None
    if isinstance(module, BATCH_NORMS) and module.running_mean is None:
        return f"{name} ({type(module).__name__}) normalises by the batch, also in evaluation mode"
    if type(module) is nn.Embedding and module.max_norm is not None:
        return f"{name} (Embedding) changes its weights in each pass, by max_norm"
    for child_name, child in module.named_children():
        found = _impurity(f"{name}.{child_name}", child)
        if found is not None:
            return found
    return None
