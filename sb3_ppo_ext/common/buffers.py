"""The rollout buffers and their samples, under a module name like that of Stable-Baselines3."""

from sb3_ppo_ext.common.rollout.buffers import DictRolloutBuffer, RolloutBuffer
from sb3_ppo_ext.common.rollout.data import RolloutSamples

__all__ = ["DictRolloutBuffer", "RolloutBuffer", "RolloutSamples"]
