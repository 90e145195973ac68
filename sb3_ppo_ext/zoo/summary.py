"""The summary after a training: how good the agent is, where the files are, how to continue."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rl_zoo3.exp_manager import ExperimentManager
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.vec_env import sync_envs_normalization

from sb3_ppo_ext.common.processes import n_processes
from sb3_ppo_ext.common.saving.files import write_whole
from sb3_ppo_ext.zoo.arguments import LOG_FOLDER
from sb3_ppo_ext.zoo.interrupts import Interrupts

N_EPISODES = 20
RESULT = "final_evaluation.json"  # the reward in the summary, for programs; beside the configuration


def summary(
    manager: ExperimentManager,
    model: BaseAlgorithm,
    program: Sequence[str],
    interrupts: Interrupts,
    requested_timesteps: int | None,
) -> str:
    """
    Evaluate the model, which is already saved, and summarise the training. An error of the environment is reported in
    the summary, so that the user still learns where the model is.

    :param manager: the manager of the training that has just been saved
    :param model: the trained model, which is evaluated once more
    :param program: command that starts ``sb3-ppo-ext``
    :param interrupts: handler of Ctrl-C
    :param requested_timesteps: the steps that were asked for, if others were made
    :return: a few lines for a person
    """
    algo, env_id = manager.algo, manager.env_name.gym_id
    saved, details = Path(manager.save_path), Path(manager.params_path)
    model_path = saved / f"{manager.env_name}.zip"
    done, budget = model.num_timesteps, manager.n_timesteps
    of_budget = f" of {budget:,}" if done < budget else ""

    lines = [
        "",
        f"{algo} on {env_id}, {done:,} steps{of_budget}",
        f"  reward       {_reward(manager, model, interrupts)}",
        f"  model        {model_path}",
    ]
    lines += [
        f"  {name:<12} {path}"
        for name, path in (
            ("best model", saved / "best_model.zip"),
            ("config", details / "config.yml"),
            ("evaluations", saved / "evaluations.npz"),
        )
        if path.exists()
    ]
    if manager.tensorboard_log:
        lines += [f"  TensorBoard  {model.logger.get_dir()}"]

    run_id = saved.name.removeprefix(f"{manager.env_name}_")
    enjoy = ["enjoy", "--algo", algo, "--env", env_id, "--exp-id", run_id]
    if manager.log_folder != LOG_FOLDER:
        enjoy += ["-f", manager.log_folder]
    gym_packages = getattr(manager.args, "gym_packages", None)
    if gym_packages:
        enjoy += ["--gym-packages", *gym_packages]
    if run_id.isdigit():  # rl_zoo3 finds runs by number; one named with --uuid has none
        lines += ["", "Watch the agent:", f"  {shlex.join([*program, *enjoy])}"]

    train = ["train", *_without_flags(sys.argv[1:], "-i", "--trained-agent")]
    if done < budget:
        note = f"  (from step {done:,} to {budget:,}; schedules go on where they are)"
        if requested_timesteps is not None:
            train = [*_without_flags(train, "-n", "--n-timesteps"), "-n", str(budget)]
    else:
        longer = done + (requested_timesteps or budget)
        note = (
            f"  (from step {done:,} to {longer:,}; a schedule such as lin_0.2 goes on as that of the longer training, "
            f"at {1 - done / longer:.0%} of its start)"
        )
    proceed = [*_with_processes(program), *train, "-i", str(model_path)]
    lines += ["", "Continue the training:", f"  {shlex.join(proceed)}", note]
    if n_processes() > int(os.environ.get("LOCAL_WORLD_SIZE", n_processes())):
        lines += [f"  (on each of the machines, with the options of torchrun that joined {n_processes()} processes)"]
    if manager.tensorboard_log:
        tensorboard = [str(Path(sys.executable).with_name("tensorboard")), "--logdir", manager.tensorboard_log]
        lines += ["", "Open TensorBoard:", f"  {shlex.join(tensorboard)}"]
    return "\n".join(lines)


def _with_processes(program: Sequence[str]) -> list[str]:
    """
    :param program: command that starts ``sb3-ppo-ext``
    :return: the command that starts it in as many processes on this machine as there are now
    """
    n = n_processes()
    if n == 1:
        return list(program)
    module = program[1:] if "-m" in program else ["-m", "sb3_ppo_ext.zoo"]
    return ["torchrun", "--nproc-per-node", os.environ.get("LOCAL_WORLD_SIZE", str(n)), *module]


def _without_flags(arguments: Sequence[str], *flags: str) -> list[str]:
    """
    :param arguments: arguments of ``train``
    :param flags: flags that take one value each
    :return: the arguments without these flags and their values
    """
    kept = [argument for argument in arguments if not argument.startswith(tuple(f"{flag}=" for flag in flags))]
    return [
        argument
        for before, argument in zip(["", *kept], kept, strict=False)
        if argument not in flags and before not in flags
    ]


def _reward(manager: ExperimentManager, model: BaseAlgorithm, interrupts: Interrupts) -> str:
    """Evaluate the model, write the result beside the configuration, and describe it."""
    if manager.eval_freq <= 0:  # the user wants no evaluation
        rewards = [episode["r"] for episode in model.ep_info_buffer or ()]
        if not rewards:
            return "not known: no episode of the training has ended, and --eval-freq asks for no evaluation"
        of = f"the training's last {len(rewards)} episodes"
        return f"{np.mean(rewards):.2f} +/- {np.std(rewards):.2f} (mean and std of {of})"
    try:
        if interrupts.count > 1:  # the user pressed Ctrl-C twice and does not want to wait
            raise KeyboardInterrupt
        with interrupts.stage():
            mean, std = _evaluate(manager, model, interrupts)
        result = {"mean": mean, "std": std, "n_episodes": N_EPISODES, "num_timesteps": model.num_timesteps}
        write_whole(Path(manager.params_path, RESULT), memoryview(json.dumps(result).encode()))
    except KeyboardInterrupt:
        return "not measured: Ctrl-C ended the evaluation"
    except Exception as error:  # the environment may raise anything
        return f"not measured: {type(error).__name__}: {error}"
    actions = "deterministic" if manager.deterministic_eval else "sampled"
    return f"{mean:.2f} +/- {std:.2f} (mean and std of {N_EPISODES} episodes, {actions} actions)"


def _evaluate(manager: ExperimentManager, model: BaseAlgorithm, interrupts: Interrupts) -> tuple[float, float]:
    """
    :return: mean and standard deviation of the unnormalised rewards of episodes
    :raises KeyboardInterrupt: if Ctrl-C is pressed during the evaluation
    """
    print(f"Evaluating {N_EPISODES} episodes", flush=True)
    with contextlib.redirect_stdout(io.StringIO()):  # the manager has printed its settings before
        env = manager.create_envs(manager.n_eval_envs, eval_env=True)
    training_env = model.get_env()
    if training_env is not None and model.get_vec_normalize_env() is not None:
        sync_envs_normalization(training_env, env)

    def check_interrupts(local_variables: dict[str, Any], global_variables: dict[str, Any]) -> None:
        interrupts.check()

    try:
        mean, std = evaluate_policy(model, env, N_EPISODES, manager.deterministic_eval, callback=check_interrupts)
    finally:
        with contextlib.suppress(Exception):
            env.close()
    assert isinstance(mean, float)
    assert isinstance(std, float)
    return mean, std
