"""`python -m benchmarks.memory`: what it trains, what it never trains again, and its table."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import memory
from benchmarks.memory import Run, main, make_runs, table, train_and_evaluate
from benchmarks.memory_cases import LEFT_OUT, TASKS, settings
from sb3_ppo_ext.zoo import ALGORITHMS

RUN = Run("TMaze-v0", "dual_clip_ppo", True, 0)


@pytest.mark.parametrize(
    ("task", "algo"), [(task, algo) for task in TASKS for algo in ALGORITHMS if (task, algo) not in LEFT_OUT]
)
def test_a_policy_without_memory_is_trained_as_one_with_memory(task: str, algo: str) -> None:
    with_memory, without = settings(task, algo, True), settings(task, algo, False)
    assert with_memory["policy"] == "MlpLstmPolicy"
    assert without["policy"] == "MlpPolicy"
    assert "lstm_hidden_size" in with_memory["policy_kwargs"]
    assert "lstm_hidden_size" not in without["policy_kwargs"]
    same = with_memory.keys() - {"policy", "policy_kwargs", "sequence_length"}
    assert {name: with_memory[name] for name in same} == {name: without[name] for name in same}


@pytest.mark.parametrize("remembers", [True, False])
def test_a_run_is_a_line_of_json(remembers: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    short = {**settings("TMaze-v0", "dual_clip_ppo", remembers), "n_timesteps": 1, "n_epochs": 1}
    monkeypatch.setattr(memory, "settings", lambda *_: short)
    monkeypatch.setitem(TASKS, "TMaze-v0", TASKS["TMaze-v0"]._replace(n_episodes=8))
    line = json.loads(json.dumps(train_and_evaluate(RUN._replace(memory=remembers))))
    assert line.pop("process_seconds") >= 0
    assert line.pop("reward") * 8 in range(9)  # the share of right turns in eight episodes
    assert line == {"task": "TMaze-v0", "algo": "dual_clip_ppo", "memory": remembers, "seed": 0, "settings": short}


def write(folder: Path, *lines: dict[str, Any]) -> Path:
    path = folder / "TMaze-v0.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def finished_line(run: Run, reward: float) -> dict[str, Any]:
    return {**run.key(), "reward": reward, "process_seconds": 7.0}


def test_a_finished_run_is_not_made_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path, finished_line(RUN, 0.5))
    before = path.read_text()
    make_runs([RUN], tmp_path, jobs=1)
    assert path.read_text() == before
    assert capsys.readouterr().out == ""


def test_a_run_with_other_hyper_parameters_is_another(tmp_path: Path) -> None:
    other = finished_line(RUN, 1.0)
    other["settings"] = {**other["settings"], "gamma": 0.123}
    write(tmp_path, other)
    assert memory.finished([RUN], tmp_path) == {}


def test_the_table_says_who_solves_a_task(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [RUN, RUN._replace(seed=1), RUN._replace(memory=False)]
    rewards = [0.95, 0.75, 0.5]
    write(tmp_path, *(finished_line(run, reward) for run, reward in zip(runs, rewards, strict=True)))
    row = table(runs, tmp_path).splitlines()[-1]
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[:2] == ["TMaze-v0", "DualClipPPO"]
    assert cells[3:] == ["0.95", "0.85 (0.75 to 0.95)", "1 of 2", "7", "0.50 (0.50 to 0.50)", "0.5"]
    main(["--table", "--tasks", "TMaze-v0", "--algos", "dual_clip_ppo", "--seeds", "2", "--out", str(tmp_path)])
    assert row in capsys.readouterr().out


def test_popgym_that_is_missing_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "popgym", None)
    with pytest.raises(SystemExit, match=r'popgym, which is missing: pip install -e "\.\[popgym\]"'):
        main(["--tasks", "popgym-RepeatFirstEasy-v0", "--out", str(tmp_path)])
