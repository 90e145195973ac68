"""
Do two checkouts train the same agents, to the bit? Record in each, on one machine, and compare::

    python -m benchmarks.recordings record before.pt
    python -m benchmarks.recordings record after.pt        # in the other checkout
    python -m benchmarks.recordings compare before.pt after.pt

A recording holds the parameters and the optimiser's moments after three updates, for the four algorithms, five kinds of
problems, eager and compiled. Run it before and after code is moved: what differs has to be explained.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.env_util import make_vec_env

from sb3_ppo_ext import REINFORCE, TRPO, AdaptiveKLPPO, DualClipPPO

BOX = spaces.Box(-1.0, 1.0, (4,), np.float32)
IMAGE = spaces.Box(0, 255, (3, 36, 36), np.uint8)
TORQUES = spaces.Box(-1.0, 1.0, (2,), np.float32)

PROBLEMS: dict[str, tuple[str, spaces.Space[Any], spaces.Space[Any], dict[str, Any]]] = {
    "discrete": ("MlpPolicy", BOX, spaces.Discrete(3), {}),
    "box": ("MlpPolicy", BOX, TORQUES, {}),
    "dict": ("MultiInputPolicy", spaces.Dict({"vector": BOX, "choice": spaces.Discrete(3)}), TORQUES, {}),
    "images": ("CnnPolicy", IMAGE, spaces.Discrete(3), {}),
    "gsde": ("MlpPolicy", BOX, TORQUES, {"use_sde": True, "sde_sample_freq": 4}),
}
SIZES: dict[Any, dict[str, Any]] = {
    DualClipPPO: {"n_steps": 32, "batch_size": 16, "n_epochs": 2},
    AdaptiveKLPPO: {"n_steps": 32, "batch_size": 16, "n_epochs": 2},
    TRPO: {"n_steps": 32, "batch_size": 16, "n_critic_updates": 2},
    REINFORCE: {"episodes_per_env": 4, "batch_size": 16, "n_critic_updates": 2, "baseline": "value"},
}


class Scripted(gym.Env[Any, Any]):
    """
    Random observations and rewards; every third episode is cut by a time limit.

    :param observation_space: of the observations
    :param action_space: of the actions, which change nothing
    """

    def __init__(self, observation_space: spaces.Space[Any], action_space: spaces.Space[Any]) -> None:
        self.observation_space, self.action_space = observation_space, action_space
        self.episode = self.steps = 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        if seed is not None:
            self.observation_space.seed(seed)
        self.episode, self.steps = self.episode + 1, 0
        return self.observation_space.sample(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.steps += 1
        ends, is_cut = self.steps == 5 + self.episode % 4, self.episode % 3 == 0
        reward = float(self.np_random.normal())
        return self.observation_space.sample(), reward, ends and not is_cut, ends and is_cut, {}


def trained(algorithm: Any, problem: str, *, torch_compile: bool) -> dict[str, th.Tensor]:
    """
    :param algorithm: one of :data:`SIZES`
    :param problem: one of :data:`PROBLEMS`
    :param torch_compile: as the algorithm takes it
    :return: parameters and moments after three updates, by name
    """
    policy, observation_space, action_space, kwargs = PROBLEMS[problem]
    env = make_vec_env(lambda: Scripted(observation_space, action_space), n_envs=2, seed=0)
    model = algorithm(policy, env, seed=0, device="cpu", torch_compile=torch_compile, **SIZES[algorithm], **kwargs)
    while model._n_updates < 3 * SIZES[algorithm].get("n_epochs", 1):
        model.learn(1, reset_num_timesteps=False)
    result = {name: tensor.detach().clone() for name, tensor in model.policy.state_dict().items()}
    for i, state in model.policy.optimizer.state_dict()["state"].items():
        result |= {f"{i} {name}": th.as_tensor(value).clone() for name, value in state.items()}
    return result


def record(path: Path, names: list[str]) -> None:
    """
    :param path: of the file to write
    :param names: of the cases; all if there are none
    """
    recording: dict[str, dict[str, th.Tensor]] = {}
    for torch_compile, algorithm, problem in itertools.product((False, True), SIZES, PROBLEMS):
        name = f"{algorithm.__name__} {problem} {'compiled' if torch_compile else 'eager'}"
        if not names or any(part in name for part in names):
            recording[name] = trained(algorithm, problem, torch_compile=torch_compile)
            print(name, flush=True)
    th.save(recording, path)


def compare(first: Path, second: Path) -> int:
    """
    Print the largest difference of each case that both recordings have.

    :param first: a recording
    :param second: another
    :return: the number of cases that differ
    """
    one, other = (th.load(path, weights_only=True) for path in (first, second))
    n_differing = 0
    for name in one.keys() & other.keys():
        both = sorted(one[name].keys() | other[name].keys())
        missing = [key for key in both if key not in one[name] or key not in other[name]]
        largest = max(
            (one[name][k].double() - other[name][k].double()).abs().max().item() for k in both if k not in missing
        )
        if largest > 0.0 or missing:
            n_differing += 1
            print(f"{name}: {largest:.1e}{f', only in one: {missing[:3]}' if missing else ''}")
    print(f"{n_differing} of {len(one.keys() & other.keys())} cases differ")
    return n_differing


def main() -> int:
    """
    :return: the exit code: 1 if two recordings differ
    """
    parser = argparse.ArgumentParser(description=__doc__.strip().partition("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    recorder = commands.add_parser("record")
    recorder.add_argument("path", type=Path)
    recorder.add_argument("--only", nargs="*", default=[], help="cases whose name contains one of these")
    comparer = commands.add_parser("compare")
    comparer.add_argument("paths", type=Path, nargs=2)
    args = parser.parse_args()
    th.set_num_threads(1)
    if args.command == "record":
        record(args.path, args.only)
        return 0
    return int(compare(*args.paths) > 0)


if __name__ == "__main__":
    sys.exit(main())
