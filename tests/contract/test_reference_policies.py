"""A reference policy as its user meets it: it is frozen, goes with the model, and is refused where it does not fit."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import gymnasium as gym
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3 import DQN, PPO

from sb3_ppo_ext import REINFORCE, TRPO, AdaptiveKLPPO, DualClipPPO
from sb3_ppo_ext.zoo.entry import read_numbers
from tests.algorithms import ALGORITHMS, SMALL_NET, assert_same_policy, parameters, small
from tests.contract.test_masks import Forbids
from tests.custom import EveryStepBuffer, MyPolicy, OverridesForward
from tests.envs import BOX, IMAGE, scripted

CHOICE = spaces.Discrete(3)


def bits(policy: Any) -> dict[str, bytes]:
    return {name: tensor.numpy().tobytes() for name, tensor in policy.state_dict().items()}


class Remembers(th.nn.Module):
    """Keeps statistics in training mode."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = th.nn.BatchNorm1d(8)

    def forward(self, x: th.Tensor) -> th.Tensor:
        return self.norm(x)


@pytest.mark.parametrize(
    ("algorithm", "form", "torch_compile"),
    [
        (DualClipPPO, "loss", True),
        (DualClipPPO, "reward", False),
        (AdaptiveKLPPO, "loss", False),
        (TRPO, "loss", True),
        (REINFORCE, "loss", True),
        (REINFORCE, "reward", False),
    ],
)
@pytest.mark.usefixtures("without_compiler")
def test_it_is_frozen(algorithm: Any, form: str, torch_compile: bool) -> None:
    """Its parameters, its running statistics and its mode, whatever the model that learns does."""
    kwargs: dict[str, Any] = {"policy_kwargs": {"normalize_observations": True}, "torch_compile": torch_compile}
    model = small(algorithm, "MlpPolicy", scripted(), reference_policy="initial", reference_kl=form, **kwargs)
    begins_with = bits(model.policy)
    model.learn(1)
    policy = model.reference_policy.policy
    assert bits(policy) == begins_with
    moved = {name.partition(".")[0] for name, of in bits(model.policy).items() if of != begins_with[name]}
    assert moved >= {"features_extractor", "action_net"}  # the first has the running statistics
    assert not any(module.training for module in policy.modules())
    assert not any(p.requires_grad or p.grad is not None for p in policy.parameters())
    learnt = {id(p) for group in model.policy.optimizer.param_groups for p in group["params"]}
    assert learnt.isdisjoint(map(id, policy.parameters()))
    assert not policy.optimizer.state
    model.learn(1)
    assert bits(policy) == begins_with
    assert model.reference_policy.policy is policy


def test_statistics_of_layers_stand_still() -> None:
    kwargs: dict[str, Any] = {"policy_kwargs": {"net_arch": [8], "activation_fn": Remembers}}
    given = small(DualClipPPO, "MlpPolicy", scripted(), seed=1, **kwargs).learn(32).policy
    given.set_training_mode(True)
    before = bits(given)
    model = small(DualClipPPO, "MlpPolicy", scripted(), reference_policy=given, **kwargs).learn(64)
    assert bits(model.reference_policy.policy) == before == bits(given)
    assert given.training  # it is copied, and left as it is
    assert not model.reference_policy.policy.training


@pytest.mark.parametrize("form", ["reward", "loss"])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_without_weight_it_changes_nothing(algorithm: Any, form: str) -> None:
    """And draws no random numbers."""
    plain = small(algorithm, "MlpPolicy", scripted(action_space=CHOICE)).learn(32)
    for given in ("initial", policy_for(BOX, CHOICE, seed=3)):
        kwargs: dict[str, Any] = {"reference_policy": given, "reference_kl_coef": 0.0, "reference_kl": form}
        assert_same_policy(plain, small(algorithm, "MlpPolicy", scripted(action_space=CHOICE), **kwargs).learn(32))


@pytest.mark.parametrize("algorithm", [DualClipPPO, TRPO])
@pytest.mark.usefixtures("without_compiler")
def test_compiled_code_is_the_same(algorithm: Any) -> None:
    given = policy_for(BOX, CHOICE)
    with th.no_grad():
        given.action_net.bias[0] = 1.0
    kwargs: dict[str, Any] = {"reference_policy": given, "reference_kl": "loss", "reference_kl_coef": "lin_5.0"}
    kwargs["learning_rate"] = 0.01
    eager, compiled = (
        small(algorithm, "MlpPolicy", scripted(action_space=CHOICE), torch_compile=how, **kwargs).learn(64)
        for how in (False, True)
    )
    th.testing.assert_close(parameters(eager), parameters(compiled), atol=1e-4, rtol=1e-3)
    free = small(algorithm, "MlpPolicy", scripted(action_space=CHOICE), learning_rate=0.01).learn(64)
    assert not th.allclose(free.policy.action_net.bias, eager.policy.action_net.bias, atol=5e-4)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_it_is_saved_inside_of_the_model(algorithm: Any, tmp_path: Path) -> None:
    """By path, too: the file that it came from may go."""
    small(TRPO, "MlpPolicy", scripted(), seed=1).learn(32).save(tmp_path / "reference")
    path = tmp_path / "reference.zip"
    kwargs: dict[str, Any] = {"reference_kl_coef": {"target_kl": 1e-3}, "reference_kl": "loss"}
    model = small(algorithm, "MlpPolicy", scripted(), reference_policy=path, **kwargs)
    path.unlink()
    model.learn(32)
    model.save(tmp_path / "model")
    loaded = algorithm.load(tmp_path / "model", env=scripted(), device="cpu")
    assert bits(loaded.reference_policy.policy) == bits(model.reference_policy.policy)
    assert loaded.reference_kl_coef == model.reference_kl_coef
    assert loaded.reference_kl_coef["coef"] > 0.1
    loaded.learn(32)
    assert bits(loaded.reference_policy.policy) == bits(model.reference_policy.policy)
    if algorithm is DualClipPPO:  # whose files Stable-Baselines3 reads
        assert PPO.load(tmp_path / "model", device="cpu").policy.state_dict().keys() == model.policy.state_dict().keys()
    without = algorithm.load(tmp_path / "model", env=scripted(), device="cpu", reference_policy=None)
    assert "train/reference_kl" not in without.learn(32).logger.name_to_value
    own = algorithm.load(tmp_path / "model", env=scripted(), device="cpu", reference_policy="initial")
    begins_with = bits(own.policy)
    assert bits(own.learn(32).reference_policy.policy) == begins_with


def test_a_path_is_the_policy_in_the_file(tmp_path: Path) -> None:
    """Of this package, or of Stable-Baselines3."""
    theirs = PPO("MlpPolicy", scripted(), n_steps=16, batch_size=8, policy_kwargs=SMALL_NET, seed=1, device="cpu")
    theirs.learn(32).save(tmp_path / "theirs")
    models = [
        small(DualClipPPO, "MlpPolicy", scripted(), reference_policy=given).learn(64)
        for given in (theirs.policy, str(tmp_path / "theirs"), tmp_path / "theirs.zip")
    ]
    for model in models[1:]:
        assert_same_policy(models[0], model)
    assert DualClipPPO("MlpPolicy", scripted(), reference_policy=theirs.policy, use_sde=True).use_sde


@pytest.mark.parametrize("use_sde", [False, True])
def test_one_that_explores_by_gsde_and_has_extractors_of_its_own(use_sde: bool) -> None:
    kwargs: dict[str, Any] = {"policy_kwargs": {"share_features_extractor": False}, "n_steps": 16, "batch_size": 16}
    given = PPO("MlpPolicy", scripted(), use_sde=use_sde, device="cpu", **kwargs).learn(1)  # it has drawn actions
    model = small(DualClipPPO, "MlpPolicy", scripted(), reference_policy=given.policy, use_sde=True).learn(32)
    assert model.logger.name_to_value["train/reference_kl"] > 0.0


def test_the_model_may_have_a_memory() -> None:
    """The reference has none."""
    given = small(DualClipPPO, "MlpPolicy", scripted(), seed=1).policy
    for algorithm, form in ((DualClipPPO, "loss"), (REINFORCE, "reward")):
        model = small(algorithm, "MlpLstmPolicy", scripted(), reference_policy=given, reference_kl=form)
        assert model.learn(1).logger.name_to_value["train/reference_kl"] > 0.0


def policy_for(*spaces_of_env: Any, policy: Any = "MlpPolicy", **kwargs: Any) -> Any:
    return small(DualClipPPO, policy, scripted(*spaces_of_env), **kwargs).policy


REFUSED: dict[str, tuple[Any, str]] = {
    "another kind of thing": (lambda: 3, "reference_policy=int(...) is not allowed: it must be None, a policy"),
    "the model": (lambda: small(DualClipPPO, "MlpPolicy", scripted()), "reference_policy=DualClipPPO(...) is not allo"),
    "no file": (lambda: "nowhere.zip", "reference_policy='nowhere.zip' is not allowed: it must be None, a policy"),
    "no model": (lambda: __file__, "from this path, no model with a policy can be read"),
    "observations": (lambda: policy_for(IMAGE, CHOICE), "its observation_space is Box(0, 255, (3, 36, 36), uint8), a"),
    "actions": (lambda: policy_for(BOX, spaces.Discrete(4)), "its action_space is Discrete(4), and the model's is Dis"),
    "memory": (lambda: policy_for(BOX, CHOICE, policy="MlpLstmPolicy"), "RecurrentActorCriticPolicy has a memory, and"),
    "distribution": (lambda: policy_for(BOX, CHOICE, policy=MyPolicy), "its distributions, of MyCategorical, have oth"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_fit_is_refused(name: str) -> None:
    make, message = REFUSED[name]
    with pytest.raises(ValueError, match=re.escape(message)):
        small(DualClipPPO, "MlpPolicy", scripted(BOX, CHOICE), reference_policy=make())


def test_a_file_of_another_kind_of_model_is_refused(tmp_path: Path) -> None:
    DQN("MlpPolicy", "CartPole-v1", buffer_size=10, device="cpu").save(tmp_path / "dqn")
    with pytest.raises(ValueError, match=r"dqn' is not allowed: it must be None, a policy"):
        small(DualClipPPO, "MlpPolicy", "CartPole-v1", reference_policy=str(tmp_path / "dqn"))


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"reference_kl": "both"}, "reference_kl='both' is not allowed: it must be one of 'reward', 'loss'"),
        ({"reference_kl_coef": -0.1}, "reference_kl_coef=-0.1 is not allowed: it must be a finite number at least 0"),
        ({"reference_kl_coef": "lin"}, "reference_kl_coef='lin' is not allowed: it must be a number, a function"),
        ({"reference_kl_coef": {}}, "reference_kl_coef={} is not allowed: a dict must have a target_kl"),
        ({"reference_kl_coef": {"target": 1}}, "a key of reference_kl_coef='target' is not allowed: it must be one of"),
        ({"reference_kl_coef": {"target_kl": 0.0}}, "reference_kl_coef['target_kl']=0.0 is not allowed"),
        ({"reference_kl_coef": {"target_kl": 0.1, "coef": 0.0}}, "reference_kl_coef['coef']=0.0 is not allowed"),
        (
            {"reference_kl_coef": {"target_kl": 0.1, "coef": 0.0, "minimum": 0.0}},
            "reference_kl_coef['coef']=0.0 is not allowed with a factor of 2.0, as no factor changes 0",
        ),
        ({"reference_kl_coef": {"target_kl": 0.1, "factor": 0.5}}, "reference_kl_coef['factor']=0.5 is not allowed"),
        ({"reference_policy": None, "reference_kl_coef": 0.2}, "reference_kl_coef=0.2 is not allowed with reference_p"),
        ({"reference_policy": None, "reference_kl": "loss"}, "reference_kl='loss' is not allowed with reference_polic"),
    ],
)
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_bad_arguments_are_refused(algorithm: Any, kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        small(algorithm, "MlpPolicy", "CartPole-v1", **{"reference_policy": "initial", **kwargs})


def test_what_a_model_cannot_have_a_reference_with() -> None:
    with pytest.raises(ValueError, match=r"MlpLstmPolicy|RecurrentActorCriticPolicy has a memory"):
        small(DualClipPPO, "MlpLstmPolicy", "CartPole-v1", reference_policy="initial")
    with pytest.raises(ValueError, match=r"rollout_buffer_class=EveryStepBuffer is not allowed with a reference_polic"):
        small(DualClipPPO, "MlpPolicy", scripted(), reference_policy="initial", rollout_buffer_class=EveryStepBuffer)
    with pytest.raises(ValueError, match="DualClipPPO with reference_policy needs the exact KL divergence"):
        small(DualClipPPO, MyPolicy, scripted(BOX, CHOICE), reference_policy="initial")


def test_a_policy_that_is_asked_by_its_own_methods() -> None:
    """It knows no masks."""
    kwargs: dict[str, Any] = {"action_space": CHOICE}
    given = small(DualClipPPO, OverridesForward, scripted(**kwargs), seed=1).policy
    plain = small(DualClipPPO, "MlpPolicy", scripted(**kwargs), seed=1).policy
    of_both = [
        small(DualClipPPO, "MlpPolicy", scripted(**kwargs), reference_policy=policy).learn(32)
        for policy in (given, plain)
    ]
    th.testing.assert_close(parameters(of_both[0]), parameters(of_both[1]), atol=1e-6, rtol=1e-5)
    env: gym.Env[Any, Any] = Forbids()
    given = small(DualClipPPO, OverridesForward, Forbids()).policy
    model = small(DualClipPPO, "MlpPolicy", env, reference_policy=given)
    with pytest.raises(
        ValueError, match=r"reference_policy=OverridesForward\(\.\.\.\) is not allowed where environments"
    ):
        model.learn(16)


@pytest.mark.parametrize("actions", ["multi-discrete", "multi-binary"])
def test_masks_of_several_choices(actions: str) -> None:
    given = small(DualClipPPO, "MlpPolicy", Forbids(actions), seed=1).policy
    for algorithm in (AdaptiveKLPPO, REINFORCE):
        model = small(algorithm, "MlpPolicy", gym.wrappers.TimeLimit(Forbids(actions), 7), reference_policy=given)
        model.reference_kl = "loss"
        assert 0.0 < model.learn(64).logger.name_to_value["train/reference_kl"] < 5.0


def test_an_action_that_the_reference_never_takes_is_an_error_in_words() -> None:
    given = small(DualClipPPO, "MlpPolicy", scripted(action_space=CHOICE)).policy
    with th.no_grad():
        given.action_net.bias[0] = -th.inf
    model = small(DualClipPPO, "MlpPolicy", scripted(action_space=CHOICE), reference_policy=given)
    before = parameters(model)
    with pytest.raises(ValueError, match="The reference policy gives an action that was taken the probability 0"):
        model.learn(64)
    assert all(map(th.equal, before, parameters(model)))


def test_yaml_may_name_it() -> None:
    """Numbers as PyYAML reads them, as strings."""
    read = read_numbers({"reference_policy": "initial", "reference_kl_coef": {"target_kl": "5e-2"}}, str)
    assert read == {"reference_kl_coef": {"target_kl": 0.05}}
    assert read_numbers({"reference_kl_coef": "lin_0.2", "reference_policy": "models/1.zip"}, str) == {}
