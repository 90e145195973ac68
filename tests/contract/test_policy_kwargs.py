"""Everything that ``policy_kwargs`` may hold, custom features extractors, and layers that have modes."""

from __future__ import annotations

from collections import defaultdict
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.sb2_compat.rmsprop_tf_like import RMSpropTFLike
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor, CombinedExtractor
from torch import nn

from sb3_ppo_ext import TRPO, DualClipPPO
from tests.algorithms import ALGORITHMS, PROXIMAL, ROLLOUT, assert_close_policies, have_moved, parameters, small
from tests.envs import BOX, BOX_ACTIONS, DICT, IMAGE, ScriptedEnv, scripted

FLOAT_IMAGE = spaces.Box(0.0, 1.0, (3, 36, 36), np.float32)


class Rows(BaseFeaturesExtractor):
    """A features extractor with parameters, for vectors."""

    def __init__(self, observation_space: spaces.Box, width: int = 5) -> None:
        super().__init__(observation_space, width)
        self.linear = nn.Linear(int(np.prod(observation_space.shape)), width)

    def forward(self, observations: th.Tensor) -> th.Tensor:
        return self.linear(observations.flatten(1)).relu()


class Parts(CombinedExtractor):
    """As SB3's documentation combines: an extractor for each part of a Dict."""

    def __init__(self, observation_space: spaces.Dict) -> None:
        super().__init__(observation_space, cnn_output_dim=4)
        self.extractors["vector"] = nn.Linear(4, 4)


# Policy, observations, arguments
CASES: dict[str, tuple[str, Any, dict[str, Any]]] = {
    "net_arch_list": ("MlpPolicy", BOX, {"net_arch": [6, 5]}),
    "net_arch_dict": ("MlpPolicy", BOX, {"net_arch": {"pi": [6], "vf": [9, 7]}}),
    "net_arch_none": ("MlpPolicy", BOX, {"net_arch": []}),
    "net_arch_default": ("MlpPolicy", BOX, {"net_arch": None}),
    "activation_fn": ("MlpPolicy", BOX, {"activation_fn": nn.ReLU}),
    "activation_fn_in_place": ("MlpPolicy", BOX, {"activation_fn": partial(nn.ReLU, inplace=True)}),
    "log_std_init": ("MlpPolicy", BOX, {"log_std_init": -1.25}),
    "ortho_init": ("MlpPolicy", BOX, {"ortho_init": False}),
    "normalize_images": ("CnnPolicy", FLOAT_IMAGE, {"normalize_images": False}),
    "cnn": ("CnnPolicy", IMAGE, {}),
    "cnn_separate": ("CnnPolicy", IMAGE, {"share_features_extractor": False}),
    "sgd": ("MlpPolicy", BOX, {"optimizer_class": th.optim.SGD, "optimizer_kwargs": {"momentum": 0.9}}),
    "adamw": ("MlpPolicy", BOX, {"optimizer_class": th.optim.AdamW, "optimizer_kwargs": {"weight_decay": 0.1}}),
    "rmsprop": ("MlpPolicy", BOX, {"optimizer_class": RMSpropTFLike, "optimizer_kwargs": {"eps": 1e-5}}),
    "adam": ("MlpPolicy", BOX, {"optimizer_kwargs": {"betas": (0.8, 0.9), "eps": 1e-3}}),
    "gsde": ("MlpPolicy", BOX, {"use_sde": True}),
    "use_expln": ("MlpPolicy", BOX, {"use_sde": True, "use_expln": True}),
    "squash_output": ("MlpPolicy", BOX, {"use_sde": True, "squash_output": True}),
    "full_std": ("MlpPolicy", BOX, {"use_sde": True, "full_std": False, "log_std_init": -0.5}),
    "extractor": ("MlpPolicy", BOX, {"features_extractor_class": Rows, "features_extractor_kwargs": {"width": 3}}),
    "extractor_separate": ("MlpPolicy", BOX, {"features_extractor_class": Rows, "share_features_extractor": False}),
    "extractor_dict": ("MultiInputPolicy", DICT, {"features_extractor_class": Parts}),
    "dict_separate": ("MultiInputPolicy", DICT, {"share_features_extractor": False}),
}


def built(algorithm: Any, case: str, **more: Any) -> Any:
    policy, obs_space, kwargs = CASES[case]
    kwargs = dict(kwargs)
    use_sde = kwargs.pop("use_sde", False)
    env = scripted(obs_space)
    if algorithm is PPO:
        kwargs = {"net_arch": [8], **kwargs}
        arguments: dict[str, Any] = {"n_steps": ROLLOUT, "batch_size": 8, "n_epochs": 2, "seed": 0, "device": "cpu"}
        return PPO(policy, env, use_sde=use_sde, policy_kwargs=kwargs, **arguments)
    return small(algorithm, policy, env, use_sde=use_sde, policy_kwargs=kwargs, **more)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("case", CASES)
def test_the_policy_is_the_one_that_sb3_builds(algorithm: Any, case: str) -> None:
    """The policy is the one that SB3's PPO builds from the same arguments and seed; it trains and stays finite."""
    theirs, ours = built(PPO, case), built(algorithm, case)
    names, their_names = (dict(model.policy.named_parameters()) for model in (ours, theirs))
    assert names.keys() == their_names.keys()
    for name, parameter in names.items():
        assert th.equal(parameter, their_names[name])
    assert type(ours.policy.optimizer) is type(theirs.policy.optimizer)
    their_group, group = theirs.policy.optimizer.param_groups[0], ours.policy.optimizer.param_groups[0]
    assert {k: v for k, v in group.items() if k not in ("params", "lr")} == {
        k: v for k, v in their_group.items() if k not in ("params", "lr")
    }
    obs = theirs.env.reset()
    np.testing.assert_array_equal(ours.predict(obs, deterministic=True)[0], theirs.predict(obs, deterministic=True)[0])
    before = parameters(ours)
    ours.learn(2 * ROLLOUT)
    assert have_moved(ours, before)


@pytest.mark.parametrize("case", CASES)
def test_the_policy_trains_as_in_sb3(case: str) -> None:
    """Only of the algorithm that is SB3's PPO when a part of it is turned off."""
    theirs = built(PPO, case).learn(4 * ROLLOUT)
    ours = built(DualClipPPO, case, dual_clip=None).learn(4 * ROLLOUT)
    assert_close_policies(theirs, ours, atol=2e-5)


class WithModes(BaseFeaturesExtractor):
    """Batch normalisation and dropout, and a record of the mode that each pass was made in."""

    def __init__(self, observation_space: spaces.Box) -> None:
        super().__init__(observation_space, 6)
        self.layers = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(0.5))
        self.modes: list[bool] = []

    def forward(self, observations: th.Tensor) -> th.Tensor:
        assert len({module.training for module in self.layers}) == 1
        self.modes.append(self.layers[1].training)
        return self.layers(observations)

    @property
    def statistics(self) -> th.Tensor:
        return self.layers[1].running_mean.clone()


def statistics(model: Any) -> list[th.Tensor]:
    return [model.policy.pi_features_extractor.statistics, model.policy.vf_features_extractor.statistics]


class Phases(BaseCallback):
    """Which modes the extractors were in while a rollout was collected, and while the policy was updated."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[str, set[bool]] = defaultdict(set)
        self.kept: list[th.Tensor] = []

    def _take(self, phase: str) -> None:
        policy = self.model.policy
        for role, extractor in (("pi", policy.pi_features_extractor), ("vf", policy.vf_features_extractor)):
            self.seen[f"{phase} {role}"] |= set(extractor.modes)
        for extractor in (policy.pi_features_extractor, policy.vf_features_extractor):
            extractor.modes.clear()

    def _on_rollout_start(self) -> None:
        self._take("update")
        self.kept = statistics(self.model)

    def _on_rollout_end(self) -> None:
        self._take("collect")
        assert all(map(th.equal, statistics(self.model), self.kept))  # acting and evaluating change no statistics

    def _on_training_end(self) -> None:
        self._take("update")

    def _on_step(self) -> bool:
        return True


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("share", [True, False])
def test_batch_norm_and_dropout_are_in_the_right_mode(algorithm: Any, share: bool) -> None:
    """
    Evaluation mode while acting. In updates, the proximal algorithms train in training mode, as SB3's PPO; the others
    differentiate the very policy that acted, only what belongs to the critic alone is in training mode, and the
    statistics of the actor see the rollout once, after that.
    """
    env = scripted(BOX, spaces.Discrete(3))
    model = small(
        algorithm,
        "MlpPolicy",
        env,
        policy_kwargs={"features_extractor_class": WithModes, "share_features_extractor": share},
    )
    phases = Phases()
    before = statistics(model)
    model.learn(4 * ROLLOUT, callback=phases)
    pi_moved, vf_moved = (not th.equal(a, b) for a, b in zip(statistics(model), before, strict=True))
    assert phases.seen["collect pi"] == {False}
    assert (pi_moved, vf_moved) == (True, True)
    if not share:  # of a shared one, what was seen was taken by the actor's name
        assert phases.seen["collect vf"] == {False}
        assert True in phases.seen["update vf"]
    if algorithm in PROXIMAL:
        assert True in phases.seen["update pi"]
    else:
        assert phases.seen["update pi"] == {False, True}


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_predict_is_in_evaluation_mode(algorithm: Any) -> None:
    model = small(
        algorithm,
        "MlpPolicy",
        ScriptedEnv(BOX, spaces.Discrete(3)),
        policy_kwargs={"features_extractor_class": WithModes},
    ).learn(ROLLOUT)
    model.policy.features_extractor.modes.clear()
    model.predict(BOX.sample())
    assert model.policy.features_extractor.modes == [False]


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_frozen_parameters_stay(algorithm: Any) -> None:
    model = small(
        algorithm,
        "MlpPolicy",
        ScriptedEnv(BOX, BOX_ACTIONS),
        policy_kwargs={"features_extractor_class": Rows, "critic_learning_rate": 1e-2},
    )
    model.policy.features_extractor.requires_grad_(False)
    before = [p.clone() for p in model.policy.features_extractor.parameters()]
    all_before = parameters(model)
    model.learn(2 * ROLLOUT)
    assert all(map(th.equal, model.policy.features_extractor.parameters(), before))
    assert have_moved(model, all_before)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_frozen_critic_stays_and_the_actor_learns(algorithm: Any) -> None:
    model = small(algorithm, "MlpPolicy", ScriptedEnv(BOX, BOX_ACTIONS))
    critic = [p for name, p in model.policy.named_parameters() if "value" in name]
    for p in critic:
        p.requires_grad_(False)
    before, all_before = [p.clone() for p in critic], parameters(model)
    model.learn(2 * ROLLOUT)
    assert all(map(th.equal, critic, before))
    assert have_moved(model, all_before)
    values, returns = model.rollout_buffer.values, model.rollout_buffer.returns
    assert model.logger.name_to_value["train/value_loss"] == pytest.approx(np.square(values - returns).mean(), rel=1e-5)


def test_a_shared_extractor_is_trained_by_the_actor_alone_where_the_critic_must_not_touch_it() -> None:
    """TRPO's critic steps leave what the actor depends on where the trust region put it."""
    model = small(
        TRPO,
        "MlpPolicy",
        ScriptedEnv(BOX, spaces.Discrete(3)),
        learning_rate=0.1,
        policy_kwargs={"features_extractor_class": Rows},
    ).learn(ROLLOUT)
    rollout = model.rollout_buffer.flat()
    with th.no_grad():
        params = model._actor_critic().params(rollout.inputs)
        kl = model._family.kl(rollout.old_params, params).mean().item()
    assert model.logger.name_to_value["train/kl"] == pytest.approx(kl, rel=1e-4, abs=1e-7)
