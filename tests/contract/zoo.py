"""What the tests of the command ``sb3-ppo-ext`` share; the fixtures are in ``conftest.py``."""

import re
import shlex
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import optuna
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState

from sb3_ppo_ext import DualClipPPO
from sb3_ppo_ext.zoo.study.candidates import stored_results
from sb3_ppo_ext.zoo.study.parser import study_parser
from sb3_ppo_ext.zoo.study.study import ZooStudy, create_study, find_study
from sb3_ppo_ext.zoo.study.task import Task
from sb3_ppo_ext.zoo.study.trials import BUDGET, WORKER
from tests.contract import held

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


STUDY = f"{held.ALGO}_{held.ENV}"
STUDY_FOLDER = Path("logs/studies", STUDY)


def journal(path: Path = STUDY_FOLDER / "study.log") -> JournalStorage:
    return JournalStorage(JournalFileBackend(str(path)))


def load_study(folder: Path = STUDY_FOLDER, name: str = STUDY) -> optuna.Study:
    return optuna.load_study(storage=journal(folder / "study.log"), study_name=name)


def trial_states() -> dict[str, int]:
    return Counter(trial.state.name for trial in load_study().trials)


def finished_study(folder: Path, *values: float, more: tuple[str, ...] = ()) -> ZooStudy:
    """What ``study run`` leaves behind after complete trials with these values."""
    options = study_parser([held.ALGO]).parse_known_args(held.arguments(folder, 1, *more)[1:])[0]
    study = create_study(options)
    study.set_task(Task.from_options(options))
    for number, value in enumerate(values):
        gamma, rate, hidden = 0.01 * (number + 1), 0.05 / (number + 1), 4 + 4 * (number % 2)
        drawn = {"one_minus_gamma": gamma, "learning_rate": rate, "hidden": hidden}
        fixed = optuna.trial.FixedTrial(drawn)
        held.sample(fixed, 2, 1, {})  # type: ignore[arg-type]
        study.optuna_study.add_trial(
            optuna.trial.create_trial(
                params=drawn, distributions=fixed.distributions, value=value, user_attrs={BUDGET: [64, 1]}
            )
        )
    return study


def stored_rows() -> list[dict[str, Any]]:
    """The results of ``study evaluate``."""
    return list(stored_results(find_study(study_parser([]).parse_args(["show"]))).values())


def wait_for(condition: Callable[[], Any]) -> Any:
    deadline = time.monotonic() + 120
    while not (result := condition()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return result


def in_background(act: Callable[[], None]) -> threading.Thread:
    thread = threading.Thread(target=act, daemon=True)
    thread.start()
    return thread


def two_running_trials(load: Callable[[], optuna.Study] = load_study) -> dict[str, int]:
    """The numbers of two trials by the processes that run them, as soon as there are two; for :func:`wait_for`."""
    if not (STUDY_FOLDER.parent.exists() and list(STUDY_FOLDER.parent.glob("*/worker-2.log"))):
        return {}
    trials = load().get_trials(states=[TrialState.RUNNING])
    workers = {trial.user_attrs[WORKER]: trial.number for trial in trials if WORKER in trial.user_attrs}
    return workers if len(workers) == 2 else {}
