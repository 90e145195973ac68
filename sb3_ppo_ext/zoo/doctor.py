"""Runs ``sb3-ppo-ext doctor``."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from sb3_ppo_ext.common.saving.files import write_whole
from sb3_ppo_ext.doctor.diagnosis import diagnose, in_words, number
from sb3_ppo_ext.doctor.keys import MEANINGS, UnknownKeyError, full_key
from sb3_ppo_ext.doctor.logs import LogError, read_runs
from sb3_ppo_ext.doctor.measurements import SETTINGS
from sb3_ppo_ext.doctor.page import page
from sb3_ppo_ext.doctor.rules import FAR_BEYOND, N_START, RULES
from sb3_ppo_ext.doctor.run import Run, Series
from sb3_ppo_ext.zoo.arguments import Parser, StoreDict


def run_doctor_command(arguments: Sequence[str]) -> int:
    """
    :param arguments: arguments of ``sb3-ppo-ext doctor``
    :return: the exit code
    """
    parser = Parser(
        "sb3-ppo-ext doctor",
        description="Read the log of a training, and say what looks wrong, what that usually means and what to change "
        "first. It works with every on-policy algorithm of Stable-Baselines3, sb3-contrib and this package.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "log",
        nargs="?",
        type=Path,
        metavar="LOG_OR_FOLDER",
        help="progress.csv, progress.json, an event file of TensorBoard, or a folder with logs of one or more runs",
    )
    parser.add_argument("--html", action="store_true", help="also write a page with plots, doctor.html, beside the log")
    parser.add_argument("--explain", metavar="KEY", help="say what a logged key means: approx_kl, train/std, ...")
    parser.add_argument(
        "-params",
        "--hyperparams",
        nargs="+",
        action=StoreDict,
        default={},
        help=f"settings that some rules need and the log lacks, such as gamma:0.99; one of {', '.join(SETTINGS)}",
    )
    options = parser.parse_args(arguments)
    if (options.log is None) == (options.explain is None):
        parser.error("give either a log, or a folder with logs, or --explain KEY")
    for name, value in options.hyperparams.items():
        if name not in SETTINGS:
            parser.error(f"argument -params: no rule needs '{name}'; it must be one of {', '.join(SETTINGS)}")
        if not isinstance(value, (int, float)) or not math.isfinite(value):
            parser.error(f"argument -params: {name}={value!r} is not allowed: it must be a number")
    try:
        if options.explain is not None:
            print(*_explanation(full_key(options.explain)), sep="\n")
        else:
            _diagnose(options.log, options.hyperparams, with_page=options.html)
    except (LogError, UnknownKeyError, OSError) as error:
        print(f"sb3-ppo-ext doctor: {error}", file=sys.stderr)
        return 2
    return 0


def _diagnose(log: Path, settings: dict[str, float], *, with_page: bool) -> None:
    unreadable: list[LogError] = []
    diagnoses = [diagnose(_with_settings(run, settings)) for run in read_runs(log, unreadable)]
    print("\n\n".join("\n".join(in_words(diagnosis)) for diagnosis in diagnoses))
    if with_page:
        path = (log if log.is_dir() else log.parent) / "doctor.html"
        write_whole(path, memoryview(page(diagnoses).encode()))
        print(f"\nWith plots:\n  {path}")
    for error in unreadable:
        print(f"sb3-ppo-ext doctor: left out: {error}", file=sys.stderr)


def _with_settings(run: Run, settings: dict[str, float]) -> Run:
    """Add hyper-parameters to a run, as if they had been logged in each of its rows."""
    steps = max((series.steps for series in run.series.values()), key=len)
    given = {f"doctor/{name}": Series(steps, np.full(len(steps), float(value))) for name, value in settings.items()}
    return Run(run.name, {**run.series, **given})


def _explanation(key: str) -> list[str]:
    """What a key means, and the limits of the rules that are about it."""
    lines = [f"{key}: {MEANINGS[key]}"]
    for rule in RULES:
        if key not in rule.keys:
            continue
        lines += ["", f"Looked for: {rule.title[0].lower()}{rule.title[1:]}"]
        if not rule.is_flag:
            side = "below" if rule.below else "above"
            limits = [] if rule.watch == rule.alarm else [f"{side} {number(rule.watch)} is worth a look"]
            limits += [] if rule.alarm is None else [f"{side} {number(rule.alarm)} is an alarm"]
            lines += [f"  {rule.quantity.rstrip(',')}: {', '.join(limits)}."]
        left_out = (
            f"; the first {N_START}, or the first tenth of a longer log, do not count" if rule.after_start else ""
        )
        if rule.after_start and rule.alarm is not None and not rule.below:
            left_out += f", unless all are above {number(FAR_BEYOND * rule.alarm)}"
        lines += [f"  It takes {rule.fewest_rows} rows{left_out}." if rule.fewest_rows > 1 else "  One row is enough."]
        lines += [f"  {rule.meaning}"]
    return lines
