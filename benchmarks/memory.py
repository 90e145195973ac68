"""
Who solves tasks that need a memory: each algorithm with ``MlpLstmPolicy`` and, for as many steps, with ``MlpPolicy``.

    python -m benchmarks.memory
    python -m benchmarks.memory --tasks TMaze-v0 --algos trpo_ext --seeds 5 --jobs 2
    python -m benchmarks.memory --table

Each run is a line of ``results/memory/TASK.jsonl``, with its hyper-parameters; a run that is there already is not made
again, so whoever stops this and starts it again goes on. A reward is the mean over episodes of the trained agent;
``process_seconds`` is the processor time of the training alone. benchmarks/memory_cases.py says
what counts as solved, and what a policy without memory can reach at best.
"""

from __future__ import annotations

import argparse
import importlib
import json
import multiprocessing
import statistics
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any, NamedTuple

import torch as th
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.vec_env import sync_envs_normalization

from benchmarks.memory_cases import LEFT_OUT, TASKS, settings
from benchmarks.zoo import quiet_experiment
from sb3_ppo_ext.zoo import ALGORITHMS, register

RESULTS = Path(__file__).parent / "results" / "memory"


class Run(NamedTuple):
    """
    :param task: one of :data:`benchmarks.memory_cases.TASKS`
    :param algo: an algorithm's key, e.g. ``dual_clip_ppo``
    :param memory: whether the policy has one
    :param seed: of the training
    """

    task: str
    algo: str
    memory: bool
    seed: int

    def key(self) -> dict[str, Any]:
        """What tells the run's line from others; with other hyper-parameters, it is another run."""
        return {**self._asdict(), "settings": settings(self.task, self.algo, self.memory)}


_KEY = {*Run._fields, "settings"}


def train_and_evaluate(run: Run) -> dict[str, Any]:
    """
    :param run: to be made, in this process
    :return: its line
    """
    task = TASKS[run.task]
    th.set_num_threads(1)
    _import_environments(run.task)
    register()
    th.manual_seed(run.seed)
    hyper_parameters = run.key()["settings"]
    with quiet_experiment(run.algo, run.task, hyper_parameters, run.seed) as (manager, model, _):
        start = time.process_time()
        model.learn(manager.n_timesteps)
        process_seconds = time.process_time() - start
        train_env, eval_env = model.get_env(), manager.create_envs(8, eval_env=True)
        assert train_env is not None
        sync_envs_normalization(train_env, eval_env)
        rewards, _ = evaluate_policy(
            model,
            eval_env,
            n_eval_episodes=task.n_episodes,
            deterministic=task.deterministic,
            return_episode_rewards=True,
            warn=False,
        )
        eval_env.close()
        train_env.close()
    assert isinstance(rewards, list)
    return {**run.key(), "reward": round(statistics.fmean(rewards), 4), "process_seconds": round(process_seconds, 2)}


def _import_environments(task: str) -> None:
    """Let gymnasium know the task."""
    if not task.startswith("popgym-"):
        importlib.import_module("benchmarks.memory_tasks")
        importlib.import_module("rl_zoo3.import_envs")
        return
    try:
        importlib.import_module("popgym")
    except ModuleNotFoundError:
        raise SystemExit(f'{task} is a task of popgym, which is missing: pip install -e ".[popgym]"') from None


def finished(runs: Iterable[Run], folder: Path) -> dict[Run, dict[str, Any]]:
    """
    :param runs: that are wanted
    :param folder: with the lines of earlier runs
    :return: the lines of those that are there
    """
    lines = [json.loads(line) for file in folder.glob("*.jsonl") for line in file.read_text().splitlines()]
    found = {json.dumps({name: line[name] for name in _KEY}, sort_keys=True): line for line in lines}
    keys = {run: json.dumps(run.key(), sort_keys=True) for run in runs}
    return {run: found[key] for run, key in keys.items() if key in found}


def make_runs(runs: Iterable[Run], folder: Path, jobs: int) -> None:
    """
    :param runs: that are wanted; those whose lines are there are not made
    :param folder: for the lines
    :param jobs: processes at a time
    """
    runs = list(runs)
    done = finished(runs, folder)
    todo = [run for run in runs if run not in done]
    folder.mkdir(parents=True, exist_ok=True)
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"), max_tasks_per_child=1) as pool:
        futures = {pool.submit(train_and_evaluate, run): run for run in todo}
        for number, future in enumerate(as_completed(futures), 1):
            run, line = futures[future], future.result()
            with (folder / f"{run.task}.jsonl").open("a") as file:
                file.write(json.dumps(line, sort_keys=True) + "\n")
            policy = "with memory" if run.memory else "without"
            print(
                f"{number} of {len(todo)}: {run.task}, {run.algo}, {policy}, seed {run.seed}: "
                f"{line['reward']:.2f} after {line['process_seconds']:.0f} s",
                flush=True,
            )


def table(runs: Sequence[Run], folder: Path) -> str:
    """
    :param runs: that are wanted
    :param folder: with their lines
    :return: a line for each task and algorithm, in Markdown
    """
    lines = finished(runs, folder)
    rows = [
        "| task | algorithm | steps | solved from | with memory | solved by | seconds | without memory | "
        "bound without memory |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for task, algo in dict.fromkeys((run.task, run.algo) for run in runs):
        here = [line for run, line in lines.items() if (run.task, run.algo) == (task, algo)]
        with_memory = [line for line in here if line["memory"]]
        rewards = [line["reward"] for line in with_memory]
        without = [line["reward"] for line in here if not line["memory"]]
        solved, bound = TASKS[task].solved, TASKS[task].bound
        n_solved = sum(reward >= solved for reward in rewards)
        seconds = f"{statistics.fmean(line['process_seconds'] for line in with_memory):.0f}" if with_memory else ""
        rows.append(
            f"| {task} | {ALGORITHMS[algo].__name__} | {settings(task, algo, True)['n_timesteps']:,.0f} | {solved:g} "
            f"| {_spread(rewards)} | {n_solved} of {len(rewards)} | {seconds} | {_spread(without)} | {bound:g} |"
        )
    return "\n".join(rows)


def _spread(rewards: Sequence[float]) -> str:
    if not rewards:
        return ""
    return f"{statistics.fmean(rewards):.2f} ({min(rewards):.2f} to {max(rewards):.2f})"


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    here = [task for task in TASKS if not task.startswith("popgym-")]
    add("--tasks", nargs="+", choices=tuple(TASKS), default=here, help="all but popgym's if it is not said")
    add("--algos", nargs="+", choices=tuple(ALGORITHMS), default=list(ALGORITHMS), help="all if it is not said")
    add("--memory", choices=("with", "without", "both"), default="both", help="of the policies")
    add("--seeds", type=int, default=3, help="trainings of each, with the seeds 0, 1, ...")
    add("--jobs", type=int, default=1, help="processes at a time, of one thread each")
    add("--table", action="store_true", help="print what is there, and train nothing")
    add("--out", type=Path, default=RESULTS, help="folder for the results")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    args = _parse(argv)
    policies = {"with": (True,), "without": (False,), "both": (True, False)}[args.memory]
    runs = [
        Run(task, algo, memory, seed)
        for task in args.tasks
        for algo in args.algos
        if (task, algo) not in LEFT_OUT
        for memory in policies
        for seed in range(args.seeds)
    ]
    if not args.table:
        for task in args.tasks:
            _import_environments(task)
        make_runs(runs, args.out, args.jobs)
    print(table(runs, args.out))


if __name__ == "__main__":
    main()
