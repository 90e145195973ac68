"""Write model files that name their algorithm, and prepare files of other algorithms for loading."""

from __future__ import annotations

import io
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.save_util import open_path

from sb3_ppo_ext.common.saving.files import ReadableFile, name_of_file, save_whole
from sb3_ppo_ext.common.saving.interchange import (
    ALGORITHM,
    attributes_of,
    check_origin,
    name_of,
    origin_of,
    why_missing,
)


def write_model(path: str | Path | io.BufferedIOBase, content: io.BytesIO, algorithm: type[BaseAlgorithm]) -> None:
    """
    Write a model file, whole or not at all, with the name of its algorithm in it.

    :param path: path of the file, or an open file
    :param content: the file that SB3's ``save`` wrote
    :param algorithm: class of the model
    :raises OSError: if it cannot be written
    """
    with zipfile.ZipFile(content, "a") as archive:
        archive.writestr(ALGORITHM, name_of(algorithm))
    if isinstance(path, (str, Path)):
        save_whole(path, content.getbuffer())
    else:
        open_path(path, "w").write(content.getbuffer())


def replacements(
    file: ReadableFile,
    path: object,
    algorithm: type[BaseAlgorithm],
    *,
    also: tuple[str, ...],
    optional: tuple[str, ...],
    adapt: Callable[[str, dict[str, Any]], dict[str, Any]],
    custom_objects: dict[str, Any],
    given: dict[str, Any],
) -> tuple[dict[str, Any], dict[str, Any]]:
    """
    The custom objects and attributes with which SB3's ``load`` makes the right model of a file.

    :param file: the model file
    :param path: path of the file, or the open file
    :param algorithm: the class that loads it
    :param also: other algorithms whose files the class can load
    :param optional: attributes that are not in every file
    :param adapt: function of the algorithm that saved the file and of its attributes; it returns replacements for them
    :param custom_objects: argument of ``load``
    :param given: attributes that the user passed to ``load``
    :return: custom objects and attributes for SB3's ``load``
    :raises ValueError: if the model is of an algorithm that the class cannot load
    """
    replaced = custom_objects.keys() | given.keys()
    origin = origin_of(file)
    check_origin(origin, algorithm, also, path)
    attributes = attributes_of(file)
    missing = why_missing(attributes, "rollout_buffer_class")
    if missing is not None and "rollout_buffer_class" not in replaced:  # only learning needs it
        custom_objects = {**custom_objects, "rollout_buffer_class": None, "rollout_buffer_kwargs": {}}
        warnings.warn(
            f"The rollout_buffer_class of {name_of_file(path)} was left out ({missing}). To train on, give it again: "
            "load(..., custom_objects={'rollout_buffer_class': ...})",
            stacklevel=3,
        )
    # The action space is always passed on: a replacement is of the same kind as the one in the file.
    kept = attributes.keys() - replaced | {"action_space"}
    adapted = adapt(origin, {name: attributes[name] for name in kept & attributes.keys()})
    adapted = {name: value for name, value in adapted.items() if name not in custom_objects}
    for name in {"rollout_buffer_class", *optional} & custom_objects.keys() - attributes.keys():
        adapted[name] = custom_objects[name]  # SB3 replaces only what is in the file
    return custom_objects, adapted | given
