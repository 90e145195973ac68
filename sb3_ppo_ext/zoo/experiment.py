"""rl_zoo3's experiment manager, at home with our algorithms and with a closing word after a training."""

import difflib
import importlib
import inspect
import os
import runpy
from collections.abc import Iterable, Sequence
from pathlib import Path
from pprint import pprint
from typing import Any

import optuna
import yaml
from rl_zoo3.exp_manager import ExperimentManager
from stable_baselines3.common.base_class import BaseAlgorithm

from sb3_ppo_ext.zoo.registration import ALGORITHMS, config_path
from sb3_ppo_ext.zoo.storage import StudyError, complete_trial, load_study, open_storage
from sb3_ppo_ext.zoo.summary import summary
from sb3_ppo_ext.zoo.trials import merged, run_trial
from sb3_ppo_ext.zoo.workers import process_name

# What rl_zoo3 reads from an entry itself; `policy` and all other keys go to the algorithm's constructor.
_ZOO_KEYS = {
    "callback",
    "env_kwargs",
    "env_wrapper",
    "frame_stack",
    "monitor_kwargs",
    "n_envs",
    "n_timesteps",
    "normalize",
    "vec_env_wrapper",
}
# What rl_zoo3 passes to the constructor from the command line.
_COMMAND_LINE_KEYS = {"device", "env", "seed", "tensorboard_log", "verbose"}


class EntryError(ValueError):
    """An entry or its file is wrong; the message names it."""


class ZooExperimentManager(ExperimentManager):
    """
    Reads our algorithms' hyper-parameters from their own YAML files, unless the user names a file; checks them before
    anything is built from them; evaluates and sums up after a training.

    :param arguments: those of :class:`rl_zoo3.exp_manager.ExperimentManager`
    :param program: how to start ``sb3-ppo-ext``, for the commands in the closing summary
    :param options: those of :class:`rl_zoo3.exp_manager.ExperimentManager`
    """

    def __init__(self, *arguments: Any, program: Sequence[str] = ("sb3-ppo-ext",), **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.program = program
        if not options.get("config") and self.algo in ALGORITHMS:
            self.config = str(config_path(self.algo))

    def setup_experiment(self) -> tuple[BaseAlgorithm, dict[str, Any]] | None:
        """
        :return: the model and the hyper-parameters to be saved; None for a study
        """
        try:
            return super().setup_experiment()
        except EntryError:
            raise
        except ValueError as error:
            task = f"{self.algo} on {self.env_name.gym_id}, {self.config}"
            raise ValueError(f"{task}: {error}") from error

    def read_hyperparameters(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """
        :return: the hyper-parameters of the environment's entry, and the same once more, to be saved
        """
        if self.algo in ALGORITHMS:
            self._check_entry()
        trial_id, self.trial_id = self.trial_id, None  # rl_zoo3 would replace policy_kwargs, and take 0 for no trial
        hyperparams, saved_hyperparams = super().read_hyperparameters()
        if trial_id is not None:
            if not self.storage or not self.study_name:
                raise EntryError(f"--trial-id {trial_id} needs --storage and --study-name, which say of which study")
            drawn = self.load_trial(self.storage, self.study_name, trial_id)
            hyperparams = merged(merged(hyperparams, drawn), self.custom_hyperparams or {})
            saved_hyperparams = {name: hyperparams[name] for name in sorted(hyperparams)}
            print(f"With what was drawn for trial {trial_id} of study {self.study_name}:")
            pprint(saved_hyperparams)
        if self.algo in ALGORITHMS:
            self._check_keys(hyperparams)
        return hyperparams, saved_hyperparams

    def load_trial(
        self, storage: str, study_name: str, trial_id: int | None = None, convert: bool = True
    ) -> dict[str, Any]:
        """
        :param storage: a path that ends in ``.log``, or a database's URL
        :param study_name: the study's
        :param trial_id: the trial's number; the best, if None
        :param convert: make hyper-parameters of what was drawn
        :return: what was drawn for the trial
        """
        try:
            study = load_study(storage, open_storage(storage, create=False), study_name)
            if trial_id is not None:
                complete_trial(study, trial_id)
        except StudyError as error:
            raise EntryError(str(error)) from None
        return dict(super().load_trial(storage, study_name, trial_id, convert))

    def _check_entry(self) -> None:
        """Say so if the configuration has no entry for the environment."""
        if self.config.endswith((".yml", ".yaml")):
            try:
                entries = yaml.safe_load(Path(self.config).read_text()) or {}
            except yaml.YAMLError as error:
                raise EntryError(f"{self.config} is no YAML: {error}") from error
        elif self.config.endswith(".py"):
            entries = runpy.run_path(self.config)["hyperparams"]
        else:
            entries = importlib.import_module(self.config).hyperparams

        env_id = self.env_name.gym_id
        if env_id in entries or (self._is_atari and "atari" in entries):
            return
        message = f"{self.config} has no entry for {env_id}{_nearest(env_id, entries)}"
        if "default" not in entries or self._is_atari:
            raise EntryError(message)
        print(message)

    def _check_keys(self, hyperparams: dict[str, Any]) -> None:
        """Refuse an entry with a key that nothing reads, or without one that rl_zoo3 cannot do without."""
        constructor = set(inspect.signature(ALGORITHMS[self.algo]).parameters) - {"_init_setup_model"}
        for key in hyperparams:
            where = "-params" if key in (self.custom_hyperparams or {}) else self.config
            where = f"{where}, {self.env_name.gym_id}"
            if key in _COMMAND_LINE_KEYS:
                raise EntryError(f"{where}: '{key}' is set on the command line, with --{key.replace('_', '-')}")
            if key not in constructor | _ZOO_KEYS:
                known = (constructor | _ZOO_KEYS) - _COMMAND_LINE_KEYS
                raise EntryError(f"{where}: unknown key '{key}'{_nearest(key, known)}")
        for key in ("n_timesteps", "policy"):
            if key not in hyperparams:
                raise EntryError(f"{self.config}, {self.env_name.gym_id}: '{key}' is missing")

    def _preprocess_schedules(self, hyperparams: dict[str, Any]) -> dict[str, Any]:  # type: ignore[override]
        """
        Leave all of them to our constructors, which read numbers, rl_zoo3's strings and None, and refuse anything else.

        :param hyperparams: of an entry
        :return: the same
        """
        if self.algo in ALGORITHMS:
            return hyperparams
        return super()._preprocess_schedules(hyperparams)

    def _preprocess_hyperparams(self, hyperparams: dict[str, Any]) -> Any:
        """
        Evaluate in the environment that is trained in, also where the entry says ``env_kwargs``.

        :param hyperparams: of an entry
        :return: as of :class:`rl_zoo3.exp_manager.ExperimentManager`
        """
        preprocessed = super()._preprocess_hyperparams(hyperparams)
        if not self._eval_env_kwargs_args:
            self.eval_env_kwargs = self.env_kwargs
        return preprocessed

    def objective(self, trial: optuna.Trial) -> float:
        """
        Note who runs a trial and for how long, for those who watch the study, then run it.

        :param trial: of a study
        :return: the mean reward of the last evaluation
        """
        trial.set_user_attr("budget", [self.n_timesteps, self.n_evaluations])
        trial.set_user_attr("worker", process_name(os.getpid()))
        return run_trial(self, trial)

    def save_trained_model(self, model: BaseAlgorithm) -> None:
        """
        Save the model, then say how good it is, where everything lies and how to go on.

        :param model: the trained model; the training may have been interrupted
        """
        super().save_trained_model(model)
        if self.eval_freq > 0:
            print(summary(self, model, self.program))


def _nearest(name: str, known: Iterable[str]) -> str:
    """
    :param name: what was asked for
    :param known: what there is
    :return: the rest of a message, naming what was probably meant
    """
    candidates = sorted(set(known) - {"default", "atari"})
    return "".join(
        f"; the nearest is '{match}'" for match in difflib.get_close_matches(name, candidates, 1, cutoff=0.0)
    )
