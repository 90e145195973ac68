"""The task that all trials of a study train, as the study stores it."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gymnasium as gym

from sb3_ppo_ext.zoo.arguments import nearest
from sb3_ppo_ext.zoo.errors import StudyError
from sb3_ppo_ext.zoo.experiment import ZooExperimentManager
from sb3_ppo_ext.zoo.study.train_arguments import parse_train
from sb3_ppo_ext.zoo.study.trials import evaluate_python


@dataclass
class Task:
    """
    The task that each trial of a study trains, as on the command line of ``train``.

    :param algo: key of the algorithm
    :param env: id of the environment
    :param n_timesteps: budget of a trial; 0 for that of the entry
    :param conf_file: configuration file with the entry; empty for the algorithm's own
    :param hyperparams: ``key:value`` pairs that replace those of the entry
    :param env_kwargs: ``key:value`` pairs
    :param eval_env_kwargs: ``key:value`` pairs
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

    @classmethod
    def from_options(cls, options: argparse.Namespace) -> Task:
        """
        :param options: options of ``study run``
        :return: their task, with an absolute path of the configuration
        """
        task = cls(**{name: getattr(options, name) for name in cls.__annotations__})
        if task.conf_file.endswith((".py", ".yaml", ".yml")):  # otherwise it is a module
            task.conf_file = str(Path(task.conf_file).resolve())
        return task

    def environment_arguments(self) -> list[str]:
        """The part of the command line of ``train`` that names the environment and the algorithm."""
        arguments = ["--algo", self.algo, "--env", self.env]
        for name in ("env_kwargs", "eval_env_kwargs", "gym_packages"):
            values = getattr(self, name)
            arguments += [f"--{name.replace('_', '-')}", *values] if values else []
        return arguments

    def arguments(self) -> list[str]:
        """The part of the command line of ``train`` that the task decides."""
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
            evaluate_python(entry.get("policy_kwargs"))
        except Exception as error:  # evaluating it may raise anything
            source = entry["policy_kwargs"]
            raise StudyError(f"policy_kwargs {source!r} cannot be read; {type(error).__name__}: {error}") from error
        if self.n_timesteps:
            entry["n_timesteps"] = self.n_timesteps
        return entry
