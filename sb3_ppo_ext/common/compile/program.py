"""A function of tensors as one program."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable, Mapping, Sequence
from functools import partial
from operator import attrgetter
from typing import Any, TypeVar

import torch as th
from torch import fx, nn
from torch.func import functional_call

from sb3_ppo_ext.common.compile import Run, cpu
from sb3_ppo_ext.common.compile.announce import announced, is_bar_shown
from sb3_ppo_ext.common.compile.cuda import Recording, can_record, copied
from sb3_ppo_ext.common.compile.products import cpu_products
from sb3_ppo_ext.common.compile.support import REFUSED
from sb3_ppo_ext.common.compile.trees import tensors_in, with_tensors
from sb3_ppo_ext.common.torch_internals import traced

Compiled = TypeVar("Compiled")

# Operations that ``torch.tensor(...)`` in a traced function becomes. Such a constant may be kept on any device.
_MAKES_A_CONSTANT = (th.ops.aten.lift_fresh.default, th.ops.aten.lift_fresh_copy.default)


class ProgramCache:
    """The compiled programs of a model, by name. A copy of the model starts with an empty cache."""

    def __init__(self) -> None:
        self._kept: dict[str, tuple[Hashable, Any]] = {}

    def get_or_make(self, name: str, key: Hashable, make: Callable[[], Compiled]) -> Compiled:
        """
        :param name: name of the program
        :param key: everything that it depends on, besides the values of tensors
        :param make: creates the program
        :return: the cached program, if its key is the same; otherwise a new one, which replaces it
        """
        if name not in self._kept or self._kept[name][0] != key:
            self._kept[name] = key, make()
        compiled: Compiled = self._kept[name][1]
        return compiled

    def __reduce__(self) -> tuple[type[ProgramCache], tuple[()]]:
        return ProgramCache, ()


class Program:
    """
    A function of tensors, compiled for the shapes that it is called with.

    On the CPU it becomes machine code that runs without Python (AOTInductor), and is cached for later runs in a
    sub-folder of torch's own cache. On CUDA it is recorded as a CUDA graph, which always reads and writes the same
    memory: bound tensors are copied there once, and :meth:`bind` returns these copies.

    :param function: a function of ``(fixed, batch, *more)``, each a tuple, dict or list of tensors, or None; it returns
        a sequence of tensors, and may write into ``fixed``
    :param device: device of all tensors
    :param what: name of the function for messages
    :param announce: whether to print that it is being compiled, and how long this took; with a progress bar, this is
        always printed
    :param exact_tanh: whether ``tanh`` must be as accurate as torch's, which takes three times as long: the Jacobian of
        a squashed action is 1 - tanh^2 + 1e-6, where the last digits count
    :param may_be_recorded: whether it may become a CUDA graph, which has its own copies of the bound tensors
    """

    def __init__(
        self,
        function: Callable[..., Sequence[th.Tensor]],
        device: th.device,
        *,
        what: str,
        announce: bool,
        exact_tanh: bool = False,
        may_be_recorded: bool = True,
    ) -> None:
        self._function = function
        self._device = device
        self._decompositions = cpu_products() if device.type == "cpu" else {}
        if device.type == "cpu" and not exact_tanh:
            self._decompositions[th.ops.aten.tanh.default] = _tanh
        self._what = what
        self._announce = announce
        self._is_recorded = may_be_recorded and can_record(device)
        self._runs: dict[Hashable, dict[Hashable, Run]] = {}  # by the layouts of the bound tensors, then of the others
        self._places: dict[Hashable, list[th.Tensor]] = {}

    def bind(self, fixed: Any, batch: Any = None) -> Any:
        """
        Set the first two arguments of the calls that follow.

        :param fixed: tensors that the calls may write into
        :param batch: tensors that the calls only read
        :return: ``fixed``, with the tensors that the calls really write into
        """
        leaves = tensors_in((fixed, batch))
        self._n_fixed = len(tensors_in(fixed))
        layouts = _layouts(leaves)
        self._runs_of_bound = self._runs.setdefault(layouts, {})
        if self._is_recorded:
            if layouts not in self._places:
                self._places[layouts] = [th.empty_like(leaf) for leaf in leaves]
            leaves = copied(self._places[layouts], leaves)
        self._bound = leaves
        self._arguments = with_tensors((fixed, batch), iter(leaves))
        return self._arguments[0]

    def unbind(self) -> None:
        """Release the bound tensors."""
        self._bound = []
        self._arguments = ()

    def __call__(self, *more: Any) -> list[th.Tensor]:
        """
        :param more: the other arguments of the function
        :return: its result
        """
        leaves = tensors_in(more)
        layouts = _layouts(leaves)
        run = self._runs_of_bound.get(layouts)
        if run is None:
            return self._first_call(layouts, more)
        return run([*self._bound, *leaves])

    @th.no_grad()
    def _first_call(self, layouts: Hashable, more: tuple[Any, ...]) -> list[th.Tensor]:
        arguments = (*self._arguments, *more)
        leaves = tensors_in(arguments)

        def flat(*leaves: th.Tensor) -> list[th.Tensor]:
            return list(self._function(*with_tensors(arguments, iter(leaves))))

        graph, constants = _traced(flat, leaves, self._decompositions)
        inputs = [*leaves, *constants]
        is_kept = self._device.type == "cpu" and cpu.cache_path(graph, inputs).exists()
        is_announced = (self._announce or is_bar_shown()) and not is_kept
        with announced(self._what, is_announced), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about torch's own code, also in the first run, when th.compile compiles
            run = self._built(graph, inputs)
            if constants:
                run = partial(_run_with, run, constants)
            if self._is_recorded:
                run = Recording(run, leaves, self._n_fixed, len(self._bound))
            result = run(leaves)
        self._runs_of_bound[layouts] = run
        return result

    def _built(self, graph: fx.GraphModule, inputs: list[th.Tensor]) -> Run:
        if self._device.type == "cpu":
            return cpu.machine_code(graph, inputs)
        compiled = th.compile(graph, fullgraph=True, dynamic=False)
        return th.no_grad()(lambda inputs: compiled(*inputs))


def _layouts(tensors: Sequence[th.Tensor]) -> Hashable:
    """The properties of its inputs for which a program is compiled."""
    return tuple([(tensor.shape, tensor.stride(), tensor.dtype) for tensor in tensors])


def _run_with(run: Run, constants: list[th.Tensor], inputs: list[th.Tensor]) -> list[th.Tensor]:
    return run([*inputs, *constants])


def _traced(
    function: Callable[..., list[th.Tensor]],
    leaves: list[th.Tensor],
    decompositions: dict[Any, Callable[..., Any]],
) -> tuple[fx.GraphModule, list[th.Tensor]]:
    """
    Trace the operations of a function, including gradients.

    :return: the graph, and the tensors that the function reads but that are not its arguments. They are additional
        inputs of the graph, so that later changes of their values are seen
    :raises ValueError: if the function does more than operations on tensors
    """
    try:
        graph = traced(function, leaves, decompositions)
        return graph, _lifted(graph, leaves[0].device)
    except Exception as error:
        raise ValueError(
            f"{REFUSED} with this policy and loss: they must consist of torch operations on their inputs, and of the "
            "same operations for all values (no if that depends on a value, no .item() and no numpy); otherwise use "
            "torch_compile=False. "
            f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
        ) from error


def _tanh(x: th.Tensor) -> Any:
    if x.dtype != th.float32:
        return NotImplemented
    # In code of torch 2.13's compiler, a sigmoid takes a third of the time of tanh; the difference is at most 2e-7.
    return 2.0 * th.sigmoid(2.0 * x) - 1.0


def _lifted(graph: fx.GraphModule, device: th.device) -> list[th.Tensor]:
    """
    Turn the tensors that are attributes of a graph into inputs.

    :param graph: changed in place: the new inputs follow the others
    :param device: device of the other inputs
    :return: the tensors
    :raises TypeError: if a tensor is on another device: a recording would not see later changes of its values
    """
    lifted: dict[str, fx.Node] = {}
    last_input = graph.graph.find_nodes(op="placeholder")[-1]
    for node in graph.graph.find_nodes(op="get_attr"):
        name = str(node.target)
        kept_on = attrgetter(name)(graph).device
        if kept_on != device and any(user.target not in _MAKES_A_CONSTANT for user in node.users):
            raise TypeError(f"a tensor on the device {kept_on} is read; move it to {device} with the policy")
        if name not in lifted:
            with graph.graph.inserting_after(last_input):
                last_input = lifted[name] = graph.graph.placeholder(f"constant_{len(lifted)}")
        node.replace_all_uses_with(lifted[name])
        graph.graph.erase_node(node)
    graph.recompile()
    return [attrgetter(name)(graph).detach() for name in lifted]


class FunctionalModule(nn.Module):
    """
    A function of a policy as a module, so that ``functional_call`` can swap the policy's tensors.

    :param policy: the policy that has the tensors
    :param function: a function that reads them, and may write into them
    :param other: another module whose tensors the function reads or writes; None: no other
    """

    def __init__(self, policy: nn.Module, function: Callable[..., Any], other: nn.Module | None = None) -> None:
        super().__init__()
        self.policy = policy
        self.other = other
        self._function = function

    def forward(self, *args: Any) -> Any:
        before = self.tensors()
        result = self._function(*args)
        replaced = [name for name, tensor in self.tensors().items() if tensor is not before.get(name)]
        if replaced:
            raise TypeError(f"{replaced[0]} is replaced by another tensor; write into it instead")
        return result

    def tensors(self) -> dict[str, th.Tensor]:
        """
        Parameters and buffers by name. A tensor that two modules share has two names; a tensor of a module that occurs
        twice (a shared features extractor) has one.
        """
        return {
            f"{path}.{name}": tensor
            for path, module in self.named_modules()
            for name, tensor in (
                *module.named_parameters(recurse=False, remove_duplicate=False),
                *module.named_buffers(recurse=False, remove_duplicate=False),
            )
        }

    def call(self, tensors: Mapping[str, th.Tensor], *args: Any) -> Any:
        """Call the function with other tensors in place of the policy's."""
        return functional_call(self, dict(tensors), args, tie_weights=False)
