"""Ctrl-C at any moment: what was trained is saved and summed up, or nothing is left; never a traceback."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from gymnasium.envs.classic_control import CartPoleEnv
from stable_baselines3.common.callbacks import ProgressBarCallback
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm

from sb3_ppo_ext.zoo.interrupts import INTERRUPTED, Interrupts
from tests.contract.zoo import MODEL, RUN, SMALL, TRAIN, Command, error_line, printed_command, printed_reward

ROOT = Path(__file__).parents[2]
# As in a shell in the foreground, wherever the tests run: in the background, Ctrl-C is ignored.
BEGIN = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler);"


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT)}


@pytest.mark.slow
def test_ctrl_c_at_many_points_once_and_twice_and_in_a_terminal(tmp_path: Path) -> None:
    """A terminal sends it to all processes; those of the environments must not end before the training does."""
    code = f"{BEGIN} import runpy; runpy.run_module('tests.contract.interrupted', run_name='__main__')"
    command = [sys.executable, "-W", "ignore", "-c", code]
    run = subprocess.run(
        command, cwd=tmp_path, env=environment(), capture_output=True, text=True, start_new_session=True
    )
    assert run.returncode == 0, run.stderr
    assert "Traceback" not in run.stderr  # nor does any of the processes print one
    results: dict[str, dict[str, Any]] = json.loads(run.stdout)
    assert results["never"]["reward"]
    codes = set()
    for when, result in results.items():
        assert (result["presses"] == 0) == when.startswith("never"), when
        codes.add(result["code"])
        trained = result["code"] == 0
        expected = {"folder": trained, "model": trained, "summary": trained, "traceback": False}
        assert {name: result[name] for name in expected} == expected, (when, result)
    assert codes == {0, INTERRUPTED}
    assert results["read_hyperparameters, once"]["code"] == INTERRUPTED
    assert results["collect_rollouts, once"]["reward"]  # one Ctrl-C leaves time for the evaluation
    assert not results["collect_rollouts, twice"]["reward"]  # and two do not
    assert results["in a terminal"]["reward"]
    assert not results["in a terminal"]["error"]  # as of environments that have ended


def test_ctrl_c_in_the_first_seconds(tmp_path: Path) -> None:
    """They go into importing torch, which here is a package that is interrupted while it is imported."""
    package = tmp_path / "sb3_ppo_ext"
    package.mkdir()
    package.joinpath("__init__.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGINT)\nprint('late')")
    code = f"{BEGIN} import sys; sys.path[:0] = {[str(tmp_path), str(ROOT)]!r}; import sb3_ppo_ext_cli as c; c.main()"
    run = subprocess.run([sys.executable, "-S", "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert (run.returncode, run.stdout, run.stderr) == (INTERRUPTED, "", "")


def test_ctrl_c_in_the_background_is_ignored() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with Interrupts().handled():
            assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def raise_interrupt() -> None:
    """Where Ctrl-C is not handled, it is this."""
    raise KeyboardInterrupt


def interrupt_at(monkeypatch: pytest.MonkeyPatch, *steps: int, by: Callable[[], None] = raise_interrupt) -> None:
    """Let training be interrupted in these steps of the environment."""
    step = CartPoleEnv.step
    n_steps = 0

    def interrupted(self: CartPoleEnv, action: Any) -> Any:
        nonlocal n_steps
        n_steps += 1
        if n_steps in steps:
            by()
        return step(self, action)

    monkeypatch.setattr(CartPoleEnv, "step", interrupted)


def test_an_exception_once_is_summed_up(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupt_at(monkeypatch, 100)
    output = command(*TRAIN, "-n", "1000", *SMALL)
    assert "dual_clip_ppo on CartPole-v1, 99 steps of 1,000" in output
    assert "(from step 99 to 1,000; schedules go on where they are)" in output
    assert printed_command(output, "Continue the training:")[-2:] == ["-i", str(MODEL)]
    printed_reward(output)


def test_an_exception_in_the_closing_evaluation_takes_nothing(
    command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupt_at(monkeypatch, 100, 150)
    output = command(*TRAIN, "-n", "1000", *SMALL)
    assert "reward       not measured: Ctrl-C ended the evaluation" in output
    assert printed_command(output, "Continue the training:")[-2:] == ["-i", str(MODEL)]
    assert MODEL.is_file()
    assert not list(RUN.rglob("final_evaluation.json"))


@pytest.mark.filterwarnings("ignore::tqdm.TqdmExperimentalWarning")  # of SB3's own bar
def test_what_an_interrupt_has_broken_is_not_an_error(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    """As tqdm, in the middle of taking its lock."""

    def broken(self: ProgressBarCallback) -> bool:
        try:
            raise KeyboardInterrupt
        finally:
            raise RuntimeError("cannot release un-acquired lock")

    monkeypatch.setattr(ProgressBarCallback, "_on_step", broken)
    output = command(*TRAIN, "-n", "1000", "-P", *SMALL)
    assert "Ctrl-C ended the training, with RuntimeError: cannot release un-acquired lock" in output
    printed_reward(output)


def test_an_error_without_ctrl_c_is_one(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(self: OnPolicyAlgorithm, *args: Any) -> None:
        raise RuntimeError("mine")

    monkeypatch.setattr(CartPoleEnv, "step", fails)
    with pytest.raises(RuntimeError, match=r"^mine$"):
        command(*TRAIN, "-n", "1000", *SMALL)


def test_before_training_nothing_is_left(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("rl_zoo3.exp_manager.ExperimentManager._save_config", interrupted)
    assert error_line(command(*TRAIN, "-n", "1000", code=INTERRUPTED)) == "sb3-ppo-ext train: ended by Ctrl-C"
    assert not RUN.exists()


def test_a_search_that_is_interrupted_at_once(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupt_at(monkeypatch, 1, by=lambda: signal.raise_signal(signal.SIGINT))
    output = command(*TRAIN, "-n", "200", "-optimize", "--n-trials", "1", "--no-optim-plots", code=INTERRUPTED)
    assert error_line(output) == "sb3-ppo-ext train: ended by Ctrl-C"
