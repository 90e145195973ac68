"""What ``train -i AGENT`` takes over from the agent, and which agents it refuses."""

from __future__ import annotations

import contextlib
import re
from pathlib import Path
from typing import Any

from stable_baselines3.common.vec_env import VecEnv, VecNormalize

from sb3_ppo_ext.common.saving.checkpoint import load_vec_normalize
from sb3_ppo_ext.common.saving.interchange import mark_of
from sb3_ppo_ext.zoo.errors import EntryError

# Our algorithms whose agents SB3's algorithms can continue, by rl_zoo3's keys.
_TAKES = {"ppo": ("sb3_ppo_ext.DualClipPPO", "sb3_ppo_ext.AdaptiveKLPPO"), "trpo": ("sb3_ppo_ext.TRPO",)}


def check_agent_fits(agent: str, algo: str) -> None:
    """
    :param agent: a model file
    :param algo: key of an algorithm of another package, whose ``load`` accepts any file
    :raises EntryError: if the agent was saved by one of our algorithms, and the other one cannot continue it
    """
    with open(agent, "rb") as file:
        mark = mark_of(file)
    if mark is not None and mark not in _TAKES.get(algo, ()):
        raise EntryError(f"{agent} was saved by {mark}, and --algo {algo} cannot continue it")


def with_statistics(env: VecEnv, agent: Path, env_name: str) -> tuple[VecNormalize | None, Path]:
    """
    :param env: environment without normalisation
    :param agent: the model file
    :param env_name: name of the environment in file names
    :return: the environment normalised by the agent's statistics, or None if it has none; and the file of the
        statistics
    """
    with contextlib.suppress(ValueError):  # not a model file; loading the agent will report it
        of_checkpoint = load_vec_normalize(agent, env)  # a checkpoint of SafeCheckpointCallback
        if of_checkpoint is not None:
            return of_checkpoint, agent
    files = [agent.parent / env_name / "vecnormalize.pkl"]
    if re.search(r"_\d+_steps\.zip$", agent.name):  # a checkpoint of SB3's callback
        files.insert(0, agent.with_name(re.sub(r"_(\d+_steps)\.zip$", r"_vecnormalize_\1.pkl", agent.name)))
    for file in files:
        if file.is_file():
            return VecNormalize.load(str(file), env), file
    return None, agent


def normalize_as_agent(
    env: VecEnv, agent: Path, env_name: str, normalize: Any, normalize_kwargs: dict[str, Any], location: str
) -> VecNormalize | None:
    """
    :param env: environment without normalisation
    :param agent: the model file
    :param env_name: name of the environment in file names
    :param normalize: ``normalize`` of the entry
    :param normalize_kwargs: the same as keyword arguments of VecNormalize
    :param location: where the entry is written
    :return: the environment normalised by the agent's statistics, or None if it has none
    :raises EntryError: if the entry does not fit the agent's statistics
    """
    normalized, source = with_statistics(env, agent, env_name)
    if bool(normalize) != (normalized is not None):
        what = f"with those in {source}" if normalized else f"without any in {agent} or beside it"
        raise EntryError(
            f"{location}: normalize={normalize!r} does not fit an agent that was "
            f"trained {what}: the statistics of VecNormalize belong to the agent"
        )
    if normalized is None:
        return None
    print(f"Statistics of VecNormalize from {source}")
    for name, value in normalize_kwargs.items():
        if name == "gamma":  # the entry may change gamma
            normalized.gamma = value
        elif name != "training" and getattr(normalized, name, value) != value:
            raise EntryError(
                f"{location}: normalize with {name}={value!r} does not fit {source}, "
                f"which has {name}={getattr(normalized, name)!r}"
            )
    return normalized
