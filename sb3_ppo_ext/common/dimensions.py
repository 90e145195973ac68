"""Quantities that add up over the independent dimensions of an action."""

from __future__ import annotations

from typing import Any

from gymnasium import spaces

from sb3_ppo_ext.common.distributions import family_of_space

TARGET_KL_PER_DIMENSION = 0.01


def n_action_dims(action_space: spaces.Space[Any]) -> int:
    """
    How many independent dimensions an action has: the components of a Box, 1 for Discrete, the length of a
    MultiDiscrete, the bits of a MultiBinary. KL divergence and Fisher information are sums over them.

    :param action_space: of the environment
    """
    return family_of_space(action_space).action_dim
