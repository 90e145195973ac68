"""A task for studies that is learnt in no time, or held up for as long as a test needs; for ``--gym-packages``."""

import multiprocessing
import os
import time
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import optuna
import yaml
from rl_zoo3.hyperparams_opt import HYPERPARAMS_CONVERTER, HYPERPARAMS_SAMPLER
from stable_baselines3.common.torch_layers import FlattenExtractor

ALGO, ENV = "dual_clip_ppo", "Held-v0"
ENTRY = {"n_timesteps": 64, "policy": "MlpPolicy", "n_steps": 32, "batch_size": 32, "n_epochs": 1, "ent_coef": 0.25}


class Held(gym.Env[Any, Any]):
    """
    Ten steps, each with a reward for the action that the observation's first number says.

    :param hold: nothing happens while there is a file of this name
    """

    observation_space = gym.spaces.Box(-1.0, 1.0, (2,), np.float32)
    action_space = gym.spaces.Discrete(2)

    def __init__(self, hold: str = "hold") -> None:
        self.hold = Path(hold).absolute()
        self.n_steps = 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.n_steps = 0
        return self._observe(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        while self.hold.exists():
            time.sleep(0.02)
        self.n_steps += 1
        reward = float(action == (self.observation[0] > 0.0))
        return self._observe(), reward, self.n_steps == 10, False, {}

    def _observe(self) -> Any:
        self.observation = self.np_random.uniform(-1.0, 1.0, 2).astype(np.float32)
        return self.observation


class Marker(FlattenExtractor):
    """
    Adds a line to a file when it is built.

    :param observation_space: of the environment
    :param marker: the file
    """

    def __init__(self, observation_space: gym.Space[Any], marker: str) -> None:
        super().__init__(observation_space)
        with Path(marker).open("a") as file:
            file.write(f"{os.getpid()}\n")


def convert(sampled_params: dict[str, Any]) -> dict[str, Any]:
    """What rl_zoo3's converters return: numbers under other names, and classes."""
    arguments = {name: value for name, value in sampled_params.items() if name not in ("one_minus_gamma", "hidden")}
    network = {"net_arch": {"pi": [sampled_params["hidden"]], "vf": [8]}, "activation_fn": __import__("torch").nn.ReLU}
    return {**arguments, "gamma": 1 - sampled_params["one_minus_gamma"], "policy_kwargs": network}


def sample(trial: optuna.Trial, n_actions: int, n_envs: int, additional_args: dict[str, Any]) -> dict[str, Any]:
    return convert(
        {
            "one_minus_gamma": trial.suggest_float("one_minus_gamma", 0.01, 0.1),
            "learning_rate": trial.suggest_float("learning_rate", 1e-3, 1e-1, log=True),
            "hidden": trial.suggest_categorical("hidden", [4, 8]),
        }
    )


if ENV not in gym.registry:
    gym.register(ENV, Held)  # type: ignore[arg-type]
if multiprocessing.parent_process() is not None:  # in a worker; other tests of this process keep the real space
    HYPERPARAMS_SAMPLER[ALGO], HYPERPARAMS_CONVERTER[ALGO] = sample, convert


def arguments(folder: Path, n_trials: int, *more: str) -> list[str]:
    """
    :param folder: gets the entry
    :param n_trials: of the study
    :param more: is added
    :return: a command line that searches
    """
    (folder / "held.yml").write_text(yaml.safe_dump({ENV: ENTRY}))
    start = ["study", "run", "--algo", ALGO, "--env", ENV, "-conf", "held.yml", "--gym-packages", __name__]
    return [*start, "--device", "cpu", "--eval-episodes", "1", "--max-total-trials", str(n_trials), *more]
