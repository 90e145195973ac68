"""What a user of torchrun relies on."""

from __future__ import annotations

import re
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch as th
from stable_baselines3.common.vec_env import VecNormalize

from sb3_ppo_ext import DualClipPPO
from sb3_ppo_ext.common.checkpoint import latest_checkpoint, resume
from tests.algorithms import ROLLOUT, parameters
from tests.contract.one_of_several import Watched
from tests.contract.zoo import MODEL, RUN, load
from tests.envs import scripted
from tests.processes import in_new_process
from tests.several import Ended, run

MOMENTS = [0.1, 0.27]  # seconds; where that is in the training depends on the machine. benchmarks/kills.py has more
SCENARIOS = {
    "usual": 2,
    "broken": 3,
    "broken in an update": 2,
    "again": 2,
    "interrupted": 2,
    "killed": 2,
    "differing": 2,
    "gamma changed": 2,
    "absent": 2,
    "zoo": 2,
    **{f"killed at {moment}": 2 for moment in MOMENTS},
}
PER_ROLLOUT = 2 * 2 * ROLLOUT  # two processes with two environments


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, list[Ended]]]:
    """The folder, and how the processes of each scenario have ended. If they hung, it would be for a day."""
    folder = tmp_path_factory.mktemp("processes")
    return folder, run("tests.contract.one_of_several", folder, SCENARIOS)


@pytest.fixture(scope="module")
def usual(ended: tuple[Path, dict[str, list[Ended]]]) -> tuple[Path, tuple[str, ...], list[dict[str, Any]]]:
    """The folder, what two processes have said, and what came of it."""
    folder, of_scenarios = ended
    statuses, said = zip(*of_scenarios["usual"], strict=True)
    assert statuses == (0, 0), "\n".join(said)
    return folder, said, [th.load(folder / f"{rank}.pt", weights_only=False) for rank in range(2)]


def of(usual: Any, scenario: str) -> tuple[dict[str, Any], dict[str, Any]]:
    first, second = (result[scenario] for result in usual[2])
    return first, second


def test_all_learn_one_model_from_rollouts_of_their_own(usual: Any) -> None:
    first, second = of(usual, "learnt")
    assert all(map(th.equal, first["parameters"], second["parameters"]))
    assert not np.isin(first["seen"], second["seen"]).any()


def test_steps_are_counted_over_all(usual: Any) -> None:
    first, second = of(usual, "learnt")
    assert first["num_timesteps"] == second["num_timesteps"] == 2 * PER_ROLLOUT  # more than 100
    assert first["timesteps_at_end"] == 2 * PER_ROLLOUT


def test_the_first_process_logs_and_has_the_callbacks(usual: Any) -> None:
    first, second = of(usual, "learnt")
    assert (first["n_calls"], second["n_calls"]) == (2 * ROLLOUT, 0)
    assert first["n_episodes"] == second["n_episodes"] > 0
    _, (said_by_first, said_by_second), _ = usual
    assert re.search(rf"total_timesteps +\| {2 * PER_ROLLOUT} ", said_by_first)
    assert "total_timesteps" not in said_by_second


def test_statistics_of_vec_normalize_are_of_what_all_have_seen(usual: Any) -> None:
    first, second = of(usual, "learnt")
    for of_first, of_second in zip(first["statistics"], second["statistics"], strict=True):
        for one, other in zip(of_first, of_second, strict=True):
            np.testing.assert_array_equal(one, other)
    mean, variance, count = first["statistics"][0]
    seen = np.concatenate([first["seen"], second["seen"]]).astype(np.float64)
    assert count == pytest.approx(len(seen), abs=1e-3)
    np.testing.assert_allclose(mean, seen.mean(axis=0), atol=1e-5)
    np.testing.assert_allclose(variance, seen.var(axis=0), atol=1e-5)


@pytest.mark.parametrize("scenario", ["stopped", "stopped REINFORCE"])
def test_a_callback_that_ends_the_training_ends_it_for_all(scenario: str, usual: Any) -> None:
    first, second = of(usual, scenario)
    assert first["num_timesteps"] == second["num_timesteps"]
    assert first["num_timesteps"][0] < 10_000 < 10_000 + first["num_timesteps"][1]
    assert all(map(th.equal, first["parameters"], second["parameters"]))


def test_checkpoints_are_of_the_first_and_resumed_by_any_number(usual: Any) -> None:
    first, second = of(usual, "checkpointed")
    assert first["before"][0] == second["before"][0] == 4 * PER_ROLLOUT
    assert all(map(th.equal, first["parameters"], second["parameters"]))
    assert not all(map(th.equal, first["parameters"], first["before"][1]))
    assert not np.isin(first["seen"], second["seen"]).any()  # although both have resumed one file
    path = latest_checkpoint(usual[0] / "checkpoints")
    assert path is not None
    alone = resume(DualClipPPO, path, VecNormalize(Watched(scripted())))
    assert all(map(th.equal, parameters(alone), first["before"][1]))
    alone.learn(100, reset_num_timesteps=False)
    assert alone.num_timesteps == 4 * PER_ROLLOUT + 4 * 2 * ROLLOUT


@pytest.mark.parametrize(
    ("scenario", "words"),
    [
        ("broken", "process 2 has failed: OverflowError: the pole has left the cart"),
        ("broken in an update", "process 1 has failed: OverflowError: the pole has left the cart"),
        ("interrupted", "process 1 has failed: KeyboardInterrupt"),
        ("killed", "another process has ended without reporting an error"),
    ],
)
def test_a_process_that_fails_ends_all(scenario: str, words: str, ended: Any) -> None:
    *others, last = ended[1][scenario]
    assert last.status != 0
    for other in others:
        assert other.status != 0
        assert f"ProcessError: This process ends, because {words}" in other.said


def test_after_a_failure_the_processes_do_not_train_on(ended: Any) -> None:
    for process in ended[1]["again"]:
        assert process.status != 0
        assert (
            "ProcessError: The processes have left each other, as a training of this model has failed" in process.said
        )
        assert "OverflowError: the pole has left the cart" in process.said


def test_a_process_that_never_comes_is_not_waited_for_forever(ended: Any) -> None:
    first, _ = ended[1]["absent"]
    assert first.status != 0
    assert "ProcessError: Not all of the 2 processes have connected within 1 seconds: one has not started" in first.said


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_process_may_be_killed_at_any_moment(moment: float, ended: Any) -> None:
    folder, of_scenarios = ended
    first, second = of_scenarios[f"killed at {moment}"]
    assert (first.status, second.status) == (1, -signal.SIGALRM)
    assert "ProcessError: This process ends, because another process has ended without reporting an error" in first.said
    checkpoints = list((folder / f"killed at {moment}").glob("*.zip"))
    assert all(DualClipPPO.load(path).num_timesteps > 0 for path in checkpoints)


def test_processes_that_differ_are_told_so(ended: Any) -> None:
    for process in ended[1]["differing"]:
        assert process.status != 0
        assert "in process 1, gamma is 0.91, and 0.9 in process 0. All must" in process.said


def test_a_hyper_parameter_that_a_callback_changes_is_an_error(ended: Any) -> None:
    for process in ended[1]["gamma changed"]:
        assert process.status != 0
        assert "in process 1, gamma is 0.99, and 0.5 in process 0. All must" in process.said


def test_parameters_that_a_callback_changes_are_those_of_all(usual: Any) -> None:
    first, second = of(usual, "changed")
    assert first["bias"] == second["bias"] > 2.0  # it was set to 3
    assert all(map(th.equal, first["parameters"], second["parameters"]))


def test_all_act_by_the_same_statistics_of_batch_normalization(usual: Any) -> None:
    first, second = of(usual, "changed")
    assert len(first["running_means"]) == len(second["running_means"]) == 2
    assert all(map(th.equal, first["running_means"], second["running_means"]))
    assert first["running_means"][1].any()


def test_the_zoo_makes_one_training_of_several_processes(ended: Any) -> None:
    folder, of_scenarios = ended
    (status, first), (status_of_other, other) = of_scenarios["zoo"]
    assert (status, status_of_other) == (0, 0), first + other
    folder = folder / "zoo"
    files = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    runs = {name.split("/")[2] for name in files if name.startswith("logs/")}
    assert runs == {RUN.name}
    assert {f"{RUN}/{name}" for name in ("0.monitor.csv", "best_model.zip", "CartPole-v1/config.yml")} <= files
    assert not any("1.monitor.csv" in name for name in files)
    assert len({name for name in files if "tfevents" in name}) == 1
    # Steps are counted over both: 256 in all, a checkpoint each 64, an evaluation each 128.
    assert load(folder / MODEL).num_timesteps == 256
    saved = {name for name in files if "rl_model_" in name and name.endswith("steps.zip")}
    assert len(saved) == 4
    assert list(np.load(folder / RUN / "evaluations.npz")["timesteps"].shape) == [2]
    for said in (first, other):
        assert "--algo ppo is not allowed under torchrun" in said
        assert "-optimize is not allowed under torchrun" in said
    assert "Saving to" in first
    assert "Saving to" not in other
    assert "====" not in other


def test_nothing_of_it_is_imported_by_one_process() -> None:
    in_new_process(
        "from sb3_ppo_ext import DualClipPPO; "
        "DualClipPPO('MlpPolicy', 'CartPole-v1', n_steps=8, batch_size=8).learn(8); "
        "assert not [name for name in sys.modules if 'process_group' in name and 'sb3_ppo_ext' in name]"
    )
