"""
What ``torch_compile=True`` compiles: the actor, the evaluation of a rollout, and a gradient step (gradients, clipping
of their norm and Adam, over flat parameters), each as one program.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import os
import platform
import shutil
import sys
import tempfile
import time
import warnings
import zipfile
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from functools import partial
from operator import attrgetter
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, cast

import torch as th
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.type_aliases import PyTorchObs
from torch import fx, nn
from torch.func import functional_call
from torch.fx.experimental import _config as fx_config
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from sb3_ppo_ext.common.actor_critic import ActorCritic, DirectActorCritic, Evaluation, Kept, n_rows
from sb3_ppo_ext.common.buffers import RolloutSamples, obs_rows, take
from sb3_ppo_ext.common.flat_adam import FlatAdam, pieces
from sb3_ppo_ext.common.live import LiveView, has_changed, is_number, noted_by
from sb3_ppo_ext.common.optimization import Coefficients, Statistics, reached
from sb3_ppo_ext.common.purity import has_hooks, impurity
from sb3_ppo_ext.numerics import FisherVectorProduct

_REFUSED = "torch_compile=True is not allowed"

Compiled = TypeVar("Compiled")

Run = Callable[[list[th.Tensor]], list[th.Tensor]]
"""A compiled program: flat tensors in, flat tensors out; it may write into what it is given."""


def check_can_compile(actor_critic: ActorCritic, optimizer: th.optim.Optimizer) -> None:
    """
    :param actor_critic: the policy that is to be updated
    :param optimizer: of its parameters
    :raises ValueError: if ``torch_compile=True`` cannot be had of these, saying what to change
    """
    policy = actor_critic.policy
    if not isinstance(actor_critic, DirectActorCritic):
        raise ValueError(
            f"{_REFUSED} with policy={type(policy).__name__}: it {DirectActorCritic.refusal(policy)}; use one of "
            "Stable-Baselines3's policies as it is, or torch_compile=False"
        )
    if any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in policy.modules()):
        raise ValueError(
            f"{_REFUSED} with batch normalisation, whose running statistics a compiled step cannot change; use "
            "nn.LayerNorm or nn.GroupNorm, or torch_compile=False"
        )
    if not actor_critic.is_pure:
        raise ValueError(
            f"{_REFUSED} with policy={type(policy).__name__}: {impurity(policy)}, and a program would do once what it "
            "does at each call. If the module is pure, say so by its attribute is_pure = True; otherwise "
            "torch_compile=False"
        )
    if any(p._backward_hooks or p._post_accumulate_grad_hooks for p in policy.parameters()):
        raise ValueError(
            f"{_REFUSED} with hooks on the gradients of parameters, which a program would not run: remove them, or use "
            "torch_compile=False"
        )
    in_groups = [id(p) for group in optimizer.param_groups for p in group["params"]]
    if len(in_groups) != len(set(in_groups)) or not {id(p) for p in policy.parameters()} <= set(in_groups):
        raise ValueError(
            f"{_REFUSED} with an optimiser that has a parameter of the policy twice or not at all: make it of "
            "policy.parameters() anew, or use torch_compile=False"
        )
    plain = type(optimizer) is th.optim.Adam and all(
        not (group["amsgrad"] or group["maximize"] or group["weight_decay"])
        and group["betas"] == optimizer.param_groups[0]["betas"]
        and group["eps"] == optimizer.param_groups[0]["eps"]
        for group in optimizer.param_groups
    )
    if not plain:
        raise ValueError(
            f"{_REFUSED} with optimizer_class={type(optimizer).__name__} as it is set: it must be torch.optim.Adam "
            "without amsgrad, maximize and weight_decay, with the same betas and eps for all parameters"
        )


def check_compiler(device: th.device) -> None:
    """
    :param device: of the policy
    :raises ValueError: if nothing can be compiled for it here, saying what to change
    """
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"{_REFUSED} on device={str(device)!r}: use cpu or cuda, or torch_compile=False")
    if device.type == "cuda":
        if importlib.util.find_spec("triton") is None:
            raise ValueError(f"{_REFUSED} without Triton, which compiles for the GPU: pip install triton")
        return
    compiler = os.environ.get("CXX") or {"darwin": "clang++", "win32": "cl"}.get(sys.platform, "g++")
    if not shutil.which(compiler):
        raise ValueError(
            f"{_REFUSED} without a C++ compiler, {compiler!r} was not found: install it (Debian: apt install g++), or "
            "name another in the environment variable CXX"
        )
    folder = os.environ.get("TORCHINDUCTOR_CACHE_DIR") or tempfile.gettempdir()
    if " " in folder:
        raise ValueError(
            f"{_REFUSED} with a cache in {folder!r}: the compiler of torch cannot use a path with a space; set "
            "TORCHINDUCTOR_CACHE_DIR to one without"
        )
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"{_REFUSED} with a cache in {folder!r} ({error}); set TORCHINDUCTOR_CACHE_DIR") from error


def structure_of(policy: nn.Module) -> Hashable:
    """
    What a program of a policy depends on, besides the values of its tensors: its modules and their settings, and which
    tensors are parameters. What a module keeps in other ways (in a list, say) is not looked at.

    :param policy: whose program it is
    """
    modules = list(policy.modules())[1:]
    settings = tuple(
        (
            module,
            has_hooks(module),
            tuple((k, v) for k, v in vars(module).items() if type(v) in (bool, int, float, str)),
        )
        for module in modules
    )
    return policy, settings, tuple(map(id, policy.parameters()))


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
    ) -> None:
        self._function = function
        self._device = device
        self._decompositions = {} if exact_tanh or device.type != "cpu" else {th.ops.aten.tanh.default: _tanh}
        self._what = what
        self._any_size = any_size
        self._announce = announce
        self._is_recorded = _can_record(device) and not any_size
        self._runs: dict[Hashable, dict[Hashable, Run]] = {}  # by the form of what is bound, then of the rest
        self._places: dict[Hashable, list[th.Tensor]] = {}

    def bind(self, fixed: Any, batch: Any = ()) -> Any:
        """
        Set the first two arguments of the calls that follow.

        :param fixed: tensors whose shapes never change
        :param batch: tensors whose number of rows may
        :return: ``fixed``, as tensors that the calls write into
        """
        leaves, self._structure = tree_flatten((fixed, batch))
        self._n_fixed = len(tree_leaves(fixed))
        forms = tuple(self._form(leaf, i >= self._n_fixed) for i, leaf in enumerate(leaves))
        self._runs_of_bound = self._runs.setdefault(forms, {})
        if self._is_recorded:
            if forms not in self._places:
                self._places[forms] = [th.empty_like(leaf) for leaf in leaves]
            leaves = _copied(self._places[forms], leaves)
        self._bound = leaves
        return tree_unflatten(leaves, self._structure)[0]

    def unbind(self) -> None:
        """Let go of what was bound."""
        self._bound = []

    def __call__(self, *more: Any) -> list[th.Tensor]:
        """
        :param more: the other arguments of the function
        :return: what it gives
        """
        leaves = tree_leaves(more) if any(isinstance(argument, dict) for argument in more) else more
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
        bound = tree_unflatten(self._bound, self._structure)
        leaves, structure = tree_flatten((*bound, *more))
        varies = [self._any_size and i >= self._n_fixed and leaf.shape[0] > 1 for i, leaf in enumerate(leaves)]

        def flat(*leaves: th.Tensor) -> list[th.Tensor]:
            return list(self._function(*tree_unflatten(leaves, structure)))

        graph, constants = _traced(flat, leaves, self._decompositions, any_size=any(varies))
        if any(varies) and not _is_for_any_size(graph, varies):
            raise ValueError(
                f"{_REFUSED} with this policy and batches of any size: what it computes depends on the number of "
                "rows. Where that is len(x), x.shape[0] may do; otherwise torch_compile=False"
            )
        inputs, varies = [*leaves, *constants], [*varies, *(False for _ in constants)]
        is_kept = self._device.type == "cpu" and _place(graph, inputs, varies).exists()
        with _announced(self._what, (self._announce or _is_bar_shown()) and not is_kept):
            run = self._built(graph, inputs, varies)
            if constants:
                run = partial(_run_with, run, constants)
            if self._is_recorded:
                run = _Recording(run, leaves, self._n_fixed, len(self._bound))
            result = run(leaves)
        self._runs_of_bound[forms] = run
        return result

    def _built(self, graph: fx.GraphModule, inputs: list[th.Tensor], varies: list[bool]) -> Run:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about torch's own code
            if self._device.type == "cpu":
                return _machine_code(graph, inputs, varies)
            compiled = th.compile(graph, fullgraph=True, dynamic=any(varies))
            return th.no_grad()(lambda inputs: compiled(*inputs))


def _run_with(run: Run, constants: list[th.Tensor], inputs: list[th.Tensor]) -> list[th.Tensor]:
    return run([*inputs, *constants])


class _Recording:
    """
    A CUDA graph of a program.

    :param run: the program
    :param inputs: to record it with
    :param n_fixed: how many of these, the first, it may write into
    :param n_bound: how many stay where they are; the others are copied at each call
    """

    def __init__(self, run: Run, inputs: list[th.Tensor], n_fixed: int, n_bound: int) -> None:
        self._run = run  # and with it what only the recording would not keep
        self._n_bound = n_bound
        self._places = [leaf.clone() for leaf in inputs[n_bound:]]
        inputs = [*inputs[:n_bound], *self._places]
        before = [leaf.clone() for leaf in inputs[:n_fixed]]
        try:
            self._outputs, self._replay = _recorded(run, inputs)
        finally:
            _copied(inputs[:n_fixed], before)  # the program was run, for its own sake

    def __call__(self, inputs: list[th.Tensor]) -> list[th.Tensor]:
        _copied(self._places, inputs[self._n_bound :])
        self._replay()
        return [output.clone() for output in self._outputs]


def _can_record(device: th.device) -> bool:
    return device.type == "cuda"


def _recorded(run: Run, inputs: list[th.Tensor]) -> tuple[list[th.Tensor], Callable[[], None]]:
    """
    Run a program some times, and record one.

    :param run: the program
    :param inputs: that it reads and writes, then and in each replay
    :return: what each replay writes its results into, and what replays it
    """
    with th.cuda.device(inputs[0].device):
        stream = th.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(th.cuda.current_stream())
        with th.cuda.stream(stream):  # what is set up at the first runs cannot be recorded
            for _ in range(3):
                run(inputs)
        th.cuda.current_stream().wait_stream(stream)
        graph = th.cuda.CUDAGraph()
        with th.cuda.graph(graph, capture_error_mode="thread_local"):
            outputs = run(inputs)
    return list(outputs), graph.replay


@th.no_grad()
def _copied(places: list[th.Tensor], tensors: Sequence[th.Tensor]) -> list[th.Tensor]:
    """The places, holding what the tensors hold."""
    for place, tensor in zip(places, tensors, strict=True):
        if place is not tensor:
            place.copy_(tensor)
    return places


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
            f"{_REFUSED} with this policy: what it computes must be operations of torch on its inputs, the same ones "
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


def _machine_code(graph: fx.GraphModule, inputs: list[th.Tensor], varies: list[bool]) -> Run:
    """
    Compile a graph for the CPU, or take it from what was compiled before.

    :param graph: its operations
    :param inputs: an example of them
    :param varies: those that may have any number of rows
    """
    path = _place(graph, inputs, varies)
    if _is_whole(path):
        return _loaded(path)
    any_rows = tuple({0: th.export.Dim.DYNAMIC} if v else None for v in varies)
    program = th.export.export(graph, tuple(inputs), dynamic_shapes=any_rows, strict=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        package = th._inductor.aoti_compile_and_package(program, package_path=str(Path(folder) / path.name))
        os.replace(package, path)
    return _loaded(path)


def _place(graph: fx.GraphModule, inputs: list[th.Tensor], varies: list[bool]) -> Path:
    """Where the machine code of a graph is kept."""
    return _cache_folder() / "sb3_ppo_ext" / f"{_fingerprint(graph, inputs, varies)}.pt2"


def _is_whole(path: Path) -> bool:
    try:
        with zipfile.ZipFile(path) as package:
            return package.testzip() is None
    except (OSError, zipfile.BadZipFile):
        return False


def _loaded(path: Path) -> Run:
    package = th._inductor.aoti_load_package(str(path), run_single_threaded=True)
    run: Run = package.loader.run  # calling the package itself takes twice as long as a small network
    return run


def _cache_folder() -> Path:
    """Where torch keeps what it has compiled."""
    return Path(th._inductor.runtime.cache_dir_utils.cache_dir())


def _fingerprint(graph: fx.GraphModule, inputs: list[th.Tensor], varies: list[bool]) -> str:
    """Of all that the machine code depends on."""
    forms = [
        (tensor.dtype, tensor.shape[1:] if v else tensor.shape, tensor.stride(), v)
        for tensor, v in zip(inputs, varies, strict=True)
    ]
    cpu = Path("/proc/cpuinfo")
    flags = (
        next((line for line in cpu.read_text().splitlines() if line.startswith(("flags", "Features"))), "")
        if cpu.exists()
        else ""
    )
    of_machine = (th.__version__, platform.platform(), platform.processor(), flags, th.get_num_threads())
    return hashlib.sha256(repr((graph.code, forms, of_machine)).encode()).hexdigest()


@contextlib.contextmanager
def _announced(what: str, announce: bool) -> Iterator[None]:
    """
    :param what: is compiled inside of the ``with`` block
    :param announce: whether to say so, and how long it took
    """
    if announce:
        _say(f"Compiling {what}, for this run and later ones; this may take up to a minute")
    start = time.perf_counter()
    yield
    if announce:
        _say(f"Compiled {what} in {time.perf_counter() - start:.1f} seconds")


def _is_bar_shown() -> bool:
    """Whether a progress bar stands still meanwhile, which needs to be explained whatever ``verbose`` is."""
    tqdm = sys.modules.get("tqdm")
    return tqdm is not None and len(getattr(tqdm.tqdm, "_instances", ())) > 0


def _say(text: str) -> None:
    """Print a line, above a progress bar if there is one."""
    if _is_bar_shown():
        sys.modules["tqdm"].tqdm.write(text)
    else:
        print(text, flush=True)


class _Swappable(nn.Module):
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


class _Owned(NamedTuple):
    """
    What a compiled step changes, in place; one of each for each flat tensor of a :class:`FlatAdam`.

    :param thetas: parameters
    :param gradients: of the last step, clipped
    :param exp_avgs: Adam's first moments
    :param exp_avg_sqs: Adam's second moments
    :param clocks: the number of steps t, beta1^t and beta2^t (a product a step is cheaper than a power). One tensor, as
        the compiler of torch 2.13 loses what is written into a scalar on the CPU
    :param learning_rates: one element each
    """

    thetas: list[th.Tensor]
    gradients: list[th.Tensor]
    exp_avgs: list[th.Tensor]
    exp_avg_sqs: list[th.Tensor]
    clocks: list[th.Tensor]
    learning_rates: list[th.Tensor]


LossOfPolicy = Callable[..., tuple[th.Tensor, Statistics]]
"""The loss of a minibatch, called with the policy, the minibatch and coefficients; or a method of that kind."""


class CompiledStep:
    """
    A gradient step of Adam on a minibatch loss, as one program.

    Inside of ``with``, parameters and moments are those of a :class:`FlatAdam`; what may change from update to update
    (learning rates, coefficients, numbers of the algorithm) enters as tensors, so that no new value is a new program.

    :param actor_critic: the policy that the loss is of
    :param optimizer: Adam, as :func:`check_can_compile` wants it; its state is read and written
    :param parameters: candidates for what is updated; it is those that the loss depends on
    :param loss: to be minimised; if it is a method, what it reads of its object is seen by a :class:`LiveView`
    :param any_size: whether one program is to serve rollouts and minibatches of any size; it is a little slower
    :param announce: whether to tell who is waiting that it is being compiled, and how long it took
    """

    def __init__(
        self,
        actor_critic: DirectActorCritic,
        optimizer: th.optim.Optimizer,
        parameters: Sequence[nn.Parameter],
        loss: LossOfPolicy,
        *,
        any_size: bool,
        announce: bool,
    ) -> None:
        assert isinstance(optimizer, th.optim.Adam)
        self._actor_critic = actor_critic
        self._optimizer = optimizer
        self._candidates = list(parameters)
        self._owner = getattr(loss, "__self__", None)
        self._loss: LossOfPolicy = getattr(loss, "__func__", loss)
        self._any_size = any_size
        self._announce = announce
        self._module = _Swappable(actor_critic.policy, self._compute_loss)
        self._betas = optimizer.param_groups[0]["betas"]
        self._eps = optimizer.param_groups[0]["eps"]
        self._device = self._candidates[0].device
        self._flat: FlatAdam | None = None
        self._may_have_live_numbers = True
        self._forget_program()
        self.names: tuple[str, ...] = ()

    def _forget_program(self) -> None:
        self._program: Program | None = None
        self._live_numbers: tuple[str, ...] = ()
        self._noted: dict[str, Any] = {}

    def _compute_loss(
        self, rollout_data: RolloutSamples, coefficients: Coefficients, numbers: Mapping[str, th.Tensor]
    ) -> tuple[th.Tensor, Statistics]:
        """The loss, the owner's numbers being tensors; what else it reads of its owner is noted."""
        if self._owner is None:
            return self._loss(self._actor_critic, rollout_data, coefficients)
        self._view = LiveView(self._owner, numbers)
        return self._loss(self._view, self._actor_critic, rollout_data, coefficients)

    def __enter__(self) -> object:
        if self._owner is not None and has_changed(self._owner, self._noted):
            self._forget_program()
        self._bound_to: tuple[object, object] = None, None
        return self

    def __exit__(self, *exception: object) -> None:
        """Put parameters and moments back into the policy and its optimiser."""
        if self._flat is None:
            return
        _copied(tree_leaves(self._taken), tree_leaves(self._fixed))
        for flat, clock in zip(self._flat.parameters, self._taken[0].clocks, strict=True):
            self._flat.adam.state[flat]["step"].copy_(clock[0])
        self._flat.restore()
        if self._program is not None:
            self._program.unbind()
        self._flat = None
        del self._taken, self._fixed, self._bound_to

    def _prepare(self, rollout_data: RolloutSamples, coefficients: Mapping[str, float]) -> None:
        """
        Compute the loss once as it is, to learn which parameters it depends on and which attributes it reads.

        :param rollout_data: a minibatch
        :param coefficients: of the loss
        """
        as_tensors = {name: th.tensor(value, device=self._device) for name, value in coefficients.items()}
        buffers = list(self._actor_critic.policy.buffers())
        before = [buffer.clone() for buffer in buffers]
        with th.random.fork_rng(devices=[self._device] if self._device.type == "cuda" else []):
            try:
                loss, _ = self._compute_loss(rollout_data, as_tensors, {})
            except ValueError as error:
                raise ValueError(f"{_REFUSED}: {error}; or torch_compile=False") from error
            finally:
                _copied(buffers, before)
        self._updated = reached(loss, self._candidates)
        noted = {} if self._owner is None else noted_by(self._view)
        is_live = {name: self._may_have_live_numbers and is_number(value) for name, value in noted.items()}
        self._live_numbers = tuple(name for name in noted if is_live[name])
        self._noted = {name: value for name, value in noted.items() if not is_live[name]}
        self._program = Program(
            self._step,
            self._device,
            what="the gradient step",
            any_size=self._any_size,
            announce=self._announce,
            exact_tanh=_has_tanh_of_actions(self._actor_critic.policy),
        )

    def _take(self) -> None:
        """Take parameters, moments and learning rates from the policy and its optimiser."""
        self._flat = FlatAdam(self._optimizer, self._updated)
        beta1, beta2 = self._betas
        states = [self._flat.adam.state[p] for p in self._flat.parameters]
        owned = _Owned(
            thetas=[p.data for p in self._flat.parameters],
            gradients=[cast(th.Tensor, p.grad) for p in self._flat.parameters],
            exp_avgs=[state["exp_avg"] for state in states],
            exp_avg_sqs=[state["exp_avg_sq"] for state in states],
            clocks=[
                th.tensor([count, beta1**count, beta2**count], dtype=th.float64, device=self._device)
                for count in self._flat.steps
            ],
            learning_rates=[th.tensor([group["lr"]], device=self._device) for group in self._flat.adam.param_groups],
        )
        others = {name: t for name, t in self._module.tensors().items() if t not in self._flat}
        self._taken = self._fixed = owned, others

    def __call__(self, rollout: RolloutSamples, rows: th.Tensor | None, coefficients: Mapping[str, float]) -> th.Tensor:
        try:
            return self._call(rollout, rows, coefficients)
        except ValueError:
            if not self._live_numbers:
                raise
        # It may be that a number decides what is computed: a program is then for one value of it.
        self._may_have_live_numbers = False
        self._forget_program()
        self._bound_to = None, None
        return self._call(rollout, rows, coefficients)

    def _call(self, rollout: RolloutSamples, rows: th.Tensor | None, coefficients: Mapping[str, float]) -> th.Tensor:
        if self._program is None:
            self._prepare(rollout if rows is None else take(rollout, rows), coefficients)
        assert self._program is not None
        if self._flat is None:
            self._take()
        if self._bound_to[0] is not rollout or self._bound_to[1] is not coefficients:
            self._bound_to = rollout, coefficients
            self._coefficients = tuple(coefficients)
            values = [*coefficients.values(), *(float(getattr(self._owner, name)) for name in self._live_numbers)]
            numbers = th.tensor(values, dtype=th.float32)
            if self._device.type == "cuda":  # from where the host need not wait for it
                numbers = numbers.pin_memory()
            numbers = numbers.to(self._device, non_blocking=True)
            *self._fixed, _ = self._program.bind((*self._fixed, numbers), rollout)
        (statistics,) = self._program() if rows is None else self._program(rows)
        return statistics

    def _step(
        self,
        fixed: tuple[_Owned, dict[str, th.Tensor], th.Tensor],
        rollout: RolloutSamples,
        rows: th.Tensor | None = None,
    ) -> list[th.Tensor]:
        owned, others, numbers = fixed
        assert self._flat is not None
        named_numbers = dict(zip((*self._coefficients, *self._live_numbers), numbers.unbind(), strict=True))
        coefficients = {name: named_numbers[name] for name in self._coefficients}
        live_numbers = {name: named_numbers[name] for name in self._live_numbers}
        rollout_data = rollout if rows is None else take(rollout, rows)
        with th.enable_grad():
            thetas = [theta.detach().requires_grad_() for theta in owned.thetas]
            piece_of = {
                id(p): piece
                for theta, members in zip(thetas, self._flat.members, strict=True)
                for p, piece in zip(members, pieces(theta, [p.shape for p in members]), strict=True)
            }
            named = self._module.tensors().items()
            updated = {name: piece_of[id(tensor)] for name, tensor in named if id(tensor) in piece_of}
            loss, statistics = self._module.call({**updated, **others}, rollout_data, coefficients, live_numbers)
            gradients = th.autograd.grad(loss, thetas)
        norm = th.linalg.vector_norm(gradients[0] if len(gradients) == 1 else th.cat(gradients))
        statistics["grad_norm"] = norm
        takes_step = norm.isfinite()
        if "kl_limit" in coefficients:
            takes_step = takes_step & (statistics["approx_kl"] <= coefficients["kl_limit"])
        scale = (coefficients["max_grad_norm"] / (norm + 1e-6)).clamp(max=1.0)

        # Adam, as torch.optim.Adam computes it
        beta1, beta2 = self._betas
        for theta, gradient, last_gradient, exp_avg, exp_avg_sq, clock, learning_rate in zip(
            owned.thetas,
            gradients,
            owned.gradients,
            owned.exp_avgs,
            owned.exp_avg_sqs,
            owned.clocks,
            owned.learning_rates,
            strict=True,
        ):
            new_clock = th.stack((clock[0] + 1, clock[1] * beta1, clock[2] * beta2))
            correction1 = (1 - new_clock[1]).reciprocal().float()
            correction2 = (1 - new_clock[2]).rsqrt().float()
            scaled = gradient * scale
            new_exp_avg = exp_avg.lerp(scaled, 1 - beta1)
            new_exp_avg_sq = exp_avg_sq * beta2 + scaled * scaled * (1 - beta2)
            denominator = new_exp_avg_sq.sqrt() * correction2 + self._eps
            new_theta = theta - learning_rate * correction1 * new_exp_avg / denominator
            last_gradient.copy_(th.where(takes_step, scaled, last_gradient))
            theta.copy_(th.where(takes_step, new_theta, theta))
            exp_avg.copy_(th.where(takes_step, new_exp_avg, exp_avg))
            exp_avg_sq.copy_(th.where(takes_step, new_exp_avg_sq, exp_avg_sq))
            clock.copy_(th.where(takes_step, new_clock, clock))
        self.names = tuple(statistics)
        return [th.stack(list(statistics.values()))]  # to make and to keep one of each takes longer


def _has_tanh_of_actions(policy: nn.Module) -> bool:
    # The Jacobian of a squashed action is 1 - tanh^2 + 1e-6: the last digits count.
    return bool(getattr(policy, "squash_output", False))


class _OfRollouts:
    """A method of a :class:`DirectActorCritic` as a program of the policy's tensors."""

    def __init__(
        self, policy: ActorCriticPolicy, method: Callable[..., Any], *, what: str, any_size: bool, announce: bool
    ) -> None:
        self._module = _Swappable(policy, method)
        self._program = Program(
            self._results,
            policy.device,
            what=what,
            any_size=any_size,
            announce=announce,
            exact_tanh=_has_tanh_of_actions(policy),
        )

    def bind(self) -> None:
        """Take the parameters from the policy."""
        self._program.bind(self._module.tensors())

    def _results(self, tensors: dict[str, th.Tensor], batch: Any, obs: PyTorchObs, other: th.Tensor) -> list[th.Tensor]:
        raise NotImplementedError


class CompiledActor(_OfRollouts):
    """
    ``act`` as one program.

    :param actor_critic: the policy
    :param announce: whether to tell who is waiting that it is being compiled, and how long it took
    """

    def __init__(self, actor_critic: DirectActorCritic, *, announce: bool) -> None:
        super().__init__(actor_critic.policy, actor_critic.act_by, what="the actor", any_size=False, announce=announce)
        self._noise = actor_critic.noise

    def act(self, obs: PyTorchObs) -> tuple[th.Tensor, Kept | None]:
        action, *kept = self._program(obs, self._noise(n_rows(obs)))
        return action, Kept(kept[0], None, kept[1]) if kept else None

    def _results(self, tensors: dict[str, th.Tensor], batch: Any, obs: PyTorchObs, noise: th.Tensor) -> list[th.Tensor]:
        action, kept = self._module.call(tensors, obs, noise)
        return [action] if kept is None else [action, kept.values, kept.params]


class CompiledEvaluation(_OfRollouts):
    """
    ``evaluate_actions`` without gradients and entropy, as one program.

    :param actor_critic: the policy
    :param any_size: whether one program is to serve batches of any size
    :param announce: whether to tell who is waiting that it is being compiled, and how long it took
    """

    def __init__(self, actor_critic: DirectActorCritic, *, any_size: bool, announce: bool) -> None:
        super().__init__(
            actor_critic.policy,
            actor_critic.evaluate_actions,
            what="the evaluation of rollouts",
            any_size=any_size,
            announce=announce,
        )

    def __call__(self, obs: PyTorchObs, actions: th.Tensor) -> Evaluation:
        values, log_prob, params = self._program(obs, actions)
        return Evaluation(values, log_prob, None, params)

    def _results(
        self, tensors: dict[str, th.Tensor], batch: Any, obs: PyTorchObs, actions: th.Tensor
    ) -> list[th.Tensor]:
        evaluation = self._module.call(tensors, obs, actions)
        return [evaluation.values, evaluation.log_prob, evaluation.params]


class CompiledFisherVectorProduct:
    """
    :class:`~sb3_ppo_ext.numerics.FisherVectorProduct` of the actor as one program. It builds the graph in each product
    anew, which takes less time than the products of a graph that is kept.

    :param actor_critic: the policy
    :param parameters: theta, among the policy's
    :param announce: whether to tell who is waiting that it is being compiled, and how long it took
    """

    def __init__(self, actor_critic: DirectActorCritic, parameters: Sequence[nn.Parameter], *, announce: bool) -> None:
        self._module = _Swappable(actor_critic.policy, actor_critic.params)
        self._metric = actor_critic.family.fisher
        self._parameters = list(parameters)
        self._program = Program(
            self._product, actor_critic.policy.device, what="the Fisher product", any_size=False, announce=announce
        )

    def of(
        self, observations: PyTorchObs, chunks: Sequence[slice], *, damping: float
    ) -> Callable[[th.Tensor], th.Tensor]:
        """
        By the present parameters.

        :param observations: whose distributions it is the Fisher information of
        :param chunks: ranges of them, to be multiplied one after the other
        :param damping: multiple of the identity that is added
        :return: ``v -> F v + damping * v``, v of shape ``(n,)``
        """
        parts = [((rows.stop - rows.start) / chunks[-1].stop, obs_rows(observations, rows)) for rows in chunks]
        tensors = self._module.tensors()
        if len(parts) == 1:
            self._program.bind(tensors, parts[0][1])

        def product(v: th.Tensor) -> th.Tensor:
            result = damping * v
            for share, obs in parts:
                if len(parts) > 1:
                    self._program.bind(tensors, obs)
                result.add_(self._program(v)[0], alpha=share)
            return result

        return product

    def _product(self, tensors: dict[str, th.Tensor], obs: PyTorchObs, v: th.Tensor) -> list[th.Tensor]:
        theta = set(map(id, self._parameters))
        with th.enable_grad():
            named = self._module.tensors()
            leaf_of = {
                id(named[name]): tensor.detach().requires_grad_() if id(named[name]) in theta else tensor
                for name, tensor in tensors.items()
            }
            outputs = self._module.call({name: leaf_of[id(tensor)] for name, tensor in named.items()}, obs)
            leaves = [leaf_of[id(p)] for p in self._parameters]
            return [FisherVectorProduct(outputs, leaves, self._metric)(v)]
