"""With ``dual_clip=None`` and masks, DualClipPPO is sb3-contrib's MaskablePPO."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch as th
from sb3_contrib import MaskablePPO
from sb3_contrib.common.envs import (
    InvalidActionEnvDiscrete,
    InvalidActionEnvMultiBinary,
    InvalidActionEnvMultiDiscrete,
)
from sb3_contrib.common.maskable.policies import MaskableActorCriticPolicy
from stable_baselines3.common.env_util import make_vec_env

from sb3_ppo_ext import DualClipPPO

TOLERANCE = 5e-6
DISCRETE = (InvalidActionEnvDiscrete, {"dim": 8, "n_invalid_actions": 5})
MULTI_DISCRETE = (InvalidActionEnvMultiDiscrete, {"dims": [4, 3], "n_invalid_actions": 4})
MULTI_BINARY = (InvalidActionEnvMultiBinary, {"dims": 4, "n_invalid_actions": 3})


def trained(algorithm: Any, policy: Any, env: Any, **kwargs: Any) -> list[th.Tensor]:
    env_class, env_kwargs = env
    np.random.seed(0)  # noqa: NPY002  # the environments draw their masks from it
    vector = make_vec_env(env_class, n_envs=2, seed=0, env_kwargs=env_kwargs)
    for one in vector.envs:  # type: ignore[attr-defined]
        one.action_space.seed(0)
    model = algorithm(policy, vector, n_steps=32, batch_size=32, n_epochs=2, seed=0, device="cpu", **kwargs)
    model.learn(128)
    return [p.detach() for p in model.policy.parameters()]


@pytest.mark.parametrize(
    ("env", "policy"),
    [
        (DISCRETE, "MlpPolicy"),
        (MULTI_DISCRETE, "MlpPolicy"),
        # Ours has one output for each binary action, theirs has two.
        (DISCRETE, MaskableActorCriticPolicy),
        (MULTI_DISCRETE, MaskableActorCriticPolicy),
        (MULTI_BINARY, MaskableActorCriticPolicy),
    ],
    ids=["discrete", "multi-discrete", "discrete-theirs", "multi-discrete-theirs", "multi-binary-theirs"],
)
@pytest.mark.parametrize("ent_coef", [0.0, 0.1])
def test_same_parameters_after_two_rollouts(env: Any, policy: Any, ent_coef: float) -> None:
    theirs = trained(MaskablePPO, "MlpPolicy", env, ent_coef=ent_coef)
    ours = trained(DualClipPPO, policy, env, ent_coef=ent_coef, dual_clip=None)
    assert max((a - b).abs().max().item() for a, b in zip(ours, theirs, strict=True)) < TOLERANCE
