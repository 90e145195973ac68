"""``sb3-ppo-ext study evaluate``: the best trials are trained again on fresh seeds, and the results are kept."""

import os
import re
import shlex
import shutil
import signal
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from sb3_ppo_ext import DualClipPPO
from tests.contract import held
from tests.contract.zoo import (
    SCRIPT,
    STUDY_FOLDER,
    Command,
    finished_study,
    in_background,
    load_study,
    stored_rows,
    wait_for,
)

pytestmark = pytest.mark.usefixtures("held_space")


def test_the_best_are_trained_again_and_the_winner_is_written(command: Command, tmp_path: Path) -> None:
    finished_study(tmp_path, 3.0, 5.0, 4.0)
    unevaluated = command("study", "export", "-o", "plain.yml")
    assert "trial 1: plain.yml" in unevaluated
    assert "Not trained again" in Path("plain.yml").read_text()

    evaluate = ("study", "evaluate", "--top", "2", "--first-seed", "7", "--device", "cpu", "--seeds")
    output = command(*evaluate, "1")
    assert Counter(row["seed"] for row in stored_rows()) == {7: 3}
    output = command(*evaluate, "2")
    assert "3 of 6 trainings were done before" in output
    assert Counter((row["trial"], row["seed"]) for row in stored_rows()) == {
        (label, seed): 1 for label in ("default", "1", "2") for seed in (7, 8)
    }
    means: dict[str, list[float]] = {}
    for row in stored_rows():
        means.setdefault(row["trial"], []).append(row["mean"])
    for label, values in means.items():
        name = label if label == "default" else f"trial {label}"
        figures = rf"{name} .* {np.mean(values):.2f} +{np.std(values, ddof=1):.2f} +\d"
        assert re.search(figures, output), output
    labels = ["default", "1", "2"]  # of equals the first wins
    winner = max(labels, key=lambda label: np.mean(means[label]))
    assert ("The winner is the default" if winner == "default" else f"The winner is trial {winner}:") in output

    winner = max(labels[1:], key=lambda label: np.mean(means[label]))
    output = command("study", "export", "-o", "winner.yml")
    assert f"trial {winner}: winner.yml" in output
    text = Path("winner.yml").read_text()
    assert f"{np.mean(means[winner]):.2f} +/- {np.std(means[winner], ddof=1):.2f} across 2 seeds" in text
    assert f"{np.mean(means['default']):.2f} +/- " in text
    params = load_study().trials[int(winner)].params
    assert yaml.safe_load(text)[held.ENV] == {
        **held.ENTRY,
        "learning_rate": params["learning_rate"],
        "gamma": 1 - params["one_minus_gamma"],
        "policy_kwargs": f"dict(net_arch=dict(pi=[{params['hidden']}], vf=[8]), activation_fn=nn.ReLU)",
    }

    train = shlex.split(output.splitlines()[-1])
    assert train[0] == SCRIPT
    command(*train[1:], "--seed", "7", "--eval-freq", "-1", "--device", "cpu")
    model: Any = DualClipPPO.load(f"logs/{held.ALGO}/{held.ENV}_1/{held.ENV}.zip", device="cpu")
    assert model.gamma == 1 - params["one_minus_gamma"]
    assert model.ent_coef == held.ENTRY["ent_coef"]
    assert [type(layer).__name__ for layer in model.policy.mlp_extractor.policy_net] == ["Linear", "ReLU"]
    # What was evaluated is this training.
    (again,) = (STUDY_FOLDER / "evaluation").glob(f"{winner}_*_7/**/{held.ENV}.zip")
    evaluated: Any = DualClipPPO.load(again, device="cpu")
    for one, other in zip(model.policy.parameters(), evaluated.policy.parameters(), strict=True):
        assert one.tolist() == other.tolist()


def test_a_result_holds_for_the_hyperparameters_and_the_budget_it_was_trained_with(
    command: Command, tmp_path: Path
) -> None:
    finished_study(tmp_path, 1.0)
    evaluate = ("study", "evaluate", "--seeds", "1", "--device", "cpu")
    command(*evaluate)
    assert "2 of 2 trainings were done before" in command(*evaluate)
    Path("held.yml").write_text(yaml.safe_dump({held.ENV: held.ENTRY | {"ent_coef": 0.125}}))
    assert "done before" not in command(*evaluate)
    assert "done before" not in command(*evaluate, "-n", "96")
    assert [row["n_timesteps"] for row in stored_rows()] == [64] * 4 + [96] * 2
    command("study", "export", "-o", "longest.yml")
    assert yaml.safe_load(Path("longest.yml").read_text())[held.ENV]["n_timesteps"] == 96


def test_an_interrupted_evaluation_goes_on_with_the_command_that_it_prints(command: Command, tmp_path: Path) -> None:
    finished_study(tmp_path, 1.0)
    evaluate = ("study", "evaluate", "--seeds", "2", "--device", "cpu")
    command(*evaluate[:3], "1", *evaluate[4:])
    assert len(stored_rows()) == 2
    Path("hold").touch()

    def interrupt_when_both_are_held() -> None:
        wait_for(lambda: len(list((STUDY_FOLDER / "evaluation").glob("*/train.log"))) == 4)
        os.kill(os.getpid(), signal.SIGINT)

    thread = in_background(interrupt_when_both_are_held)
    output = command(*evaluate, code=130)
    thread.join()
    assert len(stored_rows()) == 2
    assert "2 of 4 trainings are done and kept." in output
    Path("hold").unlink()
    output = command(*shlex.split(output.splitlines()[-1])[1:])
    assert "2 of 4 trainings were done before" in output
    assert len({(row["trial"], row["seed"]) for row in stored_rows()}) == len(stored_rows()) == 4


def test_a_training_that_fails_is_named_and_no_winner(command: Command, tmp_path: Path) -> None:
    finished_study(tmp_path, 1.0)
    output = command("study", "evaluate", "--seeds", "1", "--device", "meta", code=1)
    assert "trial 0, seed 1000: " in output
    assert "meta" in output.lower().split("failed:")[1]
    assert "The winner" not in output
    assert not stored_rows()


def test_arguments_of_an_evaluation_are_refused_before_it(command: Command, tmp_path: Path) -> None:
    finished_study(tmp_path, 1.0)
    before = sorted(STUDY_FOLDER.iterdir())
    for flags in (["--bogus", "3"], ["--seed", "3"], ["-params", "gamma:0.9"], ["--env", "CartPole-v0"]):
        assert command("study", "evaluate", *flags, code=2).count("\n") == 1
    assert sorted(STUDY_FOLDER.iterdir()) == before


@pytest.mark.slow
def test_what_was_trained_again_is_in_the_storage(command: Command, tmp_path: Path) -> None:
    where = ("--storage", "sqlite:///study.db")
    finished_study(tmp_path, 1.0, more=where)
    output = command("study", "evaluate", "--seeds", "2", "--device", "cpu", *where)
    lines = [line for line in output.splitlines() if line.startswith(("  default ", "  trial 0 "))]
    assert len(lines) == 2
    shutil.rmtree("logs")
    output = command("study", "show", *where, "-f", "elsewhere")
    assert set(lines) <= set(output.splitlines())
    wins = "The winner is the default" in output  # which may be either
    assert ("Train with the entry, which no trial beats" if wins else "Write the winner as YAML") in output
    assert "across 2 seeds" in command("study", "export", *where, "-o", "it.yml") + Path("it.yml").read_text()
