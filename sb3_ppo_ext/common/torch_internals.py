"""
All uses of torch that are not part of its public API.

They are collected here, each with its reason and with the public API that would replace it, so that a new release of
torch can break only this file. All of them work in torch 2.10 to 2.14, and ``tests/contract/test_torch_internals.py``
checks what they do.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import timedelta
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch as th
from torch import fx, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.modules import module as torch_module

# The number of in-place changes of a tensor and its views. It shows whether a callback has changed the policy during a
# rollout, and which parameters a backward pass has reached, without reading their values. Torch has no public API for
# it.
version_of: Callable[[th.Tensor], int] = attrgetter("_version")


def has_module_hooks(module: nn.Module) -> bool:
    """
    Whether a hook runs when a module is called, be it the module's own hook or a global one. Networks with hooks are
    neither compiled nor run as plain functions, because that would skip the hooks. Torch has no public list of hooks.

    :param module: checked without its submodules
    """
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or torch_module._global_forward_hooks
        or torch_module._global_forward_pre_hooks
        or torch_module._global_backward_hooks
        or torch_module._global_backward_pre_hooks
    )


def has_gradient_hooks(parameters: Iterable[th.Tensor]) -> bool:
    """
    Whether a hook runs when one of the parameters gets its gradient. A step over flat parameters would run it twice, a
    compiled step never. Torch has no public list of hooks.

    :param parameters: leaves of the autograd graph
    """
    return any(p._backward_hooks or p._post_accumulate_grad_hooks for p in parameters)


def has_step_hooks(optimizer: th.optim.Optimizer) -> bool:
    """
    Whether a hook runs at the optimiser's steps. Another optimiser in its place would skip the hook. Torch has no
    public list of hooks.

    :param optimizer: checked without global hooks
    """
    return bool(optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks)


def fused_step(optimizer: th.optim.Optimizer, *, grad_scale: th.Tensor, found_inf: th.Tensor | None = None) -> None:
    """
    Make a step of an optimiser with ``fused=True`` whose kernel first divides the gradients. This clips them without a
    separate pass. ``torch.amp.GradScaler`` sets the same two attributes; a public argument of ``step`` would replace
    them.

    :param optimizer: Adam or AdamW
    :param grad_scale: divisor of the gradients, a scalar on their device; they stay divided
    :param found_inf: a scalar on their device, 1.0 to skip the step; None: never skip it
    """
    handed_over: dict[str, Any] = {"grad_scale": grad_scale, "found_inf": found_inf}
    vars(optimizer).update(handed_over)
    optimizer.step()
    for name in handed_over:
        delattr(optimizer, name)


def traced(
    function: Callable[..., list[th.Tensor]],
    inputs: Sequence[th.Tensor],
    decompositions: Mapping[Any, Callable[..., Any]],
) -> fx.GraphModule:
    """
    Trace the operations of a function, including ``torch.autograd.grad`` and writes into its inputs. Tensors that are
    not inputs become attributes of the graph. ``torch.export`` would replace it if it traced functions that
    differentiate.

    :param function: run once, on fake tensors
    :param inputs: example inputs
    :param decompositions: replacements of some of the operations
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about torch's own code
        return make_fx(function, decomposition_table=decompositions, tracing_mode="fake", _allow_non_fake_inputs=True)(
            *inputs
        )


def compile_ahead_of_time(
    graph: fx.GraphModule, inputs: Sequence[th.Tensor], path: Path, options: Mapping[str, Any]
) -> None:
    """
    Compile a graph for the CPU into a file. Torch documents this function of a private module (AOTInductor) for that
    purpose.

    :param graph: the operations
    :param inputs: example inputs
    :param path: path of the file, which ends in .pt2
    :param options: of the compiler, by name
    """
    if graph.graph.find_nodes(op="call_function", target=th.ops.sb3_ppo_ext.linear_by_onednn.default):
        compile_linear_by_onednn()
    program = th.export.export(graph, tuple(inputs), strict=False)
    th._inductor.aoti_compile_and_package(program, package_path=str(path), inductor_configs=dict(options))


@th.library.custom_op("sb3_ppo_ext::linear_by_onednn", mutates_args=())
def linear_by_onednn(x: th.Tensor, weight: th.Tensor) -> th.Tensor:
    """
    ``x @ weight.t()`` by oneDNN on the CPU, where torch's own product is one by MKL.

    :param x: shape ``(batch, n_inputs)``, float32
    :param weight: shape ``(n_outputs, n_inputs)``, float32
    :return: shape ``(batch, n_outputs)``
    """
    product: th.Tensor = th.ops.mkldnn._linear_pointwise(x.contiguous(), weight.contiguous(), None, "none", [], "")
    return product


@linear_by_onednn.register_fake
def _(x: th.Tensor, weight: th.Tensor) -> th.Tensor:
    return x.new_empty(len(x), len(weight))


@functools.cache
def compile_linear_by_onednn() -> None:
    """
    Let the compiler call oneDNN itself for :func:`linear_by_onednn`. It has a node for that, but uses it for constant
    weights only.
    """
    from torch._inductor.ir import TensorBox
    from torch._inductor.lowering import register_lowering
    from torch._inductor.mkldnn_ir import LinearUnary

    @register_lowering(th.ops.sb3_ppo_ext.linear_by_onednn.default, type_promotion_kind=None)
    def _(x: Any, weight: Any) -> Any:
        product = LinearUnary.create(x, weight, None, "none", [], "")  # type: ignore[no-untyped-call]
        return TensorBox.create(product)


def load_compiled(path: Path) -> Callable[[list[th.Tensor]], list[th.Tensor]]:
    """
    Load a file of :func:`compile_ahead_of_time`. Torch documents how to load it and how to call it. This function
    returns the inner function of that call, because the outer one takes twice as long as a small network.

    :param path: path of the file
    """
    package = th._inductor.aoti_load_package(str(path), run_single_threaded=True)
    run: Callable[[list[th.Tensor]], list[th.Tensor]] = package.loader.run
    return run


def compiler_cache_folder() -> Path:
    """
    Torch's folder of compiled code: ``TORCHINDUCTOR_CACHE_DIR`` or a default, which only a private function returns.
    """
    return Path(th._inductor.runtime.cache_dir_utils.cache_dir())


def default_store() -> Any:
    """
    The key-value store of the default group of ``torch.distributed``: one process writes a value, and the others read
    it at any time, without waiting. The group has no public access to it, and a second store would need another port.
    """
    from torch.distributed.distributed_c10d import _get_default_store

    return _get_default_store()


def set_patience(patience: timedelta) -> None:
    """
    Set how long the processes of the default group of ``torch.distributed`` wait for each other from now on. The
    timeout that the group is created with also limits its creation, and must be short there. A second group
    (``new_group``) would replace this, with its own connections.

    :param patience: the new timeout
    """
    from torch.distributed.distributed_c10d import _set_pg_timeout

    _set_pg_timeout(patience)
