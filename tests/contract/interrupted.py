"""
Trains many times with ``sb3-ppo-ext train``, each time with Ctrl-C at another point, and prints what came of each.

A program of its own: an exception in the middle of anything leaves things behind (torch without gradients, open files)
that are of no importance in a process that ends, and would be in the process of the tests.
"""

import contextlib
import io
import json
import shutil
import signal
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import torch as th

from sb3_ppo_ext.zoo import summary
from sb3_ppo_ext.zoo.cli import main
from tests.contract.zoo import RUN, SMALL, TRAIN

ARGUMENTS = [*TRAIN, "-n", "192", "--seed", "0", "--eval-freq", "64", "--eval-episodes", "1", "-P", "-tb", "tb", *SMALL]

# Functions in whose first call Ctrl-C is pressed, from the first that is called to the last.
FUNCTIONS = (
    "parse_args",
    "read_hyperparameters",
    "create_log_folder",
    "make_vec_env",
    "_save_config",
    "learn",
    "collect_rollouts",
    "external_write_mode",
    "train",
    "on_training_end",
    "save_trained_model",
    "save",
    "_reward",
)


def trained(presses: Callable[[int, str], int]) -> tuple[dict[str, Any], int]:
    """
    :param presses: given the number and the name of a call of a function, how often Ctrl-C is pressed in it
    :return: what came of a training, and how many functions were called
    """
    shutil.rmtree("logs", ignore_errors=True)
    th.set_grad_enabled(True)
    n_calls = 0

    def profile(frame: FrameType, event: str, argument: Any) -> None:
        nonlocal n_calls
        if event == "call":
            n_calls += 1
            for _ in range(presses(n_calls, frame.f_code.co_name)):
                signal.raise_signal(signal.SIGINT)

    said = io.StringIO()
    sys.argv = ["sb3-ppo-ext", *ARGUMENTS]
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        sys.setprofile(profile)
        try:
            code: Any = main()
        except BaseException as error:
            code = repr(error)
        finally:
            sys.setprofile(None)
    result = {
        "code": code,
        "folder": RUN.exists(),
        "model": (RUN / "CartPole-v1.zip").is_file(),
        "summary": "Continue the training:" in said.getvalue(),
        "reward": "mean and std of 2 episodes" in said.getvalue(),
        "traceback": "Traceback" in said.getvalue(),
        "said": said.getvalue()[-1000:],
    }
    return result, n_calls


def in_first(name: str, later: int | None) -> Callable[[int, str], int]:
    """
    :param name: of a function
    :param later: so many calls after its first call Ctrl-C is pressed again, if at all
    """
    first = 0

    def presses(number: int, called: str) -> int:
        nonlocal first
        if not first and called == name:
            first = number
        return int(number == first) + int(later is not None and first > 0 and number == first + later)

    return presses


def at(number: int) -> Callable[[int, str], int]:
    """
    :param number: of the call in which Ctrl-C is pressed
    """
    return lambda called, name: int(called == number)


if __name__ == "__main__":
    summary.N_EPISODES = 2
    results: dict[str, dict[str, Any]] = {}
    results["never"], _ = trained(lambda number, name: 0)
    results["never again"], n_calls = trained(lambda number, name: 0)  # without what is imported the first time
    for i, function in enumerate(FUNCTIONS):
        for again in (None, (0, 30, 3000)[i % 3]):
            results[f"{function}, {again}"], _ = trained(in_first(function, again))
    for part in range(1, 10):
        results[f"after {part} of 10"], _ = trained(at(n_calls * part // 10))
    print(json.dumps(results))
