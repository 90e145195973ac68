"""Checkpoints, under the module name that scripts and configurations of the first edition import."""

from sb3_ppo_ext.common.saving.checkpoint import (
    SafeCheckpointCallback,
    latest_checkpoint,
    load_vec_normalize,
    load_weights,
    resume,
    save_checkpoint,
)

__all__ = [
    "SafeCheckpointCallback",
    "latest_checkpoint",
    "load_vec_normalize",
    "load_weights",
    "resume",
    "save_checkpoint",
]
