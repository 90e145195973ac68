"""Which arguments of ``train`` the ``study`` commands take, and what is wrong with the others."""

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

_THE_STUDY_SAYS_IT = "the study says it"
_REFUSED = {  # by command, flags of `train` that would do nothing, or something else; and what to do instead
    "run": {
        "eval_freq": "--n-evaluations says how often a trial is evaluated",
        "n_jobs": "--workers says how many trials run at a time",
        "n_trials": "--max-total-trials says how many trials the study shall have",
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
        "max_total_trials": "it trains what the study has found",
        "n_trials": "it trains what the study has found",
        "optimize_hyperparameters": "it trains what the study has found",
        "seed": "--first-seed and --seeds say it",
        "trained_agent": "each training begins with a new agent",
        "trial_id": "--trials says which trials are trained again",
    },
}


def parse_train(given: Sequence[str]) -> argparse.Namespace:
    """
    :param given: arguments of ``train``
    :return: what they say
    :raises StudyError: if there is something wrong with them
    """
    return _parse(_train_parser(), given)


def _parse(parser: argparse.ArgumentParser, given: Sequence[str]) -> argparse.Namespace:
    known, unknown = parser.parse_known_args(given)
    if unknown:
        raise StudyError(f"there is no flag {' '.join(unknown)}, neither here nor of `train`")
    return known


def _train_parser() -> argparse.ArgumentParser:
    """The parser of ``train``. rl_zoo3 has it inside of a function only, which is left before it does anything."""

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
    Refuse what ``train`` does not know and what would be ignored, before anything is begun.

    :param command: of ``study``
    :param given: arguments that it hands on to ``train``
    :raises StudyError: if one is refused
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
