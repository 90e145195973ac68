"""Let the actor and the critic see different parts of Dict observations."""

from __future__ import annotations

from typing import Any

import torch as th
from gymnasium import spaces
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor

from sb3_ppo_ext.common.errors import ArgumentError


class ObservationGroup(BaseFeaturesExtractor):
    """
    A features extractor that sees some of the keys of Dict observations.

    :param extractor: for observations that have these keys alone
    :param keys: that it sees
    """

    def __init__(self, extractor: BaseFeaturesExtractor, keys: list[str]) -> None:
        super().__init__(extractor._observation_space, extractor.features_dim)
        self.extractor = extractor
        self._keys = keys

    def forward(self, observations: dict[str, th.Tensor]) -> th.Tensor:
        features: th.Tensor = self.extractor({key: observations[key] for key in self._keys})
        return features


def groups_of(space: spaces.Space[Any], critic_key: Any) -> tuple[spaces.Dict, spaces.Dict]:
    """
    :param space: of the observations
    :param critic_key: the key that only the critic sees
    :return: the space of the actor, with all other keys, and the space of the critic, with this key alone
    :raises ArgumentError: if it is not one of several keys
    """
    given = f"critic_observation_key={critic_key!r} is not allowed"
    if not isinstance(space, spaces.Dict):
        raise ArgumentError(
            f"{given} with observations that are {type(space).__name__}: they must be Dict, of which the critic sees "
            "one key and the actor the others"
        )
    if critic_key not in space.spaces:
        raise ArgumentError(f"{given}: it must be a key of the observations, one of {', '.join(map(repr, space))}")
    of_actor = {key: part for key, part in space.spaces.items() if key != critic_key}
    if not of_actor:
        raise ArgumentError(f"{given}: it is the only key of the observations, and the actor must see another one")
    return spaces.Dict(of_actor), spaces.Dict({critic_key: space.spaces[critic_key]})
