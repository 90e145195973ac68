"""``sb3-ppo-ext study show``, ``evaluate`` and ``export``: what a study has found, and whether it stands."""

from __future__ import annotations

import argparse
import contextlib
import csv
import hashlib
import html
import io
import json
import shlex
import shutil
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import torch as th
import yaml
from optuna.exceptions import ExperimentalWarning
from optuna.importance import PedAnovaImportanceEvaluator, get_param_importances
from optuna.trial import FrozenTrial, TrialState
from rl_zoo3.hyperparams_opt import HYPERPARAMS_CONVERTER

from sb3_ppo_ext.zoo.study import INTERRUPTED, Place, StudyError
from sb3_ppo_ext.zoo.study_run import last_line
from sb3_ppo_ext.zoo.summary import N_EPISODES, RESULT
from sb3_ppo_ext.zoo.workers import Workers

_DEFAULT = "default"  # the candidate that is the entry which the trials started from
_PLOTS = {
    "optimization_history": "History",
    "param_importances": "Importances",
    "slice": "Value by hyper-parameter",
    "intermediate_values": "Evaluations of each trial",
    "timeline": "When each trial ran",
}
_WIDTH = 1600  # of the picture, in pixels


# --- show ---


def show(place: Place, top: int) -> None:
    """
    Print the best trials, and write the plots.

    :param place: the study
    :param top: how many trials
    """
    best = place.best()[:top]
    importances = _importances(place.study)
    counts = [(len(place.trials(state)), state.name.lower().replace("fail", "failed")) for state in TrialState]
    states = ", ".join(f"{count} {name}" for count, name in counts if count)
    print(f"study {place.name}: {states}")
    print("\nThe best trials, of one training each, and how much of the difference between good trials and others a")
    print("hyper-parameter explains:\n")
    names = [*importances, *(name for name in best[0].params if name not in importances)]
    rows = [["", "explains", *(f"trial {trial.number}" for trial in best)]]
    rows += [["value", "", *(f"{trial.value:.2f}" for trial in best)]]
    for name in names:
        importance = f"{importances[name]:.0%}" if name in importances else ""
        rows += [[name, importance, *(_short(trial.params.get(name)) for trial in best)]]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for label, *cells in rows:
        print(f"  {label:<{widths[0]}}", *(f"{cell:>{width}}" for cell, width in zip(cells, widths[1:], strict=True)))
    page, picture = _plots(place)
    print(f"\nPlots:\n  {page}\n  {picture}")
    print(f"\nLive, in a browser (pip install optuna-dashboard):\n  optuna-dashboard {shlex.quote(place.storage)}")


def _short(value: Any) -> str:
    """
    :param value: of a hyper-parameter
    """
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _importances(study: optuna.Study) -> dict[str, float]:
    """
    :param study: any
    :return: by hyper-parameter, the largest first; nothing if there are too few trials to tell
    """
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        warnings.simplefilter("ignore", ExperimentalWarning)
        try:
            return get_param_importances(study, evaluator=PedAnovaImportanceEvaluator())
        except (ValueError, RuntimeError, UserWarning):
            return {}


def _plots(place: Place) -> tuple[Path, Path]:
    """
    :param place: the study
    :return: the page and the picture with all plots
    """
    try:
        import matplotlib.pyplot as plt
        import optuna.visualization as interactive
        import optuna.visualization.matplotlib as still
        from PIL import Image
    except ImportError as error:
        raise StudyError(f"the plots need {error.name}: pip install 'sb3-ppo-ext[zoo]'") from error

    page, picture = place.folder / "report.html", place.folder / "report.png"
    title = html.escape(f"Study {place.name}")
    parts = [f"<!doctype html><meta charset='utf-8'><title>{title}</title><h1>{title}</h1>"]
    images: list[Image.Image] = []
    plt.switch_backend("agg")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # optuna says of each plot that it is experimental, matplotlib of its layout
        for name, heading in _PLOTS.items():
            options = {"evaluator": PedAnovaImportanceEvaluator()} if name == "param_importances" else {}
            try:
                figure = getattr(interactive, f"plot_{name}")(place.study, **options)
                getattr(still, f"plot_{name}")(place.study, **options)
            except (ValueError, RuntimeError) as error:
                parts.append(f"<h2>{heading}</h2><p>{html.escape(str(error))}</p>")
                continue
            # The library goes into the page, once, so that it needs no network.
            content = figure.to_html(full_html=False, include_plotlyjs=not images)
            parts.append(f"<h2>{heading}</h2>{content}")
            buffer = io.BytesIO()
            if name != "slice":  # which is as wide as it has hyper-parameters
                plt.gcf().set_size_inches(14, 5)
            if name == "intermediate_values":
                plt.gca().legend().remove()  # names every trial
            plt.gcf().savefig(buffer, format="png", dpi=100, bbox_inches="tight")
            image = Image.open(buffer).convert("RGB")
            images.append(image.resize((_WIDTH, image.height * _WIDTH // image.width)))
            plt.close("all")
    page.write_text("\n".join(parts), encoding="utf-8")
    whole = Image.new("RGB", (_WIDTH, sum(image.height for image in images)), "white")
    top = 0
    for image in images:
        whole.paste(image, (0, top))
        top += image.height
    whole.save(picture)
    return page, picture


# --- entries ---


def _entry(place: Place, trial: FrozenTrial | None) -> dict[str, Any]:
    """
    :param place: the study
    :param trial: one of its trials; or none, for the entry that all of them started from
    :return: the entry, as it stands in a YAML file
    """
    task = place.task
    entry = task.entry()
    if trial is not None:
        entry.update(HYPERPARAMS_CONVERTER[task.algo](dict(trial.params)))
    for name, value in entry.items():
        if name == "policy_kwargs" and not isinstance(value, str):
            entry[name] = _source(value)
    try:
        yaml.safe_dump(entry)
    except yaml.YAMLError as error:
        raise StudyError(f"the entry of {task.env} cannot be written as YAML: {error}") from error
    return entry


def _source(value: Any) -> str:
    """
    :param value: of ``policy_kwargs``
    :return: Python for it, as rl_zoo3 evaluates it
    """
    if isinstance(value, dict):
        return f"dict({', '.join(f'{name}={_source(part)}' for name, part in value.items())})"
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(_source, value))}]"
    if isinstance(value, type):
        name = value.__name__
        if getattr(th.nn, name, None) is value:
            return f"nn.{name}"
        raise StudyError(f"policy_kwargs: rl_zoo3 reads no {name} from YAML")
    return repr(value)


def _text(place: Place, entry: dict[str, Any], comment: Sequence[str]) -> str:
    """
    :param place: the study
    :param entry: of its environment
    :param comment: lines above
    :return: a YAML file
    """
    lines = "".join(f"# {line}".rstrip() + "\n" for line in comment)
    return lines + str(yaml.safe_dump({place.task.env: entry}, width=1000))


# --- evaluate ---


@dataclass
class Candidate:
    """
    What is trained on several seeds.

    :param label: the trial's number, or that it is the default
    :param entry: its hyper-parameters
    :param study_value: what the study has seen of it, in one training
    :param results: mean reward at the end of a training by its seed
    """

    label: str
    entry: dict[str, Any]
    study_value: float | None = None
    results: dict[int, float] = field(default_factory=dict)

    @property
    def mean(self) -> float:
        """Across seeds."""
        return float(np.mean(list(self.results.values())))

    @property
    def std(self) -> float:
        """Across seeds, of the sample."""
        return float(np.std(list(self.results.values()), ddof=1)) if len(self.results) > 1 else float("nan")

    def key(self, seed: int) -> tuple[str, ...]:
        """
        :param seed: of a training
        :return: what makes its result another one
        """
        content = yaml.safe_dump(self.entry, sort_keys=True)
        return (self.label, hashlib.sha256(content.encode()).hexdigest()[:12], str(seed))


_KEY = ("trial", "entry", "seed")


def _candidate(place: Place, trial: FrozenTrial | None, n_timesteps: int) -> Candidate:
    """
    :param place: the study
    :param trial: one of its trials; or none, for the entry that all of them started from
    :param n_timesteps: to train for; if 0, as long as in the study
    """
    entry = _entry(place, trial)
    entry["n_timesteps"] = n_timesteps or int(entry["n_timesteps"])  # an entry may count in floats, as 1e5
    return Candidate(_DEFAULT, entry) if trial is None else Candidate(str(trial.number), entry, trial.value)


def _results(place: Place) -> Iterator[dict[str, str]]:
    """
    :param place: the study
    :return: the rows of its evaluations
    """
    file = place.folder / "evaluation.csv"
    if file.exists():
        with file.open(newline="") as lines:
            yield from csv.DictReader(lines)


def _add_result(place: Place, key: tuple[str, ...], n_timesteps: int, result: dict[str, Any]) -> None:
    """
    :param place: the study
    :param key: of a training
    :param n_timesteps: of a training
    :param result: its last evaluation
    """
    file = place.folder / "evaluation.csv"
    row = {
        **dict(zip(_KEY, key, strict=True)),
        "n_timesteps": n_timesteps,
        "mean": result["mean"],
        "std": result["std"],
    }
    new = not file.exists()
    with file.open("a", newline="") as lines:
        writer = csv.DictWriter(lines, list(row))
        if new:
            writer.writeheader()
        writer.writerow(row)


def evaluate(place: Place, options: argparse.Namespace, train_arguments: Sequence[str], again: Sequence[str]) -> int:
    """
    Train the best trials, and the entry they started from, on seeds that the study has not seen.

    :param place: the study
    :param options: of ``study evaluate``
    :param train_arguments: those of ``train``
    :param again: this command
    :return: the exit code
    """
    numbers = dict.fromkeys(options.trials or [])
    trials = [place.trial(number) for number in numbers] if numbers else place.best()[: options.top]
    candidates = [_candidate(place, trial, options.n_timesteps) for trial in (None, *trials)]
    seeds = range(options.first_seed, options.first_seed + options.seeds)
    known = {tuple(row[name] for name in _KEY): float(row["mean"]) for row in _results(place)}
    jobs = []
    for seed in seeds:  # one seed of all first: what there is when it is interrupted can be compared
        for candidate in candidates:
            if candidate.key(seed) in known:
                candidate.results[seed] = known[candidate.key(seed)]
            else:
                jobs.append((candidate, seed))
    n_trainings = len(candidates) * len(seeds)
    if len(jobs) < n_trainings:
        print(f"{n_trainings - len(jobs)} of {n_trainings} trainings were done before")
    failures: list[str] = []
    try:
        with contextlib.closing(Workers(options.workers)) as workers:
            try:
                _train(place, workers, jobs, train_arguments, failures)
            except KeyboardInterrupt:
                workers.close(interrupt=False)  # what is half trained is of no use
                raise
    except KeyboardInterrupt:
        done = sum(len(candidate.results) for candidate in candidates)
        print(f"\n{done} of {n_trainings} trainings are done and kept. Go on:\n  {shlex.join(again)}")
        return INTERRUPTED
    _print_evaluation(candidates, len(seeds))
    if failures:
        print("\nFailed:", *failures, sep="\n  ")
        return 1
    winner = _winner(candidates)
    if winner is candidates[0]:
        print("\nThe winner is the default: no trial beats the entry that they started from.")
        return 0
    print(f"\nThe winner is trial {winner.label}: {_figures(winner)}, the default {_figures(candidates[0])}")
    start = again[: again.index("study") + 1]
    where = ["--study-name", place.name, "-f", options.log_folder]
    where += ["--storage", options.storage] if options.storage else []
    print(f"\nWrite it as YAML:\n  {shlex.join([*start, 'export', '--trial', winner.label, *where])}")
    return 0


def _train(
    place: Place,
    workers: Workers,
    jobs: list[tuple[Candidate, int]],
    train_arguments: Sequence[str],
    failures: list[str],
) -> None:
    """
    :param place: the study
    :param workers: the processes
    :param jobs: who is to be trained, and on which seed; their results are added to the candidates and to the file
    :param train_arguments: those of ``train``
    :param failures: what has failed is added
    """
    present: dict[int, tuple[Candidate, int]] = {}
    waiting = list(jobs)
    done = 0
    while waiting or present:
        for slot in workers.free[: len(waiting)]:
            candidate, seed = present[slot] = waiting.pop(0)
            folder = _run_folder(place, candidate, seed)
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            (folder / "entry.yml").write_text(_text(place, candidate.entry, []))
            arguments = ["train", *place.task.environment_arguments(), "--num-threads", "1", "--eval-freq", str(2**31)]
            arguments += [*train_arguments, "-conf", str(folder / "entry.yml"), "--seed", str(seed), "-f", str(folder)]
            workers.start(slot, arguments, folder / "train.log")
        for slot, code in workers.ended(timeout=1.0).items():
            candidate, seed = present.pop(slot)
            folder = _run_folder(place, candidate, seed)
            done += 1
            said = f"{done} of {len(jobs)}: {_name(candidate)}, seed {seed}"
            result = next((json.loads(file.read_text()) for file in folder.rglob(RESULT)), None)
            if code or result is None or result["num_timesteps"] < candidate.entry["n_timesteps"]:
                log = folder / "train.log"
                failures.append(f"{_name(candidate)}, seed {seed}: {last_line(log)} ({log})")
                print(f"{said}: failed", flush=True)
                continue
            candidate.results[seed] = result["mean"]
            _add_result(place, candidate.key(seed), candidate.entry["n_timesteps"], result)
            print(f"{said}: {result['mean']:.2f} +/- {result['std']:.2f} over {N_EPISODES} episodes", flush=True)


def _run_folder(place: Place, candidate: Candidate, seed: int) -> Path:
    """
    :param place: the study
    :param candidate: who is trained
    :param seed: of the training
    """
    return place.folder / "evaluation" / f"{candidate.label}_{candidate.key(seed)[1]}_{seed}"


def _name(candidate: Candidate) -> str:
    """
    :param candidate: any
    """
    return candidate.label if candidate.label == _DEFAULT else f"trial {candidate.label}"


def _winner(candidates: Iterable[Candidate]) -> Candidate:
    """
    :param candidates: that were trained
    :return: the best; of equals the default, or what was better in the study
    """

    def rank(candidate: Candidate) -> tuple[float, ...]:
        if candidate.study_value is None:
            return candidate.mean, float("inf")
        return candidate.mean, candidate.study_value, -int(candidate.label)

    return max(candidates, key=rank)


def _figures(candidate: Candidate) -> str:
    """
    :param candidate: that was trained
    """
    return f"{candidate.mean:.2f} +/- {candidate.std:.2f} across {len(candidate.results)} seeds"


def _print_evaluation(candidates: Sequence[Candidate], n_seeds: int) -> None:
    """
    :param candidates: all
    :param n_seeds: of each
    """
    print(f"\nReward at the end of a training ({N_EPISODES} episodes), mean and std across {n_seeds} seeds:")
    print(f"  {'':<12} {'in the study':>12} {'mean':>10} {'std':>8}   seeds")
    for candidate in candidates:
        value = "-" if candidate.study_value is None else f"{candidate.study_value:.2f}"
        each = " ".join(f"{candidate.results[seed]:.1f}" for seed in sorted(candidate.results))
        mean, std = (f"{candidate.mean:.2f}", f"{candidate.std:.2f}") if candidate.results else ("-", "-")
        print(f"  {_name(candidate):<12} {value:>12} {mean:>10} {std:>8}   {each}")


# --- export ---


def _evaluated(place: Place) -> list[Candidate]:
    """
    :param place: the study
    :return: who was trained again and is still the same, with the largest budget that there is
    """
    rows = list(_results(place))
    budget = max((int(row["n_timesteps"]) for row in rows), default=0)
    candidates: dict[str, Candidate] = {}
    for row in rows:
        label, seed = row["trial"], int(row["seed"])
        if label not in candidates:
            candidates[label] = _candidate(place, None if label == _DEFAULT else place.trial(int(label)), budget)
        if candidates[label].key(seed) == tuple(row[name] for name in _KEY):
            candidates[label].results[seed] = float(row["mean"])
    return [candidate for candidate in candidates.values() if candidate.results]


def export(place: Place, number: int | None, output: Path | None, program: Sequence[str]) -> None:
    """
    Write a trial as a YAML entry.

    :param place: the study
    :param number: of the trial; without, the best of the evaluation, or of the study if there is none
    :param output: the file
    :param program: how ``sb3-ppo-ext`` was started
    """
    evaluated = {candidate.label: candidate for candidate in _evaluated(place)}
    default = evaluated.pop(_DEFAULT, None)
    if number is None and evaluated:
        number = int(_winner(evaluated.values()).label)
    trial = place.best()[0] if number is None else place.trial(number)
    chosen = evaluated.get(str(trial.number)) or _candidate(place, trial, 0)
    task, (budget, _) = place.task, trial.user_attrs.get("budget", (chosen.entry["n_timesteps"], 1))
    complete, pruned = (len(place.trials(state)) for state in (TrialState.COMPLETE, TrialState.PRUNED))
    comment = [
        f"Trial {trial.number} of the Optuna study {place.name}: {task.algo} on {task.env}, "
        f"{complete} complete and {pruned} pruned trials of {budget} steps each.",
        f"In the study, one training: {trial.value:.2f}.",
    ]
    if chosen.results:
        seeds = f"{min(chosen.results)} to {max(chosen.results)}"
        comment += [
            f"Trained again for {chosen.entry['n_timesteps']} steps with seeds {seeds}, reward at the end over "
            f"{N_EPISODES} episodes: {_figures(chosen)};",
            f"chosen among {len(evaluated)} trials on these seeds.",
        ]
        if default is not None:
            comment += [f"The entry that the study started from, trained the same way: {_figures(default)}."]
    else:
        comment += ["Not trained again since."]
    file = output or place.folder / f"trial-{trial.number}.yml"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(_text(place, chosen.entry, comment))
    print(f"trial {trial.number}: {file}")
    command = [*program, "train", *task.environment_arguments(), "-conf", str(file)]
    print(f"\nTrain with it:\n  {shlex.join(command)}")
