"""How the core talks to a policy: observations in, distribution parameters and values out."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch as th
from gymnasium import spaces
from stable_baselines3.common import distributions as sb3
from stable_baselines3.common.policies import ActorCriticPolicy, BasePolicy
from stable_baselines3.common.preprocessing import is_image_space, preprocess_obs
from stable_baselines3.common.torch_layers import FlattenExtractor, MlpExtractor, NatureCNN
from stable_baselines3.common.type_aliases import PyTorchObs
from torch import nn
from torch.nn import functional as F  # noqa: N812  (the name every torch user knows)

from sb3_ppo_ext.common.distributions import Family, Gaussian, family_of_policy, family_of_space, params_of
from sb3_ppo_ext.common.rollout.purity import has_hooks, impurity


class Evaluation(NamedTuple):
    """
    What the present policy says of a batch of observations and of the actions that were taken there.

    :param values: shape ``(batch,)``
    :param log_prob: log-probability of the actions, shape ``(batch,)``
    :param entropy: shape ``(batch,)``; ``None`` where there is no closed form
    :param params: distribution parameters, shape ``(batch, n_params)``, or ``(batch, 0)`` if nobody wants them
    """

    values: th.Tensor
    log_prob: th.Tensor
    entropy: th.Tensor | None
    params: th.Tensor


class ActorEvaluation(NamedTuple):
    """
    What the present actor says of a batch of actions.

    :param log_prob: log-probability of the actions, shape ``(batch,)``
    :param entropy: shape ``(batch,)``; ``None`` where there is no closed form
    :param params: distribution parameters, shape ``(batch, n_params)``, or ``(batch, 0)`` if nobody wants them
    """

    log_prob: th.Tensor
    entropy: th.Tensor | None
    params: th.Tensor


class Kept(NamedTuple):
    """
    What is kept of a rollout's evaluation. Where drawing an action already yields some of it, that is not computed
    again; the rest is None until the rollout is full.

    :param values: shape ``(batch,)``
    :param log_prob: shape ``(batch,)``
    :param params: shape ``(batch, n_params)``
    """

    values: th.Tensor
    log_prob: th.Tensor | None
    params: th.Tensor | None


class ActorCritic(Protocol):
    """A policy as the core sees it. Observations are tensors (or dicts of them) as ``obs_as_tensor`` makes them."""

    policy: ActorCriticPolicy
    is_pure: bool
    """Whether a rollout may be evaluated after it is full: nothing that a pass computes depends on other passes."""

    @property
    def family(self) -> Family | None:
        """The formulas of its distributions; None for a distribution of the user's own."""
        ...

    def act(self, obs: PyTorchObs) -> tuple[th.Tensor, Kept | None]:
        """
        Draw an action for each observation, as SB3 draws it; without gradients.

        :param obs: a batch of observations
        :return: actions, shape ``(batch, action_dim)`` or what reshapes to it, and what else the pass yielded
        """
        ...

    def evaluate_actions(self, obs: PyTorchObs, actions: th.Tensor) -> Evaluation:
        """
        :param obs: a batch of observations
        :param actions: shape ``(batch, action_dim)``, as the rollout buffer holds them
        """
        ...

    def evaluate_actor(self, obs: PyTorchObs, actions: th.Tensor) -> ActorEvaluation:
        """
        :meth:`evaluate_actions` without the values.

        :param obs: a batch of observations
        :param actions: shape ``(batch, action_dim)``, as the rollout buffer holds them
        """
        ...

    def params(self, obs: PyTorchObs) -> th.Tensor:
        """Distribution parameters alone, shape ``(batch, n_params)``."""
        ...

    def values(self, obs: PyTorchObs) -> th.Tensor:
        """Values alone, shape ``(batch,)``."""
        ...


class DirectActorCritic:
    """
    Runs the networks of an SB3 policy directly, and draws actions with the same torch calls as SB3, but builds no
    distribution object and computes only what is asked for: an action costs a pass through the actor alone.

    Only for a policy that it :meth:`supports`. It owns nothing and is made anew for each rollout and each update, so a
    layer that a user replaces is seen.

    Where a network is not known to be pure (see :mod:`sb3_ppo_ext.common.rollout.purity`), the pass that draws an
    action also gives the value and the distribution, as in SB3; and the passes through each module are as many as SB3
    makes.

    :param policy: the policy
    :param with_params: whether :meth:`evaluate_actions` also gives the distribution parameters
    """

    _CALLS = (
        "forward",
        "evaluate_actions",
        "get_distribution",
        "predict_values",
        "extract_features",
        "_get_action_dist_from_latent",
        "reset_noise",
    )

    def __init__(self, policy: ActorCriticPolicy, *, with_params: bool = True) -> None:
        self.policy = policy
        self._with_params = with_params
        self.family: Family = family_of_space(policy.action_space, squash_output=policy.squash_output)
        self._like = next(policy.parameters()).new_empty(0)  # dtype and device
        self._action_dist: Any = policy.action_dist  # SB3's types do not say what only gSDE's has
        self._is_gaussian = isinstance(policy.action_dist, sb3.DiagGaussianDistribution)
        self._is_sde = isinstance(policy.action_dist, sb3.StateDependentNoiseDistribution)
        self._preprocess = _preprocessor(policy.observation_space, policy.normalize_images)
        self._preprocess_batch = _preprocessor(policy.observation_space, policy.normalize_images, for_batches=True)
        self.is_pure = impurity(policy) is None
        shares_features = policy.share_features_extractor and any(True for _ in policy.features_extractor.parameters())
        self._evaluates_each_step = shares_features or not self.is_pure
        mlp: Any = policy.mlp_extractor
        is_plain = type(mlp) is MlpExtractor
        self._actor = _unrolled_extractor(policy, policy.pi_features_extractor)
        self._critic = _unrolled_extractor(policy, policy.vf_features_extractor)
        self._actor_head = _unrolled(mlp.policy_net) if is_plain else [mlp.forward_actor]
        self._critic_head = _unrolled(mlp.value_net) if is_plain else [mlp.forward_critic]
        self._action_net = _unrolled(policy.action_net)
        self._value_net = _unrolled(policy.value_net)

    @classmethod
    def supports(cls, policy: BasePolicy) -> bool:
        """Whether calling the networks of a policy one by one does all that SB3's own methods do, overriding none."""
        return cls.refusal(policy) is None

    @classmethod
    def refusal(cls, policy: BasePolicy) -> str | None:
        """
        :param policy: to be run
        :return: why the networks must be run by the policy's methods, as the end of a sentence; None if they need not
        """
        if not isinstance(policy, ActorCriticPolicy):
            return "is no actor-critic policy of Stable-Baselines3"
        if any(
            name in vars(policy) or getattr(type(policy), name) is not getattr(ActorCriticPolicy, name)
            for name in cls._CALLS
        ):
            return "overrides methods of Stable-Baselines3's ActorCriticPolicy"
        if type(policy.action_dist) not in _SB3_DISTRIBUTIONS or family_of_policy(policy) is None:
            return f"has a distribution of its own, {type(policy.action_dist).__name__}"
        if has_hooks(policy) or has_hooks(policy.mlp_extractor):
            return "has hooks on itself or on its mlp_extractor"
        extractor = policy.mlp_extractor
        if type(extractor) is not MlpExtractor and getattr(extractor, "is_pure", False) is not True:
            return f"has an mlp_extractor of its own, {type(extractor).__name__}, that is not declared pure"
        return None

    @th.inference_mode()
    def act(self, obs: PyTorchObs) -> tuple[th.Tensor, Kept | None]:
        """
        Draw an action for each observation: by the actor alone, or together with values and parameters, where a second
        pass through the extractor would cost more than it saves, or would not give the same.
        """
        if self.is_pure:
            return self.act_by(obs, self.noise(n_rows(obs)))
        latent_pi, latent_vf = self._latents(self._preprocess(obs))  # which may draw random numbers before the action
        out = _apply(self._action_net, latent_pi)
        kept = Kept(self._values(latent_vf), None, self._params_by(latent_pi, out))
        return self._drawn_by(latent_pi, out, self.noise(n_rows(obs))), kept

    def noise(self, n: int) -> th.Tensor:
        """
        What :meth:`act_by` makes actions of: random numbers, drawn as SB3 draws them; for gSDE the exploration
        matrices, drawn before and kept for many steps.

        :param n: number of actions
        """
        if not self._is_sde:
            return self.family.noise(n, self._like)
        matrices: th.Tensor = self._action_dist.exploration_matrices
        one_each = n > 1 and n == matrices.shape[0]
        return (matrices if one_each else self._action_dist.exploration_mat).detach()

    def act_by(self, obs: PyTorchObs, noise: th.Tensor) -> tuple[th.Tensor, Kept | None]:
        """
        :meth:`act`, a function of random numbers.

        :param obs: a batch of observations
        :param noise: from :meth:`noise`
        """
        if self._evaluates_each_step:
            latent_pi, latent_vf = self._latents(self._preprocess(obs))
            kept = Kept(self._values(latent_vf), None, self._params(latent_pi))
            return self._drawn(latent_pi, noise), kept
        return self._drawn(self._latent_pi(self._preprocess(obs)), noise), None

    def evaluate_actions(self, obs: PyTorchObs, actions: th.Tensor) -> Evaluation:
        latent_pi, latent_vf = self._latents(self._preprocess_batch(obs))
        values = self._values(latent_vf)
        if self._is_gaussian and not self._with_params:
            assert isinstance(self.family, Gaussian)
            mean = _apply(self._action_net, latent_pi)
            log_prob, entropy = self.family.log_prob_and_entropy(mean, self.policy.log_std, actions)
            return Evaluation(values, log_prob, entropy, mean[:, :0])
        params = self._params(latent_pi)
        return Evaluation(values, self.family.log_prob(params, actions), self.family.entropy(params), params)

    def evaluate_actor(self, obs: PyTorchObs, actions: th.Tensor) -> ActorEvaluation:
        params = self.params(obs)
        return ActorEvaluation(self.family.log_prob(params, actions), self.family.entropy(params), params)

    def params(self, obs: PyTorchObs) -> th.Tensor:
        return self._params(self._latent_pi(self._preprocess_batch(obs)))

    def values(self, obs: PyTorchObs) -> th.Tensor:
        features = _apply(self._critic, self._preprocess_batch(obs))
        return self._values(_apply(self._critic_head, features))

    def _latent_pi(self, inputs: Any) -> th.Tensor:
        return _apply(self._actor_head, _apply(self._actor, inputs))

    def _latents(self, inputs: Any) -> tuple[th.Tensor, th.Tensor]:
        features = _apply(self._actor, inputs)
        vf_features = features if self.policy.share_features_extractor else _apply(self._critic, inputs)
        return _apply(self._actor_head, features), _apply(self._critic_head, vf_features)

    def _values(self, latent_vf: th.Tensor) -> th.Tensor:
        return _apply(self._value_net, latent_vf).flatten()

    def _params(self, latent_pi: th.Tensor) -> th.Tensor:
        return self._params_by(latent_pi, _apply(self._action_net, latent_pi))

    def _params_by(self, latent_pi: th.Tensor, out: th.Tensor) -> th.Tensor:
        if self._is_gaussian:
            return th.cat((out, self.policy.log_std.exp().expand_as(out)), dim=1)
        if self._is_sde:
            action_dist = self._action_dist
            features = latent_pi if action_dist.learn_features else latent_pi.detach()
            variance = features.square() @ action_dist.get_std(self.policy.log_std).square()
            return th.cat((out, (variance + action_dist.epsilon).sqrt()), dim=1)
        return out

    def _drawn(self, latent_pi: th.Tensor, noise: th.Tensor) -> th.Tensor:
        return self._drawn_by(latent_pi, _apply(self._action_net, latent_pi), noise)

    def _drawn_by(self, latent_pi: th.Tensor, out: th.Tensor, noise: th.Tensor) -> th.Tensor:
        if self._is_gaussian:  # what the family draws, without assembling its parameters first
            return out + noise * self.policy.log_std.exp()
        if self._is_sde:
            features = latent_pi if noise.dim() == 2 else latent_pi.unsqueeze(dim=1)
            action = out + (features @ noise).view_as(out)
            return action if self._action_dist.bijector is None else action.tanh()
        return self.family.draw(out, noise)


Layer = Callable[[th.Tensor], th.Tensor]


_SB3_DISTRIBUTIONS = (
    sb3.DiagGaussianDistribution,
    sb3.StateDependentNoiseDistribution,
    sb3.CategoricalDistribution,
    sb3.MultiCategoricalDistribution,
    sb3.BernoulliDistribution,
)


def _preprocessor(
    space: spaces.Space[Any], normalize_images: bool, *, for_batches: bool = False
) -> Callable[[Any], Any]:
    """
    What SB3's ``preprocess_obs`` does to the observations of a space. That looks at the space anew each time, which
    costs more than a small layer and cannot be compiled.

    :param space: of the observations
    :param normalize_images: whether bytes are divided by 255
    :param for_batches: whether images may be laid out channels last, in which the CPU's convolutions are faster on
        large batches; the results then differ in the last bits
    """
    if isinstance(space, spaces.Dict):
        parts = {
            key: _preprocessor(part, normalize_images, for_batches=for_batches) for key, part in space.spaces.items()
        }
        return lambda obs: {key: part(obs[key]) for key, part in parts.items()}
    if isinstance(space, spaces.Box) and normalize_images and is_image_space(space):
        # Bytes divided by a number are floats; there is no second large tensor on the way.
        return (lambda obs: _channels_last(obs) / 255.0) if for_batches else (lambda obs: obs / 255.0)
    if isinstance(space, (spaces.Box, spaces.MultiBinary)):
        return lambda obs: obs.float()
    if isinstance(space, spaces.Discrete):
        n = int(space.n)
        return lambda obs: F.one_hot(obs.long(), num_classes=n).float()
    return lambda obs: preprocess_obs(obs, space)  # MultiDiscrete, or the error that SB3 raises


def _channels_last(images: th.Tensor) -> th.Tensor:
    return images.contiguous(memory_format=th.channels_last) if images.device.type == "cpu" else images


def n_rows(obs: PyTorchObs) -> int:
    """The number of observations in a batch of them."""
    return (next(iter(obs.values())) if isinstance(obs, dict) else obs).shape[0]


def _apply(layers: list[Layer], x: th.Tensor) -> th.Tensor:
    for layer in layers:
        x = layer(x)
    return x


def _unrolled_extractor(policy: ActorCriticPolicy, extractor: nn.Module) -> list[Layer]:
    """A features extractor as a list of functions: of none, if the preprocessed observations are flat already."""
    if has_hooks(extractor):
        return [extractor]
    if type(extractor) is FlattenExtractor and len(policy.observation_space.shape or ()) == 1:
        return []
    if type(extractor) is NatureCNN:
        return _unrolled(extractor.cnn) + _unrolled(extractor.linear)
    return [extractor]


def _unrolled(module: nn.Module) -> list[Layer]:
    """
    A module as a list of functions. Calling a torch module costs as much as a small layer's arithmetic; a linear layer
    or an activation without hooks is replaced by the function that it calls, anything else stays the module that it is.
    """
    if has_hooks(module):
        return [module]
    if type(module) is nn.Sequential:
        children = list(module)
        return [
            function
            for child, before in zip(children, [None, *children], strict=False)
            for function in ([th.relu_] if _may_overwrite(child, before) else _unrolled(child))
        ]
    if type(module) is nn.Linear:
        return [partial(_linear, module)]
    if type(module) is nn.Tanh:
        return [th.tanh]
    return [module]


def _may_overwrite(module: nn.Module, before: nn.Module | None) -> bool:
    """Whether a module is a ReLU whose input nobody else has: after a large convolution a copy is a matter of time."""
    is_fresh = before is not None and type(before) in (nn.Conv2d, nn.Linear) and not has_hooks(before)
    return is_fresh and type(module) is nn.ReLU and not has_hooks(module)


def _linear(module: nn.Linear, x: th.Tensor) -> th.Tensor:
    # The parameters are looked up at the call, so that torch.func.functional_call can swap them.
    return F.linear(x, module.weight, module.bias)


class SB3ActorCritic:
    """
    Asks a policy by SB3's public methods only, as many times as SB3 does. For a policy of the user's own that overrides
    some of them, has a distribution of its own or has hooks.

    :param policy: the policy
    :param with_params: whether the distribution parameters are wanted, of the pass that gives the log-probability too
    """

    is_pure = False

    def __init__(self, policy: ActorCriticPolicy, *, with_params: bool) -> None:
        self.policy = policy
        self.family: Family | None = family_of_policy(policy)
        self._with_params = with_params
        self._is_discrete = isinstance(policy.action_space, spaces.Discrete)

    @th.no_grad()
    def act(self, obs: PyTorchObs) -> tuple[th.Tensor, Kept | None]:
        actions, values, log_prob = self.policy(obs)
        return actions, Kept(
            values.flatten(), log_prob, self._params_of_last_pass(log_prob) if self._with_params else None
        )

    def evaluate_actions(self, obs: PyTorchObs, actions: th.Tensor) -> Evaluation:
        if self._is_discrete:
            actions = actions.long().flatten()
        values, log_prob, entropy = self.policy.evaluate_actions(obs, actions)
        return Evaluation(values.flatten(), log_prob, entropy, self._params_of_last_pass(log_prob))

    def evaluate_actor(self, obs: PyTorchObs, actions: th.Tensor) -> ActorEvaluation:
        _, log_prob, entropy, params = self.evaluate_actions(obs, actions)
        return ActorEvaluation(log_prob, entropy, params)

    def _params_of_last_pass(self, log_prob: th.Tensor) -> th.Tensor:
        # SB3's policies have one distribution object, which each pass sets anew.
        return params_of(self.policy.action_dist) if self._with_params else log_prob.new_empty((len(log_prob), 0))

    def params(self, obs: PyTorchObs) -> th.Tensor:
        return params_of(self.policy.get_distribution(obs))

    def values(self, obs: PyTorchObs) -> th.Tensor:
        return self.policy.predict_values(obs).flatten()
