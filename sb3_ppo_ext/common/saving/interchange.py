"""Find out which algorithm saved a model file, and whether another algorithm may load it."""

from __future__ import annotations

import base64
import json
import warnings
import zipfile
from collections.abc import Collection
from typing import Any

import cloudpickle  # type: ignore[import-untyped]
from gymnasium import spaces
from stable_baselines3.common.base_class import BaseAlgorithm

from sb3_ppo_ext.common.saving.files import ReadableFile, name_of_file
from sb3_ppo_ext.common.spaces import n_action_dims

# The member of a model file that names its algorithm. SB3 ignores it.
ALGORITHM = "_algorithm"

_PACKAGES = ("sb3_ppo_ext", "stable_baselines3", "sb3_contrib")
_COMMON = tuple(f"{package}.common." for package in _PACKAGES)

# The algorithms of files that name none: the first one whose attributes are all in the file.
_ATTRIBUTES = (
    ("sb3_ppo_ext.DualClipPPO", {"torch_compile", "dual_clip"}),
    ("sb3_ppo_ext.AdaptiveKLPPO", {"torch_compile", "kl_coef"}),
    ("sb3_ppo_ext.TRPO", {"torch_compile", "cg_damping"}),
    ("sb3_ppo_ext.REINFORCE", {"torch_compile", "episodes_per_env"}),
    ("sb3_contrib.TRPO", {"cg_max_steps"}),
    ("stable_baselines3.PPO", {"clip_range"}),
    ("stable_baselines3.A2C", {"gae_lambda"}),
)
MASKABLE_PPO = "sb3_contrib.MaskablePPO"
RECURRENT_PPO = "sb3_contrib.RecurrentPPO"

# The algorithms of sb3-contrib, by the modules of the policies and buffers in their files.
_OF_CONTRIB = {
    "sb3_contrib.common.maskable.": MASKABLE_PPO,
    "sb3_contrib.common.recurrent.": RECURRENT_PPO,
}


def name_of(algorithm: type[BaseAlgorithm]) -> str:
    """
    The name of the algorithm that a class is, or derives from. An algorithm of this package, of SB3 or of sb3-contrib
    is named as it is imported (``"sb3_ppo_ext.TRPO"``). A user's class that derives only from base classes has its own
    name.

    :param algorithm: the class
    """
    bases = [
        base
        for base in algorithm.__mro__
        if issubclass(base, BaseAlgorithm) and not base.__module__.startswith((*_COMMON, BaseAlgorithm.__module__))
    ]
    origin = bases[-1] if bases else algorithm
    package = origin.__module__.partition(".")[0]
    return f"{package}.{origin.__name__}" if package in _PACKAGES else origin.__name__


def mark_of(file: ReadableFile) -> str | None:
    """
    :param file: a model file
    :return: the algorithm that the file names; None if it names none, as files of SB3 do
    """
    with zipfile.ZipFile(file) as archive:
        return archive.read(ALGORITHM).decode() if ALGORITHM in archive.namelist() else None


def attributes_of(file: ReadableFile) -> dict[str, Any]:
    """
    :param file: a model file
    :return: the attributes in the file; a pickled attribute is a dict that describes it
    """
    with zipfile.ZipFile(file) as archive:
        attributes: dict[str, Any] = json.loads(archive.read("data"))
    return attributes


def unpickled(attributes: dict[str, Any], name: str) -> Any:
    """
    :param attributes: as :func:`attributes_of` gives them
    :param name: name of one of them
    :return: its value, unpickled if necessary
    """
    value = attributes[name]
    if isinstance(value, dict) and ":serialized:" in value:
        return cloudpickle.loads(base64.b64decode(value[":serialized:"]))
    return value


def why_missing(attributes: dict[str, Any], name: str) -> Exception | None:
    """
    :param attributes: as :func:`attributes_of` gives them
    :param name: name of an attribute
    :return: the error if its class cannot be imported here; None if it can be, or if there is no such attribute
    """
    if name in attributes:
        try:
            unpickled(attributes, name)
        except (ImportError, AttributeError) as error:
            return error
    return None


def origin_of(file: ReadableFile) -> str:
    """
    The algorithm that saved a model file: the one that the file names, otherwise the one whose attributes it has.

    :param file: a model file
    """
    mark = mark_of(file)
    if mark is not None:
        return mark
    attributes = attributes_of(file)
    for name in ("policy_class", "rollout_buffer_class"):
        module = str((attributes.get(name) or {}).get("__module__"))
        for of_contrib, origin in _OF_CONTRIB.items():
            if module.startswith(of_contrib):
                return origin
    fitting = (origin for origin, names in _ATTRIBUTES if names <= attributes.keys())
    return next(fitting, "another kind of algorithm")


def check_origin(origin: str, algorithm: type[BaseAlgorithm], also: Collection[str], path: object) -> None:
    """
    :param origin: the algorithm that saved the file
    :param algorithm: the class that loads it
    :param also: other algorithms whose files the class can load
    :param path: path of the file, or the open file
    :raises ValueError: if the class cannot load files of that algorithm
    """
    name, path = name_of(algorithm), name_of_file(path)
    if origin == name or origin in also or "." not in origin + name:  # two classes of the user's own
        return
    raise ValueError(
        f"{path} cannot be loaded by {algorithm.__name__}: it is a model of {origin}. Load it with that; or load only "
        "its weights into an existing model: load_weights(path, model.policy)"
    )


def whole_action_values(attributes: dict[str, Any]) -> dict[str, float]:
    """
    Convert ``target_kl`` and ``cg_damping`` of a model of sb3-contrib's TRPO to values for the whole action.

    :param attributes: as :func:`attributes_of` gives them
    """
    action_space = unpickled(attributes, "action_space")
    # sb3-contrib's KL divergence is the mean over the action dimensions, but the sum for a MultiDiscrete.
    n_dims = 1 if isinstance(action_space, spaces.MultiDiscrete) else n_action_dims(action_space)
    values: dict[str, float] = {
        name: n_dims * attributes[name] for name in ("target_kl", "cg_damping") if name in attributes
    }
    if n_dims > 1 and values:
        warnings.warn(
            f"Loading a model of sb3-contrib's TRPO, where target_kl and cg_damping are means over the {n_dims} action "
            "dimensions. Here they are for the whole action: "
            + ", ".join(f"{name}={attributes[name]:g} became {value:g}" for name, value in values.items()),
            stacklevel=5,
        )
    return values
