"""The policies named ``"MlpLstmPolicy"``, ``"CnnLstmPolicy"`` and ``"MultiInputLstmPolicy"``."""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch as th
from sb3_contrib.common.recurrent import policies as contrib
from stable_baselines3.common import policies as sb3
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor, CombinedExtractor, NatureCNN
from torch import nn

from sb3_ppo_ext.common.errors import ArgumentError
from sb3_ppo_ext.common.policies import ActorCriticPolicy
from sb3_ppo_ext.common.rollout.data import PolicyInput
from sb3_ppo_ext.common.rollout.recurrence import check_states, process_sequence
from sb3_ppo_ext.common.validation import check_bool, check_int, check_one_of

RnnType = Literal["lstm", "gru"]

_REFUSED = ("batch_first", "bidirectional", "proj_size", "dtype")


class _ContribPolicy(contrib.RecurrentActorCriticPolicy):
    """sb3-contrib's recurrent policy, which may have a GRU."""

    _process_sequence = staticmethod(process_sequence)  # type: ignore[assignment]

    def __init__(self, *args: Any, rnn_type: RnnType = "lstm", **kwargs: Any) -> None:
        check_one_of("rnn_type", rnn_type, get_args(RnnType))
        for name in ("lstm_hidden_size", "n_lstm_layers"):
            if name in kwargs:
                check_int(name, kwargs[name], minimum=1)
        for name in ("shared_lstm", "enable_critic_lstm"):
            if name in kwargs:
                check_bool(name, kwargs[name])
        if kwargs.get("shared_lstm") and kwargs.get("enable_critic_lstm", True):
            raise ArgumentError(
                "shared_lstm=True is not allowed with enable_critic_lstm=True, which is its default: the critic uses "
                "the actor's recurrent layers, or has its own; one of the two must be False"
            )
        lstm_kwargs = kwargs.get("lstm_kwargs") or {}
        if not isinstance(lstm_kwargs, dict):
            raise ArgumentError(f"lstm_kwargs={lstm_kwargs!r} is not allowed: it must be a dict or None")
        for name in _REFUSED:
            if lstm_kwargs.get(name):
                raise ArgumentError(
                    f"lstm_kwargs={lstm_kwargs!r} is not allowed: {name} must be left out, because the memory goes "
                    "forward in time, its outputs are its state, and it computes in the dtype of the other layers"
                )
        super().__init__(*args, **kwargs)
        self.rnn_type = rnn_type
        n_features = self.vf_features_extractor.features_dim
        if rnn_type == "gru" or n_features != self.features_dim:
            if n_features != self.features_dim:
                self._resize_critic(n_features)
            if rnn_type == "gru":
                self.lstm_actor: Any = self._as_gru(self.lstm_actor)
                self.lstm_critic: Any = self._as_gru(self.lstm_critic)
            learning_rate = self.optimizer.param_groups[0]["lr"]
            optimizer_class: Any = self.optimizer_class
            self.optimizer = optimizer_class(self.parameters(), lr=learning_rate, **self.optimizer_kwargs)

    def _resize_critic(self, n_features: int) -> None:
        """Replace the critic's first layers, for the size of the observations that only the critic sees."""
        n_layers, _, hidden_size = self.lstm_hidden_state_shape
        if self.lstm_critic is not None:
            self.lstm_critic = nn.LSTM(n_features, hidden_size, num_layers=n_layers, **self.lstm_kwargs)
        else:
            self.critic = nn.Linear(n_features, hidden_size)

    def _as_gru(self, lstm: nn.LSTM | None) -> nn.GRU | None:
        if lstm is None:
            return None
        return nn.GRU(lstm.input_size, lstm.hidden_size, num_layers=lstm.num_layers, **self.lstm_kwargs)

    def _predict(  # type: ignore[override]  # as sb3-contrib has it
        self, observation: Any, lstm_states: Any, episode_starts: th.Tensor, deterministic: bool = False
    ) -> Any:
        check_states(self.lstm_actor, PolicyInput(observation).n_rows, lstm_states, episode_starts)
        return super()._predict(observation, lstm_states, episode_starts, deterministic)

    def _get_constructor_parameters(self) -> dict[str, Any]:
        n_layers, _, hidden_size = self.lstm_hidden_state_shape
        return {
            **super()._get_constructor_parameters(),
            "lstm_hidden_size": hidden_size,
            "n_lstm_layers": n_layers,
            "shared_lstm": self.shared_lstm,
            "enable_critic_lstm": self.enable_critic_lstm,
            "lstm_kwargs": self.lstm_kwargs,
            "rnn_type": self.rnn_type,
        }


class RecurrentActorCriticPolicy(ActorCriticPolicy, _ContribPolicy):
    """
    An actor and a critic with a memory: sb3-contrib's recurrent policy, with the additions of
    :class:`ActorCriticPolicy`. With ``rnn_type="lstm"``, each of the two loads files of the other.

    Features go through recurrent layers, and their outputs through the networks of ``net_arch``. By default the critic
    has its own recurrent layers. The memory is empty when an episode begins.

    ``predict(observation, state, episode_start)`` returns the actions and the new state, to pass to the next call: a
    tuple ``(h, c)`` of arrays of shape ``(n_lstm_layers, n_envs, lstm_hidden_size)``. A GRU has no cell state: both
    arrays are h.

    :param observation_space: of the environment
    :param action_space: of the environment
    :param lr_schedule: the main learning rate
    :param rnn_type: ``"lstm"`` (Hochreiter & Schmidhuber 1997) or ``"gru"`` (Cho et al. 2014)
    :param kwargs: further arguments of :class:`ActorCriticPolicy` and of sb3-contrib's policy: ``lstm_hidden_size``
        (256), ``n_lstm_layers`` (1), ``enable_critic_lstm`` (True: the critic has its own recurrent layers),
        ``shared_lstm`` (True: the critic uses the actor's layers without training them; then ``enable_critic_lstm``
        must be False) and ``lstm_kwargs`` (for the layers). If ``enable_critic_lstm`` and ``shared_lstm`` are both
        False, the critic has a linear layer instead, and no memory
    :raises ArgumentError: if an argument is out of range or contradicts another
    """

    def make_features_extractor(self) -> BaseFeaturesExtractor:
        extractor = super().make_features_extractor()
        # For MultiDiscrete observations SB3 counts with numpy's integers, which nn.LSTM refuses.
        extractor._features_dim = int(extractor._features_dim)
        return extractor


class RecurrentActorCriticCnnPolicy(RecurrentActorCriticPolicy):
    """:class:`RecurrentActorCriticPolicy` for images."""

    def __init__(
        self, *args: Any, features_extractor_class: type[BaseFeaturesExtractor] = NatureCNN, **kwargs: Any
    ) -> None:
        super().__init__(*args, features_extractor_class=features_extractor_class, **kwargs)


class RecurrentMultiInputActorCriticPolicy(RecurrentActorCriticPolicy):
    """:class:`RecurrentActorCriticPolicy` for Dict observations."""

    def __init__(
        self, *args: Any, features_extractor_class: type[BaseFeaturesExtractor] = CombinedExtractor, **kwargs: Any
    ) -> None:
        super().__init__(*args, features_extractor_class=features_extractor_class, **kwargs)


RECURRENT_POLICY_ALIASES: dict[str, type[sb3.BasePolicy]] = {
    "MlpLstmPolicy": RecurrentActorCriticPolicy,
    "CnnLstmPolicy": RecurrentActorCriticCnnPolicy,
    "MultiInputLstmPolicy": RecurrentMultiInputActorCriticPolicy,
}
