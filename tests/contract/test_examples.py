"""The scripts in examples/ run, in short; what the longer ones show has tests of its own."""

from __future__ import annotations

import importlib
import re
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy

from examples import resume
from examples.masked_actions import HigherOrLower
from sb3_ppo_ext import DualClipPPO
from tests.code_blocks import ROOT, short_trainings

__all__ = ["short_trainings"]  # a fixture

ELSEWHERE = {"finetune", "rlhf_tiny", "torch_environments"}
SCRIPTS = {
    "diagnose": "Doctor:",
    "first_run": "Mean return of 10 episodes:",
    "masked_actions": "Halving takes 2.90",
    "memory_task": "MlpLstmPolicy: right in",
    "own_objective": "largest weight: ",
    "resume": "Beginning after 0 steps",
    "two_cores": "of 1 process(es)",
}


def test_all_scripts_are_tested_and_named_in_the_documentation() -> None:
    scripts = {path.stem for path in (ROOT / "examples").glob("*.py")} - {"__init__"}
    assert scripts == SCRIPTS.keys() | ELSEWHERE
    page = (ROOT / "docs" / "guide" / "examples.md").read_text()
    assert all(f"`{name}.py`" in page for name in scripts)


@pytest.mark.usefixtures("short_trainings")
@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_runs(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    importlib.import_module(f"examples.{name}").main()
    out = capsys.readouterr().out
    assert SCRIPTS[name] in out
    assert not re.search(r"\bnan\b", out)


def test_a_training_goes_on_where_it_stopped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = str(tmp_path)
    resume.main(folder, total=8_192)
    resume.main(folder, total=9_216)
    assert "Beginning after 8192 steps" in capsys.readouterr().out


def test_halving_takes_2_9_guesses() -> None:
    env, guesses = HigherOrLower(), 0
    for hidden in range(10):
        env.reset()
        env.hidden, is_found = hidden, False
        while not is_found:
            possible = env.possible.nonzero()[0]
            _, _, is_found, _, _ = env.step(possible[len(possible) // 2])
            guesses += 1
    assert guesses == 29


def test_guessing_at_random_takes_3_44_guesses() -> None:
    """A guess is one of n; then what is left lies on its side, with the share of the side."""
    guesses = [Fraction(0)]
    for n in range(1, 11):
        sides = [Fraction(k, n) * guesses[k] + Fraction(n - 1 - k, n) * guesses[n - 1 - k] for k in range(n)]
        guesses.append(1 + sum(sides) / n)
    assert round(float(guesses[10]), 2) == 3.44


class Strict(HigherOrLower):
    """Refuses what is forbidden."""

    def step(self, action: np.int64) -> Any:
        assert self.possible[action] == 1
        return super().step(action)


def test_no_forbidden_guess_is_made() -> None:
    env = make_vec_env(Strict, n_envs=2, seed=0)
    model = DualClipPPO("MlpPolicy", env, n_steps=32, batch_size=64, n_epochs=1, seed=0).learn(64)
    evaluate_policy(model, env, n_eval_episodes=20, deterministic=False)
