"""Recordings of programs, as CUDA graphs are: on the CPU in the order of events, and on a GPU where there is one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch as th

from sb3_ppo_ext import TRPO, AdaptiveKLPPO, DualClipPPO
from sb3_ppo_ext.common.compile import Run, cuda
from sb3_ppo_ext.common.compile import program as compiling
from sb3_ppo_ext.common.compile.step import CompiledStep
from tests.envs import BOX_ACTIONS
from tests.parity.compiled import (
    agree_after_updates,
    agree_on_rollouts,
    make_model,
    same_batch,
    trained_both_ways,
)


def rerun(run: Run, inputs: list[th.Tensor]) -> tuple[list[th.Tensor], Callable[[], None]]:
    """What a CUDA graph does: to run again on the tensors it was recorded with, and to write into what it gave then."""
    for _ in range(3):
        outputs = run(inputs)

    def replay() -> None:
        cuda.copied(outputs, run(inputs))

    return outputs, replay


@pytest.mark.usefixtures("without_compiler")
@pytest.mark.filterwarnings("ignore:batch_size=48 does not divide:UserWarning")
@pytest.mark.parametrize(
    ("algorithm", "batch_size"),
    [(DualClipPPO, 32), (DualClipPPO, 48), (TRPO, 64)],  # 48: the last minibatch is smaller, and recorded for itself
)
def test_a_recording_reads_and_writes_where_it_was_made(
    algorithm: Any, batch_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The order of events on a GPU, on the CPU; what CUDA does with it is tested below, where there is one."""
    monkeypatch.setattr(compiling, "can_record", lambda device: True)
    monkeypatch.setattr(cuda, "_recorded", rerun)
    with same_batch():
        eager, compiled = trained_both_ways(algorithm, BOX_ACTIONS, learning_rate="lin_1e-3", batch_size=batch_size)
    agree_after_updates(eager, compiled, stops=False)
    agree_on_rollouts(compiled)
    for _, kept in compiled._compiled._kept.values():
        (runs,) = kept._program._runs.values()
        assert {type(run) for run in runs.values()} == {cuda.Recording}
    assert len(runs) == (2 if batch_size == 48 else 1)


@pytest.mark.usefixtures("without_compiler")
def test_a_recording_is_left_and_taken_up_again_between_epochs(monkeypatch: pytest.MonkeyPatch) -> None:
    """For targets of the present critic, and to undo an epoch; meanwhile the learning rate changes."""
    monkeypatch.setattr(compiling, "can_record", lambda device: True)
    monkeypatch.setattr(cuda, "_recorded", rerun)
    kwargs: dict[str, Any] = {"learning_rate": 2e-3, "n_epochs": 6, "recompute_advantages": True}
    kwargs |= {"target_kl": 0.01, "rollback": True, "kl_adaptive_lr": {"target_kl": 0.01}}
    with same_batch():
        eager, compiled = trained_both_ways(DualClipPPO, BOX_ACTIONS, **kwargs)
    agree_after_updates(eager, compiled, stops=True)
    assert eager.learning_rate == compiled.learning_rate != 2e-3
    assert eager._n_updates > 2


@pytest.mark.usefixtures("without_compiler")
def test_an_interrupted_recording_leaves_the_model_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(run: Run, inputs: list[th.Tensor]) -> Any:
        run(inputs)
        raise KeyboardInterrupt

    monkeypatch.setattr(compiling, "can_record", lambda device: True)
    model = make_model(DualClipPPO, BOX_ACTIONS, torch_compile=True)
    before = [p.clone() for p in model.policy.parameters()]
    train = model.train

    def train_interrupted() -> None:
        monkeypatch.setattr(cuda, "_recorded", interrupted)
        train()

    model.train = train_interrupted
    monkeypatch.setattr(cuda, "_recorded", rerun)
    with pytest.raises(KeyboardInterrupt):
        model.learn(128)
    assert all(map(th.equal, before, model.policy.parameters()))
    assert {state["step"].item() for state in model.policy.optimizer.state.values()} <= {0.0}


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype feature")
@pytest.mark.parametrize("algorithm", [DualClipPPO, AdaptiveKLPPO])
def test_the_minibatches_of_an_update_wait_for_nothing_on_cuda(
    algorithm: Any, monkeypatch: pytest.MonkeyPatch, programs: list[str]
) -> None:
    model = make_model(algorithm, BOX_ACTIONS, torch_compile=True, device="cuda", n_epochs=3)
    model.learn(128)
    (runs,) = model._compiled._kept["step"][1]._program._runs.values()
    assert [type(run) for run in runs.values()] == [cuda.Recording]
    calls = []

    def alone(function: Any) -> Any:
        def watched(*args: Any) -> Any:
            calls.append(function.__name__)
            th.cuda.set_sync_debug_mode("error")
            try:
                return function(*args)
            finally:
                th.cuda.set_sync_debug_mode("default")

        return watched

    take = CompiledStep._take

    def take_unwatched(*args: Any) -> Any:  # once an update: how many steps the optimiser has made
        th.cuda.set_sync_debug_mode("default")
        return take(*args)

    monkeypatch.setattr(CompiledStep, "_take", take_unwatched)
    monkeypatch.setattr(CompiledStep, "__call__", alone(CompiledStep.__call__))
    monkeypatch.setattr(type(model.rollout_buffer), "shuffled_rows", alone(type(model.rollout_buffer).shuffled_rows))
    model.learn(128, reset_num_timesteps=False)
    assert calls.count("__call__") == 12
    assert calls.count("shuffled_rows") == 3
