"""A gradient step (gradients, clipping of their norm and Adam, over flat parameters) as one program."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, cast

import torch as th
from torch import nn

from sb3_ppo_ext.common.compile.cuda import copied
from sb3_ppo_ext.common.compile.program import FunctionalModule, Program
from sb3_ppo_ext.common.compile.trees import tensors_in
from sb3_ppo_ext.common.rollout.actor_critic import DirectActorCritic
from sb3_ppo_ext.common.rollout.data import RolloutSamples
from sb3_ppo_ext.common.update.flat_adam import FlatAdam, pieces
from sb3_ppo_ext.common.update.objective import Coefficients, Loss, Statistics
from sb3_ppo_ext.common.update.reduce import Reducer
from sb3_ppo_ext.common.update.step import n_counted, reached, without_nothing
from sb3_ppo_ext.common.update.step_message import StepMessage


class Owned(NamedTuple):
    """
    The tensors that a compiled step changes in place; each list has one item per flat tensor of a :class:`FlatAdam`.

    :param thetas: parameters
    :param gradients: clipped gradients of the last step
    :param exp_avgs: Adam's first moments
    :param exp_avg_sqs: Adam's second moments
    :param clocks: the number of steps t, beta1^t and beta2^t (one product per step is cheaper than a power), in one
        tensor, because torch 2.13's compiler loses writes into a scalar on the CPU
    :param learning_rates: tensors of one element
    """

    thetas: list[th.Tensor]
    gradients: list[th.Tensor]
    exp_avgs: list[th.Tensor]
    exp_avg_sqs: list[th.Tensor]
    clocks: list[th.Tensor]
    learning_rates: list[th.Tensor]


class CompiledStep:
    """
    A gradient step of Adam on a minibatch loss, as one program. If several processes train one model, it is two
    programs, with an exchange of gradients between them.

    Inside the ``with`` block, parameters and moments belong to a :class:`FlatAdam`. Numbers that may change meanwhile
    (coefficients, learning rates) are tensors, so that a new value needs no new program.

    :param actor_critic: the policy
    :param optimizer: Adam, as :func:`check_can_compile` requires it; its state is read and written
    :param parameters: candidates; those that the loss depends on are updated
    :param loss: a pure function to minimise
    :param reducer: combines the gradients of all processes, before they are clipped
    :param pad_to: number of samples to which each minibatch is padded, so that one program is enough for minibatches of
        different sizes; the loss must use their mask. None: a program for each size
    :param writes_into: a module whose parameters and buffers the loss writes into; None: only the policy's buffers
    :param announce: whether to print that it is being compiled, and how long this took
    """

    def __init__(
        self,
        actor_critic: DirectActorCritic,
        optimizer: th.optim.Optimizer,
        parameters: Sequence[nn.Parameter],
        loss: Loss,
        reducer: Reducer,
        *,
        pad_to: int | None,
        writes_into: nn.Module | None,
        announce: bool,
    ) -> None:
        assert isinstance(optimizer, th.optim.Adam)
        self._actor_critic = actor_critic
        self._optimizer = optimizer
        self._candidates = list(parameters)
        self._loss = loss
        self._reducer = reducer
        self._pad_to = pad_to
        self._writes_into = writes_into
        self._module = FunctionalModule(actor_critic.policy, self._compute_loss, writes_into)
        self._betas = optimizer.param_groups[0]["betas"]
        self._eps = optimizer.param_groups[0]["eps"]
        self._device = self._candidates[0].device
        self._flat: FlatAdam | None = None
        self._updated: list[nn.Parameter] | None = None
        self.names: tuple[str, ...] = ()

        def program(function: Any, what: str) -> Program:
            return Program(
                function,
                self._device,
                what=what,
                announce=announce,
                exact_tanh=actor_critic.policy.squash_output,
                may_be_recorded=reducer.is_local,
            )

        if reducer.is_local:
            self._program = program(self._step, "the gradient step")
        else:
            self._program = program(self._written_message, "the gradients")
            self._adam_program = program(self._step_of_all, "the step of Adam")

    def _compute_loss(self, rollout_data: RolloutSamples, coefficients: Coefficients) -> tuple[th.Tensor, Statistics]:
        return self._loss(self._actor_critic, rollout_data, coefficients)

    def __enter__(self) -> object:
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
        self._program.unbind()
        self._flat = None
        del self._taken, self._fixed, self._bound_to

    def __call__(self, rollout: RolloutSamples, rows: th.Tensor | None, coefficients: Mapping[str, float]) -> th.Tensor:
        if self._pad_to is not None:
            rollout, rows = rollout.padded(rows, self._pad_to), None
        if not self._reducer.is_local:
            rollout, rows = without_nothing(rollout, rows)
        if self._updated is None:
            self._updated = self._parameters_of_loss(rollout if rows is None else rollout.rows(rows), coefficients)
        if self._flat is None:
            self._take()
        shared = None if rows is None else rollout  # the rollout that minibatches are rows of
        if self._bound_to[0] is not shared or self._bound_to[1] is not coefficients:
            self._bind(shared, coefficients)
        self._take_learning_rates()
        (result,) = self._program(rollout if rows is None else rows)
        if not self._reducer.is_local:
            (result,) = self._adam_program(self._reducer.summed(result))
        return result

    def _parameters_of_loss(
        self, rollout_data: RolloutSamples, coefficients: Mapping[str, float]
    ) -> list[nn.Parameter]:
        """
        The parameters that the loss depends on. The loss is computed once, eagerly and without side effects.

        :param rollout_data: a minibatch
        :param coefficients: coefficients of the loss
        """
        as_tensors = {name: th.tensor(value, device=self._device) for name, value in coefficients.items()}
        written = list(self._actor_critic.policy.buffers())
        if self._writes_into is not None:
            written += [*self._writes_into.parameters(), *self._writes_into.buffers()]
        before = [tensor.clone() for tensor in written]
        with th.random.fork_rng(devices=[self._device] if self._device.type == "cuda" else []):
            loss, statistics = self._compute_loss(rollout_data, as_tensors)
        copied(written, before)
        if not self._reducer.is_local:
            self._message = StepMessage(self._reducer, tuple(statistics), self._device)
        return reached(loss, self._candidates)

    def _take(self) -> None:
        """Take parameters and moments from the policy and its optimiser."""
        assert self._updated is not None
        self._flat = FlatAdam(self._optimizer, self._updated)
        beta1, beta2 = self._betas
        states = [self._flat.adam.state[p] for p in self._flat.parameters]
        self._learning_rates = [float(rate) for rate in self._flat.learning_rates()]
        owned = Owned(
            thetas=[p.data for p in self._flat.parameters],
            gradients=[cast(th.Tensor, p.grad) for p in self._flat.parameters],
            exp_avgs=[state["exp_avg"] for state in states],
            exp_avg_sqs=[state["exp_avg_sq"] for state in states],
            clocks=[
                th.tensor([count, beta1**count, beta2**count], dtype=th.float64, device=self._device)
                for count in self._flat.steps
            ],
            learning_rates=[th.tensor([rate], device=self._device) for rate in self._learning_rates],
        )
        others = {name: t for name, t in self._module.tensors().items() if t not in self._flat}
        self._taken = self._fixed = owned, others

    def _bind(self, rollout: RolloutSamples | None, coefficients: Mapping[str, float]) -> None:
        """Set the coefficients of the next calls, and the rollout whose rows they get; None: they get minibatches."""
        self._bound_to = rollout, coefficients
        self._coefficients = tuple(coefficients)
        numbers = th.tensor([*coefficients.values()], dtype=th.float32)
        if self._device.type == "cuda":  # so that the copy to the GPU is asynchronous
            numbers = numbers.pin_memory()
        numbers = numbers.to(self._device, non_blocking=True)
        *self._fixed, _ = self._program.bind((*self._fixed, numbers), rollout)
        if not self._reducer.is_local:
            self._adam_program.bind((*self._fixed, numbers))

    def _take_learning_rates(self) -> None:
        """Copy the learning rates from the optimiser if they have changed."""
        assert self._flat is not None
        rates = self._flat.learning_rates()
        if rates != self._learning_rates:
            self._learning_rates = [float(rate) for rate in rates]
            for place, rate in zip(self._fixed[0].learning_rates, self._learning_rates, strict=True):
                place.fill_(rate)

    def _step(self, fixed: Any, rollout: RolloutSamples | None, minibatch: Any) -> list[th.Tensor]:
        gradients, statistics = self._gradients(fixed, rollout, minibatch)
        return self._adam(fixed, gradients, statistics)

    def _written_message(self, fixed: Any, rollout: RolloutSamples | None, minibatch: Any) -> list[th.Tensor]:
        gradients, statistics = self._gradients(fixed, rollout, minibatch)
        assert tuple(statistics) == self._message.names
        weight = n_counted(minibatch, None) if rollout is None else n_counted(rollout, minibatch)
        return [self._message.written(gradients, th.stack(list(statistics.values())), weight)]

    def _step_of_all(self, fixed: Any, batch: Any, total: th.Tensor) -> list[th.Tensor]:
        sums, weight, statistics = self._message.read(total, fixed[0].gradients)
        gradients = [of_all / weight for of_all in sums]
        return self._adam(fixed, gradients, dict(zip(self._message.names, statistics.unbind(), strict=True)))

    def _named(self, numbers: th.Tensor) -> Coefficients:
        return dict(zip(self._coefficients, numbers.unbind(), strict=True))

    def _gradients(
        self,
        fixed: tuple[Owned, dict[str, th.Tensor], th.Tensor],
        rollout: RolloutSamples | None,
        minibatch: Any,
    ) -> tuple[list[th.Tensor], Statistics]:
        owned, others, numbers = fixed
        assert self._flat is not None
        rollout_data = minibatch if rollout is None else rollout.rows(minibatch)
        with th.enable_grad():
            thetas = [theta.detach().requires_grad_() for theta in owned.thetas]
            piece_of = {
                id(p): piece
                for theta, members in zip(thetas, self._flat.members, strict=True)
                for p, piece in zip(members, pieces(theta, [p.shape for p in members]), strict=True)
            }
            named = self._module.tensors().items()
            updated = {name: piece_of[id(tensor)] for name, tensor in named if id(tensor) in piece_of}
            loss, statistics = self._module.call({**updated, **others}, rollout_data, self._named(numbers))
            return list(th.autograd.grad(loss, thetas)), statistics

    def _adam(
        self,
        fixed: tuple[Owned, dict[str, th.Tensor], th.Tensor],
        gradients: list[th.Tensor],
        statistics: Statistics,
    ) -> list[th.Tensor]:
        """Clip the gradients and make a step of Adam with the formulas of torch.optim.Adam."""
        owned, _, numbers = fixed
        coefficients = self._named(numbers)
        norm = th.linalg.vector_norm(gradients[0] if len(gradients) == 1 else th.cat(gradients))
        statistics["grad_norm"] = norm
        takes_step = norm.isfinite()
        if "kl_limit" in coefficients:
            takes_step = takes_step & (statistics["approx_kl"] <= coefficients["kl_limit"])
        scale = (coefficients["max_grad_norm"] / (norm + 1e-6)).clamp(max=1.0)

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
        return [th.stack(list(statistics.values()))]  # one tensor is faster than one for each statistic
