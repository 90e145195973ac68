"""Reads the logs that Stable-Baselines3 writes: ``progress.csv``, ``progress.json`` and TensorBoard's event files."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sb3_ppo_ext.doctor.run import STEP, Run, run_of_rows

_EVENTS = "events.out.tfevents"


class LogError(ValueError):
    """A log is missing or cannot be read; the message is for the user."""


def read_runs(path: Path, unreadable: list[LogError] | None = None) -> list[Run]:
    """
    :param path: a log, or a folder with any number of logs in it or below it
    :param unreadable: list to which the errors of those logs of a folder that cannot be read are added, such as that of
        a training that has just begun; None: such a log is an error
    :return: the runs; several logs of one run in a folder count as one
    :raises LogError: if there is no log, or none can be read
    """
    if not path.exists():
        raise LogError(f"{path} does not exist")
    if path.is_file():
        return [_read(path, f"{path.resolve().parent.name}/{path.name}")]
    folders = sorted(
        {file.parent for pattern in ("progress*.csv", "progress*.json", f"{_EVENTS}*") for file in path.rglob(pattern)}
    )
    if not folders:
        raise LogError(
            f"{path} has no log in it: no progress.csv, progress.json or {_EVENTS}... `sb3-ppo-ext train` "
            "writes one with --tensorboard-log FOLDER, a model with tensorboard_log=FOLDER, or after "
            "model.set_logger(configure(FOLDER, ['csv']))"
        )
    logs: list[tuple[Path, str]] = []
    for folder in folders:
        name = str(folder.relative_to(path)) if folder != path else folder.resolve().name
        files = sorted(folder.glob("progress*.csv")) or sorted(folder.glob("progress*.json"))
        logs += [(file, name if len(files) == 1 else f"{name}/{file.name}") for file in files] or [(folder, name)]
    runs: list[Run] = []
    for log, name in logs:
        try:
            runs.append(_read(log, name))
        except LogError as error:
            if unreadable is None:
                raise
            unreadable.append(error)
    if not runs:
        assert unreadable
        raise unreadable[0]
    return runs


def _read(file: Path, name: str) -> Run:
    if file.is_dir() or file.name.startswith(_EVENTS):
        return _read_events(file, name)
    rows = _json_rows(file) if file.suffix == ".json" else _csv_rows(file)
    try:
        run = run_of_rows(name, ((int(row[STEP]), row) for row in rows if _is_finite(row.get(STEP))))
    except (OSError, OverflowError, UnicodeDecodeError, csv.Error, json.JSONDecodeError) as error:
        raise LogError(f"{file} cannot be read: {error}") from error
    if not run.series:
        raise LogError(f"{file} is empty, or no log of Stable-Baselines3: it has no {STEP}")
    return run


def _csv_rows(file: Path) -> Iterator[dict[str, Any]]:
    with file.open(newline="", encoding="utf-8") as lines:
        for row in csv.DictReader(lines):
            yield {key: _number(text) for key, text in row.items() if key and text}


def _is_finite(value: object) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def _number(text: str) -> float | str:
    try:
        return float(text)
    except (TypeError, ValueError):
        return text


def _json_rows(file: Path) -> Iterator[dict[str, Any]]:
    lines = file.read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines):
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            if number == len(lines) - 1:  # the training was killed while it wrote this line
                return
            raise
        if isinstance(row, dict):
            yield row


def _read_events(path: Path, name: str) -> Run:
    """
    :param path: an event file, or a folder with the event files of one run
    :param name: name of the run
    """
    try:
        from tensorboard.backend.event_processing.event_accumulator import (  # type: ignore[import-untyped]
            EventAccumulator,
        )
    except ModuleNotFoundError as error:
        raise LogError(f"{path} is a log for TensorBoard, which is missing here: pip install tensorboard") from error

    events = EventAccumulator(str(path), size_guidance={"scalars": 0})  # 0 keeps all
    events.Reload()
    rows = ((event.step, {key: event.value}) for key in events.Tags()["scalars"] for event in events.Scalars(key))
    run = run_of_rows(name, rows)
    if not run.series:
        raise LogError(f"{path} is empty, or no log of Stable-Baselines3: it has no scalars")
    return run
