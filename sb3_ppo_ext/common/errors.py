"""The errors of this package."""

from __future__ import annotations


class ArgumentError(ValueError, AssertionError):
    """
    An argument that cannot be used. It is both a ``ValueError`` and an ``AssertionError``, because Stable-Baselines3
    raises either, depending on the argument, and code that was written for it may catch either.
    """


class UnsupportedSpaceError(ArgumentError, NotImplementedError):
    """An unsupported observation space. It is also a ``NotImplementedError``, which Stable-Baselines3 raises."""


class NonFiniteError(ValueError):
    """
    A reward, an observation, a loss or a gradient is NaN or infinite. No gradient step was made with such a gradient;
    the message says whether other steps of the same update were made.
    """


class ProcessError(RuntimeError):
    """Another of the processes that train one model has failed; the message contains its error."""
