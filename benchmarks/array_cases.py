"""Many environments in one array: what is compared, and which ratios are aimed at."""

from __future__ import annotations

import argparse
import importlib.util
from dataclasses import replace

from benchmarks.cases import ACTING, COLLECTING, ENVIRONMENT, Goal, Side, Suite, Workload, resized

_OURS, _COMPILED, _SB3 = Side("dual_clip_ppo"), Side("dual_clip_ppo", torch_compile=True), Side("sb3")

_MANY = Workload("CartPole-v1", n_envs=256, n_steps=32, batch_size=1024, n_epochs=10, vector="gymnasium")
_VERY_MANY = replace(_MANY, n_envs=4096, n_steps=8, batch_size=4096)
_OF_ENVPOOL = (
    Workload("CartPole-v1", n_envs=64, n_steps=64, batch_size=256, n_epochs=10, vector="envpool"),
    Workload("HalfCheetah-v5", n_envs=64, n_steps=64, batch_size=256, n_epochs=10, vector="envpool"),
    Workload("Pong-v5", n_envs=8, n_steps=64, batch_size=128, n_epochs=4, width=None, vector="envpool"),
)


def arrays_suite(args: argparse.Namespace) -> Suite:
    """
    :param args: of the command line
    :return: gymnasium's own vector of CartPole against SB3 with as many environments in a ``DummyVecEnv``, its
        collecting against environment and actor alone; EnvPool's environments against SB3 with the same
    """
    notes = [
        "Collecting is compared with environment and actor alone by the steps of a rollout; under *collect alone* "
        "stands the ratio of all of it, with the values and log-probabilities of all steps and the advantages",
        "EnvPool has two threads",
    ]
    many, very_many, *of_envpool = (resized(workload, args) for workload in (_MANY, _VERY_MANY, *_OF_ENVPOOL))
    sides = {
        many: [_OURS, _SB3, _COMPILED, COLLECTING, ACTING, ENVIRONMENT],
        very_many: [_OURS, COLLECTING, ACTING, ENVIRONMENT],
    }
    goals = [Goal(many, COLLECTING, ACTING, 0.5), Goal(very_many, COLLECTING, ACTING, 0.5)]
    goals += [Goal(many, side, _SB3) for side in (_OURS, _COMPILED)]
    if importlib.util.find_spec("envpool") is None:
        notes[-1] = "EnvPool was not measured: it is not installed"
    else:
        sides |= {workload: [_OURS, _SB3, _COMPILED, ENVIRONMENT] for workload in of_envpool}
        goals += [Goal(workload, side, _SB3, 3.0) for workload in of_envpool for side in (_OURS, _COMPILED)]
    return Suite(
        "Many environments in one array: steps per second",
        f"arrays-{args.device}",
        sides,
        goals,
        notes=notes,
        repeats=7,
        cores=2,
    )
