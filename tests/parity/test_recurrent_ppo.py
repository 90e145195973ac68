"""With ``dual_clip=None`` and sequences as long as the rollout, DualClipPPO is sb3-contrib's RecurrentPPO."""

from __future__ import annotations

from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from sb3_contrib import RecurrentPPO

from sb3_ppo_ext import DualClipPPO
from tests.envs import BOX, BOX_ACTIONS, DICT, scripted
from tests.pairwise import pairwise

TOLERANCE = 5e-6
N_STEPS, N_ENVS = 24, 3

MEMORIES = [
    {},
    {"shared_lstm": True, "enable_critic_lstm": False},
    {"enable_critic_lstm": False},
    {"n_lstm_layers": 2, "share_features_extractor": False},
]
# RecurrentPPO cannot learn MultiBinary actions: it keeps them as bytes, which have no log-probability.
ACTIONS = [spaces.Discrete(3), BOX_ACTIONS, spaces.MultiDiscrete([2, 3])]


def trained(algorithm: Any, policy: str, env: Any, n_rollouts: int, *, policy_kwargs: Any, **kwargs: Any) -> Any:
    """A minibatch is the whole rollout, as sb3-contrib cuts minibatches at another place in each epoch."""
    model = algorithm(
        policy,
        env,
        n_steps=N_STEPS,
        batch_size=N_STEPS * N_ENVS,
        n_epochs=2,
        learning_rate=1e-3,
        seed=0,
        device="cpu",
        policy_kwargs={"net_arch": [8], "lstm_hidden_size": 4, **policy_kwargs},
        **kwargs,
    )
    with mock.patch("numpy.random.randint", return_value=0):  # that place: the beginning
        model.learn(n_rollouts * N_STEPS * N_ENVS)
    return model


def both(policy: str, spaces_of_env: tuple[Any, Any], n_rollouts: int, **kwargs: Any) -> tuple[Any, Any]:
    theirs = trained(RecurrentPPO, policy, scripted(*spaces_of_env, n_envs=N_ENVS), n_rollouts, **kwargs)
    kwargs.update(dual_clip=None, sequence_length=N_STEPS)
    return theirs, trained(DualClipPPO, policy, scripted(*spaces_of_env, n_envs=N_ENVS), n_rollouts, **kwargs)


@pytest.mark.parametrize(
    ("policy_kwargs", "action_space", "clip_range_vf", "ent_coef"),
    pairwise(MEMORIES, ACTIONS, [None, 0.2], [0.0, 0.1]),
)
def test_same_parameters_after_two_rollouts(
    policy_kwargs: Any, action_space: Any, clip_range_vf: float | None, ent_coef: float
) -> None:
    theirs, ours = both(
        "MlpLstmPolicy",
        (BOX, action_space),
        2,
        policy_kwargs=policy_kwargs,
        clip_range_vf=clip_range_vf,
        ent_coef=ent_coef,
    )
    for our, their in zip(ours.policy.parameters(), theirs.policy.parameters(), strict=True):
        assert th.allclose(our, their, rtol=0.0, atol=TOLERANCE)


@pytest.mark.parametrize(
    ("policy", "obs_space", "use_sde"),
    [("MlpLstmPolicy", BOX, True), ("MultiInputLstmPolicy", DICT, False)],
    ids=["gSDE", "dict"],
)
def test_same_rollout(policy: str, obs_space: Any, use_sde: bool) -> None:
    """Values, log-probabilities and advantages: those of final observations at time limits are in these."""
    theirs, ours = both(policy, (obs_space, BOX_ACTIONS), 1, policy_kwargs={}, use_sde=use_sde)
    for name in ("actions", "values", "log_probs", "advantages", "returns"):
        of_theirs = getattr(theirs.rollout_buffer, name)  # which it has flattened, one environment after the other
        of_ours = getattr(ours.rollout_buffer, name)
        of_ours = of_ours.swapaxes(0, 1).reshape(of_theirs.shape)
        assert np.abs(of_ours - of_theirs).max() < 1e-5, name
    assert ours.rollout_buffer.truncated.any()
    assert ours.rollout_buffer.final_values[ours.rollout_buffer.truncated].all()


@pytest.mark.parametrize("policy_kwargs", MEMORIES)
def test_either_takes_the_weights_of_the_other(policy_kwargs: Any) -> None:
    theirs, ours = both("MlpLstmPolicy", (BOX, spaces.Discrete(3)), 1, policy_kwargs=policy_kwargs)
    obs = np.random.default_rng(0).normal(size=(5, N_ENVS, *BOX.shape)).astype(np.float32)
    fresh = trained(
        DualClipPPO,
        "MlpLstmPolicy",
        scripted(BOX, spaces.Discrete(3), n_envs=N_ENVS),
        0,
        policy_kwargs=policy_kwargs,
    )
    for giver, taker in ((theirs, fresh), (ours, theirs)):
        taker.set_parameters(giver.get_parameters())
        states: list[Any] = [None, None]
        for t, now in enumerate(obs):
            starts = np.array([t == 0, t == 3, False])
            (of_giver, states[0]), (of_taker, states[1]) = (
                model.predict(now, state, starts, deterministic=True)
                for model, state in zip((giver, taker), states, strict=True)
            )
            assert np.array_equal(of_giver, of_taker)
            assert np.allclose(states[0], states[1], atol=1e-6)
