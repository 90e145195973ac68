"""Begin new episodes as SB3 does, within the step that ends one, whatever the autoreset mode of the vector."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv, VectorEnv

from sb3_ppo_ext.common.errors import ArgumentError
from sb3_ppo_ext.common.rollout.data import MASK_KEY, rows_of


class Begun(NamedTuple):
    """
    The result of a step in which episodes ended and new ones began.

    :param obs: the observations after the step, the first of a new episode where one began
    :param final_obs: the final observations, in the rows of the environments whose episodes ended
    :param final_infos: the infos of the step, as arrays, for the environments whose episodes ended
    :param masks: which actions are allowed next; None if the infos do not say
    """

    obs: Any
    final_obs: Any
    final_infos: dict[str, Any]
    masks: Any


Begin = Callable[[Any, np.ndarray, dict[str, Any]], Begun]
"""Takes a step's observations, a bool for each environment whose episode it ended, and the infos."""


def is_envpool(env: Any) -> bool:
    """
    :param env: any object
    """
    return all(hasattr(env, name) for name in ("config", "send", "recv", "all_env_ids"))


def way_to_begin(env: Any) -> Begin | None:
    """
    Choose how to begin new episodes of a vector of environments within a step.

    :param env: the vector
    :return: None for a vector that spends a whole step on a reset (``NEXT_STEP``), from which nothing is learnt
    :raises ArgumentError: if the vector does not state its autoreset mode
    """
    if is_envpool(env):
        return lambda *args: _by_number(env, *args)
    mode = env.metadata.get("autoreset_mode")
    try:
        mode = AutoresetMode(mode)
    except ValueError:
        raise ArgumentError(
            f"env={env!r:.100} is not allowed: metadata['autoreset_mode'] is {mode!r}, and must say how it begins new "
            f"episodes: {', '.join(str(mode) for mode in AutoresetMode)}"
        ) from None
    if mode is AutoresetMode.SAME_STEP:
        return within_the_step
    # These two can reset some of their environments at any time.
    can_be_told = type(env) is SyncVectorEnv or (type(env) is AsyncVectorEnv and bool(env.shared_memory))
    if mode is AutoresetMode.DISABLED or can_be_told:
        return lambda *args: _by_mask(env, *args)
    return None


def _by_number(env: Any, obs: Any, dones: np.ndarray, infos: dict[str, Any]) -> Begun:
    rows = np.flatnonzero(dones)
    first_obs, first_infos = env.reset(rows)
    rows = first_infos["env_id"]
    return Begun(_with_rows(obs, rows, first_obs), obs, infos, _with_masks(infos, rows, first_infos.get(MASK_KEY)))


def _by_mask(env: VectorEnv[Any, Any, Any], obs: Any, dones: np.ndarray, infos: dict[str, Any]) -> Begun:
    final_obs = copied(obs)  # the vector may reuse its array
    first_obs, first_infos = env.reset(options={"reset_mask": dones.copy()})
    rows = np.flatnonzero(dones)
    masks = first_infos.get(MASK_KEY)
    masks = _with_masks(infos, rows, None if masks is None else masks[rows])
    return Begun(_with_rows(final_obs, rows, rows_of(first_obs, rows)), final_obs, infos, masks)


def within_the_step(obs: Any, dones: np.ndarray, infos: dict[str, Any]) -> Begun:
    """
    For a vector that has already begun the new episodes (``SAME_STEP``).

    :param obs: the observations
    :param dones: the environments whose episodes the step ended
    :param infos: the infos of the step, with the final observations
    """
    rows = np.flatnonzero(dones)
    if "final_obs" not in infos:
        raise ValueError(
            f"Environment {rows[0]} has ended an episode, and infos have no 'final_obs', by which a vector of "
            "environments whose autoreset_mode is SAME_STEP says what an episode ended with"
        )
    final = infos["final_obs"]
    if isinstance(final, np.ndarray) and final.dtype == object:
        of_ended = list(final[rows])
        is_dict = isinstance(of_ended[0], dict)
        final = {k: np.stack([o[k] for o in of_ended]) for k in of_ended[0]} if is_dict else np.stack(of_ended)
    else:
        final = rows_of(final, rows)
    recorded: dict[str, Any] = {
        key: infos[key] for key in ("episode", "_episode") if key in infos
    }  # by RecordEpisodeStatistics
    return Begun(obs, _with_rows(obs, rows, final), {**recorded, **infos.get("final_info", {})}, infos.get(MASK_KEY))


def copied(obs: Any) -> Any:
    """
    :param obs: an array, or a dict of arrays
    """
    return {key: array.copy() for key, array in obs.items()} if isinstance(obs, dict) else obs.copy()


def _with_rows(obs: Any, rows: np.ndarray, of_rows: Any) -> Any:
    """A copy of the observations with some rows replaced."""
    result = copied(obs)
    if isinstance(obs, dict):
        for key, array in result.items():
            array[rows] = of_rows[key]
    else:
        result[rows] = of_rows
    return result


def _with_masks(infos: dict[str, Any], rows: np.ndarray, of_rows: Any) -> Any:
    masks = infos.get(MASK_KEY)
    if masks is None or of_rows is None:
        return masks
    masks = masks.copy()
    masks[rows] = of_rows
    return masks
