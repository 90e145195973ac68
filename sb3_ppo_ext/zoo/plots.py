"""Runs ``sb3-ppo-ext plots``."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from huggingface_sb3 import EnvironmentName
from stable_baselines3.common.env_util import make_vec_env

from sb3_ppo_ext import AdaptiveKLPPO, DualClipPPO
from sb3_ppo_ext.common.saving.files import opened
from sb3_ppo_ext.common.saving.interchange import name_of, origin_of
from sb3_ppo_ext.plots import save, updated_samples
from sb3_ppo_ext.plots.style import kind_of
from sb3_ppo_ext.plots.updates import draw_update
from sb3_ppo_ext.zoo.arguments import Parser, seed_number
from sb3_ppo_ext.zoo.errors import MESSAGE_TYPES, needs_no_traceback
from sb3_ppo_ext.zoo.pretrained import with_statistics


def run_plots_command(arguments: Sequence[str]) -> int:
    """
    :param arguments: arguments of ``sb3-ppo-ext plots``
    :return: the exit code
    """
    parser = Parser(
        "sb3-ppo-ext plots",
        description="Draw what one update does to a saved model: collect a rollout, update once, and show for each "
        "sample whether it still learns or is cut. The model file is not changed.",
        allow_abbrev=False,
    )
    parser.add_argument("model", type=Path, metavar="MODEL.zip", help="a saved model, or a checkpoint")
    parser.add_argument("--env", required=True, metavar="ID", help="the environment in which it was trained")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("update.png"),
        metavar="F.png",
        help="file of the figure, .png, .svg or .pdf; default: %(default)s",
    )
    seed = partial(seed_number, minimum=0)
    parser.add_argument("--seed", type=seed, default=0, help="seed of the environments; default: %(default)s")
    options = parser.parse_args(arguments)
    try:
        _draw(options.model, options.env, options.out, options.seed)
    except MESSAGE_TYPES as error:
        if not needs_no_traceback(error):
            raise
        print(f"sb3-ppo-ext plots: {error}", file=sys.stderr)
        return 2
    return 0


def _draw(path: Path, env_id: str, out: Path, seed: int) -> None:
    kind_of(out)  # before any training, as a wrong path would waste it
    with opened(path) as file:
        is_adaptive = origin_of(file) == name_of(AdaptiveKLPPO)
    model: Any = (AdaptiveKLPPO if is_adaptive else DualClipPPO).load(path)
    model.verbose, model.tensorboard_log = 0, None
    model.set_random_seed(seed)
    env = make_vec_env(env_id, n_envs=model.n_envs, seed=seed)
    model.set_env(with_statistics(env, path, EnvironmentName(env_id))[0] or env)
    if model.lr_schedule(model._current_progress_remaining) == 0.0:
        raise ValueError(
            f"{path} is not allowed: its learning rate has fallen to 0, so an update would change nothing; it "
            "must be a checkpoint from before the end of the training"
        )
    try:
        _update_once(model)
        samples = updated_samples(model)
        save(draw_update(model, samples), out)
        print(*samples.in_words().values(), sep="\n")
    finally:
        model.env.close()
    print(f"Drawn:\n  {out}")


def _update_once(model: Any) -> None:
    """Collect one rollout and update on it, as ``learn`` does, but with the schedules at their saved progress."""
    _, callback = model._setup_learn(model.n_steps * model.n_envs)
    callback.on_training_start({}, {})
    model.collect_rollouts(model.env, callback, model.rollout_buffer, model.n_steps)
    model.train()
