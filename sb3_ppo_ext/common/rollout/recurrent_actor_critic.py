"""Run the networks of a recurrent policy."""

from __future__ import annotations

from typing import Any

import torch as th
from sb3_contrib.common.recurrent.policies import RecurrentActorCriticPolicy
from stable_baselines3.common.policies import ActorCriticPolicy, BasePolicy
from stable_baselines3.common.type_aliases import PyTorchObs
from torch import nn

from sb3_ppo_ext.common.rollout.actor_critic import DirectActorCritic
from sb3_ppo_ext.common.rollout.data import PolicyInput
from sb3_ppo_ext.common.rollout.layers import apply, unrolled
from sb3_ppo_ext.common.rollout.purity import has_hooks
from sb3_ppo_ext.common.rollout.recurrence import (
    Recurrence,
    by_layers,
    n_state,
    one_step,
    process_sequence,
    step_by_step,
)
from sb3_ppo_ext.common.rollout.recurrence import unrolled as unrolled_recurrence


class RecurrentActorCritic(DirectActorCritic):
    """
    Runs the networks of a recurrent policy of sb3-contrib or of this package directly.

    To draw an action, all recurrent layers make one step, the critic's too. This also gives the value and the next
    state, so nothing is left to evaluate when the rollout is complete. The state of a policy is the state of the
    actor's layers, followed by that of the critic's recurrent layers if it has its own.

    :param policy: the policy
    :param with_params: whether :meth:`evaluate_actions` also gives the distribution parameters
    :param unrolls: whether to unroll sequences, for a compiled program; otherwise torch's own layers run them
    """

    _CALLS = (*DirectActorCritic._CALLS, "_process_sequence")

    def __init__(self, policy: ActorCriticPolicy, *, with_params: bool = True, unrolls: bool = False) -> None:
        super().__init__(policy, with_params=with_params)
        assert isinstance(policy, RecurrentActorCriticPolicy)
        self._evaluates_each_step = True
        self._recurrence: Recurrence = unrolled_recurrence if unrolls else by_layers
        self._rnn: Any = policy.lstm_actor
        self._critic_rnn: Any = policy.lstm_critic
        self._shares_rnn = policy.shared_lstm
        # The layers of a critic without recurrent layers.
        self._critic_layer = [] if policy.critic is None else unrolled(policy.critic)
        self._sizes = [n_state(rnn) for rnn in (self._rnn, self._critic_rnn) if rnn is not None]
        self.n_state = sum(self._sizes)

    @classmethod
    def refusal(cls, policy: BasePolicy) -> str | None:
        for name in ("lstm_actor", "lstm_critic"):
            rnn = getattr(policy, name, None)
            if rnn is not None and (type(rnn) not in (nn.LSTM, nn.GRU) or has_hooks(rnn)):
                return f"has a {name} with hooks, or of a class of its own"
            if rnn is not None and (rnn.bidirectional or rnn.batch_first or rnn.proj_size):
                return f"has a {name} that is bidirectional, a projection or batch_first"
        return super().refusal(policy)

    @classmethod
    def _knows(cls, name: str, policy_class: type[BasePolicy]) -> bool:
        method = getattr(policy_class, name)
        return method is getattr(RecurrentActorCriticPolicy, name) or method is process_sequence

    def params(self, inputs: PolicyInput | PyTorchObs) -> th.Tensor:
        # The Fisher information is a product of derivatives, and cuDNN's layers cannot be differentiated twice.
        inputs = PolicyInput.of(inputs)
        latent_pi = self._latent_pi(self._preprocess_batch(inputs.obs), inputs, _outputs_step_by_step)
        return self._params_by(latent_pi, self._action_out(latent_pi, inputs.mask))

    def _latent_pi(self, x: Any, inputs: PolicyInput, recurrence: Recurrence | None = None) -> th.Tensor:
        features = apply(self._actor, x)
        return apply(self._actor_head, self._outputs(self._rnn, 0, features, inputs, recurrence))

    def _latent_vf(self, x: Any, inputs: PolicyInput) -> th.Tensor:
        features = apply(self._critic, x)
        if self._shares_rnn:
            return apply(self._critic_head, self._outputs(self._rnn, 0, features, inputs).detach())
        return apply(self._critic_head, self._of_critic(features, inputs))

    def _latents(self, x: Any, inputs: PolicyInput) -> tuple[th.Tensor, th.Tensor]:
        features = apply(self._actor, x)
        vf_features = features if self.policy.share_features_extractor else apply(self._critic, x)
        of_actor = self._outputs(self._rnn, 0, features, inputs)
        # As in sb3-contrib, the gradient of the values does not reach layers that are shared.
        of_critic = of_actor.detach() if self._shares_rnn else self._of_critic(vf_features, inputs)
        return apply(self._actor_head, of_actor), apply(self._critic_head, of_critic)

    def _latents_of_step(self, x: Any, inputs: PolicyInput) -> tuple[th.Tensor, th.Tensor, th.Tensor | None]:
        features = apply(self._actor, x)
        vf_features = features if self.policy.share_features_extractor else apply(self._critic, x)
        assert inputs.starts is not None
        assert inputs.state is not None
        state = inputs.state * (1.0 - inputs.starts).unsqueeze(1)
        parts = self._parts(inputs._replace(state=state))
        of_actor, parts[0] = one_step(self._rnn, features, parts[0])
        if self._critic_rnn is not None:
            of_critic, parts[1] = one_step(self._critic_rnn, vf_features, parts[1])
        else:
            of_critic = of_actor if self._shares_rnn else apply(self._critic_layer, vf_features)
        return apply(self._actor_head, of_actor), apply(self._critic_head, of_critic), th.cat(parts, dim=1)

    def _of_critic(self, features: th.Tensor, inputs: PolicyInput) -> th.Tensor:
        """The features after the layers of a critic that does not share the actor's recurrent layers."""
        if self._critic_rnn is None:
            return apply(self._critic_layer, features)
        return self._outputs(self._critic_rnn, 1, features, inputs)

    def _outputs(
        self, rnn: Any, part: int, features: th.Tensor, inputs: PolicyInput, recurrence: Recurrence | None = None
    ) -> th.Tensor:
        assert inputs.starts is not None
        if inputs.length == 1:
            return _outputs_step_by_step(rnn, features, self._parts(inputs)[part], inputs.starts)
        return (recurrence or self._recurrence)(rnn, features, self._parts(inputs)[part], inputs.starts)

    def _parts(self, inputs: PolicyInput) -> list[th.Tensor]:
        """The states of the actor's layers and, if it has any, of the critic's."""
        assert inputs.state is not None
        return list(th.split(inputs.state, self._sizes, dim=1))


def _outputs_step_by_step(rnn: Any, features: th.Tensor, state: th.Tensor, starts: th.Tensor) -> th.Tensor:
    return step_by_step(rnn, features, state, starts)[0]
