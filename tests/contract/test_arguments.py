"""Bad input is a ValueError that names the argument and its value, before training starts."""

from __future__ import annotations

import inspect
import math
from typing import Any

import pytest
import sb3_contrib
from stable_baselines3 import PPO
from stable_baselines3.common.utils import LinearSchedule

from sb3_ppo_ext import REINFORCE, TRPO, AdaptiveKLPPO, DualClipPPO

SHARED: dict[str, tuple[Any, ...]] = {
    "learning_rate": (-1e-3, math.nan, math.inf, "lin_x", "exp_0.1", "lin_-1", True, lambda _: -1.0, lambda _: "a"),
    "gamma": (-0.1, 1.1, math.nan, "0.9"),
    "ent_coef": (-0.1, math.nan, None),
    "sde_sample_freq": (-2, 1.5),
}
ROLLOUT = {"n_steps": (0, -1, 2.5, "8", True, None), "gae_lambda": (-0.1, 1.1, math.nan)}
PROXIMAL: dict[str, tuple[Any, ...]] = {
    **SHARED,
    **ROLLOUT,
    "batch_size": (0, 1, -64, 3.0),
    "n_epochs": (0, -1, 1.5),
    "clip_range_vf": (0.0, -0.2, "clip"),
    "normalize_advantage": (None, "no"),
    "vf_coef": (-0.5, math.inf),
    "max_grad_norm": (0.0, -1.0, math.nan),
}
BAD: dict[type, dict[str, tuple[Any, ...]]] = {
    DualClipPPO: {
        **PROXIMAL,
        "clip_range": (0.0, -0.2, math.nan, "0.2", None),
        "clip_range_high": (0.0, -0.2, "lin_0"),
        "dual_clip": (1.2, 1.0, 0.0, -3.0, "lin_3", math.nan),
        "target_kl": (0.0, -0.01, "small"),
    },
    AdaptiveKLPPO: {
        **PROXIMAL,
        "clip_range": (0.0, -0.2),
        "target_kl": (0.0, -0.01, math.nan),
        "kl_coef": (-1.0, math.nan, 1e5, 0.0),
        "kl_tolerance": (0.9, math.nan),
        "kl_coef_factor": (0.5, math.inf),
        "kl_coef_min": (-1.0,),
        "kl_coef_max": (1e-5, math.inf),
    },
    TRPO: {
        **SHARED,
        **ROLLOUT,
        "batch_size": (0, -1, 1.5),
        "cg_max_steps": (0, 1.5),
        "cg_damping": (-0.1, math.nan),
        "cg_residual_tol": (-1e-3, math.inf),
        "line_search_shrinking_factor": (0.0, 1.0, 1.5),
        "line_search_max_iter": (0, 2.5),
        "accept_ratio": (-0.1, 1.0),
        "n_critic_updates": (0, -1),
        "normalize_advantage": (1,),
        "target_kl": (0.0, -0.01),
        "fvp_subsampling": (0, 1.5),
    },
}
CASES = [
    pytest.param(algorithm, name, value, id=f"{algorithm.__name__}-{name}-{value!r:.20}")
    for algorithm, arguments in BAD.items()
    for name, values in arguments.items()
    for value in values
]


@pytest.mark.parametrize(("algorithm", "name", "value"), CASES)
def test_bad_argument(algorithm: Any, name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=r"is not allowed: ") as error:
        algorithm("MlpPolicy", "CartPole-v1", device="cpu", **{name: value})
    message = str(error.value)
    assert f"{name}=" in message
    if not callable(value) and not isinstance(value, str):
        assert repr(value) in message or f"{value:g}" in message


def test_dual_clip_says_why() -> None:
    with pytest.raises(ValueError, match=r"dual_clip=1.4 with clip_range_high=0.5 .* above 1 \+ clip_range_high"):
        DualClipPPO("MlpPolicy", "CartPole-v1", device="cpu", dual_clip=1.4, clip_range_high=0.5)
    DualClipPPO("MlpPolicy", "CartPole-v1", device="cpu", dual_clip=1.4, clip_range_high=0.3)
    with pytest.raises(ValueError, match=r"at progress 0\.5"):  # where one schedule meets another
        DualClipPPO("MlpPolicy", "CartPole-v1", device="cpu", dual_clip=lambda p: 1.0 + p, clip_range=0.5)


def test_schedules_in_every_form() -> None:
    model = DualClipPPO(
        "MlpPolicy",
        "CartPole-v1",
        device="cpu",
        learning_rate="lin_1e-3",
        clip_range=LinearSchedule(0.3, 0.1, 1.0),
        clip_range_high="lin_0.5",
        clip_range_vf=0.25,
        dual_clip=lambda progress: 2.0 + progress,
    )
    model._current_progress_remaining = 0.5
    assert model.lr_schedule(0.5) == pytest.approx(5e-4)
    assert model._coefficients() == pytest.approx(
        {"clip_range": 0.2, "clip_range_high": 0.25, "clip_range_vf": 0.25, "dual_clip": 2.5}
    )


def test_a_schedule_never_sees_a_negative_progress() -> None:
    """The last rollout goes past total_timesteps; a linear schedule that ends at zero must not go below it."""
    model = DualClipPPO("MlpPolicy", "CartPole-v1", n_steps=64, device="cpu", clip_range="lin_0.2")
    model.learn(100)
    assert model.num_timesteps == 128
    assert model._current_progress_remaining == 0.0


def test_a_truncated_minibatch_is_a_warning() -> None:
    with pytest.warns(UserWarning, match=r"batch_size=48 does not divide n_steps \* n_envs = 64"):
        DualClipPPO("MlpPolicy", "CartPole-v1", n_steps=64, batch_size=48, device="cpu")
    with pytest.raises(ValueError, match=r"n_steps=1 with 1 environment\(s\) is not allowed"):
        DualClipPPO("MlpPolicy", "CartPole-v1", n_steps=1, batch_size=2, device="cpu")


def positional(algorithm: Any) -> dict[str, Any]:
    parameters = inspect.signature(algorithm.__init__).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD}


def test_constructors_are_in_the_order_that_users_know() -> None:
    assert positional(DualClipPPO) == positional(PPO)  # the defaults, too
    ours, theirs = positional(AdaptiveKLPPO), positional(PPO)
    assert list(ours) == list(theirs)
    assert {name for name in ours if ours[name] != theirs[name]} == {"clip_range"}
    ours, theirs = positional(TRPO), positional(sb3_contrib.TRPO)
    assert list(ours) == [{"sub_sampling_factor": "fvp_subsampling"}.get(name, name) for name in theirs]
    assert {name for name in theirs if name in ours and ours[name] != theirs[name]} == {"target_kl", "cg_damping"}
    for algorithm in (DualClipPPO, AdaptiveKLPPO, TRPO, REINFORCE):
        parameters = list(positional(algorithm))
        assert parameters[:4] == ["self", "policy", "env", "learning_rate"]
