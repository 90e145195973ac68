"""``sb3-ppo-ext study evaluate``: train the best trials again on fresh seeds, to see if they are good or were lucky."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import shlex
import shutil
from collections.abc import Callable, Sequence
from typing import Any

from sb3_ppo_ext.zoo.interrupts import INTERRUPTED
from sb3_ppo_ext.zoo.study.candidates import (
    DEFAULT,
    Candidate,
    make_candidate,
    result_table,
    store_result,
    stored_results,
    verdict,
)
from sb3_ppo_ext.zoo.study.study import ZooStudy
from sb3_ppo_ext.zoo.study.workers import Workers, last_line
from sb3_ppo_ext.zoo.summary import N_EPISODES, RESULT

_NO_EVALUATION = str(2**31)  # steps between evaluations: none during a training, as only the one after it counts


def evaluate(
    study: ZooStudy,
    options: argparse.Namespace,
    train_arguments: Sequence[str],
    program: Sequence[str],
    target: Callable[[], int],
) -> int:
    """
    Train the best trials, and the entry they started from, on seeds that the study has not seen.

    :param study: the study
    :param options: options of ``study evaluate``
    :param train_arguments: arguments for ``train``
    :param program: command that started ``sb3-ppo-ext``
    :param target: main function of ``sb3-ppo-ext``
    :return: the exit code
    """
    numbers = dict.fromkeys(options.trials or [])
    trials = [study.trial(number) for number in numbers] if numbers else study.best_trials()[: options.top]
    candidates = [make_candidate(study, trial, options.n_timesteps) for trial in (None, *trials)]
    seeds = range(options.first_seed, options.first_seed + options.seeds)
    stored = stored_results(study)
    jobs = []
    for seed in seeds:  # seed by seed, so that after an interruption the results can be compared
        for candidate in candidates:
            if candidate.key(seed) in stored:
                candidate.results[seed] = stored[candidate.key(seed)]["mean"]
            else:
                jobs.append((candidate, seed))
    n_trainings = len(candidates) * len(seeds)
    if len(jobs) < n_trainings:
        print(f"{n_trainings - len(jobs)} of {n_trainings} trainings were done before")
    failures: list[str] = []
    try:
        with contextlib.closing(Workers(options.workers, target)) as workers:
            try:
                _train(study, workers, jobs, train_arguments, failures)
            except KeyboardInterrupt:
                workers.close(interrupt=False)  # a half trained agent is of no use
                raise
    except KeyboardInterrupt:
        done = sum(len(candidate.results) for candidate in candidates)
        print(f"\n{done} of {n_trainings} trainings are done and kept.", end=" ")
        return INTERRUPTED
    print("", *result_table(candidates), sep="\n")
    if failures:
        print("\nFailed:", *failures, sep="\n  ")
        return 1
    print(f"\n{verdict(candidates)}")
    winner = max(candidates, key=lambda candidate: candidate.rank)
    if winner.label == DEFAULT:
        return 0
    export = [*program, "study", "export", "--trial", winner.label, *study.arguments]
    print(f"\nWrite it as YAML:\n  {shlex.join(export)}")
    return 0


def _train(
    study: ZooStudy,
    workers: Workers,
    jobs: list[tuple[Candidate, int]],
    train_arguments: Sequence[str],
    failures: list[str],
) -> None:
    """
    :param study: study that stores the results
    :param workers: the processes
    :param jobs: candidates to train, each with a seed; the results are added to the candidates
    :param train_arguments: arguments for ``train``
    :param failures: list to which descriptions of failed trainings are added
    """
    running: dict[int, tuple[Candidate, int]] = {}
    waiting = list(jobs)
    done = 0
    while waiting or running:
        for slot in workers.free[: len(waiting)]:
            candidate, seed = running[slot] = waiting.pop(0)
            folder = candidate.folder(study, seed)
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            arguments = _training(study, candidate, train_arguments)
            workers.start(slot, [*arguments, "--seed", str(seed), "-f", str(folder)], folder / "train.log")
        for slot, code in workers.wait(timeout=1.0).items():
            candidate, seed = running.pop(slot)
            done += 1
            job = f"{candidate.name}, seed {seed}"
            result = None if code else _finished(study, candidate, seed)
            if result is None:
                log = candidate.folder(study, seed) / "train.log"
                failures.append(f"{job}: {last_line(log)} ({log})")
                print(f"{done} of {len(jobs)}: {job}: failed", flush=True)
                continue
            candidate.results[seed] = result["mean"]
            store_result(study, candidate, seed, result)
            reward = f"{result['mean']:.2f} +/- {result['std']:.2f} over {N_EPISODES} episodes"
            print(f"{done} of {len(jobs)}: {job}: {reward}", flush=True)


def _training(study: ZooStudy, candidate: Candidate, train_arguments: Sequence[str]) -> list[str]:
    """The command line that trains a candidate, without seed and folder."""
    task = dataclasses.replace(study.task, n_timesteps=candidate.entry["n_timesteps"])
    arguments = ["train", "--num-threads", "1", "--eval-freq", _NO_EVALUATION, *train_arguments, *task.arguments()]
    return arguments if candidate.label == DEFAULT else [*arguments, *study.trial_arguments(int(candidate.label))]


def _finished(study: ZooStudy, candidate: Candidate, seed: int) -> dict[str, Any] | None:
    """The result of a training; None if it has no result or was interrupted."""
    for file in candidate.folder(study, seed).rglob(RESULT):
        result: dict[str, Any] = json.loads(file.read_text())
        return result if result["num_timesteps"] >= candidate.entry["n_timesteps"] else None
    return None
