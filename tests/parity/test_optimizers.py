"""Each parameter is stepped as by SB3's PPO: by any optimiser, whichever of them take part in a minibatch."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch as th
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from torch import nn

from sb3_ppo_ext import DualClipPPO
from sb3_ppo_ext.common.update.flat_adam import FlatAdam

TOLERANCE = 5e-6


class Skips(BaseFeaturesExtractor):
    """
    Three layers, of which some take part in some minibatches only.

    :param pattern: which of them take part, minibatch by minibatch, over and over
    """

    def __init__(self, observation_space: Any, pattern: tuple[str, ...]) -> None:
        super().__init__(observation_space, 4)
        self.layers = nn.ModuleDict({name: nn.Linear(4, 4) for name in "abc"})
        self.pattern = pattern
        self.count = -1

    def forward(self, x: th.Tensor) -> th.Tensor:
        self.count += self.training
        names = self.pattern[self.count % len(self.pattern)] if self.training else ""
        for name in names:
            x = x + self.layers[name](x).tanh()
        return x


def trained(algorithm: Any, callback: Any = None, prepare: Any = None, **policy_kwargs: Any) -> Any:
    kwargs = {"dual_clip": None} if algorithm is DualClipPPO else {}
    model = algorithm(
        "MlpPolicy",
        "CartPole-v1",
        n_steps=32,
        batch_size=8,
        n_epochs=3,
        seed=0,
        device="cpu",
        policy_kwargs={"net_arch": [8], **policy_kwargs},
        **kwargs,
    )
    if prepare is not None:
        prepare(model)
    return model.learn(96, callback=None if callback is None else callback())


def agree(theirs: Any, ours: Any) -> None:
    for (name, p), q in zip(theirs.policy.named_parameters(), ours.policy.parameters(), strict=True):
        assert (p - q).abs().max().item() <= TOLERANCE, name
        state, our_state = theirs.policy.optimizer.state.get(p, {}), ours.policy.optimizer.state.get(q, {})
        assert float(our_state.get("step", 0.0)) == float(state.get("step", 0.0)), name
        assert (p.grad is None) == (q.grad is None), name


@pytest.mark.parametrize(
    "pattern",
    [("", "a"), ("a", ""), ("a", "b"), ("ab", "bc", "c"), ("abc", "", "", "ab"), ("", "", "", "", "", "", "a")],
    ids=str,
)
def test_layers_that_take_part_in_some_minibatches(pattern: tuple[str, ...]) -> None:
    models = [
        trained(algorithm, features_extractor_class=Skips, features_extractor_kwargs={"pattern": pattern})
        for algorithm in (PPO, DualClipPPO)
    ]
    agree(*models)
    steps = {float(s["step"]) for s in models[1].policy.optimizer.state.values()}
    assert len(steps) > 1  # some were left out


class Freezes(BaseCallback):
    """Freezes and unfreezes layers between the updates."""

    def __init__(self) -> None:
        super().__init__()
        self.rollouts = 0

    def _on_step(self) -> bool:
        return True

    def _on_rollout_end(self) -> None:
        policy = self.model.policy
        policy.action_net.requires_grad_(self.rollouts != 0)
        policy.mlp_extractor.value_net.requires_grad_(self.rollouts != 1)
        self.rollouts += 1


def test_layers_that_are_frozen_and_unfrozen() -> None:
    theirs, ours = trained(PPO, Freezes), trained(DualClipPPO, Freezes)
    agree(theirs, ours)
    assert len({float(s["step"]) for s in ours.policy.optimizer.state.values()}) == 2


class Unfreezes(Freezes):
    def _on_rollout_end(self) -> None:
        self.model.policy.action_net.requires_grad_(self.rollouts > 0)
        self.rollouts += 1


@pytest.mark.usefixtures("without_compiler")
def test_layers_that_are_unfrozen_compiled() -> None:
    """Their moments are a step behind."""
    compiled = trained(DualClipPPO, Unfreezes, prepare=lambda model: setattr(model, "torch_compile", True))
    models = trained(DualClipPPO, Unfreezes), compiled
    agree(*models)
    for model in models:
        assert len({float(s["step"]) for s in model.policy.optimizer.state.values()}) == 2


def add_a_layer(model: Any) -> None:
    """Which the optimiser does not know."""
    model.policy.value_net = nn.Sequential(model.policy.value_net, nn.Linear(1, 1))


def step_one_twice(model: Any) -> None:
    """Two groups share a parameter, which torch refuses in the constructor only."""
    optimizer = model.policy.optimizer
    optimizer.add_param_group({"params": [nn.Parameter(th.zeros(1))], "lr": 1e-2})
    optimizer.param_groups[1]["params"] = [model.policy.action_net.bias]


def tie(model: Any) -> None:
    """Two layers share a parameter."""
    policy = model.policy
    policy.mlp_extractor.value_net[0].weight = policy.mlp_extractor.policy_net[0].weight
    policy.optimizer = th.optim.Adam(policy.parameters(), lr=3e-4, eps=1e-5)


def two_groups(model: Any) -> None:
    policy = model.policy
    heads = [*policy.action_net.parameters(), *policy.value_net.parameters()]
    groups = [{"params": heads, "eps": 1e-3}, {"params": list(policy.mlp_extractor.parameters()), "betas": (0.8, 0.99)}]
    policy.optimizer = th.optim.Adam(groups, lr=3e-4, eps=1e-5)


@pytest.mark.parametrize("prepare", [add_a_layer, step_one_twice, tie, two_groups], ids=lambda f: f.__name__)
def test_an_optimizer_and_a_policy_that_were_changed(prepare: Any) -> None:
    agree(trained(PPO, prepare=prepare), trained(DualClipPPO, prepare=prepare))


OPTIMIZERS: dict[str, Any] = {
    "Adadelta": th.optim.Adadelta,
    "Adafactor": th.optim.Adafactor,
    "Adagrad": th.optim.Adagrad,
    "Adam": th.optim.Adam,
    "Adam, amsgrad": partial(th.optim.Adam, amsgrad=True),
    "Adam, weight decay": partial(th.optim.Adam, weight_decay=0.1),
    "Adam, foreach": partial(th.optim.Adam, foreach=True),
    "Adam, maximize": partial(th.optim.Adam, maximize=True),
    "AdamW": partial(th.optim.AdamW, weight_decay=0.1),
    "Adamax": th.optim.Adamax,
    "ASGD": th.optim.ASGD,
    "NAdam": th.optim.NAdam,
    "RAdam": th.optim.RAdam,
    "RMSprop": partial(th.optim.RMSprop, momentum=0.9),
    "Rprop": th.optim.Rprop,
    "SGD": partial(th.optim.SGD, momentum=0.9, nesterov=True),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("skips", [False, True])
def test_every_optimizer_of_torch(name: str, skips: bool) -> None:
    kwargs: dict[str, Any] = {"optimizer_class": OPTIMIZERS[name], "optimizer_kwargs": {}}
    if skips:
        kwargs |= {"features_extractor_class": Skips, "features_extractor_kwargs": {"pattern": ("a", "", "ab")}}
    if name.startswith("Adafactor"):
        kwargs["optimizer_kwargs"] = {"eps": (None, 1e-3)}
    agree(trained(PPO, **kwargs), trained(DualClipPPO, **kwargs))


def test_the_flat_step_is_used_where_it_may_be(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where some layers never take part."""
    made: list[FlatAdam] = []
    init = FlatAdam.__init__

    def noted(self: FlatAdam, *args: Any) -> None:
        init(self, *args)
        made.append(self)

    monkeypatch.setattr(FlatAdam, "__init__", noted)
    trained(DualClipPPO)
    assert len(made) == 3  # one an update
    trained(DualClipPPO, features_extractor_class=Skips, features_extractor_kwargs={"pattern": ("a",)})
    assert len(made) == 9  # with all parameters, then with those that take part
