"""
A2C is PPO with one epoch over the whole rollout (Huang et al. 2022, arXiv 2205.09123): set so, DualClipPPO has the
parameters of SB3's A2C.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3 import A2C
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.sb2_compat.rmsprop_tf_like import RMSpropTFLike

from sb3_ppo_ext import DualClipPPO
from tests.envs import BOX, ScriptedEnv
from tests.parity.test_sb3_ppo import TOLERANCE, deviation

N_UPDATES = 5

# As the README has it.
RMSPROP: dict[str, Any] = {
    "optimizer_class": th.optim.RMSprop,
    "optimizer_kwargs": {"alpha": 0.99, "eps": 1e-5, "weight_decay": 0},
}
LIKE_A2C: dict[str, Any] = {
    "n_epochs": 1,
    "learning_rate": 7e-4,
    "gae_lambda": 1.0,
    "normalize_advantage": False,
    "policy_kwargs": RMSPROP,
}
TORQUES = spaces.Box(-2.0, 2.0, (3,), np.float32)

Case = tuple[Any, int, int, dict[str, Any], dict[str, Any]]
# Environment, how many, n_steps, arguments of both, and of A2C alone
CASES: dict[str, Case] = {
    "discrete": ("CartPole-v1", 4, 5, {}, {}),
    "box": ("Pendulum-v1", 4, 5, {}, {}),
    "online": ("CartPole-v1", 1, 1, {}, {}),
    "online, several environments": ("Pendulum-v1", 3, 1, {}, {}),
    "episodes that end": (partial(ScriptedEnv, BOX, TORQUES), 2, 8, {"ent_coef": 0.01, "learning_rate": 3e-3}, {}),
    "lambda targets, normalised": ("CartPole-v1", 2, 8, {"gae_lambda": 0.9, "normalize_advantage": True}, {}),
    "a schedule": ("CartPole-v1", 2, 5, {"learning_rate": lambda progress: 1e-3 * progress}, {}),
    "RMSprop as TensorFlow has it": (
        "CartPole-v1",
        2,
        5,
        {"policy_kwargs": {"optimizer_class": RMSpropTFLike, "optimizer_kwargs": {"eps": 1e-5}}},
        {},
    ),
    "Adam": ("CartPole-v1", 4, 5, {"policy_kwargs": {}}, {"use_rms_prop": False}),
    "Adam, compiled": ("Pendulum-v1", 4, 5, {"policy_kwargs": {}, "torch_compile": True}, {"use_rms_prop": False}),
}


def trained(algorithm: Any, case: Case, **more: Any) -> Any:
    env_id, n_envs, n_steps, kwargs, _ = case
    arguments = {**LIKE_A2C, **kwargs, **more}
    if algorithm is A2C:
        arguments.pop("n_epochs")
        arguments.pop("torch_compile", None)
    else:
        arguments["batch_size"] = n_steps * n_envs
    arguments["policy_kwargs"] = {"net_arch": [8], **arguments["policy_kwargs"]}
    env = make_vec_env(env_id, n_envs=n_envs, seed=0)
    model = algorithm("MlpPolicy", env, n_steps=n_steps, seed=0, device="cpu", **arguments)
    return model.learn(N_UPDATES * n_steps * n_envs)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.usefixtures("without_compiler")
def test_same_parameters_after_five_updates(name: str) -> None:
    case = CASES[name]
    theirs = trained(A2C, case, **case[-1])
    ours = trained(DualClipPPO, case)
    assert ours._n_updates == theirs._n_updates == N_UPDATES
    assert type(ours.policy.optimizer) is type(theirs.policy.optimizer)
    assert deviation(ours, theirs) <= TOLERANCE


@pytest.mark.parametrize("clip_range", [1e-3, 100.0])
def test_nothing_is_clipped_as_every_ratio_is_1(clip_range: float) -> None:
    case = CASES["box"]
    ours = trained(DualClipPPO, case, clip_range=clip_range, dual_clip=None)
    assert deviation(ours, trained(A2C, case)) <= TOLERANCE


@pytest.mark.parametrize(
    ("name", "mistake"),
    [
        ("discrete", {"gae_lambda": 0.99}),
        ("discrete", {"learning_rate": 7.01e-4}),
        ("discrete", {"normalize_advantage": True}),
        ("box", {"n_epochs": 2}),
        ("episodes that end", {"ent_coef": 0.011}),
    ],
)
def test_a_mistake_is_seen(name: str, mistake: dict[str, Any]) -> None:
    assert deviation(trained(DualClipPPO, CASES[name], **mistake), trained(A2C, CASES[name])) > 2 * TOLERANCE
