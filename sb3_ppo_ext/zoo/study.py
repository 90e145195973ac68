"""``sb3-ppo-ext study``: what a search for hyper-parameters needs besides rl_zoo3's and Optuna's own commands."""

from __future__ import annotations

import argparse
import contextlib
import signal
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState
from rl_zoo3.hyperparams_opt import HYPERPARAMS_CONVERTER

from sb3_ppo_ext.zoo.arguments import Parser, whole_number
from sb3_ppo_ext.zoo.interrupts import INTERRUPTED
from sb3_ppo_ext.zoo.storage import StudyError, complete_trial, load_study, open_storage, shown, storage_errors
from sb3_ppo_ext.zoo.task import Task, check_train_arguments
from sb3_ppo_ext.zoo.trials import REASON, merged, real

FINISHED = (TrialState.COMPLETE, TrialState.PRUNED)  # what --max-total-trials counts

_TASK = "sb3_ppo_ext"  # the attribute of a study that holds its task


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
            reasons = [trial.user_attrs[REASON] for trial in self.trials() if REASON in trial.user_attrs]
            last = f"; the last of {len(self.trials())} ended with {reasons[-1]}" if reasons else ""
            raise StudyError(f"study '{self.name}' has no complete trial yet{last}")
        return sorted(trials, key=lambda trial: trial.value or 0.0, reverse=True)

    def trial(self, number: int) -> FrozenTrial:
        """
        :param number: of a complete trial
        """
        return complete_trial(self.study, number)

    def entry(self, trial: FrozenTrial | None) -> dict[str, Any]:
        """
        :param trial: one of the study's; or none, for the entry that all of them started from
        :return: its hyper-parameters
        """
        entry = self.task.entry()
        return entry if trial is None else merged(entry, self._converted(trial))

    def _converted(self, trial: FrozenTrial) -> dict[str, Any]:
        """
        :param trial: one of the study's
        :return: the hyper-parameters that it has drawn
        """
        try:
            return dict(HYPERPARAMS_CONVERTER[self.task.algo](dict(trial.params)))
        except KeyError as error:
            raise StudyError(
                f"trial {trial.number} of study '{self.name}' was drawn from another search space: "
                f"the converter of {self.task.algo} finds no {error}"
            ) from error

    def values(self, trial: FrozenTrial) -> dict[str, tuple[str, Any]]:
        """
        :param trial: one of the study's
        :return: by the sampler's name of what was drawn, the name and the value that are meant; then what follows from
            these, by its own name
        """
        try:
            converted = self._converted(trial)
        except StudyError:  # of another program, which says no more than what it has drawn
            converted = {}
        inner = converted.pop("policy_kwargs", {})
        drawn = {name: real(name, value) for name, value in trial.params.items()}
        meant = {name for name, _ in drawn.values()}
        values = {key: (name, converted.get(name, inner.get(name, value))) for key, (name, value) in drawn.items()}
        return {**values, **{name: (name, value) for name, value in converted.items() if name not in meant}}

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
    opened = open_storage(storage, create=True)
    with storage_errors(storage):
        optuna.create_study(storage=opened, study_name=name, load_if_exists=True, direction="maximize")
    study = load_study(storage, opened, name)
    folder.mkdir(parents=True, exist_ok=True)
    return Place(name, storage, folder, study)


def find(options: argparse.Namespace) -> Place:
    """
    :param options: of a ``study`` command other than ``run``
    :return: the study that is named; or the only one that there is
    """
    opened, name = None, options.study_name
    if options.storage:
        where = shown(options.storage)
        opened = open_storage(options.storage, create=False)
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
        raise StudyError(f"there is no study '{name}' in {where}; it has {', '.join(sorted(names))}")
    name = name or names[0]
    folder = _folder(options, name)
    storage = options.storage or str(folder / "study.log")
    opened = opened or open_storage(storage, create=False)
    study = load_study(storage, opened, name)
    folder.mkdir(parents=True, exist_ok=True)
    return Place(name, storage, folder, study)


_positive, _not_negative = (partial(whole_number, minimum=least) for least in (1, 0))


def _parser(algorithms: Sequence[str]) -> argparse.ArgumentParser:
    """
    :param algorithms: keys of those that have a search space
    """
    parser = Parser(
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
    run.add_argument(
        "--max-total-trials",
        type=_positive,
        required=True,
        help="complete and pruned ones of the study; failed ones do not count",
    )
    run.add_argument("--workers", type=_positive, default=2, help="processes at a time; default: 2")
    run.add_argument("--seed", type=int, help="of the first trial; all others follow from it")
    run.add_argument("-n", "--n-timesteps", type=_positive, default=0, help="of a trial; default: the entry's")
    run.add_argument("-conf", "--conf-file", default="", help="as for train")
    for flag in ("-params --hyperparams", "--env-kwargs", "--eval-env-kwargs", "--gym-packages"):
        run.add_argument(*flag.split(), nargs="+", default=[], help="as for train")

    trials = run.add_argument_group("how a trial is drawn, evaluated and pruned")
    trials.add_argument(
        "--n-evaluations",
        type=_positive,
        help="of a trial, evenly spaced: the pruner looks at each, and the last is the trial's value; "
        "default: 1 for each 100,000 steps of a trial, and at least 1",
    )
    trials.add_argument("--eval-episodes", type=_positive, default=5, help="of an evaluation; default: 5")
    trials.add_argument(
        "--n-startup-trials",
        type=_not_negative,
        default=10,
        help="trials that are drawn at random before the sampler tpe learns from them, "
        "and that complete before the pruner median prunes; default: 10",
    )
    trials.add_argument(
        "--sampler",
        choices=("tpe", "random", "auto"),
        default="tpe",
        help="tpe draws near the trials that were good so far, random draws evenly, "
        "auto chooses (it needs optunahub and the network); default: tpe",
    )
    trials.add_argument(
        "--pruner",
        choices=("median", "halving", "none"),
        default="median",
        help="median ends a trial that is worse than half of the earlier ones after as many evaluations, "
        "halving keeps the best quarter at evaluations 1, 4, 16, ..., none ends no trial early; default: median",
    )
    trials.add_argument("--device", default="auto", help="cpu, cuda, ...; default: auto")

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

    from sb3_ppo_ext.zoo import study_results, study_run, study_show

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
            if options.command == "evaluate":
                check_train_arguments("evaluate", others)
            place = find(options)
            if options.command == "show":
                study_show.show(place, options, program)
            elif options.command == "evaluate":
                return study_results.evaluate(place, options, others, again)
            else:
                study_results.export(place, options.trial, options.output, program)
            return 0
    except StudyError as error:
        print(f"sb3-ppo-ext study: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return INTERRUPTED
