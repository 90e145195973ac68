"""The actor, the evaluation of a rollout and the products with the Fisher matrix of a policy, as one program each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch as th
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.type_aliases import PyTorchObs
from torch import nn

from sb3_ppo_ext.common.compile.program import FunctionalModule, Program
from sb3_ppo_ext.common.rollout.actor_critic import DirectActorCritic, Evaluation, Kept, n_rows
from sb3_ppo_ext.common.rollout.buffers import obs_rows
from sb3_ppo_ext.numerics import FisherVectorProduct


class _PolicyProgram:
    """A method of a :class:`DirectActorCritic` as a program of the policy's tensors."""

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

    def _results(self, tensors: dict[str, th.Tensor], batch: Any, obs: PyTorchObs, other: th.Tensor) -> list[th.Tensor]:
        raise NotImplementedError


class CompiledActor(_PolicyProgram):
    """
    ``act`` as one program.

    :param actor_critic: the policy
    :param announce: whether to tell who is waiting that it is being compiled, and how long it took
    """

    def __init__(self, actor_critic: DirectActorCritic, *, announce: bool) -> None:
        super().__init__(actor_critic.policy, actor_critic.act_by, what="the actor", announce=announce)
        self._noise = actor_critic.noise

    def act(self, obs: PyTorchObs) -> tuple[th.Tensor, Kept | None]:
        action, *kept = self._program(obs, self._noise(n_rows(obs)))
        return action, Kept(kept[0], None, kept[1]) if kept else None

    def _results(self, tensors: dict[str, th.Tensor], batch: Any, obs: PyTorchObs, noise: th.Tensor) -> list[th.Tensor]:
        action, kept = self._module.call(tensors, obs, noise)
        return [action] if kept is None else [action, kept.values, kept.params]


class CompiledEvaluation(_PolicyProgram):
    """
    ``evaluate_actions`` without gradients and entropy, as one program.

    :param actor_critic: the policy
    :param chunk_size: samples that are evaluated at a time, so that one program is enough where no two rollouts have
        the same size; None: all, and a program is made for each size
    :param announce: whether to tell who is waiting that it is being compiled, and how long it took
    """

    def __init__(self, actor_critic: DirectActorCritic, *, chunk_size: int | None, announce: bool) -> None:
        super().__init__(
            actor_critic.policy, actor_critic.evaluate_actions, what="the evaluation of rollouts", announce=announce
        )
        self._chunk_size = chunk_size

    def __call__(self, obs: PyTorchObs, actions: th.Tensor) -> Evaluation:
        if self._chunk_size is None:
            values, log_prob, params = self._program(obs, actions)
            return Evaluation(values, log_prob, None, params)
        n = len(actions)
        # The last chunk is padded with the last sample; what comes of that is cut off.
        rows = th.arange(n + -n % self._chunk_size, device=actions.device).clamp(max=n - 1)
        chunks = [self._program(obs_rows(obs, chunk), actions[chunk]) for chunk in th.split(rows, self._chunk_size)]
        values, log_prob, params = (th.cat(parts)[:n] for parts in zip(*chunks, strict=True))
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
        self._module = FunctionalModule(actor_critic.policy, actor_critic.params)
        self._metric = actor_critic.family.fisher
        self._parameters = list(parameters)
        self._program = Program(self._product, actor_critic.policy.device, what="the Fisher product", announce=announce)

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
