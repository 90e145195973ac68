"""
How fast a rollout is collected: ours against SB3's PPO, alternating in one run, on the same environments.

    python -m benchmarks.collect [--repeats 15] [--threads 1]

A rollout counts as collected when values, log-probabilities, advantages and returns are in the buffer.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch as th
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import CallbackList
from stable_baselines3.common.env_util import make_vec_env

from sb3_ppo_ext import DualClipPPO

if TYPE_CHECKING:
    from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm


class Case(NamedTuple):
    """
    :param env: id of the environment
    :param n_envs: environments side by side
    :param n_steps: steps of each in a rollout
    :param goal: the least ratio of SB3's time to ours
    """

    env: str
    n_envs: int
    n_steps: int
    goal: float


CASES = (Case("CartPole-v1", 8, 256, 1.8), Case("HalfCheetah-v5", 1, 2048, 2.2))


def make_model(algorithm: type[OnPolicyAlgorithm], case: Case) -> OnPolicyAlgorithm:
    """A model that has collected, and updated on, one rollout."""
    env = make_vec_env(case.env, n_envs=case.n_envs, seed=0)
    model = algorithm("MlpPolicy", env, n_steps=case.n_steps, seed=0, device="cpu")  # type: ignore[call-arg]
    return model.learn(case.n_steps * case.n_envs)


def collect(model: OnPolicyAlgorithm) -> float:
    """Seconds for one rollout."""
    callback = CallbackList([])
    callback.init_callback(model)
    assert model.env is not None
    start = time.perf_counter()
    model.collect_rollouts(model.env, callback, model.rollout_buffer, model.n_steps)
    return time.perf_counter() - start


def step_environment(model: OnPolicyAlgorithm, n_steps: int) -> float:
    """Seconds that the environment alone takes for as many steps, with the actions of the last rollout."""
    env = model.env
    assert env is not None
    n_envs = env.num_envs
    actions = np.asarray(model.rollout_buffer.actions).reshape(n_steps, n_envs, -1)
    actions = actions.reshape(n_steps, n_envs, *(model.action_space.shape or ()))
    env.reset()
    start = time.perf_counter()
    for action in actions:
        env.step(action)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=15, help="rollouts of each side")
    parser.add_argument("--threads", type=int, default=1, help="torch threads, the same for both sides")
    args = parser.parse_args()
    th.set_num_threads(args.threads)

    print(f"microseconds for one step of the vector of environments; medians of {args.repeats} rollouts each,")
    print(f"alternating; torch {th.__version__}, {args.threads} thread(s)\n")
    print("| environment | envs | SB3 PPO | ours | environment alone | ratio: median (min to max) | goal |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    for case in CASES:
        theirs, ours = make_model(PPO, case), make_model(DualClipPPO, case)
        times = [(collect(theirs), collect(ours)) for _ in range(args.repeats)]
        alone = min(step_environment(ours, case.n_steps) for _ in range(3))
        ratios = [a / b for a, b in times]
        median_theirs, median_ours = (statistics.median(side) / case.n_steps * 1e6 for side in zip(*times, strict=True))
        ratio = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        print(
            f"| {case.env} | {case.n_envs} | {median_theirs:.0f} | {median_ours:.0f} "
            f"| {alone / case.n_steps * 1e6:.0f} | {ratio} | {case.goal} |"
        )


if __name__ == "__main__":
    main()
