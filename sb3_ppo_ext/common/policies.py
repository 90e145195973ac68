"""The policies that the names ``"MlpPolicy"``, ``"CnnPolicy"`` and ``"MultiInputPolicy"`` stand for."""

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
from stable_baselines3.common.torch_layers import MlpExtractor
from stable_baselines3.common.type_aliases import Schedule
from torch import nn

from sb3_ppo_ext.common.errors import ArgumentError
from sb3_ppo_ext.common.rollout.actor_critic import ActorCritic, DirectActorCritic, SB3ActorCritic
from sb3_ppo_ext.common.rollout.adapters import direct_actor_critic, has_memory, refusal
from sb3_ppo_ext.common.rollout.data import PolicyInput
from sb3_ppo_ext.common.rollout.masked_prediction import predict_masked
from sb3_ppo_ext.common.update.step import reached
from sb3_ppo_ext.common.validation import as_schedule, check_bool, check_real


class ActorCriticPolicy(sb3.ActorCriticPolicy):
    """
    SB3's actor and critic, with a learning rate of the critic's own, bounds on the standard deviation and layer
    normalisation. Without these three it is SB3's, and either loads what the other saved.

    **The critic's learning rate** is for the parameters that the values depend on and the actions do not: they form a
    second group of the optimiser. What both depend on, such as a shared features extractor, follows the main rate;
    ``share_features_extractor=False`` gives the critic an extractor of its own, and thereby its rate.

    **The bounds** hold wherever actions are drawn: after each update of the actor, a component of ``log_std`` that is
    out of them is put on the nearest bound. (Within an update of several steps it may be out of them: nothing is drawn
    there, and putting it back would not fit into the optimiser's own kernel.)

    **Layer normalisation** (Ba et al. 2016, arXiv 1607.06450) stands in ``net_arch`` between each linear layer and its
    activation, in the actor and in the critic.

    :param observation_space: of the environment
    :param action_space: of the environment
    :param lr_schedule: the main learning rate
    :param critic_learning_rate: a number, a schedule (a function of the remaining progress, or words such as
        "lin_1e-3"), or None for the main one
    :param log_std_bounds: lowest and highest value of each component of ``log_std``, with Box actions; None: none
    :param layer_norm: whether the layers of ``net_arch`` are normalised
    :param kwargs: the further arguments of :class:`stable_baselines3.common.policies.ActorCriticPolicy`
    :raises ArgumentError: for an argument that is out of range or contradicts another
    """

    # Whether it was last trained with masks, and is to be asked with them. A policy's own file does not say.
    is_masked = False

    # SB3's arguments are passed on, not repeated: its classes differ in their defaults, and the next in line has them.
    def __init__(
        self,
        observation_space: spaces.Space[Any],
        action_space: spaces.Space[Any],
        lr_schedule: Schedule,
        *args: Any,
        critic_learning_rate: float | str | Schedule | None = None,
        log_std_bounds: tuple[float, float] | None = None,
        layer_norm: bool = False,
        **kwargs: Any,
    ) -> None:
        check_bool("layer_norm", layer_norm)
        self.layer_norm = layer_norm  # the networks are built by SB3's constructor
        if kwargs.get("squash_output") and not kwargs.get("use_sde"):
            raise ArgumentError(
                "squash_output=True is not allowed without gSDE: it must be False, or use_sde=True be given"
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
                "to normalise: net_arch must have one (for images it has none by default), or layer_norm be False"
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
        As SB3: an action for each observation. One that was last trained with masks finds them as the model's
        ``predict`` does.

        :param observation: of one environment, or one for each
        :param state: of a policy with a memory, what the last call returned
        :param episode_start: whether each observation is the first of its episode
        :param deterministic: whether to take the most likely action
        :param action_masks: which actions are allowed, shape ``(n_choices,)`` or ``(n_envs, n_choices)``
        :return: the actions, and the state to be handed over at the next step
        :raises ValueError: if masks are needed and there are none, or one is wrong
        """
        if action_masks is None and not self.is_masked:
            return super().predict(observation, state, episode_start, deterministic)
        return predict_masked(
            self, observation, state, episode_start, deterministic=deterministic, action_masks=action_masks
        )

    def _build_mlp_extractor(self) -> None:
        super()._build_mlp_extractor()
        if self.layer_norm:
            extractor = self.mlp_extractor
            extractor.policy_net, extractor.value_net = map(_normalized, (extractor.policy_net, extractor.value_net))

    def _split_optimizer(self, learning_rate: float) -> None:
        """Move what the critic alone depends on to a group of its own, also of an optimiser that a child has built."""
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
        self.set_training_mode(False)  # one sample would be no batch to normalise
        parameters = [parameter for parameter in self.parameters() if parameter.requires_grad]
        of_actor = set(reached(actor_critic.params(inputs), parameters))
        of_critic = [p for p in reached(actor_critic.values(inputs), parameters) if p not in of_actor]
        self.set_training_mode(was_training)
        for group in self.optimizer.param_groups:
            group["params"] = [p for p in group["params"] if p not in set(of_critic)]
        self.optimizer.add_param_group({"params": of_critic, "lr": learning_rate, "of_critic": True})

    def set_critic_learning_rate(self, learning_rate: float) -> None:
        """
        :param learning_rate: of the parameters that the critic alone depends on, until the next call
        :raises ArgumentError: if the optimiser was replaced by one that has no group for them
        """
        groups = [group for group in self.optimizer.param_groups if group.get("of_critic")]
        if not groups:
            raise ArgumentError(
                "critic_learning_rate is not allowed with an optimiser that was put in place of the policy's own: "
                'it must have a parameter group of the critic, marked by the key "of_critic"'
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
                f"log_std_bounds={bounds!r} is not allowed: it must be a pair, the lowest and the highest"
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
        """Put ``log_std`` back within its bounds, with a warning the first time that there was need to."""
        if self.log_std_bounds is None:
            return
        low, high = self.log_std_bounds
        outside = not self._log_std_was_bound and bool(((self.log_std < low) | (self.log_std > high)).any())
        self.log_std.clamp_(low, high)
        if outside:
            self._log_std_was_bound = True
            warnings.warn(
                f"log_std has reached its bounds, log_std_bounds={self.log_std_bounds}, and is kept there. This is "
                "said once",
                stacklevel=2,
            )

    def _get_constructor_parameters(self) -> dict[str, Any]:
        parameters = super()._get_constructor_parameters()
        parameters["share_features_extractor"] = self.share_features_extractor  # which SB3 forgets
        if self.critic_learning_rate is not None:
            parameters["critic_learning_rate"] = _picklable(self.critic_learning_rate)
        if self.log_std_bounds is not None:
            parameters["log_std_bounds"] = self.log_std_bounds
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
    """The layers, with a normalisation behind each that is linear."""
    with_norms: list[nn.Module] = []
    for layer in layers:
        with_norms.append(layer)
        if isinstance(layer, nn.Linear):
            with_norms.append(nn.LayerNorm(layer.out_features, device=layer.weight.device))
    return nn.Sequential(*with_norms)


def _zeros(space: spaces.Space[Any]) -> Any:
    """An observation in which all is zero. A sample would take a random number."""
    if isinstance(space, spaces.Dict):
        return {key: _zeros(subspace) for key, subspace in space.spaces.items()}
    return np.zeros(space.shape or (), space.dtype)


def _picklable(schedule: float | str | Schedule) -> float | str | Schedule:
    """What was given, or where it is a lambda or the like, which no policy file can hold, the number it begins with."""
    try:
        pickle.dumps(schedule)
    except (pickle.PicklingError, AttributeError, TypeError):
        assert callable(schedule)
        return float(schedule(1.0))
    return schedule


# What the algorithms ask of a policy, and what they give it.
_ASKED = {"forward": ("obs",), "evaluate_actions": ("obs", "actions"), "predict_values": ("obs",)}


def check_policy_class(policy_class: Any, given: str) -> None:
    """
    :param policy_class: what is to act and to be trained; of what is no class it cannot be told yet
    :param given: how the user gave it, for the error
    :raises ArgumentError: for one that takes masks, or has a memory, in another way than sb3-contrib's policies, or is
        no actor and critic
    """
    if not isinstance(policy_class, type) or issubclass(policy_class, contrib.RecurrentActorCriticPolicy):
        return
    if issubclass(policy_class, MaskableActorCriticPolicy) and not DirectActorCritic.overridden(policy_class):
        return
    for name, arguments in _ASKED.items():
        method = getattr(policy_class, name, None)
        if method is None:
            raise ArgumentError(
                f"{given} is not allowed: it has no {name}(); it must be an actor and a critic as Stable-Baselines3's "
                "ActorCriticPolicy is"
            )
        parameters = list(inspect.signature(method).parameters.values())[1 + len(arguments) :]
        if any(parameter.name == "action_masks" for parameter in parameters):
            raise ArgumentError(
                f"{given} is not allowed: its {name}() takes action_masks, which this algorithm does not pass on, so "
                "that no action would be masked; it must be a policy without masks, or one of sb3-contrib's with no "
                "method of its own, or sb3_contrib.MaskablePPO train it"
            )
        more = [p.name for p in parameters if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
        if more:
            raise ArgumentError(
                f"{given} is not allowed: its {name}() needs {' and '.join(more)} besides {' and '.join(arguments)}, "
                "which this algorithm does not know how to give; a policy with a memory must derive from "
                "sb3_contrib's RecurrentActorCriticPolicy"
            )


def keywords_of(*factories: Any) -> set[str]:
    """
    :param factories: classes or functions; anything else is passed over
    :return: the names of the arguments that they take or pass on to their base classes, and of those that the classes
        take which are the defaults of some
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
