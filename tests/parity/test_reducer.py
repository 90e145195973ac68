"""Two processes that train one model on half of the environments each make the steps of one that has them all."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest
import torch as th
from stable_baselines3.common.logger import Logger

from sb3_ppo_ext import REINFORCE, TRPO, AdaptiveKLPPO, DualClipPPO, reinforce
from sb3_ppo_ext.common.compile.program import Program
from sb3_ppo_ext.common.update.samplers import normalized_over_processes
from tests.parity.noise import LENGTH, give, model_of, recorded


class Exchange:
    """A reducer of threads, which stand for processes; one for each of them, with what they share."""

    is_local = False

    def __init__(self, rank: int, barrier: threading.Barrier, given: dict[int, Any]) -> None:
        self.rank = rank
        self.n_processes = barrier.parties
        self.n_calls = 0
        self._barrier = barrier
        self._given = given

    @classmethod
    def of(cls, n: int) -> list[Exchange]:
        barrier, given = threading.Barrier(n, timeout=30.0), dict[int, Any]()
        return [cls(rank, barrier, given) for rank in range(n)]

    def gathered(self, value: Any) -> list[Any]:
        self._barrier.wait()  # nobody still reads what was given before
        self._given[self.rank] = value
        self.n_calls += 1
        self._barrier.wait()
        return [self._given[rank] for rank in range(self.n_processes)]

    def summed(self, message: th.Tensor) -> th.Tensor:
        total = th.zeros_like(message)
        for part in self.gathered(message.detach().clone()):
            total += part
        return total


def workers_of(algorithm: Any, lengths: list[int], **kwargs: Any) -> tuple[Any, list[Any]]:
    """
    A model that has collected a rollout from all environments, and one for each environment that has its part of it.

    :return: the whole, whose ``train`` does nothing as long as it is not asked for by its class, and the workers
    """
    whole = model_of(algorithm, lengths, **kwargs)
    whole.train = lambda: None
    whole.learn(1)
    del whole.train
    workers = [model_of(algorithm, [length], **kwargs) for length in lengths]
    for i, (worker, exchange) in enumerate(zip(workers, Exchange.of(len(lengths)), strict=True)):
        worker.policy.load_state_dict(whole.policy.state_dict())
        worker._reducer = exchange
        worker._logger = Logger(folder=None, output_formats=[])
        worker._current_progress_remaining = whole._current_progress_remaining
        give(worker, recorded(whole), i)
    return whole, workers


def train(workers: list[Any]) -> None:
    """Let all of them make an update at the same time."""
    failed: list[BaseException] = []

    def trained(worker: Any) -> None:
        try:
            worker.train()
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=trained, args=(worker,)) for worker in workers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    assert all(map(th.equal, *(worker.policy.parameters() for worker in workers)))


@pytest.fixture
def one_at_a_time(without_compiler: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch traces in one thread."""
    lock, first_call = threading.Lock(), Program._first_call

    def locked(self: Program, *args: Any) -> list[th.Tensor]:
        with lock:
            return first_call(self, *args)

    monkeypatch.setattr(Program, "_first_call", locked)


@pytest.mark.parametrize(
    ("algorithm", "kwargs"),
    [
        (DualClipPPO, {}),
        (DualClipPPO, {"torch_compile": True}),
        (DualClipPPO, {"normalize_advantage": False}),
        (DualClipPPO, {"n_epochs": 10, "target_kl": 0.02}),
        (DualClipPPO, {"n_epochs": 10, "target_kl": 0.02, "torch_compile": True}),
        (AdaptiveKLPPO, {"clip_range": None}),
        (DualClipPPO, {"n_epochs": 6, "kl_adaptive_lr": {"maximum": 0.1}}),
        (
            AdaptiveKLPPO,
            {"clip_range": None, "n_epochs": 6, "kl_adaptive_lr": {"every": "epoch"}, "torch_compile": True},
        ),
        (TRPO, {}),
        (TRPO, {"ent_coef": 0.1, "torch_compile": True}),
        (REINFORCE, {}),
        (REINFORCE, {"torch_compile": True}),
        *((REINFORCE, {"baseline": name}) for name in ("none", "mean", "optimal", "leave_one_out")),
        (REINFORCE, {"baseline": "leave_one_out", "returns": "total"}),
        *((REINFORCE, {"baseline": name, "episodes_per_env": 1}) for name in ("mean", "optimal", "leave_one_out")),
        (REINFORCE, {"discount_from": "start", "normalize_advantage": False, "ent_coef": 0.1}),
    ],
    ids=lambda x: x.__name__ if isinstance(x, type) else "-".join(f"{k}={v}" for k, v in x.items()),
)
@pytest.mark.usefixtures("one_at_a_time")
def test_two_processes_equal_one(algorithm: Any, kwargs: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reinforce, "n_processes", lambda: 2)
    whole, workers = workers_of(algorithm, [LENGTH, LENGTH + 3], **kwargs)  # REINFORCE's have as many episodes
    before = [p.detach().clone() for p in whole.policy.parameters()]
    whole.train()
    train(workers)
    assert all(worker._reducer.n_calls >= 1 for worker in workers)
    assert not all(map(th.equal, before, whole.policy.parameters()))
    for worker in workers:
        for ours, expected in zip(worker.policy.parameters(), whole.policy.parameters(), strict=True):
            th.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-4)
    logged = [model.logger.name_to_value for model in (*workers, whole)]
    names = ["policy_gradient_loss", "value_loss", "approx_kl", "ratio_max", "grad_norm", "kl", "actual_improvement"]
    for name in (*names, *([] if algorithm is TRPO else ["entropy_loss"])):
        numbers = [of_model[f"train/{name}"] for of_model in logged if f"train/{name}" in of_model]
        assert numbers == pytest.approx(numbers[-1:] * len(numbers), rel=1e-3, abs=1e-6), name
    if "target_kl" in kwargs:
        assert [of_model["train/early_stop_epoch"] for of_model in logged] == [logged[-1]["train/early_stop_epoch"]] * 3
        assert 0 < logged[-1]["train/early_stop_epoch"] < 9
    if "kl_adaptive_lr" in kwargs:
        assert workers[0].learning_rate == workers[1].learning_rate == whole.learning_rate != 0.01
    if algorithm is AdaptiveKLPPO:
        assert workers[0].kl_coef == workers[1].kl_coef == whole.kl_coef != 1.0


@pytest.mark.parametrize("torch_compile", [False, True])
@pytest.mark.usefixtures("one_at_a_time")
def test_a_process_with_fewer_samples_makes_as_many_steps(torch_compile: bool) -> None:
    _, workers = workers_of(REINFORCE, [1, 40], batch_size=16, torch_compile=torch_compile)
    train(workers)  # of 4 samples and of 160, in 10 minibatches each
    assert workers[0]._reducer.n_calls == workers[1]._reducer.n_calls


@pytest.mark.parametrize("sizes", [[[3, 1, 4], [2, 5, 0]], [[1], [0]], [[1], [1]]])
def test_advantages_are_normalized_over_all(sizes: list[list[int]]) -> None:
    generator = th.Generator().manual_seed(0)
    parts = [[100.0 + 3.0 * th.randn(n, generator=generator) for n in of_process] for of_process in sizes]
    exchanges = Exchange.of(2)
    results: list[Any] = [None, None]

    def normalize(i: int) -> None:
        values = normalized_over_processes(th.cat(parts[i]), sizes[i], exchanges[i])
        results[i] = values.split(sizes[i])

    threads = [threading.Thread(target=normalize, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for k in range(len(sizes[0])):
        together = th.cat([parts[0][k], parts[1][k]]).numpy().astype(np.float64)
        expected = (together - together.mean()) / (together.std(ddof=1) + 1e-8) if len(together) > 1 else together
        np.testing.assert_allclose(th.cat([results[0][k], results[1][k]]).numpy(), expected, rtol=1e-5, atol=1e-5)
