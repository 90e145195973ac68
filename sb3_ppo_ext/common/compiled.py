"""
What ``torch_compile=True`` compiles: a gradient step (gradients, clipping of their norm and Adam, over flat parameters)
and the evaluation of a rollout, each as one graph.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import tempfile
import time
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch as th
from stable_baselines3.common.type_aliases import PyTorchObs
from torch import nn
from torch.func import functional_call, grad
from torch.utils._pytree import tree_leaves

from sb3_ppo_ext.common.actor_critic import DirectActorCritic, Evaluation
from sb3_ppo_ext.common.buffers import RolloutSamples, take
from sb3_ppo_ext.common.flat_adam import FlatAdam, pieces, steps_made
from sb3_ppo_ext.common.optimization import Coefficients, MinibatchLoss, Statistics

_SERIAL = itertools.count()


def check_can_compile(policy: nn.Module, optimizer: th.optim.Optimizer) -> None:
    """
    :param policy: to be updated
    :param optimizer: of its parameters
    :raises ValueError: if ``torch_compile=True`` cannot be had, saying what to change
    """
    refused = "torch_compile=True is not allowed"
    if not DirectActorCritic.understands(policy):  # type: ignore[arg-type]
        raise ValueError(
            f"{refused} with policy={type(policy).__name__}: it overrides methods of Stable-Baselines3's "
            "ActorCriticPolicy; use one that overrides none, or torch_compile=False"
        )
    if any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in policy.modules()):
        raise ValueError(
            f"{refused} with batch normalisation, whose running statistics a compiled step cannot change; use "
            "nn.LayerNorm or nn.GroupNorm, or torch_compile=False"
        )
    plain = type(optimizer) is th.optim.Adam and all(
        not (group["amsgrad"] or group["maximize"] or group["weight_decay"])
        and group["betas"] == optimizer.param_groups[0]["betas"]
        and group["eps"] == optimizer.param_groups[0]["eps"]
        for group in optimizer.param_groups
    )
    if not plain:
        raise ValueError(
            f"{refused} with optimizer_class={type(optimizer).__name__} as it is set: it must be torch.optim.Adam "
            "without amsgrad, maximize and weight_decay, with the same betas and eps for all parameters"
        )
    on_cpu = all(parameter.device.type == "cpu" for parameter in policy.parameters())
    if on_cpu and not any(shutil.which(name) for name in ("g++", "clang++", "c++", "cl")):
        raise ValueError(f"{refused} without a C++ compiler: install g++ (Debian: apt install g++), or clang")
    folder = os.environ.get("TORCHINDUCTOR_CACHE_DIR") or tempfile.gettempdir()
    if on_cpu and " " in folder:
        raise ValueError(
            f"{refused} with a cache in {folder!r}: the compiler of torch cannot use a path with a space; set "
            "TORCHINDUCTOR_CACHE_DIR to one without"
        )


class _Owned(NamedTuple):
    """
    What a compiled step changes, by parameter groups, in place.

    :param thetas: parameters, flat
    :param exp_avgs: Adam's first moments, flat
    :param exp_avg_sqs: Adam's second moments, flat
    :param clock: the number of steps t, beta1^t and beta2^t (a product a step is cheaper than a power). One tensor, as
        the compiler of torch 2.13 loses what is written into a scalar on the CPU
    :param learning_rates: one element each
    """

    thetas: list[th.Tensor]
    exp_avgs: list[th.Tensor]
    exp_avg_sqs: list[th.Tensor]
    clock: th.Tensor
    learning_rates: list[th.Tensor]


class CompiledStep:
    """
    A gradient step of Adam on a minibatch loss, as one graph.

    Inside of ``with``, parameters and moments are those of a :class:`FlatAdam`; what may change from update to update
    (learning rates, coefficients) enters as tensors, so that no new value is a new graph.

    :param policy: that the loss calls
    :param optimizer: Adam, as :func:`check_can_compile` wants it; its state is read and written
    :param parameters: what is updated, among the policy's
    :param minibatch_loss: to be minimised
    :param any_size: whether one graph is to serve rollouts and minibatches of any size; it is somewhat slower
    :param announce: whether to tell who is waiting that a graph is being compiled, and how long it took
    """

    def __init__(
        self,
        policy: nn.Module,
        optimizer: th.optim.Optimizer,
        parameters: Sequence[nn.Parameter],
        minibatch_loss: MinibatchLoss,
        *,
        any_size: bool,
        announce: bool,
    ) -> None:
        assert isinstance(optimizer, th.optim.Adam)
        self._announce = announce
        self._optimizer = optimizer
        self._module = _Loss(policy, minibatch_loss)
        self._parameters = list(parameters)
        self._name_of = {id(p): name for name, p in self._module.named_parameters()}
        self._betas = optimizer.param_groups[0]["betas"]
        self._eps = optimizer.param_groups[0]["eps"]
        self._compiled = _compile(self._step, self._parameters[0].device)
        self._any_size = any_size
        self._seen: set[int] = set()
        self.names: tuple[str, ...] = ()
        self._numbers: Mapping[str, float] | None = None

    def __enter__(self) -> object:
        """Take parameters, moments and learning rates from the policy and its optimiser."""
        counts = steps_made(self._optimizer, self._parameters)
        if len(counts) > 1:
            raise ValueError(
                "torch_compile=True is not allowed with an optimiser whose parameters have made different numbers "
                f"of steps ({sorted(counts)}); use torch_compile=False"
            )
        self._flat = FlatAdam(self._optimizer, self._parameters)
        self._names = [[self._name_of[id(p)] for p in members] for members in self._flat.members]
        self._shapes = [[p.shape for p in members] for members in self._flat.members]
        states = [self._flat.adam.state[p] for p in self._flat.parameters]
        device = self._parameters[0].device
        count = counts.pop()
        beta1, beta2 = self._betas
        self._owned = _Owned(
            thetas=[p.data for p in self._flat.parameters],
            exp_avgs=[state["exp_avg"] for state in states],
            exp_avg_sqs=[state["exp_avg_sq"] for state in states],
            clock=th.tensor([count, beta1**count, beta2**count], dtype=th.float64, device=device),
            learning_rates=[th.tensor([group["lr"]], device=device) for group in self._flat.adam.param_groups],
        )
        return self

    def __exit__(self, *exception: object) -> None:
        """Put parameters and moments back into the policy and its optimiser."""
        for state in self._flat.adam.state.values():
            state["step"].copy_(self._owned.clock[0])
        self._flat.restore()

    def __call__(self, rollout: RolloutSamples, rows: th.Tensor | None, coefficients: Mapping[str, float]) -> th.Tensor:
        size = 0 if self._any_size else len(rollout.returns if rows is None else rows)
        if self._any_size:
            _let_rows_vary(rollout, rows)
        numbers = self._on_device(coefficients)
        is_new = size not in self._seen
        self._seen.add(size)
        minibatches = f"minibatches of {size}" if size else "minibatches"
        with th.no_grad():
            if not self.names:  # which a compiled graph does not return
                self.names = (*self._module(rollout if rows is None else take(rollout, rows), numbers)[1], "grad_norm")
            with _announced(f"the gradient step for {minibatches}", is_new and self._announce):
                statistics: th.Tensor = self._compiled(self._owned, numbers, rollout, rows)
        return statistics

    def _on_device(self, coefficients: Mapping[str, float]) -> dict[str, th.Tensor]:
        """The numbers as tensors, so that a new value is not a new graph; moved once an update."""
        if coefficients is not self._numbers:
            self._numbers = coefficients
            values = th.tensor(list(coefficients.values()), dtype=th.float32, device=self._parameters[0].device)
            self._tensors = dict(zip(coefficients, values.unbind(), strict=True))
        return self._tensors

    def _step(
        self,
        owned: _Owned,
        coefficients: Mapping[str, th.Tensor],
        rollout: RolloutSamples,
        rows: th.Tensor | None,
    ) -> th.Tensor:
        rollout_data = rollout if rows is None else take(rollout, rows)

        def loss_of(thetas: list[th.Tensor]) -> tuple[th.Tensor, Statistics]:
            swapped = {
                name: piece
                for theta, names, shapes in zip(thetas, self._names, self._shapes, strict=True)
                for name, piece in zip(names, pieces(theta, shapes), strict=True)
            }
            # A shared extractor has several names but is one object: one name is enough, and tying the others to it is
            # not undone in a compiled graph.
            result: tuple[th.Tensor, Statistics] = functional_call(
                self._module, swapped, (rollout_data, coefficients), tie_weights=False
            )
            return result

        gradients: list[th.Tensor]
        statistics: Statistics
        gradients, statistics = grad(loss_of, has_aux=True)(owned.thetas)
        norm = th.linalg.vector_norm(gradients[0] if len(gradients) == 1 else th.cat(gradients))
        statistics["grad_norm"] = norm
        takes_step = norm.isfinite()
        if "kl_limit" in coefficients:
            takes_step = takes_step & (statistics["approx_kl"] <= coefficients["kl_limit"])
        scale = (coefficients["max_grad_norm"] / (norm + 1e-6)).clamp(max=1.0)

        # Adam, as torch.optim.Adam computes it
        beta1, beta2 = self._betas
        clock = owned.clock
        new_clock = th.stack((clock[0] + 1, clock[1] * beta1, clock[2] * beta2))
        correction1 = (1 - new_clock[1]).reciprocal().float()
        correction2 = (1 - new_clock[2]).rsqrt().float()
        for theta, gradient, exp_avg, exp_avg_sq, learning_rate in zip(
            owned.thetas, gradients, owned.exp_avgs, owned.exp_avg_sqs, owned.learning_rates, strict=True
        ):
            scaled = gradient * scale
            new_exp_avg = exp_avg.lerp(scaled, 1 - beta1)
            new_exp_avg_sq = exp_avg_sq * beta2 + scaled * scaled * (1 - beta2)
            denominator = new_exp_avg_sq.sqrt() * correction2 + self._eps
            new_theta = theta - learning_rate * correction1 * new_exp_avg / denominator
            theta.copy_(th.where(takes_step, new_theta, theta))
            exp_avg.copy_(th.where(takes_step, new_exp_avg, exp_avg))
            exp_avg_sq.copy_(th.where(takes_step, new_exp_avg_sq, exp_avg_sq))
        clock.copy_(th.where(takes_step, new_clock, clock))
        return th.stack(list(statistics.values()))  # one tensor: to make and to keep one of each takes longer


class CompiledEvaluation:
    """
    ``evaluate_actions`` without gradients, as one graph.

    :param actor_critic: the policy
    :param any_size: whether one graph is to serve batches of any size
    :param announce: whether to tell who is waiting that a graph is being compiled, and how long it took
    """

    def __init__(self, actor_critic: DirectActorCritic, *, any_size: bool, announce: bool) -> None:
        self._compiled = _compile(actor_critic.evaluate_actions, actor_critic.policy.device)
        self._any_size = any_size
        self._announce = announce

    def __call__(self, obs: PyTorchObs, actions: th.Tensor) -> Evaluation:
        if self._any_size:
            _let_rows_vary(obs, actions)
        with _announced("the evaluation of rollouts", self._announce), th.no_grad():
            evaluation: Evaluation = self._compiled(obs, actions)
        self._announce = False
        return evaluation


def _compile(method: Callable[..., Any], device: th.device) -> Callable[..., Any]:
    return th.compile(
        _with_own_code(method),
        fullgraph=True,
        dynamic=False,
        options={
            # Guards on all that the method reads cost more than what it does. Those on the sizes stay; the rest is the
            # object's that the method is bound to, and another policy or another loss is another object.
            "guard_filter_fn": _guards_on_sizes,
            # What calls the kernels is compiled too: there are some thirty of them, of a few microseconds each.
            "cpp_wrapper": device.type == "cpu",
        },
    )


def _guards_on_sizes(guards: Any) -> list[bool]:
    of_tensors: list[bool] = th.compiler.keep_tensor_guards_unsafe(guards)  # type: ignore[no-untyped-call]
    return [keep or guard.guard_type == "SHAPE_ENV" for keep, guard in zip(of_tensors, guards, strict=True)]


def _let_rows_vary(*structures: Any) -> None:
    """Tell the compiler that the first dimension of all tensors in here is not always the same."""
    for tensor in tree_leaves(structures):
        if isinstance(tensor, th.Tensor):
            th._dynamo.maybe_mark_dynamic(tensor, 0)


@contextlib.contextmanager
def _announced(what: str, announce: bool) -> Iterator[None]:
    """
    :param what: is compiled inside of the ``with`` block
    :param announce: whether to say so, and how long it took
    """
    if announce:
        print(f"Compiling {what} ...", end=" ", flush=True)
    start = time.perf_counter()
    yield
    if announce:
        print(f"{time.perf_counter() - start:.1f} seconds")


def _with_own_code(method: Callable[..., Any]) -> Callable[..., Any]:
    """
    The same method with a code object of its own. torch keeps compiled graphs by code object, so with few guards one
    step would be given the graph of another.

    :param method: bound to its object
    """
    function = method.__func__  # type: ignore[attr-defined]
    code = function.__code__.replace(co_name=f"{function.__name__}_{next(_SERIAL)}")
    copy = types.FunctionType(code, function.__globals__, code.co_name, function.__defaults__, function.__closure__)
    return types.MethodType(copy, method.__self__)  # type: ignore[attr-defined]


class _Loss(nn.Module):
    """The policy as a part of its loss, so that ``functional_call`` can swap its parameters."""

    def __init__(self, policy: nn.Module, minibatch_loss: MinibatchLoss) -> None:
        super().__init__()
        self.policy = policy
        self._minibatch_loss = minibatch_loss

    def forward(self, rollout_data: RolloutSamples, coefficients: Coefficients) -> tuple[th.Tensor, Statistics]:
        return self._minibatch_loss(rollout_data, coefficients)
