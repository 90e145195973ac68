"""Hooks on layers and parameters run as often as by SB3, and gradients are left as SB3 leaves them."""

from __future__ import annotations

from typing import Any

import pytest
import torch as th
from torch import nn

from sb3_ppo_ext import TRPO, DualClipPPO
from tests.algorithms import ALGORITHMS, ROLLOUT, ppo_and_ours, small
from tests.envs import scripted


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("where", ["", "mlp_extractor", "mlp_extractor.value_net", "action_net", "features_extractor"])
def test_hooks_run_while_it_acts_and_learns(algorithm: Any, where: str) -> None:
    model = small(algorithm, "MlpPolicy", "CartPole-v1")
    calls = {False: 0, True: 0}
    is_training = False

    def count(*_: Any) -> None:
        calls[is_training] += 1

    module = model.policy.get_submodule(where)
    module.register_forward_hook(count)
    train = model.train

    def train_noted() -> None:
        nonlocal is_training
        is_training = True
        train()
        is_training = False

    model.train = train_noted
    model.learn(1)
    steps = model.rollout_buffer.buffer_size
    assert calls[False] >= steps
    assert calls[True] > 0 or where == ""  # SB3 does not call the policy itself there


def test_hooks_run_as_often_as_by_sb3() -> None:
    counts: list[dict[str, int]] = []

    def count(model: Any) -> None:
        of_model: dict[str, int] = {}
        for name, module in model.policy.named_modules():
            module.register_forward_hook(lambda *_, n=name: of_model.update({n: of_model.get(n, 0) + 1}))
        counts.append(of_model)

    ppo_and_ours("MlpPolicy", scripted, 2 * ROLLOUT, prepare=count)
    theirs, ours = counts
    assert ours == theirs != {}


@pytest.mark.parametrize("hook", ["forward", "gradient", "global"])
def test_hooks_that_a_program_would_not_run_are_refused(hook: str) -> None:
    model = small(DualClipPPO, "MlpPolicy", "CartPole-v1", torch_compile=True)
    if hook == "forward":
        handle: Any = model.policy.action_net.register_forward_hook(lambda *_: None)
    elif hook == "gradient":
        handle = model.policy.action_net.weight.register_hook(lambda gradient: gradient)
    else:
        handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        with pytest.raises(ValueError, match=r"torch_compile=True is not allowed .*hooks"):
            model.learn(ROLLOUT)
    finally:
        handle.remove()


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_gradients_are_there_after_an_update(algorithm: Any) -> None:
    """Those of the last step, clipped, as SB3 leaves them."""
    limit = {} if algorithm is TRPO else {"max_grad_norm": 0.01}
    model = small(algorithm, "MlpPolicy", "CartPole-v1", **limit).learn(1)
    gradients = [p.grad for p in model.policy.parameters()]
    assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients)
    if algorithm is DualClipPPO:
        norm = th.linalg.vector_norm(th.cat([gradient.flatten() for gradient in gradients]))
        assert norm.item() == pytest.approx(0.01, rel=1e-3)


@pytest.mark.usefixtures("without_compiler")
@pytest.mark.parametrize("torch_compile", [False, True])
def test_gradients_after_an_update_are_sb3s(torch_compile: bool) -> None:
    theirs, ours = ppo_and_ours("MlpPolicy", scripted, 4 * ROLLOUT, of_ours={"torch_compile": torch_compile})
    for p, q in zip(theirs.policy.parameters(), ours.policy.parameters(), strict=True):
        th.testing.assert_close(q.grad, p.grad, atol=1e-5, rtol=1e-4)
