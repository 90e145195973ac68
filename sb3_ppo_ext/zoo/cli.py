"""The command ``sb3-ppo-ext``: rl_zoo3's commands, with our algorithms among those they know."""

import contextlib
import difflib
import importlib
import runpy
import subprocess
import sys
import traceback
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import sb3_ppo_ext
from sb3_ppo_ext.zoo.experiment import ZooExperimentManager
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
}
# What rl_zoo3 lacks.
_STUDY = "study"

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

    register()
    if command == _STUDY:
        return int(importlib.import_module("sb3_ppo_ext.zoo.study").main(arguments, _program(script)))
    with _replaced(sys, "argv", [f"sb3-ppo-ext {command}", *arguments]):
        try:
            if command == "train":
                _train(program=_program(script))
            elif command == "record_training":
                _record_training()
            elif command == "record_video":
                runpy.run_module("rl_zoo3.record_video", run_name="__main__")
            elif command == "enjoy":
                importlib.import_module("rl_zoo3.enjoy").enjoy()
            else:
                getattr(_plots(), command)()
        except (AssertionError, OSError, ValueError) as error:
            if not _is_message(error):
                raise
            print(f"sb3-ppo-ext {command}: {error}", file=sys.stderr)
            return 1
    return 0


def _is_message(error: BaseException | None) -> bool:
    """
    Whether an error says all there is to say: rl_zoo3 or this package has raised it, and nothing of the user's own,
    whose traceback is wanted.

    :param error: raised by a command
    """
    while error is not None:
        *_, (innermost, _) = traceback.walk_tb(error.__traceback__)
        if innermost.f_globals.get("__name__", "").split(".")[0] not in ("pathlib", "rl_zoo3", "sb3_ppo_ext", "yaml"):
            return False
        error = error.__cause__
    return True


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


def _train(program: list[str]) -> None:
    """
    :param program: how to start ``sb3-ppo-ext``
    """
    train = importlib.import_module("rl_zoo3.train")
    with _replaced(train, "ExperimentManager", partial(ZooExperimentManager, program=program)):
        train.train()


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


def _record_training() -> None:
    """rl_zoo3 records each checkpoint with ``python -m rl_zoo3.record_video``, which would not know our algorithms."""
    theirs = ["python", "-m", "rl_zoo3.record_video"]
    ours = [sys.executable, "-m", "sb3_ppo_ext.zoo", "record_video"]
    call = subprocess.call

    def redirected(arguments: list[str]) -> int:
        return call(ours + arguments[len(theirs) :] if arguments[: len(theirs)] == theirs else arguments)

    with _replaced(subprocess, "call", redirected):
        runpy.run_module("rl_zoo3.record_training", run_name="__main__")
