"""Checks of a configuration and of its entry for an environment, before anything is built from them."""

from __future__ import annotations

import argparse
import importlib
import inspect
import re
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from stable_baselines3.common.vec_env import VecNormalize

from sb3_ppo_ext.zoo.arguments import nearest, whole_number
from sb3_ppo_ext.zoo.errors import EntryError

# Keys that rl_zoo3 itself reads from an entry; `policy` and all others go to the algorithm's constructor.
_ZOO_KEYS = {
    "callback",
    "env_kwargs",
    "env_wrapper",
    "frame_stack",
    "monitor_kwargs",
    "n_envs",
    "n_timesteps",
    "noise_std",
    "noise_type",
    "normalize",
    "vec_env_wrapper",
}
# Keys whose value is a count.
_COUNTS = ("frame_stack", "n_envs", "n_timesteps")
# Arguments of the constructor that rl_zoo3 takes from the command line.
_COMMAND_LINE_KEYS = {"device", "env", "seed", "tensorboard_log", "verbose"}

# A number in YAML 1.2. PyYAML reads YAML 1.1, in which 3e-4 is a string.
_NUMBER = re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+")


def check_config(config: str, env_id: str, is_atari: bool) -> None:
    """
    :param config: a YAML or Python file, or a module, as rl_zoo3 reads it
    :param env_id: id of the environment whose entry is wanted
    :param is_atari: whether the entry of all Atari games may be used
    :raises EntryError: if the configuration has no entry for the environment
    """
    entries = _entries(config)
    key = env_id if env_id in entries else "atari" if is_atari else "default"
    if key != env_id and not (is_atari and key in entries):
        names = sorted({str(entry) for entry in entries} - {"default", "atari"})
        message = f"{config} has no entry for {env_id}{nearest(env_id, names)}"
        if key not in entries:
            raise EntryError(message)
        print(message)
    if not isinstance(entries[key], dict):
        raise EntryError(f"{config}, {key}: {entries[key]!r} is not allowed: an entry must be hyper-parameters by name")


def _entries(config: str) -> dict[str, Any]:
    if config.endswith((".yml", ".yaml")):
        try:
            entries = yaml.safe_load(Path(config).read_text()) or {}
        except yaml.YAMLError as error:
            raise EntryError(f"{config} is not valid YAML: {error}") from error
        if not isinstance(entries, dict):
            raise EntryError(f"{config} has no entries: it must be hyper-parameters by environment")
        return entries
    if not config.endswith(".py") and not all(part.isidentifier() for part in config.split(".")):
        raise EntryError(
            f"{config} is not allowed: it must be a file that ends in .yml, .yaml or .py, or the name of a module"
        )
    found = runpy.run_path(config) if config.endswith(".py") else vars(importlib.import_module(config))
    if not isinstance(found.get("hyperparams"), dict):
        raise EntryError(f"{config} has no dictionary 'hyperparams'")
    return dict(found["hyperparams"])


def check_keys(hyperparams: dict[str, Any], algorithm: type, location: Callable[[str], str]) -> None:
    """
    :param hyperparams: hyper-parameters of an entry
    :param algorithm: algorithm whose constructor takes them
    :param location: returns where a key is written
    :raises EntryError: if a key is unknown, or a key that rl_zoo3 needs is missing
    """
    constructor = set(inspect.signature(algorithm).parameters) - {"_init_setup_model"}
    for key in hyperparams:
        if key in _COMMAND_LINE_KEYS:
            raise EntryError(f"{location(key)}: '{key}' is set on the command line, with --{key.replace('_', '-')}")
        if key not in constructor | _ZOO_KEYS:
            known = (constructor | _ZOO_KEYS) - _COMMAND_LINE_KEYS
            raise EntryError(f"{location(key)}: unknown key '{key}'{nearest(key, sorted(known))}")
    for key in ("n_timesteps", "policy"):
        if key not in hyperparams:
            raise EntryError(f"{location(key)}: '{key}' is missing")


def read_numbers(hyperparams: dict[str, Any], location: Callable[[str], str]) -> dict[str, Any]:
    """
    :param hyperparams: hyper-parameters of an entry
    :param location: returns where a key is written
    :return: the numbers among them that YAML 1.1 read as strings, and the counts as integers
    :raises EntryError: if a count is not a whole number of at least 1
    """
    read: dict[str, Any] = {}
    for key, value in hyperparams.items():
        number = _with_numbers(value)
        if number is not value:
            read[key] = number
    for key in _COUNTS:
        if hyperparams.get(key) is not None:
            try:
                read[key] = whole_number(read.get(key, hyperparams[key]), minimum=1)
            except argparse.ArgumentTypeError as error:
                raise EntryError(f"{location(key)}: {key}={error}") from None
    return read


def _with_numbers(value: Any) -> Any:
    """Convert a value, or the values of a dict, as YAML 1.2 would read them."""
    if isinstance(value, str) and _NUMBER.fullmatch(value):
        number = float(value)
        return int(number) if number.is_integer() else number
    if isinstance(value, dict):
        read = {key: _with_numbers(part) for key, part in value.items()}
        return value if all(read[key] is part for key, part in value.items()) else read
    return value


def check_normalize(hyperparams: dict[str, Any], location: Callable[[str], str]) -> None:
    """
    :param hyperparams: hyper-parameters of an entry
    :param location: returns where a key is written
    :raises EntryError: if ``normalize`` is neither a bool, nor keyword arguments of VecNormalize, nor Python for one
    """
    normalize = hyperparams.get("normalize")
    if normalize is None:
        return
    try:
        value = eval(normalize) if isinstance(normalize, str) else normalize
        if not isinstance(value, bool):
            inspect.signature(VecNormalize).bind(None, **dict(value))
    except Exception as error:  # evaluating it may raise anything
        raise EntryError(f"{location('normalize')}: normalize={normalize!r} cannot be used; {error}") from None
