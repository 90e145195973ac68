"""Environments whose tensors stay on a device: callbacks, logs, files, evaluation and errors."""

from __future__ import annotations

import io
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from gymnasium.vector import AutoresetMode
from stable_baselines3.common.callbacks import BaseCallback, EvalCallback, StopTrainingOnMaxEpisodes
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.vec_env import VecNormalize

from sb3_ppo_ext import AdaptiveKLPPO, DualClipPPO, TensorVecEnv, resume, save_checkpoint
from sb3_ppo_ext.common.buffers import RolloutBuffer
from sb3_ppo_ext.common.errors import ArgumentError, NonFiniteError
from sb3_ppo_ext.common.rollout import freed_memory
from sb3_ppo_ext.common.rollout.tensor_adapters import BraxEnv, RslRlEnv
from sb3_ppo_ext.common.rollout.tensor_buffer import TensorRolloutBuffer
from tests.algorithms import (
    ALGORITHMS,
    ROLLOUT,
    assert_close_policies,
    assert_same_policy,
    have_moved,
    parameters,
    small,
)
from tests.tensor_envs import AsSB3, Groups, ShortCartPole, ShortPendulum

N_ENVS = 4


class OnDevice(BaseCallback):
    """Looks at what there is in each step."""

    def __init__(self) -> None:
        super().__init__()
        self.n_episodes = self.n_truncated = 0
        self.infos: list[Any] = []

    def _on_step(self) -> bool:
        found = self.locals
        assert isinstance(found["new_obs"], th.Tensor)
        assert isinstance(found["actions"], th.Tensor)
        assert isinstance(found["rewards"], np.ndarray)
        self.n_episodes += int(np.sum(found["dones"]))
        self.infos = list(found["infos"])
        for info, done in zip(self.infos, found["dones"], strict=True):
            assert ("episode" in info) == ("terminal_observation" in info) == bool(done)
            self.n_truncated += info["TimeLimit.truncated"]
        return True


class Edits(BaseCallback):
    """Reads a rollout as SB3 has it, and changes it."""

    def _on_step(self) -> bool:
        return True

    def _on_rollout_end(self) -> None:
        buffer: Any = self.model.rollout_buffer  # type: ignore[attr-defined]
        assert buffer.rewards.shape == buffer.advantages.shape == (ROLLOUT, N_ENVS)
        np.testing.assert_allclose(buffer.returns, buffer.advantages + buffer.values)
        buffer.advantages[:] = 0.0
        buffer.returns = buffer.values.copy()


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_all_algorithms_learn_save_load_and_predict(algorithm: Any) -> None:
    model = small(algorithm, "MlpPolicy", ShortCartPole(N_ENVS))
    before = parameters(model)
    model.learn(2 * ROLLOUT * N_ENVS)
    assert have_moved(model, before)
    file = io.BytesIO()
    model.save(file)
    file.seek(0)
    loaded = algorithm.load(file, env=ShortCartPole(N_ENVS))
    assert_same_policy(model, loaded)
    assert type(loaded.rollout_buffer) is type(model.rollout_buffer)
    obs = model.env.reset()
    assert isinstance(obs, np.ndarray)
    assert np.array_equal(model.predict(obs, deterministic=True)[0], loaded.predict(obs, deterministic=True)[0])
    loaded.learn(ROLLOUT * N_ENVS)


def test_callbacks_see_tensors_and_sb3s_infos() -> None:
    callback = OnDevice()
    model = small(DualClipPPO, "MlpPolicy", ShortCartPole(N_ENVS)).learn(2 * ROLLOUT * N_ENVS, callback=callback)
    assert 0 < callback.n_truncated < callback.n_episodes == len(model.ep_info_buffer)
    assert model.get_env().extras.keys() == {"final_obs"}


def test_callbacks_of_sb3_stop_and_evaluate(tmp_path: Path) -> None:
    stops = small(DualClipPPO, "MlpPolicy", ShortCartPole(N_ENVS))
    stops.learn(10_000, callback=StopTrainingOnMaxEpisodes(max_episodes=2))
    assert stops.num_timesteps < 200
    evaluates = EvalCallback(TensorVecEnv(ShortPendulum(2)), n_eval_episodes=4, eval_freq=ROLLOUT, verbose=0)
    model = small(DualClipPPO, "MlpPolicy", ShortPendulum(N_ENVS)).learn(2 * ROLLOUT * N_ENVS, callback=evaluates)
    returns, lengths = evaluate_policy(model, TensorVecEnv(ShortPendulum(2)), 4, return_episode_rewards=True)
    assert lengths == [5] * 4
    assert np.isfinite(returns).all()
    assert np.isfinite(evaluates.last_mean_reward)


def test_a_callback_may_edit_the_rollout() -> None:
    model = small(DualClipPPO, "MlpPolicy", ShortCartPole(N_ENVS), normalize_advantage=False, vf_coef=0.0)
    before = parameters(model)
    model.learn(ROLLOUT * N_ENVS, callback=Edits())
    assert not have_moved(model, before)


def test_a_seed_gives_the_same_training_again() -> None:
    models = [small(DualClipPPO, "MlpPolicy", ShortPendulum(N_ENVS)).learn(2 * ROLLOUT * N_ENVS) for _ in range(2)]
    assert_same_policy(*models)
    assert_close_policies(models[0], small(DualClipPPO, "MlpPolicy", ShortPendulum(N_ENVS)), atol=1.0)


def test_a_checkpoint_goes_on_to_the_bit(tmp_path: Path) -> None:
    whole = small(AdaptiveKLPPO, "MlpPolicy", ShortCartPole(N_ENVS)).learn(2 * ROLLOUT * N_ENVS)
    first = small(AdaptiveKLPPO, "MlpPolicy", ShortCartPole(N_ENVS)).learn(ROLLOUT * N_ENVS)
    save_checkpoint(first, tmp_path / "checkpoint")
    resumed = resume(AdaptiveKLPPO, tmp_path / "checkpoint", ShortCartPole(N_ENVS))
    assert isinstance(resumed.rollout_buffer, TensorRolloutBuffer)
    resumed.learn(ROLLOUT * N_ENVS, reset_num_timesteps=False)
    assert resumed.num_timesteps == whole.num_timesteps
    assert_same_policy(whole, resumed)


def test_rewards_are_normalised_as_vec_normalize_does_it(tmp_path: Path) -> None:
    theirs = VecNormalize(AsSB3(ShortPendulum(N_ENVS)), norm_obs=False, gamma=0.9)
    ours = TensorVecEnv(ShortPendulum(N_ENVS), normalize_rewards=True, gamma=0.9)
    models = [small(DualClipPPO, "MlpPolicy", env, gamma=0.9).learn(2 * ROLLOUT * N_ENVS) for env in (theirs, ours)]
    of_theirs, of_ours = (model.rollout_buffer.rewards for model in models)
    np.testing.assert_allclose(of_ours, of_theirs, rtol=1e-4, atol=1e-5)
    assert_close_policies(*models, atol=1e-5)
    assert models[1].ep_info_buffer[-1]["r"] == models[0].ep_info_buffer[-1]["r"]  # as they were
    save_checkpoint(models[1], tmp_path / "checkpoint")
    models[1].learn(ROLLOUT * N_ENVS, reset_num_timesteps=False)
    env = TensorVecEnv(ShortPendulum(N_ENVS), normalize_rewards=True, gamma=0.9)
    resumed = resume(DualClipPPO, tmp_path / "checkpoint", env).learn(ROLLOUT * N_ENVS, reset_num_timesteps=False)
    assert_same_policy(models[1], resumed)
    with pytest.raises(ValueError, match="gamma"):
        TensorVecEnv(ShortPendulum(N_ENVS), gamma=1.5)


def test_by_a_wrapper_or_another_buffer_it_goes_by_way_of_numpy() -> None:
    normalized = VecNormalize(TensorVecEnv(ShortPendulum(N_ENVS)))
    model = small(DualClipPPO, "MlpPolicy", normalized).learn(2 * ROLLOUT * N_ENVS)
    assert type(model.rollout_buffer) is RolloutBuffer
    model.set_env(ShortPendulum(N_ENVS))
    assert type(model.rollout_buffer) is TensorRolloutBuffer
    by_arrays = small(DualClipPPO, "MlpPolicy", ShortPendulum(N_ENVS), rollout_buffer_class=RolloutBuffer)
    by_tensors = small(DualClipPPO, "MlpPolicy", ShortPendulum(N_ENVS))
    for one in (by_arrays, by_tensors):
        one.set_random_seed(0)
        one.learn(2 * ROLLOUT * N_ENVS)
    assert_close_policies(by_arrays, by_tensors, atol=1e-6)


class Wrong(ShortPendulum):
    """Gives something else than it should.

    :param what: it does
    """

    def __init__(self, what: str) -> None:
        super().__init__(N_ENVS)
        self.what = what
        if what == "next step":
            self.metadata = {"autoreset_mode": AutoresetMode.NEXT_STEP}
        if what == "space":
            self.single_observation_space = spaces.Box(-1.0, 1.0, (7,), np.float32)
        if what == "method":
            self.action_masks = lambda: None

        if what == "device":
            self.device = None  # type: ignore[assignment]

    def step(self, actions: th.Tensor) -> Any:
        obs, rewards, terminated, truncated, extras = super().step(actions)
        wrong: dict[str, tuple[Any, ...]] = {
            "observations": (obs[:2], rewards, terminated, truncated, extras),
            "gradient": (obs * th.ones(1, requires_grad=True), rewards, terminated, truncated, extras),
            "rewards": (obs, rewards.unsqueeze(1), terminated, truncated, extras),
            "array": (obs, rewards.numpy(), terminated, truncated, extras),
            "nan": (obs, rewards.index_fill(0, th.tensor([2]), th.nan), terminated, truncated, extras),
            "no final": (obs, rewards, terminated, truncated, {}),
            "some final": (obs, rewards, terminated, truncated, {"final_obs": extras["final_obs"][1:]}),
            "no extras": (obs, rewards, terminated, truncated, None),
        }
        return wrong.get(self.what, (obs, rewards, terminated, truncated, extras))


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("next step", "must be AutoresetMode.SAME_STEP"),
        ("space", r"observations of shape \(4, 3\)"),
        ("device", "its device is None"),
        ("observations", r"observations of shape \(2, 3\)"),
        ("gradient", r"observations with a gradient.*torch.no_grad\(\)"),
        ("rewards", r"rewards of shape \(4, 1\)"),
        ("array", "rewards as a ndarray"),
        ("some final", r"'final_obs' of shape \(3, 3\)"),
        ("no extras", "extras as a NoneType"),
        ("no final", "no 'final_obs'"),
        ("method", "action_masks"),
        ("nan", "Rewards are not finite, first in step 0, environment 2"),
    ],
)
def test_what_an_environment_does_wrong_is_said(what: str, message: str) -> None:
    error = (
        NonFiniteError if what == "nan" else ArgumentError if what in ("next step", "method", "device") else ValueError
    )
    with pytest.raises(error, match=message):
        small(DualClipPPO, "MlpPolicy", Wrong(what)).learn(ROLLOUT * N_ENVS)


class WithoutKey(Groups):
    def _grouped(self, obs: th.Tensor) -> dict[str, th.Tensor]:
        return {"policy": obs[:, :2]}


def test_a_key_that_is_missing_is_named() -> None:
    with pytest.raises(ValueError, match="observations without the key 'critic'"):
        small(DualClipPPO, "MultiInputPolicy", WithoutKey(N_ENVS)).learn(ROLLOUT * N_ENVS)


class MaskAtFirst(ShortCartPole):
    def reset(self, **kwargs: Any) -> Any:
        return super().reset(**kwargs)[0], {"action_mask": th.ones(self.num_envs, 2, dtype=th.bool)}


def test_a_mask_that_is_not_given_again_is_an_error() -> None:
    with pytest.raises(ValueError, match="action mask of environment 0 in step 1 is None"):
        small(DualClipPPO, "MlpPolicy", MaskAtFirst(N_ENVS)).learn(ROLLOUT * N_ENVS)


@pytest.mark.parametrize("space", [spaces.MultiBinary(3), spaces.MultiDiscrete([2, 3]), spaces.Discrete(2)])
def test_actions_have_the_dtype_of_their_space_in_training_and_evaluation(space: spaces.Space[Any]) -> None:
    class Takes(ShortPendulum):
        single_action_space = space

        def step(self, actions: th.Tensor) -> Any:
            seen.append(actions.dtype)
            return super().step(th.zeros(self.num_envs, 1))

    seen: list[th.dtype] = []
    model = small(DualClipPPO, "MlpPolicy", Takes(N_ENVS)).learn(ROLLOUT * N_ENVS)
    evaluate_policy(model, TensorVecEnv(Takes(N_ENVS)), n_eval_episodes=1)
    assert set(seen) == {th.int8 if isinstance(space, spaces.MultiBinary) else th.int64}


def test_what_is_no_environment_on_a_device_is_refused() -> None:
    with pytest.raises(ArgumentError, match="num_envs is missing"):
        TensorVecEnv(object())


class OfIsaacLab:
    """
    Steps as rsl_rl's environments do, and writes into what it has given.

    :param groups: whether the observations are groups
    """

    def __init__(self, groups: bool = True) -> None:
        self.env: Any = Groups(N_ENVS) if groups else ShortCartPole(N_ENVS)
        self.num_envs, self.num_actions, self.device = N_ENVS, 1, "cpu"
        self.obs = self.named(self.env.reset(seed=0)[0])
        self.time_outs = True

    def named(self, obs: Any) -> dict[str, th.Tensor]:
        return obs if isinstance(obs, dict) else {"policy": obs}

    def seed(self, seed: int) -> None:
        self.env.reset(seed=seed)

    def get_observations(self) -> dict[str, th.Tensor]:
        return self.obs

    def reset(self) -> Any:
        self.obs = {key: part.clone() for key, part in self.named(self.env.reset()[0]).items()}
        return self.obs, {}

    def step(self, actions: th.Tensor) -> Any:
        obs, rewards, terminated, truncated, _ = self.env.step((actions[:, 0] > 0.0).float())
        for key, part in self.named(obs).items():
            self.obs[key].copy_(part)
        extras: dict[str, Any] = {"log": {"something": 1.0}, "a number": th.tensor(3.0)}
        return (
            self.obs,
            rewards,
            (terminated | truncated).long(),
            extras | ({"time_outs": truncated & ~terminated} if self.time_outs else {}),
        )

    def close(self) -> None: ...


def test_an_environment_of_isaac_labs_kind_has_a_critic_of_its_own() -> None:
    env = RslRlEnv(OfIsaacLab())
    kwargs = {"policy_kwargs": {"critic_observation_key": "critic"}}
    model = small(DualClipPPO, "MultiInputPolicy", env, **kwargs).learn(ROLLOUT * N_ENVS)
    buffer = model.rollout_buffer
    assert buffer.truncated.any()
    assert buffer.terminated.any()
    # As in rsl_rl: where a time limit has cut an episode, the value of the observation that was acted on.
    np.testing.assert_allclose(buffer.final_values[buffer.truncated], buffer.values[buffer.truncated], rtol=1e-5)
    assert not buffer.final_values[~buffer.truncated].any()


def test_without_time_outs_all_episodes_end_by_themselves_and_one_group_is_the_observation() -> None:
    simulation = OfIsaacLab(groups=False)
    simulation.time_outs = False
    model = small(DualClipPPO, "MlpPolicy", RslRlEnv(simulation, action_bound=3.0)).learn(ROLLOUT * N_ENVS)
    assert model.action_space == spaces.Box(-3.0, 3.0, (1,), np.float32)
    assert model.rollout_buffer.terminated.any()
    assert not model.rollout_buffer.truncated.any()


def test_freed_memory_is_kept_unless_the_user_has_said_how(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    library = SimpleNamespace(mallopt=lambda *setting: asked.append(setting))
    monkeypatch.setattr(freed_memory.ctypes, "CDLL", lambda _: library)
    monkeypatch.setattr(freed_memory.sys, "platform", "linux")
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "131072")
    freed_memory.keep_freed_memory()
    assert not asked
    monkeypatch.delenv("MALLOC_TRIM_THRESHOLD_")
    freed_memory.keep_freed_memory()
    assert asked == [(-3, 2**25), (-1, 2**30)]  # M_MMAP_THRESHOLD and M_TRIM_THRESHOLD of malloc.h
    monkeypatch.setattr(freed_memory.ctypes, "CDLL", lambda _: SimpleNamespace())
    freed_memory.keep_freed_memory()  # another C library


@pytest.mark.gpu
@pytest.mark.parametrize("torch_compile", [False, True])
def test_on_a_gpu_all_of_it_stays_there(torch_compile: bool) -> None:
    env = ShortPendulum(N_ENVS, "cuda")
    model = small(DualClipPPO, "MlpPolicy", env, device="cuda", torch_compile=torch_compile)
    before = parameters(model)
    model.learn(2 * ROLLOUT * N_ENVS)
    assert have_moved(model, before)
    tensors = model.rollout_buffer.tensors
    assert {x.device.type for x in tensors.values() if x is not None} == {"cuda"}
    rewards = model.rollout_buffer.rewards
    assert isinstance(rewards, np.ndarray)
    assert not rewards.flags.writeable
    np.testing.assert_array_equal(rewards, tensors["rewards"].cpu())


def test_brax_by_dlpack() -> None:
    """With an environment of Brax's shape; JAX is not among what the tests need."""
    jax = pytest.importorskip("jax")
    dataclasses = pytest.importorskip("flax.struct")

    @dataclasses.dataclass
    class State:
        pipeline_state: Any
        obs: Any
        reward: Any
        done: Any
        info: Any

    class Counts:
        """Counts by the action; at 3 or more, an episode ends."""

        action_size = 1

        def reset(self, key: Any) -> Any:
            zero = jax.numpy.zeros(())
            return State(zero, zero[None], zero, zero, {"key": key})  # type: ignore[call-arg]

        def step(self, state: Any, action: Any) -> Any:
            count = state.pipeline_state + action[0]
            done = (count >= 3.0).astype(jax.numpy.float32)
            return state.replace(pipeline_state=count, obs=count[None], reward=action[0], done=done)

    env = BraxEnv(Counts(), 2, episode_length=4)
    obs, _ = env.reset(seed=0)
    assert obs.tolist() == [[0.0], [0.0]]
    ends = []
    for _ in range(5):
        obs, rewards, terminated, truncated, extras = env.step(th.tensor([[1.0], [0.5]]))
        ends.append((obs[:, 0].tolist(), extras["final_obs"][:, 0].tolist(), terminated.tolist(), truncated.tolist()))
    assert rewards.tolist() == [1.0, 0.5]
    assert [obs for obs, *_ in ends] == [[1.0, 0.5], [2.0, 1.0], [0.0, 1.5], [1.0, 0.0], [2.0, 0.5]]
    assert ends[2][1:] == ([3.0, 1.5], [True, False], [False, False])
    assert ends[3][1:] == ([1.0, 2.0], [False, False], [False, True])
    small(DualClipPPO, "MlpPolicy", env).learn(ROLLOUT * 2)
