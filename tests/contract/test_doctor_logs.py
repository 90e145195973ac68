"""The doctor reads what Stable-Baselines3 logs, in each of its formats, and says what is wrong with a file."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from stable_baselines3.common.logger import Logger, configure

from sb3_ppo_ext.doctor.logs import LogError, read_runs
from sb3_ppo_ext.doctor.run import Run


def write(folder: Path, formats: Sequence[str], first: int = 0) -> None:
    """A log of four rows, of which the first has no update yet, and one is NaN."""
    logger = configure(str(folder), list(formats))
    write_rows(logger, first)
    logger.close()


def write_rows(logger: Logger, first: int = 0) -> None:
    for row in range(first, first + 4):
        logger.record("rollout/ep_rew_mean", 1.5 * row)
        logger.record("time/iterations", row, exclude="tensorboard")
        logger.record("time/total_timesteps", 100 * row, exclude="tensorboard")
        logger.record("note", 'a "text", with a comma', exclude="stdout")
        if row > first:
            logger.record("train/approx_kl", np.float32(np.nan if row == first + 2 else 0.01 * row))
            logger.record("train/value_loss", 1e-8 * row)
        logger.dump(step=100 * row)


def assert_as_written(run: Run) -> None:
    rewards, kl = run.series["rollout/ep_rew_mean"], run.series["train/approx_kl"]
    assert rewards.steps.tolist() == [0, 100, 200, 300]
    assert rewards.values.tolist() == [0.0, 1.5, 3.0, 4.5]
    assert kl.steps.tolist() == [100, 200, 300]
    np.testing.assert_allclose(kl.values, [0.01, np.nan, 0.03], rtol=1e-6)
    np.testing.assert_allclose(run.series["train/value_loss"].values, [1e-8, 2e-8, 3e-8], rtol=1e-6)
    assert "note" not in run.series
    assert (run.n_rows, run.n_steps) == (4, 300)


@pytest.mark.parametrize("log_format", ["csv", "json", "tensorboard"])
def test_every_format_is_read(log_format: str, tmp_path: Path) -> None:
    write(tmp_path, [log_format])
    (run,) = read_runs(tmp_path)
    assert run.name == tmp_path.name
    assert_as_written(run)
    (file,) = (path for path in tmp_path.iterdir() if path.suffix != ".txt")
    (run,) = read_runs(file)
    assert_as_written(run)


def test_one_run_in_several_formats_is_one_run(tmp_path: Path) -> None:
    write(tmp_path, ["csv", "json", "tensorboard"])
    (run,) = read_runs(tmp_path)
    assert_as_written(run)


def test_a_folder_may_have_many_runs(tmp_path: Path) -> None:
    write(tmp_path / "CartPole-v1" / "PPO_1", ["csv"])
    write(tmp_path / "CartPole-v1" / "PPO_2", ["json"])
    write(tmp_path / "A2C_1", ["tensorboard"])
    (tmp_path / "0.monitor.csv").write_text('#{"t_start": 0}\nr,l,t\n1.0,2,3.0\n')  # is no such log
    assert [run.name for run in read_runs(tmp_path)] == ["A2C_1", "CartPole-v1/PPO_1", "CartPole-v1/PPO_2"]


def test_event_files_of_a_training_that_went_on_are_one_run(tmp_path: Path) -> None:
    write(tmp_path, ["tensorboard"])
    write(tmp_path, ["tensorboard"], first=4)
    (run,) = read_runs(tmp_path)
    assert run.series["rollout/ep_rew_mean"].steps.tolist() == [0, 100, 200, 300, 400, 500, 600, 700]


@pytest.mark.parametrize("log_format", ["csv", "json", "tensorboard"])
def test_a_training_that_begins_again_takes_the_place_of_the_rows_beyond_its_steps(
    log_format: str, tmp_path: Path
) -> None:
    """As of a second ``learn()`` with the same logger, or of one that was resumed from a checkpoint."""
    logger = configure(str(tmp_path), [log_format])
    for step in (0, 150, 250, 900):
        logger.record("rollout/ep_rew_mean", -7.0)
        logger.record("time/total_timesteps", step, exclude="tensorboard")
        logger.dump(step=step)
    write_rows(logger, first=2)
    logger.close()
    (run,) = read_runs(tmp_path)
    rewards = run.series["rollout/ep_rew_mean"]
    assert rewards.steps.tolist() == [0, 150, 200, 300, 400, 500]
    assert rewards.values.tolist() == [-7.0, -7.0, 3.0, 4.5, 6.0, 7.5]


def test_one_log_that_cannot_be_read_does_not_hide_the_others(tmp_path: Path) -> None:
    """Such as that of a training that has just begun, which is empty."""
    write(tmp_path / "a", ["csv"])
    for name in ("b", "c"):
        (tmp_path / name).mkdir()
    (tmp_path / "b" / "progress.csv").touch()
    (tmp_path / "c" / "progress.json").write_text('{"time/total_timesteps": 1, "train/loss": 1' + 400 * "0" + "}\n")
    (tmp_path / "c" / "progress.csv").symlink_to("nowhere")
    errors: list[LogError] = []
    assert [run.name for run in read_runs(tmp_path, errors)] == ["a"]
    assert [str(error).split()[1:4] for error in errors] == [["is", "empty,", "or"], ["cannot", "be", "read:"]]
    with pytest.raises(LogError, match="is empty"):
        read_runs(tmp_path)
    with pytest.raises(LogError, match="is empty"):
        read_runs(tmp_path / "b", [])
    with pytest.raises(LogError, match="cannot be read: int too large"):
        read_runs(tmp_path / "c" / "progress.json")


def test_rows_of_an_evaluation_and_a_line_that_was_cut_off(tmp_path: Path) -> None:
    rows = [{"time/total_timesteps": 10, "eval/mean_reward": 1.0}, {"time/total_timesteps": 20, "train/loss": 2.0}]
    lines = [json.dumps(row) for row in rows]
    (tmp_path / "progress.json").write_text("\n".join([*lines, '{"time/total_timesteps": 30, "train/lo']))
    (run,) = read_runs(tmp_path)
    assert run.series["eval/mean_reward"].steps.tolist() == [10]
    assert run.series["train/loss"].steps.tolist() == [20]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("progress.csv", "", "is empty, or no log of Stable-Baselines3: it has no time/total_timesteps"),
        ("progress.csv", "r,l,t\n1.0,2,3.0\n", "it has no time/total_timesteps"),
        ("progress.csv", "time/total_timesteps,train/loss\nnan,1.0\n", "it has no time/total_timesteps"),
        ("progress.json", "no json\nat all\n", "cannot be read"),
        ("events.out.tfevents.1", "", "it has no scalars"),
        ("other.txt", "", "has no log in it: no progress.csv, progress.json or events.out.tfevents"),
        ("0.monitor.csv", "", "`sb3-ppo-ext train` writes one with --tensorboard-log FOLDER"),
    ],
)
def test_what_is_no_log_is_named(name: str, content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(LogError, match=message):
        read_runs(tmp_path)


def test_what_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(LogError, match=r"nowhere does not exist"):
        read_runs(tmp_path / "nowhere")


def test_without_tensorboard_its_logs_are_refused_in_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, ["tensorboard"])
    monkeypatch.setitem(sys.modules, "tensorboard.backend.event_processing.event_accumulator", None)
    with pytest.raises(LogError, match="which is missing here: pip install tensorboard"):
        read_runs(tmp_path)
