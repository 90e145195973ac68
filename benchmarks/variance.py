"""
How noisy is a policy gradient? REINFORCE with each of its baselines, and A2C, on one policy that does not change.

    python -m benchmarks.variance
    python -m benchmarks.variance --updates 20 --out /tmp/trial

The policy is a DualClipPPO after some training. Each side then draws UPDATES batches with it and computes the gradient
of each, with a learning rate of 0: only the critic learns, where there is one, and its first 20 batches do not count.
Reported is the number of environment steps at which noise and signal are equal,

    steps of a batch * trace(Cov[g]) / |E[g]|^2,

with g the gradient of the actor's parameters: half as many steps are half the variance. It does not depend on how a
gradient is scaled, nor on how large a batch is.
"""

from __future__ import annotations

import argparse
import csv
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib as mpl
import numpy as np
import torch as th
from matplotlib.figure import Figure
from stable_baselines3.common.callbacks import BaseCallback

from benchmarks.learning.figures import SETTINGS, save
from benchmarks.machine import commit, processor, versions
from benchmarks.report import command_line
from sb3_ppo_ext import REINFORCE, DualClipPPO

_WARM_UP = 20
_CRITIC = {"critic_learning_rate": 1e-3}


class Side(NamedTuple):
    """
    :param name: in table and figure
    :param make: gives the model, given the environment
    """

    name: str
    make: Callable[[str], REINFORCE | DualClipPPO]


def _reinforce(**kwargs: Any) -> Callable[[str], REINFORCE]:
    kwargs = {"policy_kwargs": _CRITIC if kwargs.get("baseline") == "value" else None, **kwargs}
    return lambda env: REINFORCE(
        "MlpPolicy", env, learning_rate=lambda _: 0.0, max_grad_norm=float("inf"), seed=1, device="cpu", **kwargs
    )


def _a2c(gae_lambda: float) -> Callable[[str], DualClipPPO]:
    """One epoch over the whole rollout: SB3's A2C, see docs/guide/migration.md."""
    return lambda env: DualClipPPO(
        "MlpPolicy",
        env,
        learning_rate=lambda _: 0.0,
        n_steps=1024,
        batch_size=1024,
        n_epochs=1,
        gae_lambda=gae_lambda,
        normalize_advantage=False,
        max_grad_norm=float("inf"),
        policy_kwargs=_CRITIC,
        seed=1,
        device="cpu",
    )


# From the noisiest to the least noisy, as theory has it: rewards of the past are noise (Sutton et al. 2000, the policy
# gradient theorem); of constants, the optimal one is best (Greensmith et al. 2004); the mean return of each step is
# nearer to the value function than one constant is; A2C's critic looks ahead, and lambda < 1 trades noise for bias
# (Schulman et al. 2016).
SIDES = [
    Side("REINFORCE, total return", _reinforce(returns="total")),
    Side("REINFORCE, reward to go", _reinforce()),
    Side("… baseline mean", _reinforce(baseline="mean")),
    Side("… baseline optimal", _reinforce(baseline="optimal")),
    Side("… baseline leave_one_out", _reinforce(baseline="leave_one_out")),
    Side("… baseline value", _reinforce(baseline="value")),
    Side("A2C, lambda 1", _a2c(1.0)),
    Side("A2C, lambda 0.95", _a2c(0.95)),
]


class Gradients(BaseCallback):
    """
    Stops when there are enough gradients.

    :param n: gradients that are wanted
    """

    def __init__(self, n: int) -> None:
        super().__init__()
        self._n = n
        self.found: list[th.Tensor] = []
        self.steps: list[int] = []

    def _on_rollout_start(self) -> None:
        """The gradient of an update is left where it was made, and is there when the next rollout begins."""
        if self.steps:
            actor = (p.grad for name, p in self.model.policy.named_parameters() if is_of_actor(name))
            self.found.append(th.cat([grad.flatten().clone() for grad in actor if grad is not None]))
        self.steps.append(self.num_timesteps)

    def _on_step(self) -> bool:
        return len(self.found) < self._n


def is_of_actor(name: str) -> bool:
    """
    :param name: of a parameter
    """
    return "value" not in name


def noise(gradients: np.ndarray) -> float:
    """
    :param gradients: shape ``(n, n_parameters)``
    :return: trace(Cov[g]) / |E[g]|^2; the noise of the mean is taken out of its square, which may leave nothing
    """
    trace = gradients.var(axis=0, ddof=1).sum()
    signal = np.square(gradients.mean(axis=0)).sum() - trace / len(gradients)
    return float(trace / signal) if signal > 0.0 else math.inf


def measured(side: Side, env: str, policy: dict[str, th.Tensor], n: int) -> tuple[float, float, float]:
    """
    :param side: what is measured
    :param env: id of the environment
    :param policy: the parameters
    :param n: gradients that count
    :return: steps at which noise and signal are equal, and a 95 % interval by the bootstrap
    """
    model = side.make(env)
    model.policy.load_state_dict(policy)
    callback = Gradients(n + _WARM_UP)
    model.learn(10**9, callback=callback)
    gradients = th.stack(callback.found[_WARM_UP:]).double().numpy()
    steps_of_batch = np.diff(callback.steps)[_WARM_UP:].mean()
    rng = np.random.default_rng(0)
    resampled = [noise(gradients[rng.integers(len(gradients), size=len(gradients))]) for _ in range(200)]
    low, high = np.quantile(resampled, (0.025, 0.975), method="nearest")
    return steps_of_batch * noise(gradients), steps_of_batch * low, steps_of_batch * high


def drawn(rows: list[tuple[str, float, float, float]], env: str) -> Figure:
    """
    :param rows: name, steps and interval of each side
    :param env: id of the environment
    """
    figure = Figure(figsize=(5.5, 2.8), layout="constrained")
    axes = figure.subplots()
    names, *numbers = zip(*rows, strict=True)
    end = 10.0 * max((number for column in numbers for number in column if math.isfinite(number)), default=1.0)
    steps, low, high = (np.minimum(column, end) for column in numbers)
    places = np.arange(len(rows))[::-1]
    axes.errorbar(steps, places, xerr=[steps - low, high - steps], fmt="o", color="#0072B2", capsize=2)
    axes.set_yticks(places, names)
    axes.set_xscale("log")
    axes.set_xlabel("steps at which noise and signal of the gradient are equal (less is better)")
    axes.set_title(f"Variance of the policy gradient, {env}")
    return figure


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--env", default="CartPole-v1", help="id of the environment")
    parser.add_argument("--updates", type=int, default=200, help="gradients of each side")
    parser.add_argument("--train", type=int, default=5_000, help="steps that the policy is trained for before")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), help="folder for the results")
    args = parser.parse_args(arguments)
    th.set_num_threads(1)
    trained = DualClipPPO("MlpPolicy", args.env, n_steps=512, seed=0, device="cpu").learn(args.train)
    policy = trained.policy.state_dict()
    rows = []
    for side in SIDES:
        rows.append((side.name, *measured(side, args.env, policy, args.updates)))
        print("{}: {:,.0f} steps ({:,.0f} to {:,.0f})".format(*rows[-1]), flush=True)
    args.out.mkdir(parents=True, exist_ok=True)
    with mpl.rc_context(SETTINGS):
        save(drawn(rows, args.env), args.out, "variance")
    with (args.out / "variance.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("side", "steps", "low", "high"), *rows])
    packages = ", ".join(" ".join(pair) for pair in versions(["torch", "stable-baselines3", "gymnasium"]).items())
    made_on = f"{processor()}; {packages}; commit {commit(Path(__file__).parents[1])}"
    table = "\n".join(f"| {name} | {steps:,.0f} | {low:,.0f} to {high:,.0f} |" for name, steps, low, high in rows)
    (args.out / "variance.md").write_text(
        f"# Variance of the policy gradient, {args.env}\n\n"
        f"`{command_line('variance', sys.argv[1:] if arguments is None else arguments)}`"
        f"\n\n{made_on}\n\nSteps of the environment at which noise and signal of the gradient are equal: "
        "the steps of a batch times\ntrace(Cov[g]) / |E[g]|^2, for one policy that does not change, "
        f"{args.updates} batches. 95 % intervals by the bootstrap.\n\n"
        f"| | steps | interval |\n| --- | ---: | ---: |\n{table}\n\n![]({'variance.png'})\n"
    )


if __name__ == "__main__":
    main()
