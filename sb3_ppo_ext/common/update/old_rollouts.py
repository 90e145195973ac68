"""
Old rollouts, which earlier policies have collected, and their samples for an update that also learns from them.

The whole buffer of each old rollout is kept: K old rollouts take K times the memory of the buffer, and during an update
the samples of K + 1 rollouts are on the device.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import numpy as np
import torch as th

from sb3_ppo_ext.common.errors import ArgumentError
from sb3_ppo_ext.common.rollout.actor_critic import ActorCritic
from sb3_ppo_ext.common.rollout.buffers import RolloutBuffer
from sb3_ppo_ext.common.rollout.data import (
    PolicyInput,
    RolloutSamples,
    chunks,
    rows_of,
    shuffled_rows,
    to_arrays,
    to_tensors,
)
from sb3_ppo_ext.common.rollout.evaluation import Evaluation
from sb3_ppo_ext.common.validation import check_int, check_one_of, check_real
from sb3_ppo_ext.losses.targets import vtrace


@dataclass(frozen=True)
class Reuse:
    """
    How an update learns from old rollouts, and around which policy it clips.

    :param target: advantages and returns of old rollouts: ``"gae"``, as first computed when they were collected, or
        ``"vtrace"``, recomputed for the newest policy (Espeholt et al. 2018, arXiv 1802.01561)
    :param proximal: the policy around which an update clips: ``"behaviour"``, the policy that took the action;
        ``"newest"``, the policy that collected the newest rollout; or ``"ewma"``, the moving average of the policies
        before each gradient step, which needs no old rollouts. The last two use importance weights (Hilton et al. 2021,
        arXiv 2110.00641)
    :param max_importance_weight: upper bound of these weights
    :param ewma_decay: decay of the moving average: the factor on the weights of all earlier policies at each gradient
        step; None: ``(N - 1) / (N + 1)``, where an update has N gradient steps
    :param rho_bar: V-trace's upper bound of the ratio that multiplies a TD error
    :param c_bar: V-trace's upper bound of the ratio that multiplies the TD errors of later steps
    """

    target: str = "gae"
    proximal: str = "behaviour"
    max_importance_weight: float = 2.0
    ewma_decay: float | None = None
    rho_bar: float = 1.0
    c_bar: float = 1.0

    @classmethod
    def checked(cls, n_reused_rollouts: object, given: Any) -> Reuse:
        """
        :param n_reused_rollouts: number of old rollouts
        :param given: a dict of the settings that differ from the defaults; None: no setting differs
        :raises ArgumentError: if a setting is not allowed, or would have no effect
        """
        check_int("n_reused_rollouts", n_reused_rollouts, minimum=0)
        if given is None:
            return cls()
        known = [field.name for field in fields(cls)]
        if not isinstance(given, dict):
            raise ArgumentError(f"reuse={given!r} is not allowed: it must be None, or a dict of {', '.join(known)}")
        if n_reused_rollouts == 0 and given.get("proximal") != "ewma":
            raise ArgumentError(
                f"reuse={given!r} is not allowed with n_reused_rollouts=0, which learns from the newest rollout alone: "
                "it must be None or have 'proximal': 'ewma', or n_reused_rollouts be at least 1"
            )
        for key in given:
            check_one_of("a key of reuse", key, known)
        reuse = cls(**given)
        check_one_of("reuse['target']", reuse.target, ("gae", "vtrace"))
        check_one_of("reuse['proximal']", reuse.proximal, ("behaviour", "newest", "ewma"))
        check_real("reuse['max_importance_weight']", reuse.max_importance_weight, above=0.0, finite=False)
        if reuse.ewma_decay is not None:
            check_real("reuse['ewma_decay']", reuse.ewma_decay, at_least=0.0, below=1.0)
        check_real("reuse['rho_bar']", reuse.rho_bar, at_least=0.0, finite=False)
        check_real("reuse['c_bar']", reuse.c_bar, at_least=0.0, at_most=reuse.rho_bar, finite=False)
        for keys, reader, reads in (
            (("max_importance_weight",), "proximal='newest' or 'ewma'", reuse.is_decoupled),
            (("ewma_decay",), "proximal='ewma'", reuse.proximal == "ewma"),
            (("rho_bar", "c_bar"), "target='vtrace'", reuse.target == "vtrace"),
            (("target",), "n_reused_rollouts at least 1", n_reused_rollouts != 0),
        ):
            for key in keys:
                if key in given and not reads:
                    raise ArgumentError(f"reuse={given!r} is not allowed: {key} is read with {reader} alone")
        return reuse

    @property
    def is_decoupled(self) -> bool:
        """Whether an update clips around another policy than the one that acted, with importance weights."""
        return self.proximal != "behaviour"

    def decay(self, n_steps: int) -> float:
        """
        The decay of the moving average. With the default, ``(N - 1) / (N + 1)``, the mean age of the policies in the
        average is ``(N - 1) / 2`` gradient steps. This is also the mean age of the policy that acted, over an update of
        N steps, so an update clips around a policy as old as in PPO.

        :param n_steps: N, the number of gradient steps in an update
        """
        return (n_steps - 1) / (n_steps + 1) if self.ewma_decay is None else self.ewma_decay

    def check_together(self, algorithm: Any) -> None:
        """
        Check the settings together with the algorithm's other arguments.

        :param algorithm: the algorithm that has these settings
        :raises ArgumentError: if another argument does not go with them
        """
        n = algorithm.n_reused_rollouts
        if n and algorithm.recompute_advantages:
            raise ArgumentError(
                f"recompute_advantages=True is not allowed with n_reused_rollouts={n}: the advantages of old rollouts "
                "are not computed anew in each epoch, but once an update, with reuse={'target': 'vtrace'}; "
                "recompute_advantages must be False, or n_reused_rollouts 0"
            )
        if algorithm.kl_adaptive_lr is not None and self.proximal == "ewma":
            raise ArgumentError(
                f"kl_adaptive_lr={algorithm.kl_adaptive_lr!r} is not allowed with reuse={algorithm.reuse!r}: the KL "
                "from an average that follows the policy does not say how far an update has gone; reuse must have "
                "'proximal': 'newest' or 'behaviour', or kl_adaptive_lr be None"
            )
        if n and algorithm.kl_adaptive_lr is not None and self.proximal == "behaviour":
            raise ArgumentError(
                f"kl_adaptive_lr={algorithm.kl_adaptive_lr!r} is not allowed with n_reused_rollouts={n}, where the KL "
                "from the policies of old rollouts is large before the first step: reuse must have "
                "'proximal': 'newest', or kl_adaptive_lr be None"
            )


class OldRollout(NamedTuple):
    """
    A rollout that is kept after its update.

    :param buffer: its buffer
    :param last_obs: the observations after its last step; None: not needed
    """

    buffer: RolloutBuffer
    last_obs: Any


def kept(buffer: RolloutBuffer, last_obs: Any, reuse: Reuse) -> OldRollout:
    """
    Keep a rollout after its update. Its arrays are not copied, as the next rollout is collected into new ones.

    :param buffer: the buffer of the rollout
    :param last_obs: the observations after the last step
    :param reuse: how later updates will learn from it
    """
    buffer = copy.copy(buffer)
    buffer.forget_flat()
    if reuse.target == "gae":
        buffer.final_observations = last_obs = None  # only V-trace needs their values
    return OldRollout(buffer, copy.deepcopy(last_obs))


class Rollouts:
    """
    The samples of the newest rollout and of old ones, for an update.

    :param newest: the filled buffer, with values and log-probabilities
    :param old: old rollouts, from newer to older
    :param reuse: how the update learns from them
    :param actor_critic: the newest policy, in evaluation mode
    :param batch_size: samples in a minibatch
    :param capacity: the largest number of rollouts, the newest included; the samples are padded to this many for a
        compiled step, whose programs are for a fixed number of samples. None: no padding
    """

    def __init__(
        self,
        newest: RolloutBuffer,
        old: Sequence[OldRollout],
        reuse: Reuse,
        actor_critic: ActorCritic,
        *,
        batch_size: int,
        capacity: int | None,
    ) -> None:
        first = newest.flat()
        if reuse.proximal == "newest":
            first = first._replace(proximal_log_prob=first.old_log_prob)
        parts = [first]
        for rollout in old:
            if _kinds(rollout.buffer.flat()) == _kinds(
                newest.flat()
            ):  # not if action masks have appeared or disappeared
                parts.append(_samples(rollout, reuse, actor_critic))
            rollout.buffer.forget_flat()
        self._n_samples = sum(len(part.returns) for part in parts)
        n_sequences = len(first.returns) // first.length
        self._n_in_minibatch = max(1, batch_size // first.length)
        is_cut_evenly = newest.counts is None and n_sequences % self._n_in_minibatch == 0
        self.size_to_pad_to = None if is_cut_evenly else self._n_in_minibatch
        """The number of rows to which a compiled step pads minibatches; None: all have the same size."""
        if is_cut_evenly and capacity is not None:
            parts += [first] * (capacity - len(parts))  # padding, from which no row is drawn
        self._samples = RolloutSamples(*(_joined(column) for column in zip(*parts, strict=True)))

    def minibatches(self) -> Iterator[tuple[RolloutSamples, th.Tensor]]:
        """The shuffled minibatches of one epoch: the samples of all rollouts, and the rows of the minibatch."""
        n_rows = self._n_samples // self._samples.length
        for rows in shuffled_rows(n_rows, self._n_in_minibatch, self._samples.returns.device):
            yield self._samples, rows


def _kinds(samples: RolloutSamples) -> list[bool]:
    return [part is None for part in samples]


def _joined(parts: Sequence[Any]) -> Any:
    """Concatenate tensors, or dicts of tensors; None stays None."""
    if parts[0] is None:
        return None
    if isinstance(parts[0], dict):
        return {key: _joined([part[key] for part in parts]) for key in parts[0]}
    return th.cat(tuple(parts))


def _samples(rollout: OldRollout, reuse: Reuse, actor_critic: ActorCritic) -> RolloutSamples:
    """The samples of an old rollout, prepared for the newest policy."""
    buffer = rollout.buffer
    samples = buffer.flat()
    if reuse.target == "gae" and reuse.proximal != "newest":
        return samples
    evaluation = _evaluated(buffer, actor_critic)

    def counted(values: th.Tensor) -> th.Tensor:
        return values if buffer.counts is None else values[buffer._flat_of("counts").flatten()]

    if reuse.target == "vtrace":
        advantages, returns = _vtrace(rollout, reuse, evaluation, actor_critic)
        samples = samples._replace(advantages=counted(advantages), returns=counted(returns))
    if reuse.proximal == "newest":
        params = counted(evaluation.params)
        samples = samples._replace(
            proximal_log_prob=counted(evaluation.log_prob),
            old_values=counted(evaluation.values),
            old_params=params if params.shape == samples.old_params.shape else samples.old_params,
        )
    return samples


@th.no_grad()
def _evaluated(buffer: RolloutBuffer, actor_critic: ActorCritic) -> Evaluation:
    """Evaluate all steps of a rollout by a policy that may not have collected it; without the entropy."""
    inputs, actions = buffer.flat_inputs()
    parts = []
    for rows in chunks(inputs.n_rows, buffer.observation_space, inputs.length):
        part = actor_critic.evaluate_actions(inputs.rows(rows), rows_of(actions, rows, inputs.length))
        parts.append((part.values, part.log_prob, part.params))
    values, log_prob, params = map(th.cat, zip(*parts, strict=True))
    return Evaluation(values, log_prob, None, params, actor_critic.family)


@th.no_grad()
def _vtrace(
    rollout: OldRollout, reuse: Reuse, evaluation: Evaluation, actor_critic: ActorCritic
) -> tuple[th.Tensor, th.Tensor]:
    """
    V-trace's advantages and returns for the newest policy and its critic. They are computed on the CPU, where the
    buffer's arrays are.

    :param rollout: an old rollout
    :param reuse: has the bounds of the ratios
    :param evaluation: the newest policy's evaluation of all its steps
    :param actor_critic: the newest policy
    :return: advantages and returns of all steps, flat, on the policy's device
    """
    buffer = rollout.buffer
    device = actor_critic.policy.device
    last_values = actor_critic.values(PolicyInput(to_tensors(rollout.last_obs, device)))
    if buffer.final_observations is not None:
        buffer.final_observations.evaluate_again(actor_critic)
        buffer.final_observations.write_into(buffer)

    def by_step(flat: th.Tensor) -> th.Tensor:
        return flat.cpu().view(buffer.n_envs, -1).T

    def tensor(array: Any) -> th.Tensor:
        return th.from_numpy(np.array(array))

    targets = vtrace(
        tensor(buffer.rewards if buffer.penalties is None else buffer.rewards - to_arrays(buffer.penalties)),
        by_step(evaluation.values),
        last_values.cpu(),
        tensor(buffer.terminated),
        tensor(buffer.truncated),
        by_step(evaluation.log_prob) - tensor(buffer.log_probs),
        gamma=buffer.gamma,
        gae_lambda=buffer.gae_lambda,
        rho_bar=reuse.rho_bar,
        c_bar=reuse.c_bar,
        final_values=tensor(buffer.final_values),
    )
    advantages, returns = (target.float().T.flatten().to(device) for target in targets)
    return advantages, returns
