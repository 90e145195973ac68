"""``sb3-ppo-ext study``: what a search for hyper-parameters needs besides rl_zoo3's and Optuna's own commands."""

from __future__ import annotations

import argparse
import contextlib
import difflib
import io
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
import sqlalchemy.exc
import sqlalchemy.pool
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState
from rl_zoo3.utils import StoreDict

from sb3_ppo_ext.zoo.experiment import ZooExperimentManager

FINISHED = (TrialState.COMPLETE, TrialState.PRUNED)  # what --max-total-trials counts
INTERRUPTED = 130  # the exit code of a program that Ctrl-C has ended

_TASK = "sb3_ppo_ext"  # the attribute of a study that holds its task


class StudyError(Exception):
    """What the user has to change, in one line."""


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
        for module in self.gym_packages:
            __import__(module)
        parser = argparse.ArgumentParser()
        parser.add_argument("--hyperparams", nargs="+", action=StoreDict)
        said = io.StringIO()
        try:
            arguments = ["--hyperparams", *self.hyperparams] if self.hyperparams else []
            with contextlib.redirect_stdout(said):
                manager = ZooExperimentManager(
                    argparse.Namespace(),
                    self.algo,
                    self.env,
                    "",
                    hyperparams=parser.parse_args(arguments).hyperparams,
                    config=self.conf_file or None,
                )
                entry = dict(manager.read_hyperparameters()[1])
        except KeyError as error:
            raise StudyError(f"there is no environment {error.args[0]!r}") from error
        except (ValueError, OSError, ImportError) as error:
            raise StudyError(str(error)) from error
        if self.n_timesteps:
            entry["n_timesteps"] = self.n_timesteps
        return entry


@dataclass
class Place:
    """
    A study and where it is.

    :param name: the study's
    :param storage: as rl_zoo3 is told it: a path that ends in ``.log``, or a database's URL
    :param folder: for all that is written about the study
    :param study: itself
    """

    name: str
    storage: str
    folder: Path
    study: optuna.Study

    def trials(self, *states: TrialState) -> list[FrozenTrial]:
        """
        :param states: of the trials that are wanted; of none, all
        """
        return self.study.get_trials(deepcopy=False, states=states or None)

    def best(self) -> list[FrozenTrial]:
        """The complete trials, best first."""
        trials = self.trials(TrialState.COMPLETE)
        if not trials:
            raise StudyError(f"study '{self.name}' has no complete trial yet")
        return sorted(trials, key=lambda trial: trial.value or 0.0, reverse=True)

    def trial(self, number: int) -> FrozenTrial:
        """
        :param number: the trial's
        """
        for trial in self.trials():
            if trial.number == number:
                if trial.state is not TrialState.COMPLETE:
                    raise StudyError(
                        f"trial {number} of study '{self.name}' is not complete: {trial.state.name.lower()}"
                    )
                return trial
        raise StudyError(f"study '{self.name}' has no trial {number}; it has {len(self.trials())}, from 0 on")

    @property
    def task(self) -> Task:
        """What its trials train."""
        if _TASK not in self.study.user_attrs:
            raise StudyError(
                f"study '{self.name}' was not made by `study run`, which would have noted what it trains; "
                "`study run` with its name adopts it"
            )
        return Task(**self.study.user_attrs[_TASK])

    def set_task(self, task: Task) -> None:
        """
        :param task: must be what it was before, if the study is not new
        """
        if _TASK in self.study.user_attrs:
            before = self.task
            for name, value in vars(before).items():
                if value != getattr(task, name):
                    raise StudyError(
                        f"study '{self.name}' was begun with {name}={value!r}, not {getattr(task, name)!r}; "
                        "another --study-name begins another study"
                    )
        else:
            self.study.set_user_attr(_TASK, vars(task))


@contextlib.contextmanager
def storage_errors(storage: str) -> Iterator[None]:
    """
    :param storage: whose errors inside of the ``with`` block become a :class:`StudyError`
    """
    try:
        yield
    except (ImportError, OSError, RuntimeError, KeyError, sqlalchemy.exc.SQLAlchemyError, ValueError) as error:
        if isinstance(error, (sqlalchemy.exc.ArgumentError, sqlalchemy.exc.NoSuchModuleError)):
            reason = "it is no database's URL that SQLAlchemy knows"
        elif isinstance(error, ImportError):
            missing = getattr(error.__cause__ or error.__context__ or error, "name", None) or "its driver"
            reason = (
                f"{missing} is missing; for PostgreSQL, pip install 'sb3-ppo-ext[postgresql]' and name the storage "
            )
            reason += "postgresql+psycopg://..."
        else:
            lines = str(error.__cause__ or error).strip().splitlines()
            reason = lines[0] if lines else type(error).__name__
        raise StudyError(f"storage {_shown(storage)} cannot be used: {reason}") from error


def _shown(storage: str) -> str:
    """
    :param storage: as the user gave it
    :return: the same without a password
    """
    try:
        return sqlalchemy.engine.make_url(storage).render_as_string(hide_password=True)
    except sqlalchemy.exc.ArgumentError:
        return storage


def _open(storage: str, create: bool) -> BaseStorage:
    """
    :param storage: as rl_zoo3 is told it
    :param create: a file that does not exist
    """
    path = storage.removeprefix("sqlite:///") if storage.startswith("sqlite:///") else storage
    if path == storage and "://" in storage:
        file = None
    elif storage.endswith(".log") or path != storage:
        file = Path(path)
    else:
        raise StudyError(
            f"storage {storage!r} is neither a file that ends in .log nor a URL, as sqlite:///study.db "
            "or postgresql+psycopg://user@host/database"
        )
    if storage.startswith("sqlite") and path in ("sqlite://", "sqlite:///", "", ":memory:"):
        raise StudyError(f"storage {storage} is in the memory of one process, and cannot be shared")
    if file is not None and not file.exists():
        if not create:
            raise StudyError(f"storage {storage} cannot be used: there is no {file}")
        with storage_errors(storage):
            file.absolute().parent.mkdir(parents=True, exist_ok=True)
    with storage_errors(storage):
        if storage.endswith(".log") and path == storage:
            return JournalStorage(JournalFileBackend(storage))
        engine: dict[str, Any] = {"poolclass": sqlalchemy.pool.NullPool}  # leaves no connection open
        if file is not None:
            engine["connect_args"] = {"timeout": 60}  # SQLite has one writer at a time
        try:
            return RDBStorage(storage, engine_kwargs=engine)
        except (sqlalchemy.exc.OperationalError, sqlalchemy.exc.ProgrammingError, sqlalchemy.exc.IntegrityError):
            time.sleep(1.0)  # another process may have been making the tables
            return RDBStorage(storage, engine_kwargs=engine)


def _folder(options: argparse.Namespace, name: str) -> Path:
    """
    :param options: of any ``study`` command
    :param name: a study's
    """
    if "/" in name or name in ("", ".", ".."):
        raise StudyError(f"study name {name!r}: it becomes a folder's, and cannot be that")
    return Path(options.log_folder, "studies", name)


def create(options: argparse.Namespace) -> Place:
    """
    :param options: of ``study run``
    :return: a study that was there or is new
    """
    name = options.study_name or f"{options.algo}_{options.env}".replace("/", "-")
    folder = _folder(options, name)
    storage = options.storage or str(folder / "study.log")
    opened = _open(storage, create=True)
    with storage_errors(storage):
        study = optuna.create_study(storage=opened, study_name=name, load_if_exists=True, direction="maximize")
    folder.mkdir(parents=True, exist_ok=True)
    return Place(name, storage, folder, study)


def find(options: argparse.Namespace) -> Place:
    """
    :param options: of a ``study`` command other than ``run``
    :return: the study that is named; or the only one that there is
    """
    opened, name = None, options.study_name
    if options.storage:
        where = _shown(options.storage)
        opened = _open(options.storage, create=False)
        with storage_errors(options.storage):
            names = optuna.get_all_study_names(opened)
    else:
        where = str(Path(options.log_folder, "studies"))
        names = sorted(file.parent.name for file in Path(where).glob("*/study.log"))
    if not names:
        raise StudyError(f"there is no study in {where}; -f or --storage name another place")
    if name is None and len(names) > 1:
        raise StudyError(f"--study-name must say which study of {where} is meant: {', '.join(sorted(names))}")
    if name is not None and name not in names:
        nearest = difflib.get_close_matches(name, names, 1, cutoff=0.0)[0]
        raise StudyError(f"there is no study '{name}' in {where}; the nearest is '{nearest}'")
    name = name or names[0]
    folder = _folder(options, name)
    storage = options.storage or str(folder / "study.log")
    opened = opened or _open(storage, create=False)
    with storage_errors(storage):
        study = optuna.load_study(storage=opened, study_name=name)
    folder.mkdir(parents=True, exist_ok=True)
    return Place(name, storage, folder, study)


def _positive(text: str) -> int:
    """
    :param text: of a command line
    """
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no number from 1 on")
    return int(text)


def _parser(algorithms: Sequence[str]) -> argparse.ArgumentParser:
    """
    :param algorithms: keys of those that have a search space
    """
    parser = argparse.ArgumentParser(
        "sb3-ppo-ext study", description="Search for hyper-parameters, and look at what was found.", allow_abbrev=False
    )
    commands = parser.add_subparsers(dest="command", required=True)

    def command(name: str, text: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
        added.add_argument("--study-name", help="default: ALGO_ENV, or the only one that there is")
        added.add_argument("--storage", help="FILE.log, sqlite:///FILE or another database's URL; default: in -f")
        added.add_argument("-f", "--log-folder", default="logs", help="default: logs")
        return added

    run = command("run", "search with several processes. Flags that are not listed here are those of `train`.")
    run.add_argument("--algo", required=True, choices=algorithms, metavar="ALGO", help=", ".join(algorithms))
    run.add_argument("--env", required=True, help="environment id")
    run.add_argument("--max-total-trials", type=_positive, required=True, help="complete and pruned ones of the study")
    run.add_argument("--workers", type=_positive, default=2, help="processes at a time; default: 2")
    run.add_argument("--seed", type=int, help="of the first trial; all others follow from it")
    run.add_argument("-n", "--n-timesteps", type=_positive, default=0, help="of a trial; default: the entry's")
    run.add_argument("-conf", "--conf-file", default="", help="as for train")
    for flag in ("-params --hyperparams", "--env-kwargs", "--eval-env-kwargs", "--gym-packages"):
        run.add_argument(*flag.split(), nargs="+", default=[], help="as for train")

    show = command("show", "print the best trials; plot history and importances, as a page and as a picture.")
    show.add_argument("--top", type=_positive, default=10, help="how many trials; default: 10")

    evaluate = command("evaluate", "train the best trials again on fresh seeds, and the entry they started from.")
    evaluate.add_argument("--top", type=_positive, default=3, help="how many trials; default: 3")
    evaluate.add_argument("--trials", type=int, nargs="+", metavar="NUMBER", help="these trials, instead of the best")
    evaluate.add_argument("--seeds", type=_positive, default=5, help="how many for each; default: 5")
    evaluate.add_argument("--first-seed", type=int, default=1000, help="default: 1000")
    evaluate.add_argument("-n", "--n-timesteps", type=_positive, default=0, help="default: the study's")
    evaluate.add_argument("--workers", type=_positive, default=2, help="processes at a time; default: 2")

    export = command("export", "write a trial as a YAML entry for `train -conf`.")
    export.add_argument("--trial", type=int, metavar="NUMBER", help="default: the winner of evaluate, or the best")
    export.add_argument("-o", "--output", type=Path, help="default: beside the study")
    return parser


@contextlib.contextmanager
def _interrupted_by(*signals: str) -> Iterator[None]:
    """
    :param signals: names of those that act as Ctrl-C inside of the ``with`` block, where the system has them
    """
    numbers = [getattr(signal, name) for name in signals if hasattr(signal, name)]
    before = {number: signal.signal(number, signal.default_int_handler) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def main(arguments: Sequence[str], program: Sequence[str]) -> int:
    """
    :param arguments: of ``sb3-ppo-ext study``
    :param program: how ``sb3-ppo-ext`` was started
    :return: the exit code
    """
    from rl_zoo3.hyperparams_opt import HYPERPARAMS_SAMPLER

    from sb3_ppo_ext.zoo import study_results, study_run

    parser = _parser(sorted(HYPERPARAMS_SAMPLER))
    options, others = parser.parse_known_args(arguments)
    if others and options.command in ("show", "export"):
        parser.error(f"unrecognized arguments: {' '.join(others)}")
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    again = [*program, "study", *arguments]
    try:
        with _interrupted_by("SIGTERM", "SIGHUP"):
            if options.command == "run":
                return study_run.run(options, others, again)
            place = find(options)
            if options.command == "show":
                study_results.show(place, options.top)
            elif options.command == "evaluate":
                return study_results.evaluate(place, options, others, again)
            else:
                study_results.export(place, options.trial, options.output, program)
            return 0
    except StudyError as error:
        print(f"sb3-ppo-ext study: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return INTERRUPTED
