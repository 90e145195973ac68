"""The command ``sb3-ppo-ext`` as its user meets it: what it trains, prints and refuses."""

import importlib
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import ClassVar

import gymnasium as gym
import numpy as np
import pytest
import yaml
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.vec_env import VecNormalize

from sb3_ppo_ext import __version__
from sb3_ppo_ext.zoo import cli, commands, summary
from tests.contract.zoo import (
    MODEL,
    RUN,
    SCRIPT,
    SMALL,
    TRAIN,
    Command,
    error_line,
    load,
    printed_command,
    printed_reward,
    run_folder,
)


@pytest.mark.filterwarnings("ignore::tqdm.TqdmExperimentalWarning")  # of SB3's own bar
def test_train_and_every_command_that_it_prints(command: Command) -> None:
    arguments = ["-n", "1000", "--seed", "1", "--eval-freq", "400", "-P", "-tb", "logs/tb", "-f", "my logs"]
    output = command(*TRAIN, *arguments, "-params", "n_epochs:1")
    run = Path("my logs/dual_clip_ppo/CartPole-v1_1")
    assert (run / "CartPole-v1.zip").is_file()
    assert yaml.unsafe_load((run / "CartPole-v1" / "config.yml").read_text())["clip_range"] == "lin_0.2"
    assert np.load(run / "evaluations.npz")["timesteps"].tolist() == [400, 800]
    assert len(list(Path("logs/tb/CartPole-v1/DualClipPPO_1").glob("events.*"))) == 1
    for path in re.findall(r"my logs/\S+\.(?:zip|yml|npz)", output):
        assert Path(path).is_file()

    mean, std = printed_reward(output)
    env = make_vec_env("CartPole-v1", seed=1)
    expected = evaluate_policy(load(run / "CartPole-v1.zip"), env, n_eval_episodes=20)
    assert (mean, std) == pytest.approx(expected, abs=0.01)

    watch = printed_command(output, "Watch the agent:")
    assert watch[0] in (SCRIPT, "sb3-ppo-ext")
    assert "Episode Reward" in command(*watch[1:], "--no-render", "-n", "300")

    proceed = printed_command(output, "Continue the training:")
    assert (
        "(from step 1,024 to 2,024; a schedule such as lin_0.2 goes on as that of the longer training, at 49% of"
        in output
    )
    continued = command(*proceed[1:])
    assert "Continuing from step 1,024 to 2,024" in continued
    assert "Loading pretrained agent" in continued
    assert printed_command(continued, "Continue the training:").count("-i") == 1  # and not the one it started from
    assert (run.with_name("CartPole-v1_2") / "CartPole-v1.zip").is_file()

    tensorboard = printed_command(output, "Open TensorBoard:")
    assert os.access(tensorboard[0], os.X_OK)
    assert tensorboard[1:] == ["--logdir", "logs/tb/CartPole-v1"]


def test_the_final_evaluation_uses_the_statistics_of_the_training(command: Command) -> None:
    output = command(*TRAIN, "-n", "600", "--seed", "3", "-params", "normalize:True", "n_steps:64", "n_epochs:2")
    model = load(MODEL)
    env = VecNormalize.load(str(MODEL.with_suffix("") / "vecnormalize.pkl"), make_vec_env("CartPole-v1", seed=3))
    env.training = env.norm_reward = False
    assert printed_reward(output) == pytest.approx(evaluate_policy(model, env, n_eval_episodes=20), abs=0.01)


def test_without_evaluation_the_summary_tells_of_the_training(command: Command) -> None:
    output = command(*TRAIN, "-n", "300", "--eval-freq", "-1", *SMALL)
    monitor = np.genfromtxt(next(RUN.glob("*.monitor.csv")), delimiter=",", skip_header=2)
    rewards = monitor[:, 0]
    of = f"mean and std of the training's last {len(rewards)} episodes"
    assert f"reward       {rewards.mean():.2f} +/- {rewards.std():.2f} ({of})" in output
    assert "Watch the agent:" in output
    assert "ensorBoard" not in output


def test_an_evaluation_that_fails_takes_nothing(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*args: object, **kwargs: object) -> None:
        raise RuntimeError("the simulator has no licence for another")

    monkeypatch.setattr("sb3_ppo_ext.zoo.summary.evaluate_policy", fails)
    output = command(*TRAIN, "-n", "64", *SMALL)
    assert "reward       not measured: RuntimeError: the simulator has no licence" in output
    assert "Watch the agent:" in output
    assert MODEL.is_file()


class CountedEnv(gym.Wrapper):  # type: ignore[type-arg]
    """An environment that notes how many others were open when it was made."""

    n_open = 0
    others: ClassVar[list[int]] = []

    def __init__(self, env: gym.Env) -> None:
        super().__init__(env)
        self.others.append(CountedEnv.n_open)
        CountedEnv.n_open += 1

    def close(self) -> None:
        CountedEnv.n_open -= 1
        super().close()


gym.register("Counted-v0", lambda **kwargs: CountedEnv(gym.make("CartPole-v1", **kwargs)))


def test_the_closing_evaluation_finds_all_other_environments_closed(command: Command) -> None:
    """They may hold what only one can have at a time."""
    printed_reward(command("train", "--env", "Counted-v0", "-n", "64", "-conf", config(ENTRY, env="Counted-v0")))
    assert CountedEnv.others == [0, 1, 0]  # to evaluate, to train, and to evaluate once more
    assert CountedEnv.n_open == 0


def test_a_run_with_a_unique_name_has_no_number_to_watch_it_by(command: Command) -> None:
    output = command(*TRAIN, "-n", "300", "--uuid")
    assert "Watch the agent:" not in output
    assert Path(printed_command(output, "Continue the training:")[-1]).is_file()


def test_an_algorithm_of_rl_zoo3_trains_as_well(command: Command) -> None:
    output = command("train", "--algo", "ppo", "-n", "300", "--device", "cpu")
    assert "rl_zoo3" in output.split("Loading hyperparameters from: ")[1].splitlines()[0]
    printed_reward(output)


def test_hyperparameters_of_the_command_line_reach_the_model(command: Command) -> None:
    command(*TRAIN, "-n", "64", "--eval-freq", "-1", *SMALL, "dual_clip:4.0", "clip_range_high:'lin_0.3'")
    model = load(MODEL)
    assert model.dual_clip == 4.0
    assert model.clip_range_high == "lin_0.3"
    assert model.clip_range(0.5) == pytest.approx(0.1)
    command(*TRAIN, "-n", "128", "--eval-freq", "-1", *SMALL, "dual_clip:None", "-i", str(MODEL))
    assert load(Path("logs/dual_clip_ppo/CartPole-v1_2/CartPole-v1.zip")).dual_clip is None


ENTRY = {"n_timesteps": 300, "policy": "MlpPolicy", "n_steps": 64, "gamma": 0.875}


def config(entry: object, env: str = "CartPole-v1") -> str:
    """The name of a configuration with an entry."""
    Path("mine.yml").write_text(yaml.safe_dump({env: entry}))
    return "mine.yml"


@pytest.mark.parametrize("flag", ["-c", "-conf", "--conf-file"])
def test_the_users_own_yaml_wins(command: Command, flag: str) -> None:
    Path("mine.yml").write_text(yaml.safe_dump({"CartPole-v1": ENTRY}))
    command(*TRAIN, flag, "mine.yml", "--eval-freq", "-1")
    assert load(MODEL).gamma == 0.875


def test_the_users_own_python_file_wins(command: Command) -> None:
    Path("mine.py").write_text(f"hyperparams = {{'CartPole-v1': dict({ENTRY!r}, dual_clip=lambda progress: 5.0)}}")
    output = command(*TRAIN, "-conf", "mine.py", "--eval-freq", "-1")
    assert load(MODEL).dual_clip(1.0) == 5.0
    config = yaml.unsafe_load((RUN / "CartPole-v1" / "config.yml").read_text())  # which enjoy reads
    assert config["dual_clip"] == "the function <lambda>"
    assert config["gamma"] == ENTRY["gamma"]
    watch = printed_command(output, "Watch the agent:")
    assert "Episode Reward" in command(*watch[1:], "--no-render", "-n", "100")


def test_a_typo_is_named_with_its_file_and_the_right_key(command: Command) -> None:
    Path("mine.yml").write_text(yaml.safe_dump({"CartPole-v1": {**ENTRY, "clip_rnage": 0.1}}))
    output = command(*TRAIN, "-conf", "mine.yml", code=1)
    expected = "sb3-ppo-ext train: mine.yml, CartPole-v1: unknown key 'clip_rnage'; the nearest is 'clip_range'"
    assert error_line(output) == expected
    assert "Traceback" not in output
    output = command(*TRAIN, "-params", "nenvs:3", code=1)
    assert error_line(output) == "sb3-ppo-ext train: -params, CartPole-v1: unknown key 'nenvs'; the nearest is 'n_envs'"


def test_a_value_out_of_range_is_named_with_its_file(command: Command) -> None:
    Path("mine.yml").write_text(yaml.safe_dump({"CartPole-v1": {**ENTRY, "gamma": 2}}))
    output = error_line(command(*TRAIN, "-conf", "mine.yml", code=1))
    assert output.startswith("sb3-ppo-ext train: dual_clip_ppo on CartPole-v1, mine.yml: gamma=2 is not allowed")


@pytest.mark.parametrize("content", [None, "CartPole-v1: [1", "CartPole-v1:\n\t- x"])
def test_a_file_that_cannot_be_read_is_named(command: Command, content: str | None) -> None:
    if content is not None:
        Path("mine.yml").write_text(content)
    output = command(*TRAIN, "-conf", "mine.yml", code=1)
    assert (
        "sb3-ppo-ext train: mine.yml is not valid YAML" if content else "No such file or directory: 'mine.yml'"
    ) in output


def test_the_traceback_of_the_users_own_code_is_kept(command: Command) -> None:
    Path("mine.py").write_text("raise ValueError('mine')")
    with pytest.raises(ValueError, match=r"mine$"):
        command(*TRAIN, "-conf", "mine.py")


def test_what_the_command_line_sets_is_not_set_in_an_entry(command: Command) -> None:
    output = command(*TRAIN, "-params", "tensorboard_log:'logs'", code=1)
    assert "'tensorboard_log' is set on the command line, with --tensorboard-log" in error_line(output)


@pytest.mark.parametrize("key", ["policy", "n_timesteps"])
def test_a_missing_key_is_named(command: Command, key: str) -> None:
    entry = {name: value for name, value in ENTRY.items() if name != key}
    Path("mine.yml").write_text(yaml.safe_dump({"CartPole-v1": entry}))
    assert f"mine.yml, CartPole-v1: '{key}' is missing" in error_line(command(*TRAIN, "-conf", "mine.yml", code=1))


def test_an_environment_without_an_entry_is_named(command: Command) -> None:
    Path("mine.yml").write_text(yaml.safe_dump({"CartPole-v0": ENTRY, "Pendulum-v1": ENTRY}))
    output = error_line(command(*TRAIN, "-conf", "mine.yml", code=1))
    assert output == "sb3-ppo-ext train: mine.yml has no entry for CartPole-v1; the nearest is 'CartPole-v0'"

    Path("mine.yml").write_text(yaml.safe_dump({"CartPole-v0": ENTRY, "default": ENTRY}))
    output = command(*TRAIN, "-conf", "mine.yml", "--eval-freq", "-1")
    assert "mine.yml has no entry for CartPole-v1; the nearest is 'CartPole-v0'" in output
    assert "Using 'default' hyperparameters" in output


def test_an_unknown_environment_and_an_agent_that_is_not_there_are_named(command: Command) -> None:
    output = error_line(command("train", "--algo", "dual_clip_ppo", "--env", "CartPol-v1", code=1))
    assert output.startswith("sb3-ppo-ext train: CartPol-v1 not found")
    output = error_line(
        command("enjoy", "--algo", "trpo_ext", "--env", "CartPole-v1", "-f", "logs", "--no-render", code=1)
    )
    assert output.startswith("sb3-ppo-ext enjoy: The logs/trpo_ext folder was not found")


def test_help_and_version(command: Command) -> None:
    assert command("--version").strip() == f"sb3-ppo-ext {__version__}"
    for flag in ("-h", "--help"):
        assert "record_training" in command(flag)
    assert "usage: sb3-ppo-ext" in command(code=2)


def test_an_unknown_command_names_the_nearest(command: Command) -> None:
    assert "no command 'trian'; the nearest is 'train'" in command("trian", code=2)


def test_a_commands_own_help_knows_our_algorithms(command: Command) -> None:
    help_text = command("enjoy", "--help")
    assert "usage: sb3-ppo-ext enjoy" in help_text
    assert "dual_clip_ppo" in help_text


def test_videos_are_recorded(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    command(*TRAIN, "-n", "300", "--eval-freq", "-1")
    command("record_video", "--algo", "dual_clip_ppo", "-f", "logs", "-n", "20")
    assert len(list(MODEL.parent.glob("videos/*.mp4"))) == 1

    started = calls(monkeypatch, code=0)
    command("record_training", "--algo", "dual_clip_ppo", "-f", "logs", "-n", "20")
    assert [arguments[:4] for arguments in started] == [[sys.executable, "-m", "sb3_ppo_ext.zoo", "record_video"]]


def calls(monkeypatch: pytest.MonkeyPatch, code: int) -> list[list[str]]:
    """The commands that are started from now on; none is, and each ends with this code."""
    started: list[list[str]] = []

    def call(arguments: list[str]) -> int:
        started.append(arguments)
        return code

    monkeypatch.setattr(subprocess, "call", call)
    return started


def test_enjoy_finds_what_train_has_written(command: Command) -> None:
    command(*TRAIN, "-n", "64", "--eval-freq", "-1", *SMALL)
    assert f"Loading {MODEL}" in command("enjoy", *TRAIN[1:], "--no-render", "-n", "20")
    # A training that is refused leaves no folder, in which there would be no agent.
    command(*TRAIN, "-n", "64", "-params", "gamma:2", code=1)
    assert f"Loading {MODEL}" in command("enjoy", "--no-render", "-n", "20")


def test_two_trainings_that_begin_together_take_two_folders(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    run_ids = iter([0, 1])
    monkeypatch.setattr("rl_zoo3.exp_manager.get_latest_run_id", lambda *_: 0)  # when the manager is made
    monkeypatch.setattr("sb3_ppo_ext.zoo.experiment.get_latest_run_id", lambda *_: next(run_ids))  # when it looks again
    Path(RUN).mkdir(parents=True)
    Path(RUN, "best_model.zip").touch()
    assert "best model" not in command(*TRAIN, "-n", "64", "--eval-freq", "-1", *SMALL)
    assert [file.name for file in RUN.iterdir()] == ["best_model.zip"]
    assert (run_folder(2) / "CartPole-v1.zip").is_file()


def test_logs_of_two_algorithms_of_one_name_are_told_apart(command: Command) -> None:
    Path("mine.yml").write_text(yaml.safe_dump({"CartPole-v1": {**ENTRY, "n_timesteps": 64, "batch_size": 64}}))
    for algo in ("trpo", "trpo_ext", "dual_clip_ppo"):
        command("train", "--algo", algo, "-conf", "mine.yml", "--eval-freq", "-1", "-tb", "tb", "--device", "cpu")
    assert {path.name for path in Path("tb/CartPole-v1").iterdir()} == {"TRPO_1", "trpo_ext_1", "DualClipPPO_1"}


@pytest.mark.slow
def test_the_users_modules_are_found(tmp_path: Path) -> None:
    """The folder of a console script is first on the path, and not the one that it is called in."""
    tmp_path.joinpath("my_env.py").write_text(
        "import gymnasium\ngymnasium.register('Mine-v0', 'gymnasium.envs.classic_control:CartPoleEnv')"
    )
    tmp_path.joinpath("my_conf.py").write_text(f"hyperparams = {{'Mine-v0': {ENTRY!r}}}")
    arguments = ["train", "--env", "Mine-v0", "-n", "64", "--gym-packages", "my_env", "-conf", "my_conf"]
    run = subprocess.run([SCRIPT, *arguments, "--eval-freq", "-1"], cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    assert printed_command(run.stdout, "Watch the agent:")[0] == SCRIPT


def test_benchmark_evaluates_with_our_command(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    command(*TRAIN, "-n", "64", "--eval-freq", "-1", *SMALL)
    started = calls(monkeypatch, code=1)
    Path("logs/benchmark").mkdir()
    assert "Error during evaluation" in command("benchmark", "--no-hub", "--test-mode")
    assert [arguments[:4] for arguments in started] == [[sys.executable, "-m", "sb3_ppo_ext.zoo", "enjoy"]]
    assert started[0][started[0].index("--algo") + 1] == "dual_clip_ppo"


def test_the_hubs_commands_know_our_algorithms(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRUST_REMOTE_CODE", raising=False)
    monkeypatch.delitem(sys.modules, "rl_zoo3.load_from_hub", raising=False)  # or running it is a warning
    where = ["--algo", "trpo_ext", "--env", "CartPole-v1", "-f", "logs"]
    assert "set the environment variable `TRUST_REMOTE_CODE`" in error_line(command("load_from_hub", *where, code=1))
    refused = command("push_to_hub", *where, "-orga", "nobody", "--no-render", code=1)
    assert error_line(refused) == "sb3-ppo-ext push_to_hub: The logs/trpo_ext folder was not found"


@pytest.mark.parametrize(("algo", "ours"), [("trpo_ext", True), ("ppo", False)])
def test_a_model_card_names_the_command_that_knows_the_algorithm(
    algo: str, ours: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands._restore_generate_metadata()
    push_to_hub = importlib.import_module("rl_zoo3.push_to_hub")
    monkeypatch.setattr(push_to_hub, "metadata_save", commands._save_model_card)  # as the command does
    card, metadata = push_to_hub.generate_model_card(algo, "X", "me", "CartPole-v1", 1.0, 0.0, {}, {})
    push_to_hub.save_model_card(tmp_path, card, metadata)
    written = (tmp_path / "README.md").read_text()
    assert ("sb3-ppo-ext enjoy --algo trpo_ext --env CartPole-v1" in written) == ours
    assert ("python -m rl_zoo3." in written) != ours
    assert "model-index" in written  # the metadata


def test_the_program_is_printed_by_its_short_name_where_it_is_on_the_path(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert cli._program(SCRIPT) == [SCRIPT]
    (tmp_path / "sb3-ppo-ext").write_text("another one")
    (tmp_path / "sb3-ppo-ext").chmod(0o755)
    assert cli._program(SCRIPT) == [SCRIPT]
    assert cli._program(str(tmp_path / "sb3-ppo-ext")) == ["sb3-ppo-ext"]
    assert cli._program("__main__.py") == [sys.executable, "-m", "sb3_ppo_ext.zoo"]


def test_the_command_to_continue_starts_as_many_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    module = [sys.executable, "-m", "sb3_ppo_ext.zoo"]
    assert summary._with_processes(module) == module
    several = {"RANK": "0", "WORLD_SIZE": "4", "MASTER_ADDR": "a", "MASTER_PORT": "1", "LOCAL_WORLD_SIZE": "2"}
    for name, value in several.items():
        monkeypatch.setenv(name, value)
    expected = ["torchrun", "--nproc-per-node", "2", "-m", "sb3_ppo_ext.zoo"]
    assert summary._with_processes(module) == summary._with_processes(["sb3-ppo-ext"]) == expected
