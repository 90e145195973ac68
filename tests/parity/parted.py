"""
One of several processes, each with one of the environments that a model was trained in by one process: trained by its
part of the same rollouts.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch as th

from sb3_ppo_ext import REINFORCE, TRPO, AdaptiveKLPPO, DualClipPPO
from sb3_ppo_ext.common.compile import cpu
from tests.conftest import RunAsTraced
from tests.parity.noise import EPISODES, LENGTH, give, model_of, parameters

# REINFORCE's environments run as many episodes, of other lengths.
LENGTHS = [LENGTH, LENGTH + 3]
LINEAR = {"learning_rate": "lin_0.02"}
CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "DualClipPPO": (DualClipPPO, LINEAR),
    "DualClipPPO compiled": (DualClipPPO, {**LINEAR, "torch_compile": True}),
    "DualClipPPO target_kl": (DualClipPPO, {"target_kl": 0.02, "n_epochs": 10}),
    "DualClipPPO kl_adaptive_lr": (
        DualClipPPO,
        {"n_epochs": 10, "target_kl": 0.02, "rollback": True, "kl_adaptive_lr": {"maximum": 0.1}},
    ),
    "DualClipPPO with old rollouts": (
        DualClipPPO,
        {"n_reused_rollouts": 1, "reuse": {"proximal": "newest"}, "batch_size": 2 * 2 * EPISODES * LENGTH},
    ),
    "AdaptiveKLPPO with a moving average": (AdaptiveKLPPO, {**LINEAR, "reuse": {"proximal": "ewma"}}),
    "DualClipPPO masked": (DualClipPPO, {"is_masked": True}),
    "DualClipPPO with a memory": (DualClipPPO, {"policy": "MlpLstmPolicy", "sequence_length": 8}),
    "AdaptiveKLPPO": (AdaptiveKLPPO, LINEAR),
    "AdaptiveKLPPO compiled": (AdaptiveKLPPO, {"torch_compile": True}),
    "TRPO": (TRPO, LINEAR),
    "TRPO masked": (TRPO, {"is_masked": True}),
    "TRPO compiled": (TRPO, {"torch_compile": True}),
    "REINFORCE": (REINFORCE, LINEAR),
    "REINFORCE compiled": (REINFORCE, {"torch_compile": True}),
    "REINFORCE leave_one_out": (REINFORCE, {"baseline": "leave_one_out"}),
    "REINFORCE with a memory": (REINFORCE, {"policy": "MlpLstmPolicy", "sequence_length": 4}),
}


def trained(name: str, recording: dict[str, Any], rank: int) -> dict[str, Any]:
    """
    :param name: of the case
    :param recording: of the one process: its parameters before, its rollouts, and the steps it was asked for
    :param rank: of this process
    """
    algorithm, kwargs = CASES[name]
    kwargs = {**kwargs, "seed": rank}
    if algorithm is REINFORCE:
        kwargs["batch_size"] = EPISODES * max(LENGTHS)  # all samples of either
    model = model_of(algorithm, [LENGTHS[rank]], **kwargs)
    if rank == 0:  # the other is to get them from it
        for parameter, value in zip(model.policy.parameters(), recording["parameters"], strict=True):
            parameter.data.copy_(value)
    rollouts = iter(recording["rollouts"])

    def collect(*args: Any) -> bool:
        give(model, next(rollouts), rank)
        model.num_timesteps += model.rollout_buffer.buffer_size
        return True

    model._collect = collect
    model.learn(recording["total_timesteps"])
    logged = {name: value for name, value in model.logger.name_to_value.items() if isinstance(value, (int, float))}
    return {"parameters": parameters(model), "logged": logged, "num_timesteps": model.num_timesteps}


def main(scenario: str, folder: Path) -> None:
    """
    :param scenario: there is one
    :param folder: to read recordings from, and to write the results into
    """
    rank = int(os.environ["RANK"])
    cpu.machine_code = RunAsTraced
    recordings = th.load(folder / "recordings.pt", weights_only=False)
    results = {name: trained(name, recording, rank) for name, recording in recordings.items()}
    th.save(results, folder / f"{rank}.pt")
