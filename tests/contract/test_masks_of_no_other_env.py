"""``predict`` without masks takes those of the environments that its caller acts in, or raises an error."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path
from typing import Any, ClassVar

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces
from sb3_contrib.common.maskable.callbacks import MaskableEvalCallback
from stable_baselines3.common.callbacks import EvalCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import (
    DummyVecEnv,
    SubprocVecEnv,
    VecCheckNan,
    VecEnv,
    VecEnvWrapper,
    VecExtractDictObs,
    VecFrameStack,
    VecNormalize,
    VecTransposeImage,
)

from sb3_ppo_ext import DualClipPPO
from tests.contract.test_masks import ALGORITHMS, Forbids, policy_of
from tests.contract.zoo import Command

NOT_FOUND = "no environment was found that says which actions are allowed now"


@pytest.fixture(scope="module")
def model() -> DualClipPPO:
    env = make_vec_env(Forbids, n_envs=2, seed=0)
    return DualClipPPO("MlpPolicy", env, seed=0, device="cpu", **ALGORITHMS[DualClipPPO]).learn(16)


class Holder:
    """Acts in an environment that is in an attribute."""

    def __init__(self, env: Any, model: DualClipPPO) -> None:
        self.env, self.model = env, model

    def play(self) -> None:
        obs, _ = self.env.reset()
        for _ in range(20):
            obs, *_ = self.env.step(self.predict(obs)[0])

    def predict(self, obs: Any) -> Any:
        return self.model.predict(obs)


class SamePlace(Holder):
    def play(self) -> None:
        obs, _ = self.env.reset()
        for _ in range(20):
            obs, *_ = self.env.step(self.model.predict(obs)[0])


def acts_here(holder: Holder, other: Any) -> None:
    """As a script does, at the level of its module."""
    assert other is not None
    obs, _ = holder.env.reset()
    for _ in range(20):
        obs, *_ = holder.env.step(holder.model.predict(obs)[0])


def others() -> list[Any]:
    vector = make_vec_env(Forbids, n_envs=1, seed=3)
    return [vector, VecNormalize(vector), VecFrameStack(vector, 1), VecCheckNan(vector), Plain(vector), Forbids()]


class Plain(VecEnvWrapper):
    """A wrapper of the user's own."""

    def reset(self) -> Any:
        return self.venv.reset()

    def step_wait(self) -> Any:
        return self.venv.step_wait()


@pytest.mark.parametrize("kind", [Holder, SamePlace])
@pytest.mark.parametrize("index", range(6))
def test_an_environment_of_a_caller_further_away_does_not_count(model: DualClipPPO, index: int, kind: Any) -> None:
    other = others()[index]
    other.reset()
    with pytest.raises(ValueError, match=NOT_FOUND):
        kind(Forbids(), model).play()


@pytest.mark.parametrize("index", range(6))
def test_another_environment_of_the_caller_does_not_count(model: DualClipPPO, index: int) -> None:
    """Where it is not known what it has shown, this is found out as soon as it should have shown something else."""
    lenient = Forbids()
    taken: list[int] = []
    lenient.step = lambda action: taken.append(action) or (*lenient._next()[:1], 0.0, False, False, {})  # type: ignore
    other = others()[index]
    other.reset()
    with pytest.raises(ValueError, match=NOT_FOUND):
        acts_here(Holder(lenient, model), other)
    assert len(taken) <= [0, 0, 0, 0, 1, 2][index]


def test_observations_of_nobody_do_not_count(model: DualClipPPO) -> None:
    env = make_vec_env(Forbids, n_envs=1, seed=0)
    obs = env.reset()
    model.predict(obs)
    with pytest.raises(ValueError, match=NOT_FOUND):
        model.predict(obs + 1.0)


ENV = Forbids()


def test_a_global_variable_that_the_caller_reads_counts(model: DualClipPPO) -> None:
    obs, _ = ENV.reset(seed=0)
    for _ in range(20):
        obs, _, is_over, _, _ = ENV.step(model.predict(obs)[0])
        if is_over:
            obs, _ = ENV.reset()


SCRIPTS = {
    "vector": """
env = make_vec_env(Forbids, n_envs=4, seed=0)
ev = make_vec_env(Forbids, n_envs=4, seed=1)
ev.reset()
obs = env.reset()
for _ in range(20):
    action, _ = model.predict(obs)
    obs, reward, done, info = env.step(action)
""",
    "one": """
ev = make_vec_env(Forbids, n_envs=1, seed=1)
ev.reset()
env = Forbids()
for _ in range(4):
    obs, info = env.reset()
    terminated = False
    while not terminated:
        action, _ = model.predict(obs)
        obs, reward, terminated, truncated, info = env.step(action)
""",
}


@pytest.mark.parametrize("script", SCRIPTS.values(), ids=SCRIPTS)
def test_a_loop_of_a_script(model: DualClipPPO, script: str) -> None:
    exec(script, {"make_vec_env": make_vec_env, "Forbids": Forbids, "model": model})


class Wraps:
    """A model of the user's own."""

    def __init__(self, model: DualClipPPO) -> None:
        self.model, self.n_calls = model, 0

    def predict(self, *args: Any, **kwargs: Any) -> Any:
        self.n_calls += 1
        return self.model.predict(*args, **kwargs)


def test_evaluate_policy_of_one_environment_and_of_a_model_of_ones_own(model: DualClipPPO) -> None:
    env, other = Forbids(), make_vec_env(Forbids, n_envs=1, seed=5)
    other.reset()
    for asked in (model, model.policy, Wraps(model)):
        evaluate_policy(asked, env, 4, warn=False)  # type: ignore[arg-type]


class Looks(gym.Env[Any, Any]):
    """Shows images in a Dict, and forbids."""

    observation_space = spaces.Dict({"image": spaces.Box(0, 255, (36, 36, 1), np.uint8)})
    action_space = spaces.Discrete(5)
    inner: Any

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        self.inner = Forbids()
        self.inner.reset(seed=seed)
        return self._image(), {}

    def _image(self) -> Any:
        return {"image": self.np_random.integers(0, 255, (36, 36, 1), dtype=np.uint8)}

    def step(self, action: Any) -> Any:
        _, *rest = self.inner.step(action)
        return self._image(), *rest

    def action_masks(self) -> Any:
        return self.inner.action_masks()


@pytest.mark.parametrize("wrap", [VecExtractDictObs, VecFrameStack, VecTransposeImage], ids=lambda w: w.__name__)
def test_wrappers_of_images(wrap: Any) -> None:
    def make() -> VecEnv:
        env: Any = VecFrameStack(DummyVecEnv([Looks] * 2), 2)
        if wrap is VecTransposeImage:
            return VecTransposeImage(env)
        return VecTransposeImage(VecExtractDictObs(env, "image")) if wrap is VecExtractDictObs else env

    env, other = make(), make()
    policy = "CnnPolicy" if wrap is VecExtractDictObs else "MultiInputPolicy"
    kwargs = {"n_steps": 4, "batch_size": 4, "n_epochs": 1}
    model = DualClipPPO(policy, env, seed=0, device="cpu", **kwargs).learn(8)  # type: ignore[arg-type]
    obs = env.reset()
    for _ in range(10):
        other.reset()
        obs, *_ = env.step(model.predict(obs)[0])  # type: ignore[arg-type]
    evaluate_policy(model, make(), 2, warn=False)


@pytest.mark.parametrize("says", ["method", "info"])
def test_worker_processes_behind_wrappers(says: str) -> None:
    env: Any = VecNormalize(SubprocVecEnv([lambda: Monitor(Forbids("discrete", says))] * 2, start_method="fork"))
    try:
        model = DualClipPPO(policy_of(says), env, seed=0, device="cpu", **ALGORITHMS[DualClipPPO]).learn(32)
        evaluate_policy(model, env, 2)
        obs = env.reset()
        for _ in range(10):
            obs, *_ = env.step(model.predict(obs)[0])
        with pytest.raises(ValueError, match=NOT_FOUND):
            model.predict(obs + 1.0)
    finally:
        env.close()


@pytest.mark.parametrize("callback", [EvalCallback, MaskableEvalCallback])
def test_callbacks_that_evaluate(callback: Any) -> None:
    env, other = (VecNormalize(make_vec_env(Forbids, n_envs=n, seed=n)) for n in (2, 1))
    model = DualClipPPO("MlpPolicy", env, seed=0, device="cpu", **ALGORITHMS[DualClipPPO])
    model.learn(64, callback=callback(other, eval_freq=8, n_eval_episodes=2, verbose=0, warn=False))


class Shown(Forbids):
    """Has pictures, for a video."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 30}  # noqa: RUF012
    n_steps: ClassVar[Counter[str]] = Counter()

    def __init__(self, render_mode: str | None = None) -> None:
        super().__init__()
        self.render_mode = render_mode

    def step(self, action: Any) -> Any:
        Shown.n_steps["all"] += 1
        return super().step(action)

    def render(self) -> Any:
        return np.zeros((32, 32, 3), np.uint8)


def test_commands_of_the_rl_zoo(command: Command, model: DualClipPPO, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(gym.registry, "Shown-v0", gym.envs.registration.EnvSpec("Shown-v0", Shown))
    run = Path("logs/dual_clip_ppo/Shown-v0_1/Shown-v0")
    os.makedirs(run)
    (run / "config.yml").write_text("!!python/object/apply:collections.OrderedDict\n- []\n")
    (run / "args.yml").write_text("!!python/object/apply:collections.OrderedDict\n- - - env_kwargs\n    - null\n")
    model.save(run.with_suffix(".zip"))
    which = ("--algo", "dual_clip_ppo", "--env", "Shown-v0", "-f", "logs", "-n", "20")
    for arguments in (("enjoy", "--no-render"), ("record_video",)):
        Shown.n_steps.clear()
        command(*arguments, *which)
        assert Shown.n_steps["all"] >= 20
