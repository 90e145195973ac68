"""The benchmark of what an update does."""

from __future__ import annotations

import copy
import csv
import math
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th

from benchmarks import updates, updates_on_gpu
from benchmarks.updates import SIDES, Side, kl_divergence, measured
from sb3_ppo_ext import DualClipPPO
from tests.algorithms import small
from tests.envs import BOX, BOX_ACTIONS, ScriptedEnv

pytestmark = pytest.mark.usefixtures("without_compiler")

_SMALL = {"n_steps": 64, "batch_size": 32, "n_epochs": 2}
_EPISODES = "ShortCartPole-v0"


@pytest.fixture(autouse=True)
def short_episodes() -> Any:
    gym.register(_EPISODES, "gymnasium.envs.classic_control:CartPoleEnv", max_episode_steps=10)
    yield
    del gym.registry[_EPISODES]


def side(name: str, **kwargs: Any) -> Side:
    found = next(side for side in SIDES if side.name == name)
    return found._replace(kwargs={**found.kwargs, **kwargs})


def test_the_kl_divergence_of_normal_distributions() -> None:
    """KL(N(m, s) || N(m, 2 s)) = log 2 + 1/8 - 1/2 in each dimension."""
    old = small(DualClipPPO, "MlpPolicy", ScriptedEnv(BOX, BOX_ACTIONS)).policy
    new = copy.deepcopy(old)
    with th.no_grad():
        new.log_std += math.log(2.0)
    observations = th.as_tensor(np.stack([BOX.sample() for _ in range(3)]))
    expected = BOX_ACTIONS.shape[0] * (math.log(2.0) + 1 / 8 - 1 / 2)
    assert kl_divergence(old, new, observations).tolist() == pytest.approx([expected] * 3)


def test_ppo_is_measured_like_sb3s() -> None:
    ours, theirs = (measured(side(name, **_SMALL), _EPISODES, 128, 0) for name in ("PPO", "SB3 PPO"))
    assert ours.passes == theirs.passes == [4, 4]
    assert ours.kl == pytest.approx(theirs.kl, rel=1e-2)
    assert ours.largest_kl == pytest.approx(theirs.largest_kl, rel=1e-2)
    assert ours.mean_return == pytest.approx(theirs.mean_return)
    assert all(kl < largest for kl, largest in zip(ours.kl, ours.largest_kl, strict=True))


def test_the_targets_of_both_trpos_are_of_the_whole_action() -> None:
    kwargs = {"n_steps": 32, "batch_size": 32}
    ours, theirs = (measured(side(name, **kwargs), "Swimmer-v5", 32, 0) for name in ("TRPO", "sb3-contrib TRPO"))
    assert ours.target_kl == theirs.target_kl == ours.step_size == pytest.approx(2 * 0.01)
    assert ours.passes[0] > 10


def test_page_and_numbers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(updates, "in_process_of_its_own", measured)
    monkeypatch.setattr(updates, "SIDES", [side("PPO", **_SMALL), side("SB3 PPO", **_SMALL)])
    updates.main(["--env", _EPISODES, "--steps", "256", "--seeds", "1", "--out", str(tmp_path)])
    with (tmp_path / "updates.csv").open() as file:
        _, *rows = csv.reader(file)
    assert [row[:4] for row in rows] == [
        *(["PPO", scale, "0", "4"] for scale in ("0.3333", "1", "3")),
        ["SB3 PPO", "1", "0", "4"],
    ]
    kl = [float(row[4]) for row in rows]
    assert kl[0] < kl[1] < kl[2]
    assert kl[1] == pytest.approx(kl[3], rel=1e-2)
    page = (tmp_path / "updates.md").read_text()
    assert f"`python -m benchmarks.updates --env {_EPISODES} --steps 256" in page
    assert "| PPO | `learning_rate=0.0003` |" in page


def test_an_update_is_timed_on_a_device() -> None:
    update = updates_on_gpu.measured(side("PPO", **_SMALL), _EPISODES, "cpu", compiled=False, n_updates=2)
    assert update.seconds > 0.0
    assert (update.samples, update.busy, update.extra_mib) == (64, 0.0, 0.0)


@pytest.mark.gpu
def test_the_gpu_works_in_a_part_of_an_update() -> None:
    update = updates_on_gpu.measured(side("PPO", **_SMALL), _EPISODES, "cuda", compiled=False, n_updates=2)
    assert 0.0 < update.busy < 1.0


def test_without_a_gpu_its_use_is_not_measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(th.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        updates_on_gpu.main(["--out", str(tmp_path)])
    assert not list(tmp_path.iterdir())
