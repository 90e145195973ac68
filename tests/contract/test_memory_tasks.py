"""The tasks of `benchmarks/memory_tasks.py`, step by step."""

from __future__ import annotations

import gymnasium as gym
import pytest
from gymnasium.utils.env_checker import check_env

from benchmarks.memory_tasks import RepeatPrevious, TMaze


@pytest.mark.parametrize("env_id", ["TMaze-v0", "RepeatPrevious-v0"])
def test_a_task_is_what_gymnasium_asks_of_an_environment(env_id: str) -> None:
    check_env(gym.make(env_id).unwrapped, skip_render_check=True)


def start(maze: TMaze, sign: int) -> None:
    """Begin an episode with this sign."""
    while maze.reset()[0] != sign:
        pass


@pytest.mark.parametrize(
    ("sign", "turn", "reward"),
    [
        (TMaze.SIGN_LEFT, TMaze.LEFT, 1.0),
        (TMaze.SIGN_LEFT, TMaze.RIGHT, 0.0),
        (TMaze.SIGN_RIGHT, TMaze.LEFT, 0.0),
        (TMaze.SIGN_RIGHT, TMaze.RIGHT, 1.0),
    ],
)
def test_the_sign_says_which_turn_is_right(sign: int, turn: int, reward: float) -> None:
    maze = TMaze()
    start(maze, sign)
    for _ in range(9):
        assert maze.step(TMaze.FORWARD) == (TMaze.CORRIDOR, 0.0, False, False, {})
    assert maze.step(TMaze.FORWARD) == (TMaze.JUNCTION, 0.0, False, False, {})
    assert maze.step(turn) == (TMaze.JUNCTION, reward, True, False, {})


def test_whoever_walks_into_a_wall_stays_where_it_is() -> None:
    maze = TMaze(corridor_length=2)
    start(maze, TMaze.SIGN_LEFT)
    seen = [maze.step(action)[0] for action in (TMaze.LEFT, TMaze.RIGHT, TMaze.FORWARD, TMaze.LEFT, TMaze.RIGHT)]
    assert seen == [TMaze.SIGN_LEFT, TMaze.SIGN_LEFT, TMaze.CORRIDOR, TMaze.CORRIDOR, TMaze.CORRIDOR]
    assert maze.step(TMaze.FORWARD)[0] == TMaze.JUNCTION
    assert maze.step(TMaze.FORWARD) == (TMaze.JUNCTION, 0.0, False, False, {})
    assert maze.step(TMaze.LEFT)[1:3] == (1.0, True)


def test_whoever_never_turns_meets_the_time_limit() -> None:
    maze = gym.make("TMaze-v0")
    maze.reset(seed=0)
    ends = [maze.step(TMaze.FORWARD)[1:4] for _ in range(100)]
    assert ends == [(0.0, False, False)] * 99 + [(0.0, False, True)]


def test_both_signs_are_equally_frequent() -> None:
    maze = TMaze()
    maze.reset(seed=0)
    left = sum(maze.reset()[0] == TMaze.SIGN_LEFT for _ in range(1000))
    assert 450 < left < 550  # three standard deviations


class Scripted(RepeatPrevious):
    """Shows these symbols, not random ones."""

    symbols = (0, 1, 2, 3, 2, 0)

    def reset(self, **arguments: object) -> tuple[int, dict[str, object]]:  # type: ignore[override]
        self._script = iter(self.symbols)
        return super().reset()

    def _draw(self) -> int:
        return next(self._script)


def test_the_symbol_of_some_steps_ago_is_the_right_answer() -> None:
    task = Scripted(delay=2, n_answers=3)
    assert task.reset() == (0, {})
    assert task.step(0) == (1, 0.0, False, False, {})  # sees 0; nothing to name
    assert task.step(0) == (2, 0.0, False, False, {})  # sees 1; nothing to name
    assert task.step(0) == (3, 1 / 3, False, False, {})  # sees 2; two steps ago it was 0
    assert task.step(0) == (2, -1 / 3, False, False, {})  # sees 3; it was 1
    assert task.step(2) == (0, 1 / 3, True, False, {})  # sees 2; it was 2


@pytest.mark.parametrize(("is_right", "total"), [(True, 1.0), (False, -1.0)])
def test_an_episode_has_forty_eight_answers_and_a_reward_from_minus_one_to_one(is_right: bool, total: float) -> None:
    task = gym.make("RepeatPrevious-v0")
    seen = [task.reset(seed=0)[0]]
    rewards = []
    for _ in range(52):
        asked = seen[-5] if len(seen) >= 5 else 0
        symbol, reward, terminated, truncated, _ = task.step(asked if is_right else (asked + 1) % 4)
        seen.append(symbol)
        rewards.append(float(reward))
        assert (terminated, truncated) == (len(rewards) == 52, False)
    assert rewards[:4] == [0.0] * 4
    assert sum(rewards) == pytest.approx(total)
    assert set(seen) == {0, 1, 2, 3}
