"""
Figures of the objectives: the loss as a function of the ratio, the effect of an update on the samples of a rollout, and
how TRPO chooses its step. Each function returns a :class:`matplotlib.figure.Figure`, which :func:`save` writes.

``import sb3_ppo_ext`` does not import this module: write ``from sb3_ppo_ext import plots``. It needs matplotlib, which
``[plots]`` installs.
"""

import importlib.util

if importlib.util.find_spec("matplotlib") is None:
    raise ModuleNotFoundError("sb3_ppo_ext.plots needs matplotlib: pip install 'sb3-ppo-ext[plots]'", name="matplotlib")

from sb3_ppo_ext.plots.callback import ObjectiveFigureCallback
from sb3_ppo_ext.plots.objectives import cases_figure, surrogate_figure
from sb3_ppo_ext.plots.style import save
from sb3_ppo_ext.plots.trust_region import trust_region_figure
from sb3_ppo_ext.plots.updates import UpdatedSamples, update_figure, updated_samples

__all__ = [
    "ObjectiveFigureCallback",
    "UpdatedSamples",
    "cases_figure",
    "save",
    "surrogate_figure",
    "trust_region_figure",
    "update_figure",
    "updated_samples",
]
