"""Adam on flat parameters does to each what torch's Adam does, and leaves nothing behind."""

from __future__ import annotations

from typing import Any

import pytest
import torch as th
from torch import nn

from sb3_ppo_ext import DualClipPPO
from sb3_ppo_ext.common.update.flat_adam import FlatAdam
from sb3_ppo_ext.common.update.step import clip_and_step, use_fused_adam


def make_network() -> nn.Sequential:
    th.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 2), nn.ReLU(), nn.Flatten(), nn.Linear(36, 5), nn.Tanh(), nn.Linear(5, 2))


def make_optimizer(network: nn.Module) -> th.optim.Adam:
    first, *rest = network.parameters()
    optimizer = th.optim.Adam([{"params": [first], "lr": 0.02}, {"params": rest}], lr=0.01, eps=1e-5)
    use_fused_adam(optimizer)
    return optimizer


def make_steps(network: nn.Module, optimizer: th.optim.Adam, parameters: list[nn.Parameter], n: int) -> None:
    for i in range(n):
        for p in parameters:
            if p.grad is not None:
                p.grad.zero_()  # in place: what is flat has views of it
        inputs = th.linspace(-1, 1 + i, 2 * 3 * 16).view(2, 3, 4, 4)
        network(inputs).square().sum().backward()
        clip_and_step(optimizer, parameters, max_grad_norm=0.5)


def test_flat_steps_are_adams_steps() -> None:
    """Two parameter groups with rates of their own, a convolution, and moments from steps made before."""
    networks = make_network(), make_network()
    optimizers = [make_optimizer(network) for network in networks]
    for network, optimizer in zip(networks, optimizers, strict=True):
        last = network[-1].bias  # makes a step less than the others
        last.requires_grad_(False)
        make_steps(network, optimizer, list(network.parameters()), 1)
        last.requires_grad_(True)
        make_steps(network, optimizer, list(network.parameters()), 2)
    theirs, ours = networks
    make_steps(theirs, optimizers[0], list(theirs.parameters()), 5)

    own = [p.data for p in ours.parameters()]
    flat = FlatAdam(optimizers[1], ours.parameters())
    assert len(flat.parameters) == 3
    make_steps(ours, flat.adam, flat.parameters, 5)
    flat.restore()
    for p, q, data in zip(theirs.parameters(), ours.parameters(), own, strict=True):
        th.testing.assert_close(p, q, atol=1e-7, rtol=1e-6)
        assert q.data_ptr() == data.data_ptr()
        assert q.stride() == data.stride()
        assert q.grad is not None  # for whoever logs it
        th.testing.assert_close(p.grad, q.grad, atol=1e-7, rtol=1e-6)
        state, flat_state = optimizers[0].state[p], optimizers[1].state[q]
        assert state["step"].item() == flat_state["step"].item() == (7 if p is networks[0][-1].bias else 8)
        for name in ("exp_avg", "exp_avg_sq"):
            assert flat_state[name].stride() == q.stride()
            th.testing.assert_close(state[name], flat_state[name], atol=1e-8, rtol=1e-5)


def test_parameters_that_are_not_named_are_left_alone() -> None:
    network = make_network()
    optimizer = make_optimizer(network)
    first, *rest = network.parameters()
    before = first.detach().clone()
    flat = FlatAdam(optimizer, rest)
    make_steps(network, flat.adam, flat.parameters, 2)
    flat.restore()
    assert th.equal(first, before)
    assert first not in optimizer.state


@pytest.mark.parametrize(
    "settings", [{"weight_decay": 0.1}, {"amsgrad": True}, {"foreach": True}, {"fused": False}], ids=str
)
def test_what_it_would_do_differently_it_does_not_serve(settings: dict[str, Any]) -> None:
    network = make_network()
    optimizer = th.optim.Adam(network.parameters(), **settings)
    use_fused_adam(optimizer)
    assert not FlatAdam.supports(optimizer, list(network.parameters()))


def test_it_supports_no_other_optimizer_no_hooks_and_no_parameters_of_two_groups() -> None:
    network = make_network()
    parameters = list(network.parameters())
    assert not FlatAdam.supports(th.optim.RMSprop(parameters), parameters)
    assert not FlatAdam.supports(th.optim.AdamW(parameters, fused=True), parameters)

    optimizer = make_optimizer(network)
    assert FlatAdam.supports(optimizer, parameters)
    hook = optimizer.register_step_post_hook(lambda *_: None)
    assert not FlatAdam.supports(optimizer, parameters)
    hook.remove()
    assert FlatAdam.supports(optimizer, parameters)
    hook = parameters[0].register_hook(lambda gradient: gradient)
    assert not FlatAdam.supports(optimizer, parameters)
    hook.remove()
    assert FlatAdam.supports(optimizer, parameters)
    outside = nn.Parameter(th.zeros(2))
    assert not FlatAdam.supports(optimizer, [*parameters, outside])
    optimizer.param_groups[1]["params"].append(parameters[0])  # which torch does not look at, and steps twice
    assert not FlatAdam.supports(optimizer, parameters)


def test_an_update_that_is_interrupted_leaves_a_whole_policy() -> None:
    """Ctrl-C in the middle of an update: the parameters have their own memory, the optimiser the moments so far."""
    model: Any = DualClipPPO("MlpPolicy", "CartPole-v1", n_steps=64, batch_size=32, seed=0, device="cpu").learn(64)
    own = [p.data_ptr() for p in model.policy.parameters()]
    policy_loss, n_calls = model.policy_loss, 0

    def interrupted(*args: Any) -> Any:
        nonlocal n_calls
        n_calls += 1
        if n_calls > 3:
            raise KeyboardInterrupt
        return policy_loss(*args)

    model.policy_loss = interrupted
    with pytest.raises(KeyboardInterrupt):
        model.train()
    assert [p.data_ptr() for p in model.policy.parameters()] == own
    assert {state["step"].item() for state in model.policy.optimizer.state.values()} == {20 + 3}
    del model.policy_loss
    model.learn(64, reset_num_timesteps=False)


def test_a_hook_in_the_convolutions_sees_what_it_would_see() -> None:
    """A ReLU overwrites its input only where nobody else has it."""
    from stable_baselines3.common.env_util import make_vec_env

    from sb3_ppo_ext.common.rollout.actor_critic import DirectActorCritic
    from sb3_ppo_ext.common.rollout.data import PolicyInput
    from tests.envs import IMAGE, ScriptedEnv, spaces

    env = make_vec_env(lambda: ScriptedEnv(IMAGE, spaces.Discrete(3)), seed=0)
    model: Any = DualClipPPO("CnnPolicy", env, n_steps=8, batch_size=8, seed=0, device="cpu")
    seen: list[th.Tensor] = []
    model.policy.features_extractor.cnn[0].register_forward_hook(lambda _m, _i, out: seen.append(out))
    obs = th.as_tensor(env.reset())
    DirectActorCritic(model.policy).values(PolicyInput(obs))
    model.policy.predict_values(obs)
    ours, theirs = seen
    assert (ours < 0).any()
    th.testing.assert_close(ours, theirs)
