"""``log_std_bounds``, which this package's policies have and SB3's have not, and other rules for ``log_std``."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.callbacks import BaseCallback

from sb3_ppo_ext import TRPO, DualClipPPO
from tests.algorithms import ALGORITHMS, ROLLOUT, assert_same_policy, small
from tests.envs import BOX, BOX_ACTIONS, ScriptedEnv


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("use_sde", [False, True])
def test_log_std_stays_within_its_bounds(algorithm: Any, use_sde: bool) -> None:
    """Also under an entropy bonus that drives it up, and one warning says so."""
    bounds = (-0.01, 0.02)
    model = small(
        algorithm,
        "MlpPolicy",
        ScriptedEnv(BOX, BOX_ACTIONS),
        learning_rate=5e-2,
        ent_coef=1.0,
        use_sde=use_sde,
        policy_kwargs={"log_std_bounds": bounds},
    )
    free = small(
        algorithm,
        "MlpPolicy",
        ScriptedEnv(BOX, BOX_ACTIONS),
        learning_rate=5e-2,
        ent_coef=1.0,
        use_sde=use_sde,
    ).learn(4 * ROLLOUT)
    assert free.policy.log_std.max() > bounds[1]  # there is something to bound
    seen: list[float] = []

    class Watches(BaseCallback):
        def _on_step(self) -> bool:
            seen.extend((model.policy.log_std.min().item(), model.policy.log_std.max().item()))
            return True

    with pytest.warns(UserWarning, match=r"log_std has reached its bounds, log_std_bounds=\(-0.01, 0.02\)") as caught:
        model.learn(4 * ROLLOUT, callback=Watches())
    assert len([w for w in caught if "log_std" in str(w.message)]) == 1
    seen += model.policy.log_std.flatten().tolist()
    float32 = 1e-7
    assert bounds[0] - float32 <= min(seen)
    assert max(seen) == pytest.approx(bounds[1])
    assert model.policy.log_std.max().item() == pytest.approx(bounds[1])


def test_bounds_that_do_not_bind_change_nothing() -> None:
    one, two = (  # warnings are errors
        small(DualClipPPO, "MlpPolicy", ScriptedEnv(BOX, BOX_ACTIONS), policy_kwargs=kwargs).learn(2 * ROLLOUT)
        for kwargs in ({}, {"log_std_bounds": [-20.0, math.inf]})
    )
    assert_same_policy(one, two)


def test_trpos_trust_region_is_of_the_bounded_policy() -> None:
    """What the line search measures is what is left, not what it would have been without the bounds."""
    model = small(
        TRPO,
        "MlpPolicy",
        ScriptedEnv(BOX, BOX_ACTIONS),
        target_kl=0.5,
        ent_coef=1.0,
        policy_kwargs={"log_std_bounds": (-0.05, 0.05)},
    )
    with pytest.warns(UserWarning, match="log_std has reached its bounds"):
        model.learn(ROLLOUT)
    rollout = model.rollout_buffer.flat()
    with th.no_grad():
        kl = model._family.kl(rollout.old_params, model._actor_critic().params(rollout.inputs)).mean().item()
    assert model.logger.name_to_value["train/kl"] == pytest.approx(kl, rel=1e-5)
    assert model.logger.name_to_value["train/is_line_search_success"] == 1.0
    assert 0.0 < kl <= 0.5


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"log_std_bounds": (1.0, -1.0)}, r"log_std_bounds\[1\]=-1.0 is not allowed"),
        ({"log_std_bounds": (math.nan, 1.0)}, r"log_std_bounds\[0\]=nan is not allowed"),
        ({"log_std_bounds": ("a", 1.0)}, r"log_std_bounds\[0\]='a' is not allowed"),
        ({"log_std_bounds": 1.0}, "log_std_bounds=1.0 is not allowed: it must be a pair"),
        ({"log_std_bounds": (1.0,)}, "must be a pair"),
        ({"log_std_bounds": (-1.0, 1.0), "log_std_init": 2.0}, "log_std_init=2.0 is not allowed with log_std_bounds"),
        ({"squash_output": True}, "squash_output=True is not allowed without gSDE"),
    ],
)
def test_what_cannot_be_is_refused(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small(DualClipPPO, "MlpPolicy", ScriptedEnv(BOX, BOX_ACTIONS), policy_kwargs=kwargs)


def test_bounds_need_a_log_std() -> None:
    with pytest.raises(ValueError, match=r"log_std_bounds=\(-1, 1\) is not allowed with Discrete actions"):
        small(DualClipPPO, "MlpPolicy", ScriptedEnv(BOX, spaces.Discrete(2)), policy_kwargs={"log_std_bounds": (-1, 1)})
