"""
The search spaces of our algorithms for Optuna studies.

For each trial of a study, rl_zoo3 calls a sampler, which draws numbers and returns arguments of the constructor. Where
rl_zoo3 loads a trial, it calls only the converter, which computes the same arguments from the drawn numbers.
``n_actions`` and ``additional_args`` are for rl_zoo3's own samplers; ours do not use them.

As in rl_zoo3's own spaces, the arguments of a trial replace those of the entry. All other arguments stay as in the
entry, also within ``policy_kwargs``: the activation function, the features extractor, the optimizer.

Each number is drawn from a fixed range, because Optuna's samplers learn best from these. Where one number depends on
another, their ratio is drawn (minibatches per rollout, high to low clip range), so that every combination is valid. The
initial learning rate and its schedule are drawn separately.

If the policy of the entry is recurrent, its memory is searched, too. rl_zoo3 does not pass the policy to a sampler, so
it is stored as an attribute of the trial, :data:`POLICY`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import optuna
from rl_zoo3.hyperparams_opt import convert_onpolicy_params

Params = dict[str, Any]

POLICY = "policy"  # the attribute of a trial that holds the policy of the entry


def _converted(trial: optuna.Trial, convert: Callable[[Params], Params], params: Params) -> Params:
    """
    :param trial: trial for which the numbers were drawn
    :param convert: converter of the algorithm
    :param params: the drawn numbers
    :return: arguments of the constructor; those that were not drawn directly are added to the trial's attributes
    """
    hyperparams = convert(params)
    for name in hyperparams.keys() - params.keys() - {"policy_kwargs"}:
        trial.set_user_attr(name, hyperparams[name])
    return hyperparams


def _sample_common(trial: optuna.Trial, n_envs: int) -> Params:
    """
    Draw the parameters that all spaces have.

    - ``one_minus_gamma``: the best horizon depends on the task and is not known beforehand
    - ``net_arch``: rl_zoo3's sizes up to [256, 256]; in a recurrent policy, the layers after its memory
    - ``layer_norm``: whether these layers are normalised

    For a recurrent policy also

    - ``lstm_hidden_size_pow``: how much it can remember
    - ``sequence_length_pow``: over how many steps it learns to remember; longer sequences mean fewer independent
      samples. All of these lengths divide all batch sizes in the spaces
    - ``enable_critic_lstm``: whether the critic has its own memory or none. It could use the actor's (``shared_lstm``)
      only if they also share their features, which depends on the algorithm and on the entry

    :param trial: trial to draw for
    :param n_envs: number of environments; stored with the drawn numbers, as a converter gets only these
    """
    return {
        "n_envs": trial.suggest_int("n_envs", n_envs, n_envs),
        "one_minus_gamma": trial.suggest_float("one_minus_gamma", 1e-4, 0.1, log=True),
        "net_arch": trial.suggest_categorical("net_arch", ["tiny", "small", "medium"]),
        "layer_norm": trial.suggest_categorical("layer_norm", [False, True]),
        **_sample_memory(trial),
    }


def _has_memory(trial: optuna.Trial) -> bool:
    return "Lstm" in trial.user_attrs.get(POLICY, "")


def _sample_memory(trial: optuna.Trial) -> Params:
    if not _has_memory(trial):
        return {}
    return {
        "lstm_hidden_size_pow": trial.suggest_int("lstm_hidden_size_pow", 4, 8),
        "sequence_length_pow": trial.suggest_int("sequence_length_pow", 3, 5),
        "enable_critic_lstm": trial.suggest_categorical("enable_critic_lstm", [False, True]),
    }


def _sample_learning_rate(trial: optuna.Trial, low: float, high: float, *more_schedules: str) -> Params:
    schedules = ["const", "lin", "cos", *more_schedules]
    return {
        "learning_rate": trial.suggest_float("learning_rate", low, high, log=True),
        "learning_rate_schedule": trial.suggest_categorical("learning_rate_schedule", schedules),
    }


def _sample_rollout(
    trial: optuna.Trial, n_envs: int, batch_size_pow: tuple[int, int], n_minibatches_pow: tuple[int, int]
) -> Params:
    """
    Draw the parameters of algorithms whose rollouts have a fixed number of steps.

    - ``batch_size_pow`` and ``n_minibatches_pow``: the size of a rollout, and the number of gradient steps per pass
      over it. ``n_steps`` is computed from them, so that a rollout is a whole number of minibatches, at least one
    - ``one_minus_gae_lambda``: trades bias of the advantages against variance

    :param trial: trial to draw for
    :param n_envs: number of environments
    :param batch_size_pow: lowest and highest exponent of two
    :param n_minibatches_pow: lowest and highest exponent of two
    :return: the drawn numbers
    """
    return {
        **_sample_common(trial, n_envs),
        "batch_size_pow": trial.suggest_int("batch_size_pow", *batch_size_pow),
        "n_minibatches_pow": trial.suggest_int("n_minibatches_pow", *n_minibatches_pow),
        "one_minus_gae_lambda": trial.suggest_float("one_minus_gae_lambda", 1e-3, 0.2, log=True),
    }


def _sample_proximal(trial: optuna.Trial, n_envs: int) -> Params:
    """
    Draw the parameters of both PPO algorithms: rollout, minibatches, gamma, lambda and network; and

    - ``learning_rate``, ``n_epochs``: how far an update goes, and how often it uses a sample
    - ``learning_rate_schedule``: whether the learning rate stays the same, falls until the end of the training, or
      ("kl") follows the KL divergence with the constructor's target
    - ``data``: whether an update uses the newest rollout as it was collected ("fresh"), with advantages recomputed in
      each epoch ("recomputed"; not for a recurrent policy), or also the rollout before it ("reused")
    """
    return {
        **_sample_rollout(trial, n_envs, batch_size_pow=(5, 9), n_minibatches_pow=(1, 5)),
        **_sample_learning_rate(trial, 1e-5, 2e-3, "kl"),
        "n_epochs": trial.suggest_int("n_epochs", 3, 20, log=True),
        "data": trial.suggest_categorical(
            "data", ["fresh", "reused"] if _has_memory(trial) else ["fresh", "recomputed", "reused"]
        ),
    }


def _convert_common_params(sampled_params: Params) -> Params:
    """rl_zoo3's conversion, without the activation function, which our spaces do not contain."""
    hyperparams: Params = convert_onpolicy_params({**sampled_params, "activation_fn": "tanh"})
    del hyperparams["policy_kwargs"]["activation_fn"]
    if "layer_norm" in hyperparams:
        hyperparams["policy_kwargs"]["layer_norm"] = hyperparams.pop("layer_norm")
    schedule = hyperparams.pop("learning_rate_schedule", "const")
    if schedule in ("lin", "cos"):
        hyperparams["learning_rate"] = f"{schedule}_{hyperparams['learning_rate']}"
    if "sequence_length_pow" in hyperparams:
        hyperparams["sequence_length"] = 2 ** hyperparams.pop("sequence_length_pow")
        hyperparams["policy_kwargs"] |= {
            "lstm_hidden_size": 2 ** hyperparams.pop("lstm_hidden_size_pow"),
            "enable_critic_lstm": hyperparams.pop("enable_critic_lstm"),
            "shared_lstm": False,  # True in the entry would contradict
        }
    return hyperparams


def convert_rollout_params(sampled_params: Params) -> Params:
    """The converter of AdaptiveKLPPO."""
    hyperparams = _convert_common_params(sampled_params)
    if "learning_rate_schedule" in sampled_params:
        hyperparams["kl_adaptive_lr"] = {} if sampled_params["learning_rate_schedule"] == "kl" else None
    if "data" in sampled_params:
        data = hyperparams.pop("data")
        target = "gae" if "sequence_length" in hyperparams else "vtrace"  # vtrace does not support a memory
        hyperparams["recompute_advantages"] = data == "recomputed"
        hyperparams["n_reused_rollouts"] = int(data == "reused")
        hyperparams["reuse"] = {"target": target, "proximal": "newest"} if data == "reused" else None
    n_envs, n_minibatches = hyperparams.pop("n_envs"), 2 ** hyperparams.pop("n_minibatches_pow")
    batch_size = hyperparams["batch_size"]
    # The smallest n_steps for which a rollout is whole minibatches and whole sequences.
    whole = math.lcm(batch_size // math.gcd(batch_size, n_envs), hyperparams.get("sequence_length", 1))
    hyperparams["n_steps"] = whole * math.ceil(n_minibatches * batch_size / (whole * n_envs))
    return hyperparams


def convert_dual_clip_ppo_params(sampled_params: Params) -> Params:
    hyperparams = convert_rollout_params(sampled_params)
    hyperparams["clip_range_high"] = hyperparams["clip_range"] * hyperparams.pop("clip_range_ratio")
    return hyperparams


def sample_dual_clip_ppo_params(
    trial: optuna.Trial, n_actions: int, n_envs: int, additional_args: dict[Any, Any]
) -> Params:
    """
    The parameters of both PPO algorithms, and

    - ``clip_range``: how far an update moves the policy
    - ``clip_range_ratio``: ratio of high to low clip range, from 1 (symmetric) to 2
    - ``dual_clip``: from close to the first clip to where it hardly ever acts; always above 1 + clip_range_high
    """
    return _converted(
        trial,
        convert_dual_clip_ppo_params,
        {
            **_sample_proximal(trial, n_envs),
            "clip_range": trial.suggest_float("clip_range", 0.1, 0.4),
            "clip_range_ratio": trial.suggest_float("clip_range_ratio", 1.0, 2.0),
            "dual_clip": trial.suggest_float("dual_clip", 2.0, 6.0),
        },
    )


def sample_adaptive_kl_ppo_params(
    trial: optuna.Trial, n_actions: int, n_envs: int, additional_args: dict[Any, Any]
) -> Params:
    """
    The parameters of both PPO algorithms, and

    - ``target_kl``: KL divergence of the whole action that an update aims at. The constructor's 0.003 for each action
      dimension lies in this range up to 100 dimensions
    - ``clip_range``: limits the change in single states, which the penalty on the mean KL does not
    - ``kl_coef``: the initial coefficient. It adapts by a factor of two per rollout, which is slow if there are few

    The tolerance and the factor of the adaptation are not searched: by the paper (Schulman et al. 2017, section 4), the
    algorithm is not very sensitive to them.
    """
    return _converted(
        trial,
        convert_rollout_params,
        {
            **_sample_proximal(trial, n_envs),
            "target_kl": trial.suggest_float("target_kl", 0.003, 0.3, log=True),
            "clip_range": trial.suggest_float("clip_range", 0.1, 0.4),
            "kl_coef": trial.suggest_float("kl_coef", 0.1, 10.0, log=True),
        },
    )


def convert_trpo_params(sampled_params: Params) -> Params:
    hyperparams = convert_rollout_params(sampled_params)
    # The critic's steps do not change shared parameters: with shared features it would only learn its last layers.
    hyperparams["policy_kwargs"]["share_features_extractor"] = False
    return hyperparams


def sample_trpo_params(trial: optuna.Trial, n_actions: int, n_envs: int, additional_args: dict[Any, Any]) -> Params:
    """
    Rollout, minibatches (of the critic), gamma, lambda and network; and

    - ``target_kl``: the size of a step, as the KL divergence of the whole action. The constructor's 0.01 for each
      action dimension lies in this range up to 30 dimensions
    - ``cg_damping``: how far the direction of the step is moved from the natural gradient towards the gradient. The
      constructor's 0.1 for each action dimension lies in this range up to 20 dimensions
    - ``cg_max_steps``: how accurately this direction is computed
    - ``learning_rate``, ``n_critic_updates``: how well the critic fits the returns

    The line search is not searched: it acts only on steps for which the quadratic model is wrong.
    """
    return _converted(
        trial,
        convert_trpo_params,
        {
            **_sample_rollout(trial, n_envs, batch_size_pow=(6, 8), n_minibatches_pow=(3, 6)),
            "learning_rate": trial.suggest_float("learning_rate", 1e-4, 5e-3, log=True),
            "n_critic_updates": trial.suggest_int("n_critic_updates", 5, 30),
            "target_kl": trial.suggest_float("target_kl", 0.003, 0.3, log=True),
            "cg_damping": trial.suggest_float("cg_damping", 0.01, 2.0, log=True),
            "cg_max_steps": trial.suggest_int("cg_max_steps", 5, 30),
        },
    )


def convert_reinforce_params(sampled_params: Params) -> Params:
    hyperparams = _convert_common_params({**sampled_params, "one_minus_gae_lambda": 0.0})
    del hyperparams["gae_lambda"]  # it uses complete returns
    n_envs, n_episodes = hyperparams.pop("n_envs"), 2 ** hyperparams.pop("n_episodes_pow")
    hyperparams["episodes_per_env"] = math.ceil(n_episodes / n_envs)
    hyperparams["policy_kwargs"]["share_features_extractor"] = False  # as for TRPO
    if hyperparams["baseline"] != "value":
        hyperparams["bootstrap_timeouts"] = False  # True in the entry would contradict this baseline
    return hyperparams


def sample_reinforce_params(
    trial: optuna.Trial, n_actions: int, n_envs: int, additional_args: dict[Any, Any]
) -> Params:
    """
    Gamma and network; and

    - ``n_episodes_pow``: episodes of a batch, over all environments: more episodes mean less variance and fewer
      updates. There are at least four, so that a baseline can be computed from other episodes
    - ``learning_rate``: higher than PPO's, as there is only one step per batch
    - ``learning_rate_schedule``: whether the learning rate stays the same or falls until the end of the training
    - ``ent_coef``: keeps the policy exploring, which nothing else does here
    - ``baseline``: three of the five, as "optimal" costs two more gradients per episode and "none" is never better
    - ``normalize_advantage``: steps of one size for all scales of reward, or an unbiased gradient

    The kind of return is that of the entry; "total" has the same mean gradient as rewards-to-go and more variance.
    """
    return _converted(
        trial,
        convert_reinforce_params,
        {
            **_sample_common(trial, n_envs),
            "n_episodes_pow": trial.suggest_int("n_episodes_pow", 2, 6),
            **_sample_learning_rate(trial, 1e-4, 2e-2),
            "ent_coef": trial.suggest_float("ent_coef", 1e-5, 0.1, log=True),
            "baseline": trial.suggest_categorical("baseline", ["mean", "leave_one_out", "value"]),
            "normalize_advantage": trial.suggest_categorical("normalize_advantage", [False, True]),
        },
    )


SAMPLERS: dict[str, Callable[..., Params]] = {
    "dual_clip_ppo": sample_dual_clip_ppo_params,
    "adaptive_kl_ppo": sample_adaptive_kl_ppo_params,
    "trpo_ext": sample_trpo_params,
    "reinforce": sample_reinforce_params,
}

CONVERTERS: dict[str, Callable[..., Params]] = {
    "dual_clip_ppo": convert_dual_clip_ppo_params,
    "adaptive_kl_ppo": convert_rollout_params,
    "trpo_ext": convert_trpo_params,
    "reinforce": convert_reinforce_params,
}
