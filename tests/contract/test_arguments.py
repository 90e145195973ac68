"""Bad input is a ValueError that names the argument and its value, before training starts."""

from __future__ import annotations

import inspect
import math
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import sb3_contrib
import torch as th
from stable_baselines3 import PPO
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.utils import ConstantSchedule, LinearSchedule
from stable_baselines3.common.vec_env import DummyVecEnv

from sb3_ppo_ext import REINFORCE, TRPO, AdaptiveKLPPO, DualClipPPO
from sb3_ppo_ext.common.rollout.buffers import DictRolloutBuffer
from tests.algorithms import ALGORITHMS, ROLLOUT, parameters, small
from tests.envs import BOX, BOX_ACTIONS, ScriptedEnv

SHARED: dict[str, tuple[Any, ...]] = {
    "learning_rate": (
        *(-1e-3, math.nan, math.inf, "lin_x", "exp_0.1", "lin_-1", True, (1e-3, 0.0), th.tensor(1e-3)),
        *(lambda _: -1.0, lambda _: "a", lambda _: None, lambda: 1e-3, lambda _: np.zeros(2)),
    ),
    "gamma": (-0.1, 1.1, math.nan, "0.9"),
    "ent_coef": (-0.1, math.nan, math.inf, None, True, "auto", "lin_0", lambda _: -1.0),
    "sde_sample_freq": (-2, 1.5),
    "seed": (-1, 1.5, 2**32, "0"),
    "device": ("gpu", "", "meta", None, [], 1.5),
    "verbose": ("1", None, 1.5),
    "tensorboard_log": (3, True, [], b"logs"),
    "torch_compile": (1, "yes", None),
}
OF_ROLLOUTS: dict[str, tuple[Any, ...]] = {
    "n_steps": (0, -1, 2.5, "8", True, None),
    "gae_lambda": (-0.1, 1.1, math.nan),
}
PROXIMAL: dict[str, tuple[Any, ...]] = {
    **SHARED,
    **OF_ROLLOUTS,
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
        "clip_range": (0.0, -0.2, math.nan, "0.2", None, (0.2, 0.3)),
        "clip_range_high": (0.0, -0.2, "lin_0"),
        "dual_clip": (1.2, 1.0, 0.0, -3.0, "lin_3", math.nan, [3.0]),
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
        **OF_ROLLOUTS,
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
        "sub_sampling_factor": (0, 1.5),
    },
    REINFORCE: {n: values for n, values in SHARED.items() if n in inspect.signature(REINFORCE).parameters},
}
CASES = [
    pytest.param(algorithm, name, value, id=f"{algorithm.__name__}-{name}-{value!r:.20}")
    for algorithm, arguments in BAD.items()
    for name, values in arguments.items()
    for value in values
]


@pytest.mark.parametrize(("algorithm", "name", "value"), CASES)
def test_a_bad_argument_is_refused_by_name_and_value(algorithm: Any, name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=r"is not allowed: ") as error:
        algorithm("MlpPolicy", "CartPole-v1", **{"device": "cpu", name: value})
    assert isinstance(error.value, AssertionError)  # what SB3 raises for some of them
    message = str(error.value)
    assert f"{name}=" in message
    if value in ([], None) or (not callable(value) and not isinstance(value, str)):
        assert repr(value) in message or f"{value:g}" in message


def test_a_penalty_that_no_factor_changes_is_refused() -> None:
    zero = {"kl_coef": 0.0, "kl_coef_min": 0.0, "device": "cpu"}
    with pytest.raises(ValueError, match=r"kl_coef=0\.0 is not allowed with kl_coef_factor=2\.0"):
        AdaptiveKLPPO("MlpPolicy", "CartPole-v1", **zero)
    AdaptiveKLPPO("MlpPolicy", "CartPole-v1", **zero, kl_coef_factor=1.0)


# Built by SB3 from what the user gives, as are the environments
WRONG: dict[str, tuple[Any, ...]] = {
    "policy": (3, None, th.nn.Linear, "Mlp", "ActorCriticPolicy"),
    "policy_kwargs": (
        [1],
        "net_arch",
        {"net_ach": [4]},
        {"net_arch": "64"},
        {"net_arch": [-4]},
        {"net_arch": {"pi": [4], "v": [4]}},
        {"net_arch": [4.5]},
        {"activation_fn": "relu"},
        {"features_extractor_class": 3},
        {"optimizer_kwargs": {"speed": 1}},
        {"use_sde": True},
    ),
    "rollout_buffer_class": (3, "RolloutBuffer", object, ReplayBuffer, DictRolloutBuffer),
    "rollout_buffer_kwargs": ([1], "size", {"size": 1}, {"gamma": 1.0}),
}


@pytest.mark.parametrize(
    ("name", "value"),
    [pytest.param(name, value, id=f"{name}-{value!r:.30}") for name, values in WRONG.items() for value in values],
)
def test_what_cannot_be_built_is_refused_by_name_and_value(name: str, value: Any) -> None:
    kwargs = {"policy": "MlpPolicy", "env": "CartPole-v1", "device": "cpu", name: value}
    reason = r"(: it must be one of 'MlpP|: it has no evaluate|: its keys must be 'pi'| \((?s:.+); it must fit)"
    with pytest.raises(ValueError, match=f"is not allowed{reason}") as error:
        DualClipPPO(**kwargs)
    name, value = ("net_arch", value["net_arch"]) if "its keys" in str(error.value) else (name, value)
    assert f"{name}={getattr(value, '__name__', repr(value))}" in str(error.value)


@pytest.mark.parametrize(
    ("kwargs", "meant"),
    [
        ({"policy_kwargs": {"net_ach": [4]}}, "net_arch"),
        ({"policy_kwargs": {"critic_learning_rat": 1e-3}}, "critic_learning_rate"),
        ({"policy_kwargs": {"optimizer_kwargs": {"beta": (0.9, 0.99)}}}, "betas"),
        ({"policy_kwargs": {"optimizer_class": th.optim.SGD, "optimizer_kwargs": {"momentun": 0.9}}}, "momentum"),
        ({"rollout_buffer_kwargs": {"gae_lamda": 0.9}}, "gae_lambda"),
    ],
)
def test_a_typo_is_answered_by_what_may_be_meant(kwargs: Any, meant: str) -> None:
    with pytest.raises(ValueError, match=rf"Did you mean '{meant}'\?"):
        DualClipPPO("MlpPolicy", "CartPole-v1", device="cpu", **kwargs)


def test_the_fault_of_the_machine_is_no_bad_input() -> None:
    class Large(th.nn.Module):
        def __init__(self) -> None:
            raise th.OutOfMemoryError("no memory is left")

    with pytest.raises(th.OutOfMemoryError):
        DualClipPPO("MlpPolicy", "CartPole-v1", device="cpu", policy_kwargs={"activation_fn": Large})


@pytest.mark.parametrize("env", [None, 3, [ScriptedEnv], ScriptedEnv], ids=["none", "number", "list", "class"])
def test_what_is_no_environment_is_refused(env: Any) -> None:
    with pytest.raises(ValueError, match=r"env=.+ is not allowed: it must be (an|a Gymnasium) environment") as error:
        DualClipPPO("MlpPolicy", env, device="cpu")
    assert "OpenAI" not in str(error.value)


def test_an_environment_without_spaces() -> None:
    class Forgets(gym.Env[Any, Any]):
        pass

    with pytest.raises(ValueError, match=r"observation_space=None is not supported: it must be Box"):
        DualClipPPO("MlpPolicy", Forgets(), device="cpu")


def test_what_sb3_takes_is_taken(tmp_path: Path) -> None:
    """A GPU where there is none (which is said), a path object, a bool, a function in the place of a class."""

    def policy(*args: Any, **kwargs: Any) -> ActorCriticPolicy:
        return ActorCriticPolicy(*args, **{**kwargs, "net_arch": [4]})

    kwargs: dict[str, Any] = {"tensorboard_log": tmp_path, "verbose": False, "n_steps": 8, "batch_size": 8}
    if th.cuda.is_available():
        model = DualClipPPO(policy, "CartPole-v1", device="cuda", **kwargs)
    else:
        with pytest.warns(UserWarning, match="device='cuda': torch finds no CUDA here, so the CPU is used"):
            model = DualClipPPO(policy, "CartPole-v1", device="cuda", **kwargs)
    assert model.learn(8).device.type == ("cuda" if th.cuda.is_available() else "cpu")
    assert list(tmp_path.glob("DualClipPPO_1/*"))


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
    assert model.coefficients() == pytest.approx(
        {"clip_range": 0.2, "clip_range_high": 0.25, "clip_range_vf": 0.25, "dual_clip": 2.5, "ent_coef": 0.0}
    )


@pytest.mark.parametrize("of", [th.tensor, np.array, np.float32, lambda x: th.tensor([x])])
def test_a_schedule_may_return_what_float_takes(of: Any) -> None:
    """As in SB3, where torch's and numpy's own schedulers are often wrapped."""
    model = DualClipPPO(
        "MlpPolicy",
        "CartPole-v1",
        device="cpu",
        learning_rate=lambda progress: of(progress * 1e-3),
        ent_coef=lambda progress: of(progress),
        dual_clip=lambda progress: of(2.0 + progress),
    )
    model._current_progress_remaining = 0.5
    assert model.lr_schedule(0.5) == pytest.approx(5e-4)
    assert model.coefficients() == pytest.approx({"clip_range": 0.2, "dual_clip": 2.5, "ent_coef": 0.5})
    assert all(type(value) is float for value in model.coefficients().values())


class Records(BaseCallback):
    """
    What is logged as the weight of the entropy, after each update but the last.

    :param ent_coef: to be set before the first update; None: left as it is
    """

    def __init__(self, ent_coef: Any = None) -> None:
        super().__init__()
        self.ent_coef = ent_coef
        self.logged: list[float | None] = []

    def _on_step(self) -> bool:
        return True

    def _on_rollout_start(self) -> None:
        if self.ent_coef is not None:
            self.model.ent_coef = self.ent_coef
        if self.model._n_updates:
            self.logged.append(self.logger.name_to_value.get("train/ent_coef"))


def trained(algorithm: Any, ent_coef: Any, callback: Any = None) -> Any:
    env = DummyVecEnv([lambda: ScriptedEnv(BOX, BOX_ACTIONS, script=((4, True, False),))])
    model = small(algorithm, "MlpPolicy", env, ent_coef=ent_coef, learning_rate=1e-2)
    return model.learn(4 * ROLLOUT, callback=callback, log_interval=1000)


def test_an_interval_of_logs_must_not_be_0() -> None:
    env = DummyVecEnv([lambda: ScriptedEnv(BOX, BOX_ACTIONS, script=((4, True, False),))])
    model = small(DualClipPPO, "MlpPolicy", env)
    with pytest.raises(ValueError, match="log_interval=0 is not allowed"):
        model.learn(ROLLOUT, log_interval=0)
    assert model.num_timesteps == 0


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_the_weight_of_the_entropy_may_follow_a_schedule(algorithm: Any) -> None:
    for ent_coef in ("lin_0.04", LinearSchedule(0.04, 0.0, 1.0), lambda progress: 0.04 * progress):
        callback = Records()
        model = trained(algorithm, ent_coef, callback)
        assert callback.logged == pytest.approx([0.03, 0.02, 0.01])
        assert model.ent_coef is ent_coef


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_weight_of_the_entropy_stays_a_number(algorithm: Any) -> None:
    callback = Records()
    number = trained(algorithm, 0.5, callback)
    assert number.ent_coef == 0.5
    assert callback.logged == [0.5] * 3
    # A schedule that is always so, and a callback that sets it, are the same. And it matters.
    by_schedule = trained(algorithm, ConstantSchedule(0.5))
    by_callback = trained(algorithm, 0.0, Records(0.5))
    for model in (by_schedule, by_callback):
        assert all(map(th.equal, parameters(model), parameters(number)))
    without = trained(algorithm, 0.0)
    assert not all(map(th.equal, parameters(without), parameters(number)))
    falling = trained(algorithm, "lin_0.5")
    assert not all(map(th.equal, parameters(falling), parameters(number)))


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
    assert list(ours) == list(theirs)
    assert {name for name in theirs if ours[name] != theirs[name]} == {"target_kl", "cg_damping"}
    for algorithm in (DualClipPPO, AdaptiveKLPPO, TRPO, REINFORCE):
        parameters = list(positional(algorithm))
        assert parameters[:4] == ["self", "policy", "env", "learning_rate"]
