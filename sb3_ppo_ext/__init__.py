"""On-policy algorithms and losses for Stable-Baselines3."""

from sb3_ppo_ext.adaptive_kl_ppo import AdaptiveKLPPO
from sb3_ppo_ext.common.rollout.array_envs import ArrayVecEnv
from sb3_ppo_ext.common.saving.checkpoint import (
    SafeCheckpointCallback,
    latest_checkpoint,
    load_vec_normalize,
    load_weights,
    resume,
    save_checkpoint,
)
from sb3_ppo_ext.dual_clip_ppo import DualClipPPO
from sb3_ppo_ext.reinforce import REINFORCE
from sb3_ppo_ext.trpo import TRPO

__version__ = "0.1.0"

__all__ = [
    "REINFORCE",
    "TRPO",
    "AdaptiveKLPPO",
    "ArrayVecEnv",
    "DualClipPPO",
    "SafeCheckpointCallback",
    "__version__",
    "latest_checkpoint",
    "load_vec_normalize",
    "load_weights",
    "resume",
    "save_checkpoint",
]
