"""
Trains many times with ``sb3-ppo-ext train``, each time with Ctrl-C at another point, and prints what came of each.

A program of its own: an exception in the middle of anything leaves things behind (torch without gradients, open files)
that are of no importance in a process that ends, and would be in the process of the tests. And what a terminal
interrupts, the last training, is all processes of a group.
"""

import contextlib
import io
import json
import multiprocessing
import os
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

ARGUMENTS = [*TRAIN, "-n", "128", "--seed", "0", "--eval-freq", "64", "--eval-episodes", "1", "-P", "-tb", "tb", *SMALL]

# Functions in whose first call Ctrl-C is pressed, from the first that is called to the last; and how many calls later
# it is pressed again, in a second training.
FUNCTIONS: dict[str, int | None] = {
    "parse_args": None,
    "read_hyperparameters": None,
    "create_log_folder": 0,
    "make_vec_env": None,
    "_save_config": 30,
    "learn": None,
    "collect_rollouts": 0,
    "external_write_mode": 30,
    "_update_learning_rate": 3000,
    "on_training_end": None,
    "save_trained_model": 30,
    "save": None,
    "_reward": 3000,
}


def trained(
    presses: Callable[[int, str], int],
    *more: str,
    group: bool = False,
) -> tuple[dict[str, Any], int]:
    """
    :param presses: given the number and the name of a call of a function, how often Ctrl-C is pressed in it
    :param more: arguments of ``train``
    :param group: whether Ctrl-C reaches all processes, as in a terminal, and not this one alone
    :return: what came of a training, and how many functions were called
    """
    shutil.rmtree("logs", ignore_errors=True)
    th.set_grad_enabled(True)
    n_calls = n_presses = 0

    def profile(frame: FrameType, event: str, argument: Any) -> None:
        nonlocal n_calls, n_presses
        if event == "call":
            n_calls += 1
            for _ in range(presses(n_calls, frame.f_code.co_name)):
                n_presses += 1
                if group:
                    os.killpg(0, signal.SIGINT)
                else:
                    signal.raise_signal(signal.SIGINT)

    said: Any = io.StringIO()
    said.name = "<stdout>"  # SB3's logger writes there by way of the progress bar
    sys.argv = ["sb3-ppo-ext", *ARGUMENTS, *more]
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
        "presses": n_presses,
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
    for function, later in FUNCTIONS.items():
        results[f"{function}, once"], _ = trained(in_first(function, None))
        if later is not None:
            results[f"{function}, twice"], _ = trained(in_first(function, later))
    for part in (2, 5, 8):
        results[f"after {part} of 10"], _ = trained(at(n_calls * part // 10))
    multiprocessing.set_forkserver_preload(["stable_baselines3"])  # or each process would import it anew
    results["in a terminal"], _ = trained(in_first("collect_rollouts", None), "--vec-env", "subproc", group=True)
    print(json.dumps(results))
