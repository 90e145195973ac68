"""What tests of the command ``sb3-ppo-ext`` are given."""

import multiprocessing
import sys
from pathlib import Path

import pytest
import rl_zoo3.train
from rl_zoo3.exp_manager import ExperimentManager
from rl_zoo3.hyperparams_opt import HYPERPARAMS_CONVERTER

from sb3_ppo_ext.zoo.cli import main
from tests.contract import held
from tests.contract.zoo import SCRIPT, Command

if "forkserver" in multiprocessing.get_all_start_methods():
    # Whichever test starts the server: each process of a study would import torch for itself otherwise.
    multiprocessing.set_forkserver_preload(["sb3_ppo_ext.zoo.cli", "rl_zoo3.train", "torch._dynamo", "pandas"])


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """Runs ``sb3-ppo-ext`` in this process, in an empty folder, and returns what it has printed."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str, code: int = 0) -> str:
        monkeypatch.setattr(sys, "argv", [SCRIPT, *arguments])
        monkeypatch.setattr(sys, "path", list(sys.path))
        try:
            ended = main()
        except SystemExit as error:  # of argparse
            ended = error.code if isinstance(error.code, int) else 1
        captured = capsys.readouterr()
        assert ended == code, captured.out + captured.err
        assert vars(rl_zoo3.train)["ExperimentManager"] is ExperimentManager
        return captured.out + captured.err

    return run


@pytest.fixture
def held_space(monkeypatch: pytest.MonkeyPatch) -> None:
    """This process converts what trials of :mod:`tests.contract.held` have drawn; the workers do so anyway."""
    monkeypatch.setitem(HYPERPARAMS_CONVERTER, held.ALGO, held.convert)
