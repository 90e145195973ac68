"""The closing word after a training: how good the agent is, where everything lies, how to go on."""

import contextlib
import io
import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from rl_zoo3.exp_manager import ExperimentManager
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.vec_env import sync_envs_normalization

N_EPISODES = 20
RESULT = "final_evaluation.json"  # the same for a program, beside the configuration


def summary(manager: ExperimentManager, model: BaseAlgorithm, program: Sequence[str]) -> str:
    """
    :param manager: the manager of the training that has just been saved
    :param model: the trained model, which is evaluated once more
    :param program: how to start ``sb3-ppo-ext``
    :return: a few lines for a person
    """
    mean, std = _evaluate(manager, model)
    algo, env_id = manager.algo, manager.env_name.gym_id
    saved, details = Path(manager.save_path), Path(manager.params_path)
    result = {"mean": mean, "std": std, "n_episodes": N_EPISODES, "num_timesteps": model.num_timesteps}
    (details / RESULT).write_text(json.dumps(result))
    model_path = saved / f"{manager.env_name}.zip"

    actions = "deterministic" if manager.deterministic_eval else "sampled"
    lines = [
        "",
        f"{algo} on {env_id}, {model.num_timesteps:,} steps",
        f"  reward       {mean:.2f} +/- {std:.2f} (mean and std of {N_EPISODES} episodes, {actions} actions)",
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
    enjoy = ["enjoy", "--algo", algo, "--env", env_id, "-f", manager.log_folder, "--exp-id", run_id]
    if manager.args.gym_packages:
        enjoy += ["--gym-packages", *manager.args.gym_packages]
    if run_id.isdigit():  # rl_zoo3 finds runs by number; one named with --uuid has none
        lines += ["", "Watch the agent:", f"  {shlex.join([*program, *enjoy])}"]
    lines += [
        "",
        "Continue the training:",
        f"  {shlex.join([*program, 'train', *_without_trained_agent(sys.argv[1:]), '-i', str(model_path)])}",
    ]
    if manager.tensorboard_log:
        tensorboard = [str(Path(sys.executable).with_name("tensorboard")), "--logdir", manager.tensorboard_log]
        lines += ["", "Open TensorBoard:", f"  {shlex.join(tensorboard)}"]
    return "\n".join(lines)


def _without_trained_agent(arguments: Sequence[str]) -> list[str]:
    """
    :param arguments: of ``train``
    :return: the same without the model that the training started from
    """
    flags = ("-i", "--trained-agent")
    kept = [argument for argument in arguments if not argument.startswith("--trained-agent=")]
    return [
        argument
        for before, argument in zip(["", *kept], kept, strict=False)
        if argument not in flags and before not in flags
    ]


def _evaluate(manager: ExperimentManager, model: BaseAlgorithm) -> tuple[float, float]:
    """
    :param manager: the manager of the training
    :param model: the trained model
    :return: mean and standard deviation of an episode's reward, as the environment gives it
    """
    with contextlib.redirect_stdout(io.StringIO()):  # what the manager says of every environment has been said twice
        env = manager.create_envs(manager.n_eval_envs, eval_env=True)
    training_env = model.get_env()
    if training_env is not None and model.get_vec_normalize_env() is not None:
        sync_envs_normalization(training_env, env)
    try:
        mean, std = evaluate_policy(model, env, N_EPISODES, deterministic=manager.deterministic_eval)
    finally:
        env.close()
    assert isinstance(mean, float)
    assert isinstance(std, float)
    return mean, std
