"""Whatever a constructor is given, it says ``ValueError``, or the model trains: for any combination of arguments."""

from __future__ import annotations

import inspect
import math
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from stable_baselines3.common import buffers as sb3
from stable_baselines3.common.utils import ConstantSchedule, LinearSchedule
from stable_baselines3.common.vec_env import DummyVecEnv

from sb3_ppo_ext.common.errors import NonFiniteError
from sb3_ppo_ext.common.rollout.buffers import DictRolloutBuffer, RolloutBuffer
from tests.algorithms import ALGORITHMS
from tests.custom import EveryStepBuffer
from tests.envs import BOX, DICT, ScriptedEnv

# What nobody should give: of each type, and at each edge.
NONSENSE: st.SearchStrategy[Any] = st.sampled_from(
    [None, True, -1, 0, 1.5, -0.5, math.nan, math.inf, -math.inf, "", "many", "lin_", "lin_-1", [], {}, (1, 2), b"x"]
)


def mostly(good: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """Of twenty arguments, one or two are nonsense; if each were a coin's throw, no model would ever train."""
    return st.integers(0, 19).flatmap(lambda die: NONSENSE if die == 0 else good)


def number(low: float, high: float) -> st.SearchStrategy[Any]:
    return st.one_of(
        st.sampled_from([low, high, (low + high) / 2]),
        st.floats(low, high),
        st.floats(low, high).map(np.float64),
    )


def schedule(low: float, high: float) -> st.SearchStrategy[Any]:
    numbers = st.floats(low, high)
    return st.one_of(
        numbers,
        numbers.map(ConstantSchedule),
        numbers.map(lambda start: LinearSchedule(start, low, 1.0)),
        numbers.map(lambda start: f"lin_{start}"),
        numbers.map(lambda start: f"cos_{start}_{high}_warmup_0.25"),
        st.just(lambda progress: low + (high - low) * progress),
    )


BOOL = st.booleans()
RATE = schedule(1e-5, 1e-2)
POLICY_KWARGS: st.SearchStrategy[dict[str, Any]] = st.fixed_dictionaries(
    {"net_arch": st.sampled_from([[], [4], {"pi": [3], "vf": [5, 4]}])},
    optional={
        "log_std_init": st.floats(-2, 1),
        "ortho_init": BOOL,
        "share_features_extractor": BOOL,
        "use_expln": BOOL,
        "layer_norm": BOOL,
        "squash_output": BOOL,
        "critic_learning_rate": mostly(RATE),
        "log_std_bounds": mostly(st.sampled_from([(-3, 2), (-3.0, 2.0), [-math.inf, 2], (0.5, 0.5), (2, -2)])),
    },
)
# Each argument of each constructor has one. The sizes are small, or an example would take long.
GOOD: dict[str, st.SearchStrategy[Any]] = {
    "policy": st.sampled_from(["MlpPolicy", "MultiInputPolicy", "MlpLstmPolicy"]),
    "learning_rate": st.one_of(RATE, st.just(0.0), st.just(1e6)),
    "n_steps": st.integers(1, 24),
    "batch_size": st.integers(1, 40),
    "n_epochs": st.integers(1, 2),
    "episodes_per_env": st.integers(1, 3),
    "gamma": number(0, 1),
    "gae_lambda": number(0, 1),
    "clip_range": st.one_of(schedule(0.05, 0.9), st.none()),
    "clip_range_vf": st.one_of(schedule(0.05, 5), st.none()),
    "clip_range_high": st.one_of(schedule(0.05, 0.9), st.none()),
    "dual_clip": st.one_of(schedule(1.9, 5), st.none()),
    "normalize_advantage": BOOL,
    "ent_coef": st.one_of(number(0, 0.1), schedule(0, 0.1)),
    "vf_coef": number(0, 2),
    "max_grad_norm": st.one_of(number(0.1, 2), st.just(math.inf)),
    "use_sde": BOOL,
    "sde_sample_freq": st.integers(-1, 5),
    "target_kl": st.one_of(number(0.001, 0.5), schedule(0.001, 0.5), st.none()),
    "stats_window_size": st.integers(1, 10),
    "seed": st.one_of(st.integers(0, 2**32 - 10), st.none()),
    "kl_coef": number(1e-4, 10),
    "kl_tolerance": number(1, 3),
    "kl_coef_factor": number(1, 4),
    "kl_coef_min": number(0, 1e-4),
    "kl_coef_max": number(10, 1e4),
    "cg_max_steps": st.integers(1, 4),
    "cg_damping": st.one_of(number(0, 1), st.none()),
    "cg_residual_tol": number(0, 1e-2),
    "line_search_shrinking_factor": st.floats(0.1, 0.95),
    "line_search_max_iter": st.integers(1, 4),
    "accept_ratio": st.floats(0, 0.9),
    "n_critic_updates": st.integers(1, 2),
    "sub_sampling_factor": st.integers(1, 30),
    "returns": st.sampled_from(["reward_to_go", "total"]),
    "baseline": st.sampled_from(["none", "mean", "optimal", "leave_one_out", "value"]),
    "discount_from": st.sampled_from(["present", "start"]),
    "bootstrap_timeouts": BOOL,
    "max_episode_steps": st.integers(4, 100),
    "rollout_buffer_class": st.sampled_from(
        [None, RolloutBuffer, DictRolloutBuffer, EveryStepBuffer, sb3.RolloutBuffer]
    ),
    "rollout_buffer_kwargs": st.sampled_from([None, {}, {"gae_lambda": 0.5}, {"size": 1}]),
    "tensorboard_log": st.sampled_from([None, "logs", Path("more", "logs")]),
    "policy_kwargs": POLICY_KWARGS,
    "verbose": st.sampled_from([0, 1, 2, False]),
    "device": st.sampled_from(["cpu", "auto", "cuda", "meta", th.device("cpu")]),
    "torch_compile": st.just(False),
    "kl_adaptive_lr": st.one_of(
        st.none(),
        st.fixed_dictionaries(
            {},
            optional={
                "target_kl": mostly(number(0.001, 0.5)),
                "factor": mostly(number(1.1, 3)),
                "maximum": mostly(number(1e-2, 1)),
                "every": mostly(st.sampled_from(["minibatch", "epoch"])),
            },
        ),
    ),
    "rollback": BOOL,
    "recompute_advantages": BOOL,
    "reference_policy": st.sampled_from([None, "initial"]),
    "reference_kl_coef": st.one_of(
        number(0, 2), schedule(0, 1), st.fixed_dictionaries({"target_kl": mostly(number(0.001, 0.5))})
    ),
    "reference_kl": st.sampled_from(["reward", "loss"]),
    "n_reused_rollouts": st.integers(0, 2),
    "reuse": st.sampled_from(
        [
            None,
            None,
            {},
            {"target": "vtrace"},
            {"proximal": "newest", "max_importance_weight": 1.5},
            {"proximal": "ewma", "ewma_decay": 0.9},
        ]
    ),
    "sequence_length": st.sampled_from([None, 1, 2, 4]),
}
LEFT = {"self", "env", "_init_setup_model", "fvp_subsampling"}  # the last is an old name of another
ACTION_SPACES = [
    spaces.Box(-1.0, 1.0, (2,), np.float32),
    spaces.Box(-1.0, 1.0, (1,), np.float32),
    spaces.Discrete(3),
    spaces.Discrete(1),
    spaces.MultiDiscrete([2, 3]),
    spaces.MultiBinary(2),
]


def arguments(algorithm: Any) -> st.SearchStrategy[dict[str, Any]]:
    names = [name for name in inspect.signature(algorithm.__init__).parameters if name not in LEFT]
    always = {"policy", "n_steps", "batch_size", "n_epochs", "episodes_per_env"}  # the defaults take long
    given = {name: mostly(GOOD[name]) for name in names}
    if "torch_compile" in given:  # to compile takes half a minute
        given["torch_compile"] = given["torch_compile"].filter(lambda value: value is not True)
    return st.fixed_dictionaries(
        {name: strategy for name, strategy in given.items() if name in always},
        optional={name: strategy for name, strategy in given.items() if name not in always},
    )


def trains_or_says_value_error(algorithm: Any, kwargs: dict[str, Any], action_space: Any, n_envs: int) -> None:
    kwargs.setdefault("policy_kwargs", {"net_arch": [4]})
    obs_space = DICT["choice"] if kwargs["policy"] == "MlpPolicy" and n_envs == 3 else BOX
    if kwargs["policy"] == "MultiInputPolicy":
        obs_space = spaces.Dict({"vector": BOX, "choice": DICT["choice"]})
    env = DummyVecEnv([lambda: ScriptedEnv(obs_space, action_space)] * n_envs)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # to warn is allowed
        try:
            model = algorithm(env=env, **{"device": "cpu", **kwargs})
        except ValueError:
            event("refused")
            return
        try:
            model.learn(1)
        except NonFiniteError:  # what only the numbers can show
            event("stopped")
        except ValueError as error:
            event("stopped")
            if "max_episode_steps" not in str(error):
                raise AssertionError("it should have been said by the constructor") from error
        else:
            event("trained")
    assert all(p.isfinite().all() for p in model.policy.parameters())


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_any_combination_of_arguments(algorithm: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # any string is a folder for TensorBoard

    @settings(max_examples=60, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(kwargs=arguments(algorithm), action_space=st.sampled_from(ACTION_SPACES), n_envs=st.integers(1, 3))
    def check(kwargs: dict[str, Any], action_space: Any, n_envs: int) -> None:
        trains_or_says_value_error(algorithm, kwargs, action_space, n_envs)

    check()


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_no_argument_is_left_out(algorithm: Any) -> None:
    assert inspect.signature(algorithm.__init__).parameters.keys() <= GOOD.keys() | LEFT
