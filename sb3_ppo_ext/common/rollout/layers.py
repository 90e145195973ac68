"""The networks of a policy as lists of functions, which cost less to call than modules."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch as th
from gymnasium import spaces
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.preprocessing import is_image_space, preprocess_obs
from stable_baselines3.common.torch_layers import FlattenExtractor, NatureCNN
from torch import nn
from torch.nn import functional as F  # noqa: N812  (the name every torch user knows)

from sb3_ppo_ext.common.rollout.normalization import NormalizedObservations
from sb3_ppo_ext.common.rollout.purity import has_hooks

Layer = Callable[[th.Tensor], th.Tensor]


def preprocessor(
    space: spaces.Space[Any], normalize_images: bool, *, for_batches: bool = False
) -> Callable[[Any], Any]:
    """
    SB3's ``preprocess_obs`` for one space. SB3's function inspects the space at each call, which costs more than a
    small layer and cannot be compiled.

    :param space: of the observations
    :param normalize_images: whether bytes are divided by 255
    :param for_batches: whether images may be laid out channels last, in which the CPU's convolutions are faster on
        large batches; the results then differ in the last bits
    """
    if isinstance(space, spaces.Dict):
        parts = {
            key: preprocessor(part, normalize_images, for_batches=for_batches) for key, part in space.spaces.items()
        }
        return lambda obs: {key: part(obs[key]) for key, part in parts.items()}
    if isinstance(space, spaces.Box) and normalize_images and is_image_space(space):
        # Bytes divided by a number are floats; there is no second large tensor on the way.
        return (lambda obs: _channels_last(obs) / 255.0) if for_batches else (lambda obs: obs / 255.0)
    if isinstance(space, (spaces.Box, spaces.MultiBinary)):
        return lambda obs: obs.float()
    if isinstance(space, spaces.Discrete):
        n = int(space.n)
        return lambda obs: F.one_hot(obs.long(), num_classes=n).float()
    return lambda obs: preprocess_obs(obs, space)  # MultiDiscrete, or the error that SB3 raises


def _channels_last(images: th.Tensor) -> th.Tensor:
    return images.contiguous(memory_format=th.channels_last) if images.device.type == "cpu" else images


def apply(layers: list[Layer], x: Any) -> th.Tensor:
    """
    Call one after the other.

    :param layers: functions
    :param x: what the first one takes
    """
    for layer in layers:
        x = layer(x)
    result: th.Tensor = x
    return result


def unrolled_extractor(policy: ActorCriticPolicy, extractor: nn.Module) -> list[Layer]:
    """
    A features extractor as a list of functions, which is empty if preprocessed observations are already flat.

    :param policy: whose extractor it is
    :param extractor: of the actor, the critic or both
    """
    if has_hooks(extractor):
        return [extractor]
    if type(extractor) is NormalizedObservations:
        return [extractor.normalized, *unrolled_extractor(policy, extractor.extractor)]
    if type(extractor) is FlattenExtractor and len(policy.observation_space.shape or ()) == 1:
        return []
    if type(extractor) is NatureCNN:
        return unrolled(extractor.cnn) + unrolled(extractor.linear)
    return [extractor]


def unrolled(module: nn.Module) -> list[Layer]:
    """
    A module as a list of functions. Calling a torch module costs as much as a small layer's arithmetic; a linear layer
    or an activation without hooks is replaced by the function that it calls; other modules stay as they are.
    """
    if has_hooks(module):
        return [module]
    if type(module) is nn.Sequential:
        children = list(module)
        return [
            function
            for child, before in zip(children, [None, *children], strict=False)
            for function in ([th.relu_] if _may_overwrite(child, before) else unrolled(child))
        ]
    if type(module) is nn.Linear:
        return [partial(_linear, module)]
    if type(module) is nn.Tanh:
        return [th.tanh]
    return [module]


def _may_overwrite(module: nn.Module, before: nn.Module | None) -> bool:
    """Whether a module is a ReLU whose input nothing else uses: after a large convolution, a copy takes time."""
    is_fresh = before is not None and type(before) in (nn.Conv2d, nn.Linear) and not has_hooks(before)
    return is_fresh and type(module) is nn.ReLU and not has_hooks(module)


def _linear(module: nn.Linear, x: th.Tensor) -> th.Tensor:
    # The parameters are looked up at the call, so that torch.func.functional_call can swap them.
    return F.linear(x, module.weight, module.bias)
