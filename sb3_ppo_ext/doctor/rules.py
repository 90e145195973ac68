"""
The rules: what is measured, beyond which limits it is worth a look or an alarm, what it usually means, and what to
change first.

In ``first``, words in braces are replaced by those of the algorithm (:mod:`sb3_ppo_ext.doctor.algorithms`). Causes come
before their consequences, and findings are listed in this order.
"""

from __future__ import annotations

from dataclasses import dataclass

from sb3_ppo_ext.doctor import measures
from sb3_ppo_ext.doctor.measures import Measure, logged, until_learnt

_ZOO = "the search spaces of rl_zoo3 2.9 (hyperparams_opt.py)"
_NUTS = 'J. Schulman, "The Nuts and Bolts of Deep RL Research", 2016'
_37 = 'Huang et al., "The 37 Implementation Details of Proximal Policy Optimization", 2022'
_PPO = "Schulman et al. 2017, arXiv 1707.06347"
_TRPO = "Schulman et al. 2015, arXiv 1502.05477"
_ENTRIES = "the entries of rl_zoo3 2.9 for PPO, A2C and TRPO"
_LIMITS = "the numbers are this package's own, tried on the recorded runs of its tests"

N_START = 5
"""Rows that :attr:`Rule.after_start` leaves out, at least."""

FAR_BEYOND = 10.0
"""A series that is above this multiple of the alarm in all of its rows is judged from the first row on."""


@dataclass(frozen=True)
class Rule:
    """
    :param name: name of the rule
    :param title: title of its findings
    :param measure: the series that is compared with the limits
    :param quantity: what that series is, as the subject of a sentence; for a flag, the whole sentence
    :param watch: a value beyond this is worth a look
    :param alarm: a value beyond this needs a change; None if no value does
    :param meaning: what it usually means
    :param first: what to change first
    :param source: where the limits come from
    :param keys: logged keys that it is about, for plots and explanations
    :param below: whether values below the limits count as beyond them, instead of values above
    :param streak: how many consecutive values must be beyond a limit
    :param after_start: whether the first tenth of the rows, at least five, is left out, unless all rows are far beyond
        the alarm (:data:`FAR_BEYOND`)
    :param warm_up: how many rows the measure needs before its first value
    :param is_percentage: whether the series is a share, which is written as a percentage
    :param is_flag: whether the series only says yes (not 0) or no (0)
    :param needs: keys that :class:`DoctorCallback` adds to a log, without which there is nothing to compare
    """

    name: str
    title: str
    measure: Measure
    quantity: str
    watch: float
    alarm: float | None
    meaning: str
    first: str
    source: str
    keys: tuple[str, ...]
    below: bool = False
    streak: int = 3
    after_start: bool = False
    warm_up: int = 0
    is_percentage: bool = False
    is_flag: bool = False
    needs: tuple[str, ...] = ()

    @property
    def fewest_rows(self) -> int:
        """With fewer rows than this, the rule can say nothing (but see :data:`FAR_BEYOND`)."""
        return max(self.warm_up, N_START if self.after_start else 0) + self.streak


RULES = (
    Rule(
        "not_finite", "A logged value is NaN or infinite", measures.not_finite,
        "A loss, a statistic or a return was NaN or infinite",
        watch=0.5, alarm=0.5, streak=1, is_flag=True,
        meaning="The networks or the environments have produced NaN or infinity. Whatever is learnt from then on is "
        "lost.",
        first="Wrap the environments in Stable-Baselines3's `VecCheckNan` to see where it begins. If it begins in the "
        "update: {smaller}, and bring the rewards to a scale of about 1 with `VecNormalize`.",
        source='Stable-Baselines3, guide "Dealing with NaNs and infs"',
        keys=("train/loss", "train/value_loss", "rollout/ep_rew_mean"),
    ),
    Rule(
        "learning_rate", "The learning rate is unusually large", logged("train/learning_rate"),
        "`learning_rate`",
        watch=0.01, alarm=0.03,
        meaning="The steps of the optimiser are so long that they overshoot: values swing, and a policy collapses onto "
        "one action within a few updates, often for good.",
        first="Lower `learning_rate`, which applies to {rate}; 1e-5 to 2e-3 is usual.",
        source=f"{_ZOO}: 1e-5 to 2e-3; above that, {_LIMITS}",
        keys=("train/learning_rate",),
    ),
    Rule(
        "ent_coef", "The entropy weighs more than the task", logged("train/ent_coef", "doctor/ent_coef"),
        "`ent_coef`",
        watch=0.1, alarm=1.0, needs=("doctor/ent_coef",),
        meaning="The bonus for acting at random outweighs what can be gained by acting well, so the policy stays "
        "random, or becomes more so.",
        first="Lower `ent_coef`; 0 to 0.01 is usual.",
        source=f"{_ZOO}: up to 0.1; above that, {_LIMITS}",
        keys=("train/ent_coef", "doctor/ent_coef", "train/entropy_loss"),
    ),
    Rule(
        "clip_range", "The clip range is too wide to hold an update back", logged("train/clip_range"),
        "`clip_range`",
        watch=0.4, alarm=0.6,
        meaning="A probability may change by this share before its gradient is cut. With so wide a range hardly any is "
        "cut, and an update goes as far as the optimiser takes it.",
        first="Lower `clip_range`; 0.1 to 0.3 is usual.",
        source=f"{_PPO}, table 1: 0.1 to 0.3; {_ZOO}: 0.1 to 0.4; above that, {_LIMITS}",
        keys=("train/clip_range",),
    ),
    Rule(
        "gamma", "The agent looks only a few steps ahead", measures.horizon_steps,
        "The number of steps that `gamma` looks ahead, 1 / (1 - gamma), where episodes are more than twice as long,",
        watch=5.0, alarm=2.0, below=True, needs=("doctor/gamma",),
        meaning="Rewards that come later than that hardly count, so the agent does nothing to get them.",
        first="Raise `gamma`; 0.9 to 0.9999 is usual, and 0.99 the default.",
        source=f"{_ENTRIES}: 0.9 to 0.9999; below that, {_LIMITS}",
        keys=("doctor/gamma", "rollout/ep_len_mean"),
    ),
    Rule(
        "unchanged_returns", "Every episode has had the same return", measures.unchanged_returns,
        "The mean return of the episodes, `rollout/ep_rew_mean`, has not changed once",
        watch=0.5, alarm=0.5, is_flag=True,
        meaning="There is nothing to learn from: the reward is constant, or the agent has never done what is rewarded.",
        first="Look at the rewards of some episodes of random actions. If they are all the same, fix the environment. "
        "If the goal is never reached, reward steps towards it. To explore more: {entropy_up}; with Box actions, also "
        "try `use_sde=True`.",
        source=f"{_NUTS}: look at random actions first; {_LIMITS}",
        keys=("rollout/ep_rew_mean",),
    ),
    Rule(
        "reward_scale", "The rewards are too large for the critic", measures.critic_error,
        "The error of the critic, the root of `train/value_loss`,",
        watch=300.0, alarm=1000.0, after_start=True,
        meaning="The critic begins with values near 0 and moves towards the returns in small steps; where they are in "
        "the thousands, it does not get there. Where `max_grad_norm` clips actor and critic together, the gradient of "
        "the critic also leaves hardly anything of the actor's.",
        first="Bring the returns to a scale of about 1: wrap the environments in `VecNormalize` (`normalize: true` in "
        "a YAML entry), or divide the rewards by a number.",
        source=f"{_NUTS}: rescale the rewards; {_LIMITS}",
        keys=("train/value_loss", "train/grad_norm"),
    ),
    Rule(
        "constant_targets", "The returns of a rollout are all the same", measures.no_explained_variance,
        "`train/explained_variance` is NaN, because the returns that the critic learns do not vary",
        watch=0.5, alarm=0.5, is_flag=True,
        meaning="Judged by these returns, no action is better than another. Either `gamma` is 0 and each step has the "
        "same reward, or the rewards are 0 throughout.",
        first="Look at `gamma`, and at the rewards of some episodes of random actions.",
        source="Stable-Baselines3, explained_variance(): NaN where the returns do not vary",
        keys=("train/explained_variance",),
    ),
    Rule(
        "kl", "The policy moves too far in one update", measures.kl,
        "The KL divergence of an update",
        watch=0.02, alarm=0.1,
        meaning="The samples of a rollout say little about a policy this far from the one that drew them. The "
        "returns often drop after such an update.",
        first="{smaller}. {brake}",
        source=f"{_37}: usually below 0.02; {_PPO}, table 1: targets of 0.003 to 0.03; of the alarm, {_LIMITS}",
        keys=("train/approx_kl", "train/kl", "train/kl_divergence_loss"),
    ),
    Rule(
        "kl_over_target", "Updates go far beyond the target KL", measures.kl_over_target,
        "The exact KL divergence of an update, as a multiple of `target_kl`,",
        watch=2.0, alarm=10.0,
        meaning="The penalty is too weak for steps of this length, and its coefficient cannot adapt fast enough.",
        first="{smaller}. {brake}",
        source=f"{_PPO}, section 4: the coefficient is doubled above 1.5 times the target; {_LIMITS}",
        keys=("train/kl", "train/target_kl", "train/kl_coef"),
    ),
    Rule(
        "clip_fraction", "Much of the gradient is clipped away", logged("train/clip_fraction"),
        "`train/clip_fraction`, the share of samples whose ratio has left the clip range,",
        watch=0.2, alarm=0.5, is_percentage=True,
        meaning="Many samples no longer contribute when the update is over: its steps are too long, or too many.",
        first="{smaller}. {brake}",
        source=f"{_37}: a quantity to watch; {_LIMITS}",
        keys=("train/clip_fraction", "train/clip_range"),
    ),
    Rule(
        "ratio_max", "Single actions become many times as probable in one update", logged("train/ratio_max"),
        "`train/ratio_max`, the largest ratio of a new to an old probability,",
        watch=30.0, alarm=1000.0,
        meaning="Single samples dominate the update: actions that hardly ever occur in the rollout have become likely.",
        first="{smaller}. {brake}",
        source=f"Ye et al. 2020, arXiv 1912.09729: large ratios are what the second clip is for; {_LIMITS}",
        keys=("train/ratio_max",),
    ),
    Rule(
        "entropy_left", "The policy has stopped exploring", until_learnt(measures.entropy_left, at_least=0.003),
        "The entropy of the policy, as a share of its largest value,",
        watch=0.03, alarm=0.003, below=True, is_percentage=True,
        meaning="In each state it nearly always takes the same action, so it finds nothing better. That is fine if "
        "the task is solved, and too early if it is not.",
        first="{smaller}. {entropy_up}.",
        source=f"{_NUTS}: when the entropy drops too early, nothing is learnt; {_LIMITS}",
        keys=("train/entropy_loss",),
    ),
    Rule(
        "entropy_slope", "The policy stays as random as it began", measures.entropy_slope,
        "The largest share of its entropy that the policy has lost so far, by a straight line through the rows,",
        watch=0.01, alarm=0.002, below=True, streak=10, after_start=True, is_percentage=True,
        warm_up=measures.FOR_SLOPE - 1,
        meaning="After this many updates the policy prefers no action: the weight of the entropy holds it back, the "
        "advantages are noise, or its steps are far too short.",
        first="{entropy_down}. Look at `train/explained_variance`, too, and raise {step} if the KL divergence is below "
        "0.001.",
        source=f"{_NUTS}: watch the entropy; {_LIMITS}",
        keys=("train/entropy_loss", "train/ent_coef"),
    ),
    Rule(
        "std_growth", "The actions become more and more random", measures.std_growth,
        "The standard deviation of the actions, as a multiple of the first,",
        watch=2.0, alarm=5.0,
        meaning="`log_std` keeps growing. Actions beyond the bounds of the space are cut off and have the same "
        "effect, so nothing pulls it back.",
        first="{entropy_down}. Without such a weight, look at the rewards: where nothing is learnt, `log_std` wanders.",
        source=f"{_NUTS}: watch the entropy; {_LIMITS}",
        keys=("train/std", "train/entropy_loss"),
    ),
    Rule(
        "std_collapse", "The actions have lost their spread", until_learnt(measures.std_growth, at_least=0.01),
        "The standard deviation of the actions, as a multiple of the first,",
        watch=0.05, alarm=0.01, below=True,
        meaning="`log_std` keeps falling: nothing new is tried, and probability ratios become extreme.",
        first="{smaller}. {entropy_up}.",
        source=f"{_NUTS}: watch the entropy; {_LIMITS}",
        keys=("train/std", "train/entropy_loss"),
    ),
    Rule(
        "critic_learns_nothing", "The critic explains nothing of the returns", measures.best_explained_variance,
        "The largest `train/explained_variance` so far",
        watch=0.05, alarm=0.05, below=True, streak=10, after_start=True,
        meaning="A critic that always predicts the same number would do as well. It is not trained, too small, trained "
        "too slowly, or sees observations that do not predict the returns.",
        first="Check that {critic_is_trained}. {critic}.",
        source=f"{_NUTS}: of a critic that helps it is between 0 and 1; {_LIMITS}",
        keys=("train/explained_variance", "train/value_loss"),
    ),
    Rule(
        "explained_variance", "The critic is worse than none", until_learnt(logged("train/explained_variance")),
        "`train/explained_variance`",
        watch=-0.05, alarm=None, below=True, after_start=True,
        meaning="Its values add noise to the advantages: always predicting the mean return would be better. It lags "
        "behind a policy that changes fast, or has fitted earlier rollouts too closely.",
        first="{critic}. {samples}.",
        source=f"{_NUTS}: below 0 it is worse than predicting nothing; to -0.05 it may be chance",
        keys=("train/explained_variance", "train/value_loss"),
    ),
    Rule(
        "advantage_bias", "The critic is wrong in one direction", until_learnt(measures.advantage_bias),
        "The distance of the mean advantage from 0, in standard deviations,",
        watch=1.0, alarm=None, after_start=True, needs=("doctor/advantage_mean",),
        meaning="Nearly all actions look better than expected, or nearly all worse: the critic has not caught up with "
        "the returns. Where advantages are normalised, the actor does not see it.",
        first="{critic}. {scale}",
        source=f"by definition, advantages have the mean 0; {_LIMITS}",
        keys=("doctor/advantage_mean", "doctor/advantage_std"),
    ),
    Rule(
        "advantage_skew", "A few samples carry the whole update", until_learnt(measures.advantage_skew),
        "The skewness of the advantages, of either sign,",
        watch=10.0, alarm=None, after_start=True, needs=("doctor/advantage_skew",),
        meaning="A handful of very large advantages decides, as with a rare reward or a rare crash; the next rollout "
        "may say something else.",
        first="{samples}. Clip or rescale such rewards.",
        source=f"a symmetric distribution has 0; {_LIMITS}",
        keys=("doctor/advantage_skew",),
    ),
    Rule(
        "gradient_clipping", "Clipping leaves hardly anything of the gradients", measures.gradient_over_limit,
        "The mean norm of the gradients, as a multiple of `max_grad_norm`,",
        watch=1000.0, alarm=None, after_start=True, needs=("doctor/max_grad_norm",),
        meaning="They are clipped to a small part of their norm, so every step has the same length. Where actor and "
        "critic are clipped together, the gradient of the critic drowns out that of the actor.",
        first="Bring the returns to a scale of about 1 with `VecNormalize`{or_weight}.",
        source=_LIMITS,
        keys=("train/grad_norm",),
    ),
    Rule(
        "line_search", "Line searches fail", measures.line_search_failures,
        "The share of failed line searches among the last ten",
        watch=0.3, alarm=0.7, is_percentage=True, warm_up=measures.WINDOW - 1,
        meaning="A failed search leaves the policy as it was: no step along the natural gradient was both within "
        "`target_kl` and an improvement. The direction is too rough, or there is nothing left to improve.",
        first="Raise `cg_damping` or `cg_max_steps`, or `line_search_max_iter`. {samples}.",
        source=f"{_TRPO}, appendix C; {_LIMITS}",
        keys=("train/is_line_search_success",),
    ),
    Rule(
        "kl_coef_bound", "The KL coefficient is at its bound", measures.at_bound,
        "`train/kl_coef` is at `kl_coef_min` or `kl_coef_max`, and can go no further",
        watch=0.5, alarm=1.5, is_flag=True,
        meaning="At the upper bound, updates are too long for any penalty; at the lower one they stay below "
        "`target_kl` without one.",
        first="At the upper bound: {smaller}. At the lower one: raise `learning_rate` or `n_epochs`, or lower "
        "`target_kl`.",
        source=f"{_PPO}, section 4; {_LIMITS}",
        keys=("train/kl_coef",),
    ),
    Rule(
        "horizon", "Episodes are far longer than the agent looks ahead", measures.horizon_share,
        "The number of steps that `gamma` looks ahead, 1 / (1 - gamma), as a share of an episode,",
        watch=0.02, alarm=None, below=True, is_percentage=True, needs=("doctor/gamma",),
        meaning="What happens at the end of an episode does not count at its beginning. That does no harm where good "
        "steps are rewarded at once, and much where a goal is rewarded late.",
        first="Raise `gamma` if rewards come late.",
        source=f"{_ENTRIES}: gamma from 0.9 to 0.9999; {_LIMITS}",
        keys=("doctor/gamma", "rollout/ep_len_mean"),
    ),
    Rule(
        "speed", "The training has become slower", measures.speed,
        "`time/fps`, the steps per second since the beginning, as a share of the best value,",
        watch=0.5, alarm=None, below=True, is_percentage=True, warm_up=measures.FIRST,
        meaning="Steps take longer than before: another program needs the processor, the environments become slower "
        "as the agent gets further, or something grows that is never emptied.",
        first="Look at the processor and the memory of the machine (`top`), then at what the environments and the "
        "callbacks keep.",
        source=_LIMITS,
        keys=("time/fps",),
    ),
)  # fmt: skip
