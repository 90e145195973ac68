"""The result of a step of all environments, in whole arrays, without an info for each environment."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, overload

from stable_baselines3.common.vec_env import VecEnv, VecNormalize


class Episodes(NamedTuple):
    """
    Episodes that a step has ended, as SB3's ``Monitor`` reports them.

    :param env_indices: by which environments, shape ``(n_episodes,)``
    :param returns: sums of rewards
    :param lengths: numbers of steps
    :param times: seconds since the environments were made
    :param successes: whether the task was achieved, None where an environment does not say; None: none does
    """

    env_indices: Any
    returns: Any
    lengths: Any
    times: Any
    successes: Any = None

    def some(self, rows: Any) -> Episodes:
        """
        Some of them.

        :param rows: a range, numbers or a mask
        """
        return Episodes(*(None if part is None else part[rows] for part in self))

    def infos(self) -> Iterator[dict[str, float]]:
        """What ``Monitor`` says of each of them."""
        for r, length, t in zip(self.returns.tolist(), self.lengths.tolist(), self.times.tolist(), strict=True):
            yield {"r": round(r, 6), "l": int(length), "t": round(t, 6)}


class Transition(NamedTuple):
    """
    A step of all environments. The arrays are numpy's, or tensors where the environments are on a device; those without
    a shape below have ``(n_envs,)``.

    :param obs: after the step, shape ``(n_envs, *obs_shape)`` or a dict of such; where the step ended an episode, the
        first one of the next
    :param rewards: of the step
    :param terminated: whether it ended an episode, other than by a time limit
    :param truncated: whether a time limit did, and nothing else
    :param final_obs: of the shape of ``obs``: where the step ended an episode, what it ended with; other rows may be
        anything. None: no episode ended
    :param counts: False where an environment did nothing but begin a new episode, so that there is nothing to be learnt
        from the step; None: all count
    :param episodes: that the step has ended; None: none
    :param infos: one info an environment, as SB3 has them; made when they are asked for
    """

    obs: Any
    rewards: Any
    terminated: Any
    truncated: Any
    final_obs: Any = None
    counts: Any = None
    episodes: Episodes | None = None
    infos: Sequence[dict[str, Any]] = ()

    @property
    def dones(self) -> Any:
        """Whether the next observation begins a new episode. A step that does not count is an episode of its own."""
        ends = self.terminated | self.truncated
        return ends if self.counts is None else ends | ~self.counts


class Infos(Sequence[dict[str, Any]]):
    """
    Infos that are made when they are asked for.

    :param n_envs: number of them
    :param make: makes the one of an environment
    """

    def __init__(self, n_envs: int, make: Callable[[int], dict[str, Any]]) -> None:
        self._numbers = range(n_envs)
        self._make = make
        self._made: dict[int, dict[str, Any]] = {}

    def __len__(self) -> int:
        return len(self._numbers)

    @overload
    def __getitem__(self, index: int) -> dict[str, Any]: ...
    @overload
    def __getitem__(self, index: slice) -> list[dict[str, Any]]: ...
    def __getitem__(self, index: int | slice) -> dict[str, Any] | list[dict[str, Any]]:
        if isinstance(index, slice):
            return [self[i] for i in self._numbers[index]]
        number = self._numbers[index]
        if number not in self._made:  # keep it, because VecNormalize and others write into it
            self._made[number] = self._make(number)
        return self._made[number]


def info_of(infos: dict[str, Any], env_index: int, n_envs: int) -> dict[str, Any]:
    """
    The info of one environment.

    :param infos: of all, as gymnasium's vectors have them: arrays, and under ``_name`` whether ``name`` is said
    :param env_index: number of the environment
    :param n_envs: of how many
    """
    info = {}
    for name, values in infos.items():
        if (name.startswith("_") and name[1:] in infos) or not _at(infos.get(f"_{name}", True), env_index, n_envs):
            continue
        info[name] = info_of(values, env_index, n_envs) if isinstance(values, dict) else _at(values, env_index, n_envs)
    return info


def _at(values: Any, env_index: int, n_envs: int) -> Any:
    """Of one environment, if there is one value for each."""
    return values[env_index] if hasattr(values, "__len__") and len(values) == n_envs else values


def row_of(obs: Any, env_index: int) -> Any:
    """
    The observation of one environment.

    :param obs: of all, an array or a dict of such
    :param env_index: number of the environment
    """
    return {key: part[env_index] for key, part in obs.items()} if isinstance(obs, dict) else obs[env_index]


class BatchedVecEnv(VecEnv):
    """
    A vector of environments that are stepped all at once, and give a :class:`Transition`. By SB3's interface it can be
    used as any other.
    """

    gives_tensors: bool = False
    """Whether actions, observations and all else are tensors on the model's device, and not arrays."""

    resets_take_steps: bool = False
    """Whether an environment spends a step of its own on beginning an episode, a step that does not count."""

    can_be_restored: bool = False
    """Whether each environment can be given back what it remembers, so that a checkpoint is to hold it."""

    max_episode_steps: int = 0
    """Steps after which an episode is cut; 0 if it is not known."""

    transition: Transition
    """The last one."""

    @abstractmethod
    def make_transition(self, actions: Any) -> Transition:
        """
        Step all environments.

        :param actions: shape ``(n_envs, *action_shape)``, which the environments may keep
        """

    def action_masks_in_infos(self) -> Any:
        """
        What the infos under ``action_mask`` say of the observations as they are, one mask an environment.

        :return: shape ``(n_envs, n_choices)``; None: they do not say it
        """
        return None

    def step_async(self, actions: Any) -> None:
        self._actions = actions

    def step_wait(self) -> Any:
        self.transition = self.make_transition(self._actions)
        return self.transition.obs, self.transition.rewards, self.transition.dones, self.transition.infos


def resets_take_steps(env: VecEnv) -> bool:
    """
    Whether some steps do not count.

    :param env: the environments
    """
    return isinstance(env.unwrapped, BatchedVecEnv) and env.unwrapped.resets_take_steps


def gives_tensors(env: VecEnv | None) -> bool:
    """
    Whether what the environments give may stay on a device. A wrapper around them computes with numpy.

    :param env: the environments
    """
    return isinstance(env, BatchedVecEnv) and env.gives_tensors


def whole_steps(env: VecEnv) -> Callable[[Any], Transition] | None:
    """
    What steps the environments and gives the transition in whole arrays; None for those that tell by their infos how
    episodes ended.

    :param env: the environments
    """
    if isinstance(env, BatchedVecEnv):
        return lambda actions: _stepped(env, actions)
    if type(env) is VecNormalize and isinstance(env.venv, BatchedVecEnv) and not env.venv.gives_tensors:
        return lambda actions: _normalized(env, env.venv, actions)
    return None


def _stepped(env: BatchedVecEnv, actions: Any) -> Transition:
    env.step(actions)  # the public method, which callers may have replaced to watch the environments
    return env.transition


def _normalized(env: VecNormalize, inner: Any, actions: Any) -> Transition:
    obs, rewards, _, _ = env.step(actions)
    transition: Transition = inner.transition
    final_obs = transition.final_obs
    if final_obs is not None:
        final_obs = env.normalize_obs(final_obs)
    return transition._replace(obs=obs, rewards=rewards, final_obs=final_obs)
