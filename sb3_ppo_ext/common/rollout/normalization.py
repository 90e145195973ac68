"""Normalise observations inside the policy, so that the running statistics are saved with it."""

from __future__ import annotations

from typing import Any

import torch as th
from gymnasium import spaces
from stable_baselines3.common.preprocessing import is_image_space
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from torch import nn

from sb3_ppo_ext.common.errors import ArgumentError

_ALL = "observations"  # the name of the part, where they are not a Dict


class RunningMoments(nn.Module):
    """
    ``(x - mean) / sqrt(var + 1e-8)``, clipped to +-10, as in ``VecNormalize``, with the mean and the variance of all x
    that were added.

    :param shape: of one x
    """

    mean: th.Tensor
    var: th.Tensor
    count: th.Tensor

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.register_buffer("mean", th.zeros(shape))
        self.register_buffer("var", th.ones(shape))
        self.register_buffer("count", th.zeros(()))

    def forward(self, x: th.Tensor) -> th.Tensor:
        return ((x - self.mean) * (self.var + 1e-8).rsqrt()).clamp(-10.0, 10.0)

    @th.no_grad()
    def add(self, mean: th.Tensor, var: th.Tensor, n: th.Tensor) -> None:
        """
        Add a batch (Chan et al. 1979), in place.

        :param mean: of the batch
        :param var: of the batch, with divisor n
        :param n: size of the batch, a scalar
        """
        total: th.Tensor = self.count + n
        apart = mean - self.mean
        squares = self.var * self.count + var * n + apart.square() * (self.count * n / total)
        self.mean.add_((apart * (n / total)).to(self.mean.dtype))
        self.var.copy_(squares / total)
        self.count.copy_(total)


class NormalizedObservations(BaseFeaturesExtractor):
    """
    A features extractor that normalises observations of a ``Box`` (not images), and all such parts of a ``Dict``.

    :param extractor: the extractor that gets the normalised observations
    """

    def __init__(self, extractor: BaseFeaturesExtractor) -> None:
        space = extractor._observation_space
        super().__init__(space, extractor.features_dim)
        self.extractor = extractor
        parts = space.spaces if isinstance(space, spaces.Dict) else {_ALL: space}
        self.moments = nn.ModuleDict(
            {
                key: RunningMoments(part.shape)
                for key, part in parts.items()
                if isinstance(part, spaces.Box) and not is_image_space(part)
            }
        )
        if not self.moments:
            raise ArgumentError(
                f"normalize_observations=True is not allowed with observation_space={space}: there must be a Box that "
                "is no image"
            )

    def forward(self, observations: Any) -> th.Tensor:
        features: th.Tensor = self.extractor(self.normalized(observations))
        return features

    def normalized(self, observations: Any) -> Any:
        """
        :param observations: preprocessed, a batch of tensors or a dict of such
        """
        if not isinstance(observations, dict):
            return self.moments[_ALL](observations)
        return {key: self.moments[key](x) if key in self.moments else x for key, x in observations.items()}

    def parts(self, observations: Any) -> list[tuple[RunningMoments, th.Tensor]]:
        """
        The parts that are normalised, each with its moments.

        :param observations: a batch of tensors or a dict of such
        """
        of_parts = observations if isinstance(observations, dict) else {_ALL: observations}
        return [(moments, of_parts[key]) for key, moments in self.moments.items()]  # type: ignore[misc]
