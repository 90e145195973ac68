"""The rollout buffers, where Stable-Baselines3 has its own."""

from sb3_ppo_ext.common.rollout.buffers import DictRolloutBuffer, RolloutBuffer

__all__ = ["DictRolloutBuffer", "RolloutBuffer"]
