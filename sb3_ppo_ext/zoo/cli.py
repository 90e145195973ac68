"""The command ``sb3-ppo-ext``: rl_zoo3's commands, with our algorithms among those they know."""

import contextlib
import difflib
import importlib
import importlib.util
import os
import re
import runpy
import subprocess
import sys
import traceback
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import gymnasium as gym
import huggingface_hub.repocard
from huggingface_hub.repocard import metadata_save

import sb3_ppo_ext
from sb3_ppo_ext.zoo.arguments import read_kindly
from sb3_ppo_ext.zoo.experiment import ZooExperimentManager
from sb3_ppo_ext.zoo.interrupts import INTERRUPTED, Interrupts
from sb3_ppo_ext.zoo.registration import ALGORITHMS, register

# Each command and what it does. All are rl_zoo3's own, with rl_zoo3's own flags.
_COMMANDS = {
    "train": "train an agent, continue training one, or search for hyper-parameters",
    "enjoy": "watch a trained agent",
    "plot_train": "plot training rewards",
    "plot_from_file": "plot what all_plots has gathered",
    "all_plots": "gather evaluations of several runs, plot them and make a table",
    "record_video": "record a video of a trained agent",
    "record_training": "record a video of every checkpoint of a training",
    "benchmark": "evaluate all trained agents and make a table",
    "push_to_hub": "put a trained agent on the Hugging Face hub",
    "load_from_hub": "get a trained agent from there",
}
# What rl_zoo3 lacks.
_STUDY = "study"

# Errors of these kinds say all there is to say, if nothing but the modules below was at work; in what has caused them,
# the modules that read files and build networks, too.
_MESSAGES = (AssertionError, ImportError, NotImplementedError, OSError, ValueError, gym.error.Error)
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

_HELP = f"""usage: sb3-ppo-ext [-h] [--version] <command> ...

rl_zoo3's commands, which also know {", ".join(ALGORITHMS)}.

{chr(10).join(f"  {command:<16} {what}" for command, what in _COMMANDS.items())}

and, for a search with several processes:

  {_STUDY:<16} search, look at what was found, train the best again, write it as YAML

`sb3-ppo-ext <command> --help` lists a command's flags."""


def main() -> int:
    """
    :return: the exit code
    """
    script, *arguments = sys.argv
    command = arguments.pop(0) if arguments else ""
    if command in ("-h", "--help"):
        print(_HELP)
        return 0
    if command == "--version":
        print(f"sb3-ppo-ext {sb3_ppo_ext.__version__}")
        return 0
    if command not in (*_COMMANDS, _STUDY):
        if command:
            nearest = difflib.get_close_matches(command, (*_COMMANDS, _STUDY), n=1, cutoff=0.0)[0]
            print(f"sb3-ppo-ext: there is no command '{command}'; the nearest is '{nearest}'\n", file=sys.stderr)
        print(_HELP, file=sys.stderr)
        return 2

    if not getattr(sys.flags, "safe_path", False) and os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # as with `python -m`; the user's modules are there
    register()
    interrupts = Interrupts()
    with interrupts.handled():
        try:
            if command == _STUDY:
                return int(importlib.import_module("sb3_ppo_ext.zoo.study").main(arguments, _program(script)))
            with _replaced(sys, "argv", [f"sb3-ppo-ext {command}", *arguments]), read_kindly():
                return _run(command, _program(script), interrupts)
        except KeyboardInterrupt:
            print(f"sb3-ppo-ext {command}: ended by Ctrl-C", file=sys.stderr)
            return INTERRUPTED


def _run(command: str, program: list[str], interrupts: Interrupts) -> int:
    """
    :param command: of rl_zoo3
    :param program: how to start ``sb3-ppo-ext``
    :param interrupts: what Ctrl-C does
    :return: the exit code
    """
    try:
        if command == "train":
            _train(program, interrupts)
        elif command == "enjoy":
            importlib.import_module("rl_zoo3.enjoy").enjoy()
        elif "plot" in command:
            getattr(_plots(), command)()
        else:
            with (
                _replaced(subprocess, "call", partial(_call, subprocess.call)),
                _replaced(huggingface_hub.repocard, "metadata_save", _save_model_card),
            ):
                _mend_hub()
                runpy.run_module(f"rl_zoo3.{command}", run_name="__main__")
    except _MESSAGES as error:
        if not _is_message(error):
            raise
        print(f"sb3-ppo-ext {command}: {error}", file=sys.stderr)
        return 1
    except KeyError as error:
        if error.args[0] not in sys.argv or error.args[0] in gym.registry:
            raise
        print(f"sb3-ppo-ext {command}: {_unknown_environment(error.args[0])}", file=sys.stderr)
        return 1
    return 0


def _is_message(error: BaseException | None) -> bool:
    """
    Whether an error says all there is to say: nothing of the user's own was at work, whose traceback is wanted.

    :param error: raised by a command
    """
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


def _unknown_environment(env_id: str) -> str:
    """
    :param env_id: of no registered environment
    :return: what may help
    """
    if (env_id.startswith("ALE/") or "NoFrameskip-v" in env_id) and importlib.util.find_spec("ale_py") is None:
        return f"{env_id} is an Atari game, and ale-py is missing: pip install ale-py opencv-python"
    close = difflib.get_close_matches(env_id, gym.registry, n=1)
    maybe = f" You maybe meant {close[0]}?" if close else ""
    return f"{env_id} not found: a package that registers it must be installed, and named with --gym-packages.{maybe}"


def _program(script: str) -> list[str]:
    """
    :param script: ``sys.argv[0]``
    :return: how this program was started, as the beginning of a command line
    """
    if Path(script).stem == "sb3-ppo-ext":
        return [script]
    return [sys.executable, "-m", "sb3_ppo_ext.zoo"]


@contextlib.contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """
    :param owner: a module
    :param name: one of its attributes
    :param value: what the attribute is inside of the ``with`` block
    """
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


def _train(program: list[str], interrupts: Interrupts) -> None:
    """
    :param program: how to start ``sb3-ppo-ext``
    :param interrupts: what Ctrl-C does
    """
    interrupts.patience = 1  # from here on the manager looks whether it was pressed
    train = importlib.import_module("rl_zoo3.train")
    manager = partial(ZooExperimentManager, program=program, interrupts=interrupts)
    with _replaced(train, "ExperimentManager", manager):
        try:
            train.train()
        except ValueError as error:
            unknown = re.match(r"(\S+) not found in gym registry", str(error))
            if unknown is None:
                raise
            raise ValueError(_unknown_environment(unknown[1])) from None


def _plots() -> ModuleType:
    """
    :return: rl_zoo3's commands that plot, which need more than its others
    """
    try:
        return importlib.import_module("rl_zoo3.plots")
    except ModuleNotFoundError as error:
        raise SystemExit(
            f'sb3-ppo-ext: the plots need {error.name}, which is missing: pip install "sb3-ppo-ext[plots]"'
        ) from error


def _call(call: Any, arguments: Any, **options: Any) -> int:
    """
    rl_zoo3 starts some of its commands in a process of their own, which would not know our algorithms.

    :param call: :func:`subprocess.call`
    :param arguments: a command
    :param options: for the process
    :return: its exit code
    """
    for theirs, ours in (
        (["python", "-m", "rl_zoo3.record_video"], "record_video"),
        (["python", "enjoy.py"], "enjoy"),
    ):
        if arguments[: len(theirs)] == theirs:
            arguments = [sys.executable, "-m", "sb3_ppo_ext.zoo", ours, *arguments[len(theirs) :]]
    return int(call(arguments, **options))


def _mend_hub() -> None:
    """rl_zoo3 imports a function that huggingface_sb3 3.0 has given another name, and another form of its result."""
    hub: Any = importlib.import_module("huggingface_sb3.push_to_hub")
    if not hasattr(hub, "generate_metadata"):
        hub.generate_metadata = lambda *arguments: hub._generate_metadata(*arguments).to_dict()


def _save_model_card(path: Path, metadata: dict[str, Any]) -> None:
    """
    Let the card of one of our algorithms name the commands that know it.

    :param path: of the card, which rl_zoo3 has written
    :param metadata: to be added to it
    """
    card = path.read_text(encoding="utf-8")
    if any(f"--algo {key} " in card for key in ALGORITHMS):
        card = card.replace("python -m rl_zoo3.", "sb3-ppo-ext ")
        card = card.replace("pip install rl_zoo3", 'pip install "sb3-ppo-ext[zoo]"')
        path.write_text(card, encoding="utf-8")
    metadata_save(path, metadata)
