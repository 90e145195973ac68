"""gymnasium's vectors of environments and EnvPool's, where SB3 takes an environment."""

from __future__ import annotations

import os
import signal
from functools import partial
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv
from gymnasium.wrappers.vector import RecordEpisodeStatistics
from stable_baselines3.common.buffers import RolloutBuffer as SB3RolloutBuffer
from stable_baselines3.common.callbacks import EvalCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv, VecFrameStack, VecNormalize, VecVideoRecorder

from sb3_ppo_ext import REINFORCE, TRPO, ArrayVecEnv, DualClipPPO, resume, save_checkpoint
from sb3_ppo_ext.common.errors import ArgumentError
from sb3_ppo_ext.common.rollout import array_envs
from sb3_ppo_ext.common.rollout.vec_envs import time_limit
from tests.algorithms import ALGORITHMS, ROLLOUT, assert_same_policy, have_moved, parameters, small
from tests.envs import BOX, SavedWalk, ScriptedEnv, limited_walk
from tests.vectors import CHOICE, NativeVector, Pool, WithResetSteps, scripted_envs, wrapped

N_ENVS = 2
ENVS = scripted_envs(N_ENVS)
SAME, NEXT, DISABLED = AutoresetMode.SAME_STEP, AutoresetMode.NEXT_STEP, AutoresetMode.DISABLED


def sync(make: Any = None, mode: AutoresetMode = NEXT) -> SyncVectorEnv:
    return SyncVectorEnv(ENVS if make is None else [make] * N_ENVS, autoreset_mode=mode)


def dummy() -> DummyVecEnv:
    env = DummyVecEnv(wrapped(Monitor, ENVS))
    env.seed(1)
    return env


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_gymnasiums_cart_pole_is_learnt_from(algorithm: Any) -> None:
    model = small(algorithm, "MlpPolicy", gym.make_vec("CartPole-v1", 4))
    before = parameters(model)
    model.learn(8 * ROLLOUT)
    assert have_moved(model, before)
    assert isinstance(model.env, ArrayVecEnv)
    assert {info["r"] == info["l"] for info in model.ep_info_buffer} == {True}
    assert model.env.get_attr("spec")[0].id == "CartPole-v1"
    assert time_limit(model.env) == 500


def test_training_makes_no_infos(monkeypatch: pytest.MonkeyPatch) -> None:
    """But a look at the first environment's, once a rollout, and at those of a reset."""
    made: list[int] = []

    def counting(infos: Any, env_index: int, n_envs: int) -> dict[str, Any]:
        made.append(env_index)
        return {}

    monkeypatch.setattr(array_envs, "info_of", counting)
    for env in (sync(), sync(mode=SAME), NativeVector(ENVS), Pool(ENVS)):
        made.clear()
        small(DualClipPPO, "MlpPolicy", env).learn(4 * ROLLOUT * N_ENVS)
        assert len(made) < 4 + 3 * N_ENVS


@pytest.mark.parametrize("mode", AutoresetMode)
def test_infos_are_those_of_sb3(mode: AutoresetMode) -> None:
    """Also where they are cut out, counted from the end, or written into."""
    theirs, ours = dummy(), ArrayVecEnv(sync(mode=mode))
    ours.seed(1)
    np.testing.assert_array_equal(ours.reset(), theirs.reset())
    for _ in range(20):
        *expected, infos_of_sb3 = theirs.step(np.zeros(N_ENVS, dtype=np.int64))
        *given, infos = ours.step(np.zeros(N_ENVS, dtype=np.int64))
        for a, b in zip(given, expected, strict=True):
            np.testing.assert_array_equal(a, b)
            assert a.dtype == b.dtype
        assert len(infos) == N_ENVS
        for info, of_sb3 in zip(infos[:], infos_of_sb3, strict=True):
            assert info.keys() == of_sb3.keys()
            assert info["TimeLimit.truncated"] == of_sb3["TimeLimit.truncated"]
            np.testing.assert_array_equal(info.get("terminal_observation"), of_sb3.get("terminal_observation"))
            if "episode" in info:
                assert {k: info["episode"][k] for k in "rl"} == {k: of_sb3["episode"][k] for k in "rl"}
        infos[-1]["note"] = 7
        assert infos[N_ENVS - 1]["note"] == 7


class Talkative(ScriptedEnv):
    """Says how many steps it has made, and at the end of an episode whether it was a success."""

    def __init__(self) -> None:
        super().__init__(spaces.Box(-1.0, 1.0, (4,), np.float32), CHOICE)

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        obs, reward, terminated, truncated, _ = super().step(action)
        info = {"steps": self._steps, "nested": {"twice": 2 * self._steps}}
        if terminated or truncated:
            info["is_success"] = terminated
        return obs, reward, terminated, truncated, info


@pytest.mark.parametrize("mode", [SAME, NEXT])
def test_infos_of_the_environments_and_their_successes(mode: AutoresetMode) -> None:
    env = ArrayVecEnv(sync(Talkative, mode))
    env.reset()
    steps = [env.step(np.zeros(N_ENVS, dtype=np.int64)) for _ in range(9)]  # episodes of 3, 2 and 4
    said = [infos[0]["steps"] for *_, infos in steps]
    assert said == [1, 2, 3, 1, 2, 1, 2, 3, 4]
    assert [infos[1]["nested"]["twice"] for *_, infos in steps] == [2 * n for n in said]
    assert [infos[0].get("is_success") for *_, infos in steps] == [
        *(None, None, True),
        *(None, False),
        None,
        None,
        None,
        True,
    ]
    model = small(DualClipPPO, "MlpPolicy", sync(Talkative, mode)).learn(2 * ROLLOUT * N_ENVS)
    theirs = small(DualClipPPO, "MlpPolicy", make_vec_env(Talkative, N_ENVS)).learn(2 * ROLLOUT * N_ENVS)
    assert list(model.ep_success_buffer) == list(theirs.ep_success_buffer) != []


class OftenSilent(ScriptedEnv):
    """Says whether it has succeeded only where it has, and as numpy's kind of bool."""

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        obs, reward, terminated, truncated, _ = super().step(action)
        return obs, reward, terminated, truncated, {"is_success": np.bool_(True)} if terminated else {}


@pytest.mark.parametrize("mode", AutoresetMode)
def test_environments_that_do_not_say_whether_they_have_succeeded_are_not_counted(mode: AutoresetMode) -> None:
    scripts = ((3, True, False), (3, False, True)), ((3, False, True), (3, True, False))  # both end at once
    makers = [partial(OftenSilent, BOX, CHOICE, script) for script in scripts]
    model = small(DualClipPPO, "MlpPolicy", SyncVectorEnv(makers, autoreset_mode=mode)).learn(2 * ROLLOUT)
    assert list(model.ep_success_buffer) == [True] * 5


def test_evaluation_and_its_callback(tmp_path: Path) -> None:
    model = small(DualClipPPO, "MlpPolicy", sync())
    results = [
        evaluate_policy(model, env, n_eval_episodes=9, return_episode_rewards=True)
        for env in (
            dummy(),
            *(seeded(ArrayVecEnv(env)) for env in (sync(), NativeVector(ENVS))),
        )
    ]
    for rewards, lengths in results[1:2]:
        assert rewards == results[0][0]
        assert lengths == results[0][1]
    assert sorted(results[2][1]) == sorted(results[0][1])  # episodes, without the steps between them
    callback = EvalCallback(ArrayVecEnv(gym.make_vec("CartPole-v1", 2)), eval_freq=8, n_eval_episodes=2, verbose=0)
    model = small(DualClipPPO, "MlpPolicy", gym.make_vec("CartPole-v1", 2)).learn(2 * ROLLOUT, callback=callback)
    assert callback.best_mean_reward > 5.0


def seeded(env: ArrayVecEnv) -> ArrayVecEnv:
    env.seed(1)
    return env


@pytest.mark.parametrize("mode", AutoresetMode)
def test_episodes_that_are_recorded_already_are_counted_alike(
    mode: AutoresetMode, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where gymnasium's wrapper loses count, as some environments are reset and others are not."""
    plain = small(DualClipPPO, "MlpPolicy", sync(mode=mode)).learn(2 * ROLLOUT * N_ENVS)
    recorded = small(DualClipPPO, "MlpPolicy", RecordEpisodeStatistics(sync(mode=mode))).learn(2 * ROLLOUT * N_ENVS)
    monitored = small(
        DualClipPPO,
        "MlpPolicy",
        SyncVectorEnv(wrapped(Monitor, ENVS), autoreset_mode=mode),
    ).learn(2 * ROLLOUT * N_ENVS)
    if mode is not NEXT:  # in a wrapper it is not told when to begin an episode, and spends steps on it
        assert_same_policy(plain, recorded)
    assert_same_policy(plain, monitored)
    for model in (recorded, monitored):
        for info, other in zip(model.ep_info_buffer, plain.ep_info_buffer, strict=False):
            assert info["l"] == other["l"]
            assert info["r"] == pytest.approx(other["r"], abs=1e-5) or mode is NEXT
    env = RecordEpisodeStatistics(sync(mode=SAME))
    env.episode_returns += 100.0
    model = small(DualClipPPO, "MlpPolicy", env)
    monkeypatch.setattr(env, "reset", env.env.reset)
    model.learn(ROLLOUT * N_ENVS)
    assert max(info["r"] for info in model.ep_info_buffer) > 50.0  # it is the wrapper that is believed


class Lives(Pool):
    """As in Atari: an episode is a life, a game has two, and a reward is a tenth of what it is in the game."""

    def __init__(self) -> None:
        super().__init__([partial(ScriptedEnv, BOX, CHOICE, script=((3, True, False), (2, True, False)))])
        self._n_lives = 0

    def step(self, actions: Any) -> Any:
        obs, rewards, terminated, truncated, infos = super().step(actions)
        self._n_lives += int(terminated[0])
        is_over = terminated & (self._n_lives % 2 == 0)
        return (
            obs,
            rewards,
            terminated,
            truncated,
            {**infos, "reward": 10.0 * rewards, "terminated": is_over.astype(int)},
        )


def test_games_of_several_lives_are_counted_whole() -> None:
    env = ArrayVecEnv(Lives())
    env.reset()
    steps = [env.step(np.zeros(1, dtype=np.int64)) for _ in range(10)]
    assert [bool(dones[0]) for _, _, dones, _ in steps] == [False, False, True, False, True] * 2
    episodes = [infos[0].get("episode", {}) for *_, infos in steps]
    assert [episode.get("l") for episode in episodes] == [None, None, None, None, 5] * 2
    assert episodes[9]["r"] == pytest.approx(10.0 * sum(rewards[0] for _, rewards, *_ in steps[5:]), rel=1e-5)


def test_a_seed_gives_the_same_training_again() -> None:
    one, other = (small(DualClipPPO, "MlpPolicy", gym.make_vec("CartPole-v1", 4)).learn(64) for _ in range(2))
    assert_same_policy(one, other)


@pytest.mark.parametrize("vector", [sync, lambda: NativeVector(ENVS)], ids=["sync", "native"])
def test_a_reset_in_the_middle_of_episodes_begins_all_anew(vector: Any) -> None:
    env, actions = ArrayVecEnv(vector()), np.zeros(N_ENVS, dtype=np.int64)
    env.reset()
    env.step(actions)
    env.step(actions)  # which ends an episode of the second environment, and none of the first
    env.reset()
    env.step(actions)
    assert env.transition.counts is None or env.transition.counts.all()
    *_, dones, infos = env.step(actions)  # which ends the first one's second episode
    assert dones[0]
    assert infos[0]["episode"]["l"] == 2


def test_options_for_a_reset_are_handed_on() -> None:
    env = ArrayVecEnv(gym.make_vec("CartPole-v1", 2))
    env.set_options({"low": 0.01, "high": 0.02})
    assert (env.reset() >= 0.01).all()
    env.set_options([{"low": 0.01}, {}])
    with pytest.raises(ValueError, match=r"set_options.*all environments get the same"):
        env.reset()


def test_what_single_environments_can_be_asked() -> None:
    env = ArrayVecEnv(sync(limited_walk))
    assert env.has_attr("state_dict")
    assert not env.has_attr("nothing")
    env.set_attr("answer", 42, indices=[1])
    assert env.get_attr("answer", indices=[1]) == [42]
    assert not hasattr(env.vector_env.envs[0], "answer")
    env.reset()
    assert len(env.env_method("state_dict")) == N_ENVS
    assert env.env_is_wrapped(gym.wrappers.TimeLimit) == [True, True]
    native = ArrayVecEnv(gym.make_vec("CartPole-v1", 2))
    assert not native.has_attr("state")
    with pytest.raises(AttributeError, match="cannot say 'state'"):
        native.get_attr("state")
    for ask in (partial(native.env_method, "close"), partial(native.set_attr, "gravity", 1.0)):
        with pytest.raises(NotImplementedError, match=r"single environments .* cannot be reached"):
            ask()


def test_worker_processes() -> None:
    workers = AsyncVectorEnv(wrapped(WithResetSteps, ENVS))
    env = ArrayVecEnv(workers)
    model = small(DualClipPPO, "MlpPolicy", env)
    assert env.has_attr("render_mode")
    assert not env.has_attr("nothing")  # and they are still there
    with pytest.raises(AttributeError, match="cannot say 'nothing'"):
        env.get_attr("nothing")
    with pytest.raises(NotImplementedError, match="single environments"):
        env.env_method("reset", indices=0)
    model.learn(ROLLOUT * N_ENVS)
    os.kill(workers.processes[1].pid, signal.SIGKILL)
    with pytest.raises(RuntimeError, match=r"Worker processes .* have ended: number 1 \(exit code -9\)"):
        model.learn(4 * ROLLOUT * N_ENVS)
    with pytest.warns(UserWarning, match="pending call"):
        workers.close(terminate=True)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: closed(sync()), "has been closed"),
        (lambda: without_mode(sync()), r"metadata\['autoreset_mode'\] is None.*NEXT_STEP.*SAME_STEP"),
        (lambda: Pool(scripted_envs(4), batch_size=2), "batch_size=2 is not its num_envs=4"),
        (lambda: Pool(scripted_envs(4), max_num_players=2), "several players"),
        (lambda: Pool(scripted_envs(4), seed=7), r"seed=0 .*EnvPool are seeded .* 7: .*seed=0\)"),
        (lambda: sync(obs_of_tuples), "observation_space"),
    ],
    ids=["closed", "no mode", "asynchronous", "players", "seed", "space"],
)
def test_vectors_that_are_refused(make: Any, match: str) -> None:
    with pytest.raises(ArgumentError, match=match):
        small(DualClipPPO, "MlpPolicy", make())


def closed(env: Any) -> Any:
    env.close()
    return env


def without_mode(env: Any) -> Any:
    env.metadata = {}
    return env


def obs_of_tuples() -> ScriptedEnv:
    return ScriptedEnv(spaces.Tuple([CHOICE, CHOICE]), CHOICE)


@pytest.mark.parametrize(
    ("algorithm", "wrap", "kwargs", "match"),
    [
        (DualClipPPO, partial(VecFrameStack, n_stack=2), {}, "in a VecFrameStack, which does not pass on"),
        (DualClipPPO, lambda env: env, {"policy": "MlpLstmPolicy"}, "policy=MlpLstmPolicy, which has a memory"),
        (TRPO, lambda env: env, {"torch_compile": True}, "torch_compile=True .*compiled again for each rollout"),
    ],
    ids=["wrapper", "memory", "compiled"],
)
def test_what_does_not_go_with_steps_that_only_begin_an_episode(
    algorithm: Any, wrap: Any, kwargs: Any, match: str
) -> None:
    env = wrap(ArrayVecEnv(NativeVector(ENVS)))
    with pytest.raises(ArgumentError, match=match):
        small(algorithm, **{"policy": "MlpPolicy", "env": env, **kwargs})


def test_a_buffer_of_ones_own_does_not_go_with_steps_that_only_begin_an_episode() -> None:
    class Own(SB3RolloutBuffer):
        pass

    with pytest.raises(ArgumentError, match="rollout_buffer_class=Own, which cannot tell"):
        small(DualClipPPO, "MlpPolicy", NativeVector(ENVS), rollout_buffer_class=Own)


class MaskedVector(NativeVector):
    def action_masks(self) -> Any:
        return np.tile([True, True, False], (self.num_envs, 1))


@pytest.mark.parametrize("wrap", [lambda env: env, RecordEpisodeStatistics], ids=["alone", "wrapped"])
def test_a_method_of_a_whole_vector_is_not_asked_for_masks(wrap: Any) -> None:
    model = small(DualClipPPO, "MlpPolicy", wrap(MaskedVector(ENVS, SAME)))
    with pytest.raises(ArgumentError, match="it has action_masks, of which only single environments are asked"):
        model.learn(ROLLOUT * N_ENVS)
    model.learn(ROLLOUT * N_ENVS, use_masking=False)


def test_rewards_of_another_shape_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    env = NativeVector(ENVS)
    step = env.step

    def misshapen(actions: Any) -> Any:
        obs, rewards, *rest = step(actions)
        return obs, rewards[:, None], *rest

    monkeypatch.setattr(env, "step", misshapen)
    with pytest.raises(ValueError, match=r"NativeVector.* gives rewards of shape \(2, 1\), which must be \(2,\)"):
        small(DualClipPPO, "MlpPolicy", env).learn(8)


def test_an_end_without_what_it_ended_with_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    env = NativeVector(ENVS, NEXT)
    env.metadata["autoreset_mode"] = SAME
    step = env.step
    monkeypatch.setattr(env, "step", lambda actions: (*step(actions)[:4], {}))
    with pytest.raises(ValueError, match="Environment 1 has ended an episode, and infos have no 'final_obs'"):
        small(DualClipPPO, "MlpPolicy", env).learn(ROLLOUT)


def test_a_model_is_loaded_with_a_vector_and_given_another(tmp_path: Path) -> None:
    model = small(DualClipPPO, "MlpPolicy", gym.make_vec("CartPole-v1", 2)).learn(2 * ROLLOUT)
    model.save(tmp_path / "model")
    loaded = DualClipPPO.load(tmp_path / "model", env=gym.make_vec("CartPole-v1", 4), device="cpu")
    assert loaded.n_envs == 4
    loaded.learn(4 * ROLLOUT)
    loaded.set_env(gym.make_vec("CartPole-v1", 4, vectorization_mode="sync"))
    loaded.learn(4 * ROLLOUT)
    assert isinstance(loaded.env, ArrayVecEnv)


@pytest.mark.parametrize("wrap", [lambda env: env, VecNormalize], ids=["plain", "normalised"])
def test_training_is_resumed_exactly_in_a_sync_vector_env(wrap: Any, tmp_path: Path) -> None:
    """As the environments give their state; else, and in other vectors, new episodes begin."""
    model = small(DualClipPPO, "MlpPolicy", wrap(ArrayVecEnv(sync(limited_walk)))).learn(ROLLOUT * N_ENVS)
    save_checkpoint(model, tmp_path / "checkpoint")
    model.learn(2 * ROLLOUT * N_ENVS, reset_num_timesteps=False)
    resumed = resume(DualClipPPO, tmp_path / "checkpoint", wrap(ArrayVecEnv(sync(limited_walk))), device="cpu")
    resumed.learn(2 * ROLLOUT * N_ENVS, reset_num_timesteps=False)
    assert_same_policy(model, resumed)
    assert [i["r"] for i in model.ep_info_buffer] == [i["r"] for i in resumed.ep_info_buffer]
    model = small(DualClipPPO, "MlpPolicy", NativeVector([SavedWalk] * N_ENVS)).learn(ROLLOUT * N_ENVS)
    save_checkpoint(model, tmp_path / "other")
    resumed = resume(DualClipPPO, tmp_path / "other", NativeVector([SavedWalk] * N_ENVS), device="cpu")
    assert resumed._last_obs is None
    resumed.learn(2 * ROLLOUT * N_ENVS)


def test_episodes_of_reinforce_are_as_long_as_a_limit_allows() -> None:
    """A step that only begins an episode is none of its steps."""
    model = small(REINFORCE, "MlpPolicy", NativeVector(ENVS), max_episode_steps=4, episodes_per_env=5)
    model.learn(1)
    lengths = [int(n) for n in np.unique(model.rollout_buffer.episode_index().episode.numpy(), return_counts=True)[1]]
    assert lengths == [3, 2, 4, 3, 2, 2, 4, 3, 2, 4]
    assert {info["l"] for info in model.ep_info_buffer} == {2, 3, 4}


def test_a_video_of_a_vector(tmp_path: Path) -> None:
    env = ArrayVecEnv(gym.make_vec("CartPole-v1", 2, vectorization_mode="sync", render_mode="rgb_array"))
    env.reset()
    assert env.render_mode == "rgb_array"
    first, second = env.get_images()
    assert first is not None
    assert first.shape == second.shape
    assert VecVideoRecorder(env, str(tmp_path), lambda step: False).render_mode == "rgb_array"
