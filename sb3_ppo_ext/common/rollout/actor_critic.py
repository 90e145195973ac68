"""How the core talks to a policy: observations in, distribution parameters and values out."""

from __future__ import annotations

from typing import Any, Protocol

import torch as th
from gymnasium import spaces
from sb3_contrib.common.maskable import distributions as maskable
from sb3_contrib.common.maskable.policies import MaskableActorCriticPolicy
from stable_baselines3.common import distributions as sb3
from stable_baselines3.common.policies import ActorCriticPolicy, BasePolicy
from stable_baselines3.common.torch_layers import MlpExtractor
from stable_baselines3.common.type_aliases import PyTorchObs

from sb3_ppo_ext.common.distributions import Family, Gaussian
from sb3_ppo_ext.common.policy_distributions import family_of_policy, params_of
from sb3_ppo_ext.common.rollout.data import PolicyInput
from sb3_ppo_ext.common.rollout.evaluation import ActorEvaluation, Evaluation, StepEvaluation
from sb3_ppo_ext.common.rollout.layers import apply, preprocessor, unrolled, unrolled_extractor
from sb3_ppo_ext.common.rollout.purity import has_hooks, impurity


class ActorCritic(Protocol):
    """A policy as the core sees it. Observations are tensors (or dicts of them) as ``obs_as_tensor`` makes them."""

    policy: ActorCriticPolicy
    is_pure: bool
    """Whether a rollout may be evaluated after it is full: the result of a pass does not depend on other passes."""
    n_state: int
    """How many numbers the policy remembers from step to step; 0 if it has no memory."""

    @property
    def family(self) -> Family | None:
        """The formulas of its distributions; None for a custom distribution."""
        ...

    def act(self, inputs: PolicyInput) -> tuple[th.Tensor, StepEvaluation | None]:
        """
        Draw an action for each observation, as SB3 draws it; without gradients.

        :param inputs: a batch of them
        :return: actions, shape ``(batch, action_dim)`` or what reshapes to it, and what else the pass computed
        """
        ...

    def evaluate_actions(self, inputs: PolicyInput, actions: th.Tensor) -> Evaluation:
        """
        :param inputs: a batch of them
        :param actions: shape ``(batch, action_dim)``, as the rollout buffer holds them
        """
        ...

    def evaluate_actor(self, inputs: PolicyInput, actions: th.Tensor) -> ActorEvaluation:
        """
        :meth:`evaluate_actions` without the values.

        :param inputs: a batch of them
        :param actions: shape ``(batch, action_dim)``, as the rollout buffer holds them
        """
        ...

    def params(self, inputs: PolicyInput | PyTorchObs) -> th.Tensor:
        """
        Distribution parameters alone, shape ``(batch, n_params)``.

        :param inputs: a batch of them, or a batch of observations if the policy needs nothing else
        """
        ...

    def values(self, inputs: PolicyInput) -> th.Tensor:
        """Values alone, shape ``(batch,)``."""
        ...


class DirectActorCritic:
    """
    Runs the networks of an SB3 policy, or of sb3-contrib's maskable policy, directly. It draws actions with the same
    torch calls as SB3, but builds no distribution object and computes only what is asked for: an action costs a pass
    through the actor alone.

    Use it only if :meth:`refusal` returns None for the policy. It owns nothing and is created again for each rollout
    and each update, so it sees layers that a user replaces.

    Where a network is not known to be pure (see :mod:`sb3_ppo_ext.common.rollout.purity`), the pass that draws an
    action also gives the value and the distribution, and each module is called as often as in SB3.

    :param policy: the policy
    :param with_params: whether :meth:`evaluate_actions` also gives the distribution parameters
    """

    _CALLS: tuple[str, ...] = (
        "forward",
        "evaluate_actions",
        "get_distribution",
        "predict_values",
        "extract_features",
        "_get_action_dist_from_latent",
        "reset_noise",
    )

    n_state = 0

    def __init__(self, policy: ActorCriticPolicy, *, with_params: bool = True) -> None:
        self.policy = policy
        self._with_params = with_params
        family = family_of_policy(policy)
        assert family is not None, "the policy is not supported"
        self.family: Family = family
        self._like = next(policy.parameters()).new_empty(0)  # dtype and device
        self._action_dist: Any = policy.action_dist  # SB3's types do not say what only gSDE's has
        self._is_gaussian = isinstance(policy.action_dist, sb3.DiagGaussianDistribution)
        self._is_sde = isinstance(policy.action_dist, sb3.StateDependentNoiseDistribution)
        self._preprocess = preprocessor(policy.observation_space, policy.normalize_images)
        self._preprocess_batch = preprocessor(policy.observation_space, policy.normalize_images, for_batches=True)
        self.is_pure = impurity(policy) is None
        shares_features = policy.share_features_extractor and any(True for _ in policy.features_extractor.parameters())
        self._evaluates_each_step = shares_features or not self.is_pure
        mlp: Any = policy.mlp_extractor
        is_plain = type(mlp) is MlpExtractor
        self._actor = unrolled_extractor(policy, policy.pi_features_extractor)
        self._critic = unrolled_extractor(policy, policy.vf_features_extractor)
        self._actor_head = unrolled(mlp.policy_net) if is_plain else [mlp.forward_actor]
        self._critic_head = unrolled(mlp.value_net) if is_plain else [mlp.forward_critic]
        self._action_net = unrolled(policy.action_net)
        self._value_net = unrolled(policy.value_net)

    @classmethod
    def overridden(cls, policy_class: type[BasePolicy]) -> bool:
        """
        :param policy_class: derived from SB3's policy or sb3-contrib's maskable policy
        :return: whether it overrides methods that are skipped when its networks are called directly
        """
        return any(not cls._knows(name, policy_class) for name in cls._CALLS)

    @classmethod
    def refusal(cls, policy: BasePolicy) -> str | None:
        """
        :param policy: to be run
        :return: why its networks cannot be called directly, as the end of a sentence; None if they can
        """
        if not isinstance(policy, _BASES):
            return "is no actor-critic policy of Stable-Baselines3"
        if cls.overridden(type(policy)) or not vars(policy).keys().isdisjoint(cls._CALLS):
            return "overrides methods of Stable-Baselines3's ActorCriticPolicy"
        if type(policy.action_dist) not in _SB3_DISTRIBUTIONS or family_of_policy(policy) is None:
            return f"has a distribution of its own, {type(policy.action_dist).__name__}"
        if has_hooks(policy) or has_hooks(policy.mlp_extractor):
            return "has hooks on itself or on its mlp_extractor"
        extractor = policy.mlp_extractor
        if type(extractor) is not MlpExtractor and getattr(extractor, "is_pure", False) is not True:
            return f"has an mlp_extractor of its own, {type(extractor).__name__}, that is not declared pure"
        return None

    @classmethod
    def _knows(cls, name: str, policy_class: type[BasePolicy]) -> bool:
        """Whether the method is the original one, whose result calling the networks one by one reproduces."""
        base = next(base for base in _BASES if issubclass(policy_class, base))
        return getattr(policy_class, name, None) is getattr(base, name, None)

    @th.inference_mode()
    def act(self, inputs: PolicyInput) -> tuple[th.Tensor, StepEvaluation | None]:
        """
        Draw an action for each observation. Values and distribution parameters are computed in the same pass where a
        second pass through the extractor would cost more than it saves, or would give other results; otherwise only the
        actor runs.
        """
        if self.is_pure:
            return self.act_by(inputs, self.noise(inputs.n_rows))
        return self._act_and_evaluate(inputs)

    def noise(self, n: int) -> th.Tensor:
        """
        Draw the random numbers that :meth:`act_by` turns into actions, as SB3 draws them; for gSDE, return the
        exploration matrices, which were drawn earlier and serve many steps.

        :param n: number of actions
        """
        if not self._is_sde:
            return self.family.noise(n, self._like)
        matrices: th.Tensor = self._action_dist.exploration_matrices
        one_each = n > 1 and n == matrices.shape[0]
        return (matrices if one_each else self._action_dist.exploration_mat).detach()

    def act_by(self, inputs: PolicyInput, noise: th.Tensor) -> tuple[th.Tensor, StepEvaluation | None]:
        """
        :meth:`act` as a function of given random numbers.

        :param inputs: a batch of them
        :param noise: from :meth:`noise`
        """
        if self._evaluates_each_step:
            return self._act_and_evaluate(inputs, noise)
        latent_pi = self._latent_pi(self._preprocess(inputs.obs), inputs)
        return self._drawn_by(latent_pi, self._action_out(latent_pi, inputs.mask), noise), None

    def _act_and_evaluate(
        self, inputs: PolicyInput, noise: th.Tensor | None = None
    ) -> tuple[th.Tensor, StepEvaluation]:
        """
        :param inputs: a batch of them
        :param noise: from :meth:`noise`; None: draw it after the pass, which may itself draw random numbers
        """
        latent_pi, latent_vf, state = self._latents_of_step(self._preprocess(inputs.obs), inputs)
        out = self._action_out(latent_pi, inputs.mask)
        kept = StepEvaluation(self._values(latent_vf), None, self._params_by(latent_pi, out), state)
        return self._drawn_by(latent_pi, out, self.noise(inputs.n_rows) if noise is None else noise), kept

    def evaluate_actions(self, inputs: PolicyInput, actions: th.Tensor) -> Evaluation:
        latent_pi, latent_vf = self._latents(self._preprocess_batch(inputs.obs), inputs)
        values = self._values(latent_vf)
        if self._is_gaussian and not self._with_params:
            assert isinstance(self.family, Gaussian)
            mean = apply(self._action_net, latent_pi)
            log_prob, entropy = self.family.log_prob_and_entropy_by_log_std(mean, self.policy.log_std, actions)
            return Evaluation(values, log_prob, entropy, mean[:, :0], self.family)
        params = self._params_by(latent_pi, self._action_out(latent_pi, inputs.mask))
        return Evaluation(values, *self.family.log_prob_and_entropy(params, actions), params, self.family)

    def evaluate_actor(self, inputs: PolicyInput, actions: th.Tensor) -> ActorEvaluation:
        latent_pi = self._latent_pi(self._preprocess_batch(inputs.obs), inputs)
        params = self._params_by(latent_pi, self._action_out(latent_pi, inputs.mask))
        return ActorEvaluation(*self.family.log_prob_and_entropy(params, actions), params)

    def params(self, inputs: PolicyInput | PyTorchObs) -> th.Tensor:
        inputs = PolicyInput.of(inputs)
        latent_pi = self._latent_pi(self._preprocess_batch(inputs.obs), inputs)
        return self._params_by(latent_pi, self._action_out(latent_pi, inputs.mask))

    def values(self, inputs: PolicyInput) -> th.Tensor:
        return self._values(self._latent_vf(self._preprocess_batch(inputs.obs), inputs))

    def _latent_pi(self, x: Any, inputs: PolicyInput) -> th.Tensor:
        """The input of the action net, from preprocessed observations."""
        return apply(self._actor_head, apply(self._actor, x))

    def _latent_vf(self, x: Any, inputs: PolicyInput) -> th.Tensor:
        """The input of the value net, from preprocessed observations."""
        return apply(self._critic_head, apply(self._critic, x))

    def _latents(self, x: Any, inputs: PolicyInput) -> tuple[th.Tensor, th.Tensor]:
        """Both inputs, with one pass through shared layers."""
        features = apply(self._actor, x)
        vf_features = features if self.policy.share_features_extractor else apply(self._critic, x)
        return apply(self._actor_head, features), apply(self._critic_head, vf_features)

    def _latents_of_step(self, x: Any, inputs: PolicyInput) -> tuple[th.Tensor, th.Tensor, th.Tensor | None]:
        """Both inputs, and the state after the step if the policy is recurrent."""
        return *self._latents(x, inputs), None

    def _values(self, latent_vf: th.Tensor) -> th.Tensor:
        return apply(self._value_net, latent_vf).flatten()

    def _action_out(self, latent_pi: th.Tensor, mask: th.Tensor | None) -> th.Tensor:
        """The output of the action net, changed so that actions that are not allowed have probability 0."""
        out = apply(self._action_net, latent_pi)
        return out if mask is None else self.family.masked(out, mask)

    def _params_by(self, latent_pi: th.Tensor, out: th.Tensor) -> th.Tensor:
        if self._is_gaussian:
            return th.cat((out, self.policy.log_std.exp().expand_as(out)), dim=1)
        if self._is_sde:
            action_dist = self._action_dist
            features = latent_pi if action_dist.learn_features else latent_pi.detach()
            variance = features.square() @ action_dist.get_std(self.policy.log_std).square()
            return th.cat((out, (variance + action_dist.epsilon).sqrt()), dim=1)
        return out

    def _drawn_by(self, latent_pi: th.Tensor, out: th.Tensor, noise: th.Tensor) -> th.Tensor:
        if self._is_gaussian:  # what the family draws, without assembling its parameters first
            return out + noise * self.policy.log_std.exp()
        if self._is_sde:
            features = latent_pi if noise.dim() == 2 else latent_pi.unsqueeze(dim=1)
            action = out + (features @ noise).view_as(out)
            return action if self._action_dist.bijector is None else action.tanh()
        return self.family.draw(out, noise)


_BASES = (ActorCriticPolicy, MaskableActorCriticPolicy)  # both have the same networks

_SB3_DISTRIBUTIONS = (
    sb3.DiagGaussianDistribution,
    sb3.StateDependentNoiseDistribution,
    sb3.CategoricalDistribution,
    sb3.MultiCategoricalDistribution,
    sb3.BernoulliDistribution,
    maskable.MaskableCategoricalDistribution,
    maskable.MaskableMultiCategoricalDistribution,
    maskable.MaskableBernoulliDistribution,
)


class SB3ActorCritic:
    """
    Calls only the public methods of an SB3 policy, as often as SB3 does. It is for custom policies that override some
    of these methods, have their own distribution, or have hooks.

    :param policy: the policy
    :param with_params: whether to return the distribution parameters, from the pass that gives the log-probability
    """

    is_pure = False
    n_state = 0

    def __init__(self, policy: ActorCriticPolicy, *, with_params: bool) -> None:
        self.policy = policy
        self.family: Family | None = family_of_policy(policy)
        self._with_params = with_params
        self._is_discrete = isinstance(policy.action_space, spaces.Discrete)

    @th.no_grad()
    def act(self, inputs: PolicyInput) -> tuple[th.Tensor, StepEvaluation | None]:
        actions, values, log_prob = self.policy(inputs.obs)
        return actions, StepEvaluation(
            values.flatten(), log_prob, self._params_of_last_pass(log_prob) if self._with_params else None
        )

    def evaluate_actions(self, inputs: PolicyInput, actions: th.Tensor) -> Evaluation:
        if self._is_discrete:
            actions = actions.long().flatten()
        values, log_prob, entropy = self.policy.evaluate_actions(inputs.obs, actions)
        return Evaluation(values.flatten(), log_prob, entropy, self._params_of_last_pass(log_prob), self.family)

    def evaluate_actor(self, inputs: PolicyInput, actions: th.Tensor) -> ActorEvaluation:
        _, log_prob, entropy, params, _ = self.evaluate_actions(inputs, actions)
        return ActorEvaluation(log_prob, entropy, params)

    def _params_of_last_pass(self, log_prob: th.Tensor) -> th.Tensor:
        # SB3's policies have one distribution object, which each pass overwrites.
        return params_of(self.policy.action_dist) if self._with_params else log_prob.new_empty((len(log_prob), 0))

    def params(self, inputs: PolicyInput | PyTorchObs) -> th.Tensor:
        return params_of(self.policy.get_distribution(PolicyInput.of(inputs).obs))

    def values(self, inputs: PolicyInput) -> th.Tensor:
        return self.policy.predict_values(inputs.obs).flatten()
