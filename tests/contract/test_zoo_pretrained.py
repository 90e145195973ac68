"""``train -i`` goes on: with the steps made, the schedules at their place, and the agent's own statistics."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import VecNormalize

from sb3_ppo_ext import REINFORCE, DualClipPPO
from tests.contract.zoo import RUN, SMALL, TRAIN, Command, error_line, load, printed_command, run_folder

QUICK = ["--eval-freq", "-1", "--verbose", "0"]


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The remaining progress, which all schedules follow, at each update from now on."""
    progress: list[float] = []
    train = DualClipPPO.train

    def noted(self: DualClipPPO) -> None:
        progress.append(self._current_progress_remaining)
        train(self)

    monkeypatch.setattr(DualClipPPO, "train", noted)
    return progress


def test_an_unfinished_training_makes_the_rest(command: Command, seen: list[float]) -> None:
    command(*TRAIN, *QUICK, "-n", "512", "--save-freq", "128", *SMALL)
    whole = list(seen)
    seen.clear()
    output = command(*TRAIN, *QUICK, "-n", "512", "-tb", "tb", *SMALL, "-i", str(RUN / "rl_model_128_steps.zip"))
    assert "Continuing from step 128 to 512" in output
    assert seen == whole[2:] == [pytest.approx(1 - steps / 512) for steps in range(192, 513, 64)]
    model = load(run_folder(2) / "CartPole-v1.zip")
    assert model.num_timesteps == 512
    assert (
        "(from step 512 to 1,024; a schedule such as lin_0.2 goes on as that of the longer training, at 50% of"
        in output
    )


def test_a_finished_training_makes_as_many_again_as_the_summary_says(command: Command, seen: list[float]) -> None:
    output = command(*TRAIN, *QUICK, "-n", "128", *SMALL)
    assert "(from step 128 to 256;" in output
    proceed = printed_command(output, "Continue the training:")
    seen.clear()
    output = command(*proceed[1:])
    assert "The agent was already trained for 128 steps: it is trained for as many again" in output
    assert seen == [pytest.approx(1 - 192 / 256), 0.0]  # not at its start again
    assert load(run_folder(2) / "CartPole-v1.zip").num_timesteps == 256


def test_what_was_interrupted_on_its_way_beyond_the_budget_is_asked_for_the_rest(
    command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    command(*TRAIN, *QUICK, "-n", "128", *SMALL)

    def interrupted(self: DualClipPPO) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(DualClipPPO, "train", interrupted)
    output = command(*TRAIN, *QUICK, "-n", "128", *SMALL, "-i", str(RUN / "CartPole-v1.zip"))
    assert "dual_clip_ppo on CartPole-v1, 192 steps of 256" in output
    assert "(from step 192 to 256; schedules go on where they are)" in output
    proceed = printed_command(output, "Continue the training:")
    assert proceed[proceed.index("-n") + 1] == "256"


def test_the_log_of_another_run_is_not_written_on(command: Command) -> None:
    command(*TRAIN, *QUICK, "-n", "64", "-tb", "tb", *SMALL)
    command(*TRAIN, *QUICK, "-n", "64", "-tb", "tb", *SMALL, "--seed", "1")
    before = {file: file.stat().st_size for file in Path("tb").rglob("events.*")}
    command(*TRAIN, *QUICK, "-n", "128", "-tb", "tb", *SMALL, "-i", str(RUN / "CartPole-v1.zip"))
    assert {file: file.stat().st_size for file in before} == before
    assert len(list(Path("tb/CartPole-v1/DualClipPPO_3").glob("events.*"))) == 1


def test_the_policy_of_an_agent_that_goes_on_is_not_changed(command: Command) -> None:
    command(*TRAIN, *QUICK, "-n", "64", *SMALL)
    more = ["-n", "128", *SMALL, "policy_kwargs:{net_arch: [8]}", "-i", str(RUN / "CartPole-v1.zip")]
    assert "with -i, 'policy_kwargs' cannot be changed: the agent was created with it" in error_line(
        command(*TRAIN, *more, code=1)
    )


def test_another_algorithms_agent_is_refused(command: Command) -> None:
    command(*TRAIN, *QUICK, "-n", "64", *SMALL)
    output = error_line(command("train", "--algo", "trpo_ext", "-n", "128", "-i", str(RUN / "CartPole-v1.zip"), code=1))
    assert "TRPO" in output
    assert "DualClipPPO" in output


def config(**entry: Any) -> str:
    """The name of a configuration with a safe checkpoint after every rollout."""
    small = {"n_timesteps": 256, "policy": "MlpPolicy", "n_steps": 64, "batch_size": 64, "n_epochs": 1}
    name = "sb3_ppo_ext.common.checkpoint.SafeCheckpointCallback"
    callback = [{name: {"save_freq": 64, "save_path": "checkpoints", "keep_last": None}}]
    Path("mine.yml").write_text(yaml.safe_dump({"CartPole-v1": {**small, "callback": callback, **entry}}))
    return "mine.yml"


def n_seen(run: Path) -> float:
    """How many observations the statistics of a training are of."""
    env = VecNormalize.load(str(run / "CartPole-v1" / "vecnormalize.pkl"), make_vec_env("CartPole-v1"))
    return float(env.obs_rms.count)


@pytest.mark.parametrize("agent", ["checkpoints/rl_model_128_steps.zip", RUN / "rl_model_128_steps.zip"])
def test_the_statistics_of_a_checkpoint_are_taken_over(command: Command, agent: str | Path) -> None:
    """Of a safe one, where they are in the file; of rl_zoo3's, where they are beside it."""
    arguments = [*TRAIN, *QUICK, "-conf", config(normalize=True)]
    command(*arguments, "--save-freq", "128")
    assert (RUN / "rl_model_vecnormalize_128_steps.pkl").is_file()
    for later in (192, 256):  # as if the training had been killed at 128
        Path(f"checkpoints/rl_model_{later}_steps.zip").unlink()
    output = command(*arguments, "-i", str(agent))
    assert f"Statistics of VecNormalize from {Path(agent).parent}/rl_model_" in output
    # 128 steps before the checkpoint and 128 after it, and the resets' observations
    assert n_seen(run_folder(2)) == pytest.approx(256, abs=10)
    assert load(run_folder(2) / "CartPole-v1.zip").num_timesteps == 256
    assert Path("checkpoints/rl_model_256_steps.zip").is_file()  # in the same folder as before


def test_statistics_that_do_not_fit_are_refused(command: Command) -> None:
    command(*TRAIN, *QUICK, "-conf", config(normalize=True))
    agent = "checkpoints/rl_model_128_steps.zip"
    output = error_line(command(*TRAIN, "-conf", config(normalize=False), "-i", agent, code=1))
    assert f"normalize=False does not fit an agent that was trained with those in {agent}" in output
    output = error_line(command(*TRAIN, "-conf", config(normalize={"clip_obs": 2.0}), "-i", agent, code=1))
    assert f"normalize with clip_obs=2.0 does not fit {agent}, which has clip_obs=10.0" in output


def test_an_agent_without_statistics_is_not_given_fresh_ones(command: Command) -> None:
    command(*TRAIN, *QUICK, "-conf", config())
    output = error_line(command(*TRAIN, "-conf", config(normalize=True), "-i", str(RUN / "CartPole-v1.zip"), code=1))
    assert "normalize=True does not fit an agent that was trained without any in" in output
    assert not run_folder(2).exists()


def test_an_agent_of_ours_is_refused_by_an_algorithm_that_cannot_go_on_with_it(
    command: Command, tmp_path: Path
) -> None:
    """Also by SB3's own, whose ``load`` takes any file."""
    REINFORCE("MlpPolicy", "CartPole-v1", device="cpu").save(tmp_path / "agent.zip")
    arguments = ["train", "--algo", "ppo", "--env", "CartPole-v1", "-n", "64", "-i", str(tmp_path / "agent.zip")]
    assert "was saved by sb3_ppo_ext.REINFORCE, and --algo ppo cannot continue it" in error_line(
        command(*arguments, code=1)
    )


@pytest.mark.parametrize("normalize", ["maybe", "dict(norm_ob=False)"])
def test_a_normalisation_that_there_is_not_is_one_line(command: Command, normalize: str) -> None:
    line = error_line(command(*TRAIN, "-n", "64", "--eval-freq", "-1", "-params", f"normalize:{normalize}", code=1))
    assert "-params, CartPole-v1: normalize=" in line
    assert "cannot be used; " in line
