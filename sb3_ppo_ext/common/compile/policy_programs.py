"""Compile the actor, the evaluation of rollouts and the Fisher product, one program each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch as th
from stable_baselines3.common.policies import ActorCriticPolicy
from torch import nn

from sb3_ppo_ext.common.compile.program import FunctionalModule, Program, ProgramCache
from sb3_ppo_ext.common.compile.support import cache_key
from sb3_ppo_ext.common.distributions import Family
from sb3_ppo_ext.common.rollout.actor_critic import DirectActorCritic
from sb3_ppo_ext.common.rollout.data import PolicyInput
from sb3_ppo_ext.common.rollout.evaluation import ActorEvaluation, Evaluation, StepEvaluation
from sb3_ppo_ext.numerics import FisherVectorProduct

# Rows that are evaluated at a time if rollouts differ in size.
_CHUNK_SIZE = 256


class _PolicyProgram:
    """A compiled method of a :class:`DirectActorCritic`, as a function of the policy's tensors."""

    def __init__(self, policy: ActorCriticPolicy, method: Callable[..., Any], *, what: str, announce: bool) -> None:
        self._module = FunctionalModule(policy, method)
        self._program = Program(
            self._results,
            policy.device,
            what=what,
            announce=announce,
            exact_tanh=policy.squash_output,
        )

    def bind(self) -> None:
        """Take the parameters from the policy."""
        self._program.bind(self._module.tensors())

    def _results(
        self, tensors: dict[str, th.Tensor], batch: Any, inputs: PolicyInput, other: th.Tensor
    ) -> list[th.Tensor]:
        raise NotImplementedError


class CompiledActor(_PolicyProgram):
    """
    ``act`` as one program.

    :param actor_critic: the policy
    :param announce: whether to print that it is being compiled, and how long this took
    """

    def __init__(self, actor_critic: DirectActorCritic, *, announce: bool) -> None:
        super().__init__(actor_critic.policy, actor_critic.act_by, what="the actor", announce=announce)
        self._noise = actor_critic.noise

    def act(self, inputs: PolicyInput) -> tuple[th.Tensor, StepEvaluation | None]:
        action, *step = self._program(inputs, self._noise(inputs.n_rows))
        return action, StepEvaluation(step[0], None, *step[1:]) if step else None

    def _results(
        self, tensors: dict[str, th.Tensor], batch: Any, inputs: PolicyInput, noise: th.Tensor
    ) -> list[th.Tensor]:
        action, step = self._module.call(tensors, inputs, noise)
        if step is None:
            return [action]
        return [action, step.values, step.params, *([] if step.state is None else [step.state])]


class CompiledEvaluation(_PolicyProgram):
    """
    ``evaluate_actions`` without gradients and entropy, as one program.

    :param actor_critic: the policy
    :param chunk_size: samples that are evaluated at a time, so that one program is enough for rollouts of all sizes;
        None: all, with a program for each size
    :param announce: whether to print that it is being compiled, and how long this took
    """

    def __init__(self, actor_critic: DirectActorCritic, *, chunk_size: int | None, announce: bool) -> None:
        super().__init__(
            actor_critic.policy,
            actor_critic.evaluate_actions,
            what="the evaluation of rollouts",
            announce=announce,
        )
        self._chunk_size = chunk_size
        self._family = actor_critic.family

    def evaluate_actions(self, inputs: PolicyInput, actions: th.Tensor) -> Evaluation:
        if self._chunk_size is None:
            values, log_prob, params = self._program(inputs, actions)
            return Evaluation(values, log_prob, None, params, self._family)
        n = len(actions)
        # The last chunk is padded with the last sample; the results of the padding are dropped.
        rows = th.arange(n + -n % self._chunk_size, device=actions.device).clamp(max=n - 1)
        chunks = [self._program(inputs.rows(chunk), actions[chunk]) for chunk in th.split(rows, self._chunk_size)]
        values, log_prob, params = (th.cat(parts)[:n] for parts in zip(*chunks, strict=True))
        return Evaluation(values, log_prob, None, params, self._family)

    def _results(
        self, tensors: dict[str, th.Tensor], batch: Any, inputs: PolicyInput, actions: th.Tensor
    ) -> list[th.Tensor]:
        evaluation = self._module.call(tensors, inputs, actions)
        return [evaluation.values, evaluation.log_prob, evaluation.params]


class CompiledActorCritic:
    """
    A policy that acts and evaluates rollouts by compiled programs, and otherwise behaves as the given one.

    :param actor_critic: the policy, which must be pure
    :param programs: cache of the compiled programs
    :param rollouts_vary: whether rollouts differ in size
    :param announce: whether to print that something is being compiled, and how long this took
    """

    is_pure = True

    def __init__(
        self, actor_critic: DirectActorCritic, programs: ProgramCache, *, rollouts_vary: bool, announce: bool
    ) -> None:
        self.policy = actor_critic.policy
        self.n_state = actor_critic.n_state
        self.family: Family | None = actor_critic.family
        key = cache_key(self.policy)
        actor = programs.get_or_make("actor", key, lambda: CompiledActor(actor_critic, announce=announce))
        actor.bind()
        self.act = actor.act
        self.evaluate_actor: Callable[[PolicyInput, th.Tensor], ActorEvaluation] = actor_critic.evaluate_actor
        self.evaluate_actions: Callable[[PolicyInput, th.Tensor], Evaluation] = actor_critic.evaluate_actions
        self.params = actor_critic.params
        self.values: Callable[[PolicyInput], th.Tensor] = actor_critic.values
        if self.n_state:  # with a memory, each step was evaluated when it was made
            return
        chunk_size = _CHUNK_SIZE if rollouts_vary else None
        evaluation = programs.get_or_make(
            "evaluation", key, lambda: CompiledEvaluation(actor_critic, chunk_size=chunk_size, announce=announce)
        )
        evaluation.bind()
        self.evaluate_actions = evaluation.evaluate_actions


class CompiledFisherVectorProduct:
    """
    :class:`~sb3_ppo_ext.numerics.FisherVectorProduct` of the actor as one program. Each product repeats the forward
    pass, which is still faster than eager products with a graph that is kept.

    :param actor_critic: the policy
    :param parameters: theta, some of the policy's parameters
    :param announce: whether to print that it is being compiled, and how long this took
    """

    def __init__(self, actor_critic: DirectActorCritic, parameters: Sequence[nn.Parameter], *, announce: bool) -> None:
        self._module = FunctionalModule(actor_critic.policy, actor_critic.params)
        self._metric = actor_critic.family.fisher
        self._parameters = list(parameters)
        self._program = Program(self._product, actor_critic.policy.device, what="the Fisher product", announce=announce)

    def at(self, inputs: PolicyInput, chunks: Sequence[slice], *, damping: float) -> Callable[[th.Tensor], th.Tensor]:
        """
        The product with the Fisher information for the current parameters.

        :param inputs: inputs of the policy; F is the mean over their distributions
        :param chunks: ranges of the inputs, which are processed one after the other
        :param damping: multiple of the identity that is added
        :return: ``v -> F v + damping * v``, v of shape ``(n,)``
        """
        parts = [((rows.stop - rows.start) / chunks[-1].stop, inputs.rows(rows)) for rows in chunks]
        tensors = self._module.tensors()
        if len(parts) == 1:
            self._program.bind(tensors, parts[0][1])

        def product(v: th.Tensor) -> th.Tensor:
            result = damping * v
            for share, some in parts:
                if len(parts) > 1:
                    self._program.bind(tensors, some)
                result.add_(self._program(v)[0], alpha=share)
            return result

        return product

    def _product(self, tensors: dict[str, th.Tensor], inputs: PolicyInput, v: th.Tensor) -> list[th.Tensor]:
        theta = set(map(id, self._parameters))
        with th.enable_grad():
            named = self._module.tensors()
            leaf_of = {
                id(named[name]): tensor.detach().requires_grad_() if id(named[name]) in theta else tensor
                for name, tensor in tensors.items()
            }
            outputs = self._module.call({name: leaf_of[id(tensor)] for name, tensor in named.items()}, inputs)
            leaves = [leaf_of[id(p)] for p in self._parameters]
            return [FisherVectorProduct(outputs, leaves, self._metric)(v)]
