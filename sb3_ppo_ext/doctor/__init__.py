"""
A doctor for trainings: it reads logs and says what looks wrong, what that usually means, and what to change first.

:class:`DoctorCallback` diagnoses a training while it runs, ``sb3-ppo-ext doctor`` afterwards.
"""

from sb3_ppo_ext.doctor.callback import DoctorCallback

__all__ = ["DoctorCallback"]
