"""A function of tensors as one program."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable, Mapping, Sequence
from functools import partial
from operator import attrgetter
from typing import Any, NamedTuple, TypeVar, cast

import torch as th
from torch import fx, nn
from torch.func import functional_call
from torch.fx.experimental import _config as fx_config
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from sb3_ppo_ext.common.compile import cpu
from sb3_ppo_ext.common.compile.announce import announced, is_bar_shown
from sb3_ppo_ext.common.compile.cuda import Recording, can_record, copied
from sb3_ppo_ext.common.compile.run import Run
from sb3_ppo_ext.common.compile.support import REFUSED

Compiled = TypeVar("Compiled")


class Programs:
    """What a model has compiled, by name. A copy of the model has nothing of it."""

    def __init__(self) -> None:
        self._kept: dict[str, tuple[Hashable, Any]] = {}

    def get(self, name: str, form: Hashable, make: Callable[[], Compiled]) -> Compiled:
        """
        :param name: of something compiled
        :param form: what it depends on, besides the values of tensors
        :param make: makes it
        :return: what was made for this form before, or is made now
        """
        if name not in self._kept or self._kept[name][0] != form:
            self._kept[name] = form, make()
        compiled: Compiled = self._kept[name][1]
        return compiled

    def __reduce__(self) -> tuple[type[Programs], tuple[()]]:
        return Programs, ()


class Program:
    """
    A function of tensors, compiled for the shapes that it is called with.

    On the CPU it becomes machine code without any Python around it (AOTInductor), which is kept for later runs beside
    what torch itself keeps. On CUDA it is recorded as a CUDA graph, which reads and writes where it was recorded: what
    is bound is copied there once, and :meth:`bind` says where that is.

    :param function: of ``(fixed, batch, *more)``, tuples, dicts and lists of tensors; it gives a sequence of tensors,
        and may write into ``fixed``
    :param device: of all tensors
    :param what: it is, in words
    :param any_size: whether one program is to serve any number of rows, the first dimension of what is in ``batch``
        and ``more``; it is a little slower, and not recorded
    :param announce: whether to tell who is waiting that something is being compiled, and how long it took; who has a
        progress bar is told in any case
    :param exact_tanh: whether ``tanh`` must be as accurate as torch has it; it takes three times as long
    :param may_be_recorded: whether it may be a CUDA graph, which has its own copies of what is bound
    """

    def __init__(
        self,
        function: Callable[..., Sequence[th.Tensor]],
        device: th.device,
        *,
        what: str,
        any_size: bool,
        announce: bool,
        exact_tanh: bool = False,
        may_be_recorded: bool = True,
    ) -> None:
        self._function = function
        self._device = device
        self._decompositions = {} if exact_tanh or device.type != "cpu" else {th.ops.aten.tanh.default: _tanh}
        self._what = what
        self._any_size = any_size
        self._announce = announce
        self._is_recorded = may_be_recorded and can_record(device) and not any_size
        self._runs: dict[Hashable, dict[Hashable, Run]] = {}  # by the form of what is bound, then of the rest
        self._places: dict[Hashable, list[th.Tensor]] = {}

    def bind(self, fixed: Any, batch: Any = ()) -> Any:
        """
        Set the first two arguments of the calls that follow.

        :param fixed: tensors whose shapes never change
        :param batch: tensors whose number of rows may
        :return: ``fixed``, as tensors that the calls write into
        """
        leaves, self._structure = flatten((fixed, batch))
        self._n_fixed = len(flatten(fixed)[0])
        forms = tuple(self._form(leaf, i >= self._n_fixed) for i, leaf in enumerate(leaves))
        self._runs_of_bound = self._runs.setdefault(forms, {})
        if self._is_recorded:
            if forms not in self._places:
                self._places[forms] = [th.empty_like(leaf) for leaf in leaves]
            leaves = copied(self._places[forms], leaves)
        self._bound = leaves
        return unflatten(leaves, self._structure)[0]

    def unbind(self) -> None:
        """Let go of what was bound."""
        self._bound = []

    def __call__(self, *more: Any) -> list[th.Tensor]:
        """
        :param more: the other arguments of the function
        :return: what it gives
        """
        leaves = more if all(isinstance(argument, th.Tensor) for argument in more) else flatten(more)[0]
        forms = tuple([self._form(leaf, True) for leaf in leaves])
        run = self._runs_of_bound.get(forms)
        if run is None:
            return self._first_call(forms, more)
        return run([*self._bound, *leaves])

    def _form(self, tensor: th.Tensor, is_batch: bool) -> Hashable:
        """What a program depends on; where it is for any number of rows: 0, 1 or many, as torch tells them apart."""
        shape = tensor.shape
        if is_batch and self._any_size:
            return (min(shape[0], 2), *shape[1:]), tensor.stride(), tensor.dtype
        return shape, tensor.stride(), tensor.dtype

    @th.no_grad()
    def _first_call(self, forms: Hashable, more: tuple[Any, ...]) -> list[th.Tensor]:
        bound = unflatten(self._bound, self._structure)
        leaves, structure = flatten((*bound, *more))
        varies = [self._any_size and i >= self._n_fixed and leaf.shape[0] > 1 for i, leaf in enumerate(leaves)]

        def flat(*leaves: th.Tensor) -> list[th.Tensor]:
            return list(self._function(*unflatten(leaves, structure)))

        graph, constants = _traced(flat, leaves, self._decompositions, any_size=any(varies))
        if any(varies) and not _is_for_any_size(graph, varies):
            raise ValueError(
                f"{REFUSED} with this policy and batches of any size: what it computes depends on the number of "
                "rows. Where that is len(x), x.shape[0] may do; otherwise torch_compile=False"
            )
        inputs, varies = [*leaves, *constants], [*varies, *(False for _ in constants)]
        is_kept = self._device.type == "cpu" and cpu.place_of(graph, inputs, varies).exists()
        with announced(self._what, (self._announce or is_bar_shown()) and not is_kept):
            run = self._built(graph, inputs, varies)
            if constants:
                run = partial(_run_with, run, constants)
            if self._is_recorded:
                run = Recording(run, leaves, self._n_fixed, len(self._bound))
            result = run(leaves)
        self._runs_of_bound[forms] = run
        return result

    def _built(self, graph: fx.GraphModule, inputs: list[th.Tensor], varies: list[bool]) -> Run:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about torch's own code
            if self._device.type == "cpu":
                return cpu.machine_code(graph, inputs, varies)
            compiled = th.compile(graph, fullgraph=True, dynamic=any(varies))
            return th.no_grad()(lambda inputs: compiled(*inputs))


class Structure(NamedTuple):
    """How tensors are put together; what is None there stands for nothing."""

    tree: TreeSpec
    is_present: list[bool]


def flatten(tree: Any) -> tuple[list[th.Tensor], Structure]:
    """
    The tensors in nested tuples, lists and dicts, without the places that are None.

    :param tree: the nest
    :return: the tensors, and how to put them together again
    """
    leaves, spec = tree_flatten(tree)
    is_present = [leaf is not None for leaf in leaves]
    return [leaf for leaf in leaves if leaf is not None], Structure(spec, is_present)


def unflatten(tensors: Sequence[th.Tensor], structure: Structure) -> Any:
    """
    The inverse of :func:`flatten`.

    :param tensors: the tensors
    :param structure: how to put them together
    """
    rest = iter(tensors)
    return tree_unflatten([next(rest) if present else None for present in structure.is_present], structure.tree)


def _run_with(run: Run, constants: list[th.Tensor], inputs: list[th.Tensor]) -> list[th.Tensor]:
    return run([*inputs, *constants])


def _traced(
    function: Callable[..., list[th.Tensor]],
    leaves: list[th.Tensor],
    decompositions: dict[Any, Callable[..., Any]],
    *,
    any_size: bool,
) -> tuple[fx.GraphModule, list[th.Tensor]]:
    """
    The operations that a function does, gradients among them.

    :return: a graph of them, and the tensors that the function has found elsewhere than in its arguments: further
        inputs of the graph, so that what is written into them later is seen
    :raises ValueError: if it does other things than operations on tensors
    """
    try:
        with fx_config.patch(use_duck_shape=False), warnings.catch_warnings():  # type: ignore[attr-defined]
            warnings.simplefilter("ignore")  # about torch's own code
            graph = make_fx(
                function,
                decomposition_table=decompositions,
                tracing_mode="symbolic" if any_size else "fake",
                _allow_non_fake_inputs=True,
            )(*leaves)
            return graph, _lifted(graph)
    except Exception as error:
        raise ValueError(
            f"{REFUSED} with this policy: what it computes must be operations of torch on its inputs, the same ones "
            "for all values of these (no if, no .item() and no numpy on the way); otherwise torch_compile=False. "
            f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
        ) from error


def _tanh(x: th.Tensor) -> Any:
    if x.dtype != th.float32:
        return NotImplemented
    # As the compiler of torch 2.13 writes it, a sigmoid takes a third of the time; the difference is at most 2e-7.
    return 2.0 * th.sigmoid(2.0 * x) - 1.0


def _lifted(graph: fx.GraphModule) -> list[th.Tensor]:
    """
    Make inputs of the tensors that a graph has as attributes.

    :param graph: changed in place: they follow its other inputs
    :return: the tensors
    """
    lifted: dict[str, fx.Node] = {}
    last_input = graph.graph.find_nodes(op="placeholder")[-1]
    for node in graph.graph.find_nodes(op="get_attr"):
        name = str(node.target)
        if name not in lifted:
            with graph.graph.inserting_after(last_input):
                last_input = lifted[name] = graph.graph.placeholder(f"constant_{len(lifted)}")
        node.replace_all_uses_with(lifted[name])
        graph.graph.erase_node(node)
    graph.recompile()
    return [attrgetter(name)(graph).detach() for name in lifted]


def _is_for_any_size(graph: fx.GraphModule, varies: list[bool]) -> bool:
    """
    Whether a graph that was traced with some number of rows is the same for others.

    :param graph: traced with symbols for sizes
    :param varies: which of its inputs have any number of rows
    """
    sizes = cast(ShapeEnv, graph.shape_env)
    inputs = graph.graph.find_nodes(op="placeholder")
    rows = [node.meta["val"].shape[0] for node, v in zip(inputs, varies, strict=False) if v]
    if not all(isinstance(n, th.SymInt) for n in rows):
        return False
    symbols = {sizes.replace(n.node.expr) for n in rows}
    conditions = [sizes.replace(guard.expr) for guard in sizes.guards]
    return all(
        str(condition.subs(dict.fromkeys(symbols, n))) == "True"
        for n in (2, 3, 5, 64, 1000, 4097, 10**6)
        for condition in conditions
        if condition.free_symbols & symbols
    ) and all(symbol.is_symbol for symbol in symbols)


class Swappable(nn.Module):
    """A function of a policy as a module, so that ``functional_call`` can swap the policy's tensors."""

    def __init__(self, policy: nn.Module, function: Callable[..., Any]) -> None:
        super().__init__()
        self.policy = policy
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
        Parameters and buffers. A tensor that two modules share has a name for each; one that is found twice because
        its module is (a shared extractor), one name.
        """
        return {
            f"{path}.{name}": tensor
            for path, module in self.named_modules()
            for name, tensor in (*module._parameters.items(), *module._buffers.items())
            if tensor is not None
        }

    def call(self, tensors: Mapping[str, th.Tensor], *args: Any) -> Any:
        """The function, by other tensors than the policy's."""
        return functional_call(self, dict(tensors), args, tie_weights=False)
