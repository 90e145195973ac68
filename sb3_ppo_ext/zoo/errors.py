"""Errors that a user sees as one line: our own, and how the commands tell them from a programming error."""

from __future__ import annotations

import difflib
import importlib.util
import traceback

import gymnasium as gym


class EntryError(ValueError):
    """A configuration or one of its entries is wrong; the message names it."""


class StudyError(ValueError):
    """A ``study`` command cannot do what it was asked to; the message says what to change."""


# An error of these types is a sufficient message if only the modules below were running; for the errors that have
# caused it, modules that read files and build networks are allowed, too.
MESSAGE_TYPES = (AssertionError, ImportError, NotImplementedError, OSError, ValueError, gym.error.Error)
_MODULES = {
    "_frozen_importlib",
    "_frozen_importlib_external",
    "contextlib",
    "functools",
    "gymnasium",
    "huggingface_hub",
    "huggingface_sb3",
    "importlib",
    "pathlib",
    "rl_zoo3",
    "runpy",
    "sb3_contrib",
    "sb3_ppo_ext",
    "stable_baselines3",
    "yaml",
}
_MODULES_OF_CAUSES = _MODULES | {"base64", "cloudpickle", "codecs", "io", "json", "pickle", "torch", "zipfile"}


def needs_no_traceback(error: BaseException | None) -> bool:
    """Whether an error's message is enough: none of the user's own code was running, whose traceback is wanted."""
    if not str(error):
        return False
    modules = _MODULES
    while error is not None:
        for frame, _ in traceback.walk_tb(error.__traceback__):
            spec = frame.f_globals.get("__spec__")  # which names a module that is run as `__main__`, too
            name = spec.name if spec else str(frame.f_globals.get("__name__"))
            if name.split(".")[0] not in modules:
                return False
        error, modules = error.__cause__, _MODULES_OF_CAUSES
    return True


def unknown_environment(env_id: str) -> str:
    """
    :param env_id: of an environment that is not registered
    :return: a message that says what may help
    """
    if (env_id.startswith("ALE/") or "NoFrameskip-v" in env_id) and importlib.util.find_spec("ale_py") is None:
        return f"{env_id} is an Atari game, and ale-py is missing: pip install ale-py opencv-python"
    close = difflib.get_close_matches(env_id, gym.registry, n=1)
    maybe = f" You maybe meant {close[0]}?" if close else ""
    return f"{env_id} not found: a package that registers it must be installed, and named with --gym-packages.{maybe}"
