"""On-policy algorithms and losses for Stable-Baselines3."""

from sb3_ppo_ext.dual_clip_ppo import DualClipPPO

__version__ = "0.1.0"

__all__ = ["DualClipPPO", "__version__"]
