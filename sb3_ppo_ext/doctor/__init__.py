"""
A doctor for trainings: reads logs, and says what looks ill, what that usually means and what to change first.

:class:`DoctorCallback` does it while a training runs, ``sb3-ppo-ext doctor`` afterwards.
"""

from sb3_ppo_ext.doctor.callback import DoctorCallback

__all__ = ["DoctorCallback"]
