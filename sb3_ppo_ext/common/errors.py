"""The errors of this package."""

from __future__ import annotations


class ArgumentError(ValueError, AssertionError):
    """
    An argument that cannot be used. It is a ``ValueError``, and an ``AssertionError`` as well: Stable-Baselines3 raises
    the one for some arguments and the other for others, and code that was written for it may catch either.
    """


class UnsupportedSpaceError(ArgumentError, NotImplementedError):
    """Observations that cannot be learnt from: a ``NotImplementedError`` as well, as Stable-Baselines3 raises it."""


class NonFiniteError(ValueError):
    """
    A reward, an observation, a loss or a gradient is NaN or infinite. No step was made along a gradient that is; the
    message says whether other steps of the same update were made.
    """


class ProcessError(RuntimeError):
    """Another of the processes that train one model has failed; the message says with what error."""
