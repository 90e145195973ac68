"""What the trials of a study train, and which arguments of ``train`` a study takes."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.util
import io
from collections.abc import Sequence
from dataclasses import dataclass
from types import FunctionType, SimpleNamespace
from typing import Any

import gymnasium as gym
import torch as th

from sb3_ppo_ext.zoo.arguments import Parser, nearest
from sb3_ppo_ext.zoo.experiment import ZooExperimentManager
from sb3_ppo_ext.zoo.storage import StudyError
from sb3_ppo_ext.zoo.trials import evaluated


@dataclass
class Task:
    """
    What each trial of a study trains, as on the command line of ``train``.

    :param algo: an algorithm's key
    :param env: an environment's id
    :param n_timesteps: budget of a trial; of the entry, if 0
    :param conf_file: that has the entry; the algorithm's own, if empty
    :param hyperparams: that replace those of the entry, ``key:value`` each
    :param env_kwargs: ``key:value`` each
    :param eval_env_kwargs: ``key:value`` each
    :param gym_packages: modules that register environments
    """

    algo: str
    env: str
    n_timesteps: int
    conf_file: str
    hyperparams: list[str]
    env_kwargs: list[str]
    eval_env_kwargs: list[str]
    gym_packages: list[str]

    def environment_arguments(self) -> list[str]:
        """The part of the command line of ``train`` that says which environment is meant, and with which algorithm."""
        arguments = ["--algo", self.algo, "--env", self.env]
        for name in ("env_kwargs", "eval_env_kwargs", "gym_packages"):
            values = getattr(self, name)
            arguments += [f"--{name.replace('_', '-')}", *values] if values else []
        return arguments

    def arguments(self) -> list[str]:
        """The command line of ``train``, as far as the task says it."""
        arguments = self.environment_arguments()
        arguments += ["-n", str(self.n_timesteps)] if self.n_timesteps else []
        arguments += ["-conf", self.conf_file] if self.conf_file else []
        return arguments + (["-params", *self.hyperparams] if self.hyperparams else [])

    def entry(self) -> dict[str, Any]:
        """The hyper-parameters that a trial starts from, as rl_zoo3 reads them."""
        try:
            for module in self.gym_packages:
                importlib.import_module(module)
            if self.env not in gym.registry:
                raise StudyError(f"there is no environment '{self.env}'{nearest(self.env, list(gym.registry))}")
            options = parse_train(self.arguments())
            with contextlib.redirect_stdout(io.StringIO()):
                manager = ZooExperimentManager(
                    options, self.algo, self.env, "", hyperparams=options.hyperparams, config=options.conf_file
                )
                entry = dict(manager.read_hyperparameters()[1])
        except StudyError:
            raise
        except (ValueError, OSError, ImportError) as error:
            raise StudyError(str(error)) from error
        try:
            evaluated(entry.get("policy_kwargs"))
        except Exception as error:  # whatever Python says of it
            source = entry["policy_kwargs"]
            raise StudyError(f"policy_kwargs {source!r} cannot be read; {type(error).__name__}: {error}") from error
        if self.n_timesteps:
            entry["n_timesteps"] = self.n_timesteps
        return entry


def train_parser() -> argparse.ArgumentParser:
    """
    :return: of ``train``; rl_zoo3 has it inside of a function only, which is left before it does anything
    """

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


def parse_train(given: Sequence[str]) -> argparse.Namespace:
    """
    :param given: arguments of ``train``
    :return: what they say
    """
    known, unknown = train_parser().parse_known_args(given)
    if unknown:
        raise StudyError(f"there is no flag {' '.join(unknown)}, neither here nor of `train`")
    return known


_SAID_BY_STUDY = "the study says it"
_NOT_IN = {  # flags of `train` that would do nothing, or something else, and what to do instead
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
        **dict.fromkeys(("algo", "conf_file", "env", "env_kwargs", "eval_env_kwargs", "gym_packages"), _SAID_BY_STUDY),
        "hyperparams": _SAID_BY_STUDY,
        "max_total_trials": "it trains what the study has found",
        "n_trials": "it trains what the study has found",
        "optimize_hyperparameters": "it trains what the study has found",
        "seed": "--first-seed and --seeds say it",
        "trained_agent": "each training begins with a new agent",
        "trial_id": "--trials says which trials are trained again",
    },
}


def check_train_arguments(command: str, given: Sequence[str]) -> None:
    """
    Refuse what ``train`` does not know and what would be ignored, before anything is begun.

    :param command: of ``study``
    :param given: arguments that it hands on to ``train``
    """
    options, parser = vars(parse_train(given)), train_parser()
    for action in parser._actions:
        if action.dest in _NOT_IN[command] and options[action.dest] != parser.get_default(action.dest):
            flag = action.option_strings[-1]
            raise StudyError(f"`study {command}` does not take {flag}: {_NOT_IN[command][action.dest]}")
    try:
        th.device("cpu" if options["device"] == "auto" else options["device"])
    except RuntimeError as error:
        raise StudyError(f"--device {options['device']}: {str(error).splitlines()[0]}") from error
    if options["sampler"] == "auto" and importlib.util.find_spec("optunahub") is None:
        raise StudyError("--sampler auto needs optunahub: pip install optunahub")
