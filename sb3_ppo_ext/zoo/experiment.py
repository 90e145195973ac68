"""rl_zoo3's experiment manager, at home with our algorithms and with a closing word after a training."""

import argparse
import contextlib
import importlib
import inspect
import os
import re
import runpy
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from pprint import pprint
from types import SimpleNamespace
from typing import Any, cast

import optuna
import yaml
from rl_zoo3.exp_manager import ExperimentManager
from rl_zoo3.utils import ALGOS, get_latest_run_id
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import CheckpointCallback, EvalCallback
from stable_baselines3.common.utils import get_latest_run_id as get_latest_log_id
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv, VecNormalize

from sb3_ppo_ext.common.saving.checkpoint import load_vec_normalize
from sb3_ppo_ext.common.saving.interchange import mark_of
from sb3_ppo_ext.zoo.arguments import nearest, whole_number
from sb3_ppo_ext.zoo.interrupts import Interrupts, StopIfInterrupted, not_inherited
from sb3_ppo_ext.zoo.registration import ALGORITHMS
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
    "noise_std",
    "noise_type",
    "normalize",
    "vec_env_wrapper",
}
# Those of them that count something.
_COUNTS = ("frame_stack", "n_envs", "n_timesteps")
# What rl_zoo3 passes to the constructor from the command line.
_COMMAND_LINE_KEYS = {"device", "env", "seed", "tensorboard_log", "verbose"}

# A number of YAML 1.2; PyYAML reads YAML 1.1, for which 3e-4 is a string.
_NUMBER = re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+")


class EntryError(ValueError):
    """An entry or its file is wrong; the message names it."""


def _as_keywords(normalize: Any) -> dict[str, Any]:
    """What rl_zoo3 makes of ``normalize``: a bool, or keywords of VecNormalize, or Python that says one of them."""
    value = eval(normalize) if isinstance(normalize, str) else normalize
    return {} if isinstance(value, bool) else dict(value)


class ZooExperimentManager(ExperimentManager):
    """
    Checks hyper-parameters before anything is built from them; goes on with a trained agent where it stopped; ends in
    order if it is interrupted; evaluates and sums up after a training.

    :param arguments: those of :class:`rl_zoo3.exp_manager.ExperimentManager`
    :param program: how to start ``sb3-ppo-ext``, for the commands in the closing summary
    :param interrupts: what Ctrl-C does, if it is handled
    :param options: those of :class:`rl_zoo3.exp_manager.ExperimentManager`
    """

    def __init__(
        self,
        *arguments: Any,
        program: Sequence[str] = ("sb3-ppo-ext",),
        interrupts: Interrupts | None = None,
        **options: Any,
    ) -> None:
        super().__init__(*arguments, **options)
        self.program = program
        self.interrupts = interrupts or Interrupts()
        self.stopped_at_once = False
        self.asked_for: int | None = None  # steps, if that is not where the training ends
        self._has_folder = False
        self._envs: list[VecEnv] = []

    def setup_experiment(self) -> tuple[BaseAlgorithm, dict[str, Any]] | None:
        """
        :return: the model and the hyper-parameters to be saved; None for a study
        """
        experiment = None
        try:
            made = super().setup_experiment()
            self.interrupts.check()
            experiment = made
        except EntryError:
            raise
        except Exception as error:
            if self.interrupts.count:  # the environments, say, have got it too
                raise KeyboardInterrupt from error
            if not isinstance(error, (AssertionError, NotImplementedError, ValueError)) or not str(error):
                raise
            task = f"{self.algo} on {self.env_name.gym_id}, {self.config}"
            raise ValueError(f"{task}: {error}") from error
        finally:
            if experiment is None:
                self._clean_up()
        return experiment

    def create_log_folder(self) -> None:
        """Take a folder that no other training has, not even one that began at the same time."""
        with self.interrupts.undisturbed():
            while not self._has_folder:
                try:
                    os.makedirs(self.save_path)
                    self._has_folder = True
                except FileExistsError:
                    run_id = get_latest_run_id(self.log_path, self.env_name) + 1
                    self.save_path = os.path.join(self.log_path, f"{self.env_name}_{run_id}")
        self.params_path = f"{self.save_path}/{self.env_name}"
        super().create_log_folder()  # type: ignore[no-untyped-call]

    def _clean_up(self) -> None:
        """
        Of a training that does not take place. `enjoy` looks into the newest folder, which must not be one without an
        agent.
        """
        for env in self._envs:
            with contextlib.suppress(Exception):
                env.close()
        if self._has_folder:
            shutil.rmtree(self.save_path, ignore_errors=True)

    def create_envs(self, n_envs: int, eval_env: bool = False, no_log: bool = False) -> VecEnv:
        """
        :param n_envs: how many
        :param eval_env: whether to evaluate in
        :param no_log: whether no monitor file is written
        :return: the environments
        """
        self.interrupts.check()
        in_processes = self.vec_env_class is not DummyVecEnv
        with not_inherited() if in_processes else contextlib.nullcontext():
            self._envs.append(super().create_envs(n_envs, eval_env, no_log))
        return self._envs[-1]

    def create_callbacks(self) -> None:
        """As rl_zoo3; but a checkpoint of an agent that sees normalised observations comes with their statistics."""
        super().create_callbacks()  # type: ignore[no-untyped-call]
        for callback in self.callbacks:
            if isinstance(callback, CheckpointCallback):
                callback.save_vecnormalize = self.normalize

    def _maybe_normalize(self, env: VecEnv, eval_env: bool) -> VecEnv:
        """
        :param env: not normalised
        :param eval_env: whether to evaluate in
        :return: the same, normalised if the entry says so, by the statistics of an agent that goes on
        """
        if not self.continue_training:
            return super()._maybe_normalize(env, eval_env)
        agent = Path(self.trained_agent)
        normalized, source = None, agent
        with contextlib.suppress(ValueError):  # no model file; loading the agent will say so
            normalized = load_vec_normalize(agent, env)  # a checkpoint of SafeCheckpointCallback
        files = [agent.parent / self.env_name / "vecnormalize.pkl"]
        if re.search(r"_\d+_steps\.zip$", agent.name):  # a checkpoint of SB3's callback
            files.insert(0, agent.with_name(re.sub(r"_(\d+_steps)\.zip$", r"_vecnormalize_\1.pkl", agent.name)))
        for file in files:
            if normalized is None and file.is_file():
                normalized, source = VecNormalize.load(str(file), env), file
        if bool(self.normalize) != (normalized is not None):
            what = f"with those in {source}" if normalized else f"without any in {agent} or beside it"
            raise EntryError(
                f"{self.config}, {self.env_name.gym_id}: normalize={self.normalize!r} does not fit an agent that was "
                f"trained {what}: the statistics of VecNormalize belong to the agent"
            )
        if normalized is None:
            return env
        print(f"Statistics of VecNormalize from {source}")
        for name, value in self.normalize_kwargs.items():
            if name == "gamma":  # follows the entry's, which may be changed
                normalized.gamma = value
            elif name != "training" and getattr(normalized, name, value) != value:
                raise EntryError(
                    f"{self.config}, {self.env_name.gym_id}: normalize with {name}={value!r} does not fit {source}, "
                    f"which has {name}={getattr(normalized, name)!r}"
                )
        normalized.training = not eval_env
        normalized.norm_reward = normalized.norm_reward and not eval_env
        return normalized

    def _load_pretrained_agent(self, hyperparams: dict[str, Any], env: VecEnv) -> BaseAlgorithm:
        """
        :param hyperparams: for the constructor
        :param env: to train in
        :return: the agent that goes on
        """
        for key in {"policy", "policy_kwargs"} & set(self.custom_hyperparams or {}):
            raise EntryError(f"-params, {self.env_name.gym_id}: with -i, '{key}' is what the agent was made with")
        if self.algo not in ALGORITHMS:  # their load() takes any file
            with open(self.trained_agent, "rb") as file:
                mark = mark_of(file)
            takes = {"ppo": ("sb3_ppo_ext.DualClipPPO", "sb3_ppo_ext.AdaptiveKLPPO"), "trpo": ("sb3_ppo_ext.TRPO",)}
            if mark is not None and mark not in takes.get(self.algo, ()):
                raise EntryError(f"{self.trained_agent} is of {mark}, and --algo {self.algo} cannot go on with it")
        model = super()._load_pretrained_agent(hyperparams, env)
        done = model.num_timesteps
        if done >= self.n_timesteps:
            self.asked_for = self.n_timesteps
            self.n_timesteps += done
            print(f"The agent has made its {self.asked_for:,} steps: it makes as many again")
        print(f"Going on from step {done:,} to {self.n_timesteps:,}")
        return model

    def read_hyperparameters(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """
        :return: the hyper-parameters of the environment's entry, and the same once more, to be saved
        """
        self.interrupts.check()
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
        self._check_keys(hyperparams)
        for key, value in hyperparams.items():
            if isinstance(value, str) and _NUMBER.fullmatch(value):
                number = float(value)
                hyperparams[key] = saved_hyperparams[key] = int(number) if number.is_integer() else number
        for key in _COUNTS:
            if hyperparams.get(key) is not None:
                try:
                    hyperparams[key] = saved_hyperparams[key] = whole_number(hyperparams[key], minimum=1)
                except argparse.ArgumentTypeError as error:
                    raise EntryError(f"{self._where(key)}: {key}={error}") from None
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

    def _where(self, key: str) -> str:
        """
        :param key: of the hyper-parameters
        :return: where it was given
        """
        file = "-params" if key in (self.custom_hyperparams or {}) else self.config
        return f"{file}, {self.env_name.gym_id}"

    def _check_entry(self) -> None:
        """Say so if the configuration has no entry for the environment."""
        if self.config.endswith((".yml", ".yaml")):
            try:
                entries = yaml.safe_load(Path(self.config).read_text()) or {}
            except yaml.YAMLError as error:
                raise EntryError(f"{self.config} is no YAML: {error}") from error
            if not isinstance(entries, dict):
                raise EntryError(f"{self.config} has no entries: it must be hyper-parameters by environment")
        else:
            if self.config.endswith(".py"):
                found = runpy.run_path(self.config)
            else:
                found = vars(importlib.import_module(self.config))
            if not isinstance(found.get("hyperparams"), dict):
                raise EntryError(f"{self.config} has no dictionary 'hyperparams'")
            entries = found["hyperparams"]

        env_id = self.env_name.gym_id
        key = env_id if env_id in entries else "atari" if self._is_atari else "default"
        if key != env_id and not (self._is_atari and key in entries):
            message = f"{self.config} has no entry for {env_id}{nearest(env_id, _entry_names(entries))}"
            if key not in entries:
                raise EntryError(message)
            print(message)
        if not isinstance(entries[key], dict):
            raise EntryError(f"{self.config}, {key}: {entries[key]!r} is no hyper-parameters, each with its name")

    def _check_keys(self, hyperparams: dict[str, Any]) -> None:
        """Refuse an entry with a key that nothing reads, or without one that rl_zoo3 cannot do without."""
        constructor = set(inspect.signature(ALGOS[self.algo]).parameters) - {"_init_setup_model"}
        for key in hyperparams:
            if key in _COMMAND_LINE_KEYS:
                raise EntryError(
                    f"{self._where(key)}: '{key}' is set on the command line, with --{key.replace('_', '-')}"
                )
            if key not in constructor | _ZOO_KEYS:
                known = (constructor | _ZOO_KEYS) - _COMMAND_LINE_KEYS
                raise EntryError(f"{self._where(key)}: unknown key '{key}'{nearest(key, sorted(known))}")
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
        normalize = hyperparams.get("normalize")
        try:
            if normalize is not None:
                inspect.signature(VecNormalize).bind(None, **_as_keywords(normalize))
        except Exception as error:  # whatever Python says of it
            raise EntryError(f"{self._where('normalize')}: normalize={normalize!r} cannot be used; {error}") from None
        preprocessed = super()._preprocess_hyperparams(hyperparams)
        if not self._eval_env_kwargs_args:
            self.eval_env_kwargs = self.env_kwargs
        return preprocessed

    def learn(self, model: BaseAlgorithm) -> None:
        """
        Train, from where the agent is to ``n_timesteps``; Ctrl-C ends that in order.

        :param model: to train
        """
        options: dict[str, Any] = {"tb_log_name": self._log_name(model)}
        if self.continue_training:
            options["reset_num_timesteps"] = False  # steps and schedules go on
            if model.tensorboard_log:
                # SB3 would write into the newest log, whoever's that is.
                name = options["tb_log_name"]
                log_id = get_latest_log_id(model.tensorboard_log, name) + 1
                Path(model.tensorboard_log, f"{name}_{log_id}").mkdir(parents=True, exist_ok=True)
        done = model.num_timesteps if self.continue_training else 0

        def learn(n_timesteps: int, **kwargs: Any) -> None:
            model.learn(n_timesteps - done, **kwargs, **options)

        self.callbacks.append(StopIfInterrupted(self.interrupts))
        if self.interrupts.count:
            self._clean_up()
        self.interrupts.check()
        try:
            with self.interrupts.stage():
                # What rl_zoo3 asks of a model here.
                super().learn(cast(BaseAlgorithm, SimpleNamespace(learn=learn, env=model.env, policy=model.policy)))
        except (Exception, KeyboardInterrupt) as error:
            if not self.interrupts.caused(error):
                raise
            if not isinstance(error, KeyboardInterrupt):
                print(f"Ctrl-C ended the training, with {type(error).__name__}: {error}")
            if model.env is not None:
                with contextlib.suppress(Exception):
                    model.env.close()
        self.stopped_at_once = self.interrupts.count > 1
        for callback in self.callbacks:
            if isinstance(callback, EvalCallback):  # rl_zoo3 leaves it open, with all that it may hold
                with contextlib.suppress(Exception):
                    callback.eval_env.close()

    def _log_name(self, model: BaseAlgorithm) -> str:
        """
        :param model: to train
        :return: how its folder for TensorBoard begins: as SB3 has it, if no other algorithm has the same name
        """
        name = type(model).__name__
        others = [key for key, algorithm in ALGOS.items() if algorithm.__name__ == name and key != self.algo]
        if self.algo in ALGORITHMS and others:
            return self.algo
        return str(inspect.signature(model.learn).parameters["tb_log_name"].default)

    def hyperparameters_optimization(self) -> None:
        """Search; Ctrl-C is Optuna's to handle."""
        self.interrupts.check()
        self.interrupts.patience = 0
        try:
            super().hyperparameters_optimization()
        except StudyError as error:
            raise EntryError(str(error)) from None
        except ValueError as error:
            if "No trials are completed" not in str(error):
                raise
            self.interrupts.check()
            raise EntryError("no trial of the search is complete, so none is the best") from None

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
        print(summary(self, model))


def _entry_names(entries: Iterable[str]) -> list[str]:
    """
    :param entries: of a configuration
    :return: those that name an environment
    """
    return sorted({str(entry) for entry in entries} - {"default", "atari"})
