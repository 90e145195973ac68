"""The example in CONTRIBUTING.md is what it says: one file, short, and right eager and compiled."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from tests.code_blocks import ROOT, blocks, run

LOGGED = ("train/epsilon", "train/policy_gradient_loss", "train/grad_norm", "train/loss", "train/ratio_max")
PAGE = ROOT / "CONTRIBUTING.md"


def test_it_is_short() -> None:
    (block,) = blocks(PAGE)
    assert len([line for line in block.code.splitlines() if line.strip()]) <= 25


@pytest.mark.usefixtures("without_compiler")
def test_a_loss_of_ones_own(tmp_path: Path) -> None:
    names = run(PAGE)
    sizes: dict[str, Any] = {"n_steps": 64, "batch_size": 32, "n_epochs": 2, "seed": 0, "device": "cpu"}
    models = [names["SPO"]("MlpPolicy", "CartPole-v1", torch_compile=way, **sizes).learn(64) for way in (False, True)]
    policy_losses = []
    for epsilon in (0.001, 10.0):
        for model in models:
            model.epsilon = epsilon
            model.set_random_seed(0)
            model.learn(64)
        eager, compiled = ([model.logger.name_to_value[key] for key in LOGGED] for model in models)
        assert eager == pytest.approx(compiled, rel=1e-3)
        assert eager[0] == epsilon
        policy_losses.append(eager[1])
    assert policy_losses[0] > policy_losses[1]  # the penalty weighs ten thousand times as much
    models[0].save(tmp_path / "spo")
    assert names["SPO"].load(tmp_path / "spo").epsilon == 10.0


@pytest.mark.parametrize("path", re.findall(r"`([\w/]+\.py)`", PAGE.read_text()))
def test_the_map_names_files_that_exist(path: str) -> None:
    folders = (ROOT, ROOT / "sb3_ppo_ext", ROOT / "sb3_ppo_ext/common", ROOT / "sb3_ppo_ext/common/rollout")
    assert any((folder / path).is_file() for folder in (*folders, ROOT / "sb3_ppo_ext/losses")), path
