"""
What an Optuna study of each of our algorithms searches.

rl_zoo3 calls a sampler for each trial of a study, and a converter alone where it loads a trial: the converter makes the
constructor's arguments, which the sampler returned, of the numbers that were drawn. ``n_actions`` and
``additional_args`` are for rl_zoo3's own samplers; ours do not use them.

As in rl_zoo3's own spaces, a trial's arguments take the place of the entry's. What a space leaves out stays as the
entry has it, inside of ``policy_kwargs`` too: the activation function, the features extractor, the optimizer.

Each number is drawn from a range of its own, which no other number changes: Optuna's samplers learn best from those.
Numbers that depend on each other are drawn as a factor (minibatches of a rollout, high over low clip range), so that no
combination is a contradiction. What the learning rate begins with is drawn, and its schedule.

Where the entry's policy is a recurrent one, its memory is searched, too. rl_zoo3 does not tell a sampler of the policy,
so the trial has it as an attribute, :data:`POLICY`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import optuna
from rl_zoo3.hyperparams_opt import convert_onpolicy_params

Params = dict[str, Any]

POLICY = "policy"  # a trial's attribute: that of the entry


def _converted(trial: optuna.Trial, convert: Callable[[Params], Params], params: Params) -> Params:
    """
    :param trial: that the numbers were drawn for
    :param convert: the algorithm's converter
    :param params: what was drawn
    :return: the constructor's arguments; those that are not among the numbers are added to the trial's attributes
    """
    hyperparams = convert(params)
    for name in hyperparams.keys() - params.keys() - {"policy_kwargs"}:
        trial.set_user_attr(name, hyperparams[name])
    return hyperparams


def _sample_common(trial: optuna.Trial, n_envs: int) -> Params:
    """
    What every space has.

    - ``one_minus_gamma``: the horizon is the task's, and what gamma is best for it nobody knows beforehand
    - ``net_arch``: rl_zoo3's sizes, as far as [256, 256]; of a recurrent policy, after its memory
    - ``layer_norm``: whether these layers are normalised

    A recurrent policy's space has also

    - ``lstm_hidden_size_pow``: how much it can remember
    - ``sequence_length_pow``: how long it learns to remember something, against the number of independent samples. All
      of these lengths divide all batch sizes that are drawn
    - ``enable_critic_lstm``: whether the critic has a memory of its own, or none. It could have the actor's
      (``shared_lstm``) only where they share their features, too, which depends on the algorithm and on the entry

    :param trial: to draw for
    :param n_envs: number of environments; kept with what was drawn, as a converter is given nothing else
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
    What every space has whose algorithm learns from a rollout of so many steps.

    - ``batch_size_pow`` and ``n_minibatches_pow``: how much is collected before an update, and in how many gradient
      steps it is seen. ``n_steps`` follows: a rollout of all environments is a whole number of minibatches, at least
      one
    - ``one_minus_gae_lambda``: bias against variance of the advantages

    :param trial: to draw for
    :param n_envs: number of environments
    :param batch_size_pow: lowest and highest exponent of two
    :param n_minibatches_pow: likewise
    :return: what was drawn
    """
    return {
        **_sample_common(trial, n_envs),
        "batch_size_pow": trial.suggest_int("batch_size_pow", *batch_size_pow),
        "n_minibatches_pow": trial.suggest_int("n_minibatches_pow", *n_minibatches_pow),
        "one_minus_gae_lambda": trial.suggest_float("one_minus_gae_lambda", 1e-3, 0.2, log=True),
    }


def _sample_proximal(trial: optuna.Trial, n_envs: int) -> Params:
    """
    What the spaces of both proximal policy optimisations have: rollout, minibatches, gamma, lambda and network; and

    - ``learning_rate``, ``n_epochs``: how far an update goes, and how often it sees a sample
    - ``learning_rate_schedule``: whether updates are as large at the end of the training as at its beginning; or, as
      "kl", whether the learning rate follows the KL, with the constructor's target
    - ``data``: whether an update learns from the newest rollout as it was collected ("fresh"), with advantages of its
      own in each epoch ("recomputed"; not of a recurrent policy), or from the rollout before it too ("reused")
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
    """rl_zoo3's conversion, without an activation function, which none of our spaces has."""
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
            "shared_lstm": False,  # an entry that has it would contradict
        }
    return hyperparams


def convert_rollout_params(sampled_params: Params) -> Params:
    """The converter of AdaptiveKLPPO."""
    hyperparams = _convert_common_params(sampled_params)
    if "learning_rate_schedule" in sampled_params:
        hyperparams["kl_adaptive_lr"] = {} if sampled_params["learning_rate_schedule"] == "kl" else None
    if "data" in sampled_params:
        data = hyperparams.pop("data")
        target = "gae" if "sequence_length" in hyperparams else "vtrace"  # which a memory does not allow
        hyperparams["recompute_advantages"] = data == "recomputed"
        hyperparams["n_reused_rollouts"] = int(data == "reused")
        hyperparams["reuse"] = {"target": target, "proximal": "newest"} if data == "reused" else None
    n_envs, n_minibatches = hyperparams.pop("n_envs"), 2 ** hyperparams.pop("n_minibatches_pow")
    batch_size = hyperparams["batch_size"]
    # The fewest steps of all environments that are whole minibatches and whole sequences.
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
    Besides what both proximal spaces have:

    - ``clip_range``: where an update ends
    - ``clip_range_ratio``: of high to low clip range, from symmetric to twice as far up
    - ``dual_clip``: from near the first clip to where it hardly ever acts; above 1 + clip_range_high for all of these
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
    Besides what both proximal spaces have:

    - ``target_kl``: of the whole action, which an update aims at; the constructor's 0.01 for each action dimension lies
      in this range up to 30 dimensions
    - ``clip_range``: what keeps single states near where the penalty on the mean does not
    - ``kl_coef``: at first. It adapts by a factor of two a rollout, which is slow where a training has few

    The tolerance and the factor of the adaptation are left alone: the paper (Schulman et al. 2017, section 4) finds
    that little depends on them.
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
    # The critic's steps leave alone what the actor depends on: of shared features it would learn the last layers only.
    hyperparams["policy_kwargs"]["share_features_extractor"] = False
    return hyperparams


def sample_trpo_params(trial: optuna.Trial, n_actions: int, n_envs: int, additional_args: dict[Any, Any]) -> Params:
    """
    Besides rollout, minibatches (here of the critic), gamma, lambda and network, which all spaces have:

    - ``target_kl``: of the whole action, the size of a step; the constructor's 0.01 for each action dimension lies in
      this range up to 30 dimensions
    - ``cg_damping``: how far the step's direction goes from the natural gradient to the gradient; the constructor's 0.1
      for each action dimension lies in this range up to 20 dimensions
    - ``cg_max_steps``: how exactly that direction is solved for
    - ``learning_rate``, ``n_critic_updates``: how well the critic fits, which the advantages depend on

    The line search is left alone: it acts only on a step that the quadratic model misjudges.
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
    del hyperparams["gae_lambda"]  # its returns are complete
    n_envs, n_episodes = hyperparams.pop("n_envs"), 2 ** hyperparams.pop("n_episodes_pow")
    hyperparams["episodes_per_env"] = math.ceil(n_episodes / n_envs)
    hyperparams["policy_kwargs"]["share_features_extractor"] = False  # as for TRPO
    if hyperparams["baseline"] != "value":
        hyperparams["bootstrap_timeouts"] = False  # an entry that has it for its own baseline would contradict
    return hyperparams


def sample_reinforce_params(
    trial: optuna.Trial, n_actions: int, n_envs: int, additional_args: dict[Any, Any]
) -> Params:
    """
    Besides gamma and network, which all spaces have:

    - ``n_episodes_pow``: episodes of a batch, over all environments: variance against number of updates. At least four,
      so that a baseline has other episodes to be computed from
    - ``learning_rate``: of the one step a batch makes, hence higher than PPO's
    - ``learning_rate_schedule``: whether steps are as large at the end of the training as at its beginning
    - ``ent_coef``: against a policy that stops exploring, which nothing else here bounds
    - ``baseline``: "optimal" costs two more gradients an episode and "none" is never better, so the other three
    - ``normalize_advantage``: one size of step for all scales of reward, or an unbiased gradient

    The returns are those of the entry; "total" has the same mean as the rewards-to-go and more variance.
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
