"""rl_zoo3's experiment manager with our algorithms, clear errors and a summary after a training."""

import contextlib
import inspect
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from pprint import pprint
from types import FunctionType, SimpleNamespace
from typing import Any, cast

import optuna
from rl_zoo3.exp_manager import ExperimentManager
from rl_zoo3.utils import ALGOS, get_latest_run_id
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import CheckpointCallback, EvalCallback
from stable_baselines3.common.utils import get_latest_run_id as get_latest_log_id
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv

from sb3_ppo_ext.common.processes import is_first, n_processes
from sb3_ppo_ext.zoo.entry import check_config, check_keys, check_normalize, read_numbers
from sb3_ppo_ext.zoo.errors import EntryError, StudyError
from sb3_ppo_ext.zoo.interrupts import Interrupts, StopIfInterrupted, sigint_blocked
from sb3_ppo_ext.zoo.pretrained import check_agent_fits, normalize_as_agent
from sb3_ppo_ext.zoo.registration import ALGORITHMS
from sb3_ppo_ext.zoo.study.processes import process_name
from sb3_ppo_ext.zoo.study.storage import complete_trial, load_study, open_storage
from sb3_ppo_ext.zoo.study.trials import BUDGET, WORKER, merge_hyperparams, run_trial
from sb3_ppo_ext.zoo.summary import summary


class ZooExperimentManager(ExperimentManager):
    """
    An experiment manager that checks hyper-parameters before it builds anything, continues a trained agent where it
    stopped, ends cleanly on Ctrl-C, and evaluates and summarises after a training. If torchrun starts several processes
    that train one model, only the first one creates a folder, logs, runs callbacks and saves.

    :param arguments: arguments of :class:`rl_zoo3.exp_manager.ExperimentManager`
    :param program: command that starts ``sb3-ppo-ext``, for the commands in the summary
    :param interrupts: handler of Ctrl-C, if there is one
    :param options: keyword arguments of :class:`rl_zoo3.exp_manager.ExperimentManager`
    """

    def __init__(
        self,
        *arguments: Any,
        program: Sequence[str] = ("sb3-ppo-ext",),
        interrupts: Interrupts | None = None,
        **options: Any,
    ) -> None:
        super().__init__(*arguments, **options)
        self.n_processes, self.is_first = n_processes(), True
        if self.n_processes > 1:
            self.is_first = is_first()
            self._check_can_be_several()
        if not self.is_first:
            self.tensorboard_log = None
        self.program = program
        self.interrupts = interrupts or Interrupts()
        self.requested_timesteps: int | None = None  # the steps that were asked for, if others are made
        self._has_folder = False
        self._envs: list[VecEnv] = []

    def _check_can_be_several(self) -> None:
        if self.algo not in ALGORITHMS:
            raise EntryError(
                f"--algo {self.algo} is not allowed under torchrun: several processes can train one model with "
                f"{', '.join(ALGORITHMS)}"
            )
        if self.optimize_hyperparameters:
            raise EntryError(
                "-optimize is not allowed under torchrun, whose processes train one model: start the command several "
                "times with the same --storage and --study-name, or `sb3-ppo-ext study`"
            )

    def setup_experiment(self) -> tuple[BaseAlgorithm, dict[str, Any]] | None:
        """
        :return: the model and the hyper-parameters to save; None for a study
        """
        experiment = None
        try:
            made = super().setup_experiment()
            self.interrupts.check()
            experiment = made
        except EntryError:
            raise
        except Exception as error:
            if self.interrupts.count:  # Ctrl-C may have caused the error, for example in the environments
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
        """Create a folder that no other training uses, not even one that starts at the same time."""
        if not self.is_first:
            return
        with self.interrupts.uninterrupted():
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
        """Remove the folder of a training that does not take place: `enjoy` expects an agent in the newest one."""
        for env in self._envs:
            with contextlib.suppress(Exception):
                env.close()
        if self._has_folder:
            shutil.rmtree(self.save_path, ignore_errors=True)

    def create_envs(self, n_envs: int, eval_env: bool = False, no_log: bool = False) -> VecEnv:
        """
        :param n_envs: number of environments
        :param eval_env: whether they are for evaluation
        :param no_log: whether to write no monitor file
        :return: the environments
        """
        self.interrupts.check()
        in_processes = self.vec_env_class is not DummyVecEnv
        with sigint_blocked() if in_processes else contextlib.nullcontext():
            self._envs.append(super().create_envs(n_envs, eval_env, no_log or not self.is_first))
        return self._envs[-1]

    def create_callbacks(self) -> None:
        """
        As rl_zoo3; but checkpoints of an agent with normalised observations contain the statistics, and the frequencies
        count the steps of all processes.
        """
        if not self.is_first:
            self.callbacks = []
            return
        for name in ("save_freq", "eval_freq"):
            freq = getattr(self, name)
            setattr(self, name, max(freq // self.n_processes, 1) if freq > 0 else freq)
        super().create_callbacks()  # type: ignore[no-untyped-call]
        for callback in self.callbacks:
            if isinstance(callback, CheckpointCallback):
                callback.save_vecnormalize = self.normalize

    def _maybe_normalize(self, env: VecEnv, eval_env: bool) -> VecEnv:
        """As rl_zoo3; but a continued agent keeps the statistics it was trained with, wherever they are."""
        if not self.continue_training:
            return super()._maybe_normalize(env, eval_env)
        location = f"{self.config}, {self.env_name.gym_id}"
        agent = Path(self.trained_agent)
        normalized = normalize_as_agent(env, agent, self.env_name, self.normalize, self.normalize_kwargs, location)
        if normalized is None:
            return env
        normalized.training = not eval_env
        normalized.norm_reward = normalized.norm_reward and not eval_env
        return normalized

    def _load_pretrained_agent(self, hyperparams: dict[str, Any], env: VecEnv) -> BaseAlgorithm:
        """As rl_zoo3, and determine the number of steps that remain."""
        for key in {"policy", "policy_kwargs"} & set(self.custom_hyperparams or {}):
            raise EntryError(
                f"-params, {self.env_name.gym_id}: with -i, '{key}' cannot be changed: the agent was created with it"
            )
        if self.algo not in ALGORITHMS:
            check_agent_fits(self.trained_agent, self.algo)
        model = super()._load_pretrained_agent(hyperparams, env)
        done = model.num_timesteps
        if done >= self.n_timesteps:
            self.requested_timesteps = self.n_timesteps
            self.n_timesteps += done
            print(
                f"The agent was already trained for {self.requested_timesteps:,} steps: it is trained for as many again"
            )
        print(f"Continuing from step {done:,} to {self.n_timesteps:,}")
        return model

    def read_hyperparameters(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """
        :return: the hyper-parameters of the environment's entry, and a second version of them to save
        """
        self.interrupts.check()
        check_config(self.config, self.env_name.gym_id, self._is_atari)
        trial_id, self.trial_id = self.trial_id, None  # rl_zoo3 would replace policy_kwargs, and ignore trial 0
        hyperparams, saved_hyperparams = super().read_hyperparameters()
        if trial_id is not None:
            if not self.storage or not self.study_name:
                raise EntryError(f"--trial-id {trial_id} needs --storage and --study-name, which name the study")
            drawn = self.load_trial(self.storage, self.study_name, trial_id)
            hyperparams = merge_hyperparams(merge_hyperparams(hyperparams, drawn), self.custom_hyperparams or {})
            saved_hyperparams = {name: hyperparams[name] for name in sorted(hyperparams)}
            print(f"With the hyper-parameters of trial {trial_id} of study {self.study_name}:")
            pprint(saved_hyperparams)
        check_keys(hyperparams, ALGOS[self.algo], self._location)
        read = read_numbers(hyperparams, self._location)
        hyperparams.update(read)
        saved_hyperparams.update(read)
        return hyperparams, saved_hyperparams

    def _save_config(self, saved_hyperparams: dict[str, Any]) -> None:
        """As rl_zoo3; but save only the name of a schedule that is a function, as `enjoy` could not read a function."""
        if not self.is_first:
            return
        functions = {name: value for name, value in saved_hyperparams.items() if isinstance(value, FunctionType)}
        names = {name: f"the function {function.__qualname__}" for name, function in functions.items()}
        super()._save_config(type(saved_hyperparams)(saved_hyperparams, **names))

    def load_trial(
        self, storage: str, study_name: str, trial_id: int | None = None, convert: bool = True
    ) -> dict[str, Any]:
        """
        :param storage: a path that ends in ``.log``, or the URL of a database
        :param study_name: name of the study
        :param trial_id: number of the trial; None for the best
        :param convert: whether to convert the drawn values to hyper-parameters
        :return: the drawn values, or the hyper-parameters
        """
        try:
            study = load_study(storage, open_storage(storage, create=False), study_name)
            if trial_id is not None:
                complete_trial(study, trial_id)
        except StudyError as error:
            raise EntryError(str(error)) from None
        return dict(super().load_trial(storage, study_name, trial_id, convert))

    def _location(self, key: str) -> str:
        """Where a hyper-parameter is written, for a message."""
        file = "-params" if key in (self.custom_hyperparams or {}) else self.config
        return f"{file}, {self.env_name.gym_id}"

    def _preprocess_schedules(self, hyperparams: dict[str, Any]) -> dict[str, Any]:  # type: ignore[override]
        """Leave schedules to our constructors, which accept numbers, rl_zoo3's strings and None."""
        if self.algo in ALGORITHMS:
            return hyperparams
        return super()._preprocess_schedules(hyperparams)

    def _preprocess_hyperparams(self, hyperparams: dict[str, Any]) -> Any:
        """As rl_zoo3; but the ``env_kwargs`` of the entry also apply to the evaluation environments."""
        check_normalize(hyperparams, self._location)
        preprocessed = super()._preprocess_hyperparams(hyperparams)
        if not self._eval_env_kwargs_args:
            self.eval_env_kwargs = self.env_kwargs
        return preprocessed

    def learn(self, model: BaseAlgorithm) -> None:
        """
        Train from the agent's present step to ``n_timesteps``; Ctrl-C ends the training cleanly.

        :param model: the model to train
        """
        options: dict[str, Any] = {"tb_log_name": self._log_name(model)}
        if self.continue_training:
            options["reset_num_timesteps"] = False  # the step count and the schedules continue
            if model.tensorboard_log:
                # SB3 would write into the newest log, which may belong to another training.
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
                # These attributes are all that rl_zoo3 uses here.
                super().learn(cast(BaseAlgorithm, SimpleNamespace(learn=learn, env=model.env, policy=model.policy)))
        except (Exception, KeyboardInterrupt) as error:
            if not self.interrupts.caused(error):
                raise
            if not isinstance(error, KeyboardInterrupt):
                print(f"Ctrl-C ended the training, with {type(error).__name__}: {error}")
            if model.env is not None:
                with contextlib.suppress(Exception):
                    model.env.close()
        for callback in self.callbacks:
            if isinstance(callback, EvalCallback):  # rl_zoo3 leaves the evaluation environments open
                with contextlib.suppress(Exception):
                    callback.eval_env.close()

    def _log_name(self, model: BaseAlgorithm) -> str:
        """The prefix of the TensorBoard folder: SB3's, unless another algorithm has a class of the same name."""
        if self.algo not in ALGORITHMS:
            return str(inspect.signature(model.learn).parameters["tb_log_name"].default)
        name = type(model).__name__
        others = [key for key, algorithm in ALGOS.items() if algorithm.__name__ == name and key != self.algo]
        return self.algo if others else name

    def hyperparameters_optimization(self) -> None:
        """Run the search. Optuna handles Ctrl-C."""
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
            raise EntryError("no trial of the search is complete, so there is no best trial") from None

    def objective(self, trial: optuna.Trial) -> float:
        """
        Store the process and the budget of a trial in the study, then run the trial.

        :param trial: a trial of the study
        :return: the mean reward of the last evaluation
        """
        trial.set_user_attr(BUDGET, [self.n_timesteps, self.n_evaluations])
        trial.set_user_attr(WORKER, process_name(os.getpid()))
        return run_trial(self, trial)

    def save_trained_model(self, model: BaseAlgorithm) -> None:
        """
        Save the model, then print how good it is, where the files are and how to continue.

        :param model: the trained model; the training may have been interrupted
        """
        if not self.is_first:
            return
        super().save_trained_model(model)
        print(summary(self, model, self.program, self.interrupts, self.requested_timesteps))
