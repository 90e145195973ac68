"""The benchmark of the policy gradient's variance."""

from __future__ import annotations

import csv
import math
from pathlib import Path

import numpy as np
import pytest

from benchmarks import variance


def test_noise_by_hand() -> None:
    assert variance.noise(np.array([[1.0], [3.0]])) == pytest.approx(2.0 / (4.0 - 1.0))
    assert variance.noise(np.array([[1.0, 0.0], [3.0, 0.0]])) == pytest.approx(2.0 / 3.0)
    assert variance.noise(np.array([[1.0], [-1.0]])) == math.inf


def test_noise_does_not_depend_on_the_scale() -> None:
    gradients = np.random.default_rng(0).normal(loc=1.0, size=(50, 4))
    assert variance.noise(3.0 * gradients) == pytest.approx(variance.noise(gradients))


def test_table_and_figure(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    sides = [side for side in variance.SIDES if side.name in ("REINFORCE, reward to go", "A2C, lambda 1")]
    monkeypatch.setattr(variance, "SIDES", sides)
    monkeypatch.setattr(variance, "_WARM_UP", 1)
    variance.main(["--updates", "3", "--train", "16", "--out", str(tmp_path)])
    with (tmp_path / "variance.csv").open() as file:
        header, *rows = csv.reader(file)
    assert header == ["side", "steps", "low", "high"]
    assert [row[0] for row in rows] == [side.name for side in sides]
    assert all(float(low) <= float(high) for _, _, low, high in rows)
    page = (tmp_path / "variance.md").read_text()
    assert "`python -m benchmarks.variance --updates 3 --train 16" in page
    assert all(side.name in page for side in sides)
    assert (tmp_path / "variance.png").stat().st_size > (1 << 10)
    assert (tmp_path / "variance.svg").exists()


def test_the_policy_of_a_side_does_not_change(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(variance, "_WARM_UP", 0)
    for side in variance.SIDES[-3:]:
        model = side.make("CartPole-v1")
        before = {name: p.clone() for name, p in model.policy.named_parameters()}
        callback = variance.Gradients(1)
        model.learn(10**6, callback=callback)
        moved = {name for name, p in model.policy.named_parameters() if not before[name].equal(p)}
        assert moved
        assert not any(map(variance.is_of_actor, moved))
        assert callback.found[0].norm() > 0.0
