"""
What this package uses of torch's internals does what it is used for. Where one of these tests fails with a new release
of torch, sb3_ppo_ext/common/torch_internals.py is the file to change.
"""

from __future__ import annotations

import ast
import re
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch as th
import torch.distributed as dist
from torch import nn
from torch.nn.modules import module as torch_module

import sb3_ppo_ext
from sb3_ppo_ext import DualClipPPO
from sb3_ppo_ext.common.rollout.purity import impurity
from sb3_ppo_ext.common.torch_internals import (
    compile_ahead_of_time,
    compiler_cache_folder,
    default_store,
    fused_step,
    has_gradient_hooks,
    has_module_hooks,
    has_step_hooks,
    linear_by_onednn,
    load_compiled,
    set_patience,
    traced,
    version_of,
)

PACKAGE = Path(sb3_ppo_ext.__file__).parent
PRIVATE = re.compile(
    r"^torch\..*\b_(?!_)|^torch\.fx\.experimental|\._\w+_hooks$|(?<!self)\._(version|parameters|buffers|modules)$"
)


def private_names(path: Path) -> list[str]:
    """What a file imports or reads of torch, of its tensors and of its modules that is not public."""
    names = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names += [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Attribute):
            names.append(re.sub(r"^th\.", "torch.", ast.unparse(node)))
    return [name for name in names if re.fullmatch(r"[\w.]+", name) and PRIVATE.search(name)]


def test_torch_internals_are_used_in_one_file_alone() -> None:
    here = PACKAGE / "common" / "torch_internals.py"
    assert {"torch._inductor.aoti_load_package", "module._forward_hooks"} <= set(private_names(here))
    for path in PACKAGE.rglob("*.py"):
        if path != here:
            assert not private_names(path), f"{path.name} belongs behind a function of {here.name}"


def test_versions() -> None:
    x = th.zeros(4)
    first, second = (nn.Parameter(th.ones(2)) for _ in range(2))
    first.grad, second.grad = x[:2], x[2:]
    before = version_of(x)
    (first.sum() + second.sum()).backward()
    assert version_of(x) == before + 2, (
        "A backward pass no longer counts as one write for each gradient that is a view of a tensor. "
        "FlatAdam.all_have_gradients depends on it: it would leave its flat step, or make one for parameters without "
        "a gradient"
    )
    p = nn.Parameter(th.ones(2))
    before = version_of(p)
    with th.no_grad():
        p.mul_(1.0)
    assert version_of(p) == before + 1, (
        "A write into a parameter no longer changes its version. ParameterWatch.is_touched depends on it: a callback "
        "that changes the policy within a rollout would not be seen"
    )
    _ = p + p.sum()
    assert version_of(p) == before + 1, (
        "Reading a parameter changes its version. ParameterWatch.is_touched depends on it, and would compare all "
        "parameters at every step"
    )


def nothing(*args: Any) -> None:
    pass


@pytest.mark.parametrize(
    "register",
    [
        nn.Module.register_forward_pre_hook,
        nn.Module.register_forward_hook,
        nn.Module.register_full_backward_pre_hook,
        nn.Module.register_full_backward_hook,
        lambda module, hook: torch_module.register_module_forward_pre_hook(hook),
        lambda module, hook: torch_module.register_module_forward_hook(hook),
        lambda module, hook: torch_module.register_module_full_backward_pre_hook(hook),
        lambda module, hook: torch_module.register_module_full_backward_hook(hook),
    ],
    ids=["forward pre", "forward", "backward pre", "backward", *(f"of all modules {i}" for i in range(4))],
)
def test_hooks_of_modules(register: Any) -> None:
    module = nn.Linear(1, 1)
    assert not has_module_hooks(module)
    handle = register(module, nothing)
    try:
        assert has_module_hooks(module), (
            "A hook of a module is not found. DirectActorCritic and torch_compile=True depend on it, and would run the "
            "network without the hook"
        )
    finally:
        handle.remove()
    assert not has_module_hooks(module), "A hook that was removed still seems to be there: updates would be slow"


@pytest.mark.parametrize("register", [th.Tensor.register_hook, th.Tensor.register_post_accumulate_grad_hook])
def test_hooks_of_gradients(register: Any) -> None:
    parameters = [nn.Parameter(th.ones(1)) for _ in range(2)]
    assert not has_gradient_hooks(parameters)
    register(parameters[1], nothing)
    assert has_gradient_hooks(parameters), (
        "A hook on a parameter's gradient is not found. FlatAdam.supports and check_can_compile depend on it: the hook "
        "would run twice, or not at all"
    )


@pytest.mark.parametrize(
    "register", [th.optim.Optimizer.register_step_pre_hook, th.optim.Optimizer.register_step_post_hook]
)
def test_hooks_of_optimizers(register: Any) -> None:
    optimizer = th.optim.Adam([nn.Parameter(th.ones(1))])
    assert not has_step_hooks(optimizer)
    register(optimizer, nothing)
    assert has_step_hooks(optimizer), (
        "A hook on an optimiser's step is not found. FlatAdam.supports depends on it, and would make steps without it"
    )


def test_fused_step() -> None:
    used_by = "clip_and_step depends on it to clip gradients"
    p, q = (nn.Parameter(th.tensor([1.0, -2.0])) for _ in range(2))
    fused, plain = th.optim.Adam([p], lr=0.1, eps=1.0, fused=True), th.optim.Adam([q], lr=0.1, eps=1.0)
    p.grad, q.grad = th.tensor([4.0, 2.0]), th.tensor([1.0, 0.5])
    fused_step(fused, grad_scale=th.tensor(4.0))
    plain.step()
    th.testing.assert_close(p, q, msg=f"The fused kernel no longer divides the gradients by grad_scale: {used_by}")
    assert p.grad.tolist() == [1.0, 0.5], (
        "The fused kernel no longer leaves the divided gradients: those that are logged after an update would not be "
        "the clipped ones"
    )
    before = p.detach().clone()
    fused_step(fused, grad_scale=th.tensor(1.0), found_inf=th.tensor(1.0))
    assert th.equal(p, before), "The fused kernel makes a step in spite of found_inf: a NaN would reach the policy"
    assert not {"grad_scale", "found_inf"} & vars(fused).keys()
    fused.step()
    assert not th.equal(p, before)


def test_tracing() -> None:
    used_by = "All that torch_compile=True does depends on it"
    offset = th.ones(2)

    def step(x: th.Tensor, total: th.Tensor) -> list[th.Tensor]:
        with th.enable_grad():
            leaf = x.detach().requires_grad_()
            (gradient,) = th.autograd.grad(((leaf + offset).tanh() ** 2).sum(), leaf)
        total.add_(gradient)
        return [gradient]

    replaced = {th.ops.aten.tanh.default: lambda x: 2.0 * x}
    graph = traced(step, [th.zeros(2), th.zeros(2)], {})
    x, total = th.tensor([0.5, -0.5]), th.ones(2)
    expected = 2.0 * (x + 1.0).tanh() * (1.0 - (x + 1.0).tanh() ** 2)
    with th.no_grad():
        (gradient,) = graph(x, total)
    th.testing.assert_close(gradient, expected, msg=f"A gradient is no longer traced. {used_by}")
    th.testing.assert_close(total, 1.0 + expected, msg=f"A write into an input is no longer traced. {used_by}")
    with th.no_grad():
        offset.fill_(0.0)
        (gradient,) = graph(x, total)
    th.testing.assert_close(
        gradient,
        2.0 * x.tanh() * (1.0 - x.tanh() ** 2),
        msg="A tensor found elsewhere is no longer kept as itself. A network that writes into one would be stale",
    )
    with th.no_grad():
        (value,) = traced(lambda x: [x.tanh()], [x], replaced)(x)
    assert value.tolist() == [1.0, -1.0], "Decompositions are not used: tanh would take three times as long"
    # Without this error a program would be for one value of what the policy decides by.
    with pytest.raises(RuntimeError, match="data-dependent"):
        traced(lambda x: [x if x.sum() > 0 else -x], [x], {})


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # about torch's own code
def test_machine_code(tmp_path: Path) -> None:
    def step(x: th.Tensor, total: th.Tensor) -> list[th.Tensor]:
        total.add_(x)
        return [2.0 * x]

    inputs = [th.zeros(2), th.zeros(2)]
    path = tmp_path / "program.pt2"
    compile_ahead_of_time(traced(step, inputs, {}), inputs, path, {"realize_reads_threshold": 2})
    run = load_compiled(path)
    x, total = th.tensor([1.0, 2.0]), th.ones(2)
    (doubled,) = run([x, total])
    assert doubled.tolist() == [2.0, 4.0], "Compiled ahead of time, a program gives other results. All of them depend"
    assert total.tolist() == [2.0, 3.0], (
        "Compiled ahead of time, a program does not write into its inputs. The compiled gradient step would change "
        "nothing"
    )


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # about torch's own code
def test_products_by_onednn(tmp_path: Path) -> None:
    def products(x: th.Tensor, weight: th.Tensor) -> list[th.Tensor]:
        return [linear_by_onednn(x, weight), linear_by_onednn(weight.t(), 2.0 * x)]

    th.manual_seed(0)
    inputs = [th.randn(6, 3), th.randn(3, 3)]
    path = tmp_path / "program.pt2"
    compile_ahead_of_time(traced(products, inputs, {}), inputs, path, {})
    x, weight = th.randn(6, 3), th.randn(3, 3)
    expected = [x @ weight.t(), weight.t() @ (2.0 * x).t()]
    for results in (products(x, weight), load_compiled(path)([x, weight])):
        for result, product in zip(results, expected, strict=True):
            th.testing.assert_close(result, product, msg="oneDNN's linear layer is another product")


def test_cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "compiled"))
    assert compiler_cache_folder() == tmp_path / "compiled", (
        "Torch no longer keeps what it compiles in TORCHINDUCTOR_CACHE_DIR, where README says that programs are kept"
    )


def test_parametrizations_are_found() -> None:
    """By a public function, which looks at a module's own parameters."""
    policy: Any = DualClipPPO("MlpPolicy", "Pendulum-v1", device="cpu").policy
    assert impurity(policy) is None
    nn.utils.parametrize.register_parametrization(policy, "log_std", nn.Identity())
    assert impurity(policy) == "policy has parametrizations of its own parameters"


def test_default_group() -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        store = default_store()
        assert not store.check(["key"]), "Processes would be told of an error that nobody has had"
        store.compare_set("key", "", "first")
        store.compare_set("key", "", "second")
        assert store.get("key") == b"first", "The error that is told would not be the first one"

        set_patience(timedelta(hours=3))
        group = dist.distributed_c10d._get_default_group()
        patience = group._get_backend(th.device("cpu")).options._timeout
        assert patience == timedelta(hours=3), "A long evaluation by one of the processes would end the training"
    finally:
        dist.destroy_process_group()
