"""Which arguments of ``train`` the ``study`` commands accept, and why others are refused."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
from collections.abc import Sequence
from types import FunctionType, SimpleNamespace
from typing import Any

import torch as th

from sb3_ppo_ext.zoo.arguments import Parser
from sb3_ppo_ext.zoo.errors import StudyError

_THE_STUDY_SAYS_IT = "the study decides it"
_REFUSED = {  # flags of `train` that would do nothing or something unexpected, by command; and why
    "run": {
        "eval_freq": "--n-evaluations says how often a trial is evaluated",
        "n_jobs": "--workers says how many trials run at a time",
        "n_trials": "--max-total-trials says how many trials the study should have",
        "save_freq": "a trial's model is not kept",
        "save_replay_buffer": "a trial's model is not kept",
        "tensorboard_log": "rl_zoo3 does not log trials there",
        "track": "rl_zoo3 does not log trials there",
        "trained_agent": "each trial begins with a new agent",
        "trial_id": "each trial draws its own hyper-parameters",
    },
    "evaluate": {
        "algo": _THE_STUDY_SAYS_IT,
        "conf_file": _THE_STUDY_SAYS_IT,
        "env": _THE_STUDY_SAYS_IT,
        "env_kwargs": _THE_STUDY_SAYS_IT,
        "eval_env_kwargs": _THE_STUDY_SAYS_IT,
        "gym_packages": _THE_STUDY_SAYS_IT,
        "hyperparams": _THE_STUDY_SAYS_IT,
        "max_total_trials": "it trains trials that the study already has",
        "n_trials": "it trains trials that the study already has",
        "optimize_hyperparameters": "it trains trials that the study already has",
        "seed": "--first-seed and --seeds decide it",
        "trained_agent": "each training begins with a new agent",
        "trial_id": "--trials says which trials are trained again",
    },
}


def parse_train(given: Sequence[str]) -> argparse.Namespace:
    """
    :param given: arguments of ``train``
    :return: the parsed arguments
    :raises StudyError: if they are not valid
    """
    return _parse(_train_parser(), given)


def _parse(parser: argparse.ArgumentParser, given: Sequence[str]) -> argparse.Namespace:
    known, unknown = parser.parse_known_args(given)
    if unknown:
        raise StudyError(f"there is no flag {' '.join(unknown)}, neither here nor of `train`")
    return known


def _train_parser() -> argparse.ArgumentParser:
    """The parser of ``train``. rl_zoo3 creates it in a function, which is left before it does anything else."""

    class FoundError(Exception):
        """Holds the parser."""

    class TrainParser(Parser):
        def parse_args(self, *_: Any) -> Any:  # type: ignore[override]
            raise FoundError(self)

        def error(self, message: str) -> Any:
            raise StudyError(message)

    their_globals = vars(importlib.import_module("rl_zoo3.train"))
    ours = {**their_globals, "argparse": SimpleNamespace(ArgumentParser=TrainParser)}
    try:
        FunctionType(their_globals["train"].__code__, ours)()
    except FoundError as found:
        parser: argparse.ArgumentParser = found.args[0]
        return parser
    raise AssertionError("rl_zoo3.train.train() has parsed no arguments")


def check_train_arguments(command: str, given: Sequence[str]) -> None:
    """
    Refuse arguments that ``train`` does not know or would ignore, before anything is started.

    :param command: subcommand of ``study``
    :param given: arguments that it passes to ``train``
    :raises StudyError: if an argument is refused
    """
    parser = _train_parser()
    options = vars(_parse(parser, given))
    for action in parser._actions:
        if action.dest in _REFUSED[command] and options[action.dest] != parser.get_default(action.dest):
            flag = action.option_strings[-1]
            raise StudyError(f"`study {command}` does not take {flag}: {_REFUSED[command][action.dest]}")
    try:
        th.device("cpu" if options["device"] == "auto" else options["device"])
    except RuntimeError as error:
        raise StudyError(f"--device {options['device']}: {str(error).splitlines()[0]}") from error
    if options["sampler"] == "auto" and importlib.util.find_spec("optunahub") is None:
        raise StudyError("--sampler auto needs optunahub: pip install optunahub")
