"""Runs ``sb3-ppo-ext study``."""

from __future__ import annotations

import contextlib
import shlex
import signal
import sys
from collections.abc import Callable, Iterator, Sequence

import optuna
from rl_zoo3.hyperparams_opt import HYPERPARAMS_SAMPLER

from sb3_ppo_ext.zoo.errors import StudyError, needs_no_traceback
from sb3_ppo_ext.zoo.interrupts import INTERRUPTED
from sb3_ppo_ext.zoo.study.evaluation import evaluate
from sb3_ppo_ext.zoo.study.export import export
from sb3_ppo_ext.zoo.study.parser import study_parser
from sb3_ppo_ext.zoo.study.report import show
from sb3_ppo_ext.zoo.study.search import search
from sb3_ppo_ext.zoo.study.study import find_study
from sb3_ppo_ext.zoo.study.train_arguments import check_train_arguments


def run_study_command(arguments: Sequence[str], program: Sequence[str], target: Callable[[], int]) -> int:
    """
    :param arguments: arguments of ``sb3-ppo-ext study``
    :param program: command that started ``sb3-ppo-ext``
    :param target: main function of ``sb3-ppo-ext``, for the processes of a search or an evaluation
    :return: the exit code
    """
    parser = study_parser(sorted(HYPERPARAMS_SAMPLER))
    options, train_arguments = parser.parse_known_args(arguments)
    if train_arguments and options.command in ("show", "export"):
        parser.error(f"unrecognized arguments: {' '.join(train_arguments)}")
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    code = 0
    try:
        with _as_ctrl_c("SIGTERM", "SIGHUP"):
            if options.command == "run":
                code = search(options, train_arguments, program, target)
            elif options.command == "evaluate":
                check_train_arguments("evaluate", train_arguments)
                code = evaluate(find_study(options), options, train_arguments, program, target)
            elif options.command == "show":
                show(find_study(options), options.top, program)
            else:
                export(find_study(options), options.trial, options.output, program)
    except (StudyError, OSError) as error:
        if not isinstance(error, StudyError) and not needs_no_traceback(error):
            raise
        print(f"sb3-ppo-ext study: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return INTERRUPTED
    if code == INTERRUPTED:
        print(f"Go on:\n  {shlex.join([*program, 'study', *arguments])}")
    return code


@contextlib.contextmanager
def _as_ctrl_c(*signals: str) -> Iterator[None]:
    """Make the signals of these names act like Ctrl-C in the ``with`` block, where the system has them."""
    numbers = [getattr(signal, name) for name in signals if hasattr(signal, name)]
    before = {number: signal.signal(number, signal.default_int_handler) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
