"""``DualClipPPO(dual_clip=None)`` is SB3's PPO: same seed, same environment, same trajectory, same parameters."""

from __future__ import annotations

from functools import partial
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3 import PPO
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.utils import LinearSchedule

from sb3_ppo_ext import DualClipPPO
from sb3_ppo_ext.common.buffers import RolloutBuffer as OurRolloutBuffer
from tests.envs import BOX, DICT, IMAGE, ScriptedEnv
from tests.parity.reference import PlainPPO
from tests.parity.smooth import SmoothCNN, SmoothCombined

pytestmark = pytest.mark.filterwarnings(
    "ignore:You have specified a mini-batch size", "ignore:batch_size=50 does not divide"
)

OurPPO = partial(DualClipPPO, dual_clip=None)

SMALL: dict[str, Any] = {"n_steps": 64, "batch_size": 32, "n_epochs": 4}
TORQUES = spaces.Box(-2.0, 2.0, (3,), np.float32)

# Machines and instruction sets add up in other orders, so that last bits differ. Smooth networks keep that below 3e-7
# in all cases; a ReLU at its kink can make 1e-3 of it, so there is none here but in the one minibatch of "image".
TOLERANCE = 5e-6


def scripted(obs_space: spaces.Space[Any], action_space: spaces.Space[Any]) -> Any:
    return partial(ScriptedEnv, obs_space, action_space)


SMOOTH_CNN = {"features_extractor_class": SmoothCNN}
SMOOTH_DICT = {"policy_kwargs": {"features_extractor_class": SmoothCombined}}

CASES: dict[str, tuple[Any, str, dict[str, Any]]] = {
    "discrete": ("CartPole-v1", "MlpPolicy", {}),
    "box": ("Pendulum-v1", "MlpPolicy", {}),
    "box, many dimensions": (scripted(BOX, TORQUES), "MlpPolicy", {}),
    "dict": (scripted(DICT, TORQUES), "MultiInputPolicy", SMOOTH_DICT),
    "dict, discrete action": (scripted(DICT, spaces.Discrete(3)), "MultiInputPolicy", SMOOTH_DICT),
    "image": (scripted(IMAGE, spaces.Discrete(3)), "CnnPolicy", {"n_epochs": 1, "batch_size": 192}),
    "image, smooth": (scripted(IMAGE, spaces.Discrete(3)), "CnnPolicy", {"policy_kwargs": SMOOTH_CNN}),
    "image, smooth, separate extractors": (
        scripted(IMAGE, spaces.Discrete(3)),
        "CnnPolicy",
        {"policy_kwargs": {**SMOOTH_CNN, "share_features_extractor": False}},
    ),
    "discrete observation": (scripted(spaces.Discrete(5), spaces.Discrete(3)), "MlpPolicy", {}),
    "multi-discrete": (scripted(BOX, spaces.MultiDiscrete([3, 2, 4])), "MlpPolicy", {}),
    "multi-binary": (scripted(BOX, spaces.MultiBinary(3)), "MlpPolicy", {}),
    "gsde": ("Pendulum-v1", "MlpPolicy", {"use_sde": True, "sde_sample_freq": 4}),
    "gsde, squashed": (
        scripted(BOX, TORQUES),
        "MlpPolicy",
        {"use_sde": True, "policy_kwargs": {"squash_output": True, "full_std": False, "use_expln": True}},
    ),
    "gsde, squashed, entropy bonus": (
        scripted(BOX, TORQUES),
        "MlpPolicy",
        {"use_sde": True, "ent_coef": 0.01, "policy_kwargs": {"squash_output": True}},
    ),
    "values clipped": ("CartPole-v1", "MlpPolicy", {"clip_range_vf": 0.03}),
    "target_kl stops": ("Pendulum-v1", "MlpPolicy", {"target_kl": 0.001, "learning_rate": 3e-3}),
    "schedules": (
        "CartPole-v1",
        "MlpPolicy",
        {"learning_rate": LinearSchedule(1e-3, 4e-4, 1), "clip_range": LinearSchedule(0.02, 0.01, 1), "ent_coef": 0.01},
    ),
    "no normalisation, truncated minibatch": (
        "CartPole-v1",
        "MlpPolicy",
        {"normalize_advantage": False, "batch_size": 50},
    ),
    "other networks": (
        "CartPole-v1",
        "MlpPolicy",
        {"policy_kwargs": {"net_arch": {"pi": [32], "vf": [16, 16]}, "activation_fn": th.nn.SiLU, "ortho_init": False}},
    ),
    "SB3's optimiser settings": (
        "CartPole-v1",
        "MlpPolicy",
        {"policy_kwargs": {"optimizer_class": th.optim.RMSprop, "optimizer_kwargs": {"alpha": 0.9}}},
    ),
}

# What is clipped, by the names that the reference counts under.
FAST = {"learning_rate": 3e-3, "n_steps": 32, "clip_range": 0.05}
CLIPPING: dict[str, tuple[str, dict[str, Any], tuple[str, ...]]] = {
    "both sides": ("box, many dimensions", {}, ("above", "below")),
    "both sides, discrete": ("multi-discrete", {}, ("above", "below")),
    "another range above": ("box, many dimensions", {"clip_range_high": 0.1}, ("above", "below")),
    "values": ("box, many dimensions", {"clip_range_vf": 0.2}, ("values",)),
    "values, shared extractor": ("dict", {"clip_range_vf": 0.2, "learning_rate": 3e-4}, ("values",)),
    "norms of gradients": ("box, many dimensions", {"max_grad_norm": 1.2}, ("norms",)),
    "dual": ("box, many dimensions", {"clip_range": 0.03, "dual_clip": 1.04}, ("below", "bounded")),
    "dual, another range above": (
        "multi-binary",
        {"clip_range_high": 0.03, "dual_clip": 1.04},
        ("above", "below", "bounded"),
    ),
    "all of them": (
        "discrete observation",
        {"clip_range_high": 0.03, "dual_clip": 1.04, "clip_range_vf": 0.2, "max_grad_norm": 0.8, "ent_coef": 0.01},
        ("above", "below", "bounded", "values", "norms"),
    ),
}


def train(algorithm: Any, env: Any, policy: str, kwargs: dict[str, Any], n_envs: int) -> Any:
    vec_env = make_vec_env(env, n_envs=n_envs, seed=3)
    settings = {**SMALL, **kwargs}
    settings["batch_size"] = min(settings["batch_size"], n_envs * settings["n_steps"])
    model = algorithm(policy, vec_env, seed=3, device="cpu", **settings)
    return model.learn(2 * model.n_steps * n_envs)


def deviation(ours: Any, theirs: Any) -> float:
    """The largest difference between two parameters."""
    return max(
        (p - q).abs().max().item() for p, q in zip(ours.policy.parameters(), theirs.policy.parameters(), strict=True)
    )


ONE_ENVIRONMENT = ("discrete", "box", "dict", "gsde", "target_kl stops", "no normalisation, truncated minibatch")


@pytest.mark.parametrize(("case", "n_envs"), [*((case, 3) for case in CASES), *((case, 1) for case in ONE_ENVIRONMENT)])
def test_same_parameters_after_two_rollouts(case: str, n_envs: int) -> None:
    theirs = train(PPO, *CASES[case], n_envs)
    ours = train(OurPPO, *CASES[case], n_envs)

    flat = ours.rollout_buffer.flat()  # of the second rollout, which the updated parameters collected
    actions = theirs.rollout_buffer.actions.reshape(flat.actions.shape)
    np.testing.assert_allclose(flat.actions.numpy(), actions, atol=1e-4)
    np.testing.assert_allclose(flat.advantages.numpy(), theirs.rollout_buffer.advantages.flatten(), atol=1e-3)
    assert ours._n_updates == theirs._n_updates
    stopped = case.startswith("target_kl")
    assert (ours._n_updates < 2 * ours.n_epochs) == stopped
    assert ("train/early_stop_epoch" in ours.logger.name_to_value) == stopped
    assert ours.num_timesteps == theirs.num_timesteps
    assert deviation(ours, theirs) <= TOLERANCE


def clipping(case: str) -> tuple[Any, str, dict[str, Any]]:
    base, kwargs, _ = CLIPPING[case]
    env, policy, settings = CASES[base]
    return env, policy, {**settings, **FAST, **kwargs}


@pytest.mark.parametrize("case", CLIPPING)
def test_what_is_clipped(case: str) -> None:
    """A plain update is what the second clip and a range of its own above are held against; for the rest, SB3 too."""
    env, policy, kwargs = clipping(case)
    plain = train(PlainPPO, env, policy, kwargs, n_envs=2)
    ours = train(OurPPO, env, policy, kwargs, n_envs=2)
    happened = plain.happened()
    for name in CLIPPING[case][2]:
        assert 0.02 <= happened[name] <= 0.9, name
    assert deviation(ours, plain) <= TOLERANCE
    if "dual_clip" in kwargs:
        logged = ours.logger.name_to_value["train/dual_clip_fraction"]
        assert logged == pytest.approx(happened["bounded"], abs=1e-6)
    elif "clip_range_high" not in kwargs:
        theirs = train(PPO, env, policy, kwargs, n_envs=2)
        assert deviation(ours, theirs) <= TOLERANCE
        logged, expected = (model.logger.name_to_value["train/clip_fraction"] for model in (ours, theirs))
        assert logged == pytest.approx(expected, abs=1e-6)


MISTAKES: dict[str, tuple[str, dict[str, Any]]] = {
    "gamma": ("box, many dimensions", {"gamma": 0.99 * 0.999}),
    "gae_lambda": ("box, many dimensions", {"gae_lambda": 0.95 * 0.999}),
    "learning_rate": ("box, many dimensions", {"learning_rate": 3e-4 * 1.001}),
    "Adam's epsilon": ("discrete", {"policy_kwargs": {"optimizer_kwargs": {"eps": 1e-8}}}),
    "vf_coef": ("dict", {"vf_coef": 0.5 * 1.01}),
    "ent_coef": ("gsde, squashed, entropy bonus", {"ent_coef": 0.01 * 1.1}),
    "sde_sample_freq": ("gsde", {"sde_sample_freq": 5}),
    "target_kl": ("target_kl stops", {"target_kl": 0.0015}),
    "a schedule": ("schedules", {"clip_range": 0.02}),
    "normalize_advantage": ("no normalisation, truncated minibatch", {"normalize_advantage": True}),
    "clip_range": ("both sides", {"clip_range": 0.055}),
    "no dual clip": ("dual", {"dual_clip": None}),
    "dual_clip": ("dual", {"dual_clip": 1.05}),
    "clip_range_high": ("another range above", {"clip_range_high": 0.11}),
    "clip_range_vf": ("values", {"clip_range_vf": 0.21}),
    "max_grad_norm": ("norms of gradients", {"max_grad_norm": 1.2 * 1.01}),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_small_mistake_would_be_seen(mistake: str) -> None:
    case, kwargs = MISTAKES[mistake]
    env, policy, right = clipping(case) if case in CLIPPING else CASES[case]
    wrong = {**right, **kwargs, "policy_kwargs": {**right.get("policy_kwargs", {}), **kwargs.get("policy_kwargs", {})}}
    theirs, ours = train(PlainPPO, env, policy, right, n_envs=3), train(OurPPO, env, policy, wrong, n_envs=3)
    assert deviation(ours, theirs) > 2 * TOLERANCE


def test_another_estimate_of_the_spread_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = train(PlainPPO, *CASES["discrete"], n_envs=3)
    std = th.Tensor.std
    monkeypatch.setattr(th.Tensor, "std", lambda self: std(self, correction=0))
    assert deviation(train(OurPPO, *CASES["discrete"], n_envs=3), theirs) > 2 * TOLERANCE


def test_a_missing_bootstrap_would_be_seen() -> None:
    env, policy, kwargs = CASES["box, many dimensions"]
    terminates = partial(env, script=((3, True, False), (2, True, False), (4, True, False)))
    theirs, ours = train(PlainPPO, env, policy, kwargs, n_envs=3), train(OurPPO, terminates, policy, kwargs, n_envs=3)
    assert deviation(ours, theirs) > 2 * TOLERANCE


@pytest.mark.parametrize("obs_space", [BOX, DICT], ids=["box", "dict"])
def test_time_limits_are_bootstrapped_as_sb3_does(obs_space: spaces.Space[Any]) -> None:
    """
    Episodes that end terminated, truncated, and both at once: advantages and returns are SB3's. Rewards are those of
    the environment; SB3 adds the values of final observations to them.
    """

    class Recording(PPO):
        def train(self) -> None:
            pass

    class OurRecording(DualClipPPO):
        def train(self) -> None:
            pass

    policy = "MultiInputPolicy" if isinstance(obs_space, spaces.Dict) else "MlpPolicy"
    env = scripted(obs_space, spaces.Discrete(3))
    theirs = train(Recording, env, policy, {"gamma": 0.9}, n_envs=2).rollout_buffer
    ours = train(OurRecording, env, policy, {"gamma": 0.9}, n_envs=2).rollout_buffer
    assert np.array_equal(ours.episode_starts, theirs.episode_starts)
    for name in ("values", "log_probs", "advantages", "returns"):
        np.testing.assert_allclose(getattr(ours, name), getattr(theirs, name), atol=2e-6, err_msg=name)
    np.testing.assert_allclose(ours.rewards + 0.9 * ours.final_values, theirs.rewards, atol=2e-6)
    assert ours.truncated.any()
    assert ours.terminated.any()
    assert np.array_equal(ours.final_values != 0.0, ours.truncated)


class OneStep(RolloutBuffer):
    """Computes advantages of its own, as a child of SB3's buffer would: one-step TD errors."""

    def compute_returns_and_advantage(self, last_values: th.Tensor, dones: np.ndarray) -> None:
        next_values = np.concatenate((self.values[1:], last_values.cpu().numpy().reshape(1, -1)))
        ends = np.concatenate((self.episode_starts[1:], dones.reshape(1, -1)))
        self.advantages = self.rewards + self.gamma * next_values * (1.0 - ends) - self.values
        self.returns = self.advantages + self.values


class OurOneStep(OurRolloutBuffer):
    compute_returns_and_advantage = OneStep.compute_returns_and_advantage  # type: ignore[assignment]


def test_a_buffer_that_computes_advantages_of_its_own_gets_the_rewards_that_sb3_gives_it() -> None:
    env = scripted(BOX, spaces.Discrete(3))
    theirs = train(PPO, env, "MlpPolicy", {"rollout_buffer_class": OneStep}, n_envs=2)
    ours = train(OurPPO, env, "MlpPolicy", {"rollout_buffer_class": OurOneStep}, n_envs=2)
    assert deviation(ours, theirs) < TOLERANCE
    np.testing.assert_allclose(ours.rollout_buffer.rewards, theirs.rollout_buffer.rewards, atol=1e-6)


def test_bootstrapping_by_hand() -> None:
    """Episodes of one step each: the advantage is r - V(s), plus gamma V(s') if truncated and not terminated."""
    script = ((1, True, False), (1, False, True), (1, True, True))
    env: gym.Env[Any, Any] = ScriptedEnv(BOX, spaces.Discrete(2), script)
    finals: list[np.ndarray] = []
    rewards: list[float] = []

    class Watch(gym.Wrapper[Any, Any, Any, Any]):
        def step(self, action: Any) -> Any:
            result = super().step(action)
            finals.append(result[0])
            rewards.append(float(result[1]))
            return result

    model = DualClipPPO("MlpPolicy", Watch(env), n_steps=6, batch_size=6, n_epochs=1, gamma=0.5, seed=0, device="cpu")
    model.train = lambda: None  # type: ignore[method-assign]
    model.learn(6)
    with th.no_grad():
        next_values = model.policy.predict_values(th.as_tensor(np.stack(finals))).flatten().numpy()
    truncated_only = np.array([0, 1, 0, 0, 1, 0])
    expected = np.array(rewards) + 0.5 * truncated_only * next_values - model.rollout_buffer.values.flatten()
    np.testing.assert_allclose(model.rollout_buffer.advantages.flatten(), expected, atol=1e-6)
