"""A gradient step (gradients, clipping of their norm and Adam, over flat parameters) as one program."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, cast

import torch as th
from torch import nn

from sb3_ppo_ext.common.compile.cuda import copied
from sb3_ppo_ext.common.compile.live import LiveView, has_changed, is_number, noted_by
from sb3_ppo_ext.common.compile.program import FunctionalModule, Program
from sb3_ppo_ext.common.compile.support import REFUSED
from sb3_ppo_ext.common.compile.trees import tensors_in
from sb3_ppo_ext.common.rollout.actor_critic import DirectActorCritic
from sb3_ppo_ext.common.rollout.buffers import RolloutSamples, take, take_padded
from sb3_ppo_ext.common.update.flat_adam import FlatAdam, pieces
from sb3_ppo_ext.common.update.step import Coefficients, Statistics, reached


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
    :param pad_to: samples that each minibatch is padded to, so that one program is enough where no two have the same
        size; the loss must heed their mask. None: a program is made for each size
    :param announce: whether to tell who is waiting that it is being compiled, and how long it took
    """

    def __init__(
        self,
        actor_critic: DirectActorCritic,
        optimizer: th.optim.Optimizer,
        parameters: Sequence[nn.Parameter],
        loss: LossOfPolicy,
        *,
        pad_to: int | None,
        announce: bool,
    ) -> None:
        assert isinstance(optimizer, th.optim.Adam)
        self._actor_critic = actor_critic
        self._optimizer = optimizer
        self._candidates = list(parameters)
        self._owner = getattr(loss, "__self__", None)
        self._loss: LossOfPolicy = getattr(loss, "__func__", loss)
        self._pad_to = pad_to
        self._announce = announce
        self._module = FunctionalModule(actor_critic.policy, self._compute_loss)
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
        copied(tensors_in(self._taken), tensors_in(self._fixed))
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
                raise ValueError(f"{REFUSED}: {error}; or torch_compile=False") from error
            finally:
                copied(buffers, before)
        self._updated = reached(loss, self._candidates)
        noted = {} if self._owner is None else noted_by(self._view)
        is_live = {name: self._may_have_live_numbers and is_number(value) for name, value in noted.items()}
        self._live_numbers = tuple(name for name in noted if is_live[name])
        self._noted = {name: value for name, value in noted.items() if not is_live[name]}
        self._program = Program(
            self._step,
            self._device,
            what="the gradient step",
            announce=self._announce,
            exact_tanh=self._actor_critic.policy.squash_output,
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
        if self._pad_to is not None:
            rollout, rows = take_padded(rollout, rows, self._pad_to), None
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
        bound = None if rows is None else rollout
        if self._bound_to[0] is not bound or self._bound_to[1] is not coefficients:
            self._bound_to = bound, coefficients
            self._coefficients = tuple(coefficients)
            values = [*coefficients.values(), *(float(getattr(self._owner, name)) for name in self._live_numbers)]
            numbers = th.tensor(values, dtype=th.float32)
            if self._device.type == "cuda":  # from where the host need not wait for it
                numbers = numbers.pin_memory()
            numbers = numbers.to(self._device, non_blocking=True)
            *self._fixed, _ = self._program.bind((*self._fixed, numbers), bound)
        (statistics,) = self._program(rollout if rows is None else rows)
        return statistics

    def _step(
        self,
        fixed: tuple[_Owned, dict[str, th.Tensor], th.Tensor],
        bound: RolloutSamples | None,
        given: Any,
    ) -> list[th.Tensor]:
        owned, others, numbers = fixed
        assert self._flat is not None
        named_numbers = dict(zip((*self._coefficients, *self._live_numbers), numbers.unbind(), strict=True))
        coefficients = {name: named_numbers[name] for name in self._coefficients}
        live_numbers = {name: named_numbers[name] for name in self._live_numbers}
        rollout_data = given if bound is None else take(bound, given)
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
