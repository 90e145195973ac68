"""What is learnt from tensors that stay on a device is what is learnt from the same numbers as SB3 has them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from stable_baselines3 import PPO

from sb3_ppo_ext import REINFORCE, TRPO, AdaptiveKLPPO, DualClipPPO
from sb3_ppo_ext.common.rollout.tensor_buffer import TensorRolloutBuffer
from tests.algorithms import ROLLOUT, SMALL_NET, assert_close_policies, have_moved, parameters, small
from tests.tensor_envs import AsSB3, Groups, MaskedGroups, ShortCartPole, ShortPendulum

N_ENVS = 6
CRITIC = {"critic_observation_key": "critic"}
NORMALIZED = {"normalize_observations": True}

CASES: dict[str, tuple[Any, str, Any, dict[str, Any]]] = {
    "discrete": (DualClipPPO, "MlpPolicy", ShortCartPole, {}),
    "box": (AdaptiveKLPPO, "MlpPolicy", ShortPendulum, {}),
    "trust region": (TRPO, "MlpPolicy", ShortPendulum, {}),
    "complete episodes": (REINFORCE, "MlpPolicy", ShortCartPole, {}),
    "squashed": (
        DualClipPPO,
        "MlpPolicy",
        ShortPendulum,
        {"use_sde": True, "sde_sample_freq": 4, "policy_kwargs": {"squash_output": True}},
    ),
    "groups": (DualClipPPO, "MultiInputPolicy", Groups, {"policy_kwargs": CRITIC}),
    "normalised": (DualClipPPO, "MlpPolicy", ShortPendulum, {"policy_kwargs": NORMALIZED}),
    "normalised groups": (TRPO, "MultiInputPolicy", Groups, {"policy_kwargs": CRITIC | NORMALIZED}),
    "normalised, compiled": (
        AdaptiveKLPPO,
        "MlpPolicy",
        ShortPendulum,
        {"policy_kwargs": NORMALIZED, "torch_compile": True},
    ),
    "advantages anew": (DualClipPPO, "MlpPolicy", ShortPendulum, {"recompute_advantages": True}),
    "a reference": (
        DualClipPPO,
        "MlpPolicy",
        ShortPendulum,
        {"reference_policy": "initial", "reference_kl_coef": 99.0},
    ),
    "old rollouts and a reference": (
        DualClipPPO,
        "MlpPolicy",
        ShortPendulum,
        {
            "n_reused_rollouts": 1,
            "reuse": {"target": "vtrace", "proximal": "newest"},
            "reference_policy": "initial",
            "reference_kl_coef": 99.0,
        },
    ),
    "shared extractor": (TRPO, "MultiInputPolicy", Groups, {}),
    "masks": (AdaptiveKLPPO, "MultiInputPolicy", MaskedGroups, {"policy_kwargs": CRITIC}),
    "memory": (DualClipPPO, "MlpLstmPolicy", ShortCartPole, {"policy_kwargs": {"lstm_hidden_size": 4}}),
    "compiled": (DualClipPPO, "MlpPolicy", ShortPendulum, {"torch_compile": True}),
    "compiled groups": (TRPO, "MultiInputPolicy", Groups, {"policy_kwargs": CRITIC, "torch_compile": True}),
}

ARRAYS = (
    "actions", "rewards", "advantages", "returns", "episode_starts", "values", "log_probs", "truncated", "terminated",
    "final_values", "last_values", "distribution_params", "observations", "action_masks", "states",
)  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_two_updates_give_the_parameters_that_sb3s_interface_gives(case: str, without_compiler: None) -> None:
    algorithm, policy, env, kwargs = CASES[case]
    models = []
    for wrap in (lambda env: env, AsSB3):
        model = small(algorithm, policy, wrap(env(N_ENVS)), batch_size=24, **kwargs)
        before = parameters(model)
        model.learn(2 * N_ENVS * ROLLOUT if algorithm is not REINFORCE else 300)
        assert have_moved(model, before)
        models.append(model)
    ours, theirs = models
    assert isinstance(ours.rollout_buffer, TensorRolloutBuffer) == (algorithm is not REINFORCE)
    assert ours.num_timesteps == theirs.num_timesteps
    buffers = ours.rollout_buffer, theirs.rollout_buffer
    assert buffers[0].truncated.any()
    assert case == "complete episodes" or (buffers[0].final_values != 0.0).any()
    assert env is ShortPendulum or buffers[0].terminated.any()
    for name in ARRAYS:
        one, other = (getattr(buffer, name) for buffer in buffers)
        assert (one is None) == (other is None), name
        pairs = [(one[k], other[k]) for k in one] if isinstance(one, dict) else [] if one is None else [(one, other)]
        for a, b in pairs:
            assert (type(a), a.dtype, a.shape) == (type(b), b.dtype, b.shape), name
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5, err_msg=name)
    assert_close_policies(theirs, ours, atol=1e-6)
    without_time = [[{**info, "t": 0} for info in model.ep_info_buffer] for model in models]
    assert without_time[0] == without_time[1]


def test_ppo_on_tensors_is_sb3s_ppo() -> None:
    kwargs: dict[str, Any] = {"n_steps": ROLLOUT, "batch_size": 24, "n_epochs": 2, "seed": 0, "device": "cpu"}
    kwargs["policy_kwargs"] = SMALL_NET
    theirs = PPO("MlpPolicy", AsSB3(ShortCartPole(N_ENVS)), **kwargs).learn(3 * N_ENVS * ROLLOUT)
    ours = DualClipPPO("MlpPolicy", ShortCartPole(N_ENVS), dual_clip=None, **kwargs).learn(3 * N_ENVS * ROLLOUT)
    assert_close_policies(theirs, ours, atol=1e-5)
