"""Actions in the form that the environment takes."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch as th
from gymnasium import spaces


class EnvActions:
    """
    Copies actions and brings them into the form that the environment takes: Box actions are unscaled if the policy
    squashes them, otherwise clipped to the bounds. The environment may write into the copy.

    :param action_space: of the environment
    :param device: of the actions, if they are tensors; None: they are arrays
    """

    def __init__(self, action_space: spaces.Space[Any], device: th.device | None) -> None:
        self._device = device
        self._is_box = isinstance(action_space, spaces.Box)
        if isinstance(action_space, spaces.Box):
            self._low: Any = action_space.low
            self._high: Any = action_space.high
            if device is not None:  # once, because a copy to a GPU at each step would take longer than the clipping
                self._low, self._high = th.as_tensor(self._low, device=device), th.as_tensor(self._high, device=device)

    def __call__(self, actions: Any, policy: Any) -> Any:
        """
        :param actions: as the policy drew them, shape ``(n_envs, *action_shape)``
        :param policy: the policy that drew them
        """
        is_tensor = self._device is not None
        if not self._is_box:
            return actions.clone() if is_tensor else actions.copy()
        low, high = self._low, self._high
        if policy.squash_output:
            return low + 0.5 * (actions + 1.0) * (high - low) if is_tensor else policy.unscale_action(actions)
        if is_tensor:
            return th.clamp(actions, low, high)
        # np.clip does the same but takes three times as long
        return np.minimum(np.maximum(actions, low), high)
