"""``rollback``: an update that ends too far is, to the bit, one that had fewer epochs."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch as th
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor

from sb3_ppo_ext import AdaptiveKLPPO, DualClipPPO
from tests.algorithms import ROLLOUT, assert_same_policy, have_moved, parameters, small
from tests.parity.test_reducer import one_at_a_time, train, workers_of

__all__ = ["one_at_a_time"]


class Normalized(BaseFeaturesExtractor):
    """Keeps running statistics, which are buffers, in training mode."""

    def __init__(self, observation_space: Any) -> None:
        super().__init__(observation_space, features_dim=4)
        self.layers = th.nn.Sequential(th.nn.Linear(4, 4), th.nn.BatchNorm1d(4))

    def forward(self, observations: th.Tensor) -> th.Tensor:
        features: th.Tensor = self.layers(observations)
        return features


def updated(n_epochs: int, target_kl: float = 0.005, **kwargs: Any) -> Any:
    """A model after two updates of 4 minibatches, of which the first has one epoch and no limit."""
    kwargs = {"learning_rate": 0.003, "batch_size": 4, "n_epochs": 1, "target_kl": 1e6, **kwargs}
    model = small(DualClipPPO, "MlpPolicy", "CartPole-v1", **kwargs)
    model.learn(ROLLOUT)
    model.n_epochs, model.target_kl = n_epochs, target_kl
    return model.learn(ROLLOUT, reset_num_timesteps=False)


def assert_same_moments(one: Any, other: Any) -> None:
    states, others = (model.policy.optimizer.state_dict()["state"] for model in (one, other))
    assert states.keys() == others.keys()
    for i, state in states.items():
        assert state.keys() == others[i].keys()
        assert all(th.equal(value, others[i][name]) for name, value in state.items())


@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"torch_compile": True},
        {"policy_kwargs": {"features_extractor_class": Normalized}, "target_kl": 0.002},
        {"policy_kwargs": {"optimizer_class": th.optim.RMSprop, "optimizer_kwargs": {"eps": 1e-5}}},
    ],
    ids=["flat", "compiled", "running statistics", "RMSprop"],
)
@pytest.mark.usefixtures("without_compiler")
def test_the_epoch_is_undone(kwargs: dict[str, Any]) -> None:
    model = updated(20, rollback=True, **kwargs)
    n_within = model.logger.name_to_value["train/early_stop_epoch"]
    assert 0 < n_within < 19
    # In both, a compiled step is taken up anew in each epoch.
    reference = updated(n_within, rollback=True, **kwargs)
    assert "train/early_stop_epoch" not in reference.logger.name_to_value
    assert_same_policy(model, reference)
    assert_same_moments(model, reference)
    assert model._n_updates == reference._n_updates == 1 + n_within
    if "torch_compile" not in kwargs:
        assert_same_policy(model, updated(n_within, **kwargs))
    stopped = updated(20, **kwargs)
    assert stopped.logger.name_to_value["train/early_stop_epoch"] == n_within
    assert have_moved(stopped, parameters(model))  # there was something to undo


def test_an_update_that_ends_in_its_first_epoch_is_none(capsys: pytest.CaptureFixture[str]) -> None:
    model = small(
        DualClipPPO,
        "MlpPolicy",
        "CartPole-v1",
        learning_rate=0.1,
        target_kl=1e-6,
        rollback=True,
        verbose=1,
        batch_size=4,
    )
    before = parameters(model)
    model.learn(ROLLOUT)
    assert not have_moved(model, before)
    assert not model.policy.optimizer.state
    assert model._n_updates == 0
    said = "at epoch 0 of 2: the policy has moved too far, and the steps of that epoch are undone"
    assert said in capsys.readouterr().out
    model.target_kl = 1e6
    assert have_moved(model.learn(ROLLOUT), before)


def test_the_learning_rate_keeps_what_the_kl_made_of_it() -> None:
    model = updated(20, rollback=True, kl_adaptive_lr={"target_kl": 0.001, "maximum": 0.1})
    assert "train/early_stop_epoch" in model.logger.name_to_value
    assert model.learning_rate == model.policy.optimizer.param_groups[0]["lr"] < 0.01


@pytest.mark.usefixtures("one_at_a_time")
def test_all_processes_undo_the_same() -> None:
    whole, workers = workers_of(DualClipPPO, [6, 9], n_epochs=10, target_kl=0.02, rollback=True)
    whole.train()
    train(workers)
    logged = [model.logger.name_to_value["train/early_stop_epoch"] for model in (*workers, whole)]
    assert logged == [logged[0]] * 3
    for worker in workers:
        for ours, expected in zip(worker.policy.parameters(), whole.policy.parameters(), strict=True):
            th.testing.assert_close(ours, expected, atol=2e-6, rtol=1e-4)


def test_without_a_limit_there_is_nothing_to_undo() -> None:
    with pytest.raises(ValueError, match=re.escape("rollback=True is not allowed with target_kl=None")):
        small(DualClipPPO, "MlpPolicy", "CartPole-v1", rollback=True)
    with pytest.raises(ValueError, match="rollback='yes' is not allowed: it must be True or False"):
        small(DualClipPPO, "MlpPolicy", "CartPole-v1", rollback="yes", target_kl=0.1)
    with pytest.raises(TypeError, match="rollback"):  # whose target_kl ends no update
        small(AdaptiveKLPPO, "MlpPolicy", "CartPole-v1", rollback=True)
