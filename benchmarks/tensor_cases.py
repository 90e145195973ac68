"""Environments whose tensors stay on a device: what is compared, and which ratios are aimed at."""

from __future__ import annotations

import argparse
from dataclasses import replace

from benchmarks.cases import ENVIRONMENT, RSL_PYTHON, Goal, Side, Suite, Workload, resized

_OURS, _SB3, _RSL = Side("dual_clip_ppo"), Side("sb3"), Side("rsl")

# Steps, epochs and minibatches as in the tasks of Isaac Lab.
_WORKLOADS = tuple(
    Workload("Pendulum-v1", n_envs, n_steps=24, batch_size=6 * n_envs, n_epochs=5, vector="torch")
    for n_envs in (1024, 4096)
)


def tensors_suite(args: argparse.Namespace) -> Suite:
    """
    :param args: of the command line
    :return: PPO on a batch of torch environments, against rsl_rl's and, by way of numpy, SB3's
    """
    notes = [
        "The environment is `examples/torch_environments.py`'s. All sides have ELU networks, a learning rate of 1e-3, "
        "vf_coef 1 and max_grad_norm 1; rsl_rl is asked for a fixed learning rate, advantages normalised in each "
        "minibatch and no clipped value loss, as PPO is here",
        "SB3 has the environments in a VecEnv that makes arrays of their tensors and a list of infos at each step, as "
        "Isaac Lab's for SB3 does",
    ]
    workloads = [resized(workload, args) for workload in _WORKLOADS]
    if args.steps:
        workloads = [replace(workload, batch_size=max(workload.n_envs * args.steps // 4, 2)) for workload in workloads]
    compiled = replace(_OURS, torch_compile=True)
    peers = [_RSL] if RSL_PYTHON.exists() else []
    if not peers:
        notes.append("rsl_rl was not measured: it needs `.venv-rsl`, which `make rsl-env` makes")
    goals = []
    for workload in workloads:
        for peer in peers:
            goals += [Goal(workload, _OURS, peer, 1.0), Goal(workload, compiled, peer, 1.3)]
        goals += [Goal(workload, _OURS, _SB3), Goal(workload, compiled, _SB3, 5.0)]
    return Suite(
        "Tensors that stay on their device: steps per second",
        f"tensors-{args.device}",
        {workload: [_OURS, *peers, _SB3, compiled, ENVIRONMENT] for workload in workloads},
        goals,
        notes=notes,
        repeats=5,
    )
