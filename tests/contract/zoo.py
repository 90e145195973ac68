"""What the tests of the command ``sb3-ppo-ext`` share; the fixture ``command`` is in ``conftest.py``."""

import re
import shlex
import sys
from pathlib import Path
from typing import Any, Protocol

from sb3_ppo_ext import DualClipPPO

SCRIPT = str(Path(sys.executable).with_name("sb3-ppo-ext"))
TRAIN = ["train", "--algo", "dual_clip_ppo", "--env", "CartPole-v1", "--device", "cpu"]
RUN = Path("logs/dual_clip_ppo/CartPole-v1_1")
MODEL = RUN / "CartPole-v1.zip"
SMALL = ["-params", "n_envs:1", "n_steps:64", "batch_size:64", "n_epochs:1"]


class Command(Protocol):
    def __call__(self, *arguments: str, code: int = 0) -> str: ...


def load(path: Path) -> Any:
    """The trained model, as :class:`DualClipPPO`; ``Any``, since its schedules are typed as what a user may give."""
    return DualClipPPO.load(path, device="cpu")


def run_folder(number: int) -> Path:
    """Of the training with that number."""
    return RUN.with_name(f"CartPole-v1_{number}")


def printed_command(output: str, title: str) -> list[str]:
    """What stands in the closing summary below a title."""
    lines = output.splitlines()
    return shlex.split(lines[lines.index(title) + 1])


def printed_reward(output: str) -> tuple[float, float]:
    found = re.search(r"reward +(\S+) \+/- (\S+) \(mean and std of 20 episodes", output)
    assert found is not None, output
    return float(found[1]), float(found[2])


def said(output: str) -> str:
    """The one line that a refused command ends with."""
    assert "Traceback" not in output
    return output.strip().splitlines()[-1]
