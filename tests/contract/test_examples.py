"""The scripts in examples/ run, in short; what the longer ones show has tests of its own."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

from examples import resume
from examples.masked_actions import HigherOrLower
from tests.code_blocks import ROOT, short_trainings

__all__ = ["short_trainings"]  # a fixture

ELSEWHERE = {"finetune", "rlhf_tiny", "torch_environments"}
SCRIPTS = {
    "diagnose": "Doctor:",
    "first_run": "Mean return of 10 episodes:",
    "masked_actions": "Halving takes 2.90",
    "memory_task": "MlpLstmPolicy: right in",
    "own_objective": "largest ratio: ",
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
    assert SCRIPTS[name] in capsys.readouterr().out


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
