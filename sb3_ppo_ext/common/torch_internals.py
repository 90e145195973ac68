"""
What this package uses of torch without torch's promise to keep it.

Everything of that kind stands here, with the reason and with the public thing that would take its place, so that a new
release of torch can break this file alone. All of it is there in torch 2.10 to 2.14, and
``tests/contract/test_torch_internals.py`` checks what it does.
"""

from __future__ import annotations

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

# How often a tensor, or a view of it, has been written into. It shows that a callback has changed the policy during a
# rollout, and how many parameters a backward pass has reached, without reading a number of them. Torch has nothing
# public that says so.
version_of: Callable[[th.Tensor], int] = attrgetter("_version")


def has_module_hooks(module: nn.Module) -> bool:
    """
    Whether a hook runs when a module is called, its own or one of all modules. The networks are run by functions
    instead of modules, and compiled, only where none would be left out. Torch registers hooks and does not list them.

    :param module: looked at alone, without what is in it
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
    Whether a hook runs when one of the parameters gets its gradient. A flat step would run it twice, a compiled one
    never. Torch registers hooks and does not list them.

    :param parameters: leaves of the autograd graph
    """
    return any(p._backward_hooks or p._post_accumulate_grad_hooks for p in parameters)


def has_step_hooks(optimizer: th.optim.Optimizer) -> bool:
    """
    Whether a hook runs at the optimiser's steps, which the step of another optimiser in its place would leave out.
    Torch registers hooks and does not list them.

    :param optimizer: looked at alone, without the hooks of all optimisers
    """
    return bool(optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks)


def fused_step(optimizer: th.optim.Optimizer, *, grad_scale: th.Tensor, found_inf: th.Tensor | None = None) -> None:
    """
    A step of an optimiser with ``fused=True`` whose kernel divides the gradients first, which clips them without a pass
    of its own. ``torch.amp.GradScaler`` hands over its scale by the same two attributes; a public argument of ``step``
    would take their place.

    :param optimizer: Adam or AdamW
    :param grad_scale: what the gradients are divided by, a scalar on their device; they stay divided
    :param found_inf: a scalar on their device, 1.0 where the step is not to be made; None: it is to be made
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
    The operations that a function does, those of ``torch.autograd.grad`` and writes into its inputs among them. A
    tensor that it finds elsewhere is an attribute of the graph. ``torch.export`` would take its place if it traced
    functions that differentiate.

    :param function: to be run once, without computing
    :param inputs: an example of what it is given
    :param decompositions: other ways of doing some of the operations
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about torch's own code
        return make_fx(function, decomposition_table=decompositions, tracing_mode="fake", _allow_non_fake_inputs=True)(
            *inputs
        )


def compile_ahead_of_time(graph: fx.GraphModule, inputs: Sequence[th.Tensor], path: Path) -> None:
    """
    Compile a graph for the CPU into a file. Torch documents this function of a private module (AOTInductor) as the way
    to do so.

    :param graph: its operations
    :param inputs: an example of them
    :param path: of the file, which ends in .pt2
    """
    program = th.export.export(graph, tuple(inputs), strict=False)
    th._inductor.aoti_compile_and_package(program, package_path=str(path))


def load_compiled(path: Path) -> Callable[[list[th.Tensor]], list[th.Tensor]]:
    """
    What :func:`compile_ahead_of_time` has made. Torch documents how to load and call it; this is what the call ends in,
    as the call itself takes twice as long as a small network.

    :param path: of the file
    """
    package = th._inductor.aoti_load_package(str(path), run_single_threaded=True)
    run: Callable[[list[th.Tensor]], list[th.Tensor]] = package.loader.run
    return run


def compiler_cache_folder() -> Path:
    """
    Where torch keeps what it has compiled: ``TORCHINDUCTOR_CACHE_DIR`` or a default, which only a private function
    tells.
    """
    return Path(th._inductor.runtime.cache_dir_utils.cache_dir())


def default_store() -> Any:
    """
    What the processes of the default group of ``torch.distributed`` met by: one of them writes a value, and the others
    read it whenever they want, without waiting for each other. The group does not give it away, and a store of our own
    would need a port of its own.
    """
    from torch.distributed.distributed_c10d import _get_default_store

    return _get_default_store()


def set_patience(patience: timedelta) -> None:
    """
    How long the processes of the default group of ``torch.distributed`` wait for each other from now on. What the group
    is made with says it for that too, and there it must not be long. A second group (``new_group``) would take the
    place of this, with connections of its own.

    :param patience: in place of what the group was made with
    """
    from torch.distributed.distributed_c10d import _set_pg_timeout

    _set_pg_timeout(patience)
