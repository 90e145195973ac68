"""Runs rl_zoo3's commands with our algorithms and with one-line error messages."""

import contextlib
import importlib
import io
import os
import re
import runpy
import subprocess
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import gymnasium as gym
import huggingface_hub.repocard
import torch as th
from huggingface_hub.repocard import metadata_save

from sb3_ppo_ext.common.processes import are_several, is_first
from sb3_ppo_ext.zoo.arguments import own_parsers
from sb3_ppo_ext.zoo.errors import MESSAGE_TYPES, needs_no_traceback, unknown_environment
from sb3_ppo_ext.zoo.experiment import ZooExperimentManager
from sb3_ppo_ext.zoo.interrupts import Interrupts
from sb3_ppo_ext.zoo.registration import ALGORITHMS

# rl_zoo3's commands and what they do. They have rl_zoo3's flags.
COMMANDS = {
    "train": "train an agent, continue training one, or search for hyper-parameters",
    "enjoy": "watch a trained agent",
    "plot_train": "plot training rewards",
    "plot_from_file": "plot what all_plots has gathered",
    "all_plots": "gather evaluations of several runs, plot them and make a table",
    "record_video": "record a video of a trained agent",
    "record_training": "record a video of every checkpoint of a training",
    "benchmark": "evaluate all trained agents and make a table",
    "push_to_hub": "put a trained agent on the Hugging Face hub",
    "load_from_hub": "get a trained agent from the Hugging Face hub",
}


def run_command(command: str, arguments: Sequence[str], program: Sequence[str], interrupts: Interrupts) -> int:
    """
    :param command: one of :data:`COMMANDS`
    :param arguments: arguments of the command
    :param program: command that starts ``sb3-ppo-ext``
    :param interrupts: handler of Ctrl-C
    :return: the exit code
    """
    with _replaced(sys, "argv", [f"sb3-ppo-ext {command}", *arguments]), own_parsers():
        try:
            _run(command, program, interrupts)
        except MESSAGE_TYPES as error:
            if not needs_no_traceback(error):
                raise
            message = str(error)
        except KeyError as error:
            if error.args[0] not in sys.argv or error.args[0] in gym.registry:
                raise
            message = unknown_environment(error.args[0])
        else:
            return 0
    print(f"sb3-ppo-ext {command}: {message}", file=sys.stderr)
    return 1


def _run(command: str, program: Sequence[str], interrupts: Interrupts) -> None:
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
            _restore_generate_metadata()
            runpy.run_module(f"rl_zoo3.{command}", run_name="__main__")


@contextlib.contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Give an attribute of a module another value in the ``with`` block."""
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


def _train(program: Sequence[str], interrupts: Interrupts) -> None:
    interrupts.patience = 1  # from here on the manager checks whether Ctrl-C was pressed
    train = importlib.import_module("rl_zoo3.train")
    manager = partial(ZooExperimentManager, program=program, interrupts=interrupts)
    with contextlib.ExitStack() as stack:
        stack.enter_context(_replaced(train, "ExperimentManager", manager))
        if are_several():
            _be_one_of_several(stack)
        try:
            train.train()
        except ValueError as error:
            unknown = re.match(r"(\S+) not found in gym registry", str(error))
            if unknown is None:
                raise
            raise ValueError(unknown_environment(unknown[1])) from None


def _be_one_of_several(stack: contextlib.ExitStack) -> None:
    """Set up one of the processes that torchrun starts: its GPU, if any, and output from the first process only."""
    if th.cuda.is_available():
        th.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    if not is_first():
        stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        stack.enter_context(_replaced(sys, "argv", [word for word in sys.argv if word != "--track"]))


def _plots() -> ModuleType:
    """Import the module with rl_zoo3's plot commands, which need more packages than the others."""
    try:
        return importlib.import_module("rl_zoo3.plots")
    except ModuleNotFoundError as error:
        raise SystemExit(
            f'sb3-ppo-ext: the plots need {error.name}, which is missing: pip install "sb3-ppo-ext[plots]"'
        ) from error


def _call(call: Any, arguments: Any, **options: Any) -> int:
    """
    Replace commands that rl_zoo3 starts in a separate process by ours, which know our algorithms.

    :param call: :func:`subprocess.call`
    :param arguments: rl_zoo3's command line
    :param options: options of the process
    :return: the exit code
    """
    for theirs, ours in (
        (["python", "-m", "rl_zoo3.record_video"], "record_video"),
        (["python", "enjoy.py"], "enjoy"),
    ):
        if arguments[: len(theirs)] == theirs:
            arguments = [sys.executable, "-m", "sb3_ppo_ext.zoo", ours, *arguments[len(theirs) :]]
    return int(call(arguments, **options))


def _restore_generate_metadata() -> None:
    """Provide a function that rl_zoo3 imports, and that huggingface_sb3 3.0 renamed, with another type of result."""
    hub: Any = importlib.import_module("huggingface_sb3.push_to_hub")
    if not hasattr(hub, "generate_metadata"):
        hub.generate_metadata = lambda *arguments: hub._generate_metadata(*arguments).to_dict()


def _save_model_card(path: Path, metadata: dict[str, Any]) -> None:
    """
    Save a model card; for one of our algorithms, with the commands that know it.

    :param path: the card, written by rl_zoo3
    :param metadata: metadata to add to it
    """
    card = path.read_text(encoding="utf-8")
    if any(f"--algo {key} " in card for key in ALGORITHMS):
        card = card.replace("python -m rl_zoo3.", "sb3-ppo-ext ")
        card = card.replace("pip install rl_zoo3", 'pip install "sb3-ppo-ext[zoo]"')
        path.write_text(card, encoding="utf-8")
    metadata_save(path, metadata)
