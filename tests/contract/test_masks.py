"""Environments that say which actions are allowed: no other is taken, in training and afterwards."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from sb3_contrib.common.wrappers import ActionMasker
from stable_baselines3.common.callbacks import BaseCallback, EvalCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecEnv, VecFrameStack, VecNormalize

from sb3_ppo_ext import REINFORCE, TRPO, AdaptiveKLPPO, DualClipPPO

ALGORITHMS: dict[Any, dict[str, Any]] = {
    DualClipPPO: {"n_steps": 16, "batch_size": 16, "n_epochs": 2},
    AdaptiveKLPPO: {"n_steps": 16, "batch_size": 16, "n_epochs": 2},
    TRPO: {"n_steps": 16, "batch_size": 16, "n_critic_updates": 2},
    REINFORCE: {"episodes_per_env": 2, "baseline": "value", "n_critic_updates": 2},
}
ACTIONS: dict[str, Any] = {
    "discrete": spaces.Discrete(5),
    "multi-discrete": spaces.MultiDiscrete([3, 2]),
    "multi-binary": spaces.MultiBinary(3),
}


class Forbids(gym.Env[Any, Any]):
    """
    Draws at each step what is allowed, and raises if anything else is taken.

    :param actions: of the action spaces above
    :param says: how it says what is allowed: "method", "info", "observation"
    """

    def __init__(self, actions: str = "discrete", says: str = "method") -> None:
        self.action_space = ACTIONS[actions]
        self._choices = {"discrete": [5], "multi-discrete": [3, 2], "multi-binary": [2, 2, 2]}[actions]
        vector = spaces.Box(-1.0, 1.0, (3,), np.float32)
        self._says = says
        self.observation_space = vector
        if says == "observation":
            mask = spaces.Box(0, 1, (sum(self._choices),), np.float32)
            self.observation_space = spaces.Dict({"vector": vector, "action_mask": mask})
        if says == "method":
            self.action_masks = lambda: self._mask.copy()

    def _next(self) -> tuple[Any, dict[str, Any]]:
        parts = [self.np_random.random(n) < 0.4 for n in self._choices]
        for part in parts:
            part[self.np_random.integers(len(part))] = True
        self._mask = np.concatenate(parts)
        obs: Any = self.np_random.uniform(-1.0, 1.0, 3).astype(np.float32)
        if self._says == "observation":
            obs = {"vector": obs, "action_mask": self._mask.astype(np.float32)}
        return obs, {"action_mask": self._mask.astype(np.int8)} if self._says == "info" else {}

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self._steps = 0
        return self._next()

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        starts = np.cumsum([0, *self._choices[:-1]])
        taken = starts + np.asarray(action).reshape(-1).astype(int)
        if not self._mask[taken].all():
            raise AssertionError(f"{action} is not allowed")
        self._steps += 1
        obs, info = self._next()
        return obs, float(taken.sum()), self._steps == 5, False, info


def policy_of(says: str) -> str:
    return "MultiInputPolicy" if says == "observation" else "MlpPolicy"


@pytest.mark.parametrize("algorithm", ALGORITHMS, ids=lambda a: a.__name__)
@pytest.mark.parametrize(
    ("actions", "says"),
    [("discrete", "method"), ("multi-discrete", "info"), ("multi-binary", "observation"), ("discrete", "info")],
)
def test_training_and_evaluation_take_what_is_allowed(algorithm: Any, actions: str, says: str, tmp_path: Path) -> None:
    env = make_vec_env(lambda: Forbids(actions, says), n_envs=3, seed=0)
    other = make_vec_env(lambda: Forbids(actions, says), n_envs=2, seed=1)
    model = algorithm(policy_of(says), env, seed=0, device="cpu", **ALGORITHMS[algorithm])
    before = [p.detach().clone() for p in model.policy.parameters()]
    model.learn(100, callback=EvalCallback(other, eval_freq=8, n_eval_episodes=2, verbose=0))
    assert not all(map(th.equal, before, model.policy.parameters()))
    assert all(bool(p.isfinite().all()) for p in model.policy.parameters())
    model.save(tmp_path / "model")
    loaded = algorithm.load(tmp_path / "model")
    for deterministic in (True, False):
        evaluate_policy(loaded, other, n_eval_episodes=4, deterministic=deterministic)
    loaded.set_env(env)
    loaded.learn(50, reset_num_timesteps=False)


@pytest.mark.usefixtures("without_compiler")
@pytest.mark.parametrize("algorithm", ALGORITHMS, ids=lambda a: a.__name__)
def test_compiled_is_eager(algorithm: Any) -> None:
    models = []
    for torch_compile in (False, True):
        env = make_vec_env(lambda: Forbids("multi-discrete"), n_envs=2, seed=0)
        kwargs = {"seed": 0, "device": "cpu", "torch_compile": torch_compile, **ALGORITHMS[algorithm]}
        models.append(algorithm("MlpPolicy", env, **kwargs).learn(64))
    for eager, compiled in zip(*(model.policy.parameters() for model in models), strict=True):
        th.testing.assert_close(compiled, eager, atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("says", ["method", "info", "observation"])
def test_worker_processes_and_wrappers(says: str) -> None:
    worker = SubprocVecEnv([lambda: Forbids("discrete", says)] * 2)
    env: Any = VecNormalize(VecFrameStack(worker, 2))
    try:
        model = DualClipPPO(policy_of(says), env, seed=0, device="cpu", **ALGORITHMS[DualClipPPO]).learn(64)
        evaluate_policy(model, env, n_eval_episodes=2, warn=False)
    finally:
        env.close()
    if says == "observation":
        masks = model.rollout_buffer.observations["action_mask"]
        assert np.isin(masks, (0.0, 1.0)).all()
    assert model.rollout_buffer.action_masks is not None


class Board(Forbids):
    """A mask of two axes, as that of a board is."""

    def __init__(self) -> None:
        super().__init__("multi-discrete", "observation")
        assert isinstance(self.observation_space, spaces.Dict)
        self.observation_space["action_mask"] = spaces.Box(0, 1, (1, 5), np.float32)

    def _next(self) -> tuple[Any, dict[str, Any]]:
        obs, info = super()._next()
        return {**obs, "action_mask": obs["action_mask"].reshape(1, 5)}, info


def test_a_mask_of_two_axes_in_stacked_frames() -> None:
    env = VecFrameStack(DummyVecEnv([Board] * 2), 3)
    assert env.observation_space["action_mask"].shape == (1, 15)  # type: ignore[index]
    model = DualClipPPO("MultiInputPolicy", env, seed=0, device="cpu", **ALGORITHMS[DualClipPPO]).learn(64)
    evaluate_policy(model, env, n_eval_episodes=4, warn=False)


class InParts(Forbids):
    """Gives one part for each dimension, as gymnasium's ``MultiDiscrete.sample`` takes them."""

    def _next(self) -> tuple[Any, dict[str, Any]]:
        obs, _ = super()._next()
        return obs, {"action_mask": (self._mask[:3], self._mask[3:])}


def test_a_mask_in_parts() -> None:
    env = make_vec_env(lambda: InParts("multi-discrete", "info"), n_envs=2, seed=0)
    model = DualClipPPO("MlpPolicy", env, seed=0, device="cpu", **ALGORITHMS[DualClipPPO]).learn(64)
    evaluate_policy(model, env, n_eval_episodes=4)
    action, _ = model.predict(np.zeros(3, np.float32), action_masks=([False, True, False], [True, False]))  # type: ignore[arg-type]
    assert action.tolist() == [1, 0]


class Late(Forbids):
    """Allows everything at first, and says so by saying nothing."""

    def reset(self, **kwargs: Any) -> tuple[Any, dict[str, Any]]:
        obs, _ = super().reset(**kwargs)
        self._mask[:] = True
        return obs, {}


@pytest.mark.parametrize("algorithm", ALGORITHMS, ids=lambda a: a.__name__)
def test_masks_that_come_with_steps_alone_are_not_passed_over(algorithm: Any) -> None:
    env = make_vec_env(lambda: Late("discrete", "info"), n_envs=2, seed=0)
    model = algorithm("MlpPolicy", env, seed=0, device="cpu", **ALGORITHMS[algorithm])
    with pytest.raises(
        ValueError, match=r'gives info\["action_mask"\] with a step, and none was found when it was reset'
    ):
        model.learn(16)
    with pytest.raises(AssertionError, match="is not allowed"):
        model.learn(1000, use_masking=False)


def test_masks_of_some_environments_are_not_passed_over() -> None:
    env = DummyVecEnv([lambda: Forbids("discrete", "none"), lambda: Forbids("discrete", "method")])
    model = DualClipPPO("MlpPolicy", VecNormalize(env), seed=0, device="cpu", **ALGORITHMS[DualClipPPO])
    with pytest.raises(ValueError, match="environment 1 has action_masks, which must be a method, and of all environ"):
        model.learn(16)


def test_masks_in_an_attribute_are_not_passed_over() -> None:
    env = Forbids("discrete", "none")
    env.action_masks = np.ones(5, bool)  # type: ignore[method-assign, assignment]
    model = DualClipPPO("MlpPolicy", env, seed=0, device="cpu", **ALGORITHMS[DualClipPPO])
    with pytest.raises(ValueError, match="environment 0 has action_masks, which must be a method"):
        model.learn(16)


TAXI = "Taxi-v4" if "Taxi-v4" in gym.registry else "Taxi-v3"


@pytest.mark.parametrize("vec_env_cls", [DummyVecEnv, SubprocVecEnv])
@pytest.mark.parametrize("algorithm", ALGORITHMS, ids=lambda a: a.__name__)
def test_the_taxi_of_gymnasium(algorithm: Any, vec_env_cls: Any) -> None:
    """Its masks stand in its infos, and follow from the state that it shows."""
    taxi: Any = gym.make(TAXI).unwrapped
    in_processes = {"start_method": "fork"} if vec_env_cls is SubprocVecEnv else {}
    env = make_vec_env(
        TAXI, 2, seed=0, env_kwargs={"max_episode_steps": 7}, vec_env_cls=vec_env_cls, vec_env_kwargs=in_processes
    )
    try:
        model = algorithm("MlpPolicy", env, seed=0, device="cpu", **ALGORITHMS[algorithm]).learn(32)
        model.learn(32, reset_num_timesteps=False)
        evaluate_policy(model, env, n_eval_episodes=2)
    finally:
        env.close()
    buffer = model.rollout_buffer
    rows = list(zip(*(x.reshape(-1, x.shape[-1]) for x in (buffer.observations, buffer.action_masks)), strict=True))
    assert len(rows) >= 28
    for state, mask in rows:
        assert np.array_equal(mask, taxi.action_mask(int(state.item())))
    actions = buffer.actions.reshape(-1).astype(int)
    assert all(mask[action] for (_, mask), action in zip(rows, actions, strict=True))


def test_action_masker_of_contrib() -> None:
    env = ActionMasker(Forbids("discrete", "info"), lambda one: one.unwrapped._mask)
    model = DualClipPPO("MlpPolicy", env, seed=0, device="cpu", **ALGORITHMS[DualClipPPO]).learn(32)
    evaluate_policy(model, env, n_eval_episodes=1, warn=False)


class Forgets(VecEnv):
    """A vector of one's own that does not keep what its environments say at resets."""

    def __init__(self, inner: DummyVecEnv) -> None:
        self.inner, self.num_envs = inner, inner.num_envs
        self.observation_space, self.action_space = inner.observation_space, inner.action_space
        self.render_mode, self.metadata = None, {}

    def reset(self) -> Any:
        return self.inner.reset()

    def step_async(self, actions: Any) -> None:
        self.inner.step_async(actions)

    def step_wait(self) -> Any:
        return self.inner.step_wait()

    def close(self) -> None:
        self.inner.close()

    def get_attr(self, attr_name: str, indices: Any = None) -> Any:
        return self.inner.get_attr(attr_name, indices)

    def set_attr(self, attr_name: str, value: Any, indices: Any = None) -> None:
        self.inner.set_attr(attr_name, value, indices)

    def env_method(self, method_name: str, *args: Any, indices: Any = None, **kwargs: Any) -> Any:
        return self.inner.env_method(method_name, *args, indices=indices, **kwargs)

    def env_is_wrapped(self, wrapper_class: Any, indices: Any = None) -> Any:
        return self.inner.env_is_wrapped(wrapper_class, indices)


@pytest.mark.parametrize("says", ["method", "info"])
def test_a_vector_that_keeps_no_infos_of_resets(says: str) -> None:
    """As in SB3's own tests: what the environments say in them is not there to be found."""
    env = Forgets(DummyVecEnv([lambda: Forbids("discrete", says)]))
    assert not hasattr(env, "reset_infos")
    model = DualClipPPO("MlpPolicy", env, device="cpu", **ALGORITHMS[DualClipPPO])
    model._setup_learn(16)
    assert (model._masks is not None) == (says == "method")
    if says == "info":
        model.set_env(Forgets(DummyVecEnv([lambda: Late("discrete", says)])))
        with pytest.raises(ValueError, match="a VecEnv must keep it in reset_infos"):
            model.learn(16)


class Notes(BaseCallback):
    """Looks at what a step took and what was allowed."""

    def _on_step(self) -> bool:
        masks, actions = self.locals["action_masks"], self.locals["actions"]
        assert masks[np.arange(len(actions)), actions].all()
        return True


def test_callbacks_see_the_masks_that_the_actions_were_drawn_with() -> None:
    env = make_vec_env(Forbids, n_envs=3, seed=0)
    model = DualClipPPO("MlpPolicy", env, seed=0, device="cpu", **ALGORITHMS[DualClipPPO])
    model.learn(96, callback=Notes())
    assert not model.rollout_buffer.action_masks.all()  # type: ignore[union-attr]


def test_it_is_said_once_and_can_be_turned_off(capsys: pytest.CaptureFixture[str]) -> None:
    env = make_vec_env(lambda: Forbids("discrete", "info"), seed=0)
    model = DualClipPPO("MlpPolicy", env, seed=0, device="cpu", verbose=1, **ALGORITHMS[DualClipPPO])
    model.learn(16).learn(16)
    assert capsys.readouterr().out.count("Using the action masks of the environments (info)") == 1
    with pytest.raises(AssertionError, match="is not allowed"):
        model.learn(160, use_masking=False)
    with pytest.raises(ValueError, match="use_masking=1 is not allowed"):
        model.learn(16, use_masking=1)  # type: ignore[arg-type]


def test_predict_with_given_masks() -> None:
    env = make_vec_env(Forbids, n_envs=2, seed=0)
    model = DualClipPPO("MlpPolicy", env, seed=0, device="cpu", **ALGORITHMS[DualClipPPO]).learn(16)
    del env
    obs = np.zeros(3, np.float32)
    for allowed in range(5):
        action, state = model.predict(obs, action_masks=np.eye(5, dtype=bool)[allowed])
        assert (action.item(), action.shape, state) == (allowed, (), None)
    actions, _ = model.predict(np.stack([obs, obs]), action_masks=np.eye(5)[[1, 3]], deterministic=True)
    assert actions.tolist() == [1, 3]
    with pytest.raises(ValueError, match=r"action_masks=None is not allowed: this model was trained with action masks"):
        model.predict(obs)


@pytest.mark.parametrize("says", ["method", "info", "observation"])
def test_the_policy_itself_is_asked_with_masks(says: str, tmp_path: Path) -> None:
    env = make_vec_env(lambda: Forbids("multi-discrete", says), n_envs=2, seed=0)
    model = DualClipPPO(policy_of(says), env, seed=0, device="cpu", **ALGORITHMS[DualClipPPO])
    obs = env.reset()
    model.policy.predict(obs)  # type: ignore[arg-type]  # of one that was not trained with masks
    model.learn(16).save(tmp_path / "model")
    policy: Any
    for policy in (model.policy, DualClipPPO.load(tmp_path / "model").policy):
        for deterministic in (True, False):
            evaluate_policy(policy, env, n_eval_episodes=4, deterministic=deterministic)
        allowed = np.array([0, 0, 1, 0, 1])
        actions, state = policy.predict(obs, action_masks=np.stack([allowed, allowed]))
        assert (actions.tolist(), state) == ([[2, 1], [2, 1]], None)


def test_a_policy_without_masks_at_hand_says_what_it_needs() -> None:
    env = make_vec_env(Forbids, n_envs=2, seed=0)
    policy = DualClipPPO("MlpPolicy", env, seed=0, device="cpu", **ALGORITHMS[DualClipPPO]).learn(16).policy
    del env
    with pytest.raises(ValueError, match=r"action_masks=None is not allowed: this model was trained with action masks"):
        policy.predict(np.zeros(3, np.float32))


class Says(Forbids):
    """Says a mask that is wrong, after some steps."""

    def __init__(self, mask: Any, after: int) -> None:
        super().__init__()
        self.wrong, self.after, self.asked = mask, after, 0
        self.action_masks = self._say  # type: ignore[method-assign, assignment]

    def _say(self) -> Any:
        self.asked += 1
        return self.wrong if self.asked > self.after else self._mask


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (np.ones(4, bool), r"it must hold 5 entries"),
        ([True] * 10, r"it must hold 5 entries"),
        (np.full(5, 0.5), r"each True or False"),
        (["yes"] * 5, r"each True or False"),
        (None, r"it must hold 5 entries"),
        (np.zeros(5, bool), r"allows no action: \[0, 0, 0, 0, 0\]"),
    ],
    ids=["shape", "twice", "numbers", "words", "none", "nothing"],
)
def test_a_wrong_mask_is_named(mask: Any, message: str) -> None:
    env = DummyVecEnv([lambda: Says(None, 10**6), lambda: Says(mask, 7)])
    model = DualClipPPO("MlpPolicy", env, seed=0, device="cpu", **ALGORITHMS[DualClipPPO])
    before = [p.detach().clone() for p in model.policy.parameters()]
    with pytest.raises(ValueError, match=rf"The action mask of environment 1 in step 7.*{message}"):
        model.learn(64)
    assert all(map(th.equal, before, model.policy.parameters()))


def test_what_cannot_be_masked_is_refused() -> None:
    class Box(gym.Env[Any, Any]):
        observation_space = action_space = spaces.Box(-1.0, 1.0, (1,), np.float32)

        def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
            return np.zeros(1, np.float32), {}

        def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
            return np.zeros(1, np.float32), 0.0, True, False, {}

        def action_masks(self) -> list[bool]:
            return [True]

    model = DualClipPPO("MlpPolicy", Box(), device="cpu", **ALGORITHMS[DualClipPPO])
    with pytest.raises(ValueError, match=r"action_space=Box.* cannot be masked"):
        model.learn(16)
    model.learn(16, use_masking=False)
    with pytest.raises(ValueError, match="Box of actions, which cannot be masked"):
        model.predict(np.zeros(1, np.float32), action_masks=np.ones(1, bool))
