"""The rollout buffers and what they give, where Stable-Baselines3 has its own."""

from sb3_ppo_ext.common.rollout.buffers import DictRolloutBuffer, RolloutBuffer
from sb3_ppo_ext.common.rollout.data import RolloutSamples

__all__ = ["DictRolloutBuffer", "RolloutBuffer", "RolloutSamples"]
