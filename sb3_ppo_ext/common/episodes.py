"""The episode buffers, under the name that files of the first edition have."""

from sb3_ppo_ext.common.rollout.episode_buffer import DictEpisodeBuffer, EpisodeBuffer

__all__ = ["DictEpisodeBuffer", "EpisodeBuffer"]
