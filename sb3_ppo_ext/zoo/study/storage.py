"""Storages of studies: a journal file or a database. Their failures become one-line errors."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import optuna
import sqlalchemy.exc
import sqlalchemy.pool
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from sb3_ppo_ext.zoo.errors import StudyError


@contextlib.contextmanager
def storage_errors(storage: str) -> Iterator[None]:
    """Turn errors of a storage in the ``with`` block into a :class:`StudyError` that names it."""
    try:
        yield
    except StudyError:
        raise
    except (ImportError, OSError, RuntimeError, KeyError, sqlalchemy.exc.SQLAlchemyError, ValueError) as error:
        if isinstance(error, (sqlalchemy.exc.ArgumentError, sqlalchemy.exc.NoSuchModuleError)):
            reason = "SQLAlchemy does not know this database URL"
        elif isinstance(error, ImportError):
            missing = getattr(error.__cause__ or error.__context__ or error, "name", None) or "its driver"
            reason = (
                f"{missing} is missing; for PostgreSQL, pip install 'sb3-ppo-ext[postgresql]' and name the storage "
            )
            reason += "postgresql+psycopg://..."
        else:
            lines = str(error.__cause__ or error).strip().splitlines()
            reason = lines[0] if lines else type(error).__name__
        raise StudyError(f"storage {without_password(storage)} cannot be used: {reason}") from error


def without_password(storage: str) -> str:
    """
    :param storage: the storage as the user gave it
    :return: the storage without a password, for a message
    """
    try:
        return sqlalchemy.engine.make_url(storage).render_as_string(hide_password=True)
    except sqlalchemy.exc.ArgumentError:
        return storage


def open_storage(storage: str, create: bool) -> BaseStorage:
    """
    :param storage: a path that ends in ``.log``, or the URL of a database, as in rl_zoo3
    :param create: whether to create a file that does not exist
    :return: the storage
    :raises StudyError: if it cannot be used
    """
    path = storage.removeprefix("sqlite:///") if storage.startswith("sqlite:///") else storage
    if path == storage and "://" in storage:
        file = None
    elif storage.endswith(".log") or path != storage:
        file = Path(path)
    else:
        raise StudyError(
            f"storage {storage!r} is neither a file that ends in .log nor a URL such as sqlite:///study.db "
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
        engine: dict[str, Any] = {"poolclass": sqlalchemy.pool.NullPool}  # no connection stays open
        if file is not None:
            engine["connect_args"] = {"timeout": 60}  # SQLite has one writer at a time
        try:
            return RDBStorage(storage, engine_kwargs=engine)
        except (sqlalchemy.exc.OperationalError, sqlalchemy.exc.ProgrammingError, sqlalchemy.exc.IntegrityError):
            time.sleep(1.0)  # another process may be creating the tables
            return RDBStorage(storage, engine_kwargs=engine)


def load_study(storage: str, opened: BaseStorage, name: str) -> optuna.Study:
    """
    :param storage: the storage as the user gave it
    :param opened: the opened storage
    :param name: name of the study
    :return: the study, which maximizes one value
    :raises StudyError: if there is no study of this name, or it does not maximize one value
    """
    with storage_errors(storage):
        names = sorted(optuna.get_all_study_names(opened))
        if name not in names:
            has = f"it has {', '.join(names)}" if names else "it has none"
            raise StudyError(f"there is no study '{name}' in {without_password(storage)}; {has}")
        study = optuna.load_study(storage=opened, study_name=name)
        if study.directions != [StudyDirection.MAXIMIZE]:
            raise StudyError(f"study '{name}' does not maximize one value, as the studies of this program do")
    return study


def complete_trial(study: optuna.Study, number: int) -> FrozenTrial:
    """
    :param study: the study
    :param number: number of the trial
    :return: the trial
    :raises StudyError: if there is no trial with this number, or it is not complete
    """
    trials = study.get_trials(deepcopy=False)
    complete = [str(trial.number) for trial in trials if trial.state is TrialState.COMPLETE]
    few = complete if len(complete) <= 20 else [*complete[:10], "...", *complete[-9:]]
    has = f"the complete ones are {', '.join(few)}" if complete else "none is complete"
    for trial in trials:
        if trial.number == number:
            if trial.state is not TrialState.COMPLETE:
                raise StudyError(
                    f"trial {number} of study '{study.study_name}' is not complete but {state_name(trial.state)}; {has}"
                )
            return trial
    raise StudyError(f"study '{study.study_name}' has no trial {number}; it has {len(trials)} trials, {has}")


def state_name(state: TrialState) -> str:
    """The name of a trial's state for a message."""
    return state.name.lower().replace("fail", "failed")
