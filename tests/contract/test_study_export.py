"""``sb3-ppo-ext study export``: an exported entry trains what the trial has trained, whatever its policy is made of."""

import os
import shlex
import sys
from pathlib import Path

import pytest
import yaml

from sb3_ppo_ext import DualClipPPO
from sb3_ppo_ext.zoo import register
from sb3_ppo_ext.zoo.study.candidates import make_candidate, store_result
from tests.contract import held
from tests.contract.zoo import STUDY, STUDY_FOLDER, Command, finished_study, load_study, stored_rows

pytestmark = pytest.mark.usefixtures("held_space")


def test_what_an_entry_says_of_its_policy_stays(command: Command, tmp_path: Path) -> None:
    search = held.arguments(tmp_path, 1)
    kept = {"features_extractor_class": held.Marker, "features_extractor_kwargs": {"marker": "marker"}}
    kept |= {"log_std_init": -1.0, "optimizer_kwargs": {"eps": 1e-6, "betas": (0.9, 0.99)}}
    source = "dict(features_extractor_class=__import__('tests.contract.held').contract.held.Marker, log_std_init=-1.0, "
    source += "features_extractor_kwargs=dict(marker='marker'), optimizer_kwargs=dict(eps=1e-6, betas=(0.9, 0.99)), "
    source += "net_arch=[3])"
    Path("held.yml").write_text(yaml.safe_dump({held.ENV: {**held.ENTRY, "policy_kwargs": source}}))

    def processes() -> int:
        numbers = set(Path("marker").read_text().split())
        Path("marker").unlink()
        return len(numbers)

    command(*search)
    assert processes() == 1
    command("study", "evaluate", "--seeds", "1", "--device", "cpu")
    assert processes() == 2  # the trial and the entry
    ((evaluated,),) = [(STUDY_FOLDER / "evaluation").glob(f"0_*/**/{held.ENV}.zip")]
    output = command("study", "export", "-o", "exported.yml")
    train = [*shlex.split(output.splitlines()[-1])[1:], "--eval-freq", "-1", "--device", "cpu"]
    command(*train)
    assert processes() == 1
    stored = ("--storage", str(STUDY_FOLDER / "study.log"), "--study-name", STUDY, "--trial-id", "0")
    command(*["held.yml" if word == "exported.yml" else word for word in train], *stored)
    assert processes() == 1
    hidden = load_study().trials[0].params["hidden"]
    folder = Path("logs", held.ALGO)
    for file in (evaluated, *(folder / f"{held.ENV}_{run}" / f"{held.ENV}.zip" for run in (1, 2))):
        policy_kwargs = DualClipPPO.load(file, device="cpu").policy_kwargs
        assert policy_kwargs.pop("net_arch") == {"pi": [hidden], "vf": [8]}
        assert policy_kwargs.pop("activation_fn").__name__ == "ReLU"
        assert policy_kwargs == kept


def test_an_entry_may_be_python_that_yaml_cannot_say(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A module as a configuration, with a class of its own and a schedule."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "pyconf", raising=False)
    source = """
from tests.contract import held

class Local(held.Marker):
    pass

kwargs = dict(features_extractor_class=Local, features_extractor_kwargs=dict(marker="marker"))
hyperparams = {held.ENV: {**held.ENTRY, "clip_range": lambda progress: 0.1, "policy_kwargs": kwargs}}
"""
    Path("pyconf.py").write_text(source)
    command(*["pyconf" if word == "held.yml" else word for word in held.arguments(tmp_path, 1)])
    command("study", "evaluate", "--seeds", "1", "--device", "cpu")
    assert len(stored_rows()) == 2
    assert len(set(Path("marker").read_text().split())) == 3
    output = command("study", "export", "-o", "it.yml", code=2)
    assert not Path("it.yml").exists()
    assert "YAML cannot express the entry (" in output
    train = shlex.split(output.split("train with it by ")[1])
    command(*train[1:], "--eval-freq", "-1", "--device", "cpu", "--seed", "1000")
    files = list((STUDY_FOLDER / "evaluation").glob(f"0_*/**/{held.ENV}.zip"))
    files += [Path(f"logs/{held.ALGO}/{held.ENV}_1/{held.ENV}.zip")]
    evaluated, again = (DualClipPPO.load(file, device="cpu").policy for file in files)
    assert [one.tolist() for one in evaluated.parameters()] == [one.tolist() for one in again.parameters()]


def test_where_nothing_can_be_written_is_said_in_a_line(command: Command, tmp_path: Path) -> None:
    finished_study(tmp_path, 1.0)
    storage = ["--storage", str(STUDY_FOLDER / "study.log")]
    for arguments, said in (
        (["export", "-o", "."], "Is a directory"),
        (["export", "-o", "held.yml/it.yml"], "exists"),
        (["show", *storage, "-f", "held.yml"], "Not a directory"),
        ([*held.arguments(tmp_path, 1)[1:], "--study-name", 300 * "x"], "File name too long"),
    ):
        output = command("study", *arguments, code=2)
        assert output.count("\n") == 1
        assert said in output


def test_an_export_that_fails_leaves_the_file_as_it_was(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(file: int) -> None:
        raise OSError("the disk is full")

    finished_study(tmp_path, 1.0)
    Path("it.yml").write_text("before")
    monkeypatch.setattr(os, "fsync", fails)
    with pytest.raises(OSError, match="the disk is full"):
        command("study", "export", "-o", "it.yml")
    assert Path("it.yml").read_text() == "before"
    assert sorted(os.listdir()) == ["held.yml", "it.yml", "logs"]


def test_an_entry_names_the_seeds_that_it_was_trained_again_on(command: Command, tmp_path: Path) -> None:
    study = finished_study(tmp_path, 3.0)
    register()
    candidate = make_candidate(study, study.trial(0), 0)
    for seed, words in ((5, "5"), (6, "5, 6"), (7, "5 to 7"), (20, "5, 6, 7, 20")):
        store_result(study, candidate, seed, {"mean": 1.0})
        command("study", "export", "-o", "it.yml")
        assert f"with seeds {words}, reward at the end" in Path("it.yml").read_text()
