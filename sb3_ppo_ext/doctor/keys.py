"""What each logged key means, in a sentence or two."""

from __future__ import annotations

import difflib

MEANINGS = {
    "rollout/ep_rew_mean": "The mean return of the last episodes (100, or `stats_window_size`): the sum of "
    "their rewards, without a discount, before `VecNormalize`. It is what the training is for.",
    "rollout/ep_len_mean": "The mean length of the last episodes (100, or `stats_window_size`), in steps.",
    "rollout/success_rate": "The share of the last episodes that ended with `info['is_success']`.",
    "eval/mean_reward": "The mean return of the episodes that `EvalCallback` has played, by default without noise in "
    "the actions.",
    "eval/mean_ep_length": "The mean length of the episodes that `EvalCallback` has played, in steps.",
    "eval/success_rate": "The share of the episodes that `EvalCallback` has played which ended with "
    "`info['is_success']`.",
    "time/fps": "Environment steps per second since `learn` was called, updates included.",
    "time/iterations": "The number of rollouts; each is followed by an update.",
    "time/time_elapsed": "Seconds since `learn` was called.",
    "time/total_timesteps": "Steps of all environments together. All other keys are logged at this step.",
    "train/approx_kl": "An estimate of the KL divergence between the policy before and after, from the samples of the "
    "update: how far the policy has moved. Below 0.02 is usual.",
    "train/kl": "The exact KL divergence of the policy before an update from the policy after it, of the whole "
    "action, averaged over the rollout.",
    "train/minibatch_kl": "The exact KL divergence of the policy before an update from the present one, averaged over "
    "the minibatches of the update. `kl_adaptive_lr` lets the learning rate follow it.",
    "train/target_kl": "The KL divergence that an update aims at (AdaptiveKLPPO), or at most has (TRPO), of the whole "
    "action.",
    "train/kl_coef": "The weight of the KL penalty. It is doubled after an update that went too far, and halved "
    "after one that could have gone further.",
    "train/kl_divergence_loss": "The KL divergence of a TRPO update as sb3-contrib logs it: of the policy after "
    "it from the one before, averaged over the dimensions of the action.",
    "train/clip_fraction": "The share of samples whose ratio of new to old probability has left the clip range. "
    "Below 20% is usual.",
    "train/dual_clip_fraction": "The share of samples that the second clip of DualClipPPO has cut: those with a "
    "negative advantage and a ratio above `dual_clip`. It is 0 in most trainings on fresh rollouts.",
    "train/ratio_max": "The largest ratio of a new to an old probability in an update. 1 is no change.",
    "train/clip_range": "How far the ratio may go from 1 before its gradient is cut, now.",
    "train/clip_range_high": "How far the ratio may go above 1 before its gradient is cut, now.",
    "train/clip_range_vf": "How far a value may move in an update before its gradient is cut, now.",
    "train/dual_clip": "The ratio at which the second clip of DualClipPPO cuts samples with a negative advantage, now.",
    "train/reference_kl": "The exact KL divergence of the policy that acted from the reference policy, of "
    "the whole action, averaged over the rollout. 0 is the reference itself.",
    "train/reference_kl_coef": "The weight of the penalty on the KL divergence from the reference policy, in the last "
    "update.",
    "train/reward_mean": "With a reference policy: the mean reward of a step of the rollout, as the algorithm gets it "
    "from the environments.",
    "train/penalized_reward_mean": "With a reference policy: the mean reward of a step less the mean penalty on the KL "
    "divergence from the reference.",
    "train/entropy_loss": "Minus the mean entropy of the policy: how random its actions are. It rises towards 0 as a "
    "policy with discrete actions becomes deterministic; with Box actions it may pass 0.",
    "train/ent_coef": "The weight of the entropy in the loss, now.",
    "train/explained_variance": "The share of the variance of the returns that the critic predicted: 1 is all of it, 0 "
    "is no better than predicting their mean, below 0 is worse. It is NaN where the returns do not vary.",
    "train/value_loss": "The mean squared error of the critic, in units of the returns squared.",
    "train/policy_gradient_loss": "The loss of the actor alone. Its value says little: with normalised advantages "
    "it stays near 0 in a healthy training too.",
    "train/policy_loss": "The loss of A2C's actor alone. Its value says little: it need not fall.",
    "train/policy_objective": "The surrogate objective of TRPO after the step: the mean of ratio times advantage.",
    "train/loss": "The loss that was minimised, with all its terms. It need not fall: every rollout is a new problem.",
    "train/max_importance_weight": "The bound of the importance weights of samples, now.",
    "train/truncated_weight_fraction": "The share of samples whose importance weight was above "
    "`max_importance_weight` and was cut to it. What is cut off biases the gradient.",
    "train/ewma_decay": "The decay of the moving average of policies that an update clips around, for each gradient "
    "step, now.",
    "train/grad_norm": "The mean norm of the gradients of an update, before they are clipped to `max_grad_norm`.",
    "train/learning_rate": "The learning rate of the optimiser, now.",
    "train/critic_learning_rate": "The learning rate of the parameters that only the critic uses, now.",
    "train/n_updates": "How many passes over a rollout the optimiser has made (in PPO, `n_epochs` per update).",
    "train/early_stop_epoch": "The epoch at which `target_kl` has ended an update, counted from 0.",
    "train/std": "The standard deviation of Box actions, averaged over their dimensions. It falls as the policy "
    "becomes deterministic.",
    "train/is_line_search_success": "1 if TRPO's line search found a step that it could take, 0 if the policy "
    "stayed as it was.",
    "train/predicted_improvement": "The improvement of the surrogate that the gradient predicts for TRPO's step.",
    "train/actual_improvement": "The improvement of the surrogate by TRPO's step. At least a tenth of the prediction "
    "is needed (`accept_ratio`).",
    "train/step_fraction": "How much of the full natural gradient step TRPO's line search has taken: 1 is all.",
    "train/cg_steps": "How many steps conjugate gradient has made for TRPO's direction.",
    "train/cg_residual": "The relative residual of conjugate gradient for TRPO's direction. Above 0.1 the direction "
    "is rough, and more `cg_max_steps` or more `cg_damping` help.",
    "train/cg_damping": "The number that is added to the diagonal of TRPO's Fisher matrix.",
    "doctor/gamma": "The discount factor. The agent looks about 1 / (1 - gamma) steps ahead.",
    "doctor/ent_coef": "The weight of the entropy in the loss, where the algorithm does not log it.",
    "doctor/max_grad_norm": "The largest norm of the gradients after clipping.",
    "doctor/kl_coef_min": "The lower bound of AdaptiveKLPPO's `kl_coef`.",
    "doctor/kl_coef_max": "The upper bound of AdaptiveKLPPO's `kl_coef`.",
    "doctor/return_mean": "The mean of the returns of a rollout, which the critic is fitted to: discounted, and after "
    "`VecNormalize`.",
    "doctor/return_std": "The standard deviation of the returns of a rollout, which the critic is fitted to.",
    "doctor/advantage_mean": "The mean advantage of a rollout, before normalisation: near 0 if the critic is right.",
    "doctor/advantage_std": "The standard deviation of the advantages of a rollout, before normalisation.",
    "doctor/advantage_skew": "The skewness of the advantages of a rollout: 0 if as many are far above as far below.",
}
"""The meaning of each key."""


class UnknownKeyError(ValueError):
    """No algorithm logs a key of this name; the message names the nearest key."""


def full_key(name: str) -> str:
    """
    :param name: a key, or its part after the slash
    :return: the key
    :raises UnknownKeyError: if :data:`MEANINGS` has no such key
    """
    if name in MEANINGS:
        return name
    short = {key.partition("/")[2]: key for key in reversed(MEANINGS)}
    if name in short:
        return short[name]
    nearest = difflib.get_close_matches(name, [*MEANINGS, *short], n=1, cutoff=0.0)[0]
    raise UnknownKeyError(f"there is no key '{name}'; the nearest is '{nearest}'")
