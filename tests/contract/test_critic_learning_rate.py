"""``critic_learning_rate``, which this package's policies have and SB3's have not: the critic's own learning rate."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.utils import LinearSchedule

from sb3_ppo_ext import TRPO, DualClipPPO
from sb3_ppo_ext.common.policies import ActorCriticCnnPolicy, ActorCriticPolicy, MultiInputActorCriticPolicy
from sb3_ppo_ext.common.rollout.actor_critic import DirectActorCritic
from sb3_ppo_ext.common.validation import value_at
from tests.algorithms import (
    ALGORITHMS,
    PROXIMAL,
    ROLLOUT,
    assert_close_policies,
    assert_same_policy,
    have_moved,
    parameters,
    small,
)
from tests.custom import LearningRates
from tests.envs import BOX, BOX_ACTIONS, DICT, IMAGE, ScriptedEnv

CRITIC = ("vf_features_extractor", "mlp_extractor.value_net", "value_net")


def names_of_group(policy: Any, index: int) -> set[str]:
    name_of = {id(parameter): name for name, parameter in policy.named_parameters()}
    return {name_of[id(parameter)] for parameter in policy.optimizer.param_groups[index]["params"]}


def changed(model: Any, before: list[th.Tensor]) -> set[str]:
    pairs = zip(model.policy.named_parameters(), before, strict=True)
    return {name for (name, p), q in pairs if not th.equal(p.detach(), q)}


@pytest.mark.parametrize(
    ("alias", "policy_class", "obs_space"),
    [
        ("MlpPolicy", ActorCriticPolicy, BOX),
        ("CnnPolicy", ActorCriticCnnPolicy, IMAGE),
        ("MultiInputPolicy", MultiInputActorCriticPolicy, DICT),
    ],
)
@pytest.mark.parametrize("share", [True, False])
def test_the_critics_group_is_what_the_critic_alone_depends_on(
    alias: str, policy_class: type, obs_space: Any, share: bool
) -> None:
    """Of all policies. What both depend on, a shared extractor, follows the main rate."""
    model = small(
        DualClipPPO,
        alias,
        ScriptedEnv(obs_space, BOX_ACTIONS),
        learning_rate=1e-3,
        policy_kwargs={"critic_learning_rate": 5e-3, "share_features_extractor": share},
    )
    policy = model.policy
    assert type(policy) is policy_class
    assert DirectActorCritic.refusal(policy) is None
    main, critic = names_of_group(policy, 0), names_of_group(policy, 1)
    assert main | critic == {name for name, _ in policy.named_parameters()}
    assert not main & critic
    assert critic == {name for name in main | critic if name.startswith(CRITIC)}
    assert {"log_std", "action_net.weight"} <= main
    if alias != "MlpPolicy":  # whose extractor has no parameters
        assert any(name.startswith("vf_features_extractor") for name in critic) != share
    model.learn(ROLLOUT)
    assert [group["lr"] for group in policy.optimizer.param_groups] == [1e-3, 5e-3]


class OwnExtractor(ActorCriticPolicy):
    """SB3's documented way to networks of one's own: they are told apart by what depends on them, not by name."""

    def _build_mlp_extractor(self) -> None:
        self.mlp_extractor = Trunk(self.features_dim)  # type: ignore[assignment]


class Trunk(th.nn.Module):
    def __init__(self, features_dim: int) -> None:
        super().__init__()
        self.latent_dim_pi = self.latent_dim_vf = 8
        self.value_trunk = th.nn.Linear(features_dim, 8)  # of both, whatever it is called
        self.judge = th.nn.Linear(8, 8)  # of the critic

    def forward(self, features: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
        return self.forward_actor(features), self.forward_critic(features)

    def forward_actor(self, features: th.Tensor) -> th.Tensor:
        return self.value_trunk(features).tanh()

    def forward_critic(self, features: th.Tensor) -> th.Tensor:
        return self.judge(self.value_trunk(features).tanh()).tanh()


class Overriding(OwnExtractor):
    def forward(self, obs: th.Tensor, deterministic: bool = False) -> Any:
        return super().forward(obs, deterministic)


@pytest.mark.parametrize("policy", [OwnExtractor, Overriding])
def test_the_critics_group_of_a_policy_of_ones_own(policy: type[ActorCriticPolicy]) -> None:
    model = small(
        DualClipPPO, policy, ScriptedEnv(BOX, spaces.Discrete(2)), policy_kwargs={"critic_learning_rate": 1e-2}
    )
    assert names_of_group(model.policy, 1) == {
        f"{name}.{kind}" for name in ("mlp_extractor.judge", "value_net") for kind in ("weight", "bias")
    }


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_rate_of_zero_freezes_the_critic_and_only_it(algorithm: Any) -> None:
    """The rate is used, and by the group it is meant for."""
    env = ScriptedEnv(BOX, BOX_ACTIONS)
    for kwargs, of_critic in (
        ({"learning_rate": 1e-2, "policy_kwargs": {"critic_learning_rate": 0.0}}, False),
        ({"learning_rate": 0.0, "policy_kwargs": {"critic_learning_rate": 1e-2}}, True),
    ):
        model = small(algorithm, "MlpPolicy", env, **kwargs)
        before = parameters(model)
        model.learn(3 * ROLLOUT)
        names = changed(model, before)
        assert any(name.startswith(CRITIC) for name in names) == of_critic
        # TRPO's actor does not follow the learning rate: a line search finds its step.
        assert any(not name.startswith(CRITIC) for name in names) == (algorithm is TRPO or not of_critic)


@pytest.mark.parametrize("algorithm", PROXIMAL)  # a rollout is a number of steps: the progress is known
@pytest.mark.parametrize(
    "schedule", ["lin_8e-3", LinearSchedule(8e-3, 0.0, 1.0), lambda progress: 8e-3 * progress], ids=["str", "sb3", "λ"]
)
def test_a_schedule_of_the_critics_own_holds_after_many_updates(algorithm: Any, schedule: Any) -> None:
    model = small(
        algorithm,
        "MlpPolicy",
        ScriptedEnv(BOX, spaces.Discrete(2)),
        learning_rate=1e-3,
        policy_kwargs={"critic_learning_rate": schedule},
    )
    rates = LearningRates()
    model.learn(8 * ROLLOUT, callback=rates)
    expected = [(1e-3, 8e-3)] + [(1e-3, 8e-3 * (1 - i / 8)) for i in range(1, 9)]
    np.testing.assert_allclose(rates.rates, expected, atol=1e-12)
    assert dict(model.logger.name_to_value)["train/critic_learning_rate"] == pytest.approx(0.0)
    assert model.logger.name_to_value["train/learning_rate"] == pytest.approx(1e-3)


def test_a_callback_may_set_the_critics_rate() -> None:
    class Sets(BaseCallback):
        model: Any

        def _on_step(self) -> bool:
            self.model.policy.critic_learning_rate = 0.125
            return True

    model = small(
        DualClipPPO, "MlpPolicy", ScriptedEnv(BOX, BOX_ACTIONS), policy_kwargs={"critic_learning_rate": 1e-3}
    ).learn(ROLLOUT, callback=Sets())
    assert model.policy.optimizer.param_groups[1]["lr"] == 0.125


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_the_same_rate_as_the_main_one_changes_nothing(algorithm: Any) -> None:
    """Two groups of one rate are one group."""
    one, two = (
        small(algorithm, "MlpPolicy", ScriptedEnv(BOX, BOX_ACTIONS), learning_rate=1e-2, policy_kwargs=kwargs).learn(
            4 * ROLLOUT
        )
        for kwargs in ({}, {"critic_learning_rate": 1e-2})
    )
    assert len(one.policy.optimizer.param_groups) == 1  # so that SB3's state dicts load
    assert_close_policies(one, two, atol=1e-6)


@pytest.mark.usefixtures("without_compiler")
@pytest.mark.filterwarnings("ignore:log_std has reached its bounds:UserWarning")
def test_a_compiled_step_uses_both_rates() -> None:
    eager, compiled = (
        small(
            DualClipPPO,
            "MlpPolicy",
            ScriptedEnv(BOX, BOX_ACTIONS),
            learning_rate="lin_1e-3",
            torch_compile=torch_compile,
            policy_kwargs={"critic_learning_rate": "lin_2e-2", "log_std_bounds": (-1e-4, 1e-4)},
        ).learn(4 * ROLLOUT)
        for torch_compile in (False, True)
    )
    for model in (eager, compiled):
        assert model.policy.log_std.abs().max() <= 1e-4
    assert_close_policies(eager, compiled, atol=1e-5)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("schedule", [2e-3, "lin_2e-3", lambda progress: 2e-3 * progress], ids=["float", "str", "λ"])
def test_both_are_kept_by_save_and_load(algorithm: Any, schedule: Any, tmp_path: Path) -> None:
    kwargs = {"critic_learning_rate": schedule, "log_std_bounds": (-3.0, 1.0)}
    model = small(algorithm, "MlpPolicy", ScriptedEnv(BOX, BOX_ACTIONS), policy_kwargs=kwargs).learn(ROLLOUT)
    model.save(tmp_path / "model")
    model.policy.save(tmp_path / "policy")
    loaded = algorithm.load(tmp_path / "model", env=model.env, device="cpu")
    policy = type(model.policy).load(tmp_path / "policy", device="cpu")
    assert value_at(loaded.policy.critic_learning_rate, 0.5) == value_at(schedule, 0.5)
    # A policy file holds no schedule that cannot be pickled; it says what the rate was to begin with.
    assert policy.critic_learning_rate == (2e-3 if callable(schedule) else schedule)
    for copy in (loaded.policy, policy):
        assert copy.log_std_bounds == (-3.0, 1.0)
        assert names_of_group(copy, 1) == names_of_group(model.policy, 1)
        for p, q in zip(copy.parameters(), model.policy.parameters(), strict=True):
            assert th.equal(p, q)
    moments, loaded_moments = (m.policy.optimizer.state_dict()["state"] for m in (model, loaded))
    assert moments.keys() == loaded_moments.keys() != set()
    for key, moment in moments.items():
        assert th.equal(moment["exp_avg"], loaded_moments[key]["exp_avg"])
    loaded.learn(ROLLOUT)


def test_a_policy_with_separate_extractors_is_saved_and_loaded(tmp_path: Path) -> None:
    """SB3's own forgets that they are separate, and gives the actor the critic's extractor."""
    model = small(
        DualClipPPO,
        "CnnPolicy",
        ScriptedEnv(IMAGE, spaces.Discrete(2)),
        policy_kwargs={"share_features_extractor": False},
    )
    model.policy.save(tmp_path / "policy")
    policy = ActorCriticCnnPolicy.load(tmp_path / "policy", device="cpu")
    obs = model.policy.obs_to_tensor(IMAGE.sample())[0]  # of zeros, both extractors would make zeros
    assert th.equal(policy.predict_values(obs), model.policy.predict_values(obs))
    logits, expected = (p.get_distribution(obs).distribution.logits.clone() for p in (policy, model.policy))
    assert th.equal(logits, expected)


def test_without_them_sb3_loads_ours_and_ours_sb3s(tmp_path: Path) -> None:
    """The optimiser, too: there is one group of parameters, in SB3's order."""
    env = ScriptedEnv(BOX, BOX_ACTIONS)
    theirs = PPO("MlpPolicy", env, n_steps=16, batch_size=16, policy_kwargs={"net_arch": [8]}, device="cpu").learn(16)
    ours = small(DualClipPPO, "MlpPolicy", env)
    ours.policy.load_state_dict(theirs.policy.state_dict())
    ours.policy.optimizer.load_state_dict(theirs.policy.optimizer.state_dict())
    assert_same_policy(theirs, ours)
    assert n_steps_of_optimizer(ours) == n_steps_of_optimizer(theirs) == 10
    ours.learn(ROLLOUT)
    theirs.policy.optimizer.load_state_dict(ours.policy.optimizer.state_dict())
    assert n_steps_of_optimizer(theirs) == n_steps_of_optimizer(ours) == 10 + 2 * 2
    before = parameters(theirs)
    theirs.learn(16)
    assert have_moved(theirs, before)


def n_steps_of_optimizer(model: Any) -> float:
    (n_steps,) = {float(state["step"]) for state in model.policy.optimizer.state.values()}
    return n_steps


def test_an_optimiser_without_the_critics_group_is_refused() -> None:
    model = small(DualClipPPO, "MlpPolicy", ScriptedEnv(BOX, BOX_ACTIONS), policy_kwargs={"critic_learning_rate": 1e-3})
    model.policy.optimizer = th.optim.Adam(model.policy.parameters(), lr=1e-3)
    with pytest.raises(ValueError, match="critic_learning_rate is not allowed with an optimiser"):
        model.learn(ROLLOUT)


@pytest.mark.parametrize(
    ("rate", "message"),
    [
        (-1.0, "critic_learning_rate=-1.0 is not allowed"),
        ("fast", "critic_learning_rate='fast' is not allowed"),
        (lambda _: math.nan, "at progress 1 it returns nan"),
    ],
)
def test_a_rate_that_is_none_is_refused(rate: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small(DualClipPPO, "MlpPolicy", ScriptedEnv(BOX, BOX_ACTIONS), policy_kwargs={"critic_learning_rate": rate})
