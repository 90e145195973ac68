"""The checkpoint callback, under the name that configurations of the first edition have."""

from sb3_ppo_ext.common.saving.checkpoint import SafeCheckpointCallback

__all__ = ["SafeCheckpointCallback"]
