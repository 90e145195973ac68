"""The policies named ``"MlpPolicy"``, ``"CnnPolicy"`` and ``"MultiInputPolicy"``."""

from __future__ import annotations

import inspect
import pickle
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch as th
from gymnasium import spaces
from sb3_contrib.common.maskable.policies import MaskableActorCriticPolicy
from sb3_contrib.common.recurrent import policies as contrib
from stable_baselines3.common import policies as sb3
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor, MlpExtractor
from stable_baselines3.common.type_aliases import Schedule
from torch import nn

from sb3_ppo_ext.common.errors import ArgumentError
from sb3_ppo_ext.common.rollout.actor_critic import ActorCritic, DirectActorCritic, SB3ActorCritic
from sb3_ppo_ext.common.rollout.adapters import direct_actor_critic, has_memory, refusal
from sb3_ppo_ext.common.rollout.data import PolicyInput
from sb3_ppo_ext.common.rollout.masked_prediction import predict_masked
from sb3_ppo_ext.common.rollout.normalization import NormalizedObservations
from sb3_ppo_ext.common.rollout.observation_groups import ObservationGroup, groups_of
from sb3_ppo_ext.common.update.step import reached
from sb3_ppo_ext.common.validation import as_schedule, check_bool, check_real


class ActorCriticPolicy(sb3.ActorCriticPolicy):
    """
    SB3's actor-critic policy with five additions: a separate learning rate for the critic, bounds on the standard
    deviation, observations for the critic alone, normalised observations and layer normalisation. Without them it is
    SB3's policy, and each loads files of the other.

    **The critic's learning rate** applies to parameters that only the critic uses; they form a second parameter group
    of the optimiser. Shared parameters, such as those of a shared features extractor, follow the main learning rate.
    With ``share_features_extractor=False`` the critic has its own extractor, which then follows the critic's rate.

    **The bounds** hold whenever actions are drawn: after each update of the actor, a component of ``log_std`` outside
    of its bounds is set to the nearest bound. (Between the gradient steps of an update it may be outside: no actions
    are drawn there, and the optimiser's fused kernel cannot clip it.)

    **Observations for the critic** (Pinto et al. 2018, arXiv 1710.06542) help where a simulator knows more than the
    actor will: the critic sees one key of Dict observations, and the actor all others, each with its own extractor.
    After training, ``predict`` needs only the actor's part.

    **Normalised observations**: their statistics are updated with each rollout that the policy learns from, and are
    saved with the policy. ``predict`` takes observations as the environment gives them.

    **Layer normalisation** (Ba et al. 2016, arXiv 1607.06450) is inserted in ``net_arch`` between each linear layer and
    its activation, in the actor and in the critic.

    :param observation_space: of the environment
    :param action_space: of the environment
    :param lr_schedule: the main learning rate
    :param critic_learning_rate: a number, a schedule (a function of the remaining progress, or a string such as
        "lin_1e-3"), or None for the main learning rate
    :param log_std_bounds: lowest and highest value of each component of ``log_std``, with Box actions; None: no bounds
    :param critic_observation_key: key of Dict observations that only the critic sees; the critic sees no other key.
        None: both see all observations
    :param normalize_observations: whether the policy normalises observations by the mean and the variance of its
        training observations, and clips them to +-10, as ``VecNormalize`` does
    :param layer_norm: whether to normalise the layers of ``net_arch``
    :param kwargs: further arguments of :class:`stable_baselines3.common.policies.ActorCriticPolicy`
    :raises ArgumentError: if an argument is out of range or contradicts another
    """

    # Whether the policy was last trained with action masks, and predicts with them. policy.save() does not store this.
    is_masked = False

    # SB3's arguments are passed on, not repeated, because the defaults differ between SB3's classes.
    def __init__(
        self,
        observation_space: spaces.Space[Any],
        action_space: spaces.Space[Any],
        lr_schedule: Schedule,
        *args: Any,
        critic_learning_rate: float | str | Schedule | None = None,
        log_std_bounds: tuple[float, float] | None = None,
        critic_observation_key: str | None = None,
        normalize_observations: bool = False,
        layer_norm: bool = False,
        **kwargs: Any,
    ) -> None:
        check_bool("layer_norm", layer_norm)
        self.layer_norm = layer_norm  # the networks are built by SB3's constructor
        check_bool("normalize_observations", normalize_observations)
        self.normalize_observations = normalize_observations
        self.critic_observation_key = critic_observation_key
        if critic_observation_key is not None:
            self._groups = groups_of(observation_space, critic_observation_key)
            if kwargs.setdefault("share_features_extractor", False):
                raise ArgumentError(
                    "share_features_extractor=True is not allowed with "
                    f"critic_observation_key={critic_observation_key!r}: the actor and the critic see different "
                    "observations; it must be False, or be left out"
                )
        if kwargs.get("squash_output") and not kwargs.get("use_sde"):
            raise ArgumentError(
                "squash_output=True is not allowed without gSDE: it must be False, or use_sde must be True"
            )
        super().__init__(observation_space, action_space, lr_schedule, *args, **kwargs)
        arch = self.net_arch
        if isinstance(arch, dict) and type(self.mlp_extractor) is MlpExtractor and not arch.keys() <= {"pi", "vf"}:
            raise ArgumentError(
                f"net_arch={arch!r} is not allowed: its keys must be 'pi' (the actor) and 'vf' (the critic)"
            )
        if layer_norm and not any(isinstance(module, nn.LayerNorm) for module in self.mlp_extractor.modules()):
            raise ArgumentError(
                f"layer_norm=True is not allowed with net_arch={arch!r} of {type(self).__name__}, which has no layer "
                "to normalise: net_arch must have one (for images it has none by default), or layer_norm must be False"
            )
        self.critic_learning_rate = critic_learning_rate
        if critic_learning_rate is not None:
            self._split_optimizer(as_schedule("critic_learning_rate", critic_learning_rate, may_be_zero=True)(1.0))
        self.log_std_bounds = log_std_bounds if log_std_bounds is None else self._checked_bounds(log_std_bounds)
        self._log_std_was_bound = False

    def predict(
        self,
        observation: np.ndarray | dict[str, np.ndarray],
        state: tuple[np.ndarray, ...] | None = None,
        episode_start: np.ndarray | None = None,
        deterministic: bool = False,
        action_masks: np.ndarray | None = None,
    ) -> tuple[np.ndarray, tuple[np.ndarray, ...] | None]:
        """
        Choose an action for each observation, as SB3 does. A policy that was last trained with action masks finds them
        as the model's ``predict`` does.

        :param observation: one observation, or one for each environment
        :param state: for a policy with a memory, the state that the last call returned
        :param episode_start: whether each observation is the first of its episode
        :param deterministic: whether to take the most likely action
        :param action_masks: which actions are allowed, shape ``(n_choices,)`` or ``(n_envs, n_choices)``
        :return: the actions, and the state to pass to the next call
        :raises ValueError: if the policy needs masks and finds none, or if a mask is wrong
        """
        if action_masks is None and not self.is_masked:
            return super().predict(observation, state, episode_start, deterministic)
        return predict_masked(
            self, observation, state, episode_start, deterministic=deterministic, action_masks=action_masks
        )

    def make_features_extractor(self) -> BaseFeaturesExtractor:
        if self.critic_observation_key is None:
            extractor = super().make_features_extractor()
            return NormalizedObservations(extractor) if self.normalize_observations else extractor
        of_actor, of_critic = self._groups
        group = of_actor if self.features_extractor is None else of_critic  # SB3 makes the actor's first
        extractor = self.features_extractor_class(group, **self.features_extractor_kwargs)
        if self.normalize_observations:
            extractor = NormalizedObservations(extractor)
        return ObservationGroup(extractor, list(group.spaces))

    def _build_mlp_extractor(self) -> None:
        super()._build_mlp_extractor()
        if self.critic_observation_key is not None and not has_memory(self):  # the critic's features have another size
            of_critic = MlpExtractor(
                self.vf_features_extractor.features_dim, self.net_arch, self.activation_fn, self.device
            )
            self.mlp_extractor.value_net = of_critic.value_net
            self.mlp_extractor.latent_dim_vf = of_critic.latent_dim_vf
        if self.layer_norm:
            extractor = self.mlp_extractor
            extractor.policy_net, extractor.value_net = map(_normalized, (extractor.policy_net, extractor.value_net))

    def _split_optimizer(self, learning_rate: float) -> None:
        """Move the parameters that only the critic uses to a second group of the optimiser."""
        reason = refusal(self)
        if reason is not None and has_memory(self):
            raise ArgumentError(f"critic_learning_rate is not allowed with {type(self).__name__}, which {reason}")
        actor_critic: ActorCritic = (
            direct_actor_critic(self) if reason is None else SB3ActorCritic(self, with_params=False)
        )
        inputs = PolicyInput(self.obs_to_tensor(_zeros(self.observation_space))[0])
        if actor_critic.n_state:
            inputs = inputs._replace(state=th.zeros(1, actor_critic.n_state), starts=th.zeros(1))
        was_training = self.training
        self.set_training_mode(False)  # batch normalisation cannot train on one sample
        parameters = [parameter for parameter in self.parameters() if parameter.requires_grad]
        of_actor = set(reached(actor_critic.params(inputs), parameters))
        of_critic = [p for p in reached(actor_critic.values(inputs), parameters) if p not in of_actor]
        self.set_training_mode(was_training)
        for group in self.optimizer.param_groups:
            group["params"] = [p for p in group["params"] if p not in set(of_critic)]
        self.optimizer.add_param_group({"params": of_critic, "lr": learning_rate, "of_critic": True})

    def set_critic_learning_rate(self, learning_rate: float) -> None:
        """
        :param learning_rate: learning rate of the parameters that only the critic uses, until the next call
        :raises ArgumentError: if the optimiser was replaced by another without a group for them
        """
        groups = [group for group in self.optimizer.param_groups if group.get("of_critic")]
        if not groups:
            raise ArgumentError(
                "critic_learning_rate is not allowed with an optimiser that replaced the policy's own, unless it has a "
                'parameter group for the critic, marked by the key "of_critic"'
            )
        for group in groups:
            group["lr"] = learning_rate

    def _checked_bounds(self, bounds: Any) -> tuple[float, float]:
        if not isinstance(getattr(self, "log_std", None), nn.Parameter):
            raise ArgumentError(
                f"log_std_bounds={bounds!r} is not allowed with {type(self.action_space).__name__} actions: it must be "
                "None, as their distribution has no log_std"
            )
        if not isinstance(bounds, (tuple, list)) or len(bounds) != 2:
            raise ArgumentError(
                f"log_std_bounds={bounds!r} is not allowed: it must be a pair, the lowest and the highest value"
            )
        low, high = bounds
        check_real("log_std_bounds[0]", low, finite=False)
        check_real("log_std_bounds[1]", high, at_least=float(low), finite=False)
        if not low <= self.log_std_init <= high:
            raise ArgumentError(
                f"log_std_init={self.log_std_init!r} is not allowed with log_std_bounds={bounds!r}: "
                "it must be within the bounds"
            )
        return float(low), float(high)

    @th.no_grad()
    def project(self) -> None:
        """Put ``log_std`` back within its bounds, with a warning the first time that it was outside."""
        if self.log_std_bounds is None:
            return
        low, high = self.log_std_bounds
        outside = not self._log_std_was_bound and bool(((self.log_std < low) | (self.log_std > high)).any())
        self.log_std.clamp_(low, high)
        if outside:
            self._log_std_was_bound = True
            warnings.warn(
                f"log_std has reached its bounds, log_std_bounds={self.log_std_bounds}, and is kept there. This "
                "warning is not repeated",
                stacklevel=2,
            )

    def _get_constructor_parameters(self) -> dict[str, Any]:
        parameters = super()._get_constructor_parameters()
        parameters["share_features_extractor"] = self.share_features_extractor  # SB3 does not store it
        if self.critic_learning_rate is not None:
            parameters["critic_learning_rate"] = _picklable(self.critic_learning_rate)
        if self.log_std_bounds is not None:
            parameters["log_std_bounds"] = self.log_std_bounds
        if self.normalize_observations:
            parameters["normalize_observations"] = True
        if self.critic_observation_key is not None:
            parameters["critic_observation_key"] = self.critic_observation_key
        if self.layer_norm:
            parameters["layer_norm"] = True
        return parameters


class ActorCriticCnnPolicy(ActorCriticPolicy, sb3.ActorCriticCnnPolicy):
    """:class:`ActorCriticPolicy` for images."""


class MultiInputActorCriticPolicy(ActorCriticPolicy, sb3.MultiInputActorCriticPolicy):
    """:class:`ActorCriticPolicy` for Dict observations."""


POLICY_ALIASES: dict[str, type[sb3.BasePolicy]] = {
    "MlpPolicy": ActorCriticPolicy,
    "CnnPolicy": ActorCriticCnnPolicy,
    "MultiInputPolicy": MultiInputActorCriticPolicy,
}


def _normalized(layers: nn.Sequential) -> nn.Sequential:
    """The layers, with a layer normalisation after each linear layer."""
    with_norms: list[nn.Module] = []
    for layer in layers:
        with_norms.append(layer)
        if isinstance(layer, nn.Linear):
            with_norms.append(nn.LayerNorm(layer.out_features, device=layer.weight.device))
    return nn.Sequential(*with_norms)


def _zeros(space: spaces.Space[Any]) -> Any:
    """An observation of zeros. Sampling one would change the state of a random generator."""
    if isinstance(space, spaces.Dict):
        return {key: _zeros(subspace) for key, subspace in space.spaces.items()}
    return np.zeros(space.shape or (), space.dtype)


def _picklable(schedule: float | str | Schedule) -> float | str | Schedule:
    """The schedule itself, or its first value if it cannot be pickled into a policy file, such as a lambda."""
    try:
        pickle.dumps(schedule)
    except (pickle.PicklingError, AttributeError, TypeError):
        assert callable(schedule)
        return float(schedule(1.0))
    return schedule


# The methods that the algorithms call on a policy, and the arguments that they pass.
_ASKED = {"forward": ("obs",), "evaluate_actions": ("obs", "actions"), "predict_values": ("obs",)}


def check_policy_class(policy_class: Any, given: str) -> None:
    """
    :param policy_class: class of the policy; a function in its place is not checked
    :param given: the argument as the user gave it, for the message
    :raises ArgumentError: if the class is no actor-critic policy, or takes masks or has a memory in another way than
        sb3-contrib's policies
    """
    if not isinstance(policy_class, type) or issubclass(policy_class, contrib.RecurrentActorCriticPolicy):
        return
    if issubclass(policy_class, MaskableActorCriticPolicy) and not DirectActorCritic.overridden(policy_class):
        return
    for name, arguments in _ASKED.items():
        method = getattr(policy_class, name, None)
        if method is None:
            raise ArgumentError(
                f"{given} is not allowed: it has no {name}(); it must be an actor-critic policy, such as "
                "Stable-Baselines3's ActorCriticPolicy"
            )
        parameters = list(inspect.signature(method).parameters.values())[1 + len(arguments) :]
        if any(parameter.name == "action_masks" for parameter in parameters):
            raise ArgumentError(
                f"{given} is not allowed: its {name}() takes action_masks, which this algorithm does not pass on, so "
                "no action would be masked. Use a policy without masks, an unchanged policy of sb3-contrib, or train "
                "it with sb3_contrib.MaskablePPO"
            )
        more = [p.name for p in parameters if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
        if more:
            raise ArgumentError(
                f"{given} is not allowed: its {name}() needs {' and '.join(more)} besides {' and '.join(arguments)}, "
                "which this algorithm does not pass; a policy with a memory must derive from sb3_contrib's "
                "RecurrentActorCriticPolicy"
            )


def keywords_of(*factories: Any) -> set[str]:
    """
    :param factories: classes or functions; anything else is ignored
    :return: the names of their arguments and of their base classes' arguments; and of the arguments of each class that
        is the default of one of these, such as a features extractor
    """
    names: set[str] = set()
    for parameter in _parameters_of(*factories):
        names.add(parameter.name)
        names.update(
            inner.name for inner in _parameters_of(parameter.default) if parameter.default is not parameter.empty
        )
    return names - {"self"}


def _parameters_of(*factories: Any) -> Iterator[inspect.Parameter]:
    for factory in factories:
        for base in inspect.getmro(factory) if inspect.isclass(factory) else [factory]:
            function = vars(base).get("__init__") if inspect.isclass(base) else base
            if inspect.isfunction(function):
                yield from inspect.signature(function).parameters.values()
