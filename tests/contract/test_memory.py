"""Policies with a memory, as their users see them."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from sb3_contrib import RecurrentPPO
from sb3_contrib.common.envs import InvalidActionEnvDiscrete
from sb3_contrib.common.recurrent import policies as contrib
from stable_baselines3.common.callbacks import EvalCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from torch import nn

from sb3_ppo_ext import DualClipPPO
from sb3_ppo_ext.common.buffers import RolloutBuffer
from sb3_ppo_ext.common.errors import ArgumentError
from tests.algorithms import ALGORITHMS, STEP_BASED, assert_same_policy, have_moved, parameters, small
from tests.envs import BOX, BOX_ACTIONS, DICT, IMAGE, scripted
from tests.pairwise import pairwise

MEMORY = {"lstm_hidden_size": 4}
MEMORIES = [
    {},
    {"rnn_type": "gru"},
    {"shared_lstm": True, "enable_critic_lstm": False},
    {"rnn_type": "gru", "enable_critic_lstm": False, "n_lstm_layers": 2},
    {"share_features_extractor": False, "critic_learning_rate": 1e-2},
    {"lstm_kwargs": {"bias": False}},
]
ACTIONS = [BOX_ACTIONS, spaces.Discrete(3), spaces.MultiDiscrete([2, 3]), spaces.MultiBinary(2)]


def remembering(algorithm: Any, env: Any, policy: str = "MlpLstmPolicy", **kwargs: Any) -> Any:
    return small(algorithm, policy, env, policy_kwargs={**MEMORY, **kwargs.pop("policy_kwargs", {})}, **kwargs)


@pytest.mark.parametrize(
    ("algorithm", "policy_kwargs", "action_space", "policy_and_obs"),
    pairwise(
        ALGORITHMS,
        MEMORIES,
        ACTIONS,
        [("MlpLstmPolicy", BOX), ("CnnLstmPolicy", IMAGE), ("MultiInputLstmPolicy", DICT)],
    ),
)
def test_all_of_it_learns_saves_loads_and_predicts(
    algorithm: Any, policy_kwargs: Any, action_space: Any, policy_and_obs: Any
) -> None:
    policy, obs_space = policy_and_obs
    model = remembering(algorithm, scripted(obs_space, action_space), policy, policy_kwargs=policy_kwargs)
    before = parameters(model)
    model.learn(64)
    assert have_moved(model, before)
    file = io.BytesIO()
    model.save(file)
    file.seek(0)
    loaded = algorithm.load(file, env=scripted(obs_space, action_space))
    assert_same_policy(model, loaded)
    obs = model.env.reset()
    states: list[Any] = [None, None]
    for t in range(3):
        (first, states[0]), (second, states[1]) = (
            asked.predict(obs, state, np.array([t == 0, t == 2]), deterministic=True)
            for asked, state in zip((model, loaded), states, strict=True)
        )
        assert np.array_equal(first, second)
        assert np.array_equal(states[0][0], states[1][0])
    loaded.learn(64)


@pytest.mark.parametrize("policy_kwargs", [*MEMORIES, {"n_lstm_layers": 2}], ids=str)
def test_a_policy_alone_is_saved_and_loaded(policy_kwargs: Any, tmp_path: Path) -> None:
    policy = remembering(DualClipPPO, scripted(), policy_kwargs=policy_kwargs).policy
    policy.save(str(tmp_path / "policy.pth"))
    loaded = type(policy).load(str(tmp_path / "policy.pth"))
    obs, starts = BOX.sample()[None], np.ones(1)
    for ours, theirs in zip(
        policy.predict(obs, None, starts, True)[1], loaded.predict(obs, None, starts, True)[1], strict=True
    ):
        assert np.array_equal(ours, theirs)
    for one in (policy, loaded):
        assert repr(one) == repr(policy)
        optimized = [id(p) for group in one.optimizer.param_groups for p in group["params"]]
        assert sorted(optimized) == sorted(map(id, one.parameters()))


class RepeatFirst(gym.Env[Any, Any]):
    """What was seen at first is to be done at the last of three steps: only one who remembers can."""

    observation_space = spaces.Box(-1.0, 1.0, (2,), np.float32)
    action_space = spaces.Discrete(2)

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        self._goal, self._t = int(self.np_random.integers(2)), 0
        return np.array([2.0 * self._goal - 1.0, 1.0], np.float32), {}

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        self._t += 1
        reward = float(action == self._goal) if self._t == 3 else 0.0
        return np.zeros(2, np.float32), reward, self._t == 3, False, {}


@pytest.mark.slow
def test_evaluation_carries_the_memory(tmp_path: Path) -> None:
    env = make_vec_env(RepeatFirst, 8, seed=0)
    callback = EvalCallback(
        make_vec_env(RepeatFirst, 3, seed=1), eval_freq=500, n_eval_episodes=30, best_model_save_path=str(tmp_path)
    )
    model = DualClipPPO(
        "MlpLstmPolicy",
        env,
        n_steps=48,
        batch_size=96,
        learning_rate=1e-2,
        sequence_length=6,
        seed=0,
        device="cpu",
        policy_kwargs={"net_arch": [], "lstm_hidden_size": 8},
    )
    model.learn(12_000, callback=callback)
    assert evaluate_policy(model, make_vec_env(RepeatFirst, 4, seed=2), 40)[0] == 1.0
    assert callback.best_mean_reward == 1.0
    best = DualClipPPO.load(tmp_path / "best_model")
    assert evaluate_policy(best, RepeatFirst(), 20, warn=False)[0] == 1.0


@pytest.mark.parametrize("algorithm", STEP_BASED)
def test_the_length_of_sequences_that_is_not_given_divides_all(
    algorithm: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    def chosen(n_steps: int, batch_size: int) -> int:
        model = remembering(algorithm, scripted(), n_steps=n_steps, batch_size=batch_size, verbose=1)
        length: int = model.rollout_buffer.sequence_length
        return length

    assert chosen(128, 256) == chosen(48, 96) == 16
    assert chosen(60, 120) == 15
    assert "sequence_length=15" in capsys.readouterr().out
    with pytest.warns(UserWarning, match="sequence_length=5: .*n_steps=50 and batch_size=25"):
        chosen(50, 25)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"sequence_length": 3}, "sequence_length=3 is not allowed with .*_?s.*=.*: it must divide"),
        ({"sequence_length": 0}, "sequence_length=0"),
        ({"policy_kwargs": {"rnn_type": "rnn"}}, "rnn_type='rnn'.*'lstm', 'gru'"),
        ({"policy_kwargs": {"shared_lstm": True}}, "shared_lstm=True.*enable_critic_lstm=True"),
        ({"policy_kwargs": {"lstm_kwargs": {"bidirectional": True}}}, "bidirectional must be left out"),
        ({"policy_kwargs": {"lstm_hidden_size": 0}}, "lstm_hidden_size=0"),
        ({"policy_kwargs": {"n_lstm_layers": 1.5}}, "n_lstm_layers=1.5"),
        ({"policy_kwargs": {"lstm_hidden_siz": 4}}, "lstm_hidden_size"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_arguments_that_are_wrong(kwargs: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        remembering(DualClipPPO, scripted(), **kwargs)


@pytest.mark.parametrize(
    ("policy", "obs_space", "policy_kwargs"),
    [
        ("MlpLstmPolicy", spaces.MultiDiscrete([2, 3]), {"rnn_type": "gru"}),
        ("MultiInputLstmPolicy", spaces.Dict({"a": spaces.MultiDiscrete([2, 3]), "b": BOX}), {}),
        (
            "MultiInputLstmPolicy",
            spaces.Dict({"a": spaces.MultiDiscrete([2, 3]), "b": spaces.MultiDiscrete([4])}),
            {"critic_observation_key": "a"},
        ),
    ],
    ids=["one", "dict", "critic"],
)
def test_observations_of_several_choices_are_remembered(policy: str, obs_space: Any, policy_kwargs: Any) -> None:
    model = remembering(DualClipPPO, scripted(obs_space), policy, policy_kwargs=policy_kwargs)
    before = parameters(model)
    assert have_moved(model.learn(32), before)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_without_a_memory_there_are_no_sequences(algorithm: Any) -> None:
    with pytest.raises(ArgumentError, match="sequence_length=4 is not allowed with policy=MlpPolicy"):
        small(algorithm, "MlpPolicy", scripted(), sequence_length=4)


class OwnGet(RolloutBuffer):
    def get(self, batch_size: int | None = None) -> Any:
        return super().get(batch_size)


class OwnForward(contrib.RecurrentActorCriticPolicy):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return super().forward(*args, **kwargs)


def test_what_cannot_be_trained_with_a_memory_is_refused() -> None:
    with pytest.raises(ArgumentError, match="rollout_buffer_class=OwnGet is not allowed"):
        remembering(DualClipPPO, scripted(), rollout_buffer_class=OwnGet)
    with pytest.raises(ArgumentError, match="policy=OwnForward is not allowed: it has a memory, and overrides"):
        small(DualClipPPO, OwnForward, scripted())
    model = remembering(DualClipPPO, scripted())
    model.policy.lstm_critic.register_forward_hook(lambda *_: None)
    with pytest.raises(ArgumentError, match=r"policy=MlpLstmPolicy.*has a lstm_critic with hooks"):
        model.learn(16)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_the_policy_classes_of_sb3_contrib_are_trained(algorithm: Any) -> None:
    policy_kwargs = {**MEMORY, "enable_critic_lstm": False}
    trained = [
        small(algorithm, policy, scripted(), policy_kwargs=policy_kwargs).learn(64)
        for policy in (contrib.RecurrentActorCriticPolicy, "MlpLstmPolicy")
    ]
    for ours, theirs in zip(*(model.policy.parameters() for model in trained), strict=True):
        assert th.allclose(ours, theirs, atol=1e-6)


def test_a_state_of_another_shape_is_refused() -> None:
    model = remembering(DualClipPPO, scripted())
    obs = model.env.reset()
    _, state = model.predict(obs)
    with pytest.raises(ArgumentError, match=r"state of the shapes .* is not allowed: for 1 observation"):
        model.predict(obs[:1], state)
    with pytest.raises(ArgumentError, match="episode_start of 3 environments"):
        model.predict(obs, state, np.zeros(3))


class MaskedAndBlind(InvalidActionEnvDiscrete):
    """contrib's environment of invalid actions, which masks them by a method."""

    def __init__(self) -> None:
        super().__init__(dim=6, n_invalid_actions=3)
        self.forbidden = 0

    def step(self, action: int) -> Any:
        self.forbidden += action in self.invalid_actions
        return super().step(action)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_masks_and_memory_together(algorithm: Any) -> None:
    model = remembering(algorithm, make_vec_env(MaskedAndBlind, 2, seed=0))
    model.learn(256)
    env = make_vec_env(MaskedAndBlind, 2, seed=1)
    evaluate_policy(model, env, 4)
    for one in (*model.env.envs, *env.envs):
        assert one.unwrapped.forbidden == 0
    obs = env.reset()
    masks = np.stack(env.env_method("action_masks"))
    actions, state = model.predict(obs, action_masks=masks)
    assert masks[[0, 1], actions].all()
    only_last = np.eye(6, dtype=bool)[[5, 5]]
    actions, other = model.predict(obs, state, np.array([False, True]), action_masks=only_last)
    assert list(actions) == [5, 5]
    assert other[0].shape == (1, 2, 4)
    of_nothing = model.predict(obs, None, action_masks=only_last)[1]
    assert not np.allclose(other[0][:, 0], of_nothing[0][:, 0])
    assert np.allclose(other[0][:, 1], of_nothing[0][:, 1])


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")  # as in test_saving.py
@pytest.mark.parametrize("rnn_type", ["lstm", "gru"])
def test_onnx_takes_the_state_and_gives_the_next(rnn_type: str, tmp_path: Path) -> None:
    import onnxruntime  # type: ignore[import-untyped]

    model = remembering(DualClipPPO, scripted(BOX, spaces.Discrete(3)), policy_kwargs={"rnn_type": rnn_type})

    class Actor(nn.Module):
        def __init__(self, policy: Any) -> None:
            super().__init__()
            self.policy = policy

        def forward(self, obs: th.Tensor, h: th.Tensor, c: th.Tensor, starts: th.Tensor) -> Any:
            distribution, (h, c) = self.policy.get_distribution(obs, (h, c), starts)
            return distribution.distribution.logits, h, c

    inputs = (th.randn(1, 4), th.randn(1, 1, 4), th.randn(1, 1, 4), th.zeros(1))
    th.onnx.export(
        Actor(model.policy),
        inputs,
        str(tmp_path / "actor.onnx"),
        input_names=["obs", "h", "c", "starts"],
        dynamo=False,
    )
    session = onnxruntime.InferenceSession(str(tmp_path / "actor.onnx"))
    for starts in (0.0, 1.0):
        given = (*inputs[:3], th.tensor([starts]))
        with th.no_grad():
            expected = Actor(model.policy)(*given)
        names = [one.name for one in session.get_inputs()]
        feed = {n: x.numpy() for n, x in zip(["obs", "h", "c", "starts"], given, strict=True) if n in names}
        for ours, theirs in zip(session.run(None, feed), expected, strict=True):
            assert np.allclose(ours, theirs.numpy(), atol=1e-5)


def test_a_model_of_recurrent_ppo_is_loaded_and_goes_on(tmp_path: Path) -> None:
    theirs = RecurrentPPO(
        "MlpLstmPolicy", scripted(), n_steps=16, batch_size=16, policy_kwargs={**MEMORY, "net_arch": [8]}, device="cpu"
    ).learn(32)
    theirs.save(tmp_path / "theirs")
    ours = DualClipPPO.load(tmp_path / "theirs", env=scripted())
    obs = ours.env.reset()
    assert np.array_equal(ours.predict(obs, deterministic=True)[0], theirs.predict(obs, deterministic=True)[0])
    ours.learn(32)
    assert (ours.n_steps, ours.batch_size, ours.rollout_buffer.sequence_length) == (16, 16, 16)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_script_for_recurrent_ppo_runs(algorithm: Any) -> None:
    """As sb3-contrib's documentation has it."""
    model = remembering(algorithm, "CartPole-v1", verbose=0)
    model.learn(64)
    vec_env = model.get_env()
    mean_reward, _ = evaluate_policy(model, vec_env, n_eval_episodes=3, warn=False)
    assert mean_reward > 0
    obs = vec_env.reset()
    lstm_states = None
    episode_starts = np.ones((1,), dtype=bool)
    for _ in range(30):
        action, lstm_states = model.predict(obs, state=lstm_states, episode_start=episode_starts, deterministic=True)
        obs, _, dones, _ = vec_env.step(action)
        episode_starts = dones
