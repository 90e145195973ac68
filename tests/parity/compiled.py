"""Models that are trained eager and compiled, and what must be equal of them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from stable_baselines3.common.utils import obs_as_tensor

from sb3_ppo_ext import REINFORCE, TRPO, AdaptiveKLPPO, DualClipPPO
from sb3_ppo_ext.common.compile.policy_programs import CompiledActor
from sb3_ppo_ext.common.rollout.data import PolicyInput
from tests.envs import BOX, BOX_ACTIONS, DICT, IMAGE, scripted
from tests.parity.smooth import SmoothCNN, SmoothCombined

SMALL: dict[str, Any] = {"n_steps": 64, "batch_size": 32, "seed": 0, "device": "cpu"}


class Extractor(BaseFeaturesExtractor):
    """
    Has what networks may have: a tensor that is neither a parameter nor a buffer, a parameter of two layers, a buffer
    that is written into, one that is no float, and a number.
    """

    is_pure = True

    def __init__(self, observation_space: Any) -> None:
        super().__init__(observation_space, features_dim=4)
        n = observation_space.shape[0]
        self.first, self.second = th.nn.Linear(n, 4), th.nn.Linear(n, 4)
        self.second.weight = self.first.weight
        self.offset = th.zeros(n)
        self.scale = 1.0
        self.mean: th.Tensor
        self.order: th.Tensor
        self.register_buffer("mean", th.zeros(n))
        self.register_buffer("order", th.arange(n - 1, -1, -1))

    def _apply(self, function: Any, recurse: bool = True) -> Any:
        self.offset = function(self.offset)
        return super()._apply(function, recurse)

    def forward(self, observations: th.Tensor) -> th.Tensor:
        x = self.scale * observations[:, self.order] + self.offset
        if self.training:
            self.mean.lerp_(x.mean(dim=0), 0.1)
        x = x - self.mean
        return self.first(x).relu() * self.second(x).sigmoid()


CASES: dict[str, tuple[Any, spaces.Space, dict[str, Any]]] = {
    "box, everything clipped": (
        DualClipPPO,
        BOX_ACTIONS,
        {
            "n_epochs": 3,
            "learning_rate": "lin_3e-2",
            "policy_kwargs": {"critic_learning_rate": "lin_4e-2"},
            "clip_range": "lin_0.3",
            "clip_range_high": 0.25,
            "clip_range_vf": "lin_0.6",
            "dual_clip": 1.31,
            "ent_coef": "lin_0.1",
            "target_kl": 0.01,
        },
    ),
    "multi-discrete, an extractor of one's own": (
        AdaptiveKLPPO,
        spaces.MultiDiscrete([3, 2]),
        {
            "n_epochs": 3,
            "learning_rate": 1e-2,
            "ent_coef": 0.1,
            "policy_kwargs": {"features_extractor_class": Extractor},
        },
    ),
    "trpo, gsde, squashed, dict with an image": (
        TRPO,
        BOX_ACTIONS,
        {
            "obs_space": DICT,
            "use_sde": True,
            "n_critic_updates": 2,
            "policy_kwargs": {"squash_output": True, "log_std_init": 1.0, "features_extractor_class": SmoothCombined},
        },
    ),
    "reinforce": (REINFORCE, spaces.MultiBinary(3), {"baseline": "value", "n_critic_updates": 2}),
    "discrete": (DualClipPPO, spaces.Discrete(3), {"dual_clip": None}),
    "gsde": (DualClipPPO, BOX_ACTIONS, {"use_sde": True}),
    "multi-binary, clipped": (
        AdaptiveKLPPO,
        spaces.MultiBinary(3),
        {"clip_range": 0.05, "learning_rate": 1e-2, "n_epochs": 2},
    ),
    "trpo": (TRPO, spaces.Discrete(3), {"n_critic_updates": 2}),
    "reinforce, box": (REINFORCE, BOX_ACTIONS, {"baseline": "value", "n_critic_updates": 2}),
    "dict with an image": (
        DualClipPPO,
        spaces.Discrete(3),
        {"obs_space": DICT, "policy_kwargs": {"features_extractor_class": SmoothCombined}},
    ),
    "memory": (
        DualClipPPO,
        spaces.Discrete(3),
        {
            "policy": "MlpLstmPolicy",
            "sequence_length": 2,
            "n_epochs": 2,
            "policy_kwargs": {"lstm_hidden_size": 4, "enable_critic_lstm": False},
        },
    ),
    "memory, gsde, dict with an image": (
        AdaptiveKLPPO,
        BOX_ACTIONS,
        {
            "policy": "MultiInputLstmPolicy",
            "obs_space": DICT,
            "use_sde": True,
            "sequence_length": 4,
            "policy_kwargs": {
                "lstm_hidden_size": 4,
                "shared_lstm": True,
                "enable_critic_lstm": False,
                "features_extractor_class": SmoothCombined,
            },
        },
    ),
    "memory, trpo, two layers": (
        TRPO,
        spaces.MultiDiscrete([3, 2]),
        {
            "policy": "MlpLstmPolicy",
            "sequence_length": 4,
            "n_critic_updates": 2,
            "policy_kwargs": {"lstm_hidden_size": 4, "rnn_type": "gru", "n_lstm_layers": 2},
        },
    ),
    "memory, reinforce": (
        REINFORCE,
        spaces.MultiBinary(3),
        {
            "policy": "MlpLstmPolicy",
            "sequence_length": 4,
            "baseline": "value",
            "n_critic_updates": 2,
            "policy_kwargs": {"lstm_hidden_size": 4},
        },
    ),
    "reinforce, images": (
        REINFORCE,
        spaces.Discrete(3),
        {
            "policy": "CnnPolicy",
            "obs_space": IMAGE,
            "baseline": "value",
            "n_critic_updates": 2,
            "policy_kwargs": {"features_extractor_class": SmoothCNN},
        },
    ),
}


def make_model(algorithm: Any, action_space: spaces.Space, **kwargs: Any) -> Any:
    obs_space = kwargs.pop("obs_space", BOX)
    env = scripted(obs_space, action_space)
    policy = kwargs.pop("policy", "MultiInputPolicy" if isinstance(obs_space, spaces.Dict) else "MlpPolicy")
    if issubclass(algorithm, (DualClipPPO, AdaptiveKLPPO)):
        kwargs.setdefault("n_epochs", 1)
    kwargs["policy_kwargs"] = {"net_arch": [16], **kwargs.get("policy_kwargs", {})}
    settings = {**SMALL, **kwargs}
    if algorithm is REINFORCE:
        del settings["n_steps"]
    return algorithm(policy, env, **settings)


def trained(algorithm: Any, action_space: spaces.Space, **kwargs: Any) -> Any:
    model = make_model(algorithm, action_space, **kwargs)
    np.random.seed(0)  # noqa: NPY002  # the minibatches
    th.manual_seed(0)
    model.set_random_seed(0)
    # Two updates of three: moments and schedules have moved, and no clip range is 0 yet, which is all kink
    return model.learn(384, callback=lambda variables, _: variables["self"].num_timesteps < 257)


def trained_both_ways(algorithm: Any, action_space: spaces.Space, **kwargs: Any) -> list[Any]:
    return [trained(algorithm, action_space, torch_compile=compiled, **kwargs) for compiled in (False, True)]


@contextlib.contextmanager
def same_batch() -> Iterator[None]:
    """Actions that differ in the last bit are another batch."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CompiledActor, "act", lambda self, obs: self._module._function.__self__.act(obs))
        yield


def agree_both_ways(case: str) -> None:
    algorithm, action_space, kwargs = CASES[case]
    with same_batch():
        eager, compiled = trained_both_ways(algorithm, action_space, **kwargs)
    agree_after_updates(eager, compiled, stops="target_kl" in kwargs)
    agree_on_rollouts(compiled)


def agree_after_updates(eager: Any, compiled: Any, *, stops: bool) -> None:
    assert eager._n_updates == compiled._n_updates
    assert (eager._n_updates < 2 * getattr(eager, "n_epochs", 1)) == stops
    for p, q in zip(eager.policy.parameters(), compiled.policy.parameters(), strict=True):
        assert (p - q).abs().max().item() <= 1e-5
        state, compiled_state = eager.policy.optimizer.state.get(p), compiled.policy.optimizer.state.get(q)
        assert bool(state) == bool(compiled_state)
        if state:
            assert state["step"].item() == compiled_state["step"].item()
            th.testing.assert_close(state["exp_avg"], compiled_state["exp_avg"], atol=1e-5, rtol=1e-3)
    for p, q in zip(eager.policy.buffers(), compiled.policy.buffers(), strict=True):
        th.testing.assert_close(p, q)
    theirs, ours = eager.logger.name_to_value, compiled.logger.name_to_value
    assert theirs.keys() == ours.keys()
    for name in theirs:
        if name.startswith("train/") and isinstance(theirs[name], float):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-3, abs=1e-5), name


def agree_on_rollouts(model: Any) -> None:
    """Actions, from the same random numbers, and what is evaluated of them."""
    eager = model._actor_critic()
    model.policy.set_training_mode(False)
    compiled = model._acting_policy()
    obs = PolicyInput(obs_as_tensor(model.env.reset(), model.device))
    if eager.n_state:
        obs = obs._replace(
            state=th.randn(model.n_envs, eager.n_state, device=model.device),
            starts=th.eye(model.n_envs, device=model.device)[0],
        )
    results = []
    for function in (eager.act, compiled.act):
        th.manual_seed(1)
        results.append(function(obs))
    (expected, kept), (actions, our_kept) = results
    th.testing.assert_close(actions, expected, atol=1e-6, rtol=1e-5)
    assert (kept is None) == (our_kept is None)
    if kept is not None:
        th.testing.assert_close(our_kept.values, kept.values)
        th.testing.assert_close(our_kept.params, kept.params)
        th.testing.assert_close(our_kept.state, kept.state)
        return
    batch = model.rollout_buffer.flat_inputs()
    with th.no_grad():
        evaluation, ours = eager.evaluate_actions(*batch), compiled.evaluate_actions(*batch)
    th.testing.assert_close(ours.values, evaluation.values, atol=1e-5, rtol=1e-4)
    th.testing.assert_close(ours.log_prob, evaluation.log_prob, atol=1e-4, rtol=1e-4)
    th.testing.assert_close(ours.params, evaluation.params, atol=1e-5, rtol=1e-4)
