"""In the place of SB3's PPO and sb3-contrib's TRPO: what was written for those works, and what cannot work is said."""

from __future__ import annotations

import importlib
import json
import pydoc
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import sb3_contrib
from gymnasium import spaces
from sb3_contrib.common.wrappers import ActionMasker
from sb3_contrib.ppo_mask.policies import MlpPolicy as MaskablePolicy
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.logger import HParam, Logger
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.utils import FloatSchedule, LinearSchedule
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecEnvWrapper, VecMonitor, VecNormalize
from stable_baselines3.sac.policies import SACPolicy

import sb3_ppo_ext
from sb3_ppo_ext import REINFORCE, TRPO, AdaptiveKLPPO, DualClipPPO, resume
from sb3_ppo_ext.common.validation import as_schedule
from tests.algorithms import ALGORITHMS, ROLLOUT, have_moved, parameters, small
from tests.envs import BOX, BOX_ACTIONS, ScriptedEnv, WithoutMasks

CHOICE = spaces.Discrete(3)


def env(obs_space: Any = BOX, action_space: Any = CHOICE) -> Any:
    return ScriptedEnv(obs_space, action_space)


# What a user gave stays what it was


def a_function(progress: float) -> float:
    return 0.02 * progress


GIVEN: dict[Any, tuple[str, ...]] = {
    DualClipPPO: ("learning_rate", "ent_coef", "dual_clip", "clip_range_high", "target_kl"),
    AdaptiveKLPPO: ("learning_rate", "ent_coef", "target_kl", "kl_coef"),
    TRPO: ("learning_rate", "ent_coef", "target_kl", "cg_damping"),
    REINFORCE: ("learning_rate", "ent_coef"),
}


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_an_attribute_is_the_number_that_was_given(algorithm: Any, tmp_path: Path) -> None:
    values = {name: 3.0 if name == "dual_clip" else 0.25 for name in GIVEN[algorithm]}
    model = small(algorithm, "MlpPolicy", env(), **values)
    model.save(tmp_path / "model")
    for one in (model, algorithm.load(tmp_path / "model", device="cpu")):
        assert json.loads(json.dumps({name: getattr(one, name) for name in values})) == values
        assert one.lr_schedule(0.5) == 0.25
        HParam({name: getattr(one, name) for name in values}, {"train/value_loss": 0.0})


@pytest.mark.parametrize("value", ["lin_0.02", a_function, LinearSchedule(0.02, 0.0, 1.0), 0.02])
def test_an_attribute_is_what_was_given(value: Any) -> None:
    model = small(AdaptiveKLPPO, "MlpPolicy", env(), learning_rate=value, ent_coef=value, target_kl=value)
    assert model.learning_rate is value
    assert model.ent_coef is value
    assert model.target_kl is value
    assert isinstance(model.lr_schedule, FloatSchedule)
    assert model.lr_schedule(0.5) == (0.02 if value == 0.02 else 0.01)
    policy = small(DualClipPPO, "MlpPolicy", env(), policy_kwargs={"critic_learning_rate": value}).policy
    assert policy.critic_learning_rate is value


def test_files_of_before_whose_attributes_are_schedules(tmp_path: Path) -> None:
    model = small(DualClipPPO, "MlpPolicy", env(), dual_clip=LinearSchedule(4.0, 2.0, 1.0))
    for name in ("learning_rate", "ent_coef", "dual_clip"):
        setattr(model, name, as_schedule(name, getattr(model, name), may_be_zero=True))
    model.save(tmp_path / "model")
    loaded = DualClipPPO.load(tmp_path / "model", env=env(), device="cpu")
    assert loaded._current_value(loaded.dual_clip) == 4.0
    assert loaded.learn(2 * ROLLOUT).coefficients()["dual_clip"] == 2.0


class Sets(BaseCallback):
    """
    Sets attributes of the model at the end of each rollout, before the update.

    :param values: by name
    """

    def __init__(self, **values: Any) -> None:
        super().__init__()
        self.values = values

    def _on_step(self) -> bool:
        return True

    def _on_rollout_end(self) -> None:
        for name, value in self.values.items():
            setattr(self.model, name, value)


@pytest.mark.parametrize(
    ("algorithm", "name", "value", "logged"),
    [
        (DualClipPPO, "dual_clip", 2.5, 2.5),
        (DualClipPPO, "dual_clip", "lin_8", 4.0),
        (DualClipPPO, "clip_range", 0.125, 0.125),
        (DualClipPPO, "clip_range_high", lambda progress: progress, 0.5),
        (DualClipPPO, "ent_coef", "lin_1", 0.5),
        (AdaptiveKLPPO, "target_kl", "lin_1", 0.5),
        (TRPO, "target_kl", 0.125, 0.125),
        (REINFORCE, "ent_coef", "lin_1", 0.5),
    ],
)
def test_what_a_callback_sets_takes_effect(algorithm: Any, name: str, value: Any, logged: float) -> None:
    model = small(algorithm, "MlpPolicy", DummyVecEnv([lambda: ScriptedEnv(BOX, CHOICE, script=((4, True, False),))]))
    model.learn(2 * ROLLOUT, callback=[Sets(**{name: value}), StopAfter(ROLLOUT)])
    assert model.logger.name_to_value[f"train/{name}"] == logged


class StopAfter(BaseCallback):
    """
    Ends the training in the first step after so many.

    :param steps: that are made
    """

    def __init__(self, steps: int) -> None:
        super().__init__()
        self.steps = steps

    def _on_step(self) -> bool:
        return self.num_timesteps <= self.steps


# The log


class Averaging(Logger):
    """A logger that averages all that it is given, as that of the imitation library does inside its algorithms."""

    def record(self, key: str, value: Any, exclude: Any = None) -> None:
        assert type(value) in (int, float) or not key.startswith("train/"), (key, value)
        self.record_mean(key, value, exclude)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("action_space", [CHOICE, BOX_ACTIONS], ids=["choice", "box"])
def test_the_log_holds_numbers_only(algorithm: Any, action_space: Any) -> None:
    policy_kwargs = {"critic_learning_rate": "lin_1e-3"}
    model = small(algorithm, "MlpPolicy", env(BOX, action_space), ent_coef=0.5, policy_kwargs=policy_kwargs)
    logger = Averaging(None, [])
    model.set_logger(logger)
    model.learn(2 * ROLLOUT, log_interval=1000)
    keys = {key for key in logger.name_to_value if key.startswith("train/")}
    assert {"train/ent_coef", "train/entropy_loss", "train/learning_rate", "train/value_loss"} <= keys
    assert logger.name_to_value["train/ent_coef"] == 0.5


@pytest.mark.parametrize(("ours", "theirs"), [(DualClipPPO, PPO), (AdaptiveKLPPO, PPO), (TRPO, sb3_contrib.TRPO)])
def test_the_log_has_the_keys_that_dashboards_read(ours: Any, theirs: Any) -> None:
    keys = []
    for algorithm in (ours, theirs):
        model = algorithm("MlpPolicy", env(BOX, BOX_ACTIONS), n_steps=ROLLOUT, batch_size=8)
        keys.append(set(model.learn(ROLLOUT, log_interval=1000).logger.name_to_value))
    assert keys[1] <= keys[0]


def test_why_trpo_made_no_step_is_said_on_the_console(capsys: pytest.CaptureFixture[str]) -> None:
    model = small(TRPO, "MlpPolicy", env(), verbose=1, accept_ratio=0.99, line_search_max_iter=1, target_kl=5.0)
    model.learn(ROLLOUT)
    assert model.logger.name_to_value["train/is_line_search_success"] == 0.0
    assert "TRPO left the policy as it was in this update: the line search failed by the" in capsys.readouterr().out


# Names of sb3-contrib


def test_the_old_name_of_sub_sampling_factor(tmp_path: Path) -> None:
    with pytest.warns(FutureWarning, match="fvp_subsampling is an old name: write sub_sampling_factor"):
        model = small(TRPO, "MlpPolicy", env(), fvp_subsampling=3)
    assert model.sub_sampling_factor == 3
    with pytest.raises(ValueError, match=r"fvp_subsampling=3 with sub_sampling_factor=2 is not allowed"):
        small(TRPO, "MlpPolicy", env(), fvp_subsampling=3, sub_sampling_factor=2)
    model.fvp_subsampling = vars(model).pop("sub_sampling_factor")  # as files of before have it
    model.save(tmp_path / "model")
    loaded = TRPO.load(tmp_path / "model", device="cpu")
    assert loaded.sub_sampling_factor == 3
    assert not hasattr(loaded, "fvp_subsampling")


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_help_names_what_the_policy_can_do(algorithm: Any) -> None:
    text = pydoc.plain(pydoc.render_doc(algorithm))
    assert "critic_learning_rate" in text
    assert "log_std_bounds" in text


@pytest.mark.parametrize(
    "name",
    [
        "buffers.RolloutBuffer",
        "buffers.DictRolloutBuffer",
        "buffers.RolloutSamples",
        "checkpoint.SafeCheckpointCallback",
        "episodes.EpisodeBuffer",
        "episodes.DictEpisodeBuffer",
        "checkpoint.save_checkpoint",
        "checkpoint.resume",
        "optimization.NonFiniteError",
        "policies.ActorCriticPolicy",
    ],
)
def test_what_files_and_configurations_name_is_where_it_was(name: str) -> None:
    module, _, attribute = name.partition(".")
    assert hasattr(importlib.import_module(f"sb3_ppo_ext.common.{module}"), attribute)


def test_checkpoints_are_importable_from_the_top() -> None:
    from sb3_ppo_ext.common.saving import checkpoint

    functions = ("save_checkpoint", "latest_checkpoint", "resume", "load_weights", "load_vec_normalize")
    for name in ("SafeCheckpointCallback", *functions):
        assert getattr(sb3_ppo_ext, name) is getattr(checkpoint, name)
        assert name in sb3_ppo_ext.__all__


# What cannot be learnt is refused before training


class OwnMaskablePolicy(MaskablePolicy):
    def predict_values(self, obs: Any) -> Any:
        return 2.0 * super().predict_values(obs)


class OwnMemory(ActorCriticPolicy):
    def forward(self, obs: Any, state: Any) -> Any:  # type: ignore[override]
        return *super().forward(obs), state


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize(
    ("policy", "message"),
    [
        (OwnMemory, r"its forward\(\) needs state .* must derive from sb3_contrib's RecurrentActorCriticPolicy"),
        (lambda *args, **kwargs: OwnMemory(*args, **kwargs), r"policy=<lambda> is not allowed: .* needs state"),
        (OwnMaskablePolicy, r"its forward\(\) takes action_masks.* sb3_contrib.MaskablePPO"),
        (SACPolicy, r"policy=SACPolicy is not allowed: it has no evaluate_actions\(\)"),
    ],
    ids=["memory", "memory in a function", "masks", "no actor and critic"],
)
def test_policies_that_want_more_than_an_observation(algorithm: Any, policy: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small(algorithm, policy, env(BOX, BOX_ACTIONS))


def masked() -> Any:
    return ActionMasker(env(), lambda _: np.array([True, False, True]))


@pytest.mark.parametrize("in_processes", [False, True])
def test_an_environment_that_hides_its_masks_has_none(in_processes: bool) -> None:
    for make, has_masks in ((masked, True), (lambda: WithoutMasks(masked()), False)):
        vector = SubprocVecEnv([make], start_method="fork") if in_processes else DummyVecEnv([make])
        try:
            model = small(DualClipPPO, "MlpPolicy", VecNormalize(VecMonitor(vector))).learn(ROLLOUT)
            actions = set(model.rollout_buffer.actions.reshape(-1).tolist())
            assert actions == ({0.0, 2.0} if has_masks else {0.0, 1.0, 2.0})
        finally:
            vector.close()


class Obliging(DummyVecEnv):
    """Answers None for what its environments do not have, as vectors of environments on a GPU do."""

    def get_attr(self, attr_name: str, indices: Any = None) -> list[Any]:
        return [getattr(one, attr_name, None) for one in self.envs]


class Unhelpful(DummyVecEnv):
    def get_attr(self, attr_name: str, indices: Any = None) -> list[Any]:
        if attr_name == "render_mode":
            return [None] * self.num_envs
        raise NotImplementedError


@pytest.mark.parametrize("vector_class", [Obliging, Unhelpful])
def test_a_vector_that_cannot_tell_has_no_masks(vector_class: Any) -> None:
    model = small(DualClipPPO, "MlpPolicy", vector_class([env]))
    before = parameters(model)
    model.learn(ROLLOUT)
    assert have_moved(model, before)


class Simulator(gym.Env[Any, Any]):
    """Many environments in one object that says it is a single one, as Isaac Lab's do."""

    num_envs = 2
    observation_space = spaces.Box(-1.0, 1.0, (2, 4), np.float32)
    single_observation_space = BOX
    action_space = CHOICE


@pytest.mark.parametrize(
    "vector",
    [Simulator, lambda: gym.wrappers.OrderEnforcing(Simulator())],
    ids=["simulator", "wrapped"],
)
def test_vectors_of_environments_that_are_neither_sb3s_nor_gymnasiums(vector: Any) -> None:
    with pytest.raises(ValueError, match=r"env=.* it is a vector of environments.*VecEnv wrapper") as error:
        DualClipPPO("MlpPolicy", vector(), device="cpu")
    assert "OpenAI" not in str(error.value)


@pytest.mark.parametrize(
    ("space", "flattens"),
    [
        (spaces.Tuple([CHOICE, BOX]), True),
        (spaces.Dict({"inner": spaces.Dict({"vector": BOX})}), True),
        (spaces.Discrete(3, start=1), True),
        (spaces.Sequence(CHOICE), False),
    ],
    ids=["tuple", "nested", "from one", "sequence"],
)
def test_observations_that_must_be_flattened(space: Any, flattens: bool) -> None:
    with pytest.raises(ValueError, match=r"observation_space.* is not supported") as error:
        small(DualClipPPO, "MultiInputPolicy", env(space))
    assert isinstance(error.value, NotImplementedError)  # what SB3 raises for it
    assert ("gymnasium.wrappers.FlattenObservation(env)" in str(error.value)) == flattens
    if flattens:
        small(DualClipPPO, "MlpPolicy", gym.wrappers.FlattenObservation(env(space))).learn(ROLLOUT)


class Counts(gym.Env[Any, Any]):
    """
    Takes the actions of its space only.

    :param action_space: of any start
    """

    def __init__(self, action_space: Any) -> None:
        self.observation_space, self.action_space = BOX, action_space

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        return self.observation_space.sample(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        assert self.action_space.contains(action), action
        return self.observation_space.sample(), 0.0, True, False, {}


@pytest.mark.parametrize("action_space", [spaces.Discrete(3, start=5), spaces.MultiDiscrete([2, 3], start=[0, -1])])
def test_actions_that_do_not_count_from_zero(action_space: Any) -> None:
    with pytest.raises(ValueError, match=r"action_space=.* must count from 0. (.*) shifts them") as error:
        small(DualClipPPO, "MlpPolicy", Counts(action_space))
    proposal = str(error.value).split("from 0. ")[1].removesuffix(" shifts them")
    env = Counts(action_space)
    small(DualClipPPO, "MlpPolicy", eval(proposal, {"gymnasium": gym, "env": env})).learn(ROLLOUT)


def test_images_that_are_too_small_for_the_cnn() -> None:
    image = spaces.Box(0, 255, (7, 7, 3), np.uint8)
    for policy, space in (("CnnPolicy", image), ("MultiInputPolicy", spaces.Dict({"image": image}))):
        with pytest.raises(ValueError, match=r"needs at least 36 x 36 pixels; .*ResizeObservation") as error:
            small(DualClipPPO, policy, env(space))
        assert "CnnPolicy for images" not in str(error.value)
    small(DualClipPPO, "MlpPolicy", env(image))
    small(DualClipPPO, "CnnPolicy", env(spaces.Box(0, 255, (36, 36, 3), np.uint8)))


# Errors name what they come from


class Deaf(VecEnvWrapper):
    """Around what has no ``seed``, as many adapters of other libraries are."""

    def reset(self) -> Any:
        return self.venv.reset()

    def step_wait(self) -> Any:
        return self.venv.step_wait()

    def seed(self, seed: int | None = None) -> Any:
        raise AttributeError("'Pool' object has no attribute 'seed'")


def test_environments_that_cannot_be_seeded() -> None:
    with pytest.raises(ValueError, match=r"seed=0 is not allowed with .* Deaf: its seed\(\) does not work") as error:
        small(DualClipPPO, "MlpPolicy", Deaf(DummyVecEnv([env])))
    assert "rollout_buffer_class" not in str(error.value)
    small(DualClipPPO, "MlpPolicy", Deaf(DummyVecEnv([env])), seed=None).learn(ROLLOUT)


def test_an_error_inside_the_seeding_of_an_environment_is_its_own() -> None:
    class Broken(DummyVecEnv):
        def seed(self, seed: int | None = None) -> Any:
            raise RuntimeError("the simulator has not started")

    with pytest.raises(RuntimeError, match="the simulator has not started"):
        small(DualClipPPO, "MlpPolicy", Broken([env]))


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_another_kind_of_environment_is_refused_by_set_env_and_none_by_the_constructor(algorithm: Any) -> None:
    model = small(algorithm, "MlpPolicy", "CartPole-v1")
    with pytest.raises(ValueError, match="is not allowed"):
        model.set_env(Simulator())
    with pytest.raises(ValueError, match="env=None is not allowed"):
        algorithm("MlpPolicy", None)


def test_a_folder_of_checkpoints_is_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"it is a folder; latest_checkpoint\(\) names"):
        resume(DualClipPPO, tmp_path, "CartPole-v1")


def test_the_episode_buffer_is_not_in_the_file(tmp_path: Path) -> None:
    """Of REINFORCE, whose buffer no other algorithm can fill."""
    small(REINFORCE, "MlpPolicy", "CartPole-v1").save(tmp_path / "model")
    model = PPO.load(tmp_path / "model", device="cpu")
    assert model.rollout_buffer_class.__module__.startswith("stable_baselines3.")
