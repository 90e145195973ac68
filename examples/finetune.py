"""
Clone an expert, then fine-tune the clone: without a reference policy it forgets at first, with one it does not.

    python -m examples.finetune --figure finetune.png

The expert drives MountainCar by a rule: it pushes in the direction in which the car rolls. A policy is cloned from its
actions by supervised learning. Then DualClipPPO fine-tunes the clone twice: without a penalty, and with a penalty on
the KL divergence from the clone. The critic is untrained and the learning rate is large, so the critic's errors
dominate the first updates; the penalty limits their effect.

Cloning is ten lines on the policy's own ``evaluate_actions``. The package ``imitation`` does the same and more; its
newest release, 1.0.1, needs earlier versions of Stable-Baselines3 and gymnasium than this package.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch as th
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.policies import ActorCriticPolicy

from sb3_ppo_ext import DualClipPPO

ENV_ID = "MountainCar-v0"
N_ENVS = 8
ROLLOUT: dict[str, Any] = {"n_steps": 512, "batch_size": 256, "n_epochs": 10, "learning_rate": 3e-3}
KEEPS_TO: dict[str, Any] = {"reference_kl": "loss", "reference_kl_coef": {"target_kl": 0.01, "coef": 1.0}}


def expert(observations: np.ndarray) -> np.ndarray:
    """
    Push in the direction in which the car rolls.

    :param observations: position and velocity, shape ``(n_envs, 2)``
    :return: actions, shape ``(n_envs,)``
    """
    return np.where(observations[:, 1] >= 0.0, 2, 0)


def demonstrations(n_steps: int, seed: int) -> tuple[th.Tensor, th.Tensor]:
    """
    Collect observations and actions of the expert.

    :param n_steps: steps in each environment
    :param seed: of the environments
    :return: observations and actions
    """
    env = make_vec_env(ENV_ID, n_envs=N_ENVS, seed=seed)
    obs, seen, done = env.reset(), [], []
    for _ in range(n_steps):
        assert isinstance(obs, np.ndarray)
        seen.append(obs)
        done.append(expert(obs))
        obs, _, _, _ = env.step(done[-1])
    return th.as_tensor(np.concatenate(seen)), th.as_tensor(np.concatenate(done))


def clone(policy: ActorCriticPolicy, observations: th.Tensor, actions: th.Tensor, n_epochs: int) -> None:
    """
    Behaviour cloning: maximise the log-probability of the expert's actions. The critic learns nothing.

    :param policy: is trained
    :param observations: of the expert
    :param actions: of the expert
    :param n_epochs: passes over the demonstrations
    """
    optimizer = th.optim.Adam(policy.parameters(), lr=1e-3)
    for _ in range(n_epochs):
        for rows in th.split(th.randperm(len(actions)), 256):
            _, log_prob, _ = policy.evaluate_actions(observations[rows], actions[rows])
            optimizer.zero_grad()
            (-log_prob.mean()).backward()  # type: ignore[no-untyped-call]
            optimizer.step()


class Returns(BaseCallback):
    """Records the mean return of the episodes that end in each rollout."""

    def __init__(self) -> None:
        super().__init__()
        self.curve: list[float] = []
        self._ended: list[float] = []

    def _on_step(self) -> bool:
        self._ended += [info["episode"]["r"] for info in self.locals["infos"] if "episode" in info]
        return True

    def _on_rollout_end(self) -> None:
        self.curve.append(float(np.mean(self._ended)) if self._ended else float("nan"))
        self._ended.clear()


def fine_tuned(weights: dict[str, Any], total_timesteps: int, seed: int, **reference: Any) -> list[float]:
    """
    Fine-tune a clone.

    :param weights: of the clone's policy
    :param total_timesteps: steps of the training
    :param seed: of the training
    :param reference: further arguments of DualClipPPO
    :return: the mean return of each rollout; the first rollout is the clone's
    """
    env = make_vec_env(ENV_ID, n_envs=N_ENVS, seed=seed)
    model = DualClipPPO("MlpPolicy", env, seed=seed, device="cpu", **ROLLOUT, **reference)
    model.policy.load_state_dict(weights)
    returns = Returns()
    model.learn(total_timesteps, callback=returns)
    return returns.curve


def draw(curves: dict[str, list[list[float]]], path: str) -> None:
    """
    Draw the mean and the range over the seeds.

    :param curves: by name, one for each seed
    :param path: of the figure
    """
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for name, of_seeds in curves.items():
        steps = np.arange(len(of_seeds[0])) * ROLLOUT["n_steps"] * N_ENVS
        mean = np.mean(of_seeds, axis=0)
        (line,) = axes.plot(steps, mean, label=name)
        axes.fill_between(steps, np.min(of_seeds, axis=0), np.max(of_seeds, axis=0), color=line.get_color(), alpha=0.2)
    axes.axhline(float(np.mean([curve[0] for of_seeds in curves.values() for curve in of_seeds])), ls=":", color="grey")
    axes.set(xlabel="time steps", ylabel="mean return of a rollout", title=f"Fine-tuning a clone on {ENV_ID}")
    figure.legend(loc="outside lower center", ncols=2)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main(arguments: Sequence[str] | None = None) -> dict[str, list[list[float]]]:
    """
    :param arguments: command line arguments; None: those of this process
    :return: the curves by name, one for each seed
    """
    parser = argparse.ArgumentParser(description="Fine-tune a clone, with a reference policy and without.")
    parser.add_argument("--steps", type=int, default=60_000, help="length of each fine-tuning")
    parser.add_argument("--demonstrations", type=int, default=1000, help="steps of the expert in each environment")
    parser.add_argument("--epochs", type=int, default=20, help="epochs of cloning")
    parser.add_argument("--seeds", type=int, default=3, help="how many trainings of each kind")
    parser.add_argument("--figure", help="file for a figure, such as finetune.png")
    options = parser.parse_args(arguments)

    curves: dict[str, list[list[float]]] = {"without a reference": [], "KL to the clone": []}
    for seed in range(options.seeds):
        model = DualClipPPO("MlpPolicy", ENV_ID, seed=seed, device="cpu")
        clone(model.policy, *demonstrations(options.demonstrations, seed), n_epochs=options.epochs)
        weights = model.policy.state_dict()
        for name, reference in (
            ("without a reference", {}),
            ("KL to the clone", {"reference_policy": "initial", **KEEPS_TO}),
        ):
            curve = fine_tuned(weights, options.steps, seed, **reference)
            curves[name].append(curve)
            numbers = " ".join(f"{number:.0f}" for number in curve)
            print(f"seed {seed}, {name}: the clone {curve[0]:.0f}, lowest {min(curve):.0f}, last {curve[-1]:.0f}")
            print(f"    {numbers}", flush=True)
    if options.figure:
        draw(curves, options.figure)
        print(f"Written: {options.figure}")
    return curves


if __name__ == "__main__":
    main()
