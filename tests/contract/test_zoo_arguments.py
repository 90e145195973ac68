"""What the command line of ``sb3-ppo-ext`` takes, and how it says what it does not take: in one line."""

import shutil
import subprocess
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import yaml
from gymnasium import spaces

from sb3_ppo_ext.zoo.arguments import whole_number
from tests.contract.zoo import RUN, SMALL, TRAIN, Command, error_line, load, run_folder

ROOT = Path(__file__).parents[2]
MODEL = RUN / "CartPole-v1.zip"


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("DualClipPPO", "'dual_clip_ppo'"),
        ("adaptive-kl-ppo", "'adaptive_kl_ppo'"),
        ("TRPO", "'trpo' or 'trpo_ext'"),
        ("Reinforce", "'reinforce'"),
        ("dual_clip_pp", "'dual_clip_ppo'"),
    ],
)
def test_a_wrong_algorithm_is_answered_by_the_right_one(command: Command, given: str, meant: str) -> None:
    output = command("train", "--algo", given, code=2)
    assert output == f"sb3-ppo-ext train: argument --algo: there is no '{given}'; did you mean {meant}?\n"


def test_without_an_algorithm_it_is_ours_and_said(command: Command) -> None:
    output = command("train", "-n", "64", "--eval-freq", "-1", *SMALL)
    assert output.startswith("sb3-ppo-ext train: no --algo was given, so dual_clip_ppo is used\n")
    assert MODEL.is_file()


@pytest.mark.parametrize("steps", ["0", "-5", "1.5", "many", "1e-3", "nan", "inf", "1e400"])
def test_steps_that_are_none(command: Command, steps: str) -> None:
    output = command("train", "-n", steps, code=2)
    allowed = "it must be a whole number of at least 1, such as 1000 or 1e3"
    assert output == f"sb3-ppo-ext train: argument -n/--n-timesteps: '{steps}' is not allowed: {allowed}\n"


def test_whole_numbers() -> None:
    assert [whole_number(text) for text in ("1e4", "2.5e3", "100_000", "-1", 3.0, 7)] == [10000, 2500, 100000, -1, 3, 7]


def test_steps_as_a_person_writes_them(command: Command) -> None:
    command(*TRAIN, "-n", "1e2", "--eval-freq", "-1", *SMALL)
    assert load(MODEL).num_timesteps == 128


@pytest.mark.parametrize(
    ("pair", "answer"),
    [
        ("clip_range=0.3", "'clip_range=0.3' must be written clip_range:0.3"),
        ("clip_range", "'clip_range' is not a pair key:value, such as gamma:0.9"),
        ("clip_range:", "'clip_range:' is not a pair key:value, such as gamma:0.9"),
        ("policy_kwargs:dict(a=[1]", "'policy_kwargs:dict(a=[1]' has a value that cannot be read (SyntaxError"),
        ("policy_kwargs:dict(a=ReLU)", "(NameError: name 'ReLU' is not defined)"),
        ("gamma:[1", "'gamma:[1' has a value that cannot be read (SyntaxError"),
    ],
)
@pytest.mark.parametrize("flag", ["-params", "--env-kwargs"])
def test_a_pair_that_is_none(command: Command, flag: str, pair: str, answer: str) -> None:
    output = command("train", flag, pair, code=2)
    assert output.startswith(f"sb3-ppo-ext train: argument {'-params/--hyperparams' if flag == '-params' else flag}: ")
    assert answer in output
    assert output.count("\n") == 1


def test_values_as_yaml_has_them(command: Command) -> None:
    values = ["clip_range:lin_0.3", "learning_rate:lin_1e-3", "dual_clip:null", "normalize:false", "n_steps:32"]
    arguments = [*values, "n_envs:2", "batch_size:64", "n_epochs:1", "policy:MlpPolicy"]
    command(*TRAIN, "-n", "64", "--eval-freq", "-1", "-params", *arguments, "-params", "policy_kwargs:{net_arch: [8]}")
    model = load(MODEL)
    assert model.clip_range(0.5) == pytest.approx(0.15)
    assert model.lr_schedule(0.5) == pytest.approx(0.0005)
    assert model.dual_clip is None
    assert (model.n_envs, model.n_steps) == (2, 32)  # a second -params adds to the first
    assert model.policy_kwargs["net_arch"] == [8]


ENTRY = {"policy": "MlpPolicy", "n_steps": 32, "batch_size": 32, "n_epochs": 1}


def config(**entry: Any) -> str:
    """The name of a configuration for ``CartPole-v1``."""
    lines = yaml.safe_dump({"CartPole-v1": {"n_timesteps": 64, **ENTRY, **entry}}).replace("'", "")  # 3e2, unquoted
    Path("mine.yml").write_text(lines)
    return "mine.yml"


@pytest.mark.parametrize("algo", ["dual_clip_ppo", "ppo"])
def test_numbers_that_pyyaml_takes_for_strings(command: Command, algo: str) -> None:
    """In YAML 1.2 they are numbers, and in what people write."""
    file = config(n_timesteps="1e2", learning_rate="3e-4", n_steps="3.2e1")
    command("train", "--algo", algo, "--device", "cpu", "-conf", file, "--eval-freq", "-1")
    folder = Path("logs", algo, "CartPole-v1_1")
    model = load(folder / "CartPole-v1.zip") if algo != "ppo" else None
    saved = yaml.unsafe_load((folder / "CartPole-v1" / "config.yml").read_text())
    assert (saved["n_timesteps"], saved["learning_rate"], saved["n_steps"]) == (100, 3e-4, 32)
    assert model is None or model.lr_schedule(1.0) == 3e-4


@pytest.mark.parametrize("algo", ["dual_clip_ppo", "ppo"])
@pytest.mark.parametrize(
    ("key", "value"), [("n_timesteps", "many"), ("n_timesteps", 0), ("n_envs", 0), ("n_envs", 1.5), ("frame_stack", -1)]
)
def test_a_number_out_of_range_is_named_with_its_key(command: Command, algo: str, key: str, value: object) -> None:
    output = error_line(command("train", "--algo", algo, "-conf", config(**{key: value}), code=1))
    assert output.startswith(f"sb3-ppo-ext train: mine.yml, CartPole-v1: {key}={value!r} is not allowed")


@pytest.mark.parametrize(
    ("name", "content", "answer"),
    [
        ("mine.yml", "- 1", "mine.yml has no entries"),
        ("mine.yml", "CartPole-v1: 5", "mine.yml, CartPole-v1: 5 is not allowed: an entry must be"),
        ("mine.yml", "CartPole-v1:", "mine.yml, CartPole-v1: None is not allowed: an entry must be"),
        ("mine.py", "x = 1", "mine.py has no dictionary 'hyperparams'"),
        ("absent", "", "No module named 'absent'"),
    ],
)
def test_a_configuration_that_is_none(command: Command, name: str, content: str, answer: str) -> None:
    if content:
        Path(name).write_text(content)
    assert answer in error_line(command(*TRAIN, "-conf", name, code=1))


def test_a_typo_in_the_entry_of_an_algorithm_of_rl_zoo3_is_named(command: Command) -> None:
    output = error_line(command("train", "--algo", "ppo", "-params", "clip_rnage:0.3", code=1))
    assert output == "sb3-ppo-ext train: -params, CartPole-v1: unknown key 'clip_rnage'; the nearest is 'clip_range'"


class DictEnv(gym.Env[Any, Any]):
    observation_space = spaces.Dict({"a": spaces.Box(-1, 1, (2,), np.float32)})
    action_space: spaces.Space[Any] = spaces.Discrete(2)

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        return {"a": np.zeros(2, np.float32)}, {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        raise ValueError("mine")


class DictActionsEnv(DictEnv):
    action_space = spaces.Dict({"a": spaces.Discrete(2)})


gym.register("DictObs-v0", DictEnv)  # type: ignore[arg-type]
gym.register("DictActions-v0", DictActionsEnv)  # type: ignore[arg-type]


@pytest.mark.parametrize("algo", ["dual_clip_ppo", "adaptive_kl_ppo", "ppo"])
def test_what_sb3_refuses_is_one_line(command: Command, algo: str) -> None:
    Path("mine.yml").write_text(yaml.safe_dump({"default": {"n_timesteps": 64, **ENTRY}}))
    arguments = ["train", "--algo", algo, "-conf", "mine.yml", "--device", "cpu"]
    output = error_line(command(*arguments, "--env", "DictObs-v0", code=1))
    assert "You must use `MultiInputPolicy`" in output
    output = error_line(command(*arguments, "--env", "DictActions-v0", "-params", "policy:MultiInputPolicy", code=1))
    assert "Dict('a': Discrete(2))" in output or "The algorithm only supports" in output


def test_the_traceback_of_the_users_environment_is_kept(command: Command) -> None:
    arguments = ["--env", "DictObs-v0", *SMALL, "policy:MultiInputPolicy"]
    with pytest.raises(ValueError, match=r"^mine$"):
        command("train", *arguments)


@pytest.mark.parametrize("env_id", ["ALE/Pong-v5", "PongNoFrameskip-v4"])
def test_an_atari_game_without_its_package(command: Command, env_id: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    output = error_line(command("train", "--env", env_id, code=1))
    assert output.endswith(f"{env_id} is an Atari game, and ale-py is missing: pip install ale-py opencv-python")


def test_an_environment_that_nobody_has_registered(command: Command) -> None:
    output = error_line(command("train", "--env", "Nobody/Knows-v0", code=1))
    assert output.startswith("sb3-ppo-ext train: Nobody/Knows-v0 not found: a package that registers it must be")
    assert "maybe" not in output


def test_a_device_that_is_not_there_is_said(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    output = command("train", "--device", "cuda", "-n", "64", "--eval-freq", "-1", *SMALL)
    assert "--device cuda: torch finds no CUDA device here, so the CPU is used" in output
    assert "--device cuda:" in command("enjoy", "--device", "cuda", "--no-render", "-n", "5")


def test_flags_and_seeds_that_are_none(command: Command) -> None:
    assert command("train", "--bogus", "3", code=2) == "sb3-ppo-ext train: unrecognized arguments: --bogus 3\n"
    assert "it must be below 2**32" in command("train", "--seed", "4294967296", code=2)


def test_parsers_of_the_users_modules_are_left_alone(command: Command) -> None:
    """A module of the user's that reads a command line of its own is given what the standard library has."""
    Path("my_module.py").write_text(
        "import argparse\n"
        "parser = argparse.ArgumentParser()\n"
        "parser.add_argument('--algo', default='ppo', choices=['ppo'])\n"
        "assert type(parser) is argparse.ArgumentParser\n"
        "assert parser.parse_args([]).algo == 'ppo'\n"
    )
    command(*TRAIN, "-n", "64", "--eval-freq", "-1", "--gym-packages", "my_module", *SMALL)
    assert not run_folder(2).exists()


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_the_makefile_passes_what_it_is_given() -> None:
    def make(*arguments: str) -> str:
        return subprocess.run(["make", "-n", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout

    assert " -n 1e4 " in make("train", "STEPS=1e4")
    assert " -n 0 " in make("train", "STEPS=0")
    assert "-params gamma:0.9" in make("train", "ARGS=-params gamma:0.9")
    listed = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert all(name in listed for name in ("dual_clip_ppo", "adaptive_kl_ppo", "trpo_ext", "reinforce", "ARGS"))
