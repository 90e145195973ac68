"""Errors that a user sees as one line, and how the commands distinguish them from programming errors."""

from __future__ import annotations

import difflib
import importlib.util
import traceback

import gymnasium as gym


class EntryError(ValueError):
    """A configuration or one of its entries is wrong; the message says which."""


class StudyError(ValueError):
    """A ``study`` command cannot do what it was asked to; the message says what to change."""


# The message of such an error is enough if its traceback contains only the modules below. The errors that caused it may
# also come from modules that read files and build networks.
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
    """Whether the message of an error is enough: none of the user's own code is in its traceback."""
    if not str(error):
        return False
    modules = _MODULES
    while error is not None:
        for frame, _ in traceback.walk_tb(error.__traceback__):
            spec = frame.f_globals.get("__spec__")  # has the name of a module even if it runs as `__main__`
            name = spec.name if spec else str(frame.f_globals.get("__name__"))
            if name.split(".")[0] not in modules:
                return False
        error, modules = error.__cause__, _MODULES_OF_CAUSES
    return True


def unknown_environment(env_id: str) -> str:
    """
    :param env_id: id of an environment that is not registered
    :return: an error message that says what may help
    """
    if (env_id.startswith("ALE/") or "NoFrameskip-v" in env_id) and importlib.util.find_spec("ale_py") is None:
        return f"{env_id} is an Atari game, and ale-py is missing: pip install ale-py opencv-python"
    close = difflib.get_close_matches(env_id, gym.registry, n=1)
    maybe = f" Did you mean {close[0]}?" if close else ""
    return f"{env_id} not found: a package that registers it must be installed, and named with --gym-packages.{maybe}"
