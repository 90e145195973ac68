"""Which episodes REINFORCE collects and learns from, by scripts."""

from __future__ import annotations

import itertools
from collections import Counter
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv

from sb3_ppo_ext import REINFORCE, reinforce
from sb3_ppo_ext.common.rollout.data import RolloutSamples
from sb3_ppo_ext.common.rollout.episode_buffer import EpisodeBuffer, EpisodeIndex


class Script(gym.Env[Any, Any]):
    """
    Episodes with given rewards. The observation is the number of the episode and of the step.

    :param episodes: the rewards of each; the last one is repeated
    :param truncated: numbers of the episodes that a time limit ends
    """

    observation_space = spaces.Box(-1000.0, 1000.0, (2,), np.float32)
    action_space = spaces.Discrete(2)

    def __init__(self, episodes: list[list[float]], truncated: tuple[int, ...] = ()) -> None:
        self._episodes = episodes
        self._truncated = truncated
        self._episode = -1
        self._step = 0

    def _obs(self) -> np.ndarray:
        return np.array([self._episode, self._step], dtype=np.float32)

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        self._episode += 1
        self._step = 0
        return self._obs(), {}

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        rewards = self._episodes[min(self._episode, len(self._episodes) - 1)]
        reward = rewards[self._step]
        self._step += 1
        ends = self._step == len(rewards)
        by_limit = ends and self._episode in self._truncated
        return self._obs(), reward, ends and not by_limit, by_limit, {"is_success": reward > 9.0} if ends else {}


def on(*envs: gym.Env[Any, Any], **kwargs: Any) -> REINFORCE:
    """An agent in several environments that has not learnt yet, ready to collect."""
    vec_env = DummyVecEnv([lambda env=env: Monitor(env) for env in envs])  # type: ignore[misc]
    model = REINFORCE("MlpPolicy", vec_env, **{"seed": 0, "device": "cpu", **kwargs})
    model._setup_learn(1)
    return model


def observations_of(rollout: RolloutSamples) -> th.Tensor:
    assert isinstance(rollout.observations, th.Tensor)
    return rollout.observations


def collect(model: REINFORCE) -> tuple[RolloutSamples, EpisodeIndex]:
    assert model.env is not None
    _, callback = model._setup_learn(1, reset_num_timesteps=False)
    assert model.collect_rollouts(model.env, callback, model.rollout_buffer, model.n_steps)
    buffer = model.rollout_buffer
    assert isinstance(buffer, EpisodeBuffer)
    return buffer.flat(), buffer.episode_index()


@pytest.mark.parametrize("first_size", [1, 4, 256])
def test_collected_by_hand(monkeypatch: pytest.MonkeyPatch, first_size: int) -> None:
    """
    Two episodes of each of three environments; the first is done after 3 steps and waits, in episodes 2 and 3, until
    the second is after 5; the third is after 2.
    """
    monkeypatch.setattr(reinforce, "_FIRST_BUFFER_SIZE", first_size)
    a = Script([[1.0, 2.0], [4.0], [100.0], [100.0, 100.0]])
    b = Script([[3.0], [5.0, 6.0, 7.0, 8.0], [1.0]])
    c = Script([[9.0], [10.0], [100.0] * 50])
    model = on(a, b, c, episodes_per_env=2, gamma=0.5)
    rollout, index = collect(model)
    assert model.num_timesteps == 3 * 5
    expected_obs = [[0, 0], [0, 1], [1, 0], [0, 0], [1, 0], [1, 1], [1, 2], [1, 3], [0, 0], [1, 0]]
    assert observations_of(rollout).tolist() == expected_obs
    # 1 + 2 / 2, 2; 4; 3; 5 + 11.5 / 2, 6 + 11 / 2, 7 + 8 / 2, 8; 9; 10
    expected = [2.0, 2.0, 4.0, 3.0, 10.75, 11.5, 11.0, 8.0, 9.0, 10.0]
    np.testing.assert_allclose(rollout.returns.numpy(), expected, atol=1e-5)
    assert index.episode.tolist() == [0, 0, 1, 2, 3, 3, 3, 3, 4, 5]
    assert index.step.tolist() == [0, 1, 0, 0, 0, 1, 2, 3, 0, 0]
    assert {len(tensor) for tensor in rollout if tensor is not None} == {10}
    minibatches = [len(batch.returns) for batch in model.rollout_buffer.get(4)]
    assert minibatches == [4, 4, 2]
    # Nor are the episodes that a waiting environment ends in the statistics.
    assert model.ep_info_buffer is not None
    assert model.ep_success_buffer is not None
    assert sorted(info["r"] for info in model.ep_info_buffer) == [3.0, 3.0, 4.0, 9.0, 10.0, 26.0]
    assert sorted(model.ep_success_buffer) == [False] * 5 + [True]

    # The first environment stands in its fourth episode, one step before its end; the third in its third, 47 before.
    # They play them to the end, and what counts begins after that.
    rollout, index = collect(model)
    assert model.num_timesteps == 3 * (5 + 47 + 100)
    of_c = [[episode, step] for episode in (3, 4) for step in range(50)]
    assert observations_of(rollout).tolist() == [[4, 0], [4, 1], [5, 0], [5, 1], [2, 0], [3, 0], *of_c]
    assert index.episode.tolist() == [0, 0, 1, 1, 2, 3] + [4] * 50 + [5] * 50
    assert index.step.tolist() == [0, 1, 0, 1, 0, 0, *range(50), *range(50)]
    np.testing.assert_allclose(rollout.returns.numpy()[:6], [150.0, 100.0, 150.0, 100.0, 1.0, 1.0], atol=1e-4)
    assert sorted(info["r"] for info in model.ep_info_buffer)[-4:] == [200.0, 200.0, 5000.0, 5000.0]
    assert len(model.ep_info_buffer) == 12


def test_one_environment_wastes_no_step() -> None:
    model = on(Script([[1.0], [2.0, 3.0], [4.0]]), episodes_per_env=2)
    collect(model)
    rollout, _ = collect(model)
    assert observations_of(rollout)[:, 0].tolist() == [2, 3]
    assert model.num_timesteps == 5


class TwoLengths(gym.Env[Any, Any]):
    """Episodes of one step or of ten, equally likely."""

    observation_space = spaces.Box(-1.0, 1.0, (1,), np.float32)
    action_space = spaces.Discrete(2)

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        self._left = 1 if self.np_random.random() < 0.5 else 10
        return np.zeros(1, dtype=np.float32), {}

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        self._left -= 1
        return np.zeros(1, dtype=np.float32), 1.0, self._left == 0, False, {}


@pytest.mark.parametrize("episodes_per_env", [1, 2])
def test_short_episodes_are_not_over_represented(episodes_per_env: int) -> None:
    """
    600 episodes: the share has a standard deviation of 0.02. The first episodes that any of three environments ends
    would hold some 0.8 short ones.
    """
    model = on(*[TwoLengths() for _ in range(3)], episodes_per_env=episodes_per_env, gamma=1.0)
    model.env.seed(0)  # type: ignore[union-attr]
    short = []
    for _ in range(200 // episodes_per_env):
        rollout, index = collect(model)
        short.extend((rollout.returns[index.step == 0] == 1.0).tolist())
    assert len(short) == 600
    assert np.mean(short) == pytest.approx(0.5, abs=0.06)
    assert model.ep_info_buffer is not None
    logged = np.mean([info["l"] == 1 for info in model.ep_info_buffer])  # of the last hundred
    assert logged == pytest.approx(0.5, abs=0.15)


class GivenLengths(Script):
    """
    Episodes of given lengths, one after the other. It refuses to be reset before an episode has ended.

    :param lengths: of the episodes
    """

    def __init__(self, lengths: tuple[int, ...]) -> None:
        super().__init__([[1.0] * length for length in lengths])
        self._left = 0

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[np.ndarray, dict[str, Any]]:
        assert self._left == 0, "reset in the middle of an episode"
        obs, info = super().reset(seed=seed)
        self._left = len(self._episodes[min(self._episode, len(self._episodes) - 1)])
        return obs, info

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        self._left -= 1
        return super().step(action)


def test_every_batch_is_a_fair_draw() -> None:
    """
    Two environments whose episodes have one step or three, equally likely, and so all 256 ways that the first four
    episodes of each can go. What counts, one episode each, is then short or long as two coins fall, in the second batch
    as in the first. (An episode that the end of the first batch interrupts is always a long one.)
    """
    ways = list(itertools.product((1, 3), repeat=4))
    model = on(GivenLengths(ways[0]), GivenLengths(ways[0]), episodes_per_env=1)
    learnt_from: list[Counter[tuple[int, ...]]] = [Counter(), Counter()]
    n_interrupted = 0
    for pair in itertools.product(ways, repeat=2):
        envs = [Monitor(GivenLengths(way), allow_early_resets=False) for way in pair]
        model.set_env(DummyVecEnv([lambda env=env: env for env in envs]))  # type: ignore[misc]
        for batch in range(2):
            assert model.ep_info_buffer is not None
            model.ep_info_buffer.clear()
            _, index = collect(model)
            lengths = tuple(int((index.episode == i).sum()) for i in range(2))
            learnt_from[batch][lengths] += 1
            assert sorted(info["l"] for info in model.ep_info_buffer) == sorted(lengths)
            n_interrupted += int((~model._last_episode_starts).sum()) if batch == 0 else 0  # type: ignore[operator]
    assert n_interrupted > 30
    assert learnt_from[0] == learnt_from[1] == Counter(dict.fromkeys(itertools.product((1, 3), repeat=2), 64))


def test_a_stopped_rollout_is_not_continued() -> None:
    """A callback ends it in the first step; the episode that was begun is not taken for a whole one."""
    model = on(Script([[1.0, 2.0, 3.0]]), episodes_per_env=1, gamma=1.0)
    model.learn(1, callback=lambda locals_, globals_: False)
    assert model.num_timesteps == 1
    rollout, _ = collect(model)
    assert observations_of(rollout)[:, 1].tolist() == [0, 1, 2]
    assert rollout.returns.tolist() == [6.0, 5.0, 3.0]


def test_a_time_limit_completes_an_episode() -> None:
    model = on(Script([[1.0, 2.0], [3.0]], truncated=(0,)), episodes_per_env=2, gamma=0.5, baseline="value")
    rollout, _ = collect(model)
    np.testing.assert_allclose(rollout.returns.numpy(), [2.0, 2.0, 3.0], atol=1e-6)


def test_bootstrapped_time_limits() -> None:
    """
    By V of the observation that follows the last step, (0, 2): 2 + 0.5 V and 1 + 0.5 (2 + 0.5 V). The second episode
    ended by itself; the third, (2, 1) following its only step: 4 + 0.5 V.
    """
    script = Script([[1.0, 2.0], [3.0], [4.0]], truncated=(0, 2))
    model = on(script, episodes_per_env=3, gamma=0.5, baseline="value", bootstrap_timeouts=True)
    rollout, _ = collect(model)
    with th.no_grad():
        v_first, v_third = model.policy.predict_values(th.tensor([[0.0, 2.0], [2.0, 1.0]])).flatten().tolist()
    assert min(abs(v_first), abs(v_third)) > 1e-2
    expected = [2.0 + 0.25 * v_first, 2.0 + 0.5 * v_first, 3.0, 4.0 + 0.5 * v_third]
    np.testing.assert_allclose(rollout.returns.numpy(), expected, atol=1e-5)


def test_critic_learns_the_returns() -> None:
    """Rewards of 1, 2, 4 and gamma 0.5: the values of the three observations become 3, 4 and 4."""
    script = Script([[1.0, 2.0, 4.0]])
    policy_kwargs = {"optimizer_kwargs": {"eps": 1e-5}}
    model = on(
        script, episodes_per_env=4, gamma=0.5, baseline="value", n_critic_updates=200, learning_rate=1e-2,
        policy_kwargs=policy_kwargs,
    )  # fmt: skip
    model.learn(1)
    rollout = model.rollout_buffer.flat()  # type: ignore[attr-defined]
    with th.no_grad():
        values = model.policy.predict_values(rollout.observations).flatten().reshape(4, 3)
    np.testing.assert_allclose(values.numpy(), np.tile([3.0, 4.0, 4.0], (4, 1)), atol=0.1)
