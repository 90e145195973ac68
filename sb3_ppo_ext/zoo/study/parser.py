"""The command line of ``sb3-ppo-ext study``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from sb3_ppo_ext.zoo.arguments import Parser, whole_number

_positive, _not_negative = (partial(whole_number, minimum=least) for least in (1, 0))


def study_parser(algorithms: Sequence[str]) -> argparse.ArgumentParser:
    """
    :param algorithms: keys of the algorithms that have a search space
    :return: the parser of ``sb3-ppo-ext study``
    """
    parser = Parser(
        "sb3-ppo-ext study", description="Search for hyper-parameters, and report the results.", allow_abbrev=False
    )
    commands = parser.add_subparsers(dest="command", required=True)

    def command(name: str, text: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
        added.add_argument("--study-name", help="default: ALGO_ENV, or the only study that there is")
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
        help="end when the study has this many complete and pruned trials; failed trials do not count",
    )
    run.add_argument("--workers", type=_positive, default=2, help="processes at a time; default: 2")
    run.add_argument("--seed", type=_not_negative, help="the seeds of all trials are derived from it; default: random")
    run.add_argument("-n", "--n-timesteps", type=_positive, default=0, help="steps of a trial; default: the entry's")
    run.add_argument("-conf", "--conf-file", default="", help="as for train")
    for flag in ("-params --hyperparams", "--env-kwargs", "--eval-env-kwargs", "--gym-packages"):
        run.add_argument(*flag.split(), nargs="+", default=[], help="as for train")

    trials = run.add_argument_group("how a trial is drawn, evaluated and pruned")
    trials.add_argument(
        "--n-evaluations",
        type=_positive,
        help="evaluations of a trial, evenly spaced: the pruner sees each, and the last is the trial's value; "
        "default: 1 for each 100,000 steps of a trial, and at least 1",
    )
    trials.add_argument("--eval-episodes", type=_positive, default=5, help="episodes of an evaluation; default: 5")
    trials.add_argument(
        "--n-startup-trials",
        type=_not_negative,
        default=10,
        help="number of random trials before the sampler tpe learns from them, and of complete trials before the "
        "pruner median prunes; default: 10",
    )
    trials.add_argument(
        "--sampler",
        choices=("tpe", "random", "auto"),
        default="tpe",
        help="tpe draws near the best trials so far, random draws uniformly, "
        "auto chooses a sampler (it needs optunahub and the network); default: tpe",
    )
    trials.add_argument(
        "--pruner",
        choices=("median", "halving", "none"),
        default="median",
        help="median ends a trial that is worse than half of the earlier ones after as many evaluations, "
        "halving keeps the best quarter at evaluations 1, 4, 16, ..., none prunes no trial; default: median",
    )
    trials.add_argument("--device", default="auto", help="cpu, cuda, ...; default: auto")

    show = command("show", "print the best trials; write a page with plots and a table of all trials, and a picture.")
    show.add_argument("--top", type=_positive, default=10, help="how many trials; default: 10")

    evaluate = command("evaluate", "train the best trials again on fresh seeds, and the entry they started from.")
    evaluate.add_argument("--top", type=_positive, default=3, help="how many trials; default: 3")
    evaluate.add_argument("--trials", type=int, nargs="+", metavar="NUMBER", help="these trials, instead of the best")
    evaluate.add_argument("--seeds", type=_positive, default=5, help="how many seeds for each; default: 5")
    evaluate.add_argument("--first-seed", type=_not_negative, default=1000, help="lowest of the seeds; default: 1000")
    evaluate.add_argument("-n", "--n-timesteps", type=_positive, default=0, help="steps of each; default: the study's")
    evaluate.add_argument("--workers", type=_positive, default=2, help="processes at a time; default: 2")

    export = command("export", "write a trial as a YAML entry for `train -conf`.")
    export.add_argument("--trial", type=int, metavar="NUMBER", help="default: the winner of evaluate, or the best")
    export.add_argument("-o", "--output", type=Path, help="default: beside the study")
    return parser
