"""The episode buffers, under the module name that model files of the first edition contain."""

from sb3_ppo_ext.common.rollout.episode_buffer import DictEpisodeBuffer, EpisodeBuffer

__all__ = ["DictEpisodeBuffer", "EpisodeBuffer"]
