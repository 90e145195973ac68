"""The command ``sb3-ppo-ext`` as its user meets it: what it trains, prints and refuses."""

import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pytest
import rl_zoo3.train
import yaml
from rl_zoo3.exp_manager import ExperimentManager
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.vec_env import VecNormalize

from sb3_ppo_ext import DualClipPPO, __version__
from sb3_ppo_ext.zoo.cli import main

SCRIPT = str(Path(sys.executable).with_name("sb3-ppo-ext"))
TRAIN = ["train", "--algo", "dual_clip_ppo", "--env", "CartPole-v1", "--device", "cpu"]
MODEL = Path("logs/dual_clip_ppo/CartPole-v1_1/CartPole-v1.zip")


class Command(Protocol):
    def __call__(self, *arguments: str, code: int = 0) -> str: ...


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """Runs ``sb3-ppo-ext`` in this process, in an empty folder, and returns what it has printed."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str, code: int = 0) -> str:
        monkeypatch.setattr(sys, "argv", [SCRIPT, *arguments])
        assert main() == code
        assert vars(rl_zoo3.train)["ExperimentManager"] is ExperimentManager
        captured = capsys.readouterr()
        return captured.out + captured.err

    return run


def start(arguments: list[str], folder: Path) -> str:
    run = subprocess.run(arguments, cwd=folder, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout


def load(path: Path) -> Any:
    """The trained model, as :class:`DualClipPPO`; ``Any``, since its schedules are typed as what a user may give."""
    return DualClipPPO.load(path, device="cpu")


def printed_command(output: str, title: str) -> list[str]:
    """What stands in the closing summary below a title."""
    lines = output.splitlines()
    return shlex.split(lines[lines.index(title) + 1])


def printed_reward(output: str) -> tuple[float, float]:
    found = re.search(r"reward +(\S+) \+/- (\S+) \(mean and std of 20 episodes", output)
    assert found is not None
    return float(found[1]), float(found[2])


def test_train_and_every_command_that_it_prints(tmp_path: Path) -> None:
    output = start(
        [SCRIPT, *TRAIN, "-n", "1000", "--seed", "1", "--eval-freq", "400", "-P", "-tb", "logs/tb", "-f", "my logs"],
        tmp_path,
    )
    run = tmp_path / "my logs" / "dual_clip_ppo" / "CartPole-v1_1"
    assert (run / "CartPole-v1.zip").is_file()
    assert yaml.unsafe_load((run / "CartPole-v1" / "config.yml").read_text())["clip_range"] == "lin_0.2"
    assert np.load(run / "evaluations.npz")["timesteps"].tolist() == [400, 800]
    assert len(list((tmp_path / "logs" / "tb" / "CartPole-v1" / "DualClipPPO_1").glob("events.*"))) == 1
    for path in re.findall(r"my logs/\S+\.(?:zip|yml|npz)", output):
        assert (tmp_path / path).is_file()

    mean, std = printed_reward(output)
    env = make_vec_env("CartPole-v1", seed=1)
    expected = evaluate_policy(load(run / "CartPole-v1.zip"), env, n_eval_episodes=20)
    assert (mean, std) == pytest.approx(expected, abs=0.01)

    watch = printed_command(output, "Watch the agent:")
    assert watch[0] == SCRIPT
    assert "Episode Reward" in start([*watch, "--no-render", "-n", "300"], tmp_path)

    proceed = printed_command(output, "Continue the training:")
    continued = start(proceed, tmp_path)
    assert "Loading pretrained agent" in continued
    assert printed_command(continued, "Continue the training:").count("-i") == 1  # and not the one it started from
    assert (run.with_name("CartPole-v1_2") / "CartPole-v1.zip").is_file()

    tensorboard = printed_command(output, "Open TensorBoard:")
    assert os.access(tensorboard[0], os.X_OK)
    assert tensorboard[1:] == ["--logdir", "logs/tb/CartPole-v1"]


def test_an_interrupted_training_is_saved_and_summed_up(tmp_path: Path) -> None:
    arguments = [sys.executable, "-u", "-m", "sb3_ppo_ext.zoo", *TRAIN, "-n", "10000000", "--eval-freq", "400"]
    process = subprocess.Popen(arguments, cwd=tmp_path, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    evaluations = (line for line in process.stdout if line.startswith("Eval num_timesteps"))
    for _ in range(3):  # not at the first: tqdm makes the lock of its output then, and is not made to be interrupted
        next(evaluations)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    assert (tmp_path / MODEL).is_file()
    printed_reward(output)
    assert printed_command(output, "Watch the agent:")[:3] == [sys.executable, "-m", "sb3_ppo_ext.zoo"]


def test_the_final_evaluation_uses_the_statistics_of_the_training(command: Command) -> None:
    output = command(*TRAIN, "-n", "600", "--seed", "3", "-params", "normalize:True", "n_steps:64", "n_epochs:2")
    model = load(MODEL)
    env = VecNormalize.load(str(MODEL.with_suffix("") / "vecnormalize.pkl"), make_vec_env("CartPole-v1", seed=3))
    env.training = env.norm_reward = False
    assert printed_reward(output) == pytest.approx(evaluate_policy(model, env, n_eval_episodes=20), abs=0.01)


def test_without_evaluation_and_log_nothing_is_said_of_them(command: Command) -> None:
    assert "Watch the agent:" not in command(*TRAIN, "-n", "300", "--eval-freq", "-1")
    assert "ensorBoard" not in command(*TRAIN, "-n", "300")


def test_a_run_with_a_unique_name_has_no_number_to_watch_it_by(command: Command) -> None:
    output = command(*TRAIN, "-n", "300", "--uuid")
    assert "Watch the agent:" not in output
    assert Path(printed_command(output, "Continue the training:")[-1]).is_file()


def test_an_algorithm_of_rl_zoo3_trains_as_well(command: Command) -> None:
    output = command("train", "--algo", "ppo", "-n", "300", "--device", "cpu")
    assert "rl_zoo3" in output.split("Loading hyperparameters from: ")[1].splitlines()[0]
    printed_reward(output)


def test_hyperparameters_of_the_command_line_reach_the_model(command: Command) -> None:
    command(*TRAIN, "-n", "300", "-params", "dual_clip:4.0", "clip_range_high:'lin_0.3'")
    model = load(MODEL)
    assert model.dual_clip == 4.0
    assert model.clip_range_high == "lin_0.3"
    assert model.clip_range(0.5) == pytest.approx(0.1)
    command(*TRAIN, "-n", "300", "-params", "dual_clip:None", "-i", str(MODEL))
    assert load(Path("logs/dual_clip_ppo/CartPole-v1_2/CartPole-v1.zip")).dual_clip is None


ENTRY = {"n_timesteps": 300, "policy": "MlpPolicy", "n_steps": 64, "gamma": 0.875}


@pytest.mark.parametrize("flag", ["-c", "-conf", "--conf-file"])
def test_the_users_own_yaml_wins(command: Command, flag: str) -> None:
    Path("mine.yml").write_text(yaml.safe_dump({"CartPole-v1": ENTRY}))
    command(*TRAIN, flag, "mine.yml", "--eval-freq", "-1")
    assert load(MODEL).gamma == 0.875


def test_the_users_own_python_file_wins(command: Command) -> None:
    Path("mine.py").write_text(f"hyperparams = {{'CartPole-v1': dict({ENTRY!r}, dual_clip=lambda progress: 5.0)}}")
    command(*TRAIN, "-conf", "mine.py", "--eval-freq", "-1")
    assert load(MODEL).dual_clip == 5.0


def said(output: str) -> str:
    """The one line that a refused command ends with."""
    return output.strip().splitlines()[-1]


def test_a_typo_is_named_with_its_file_and_the_right_key(command: Command) -> None:
    Path("mine.yml").write_text(yaml.safe_dump({"CartPole-v1": {**ENTRY, "clip_rnage": 0.1}}))
    output = command(*TRAIN, "-conf", "mine.yml", code=1)
    expected = "sb3-ppo-ext train: mine.yml, CartPole-v1: unknown key 'clip_rnage'; the nearest is 'clip_range'"
    assert said(output) == expected
    assert "Traceback" not in output
    output = command(*TRAIN, "-params", "nenvs:3", code=1)
    assert said(output) == "sb3-ppo-ext train: -params, CartPole-v1: unknown key 'nenvs'; the nearest is 'n_envs'"


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # rl_zoo3's monitor is left open
def test_a_value_out_of_range_is_named_with_its_file(command: Command) -> None:
    Path("mine.yml").write_text(yaml.safe_dump({"CartPole-v1": {**ENTRY, "gamma": 2}}))
    output = said(command(*TRAIN, "-conf", "mine.yml", code=1))
    assert output.startswith("sb3-ppo-ext train: dual_clip_ppo on CartPole-v1, mine.yml: gamma=2 is not allowed")


@pytest.mark.parametrize("content", [None, "CartPole-v1: [1", "CartPole-v1:\n\t- x"])
def test_a_file_that_cannot_be_read_is_named(command: Command, content: str | None) -> None:
    if content is not None:
        Path("mine.yml").write_text(content)
    output = command(*TRAIN, "-conf", "mine.yml", code=1)
    assert ("sb3-ppo-ext train: mine.yml is no YAML" if content else "No such file or directory: 'mine.yml'") in output


def test_the_traceback_of_the_users_own_code_is_kept(command: Command) -> None:
    Path("mine.py").write_text("raise ValueError('mine')")
    with pytest.raises(ValueError, match=r"mine$"):
        command(*TRAIN, "-conf", "mine.py")


def test_what_the_command_line_sets_is_not_set_in_an_entry(command: Command) -> None:
    output = command(*TRAIN, "-params", "tensorboard_log:'logs'", code=1)
    assert "'tensorboard_log' is set on the command line, with --tensorboard-log" in said(output)


@pytest.mark.parametrize("key", ["policy", "n_timesteps"])
def test_a_missing_key_is_named(command: Command, key: str) -> None:
    entry = {name: value for name, value in ENTRY.items() if name != key}
    Path("mine.yml").write_text(yaml.safe_dump({"CartPole-v1": entry}))
    assert f"mine.yml, CartPole-v1: '{key}' is missing" in said(command(*TRAIN, "-conf", "mine.yml", code=1))


def test_an_environment_without_an_entry_is_named(command: Command) -> None:
    Path("mine.yml").write_text(yaml.safe_dump({"CartPole-v0": ENTRY, "Pendulum-v1": ENTRY}))
    output = said(command(*TRAIN, "-conf", "mine.yml", code=1))
    assert output == "sb3-ppo-ext train: mine.yml has no entry for CartPole-v1; the nearest is 'CartPole-v0'"

    Path("mine.yml").write_text(yaml.safe_dump({"CartPole-v0": ENTRY, "default": ENTRY}))
    output = command(*TRAIN, "-conf", "mine.yml", "--eval-freq", "-1")
    assert "mine.yml has no entry for CartPole-v1; the nearest is 'CartPole-v0'" in output
    assert "Using 'default' hyperparameters" in output


def test_an_unknown_environment_and_an_agent_that_is_not_there_are_named(command: Command) -> None:
    output = said(command("train", "--algo", "dual_clip_ppo", "--env", "CartPol-v1", code=1))
    assert output.startswith("sb3-ppo-ext train: CartPol-v1 not found")
    output = said(command("enjoy", "--algo", "trpo_ext", "--env", "CartPole-v1", "-f", "logs", "--no-render", code=1))
    assert output.startswith("sb3-ppo-ext enjoy: The logs/trpo_ext folder was not found")


def test_help_and_version(command: Command) -> None:
    assert command("--version").strip() == f"sb3-ppo-ext {__version__}"
    for flag in ("-h", "--help"):
        assert "record_training" in command(flag)
    assert "usage: sb3-ppo-ext" in command(code=2)


def test_an_unknown_command_names_the_nearest(command: Command) -> None:
    assert "no command 'trian'; the nearest is 'train'" in command("trian", code=2)


def test_a_commands_own_help_knows_our_algorithms(command: Command, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        command("enjoy", "--help")
    help_text = capsys.readouterr().out
    assert "usage: sb3-ppo-ext enjoy" in help_text
    assert "dual_clip_ppo" in help_text


def test_videos_are_recorded(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    command(*TRAIN, "-n", "300", "--eval-freq", "-1")
    command("record_video", "--algo", "dual_clip_ppo", "-f", "logs", "-n", "20")
    assert len(list(MODEL.parent.glob("videos/*.mp4"))) == 1

    started: list[list[str]] = []

    def call(arguments: list[str]) -> int:
        started.append(arguments)
        return 0

    monkeypatch.setattr(subprocess, "call", call)
    command("record_training", "--algo", "dual_clip_ppo", "-f", "logs", "-n", "20")
    assert [arguments[:4] for arguments in started] == [[sys.executable, "-m", "sb3_ppo_ext.zoo", "record_video"]]
