"""Which actions the environments allow: by a method, in their infos, or in their observations."""

from __future__ import annotations

import contextlib
from typing import Any, Literal

import numpy as np
from gymnasium import spaces
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv, VecNormalize, unwrap_vec_normalize

from sb3_ppo_ext.common.errors import ArgumentError
from sb3_ppo_ext.common.rollout.array_envs import ArrayVecEnv
from sb3_ppo_ext.common.rollout.data import MASK_KEY, to_arrays
from sb3_ppo_ext.common.rollout.present_infos import present_infos, reset_infos
from sb3_ppo_ext.common.rollout.transitions import BatchedVecEnv
from sb3_ppo_ext.common.rollout.vec_envs import has_masks_method

Convention = Literal["method", "observation", "info"]

METHOD = "action_masks"  # of the environments, as sb3-contrib has it


def choices_of(action_space: spaces.Space[Any]) -> list[int]:
    """
    The number of choices in each dimension of an action. A mask has one entry for each choice, one dimension after the
    other. A binary dimension has two choices, 0 and 1.

    :param action_space: of the environment
    :return: empty where actions cannot be masked
    """
    if isinstance(action_space, spaces.Discrete):
        return [int(action_space.n)]
    if isinstance(action_space, spaces.MultiDiscrete):
        return [int(n) for n in action_space.nvec]
    if isinstance(action_space, spaces.MultiBinary):
        return [2] * int(np.prod(action_space.shape))
    return []


class ActionMasks:
    """
    Reads the action masks of a VecEnv.

    :param env: the environments
    :param convention: where the environments give their masks
    """

    def __init__(self, env: VecEnv, convention: Convention) -> None:
        self._env = env
        self.convention = convention
        self._choices = choices_of(env.action_space)
        if not self._choices:
            raise ValueError(
                f"The environments mask actions ({convention}), and action_space={env.action_space} cannot be masked: "
                "it must be Discrete, MultiDiscrete or MultiBinary; learn(..., use_masking=False) ignores the masks"
            )
        self._n_read = 0

    @classmethod
    def of(cls, env: VecEnv) -> ActionMasks | None:
        """
        :param env: environments that have been reset
        :return: the reader of their masks; None if they have none
        """
        convention = convention_of(env)
        if convention is None:
            _check_that_none_has_masks(env)
            return None
        return cls(env, convention)

    def sees_others(self, before: ActionMasks | None) -> bool:
        """
        Whether :meth:`read` gives the current masks even if other code has stepped the environments since the model
        did, for example ``evaluate_policy`` between two calls of ``learn``.

        :param before: the reader until now
        """
        is_watched = self.convention == "info" and before is not None and before._env is self._env
        return self.convention == "method" or is_watched

    def read(self, obs: Any) -> np.ndarray:
        """
        The current masks of the environments. Where a step ended an episode, they belong to the next episode.

        :param obs: the observations from the last step or reset
        :return: True where an action is allowed, shape ``(n_envs, n_choices)``
        """
        masks: Any
        if self.convention == "method":
            masks = self._env.env_method(METHOD)
        elif self.convention == "info" and isinstance(self._env.unwrapped, BatchedVecEnv):
            masks = self._env.unwrapped.action_masks_in_infos()
            masks = [None] * self._env.num_envs if masks is None else masks
        elif self.convention == "info":
            masks = [info.get(MASK_KEY) for info in present_infos(self._env)]
        else:
            normalizer = unwrap_vec_normalize(self._env)
            of_obs = (obs if normalizer is None else normalizer.get_original_obs())[MASK_KEY]
            masks = of_newest_frame(to_arrays(of_obs), self._choices)
        checked = checked_masks(masks, self._choices, step=self._n_read)
        self._n_read += 1
        return checked


def convention_of(env: VecEnv) -> Convention | None:
    """
    Where the environments give action masks; None if they have none.

    :param env: the environments; masks in infos are only found after a reset
    """
    if has_masks_method(env):
        return "method"
    if isinstance(env.observation_space, spaces.Dict) and MASK_KEY in env.observation_space.spaces:
        return "observation"
    if any(MASK_KEY in info for info in reset_infos(env)):
        return "info"
    return None


def checked_masks(masks: Any, choices: list[int], *, step: int | None) -> np.ndarray:
    """
    :param masks: one for each environment, as the environments gave them
    :param choices: of each dimension of an action
    :param step: number of the step, for the message; None if there is none
    :return: True where an action is allowed, shape ``(n_envs, n_choices)``
    :raises ValueError: naming the environment, the step and the mask, if it is of another shape, holds anything but 0
        and 1, or allows nothing
    """
    size = sum(choices)
    if not choices:
        raise ValueError("An action mask was given for a Box of actions, which cannot be masked; it must be None")
    checked = _as_they_should_be(masks, size)
    if checked is None:
        checked = np.stack([_checked_mask(mask, choices, i, step) for i, mask in enumerate(masks)])
    if len(choices) == 1:
        allows = checked.any(axis=1, keepdims=True)
    else:
        allows = np.logical_or.reduceat(checked, np.cumsum([0, *choices[:-1]]), axis=1)
    if not allows.all():
        i, dimension = np.argwhere(~allows)[0]
        of_dimension = "" if len(choices) == 1 else f" in dimension {dimension}"
        raise ValueError(f"{_where(int(i), step)} allows no action{of_dimension}: {checked[i].astype(int).tolist()}")
    return checked


def of_newest_frame(masks: np.ndarray, choices: list[int]) -> np.ndarray:
    """
    :param masks: from observations; ``VecFrameStack`` may have stacked several frames, the newest last
    :param choices: of each dimension of an action
    :return: the masks of the newest frame; all, if their size is not a whole number of frames
    """
    n_frames, rest = divmod(masks[0].size, sum(choices))
    if n_frames < 2 or rest or masks.shape[-1] % n_frames:
        return masks
    return masks[..., -(masks.shape[-1] // n_frames) :]


def _as_they_should_be(masks: Any, size: int) -> np.ndarray | None:
    """All masks at once, if they have the right size and hold True and False (or 1 and 0); None if some do not."""
    try:
        stacked = np.asarray(masks)
    except ValueError:  # of different lengths
        return None
    if stacked.shape != (len(masks), size):
        return None
    if stacked.dtype == bool:
        return stacked
    if stacked.dtype.kind not in "iuf":
        return None
    checked = stacked == 1
    return checked if (checked | (stacked == 0)).all() else None


def _checked_mask(mask: Any, choices: list[int], env_index: int, step: int | None) -> np.ndarray:
    size = sum(choices)
    values = flat_mask(mask)
    is_right = len(values) == size and values.dtype.kind in "biuf"
    if not is_right or (values.dtype != bool and not np.isin(values, (0, 1)).all()):
        raise ValueError(
            f"{_where(env_index, step)} is {mask!r:.200}: it must hold {size} entries, each True or False (or 1 or 0), "
            f"one for each choice of an action ({' + '.join(map(str, choices))})"
        )
    return values.astype(bool)


def flat_mask(mask: Any) -> np.ndarray:
    """
    :param mask: of one environment; it may be in parts, one for each dimension, as gymnasium's ``MultiDiscrete`` has it
    :return: the parts joined, shape ``(n_choices,)``
    """
    if mask is None:
        return np.zeros(0)
    try:
        return np.asarray(mask).reshape(-1)
    except ValueError:  # parts of different lengths
        return np.concatenate([flat_mask(part) for part in mask])


def _where(env_index: int, step: int | None) -> str:
    return f"The action mask of environment {env_index}" + ("" if step is None else f" in step {step}")


def _check_that_none_has_masks(env: VecEnv) -> None:
    """
    :param env: environments that have no method for their masks
    :raises ArgumentError: if some of them have this method, or another attribute of its name, or if a whole vector has
    """
    venv = env.unwrapped
    if not isinstance(venv, (DummyVecEnv, ArrayVecEnv)):  # a worker process ends when it is asked for what is not there
        return
    for index in range(env.num_envs):
        with contextlib.suppress(AttributeError, NotImplementedError):
            if env.get_attr(METHOD, indices=index)[0] is not None:
                raise ArgumentError(
                    f"env is not allowed: environment {index} has {METHOD}, which must be a method, and of all "
                    "environments; learn(..., use_masking=False) ignores it"
                )
    vector = getattr(venv, "vector_env", None)
    if hasattr(vector, METHOD) or hasattr(getattr(vector, "unwrapped", None), METHOD):
        raise ArgumentError(
            f"env={vector!r:.100} is not allowed: it has {METHOD}, of which only single environments are asked; the "
            f'masks of a vector must be in infos, or in Dict observations, under the key "{MASK_KEY}"; '
            "learn(..., use_masking=False) ignores it"
        )


def check_no_masks(infos: list[dict[str, Any]]) -> None:
    """
    :param infos: of a step of environments in which no masks were found
    :raises ArgumentError: if there are masks in them
    """
    if any(MASK_KEY in info for info in infos):
        raise ArgumentError(
            f'env is not allowed: it gives info["{MASK_KEY}"] with a step, and none was found when it was reset, so '
            "the actions allowed at first are unknown. It must give a mask at the reset too, and a VecEnv must keep "
            "it in reset_infos; learn(..., use_masking=False) ignores it"
        )


def keep_from_normalizing(env: VecEnv) -> None:
    """
    Stop ``VecNormalize`` from normalising the mask in a Dict observation.

    :param env: the environments
    """
    normalizer: VecNormalize | None = unwrap_vec_normalize(env)
    if normalizer is not None and normalizer.norm_obs_keys is not None and MASK_KEY in normalizer.norm_obs_keys:
        normalizer.norm_obs_keys.remove(MASK_KEY)
