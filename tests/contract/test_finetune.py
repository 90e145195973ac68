"""The example of fine-tuning runs, and its clone is the expert."""

from __future__ import annotations

from pathlib import Path

import pytest

from examples import finetune


def test_a_short_form_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(finetune, "ROLLOUT", {**finetune.ROLLOUT, "n_steps": 256, "n_epochs": 2})
    figure = tmp_path / "curves.png"
    sizes = ["--steps", "4096", "--demonstrations", "250", "--epochs", "60", "--seeds", "1", "--figure", str(figure)]
    curves = finetune.main(sizes)
    assert [len(curve) for of_seeds in curves.values() for curve in of_seeds] == [2, 2]
    free, held = (of_seeds[0] for of_seeds in curves.values())
    assert free[0] == held[0] > -190  # the same clone, which reaches the top; without skill it is -200
    assert figure.read_bytes().startswith(b"\x89PNG")
    assert "seed 0, KL to the clone: the clone -1" in capsys.readouterr().out
