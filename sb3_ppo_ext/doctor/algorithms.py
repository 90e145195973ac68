"""Which algorithm wrote a log, and what its arguments are called."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from sb3_ppo_ext.doctor.run import Run


class Algorithm(NamedTuple):
    """
    An algorithm, as its log shows it.

    :param name: its name for users
    :param keys: log keys that it has and the algorithms after it in :data:`ALGORITHMS` lack
    :param words: parts of sentences, by the names in braces that they replace in the texts of rules
    """

    name: str
    keys: frozenset[str]
    words: Mapping[str, str]


_NETWORK = "give the critic a larger network (`policy_kwargs={'net_arch': {'pi': [64, 64], 'vf': [256, 256]}}`)"
_OWN_RATE = f"{_NETWORK} or a rate of its own (`critic_learning_rate` in `policy_kwargs`)"
_NO_ENTROPY = "this TRPO has no weight for the entropy"

_PPO = {
    "smaller": "divide `learning_rate` by 3, or lower `n_epochs`",
    "brake": "`target_kl=0.03` also ends an update that goes too far.",
    "samples": "raise `n_steps` or the number of environments",
    "critic": f"raise `vf_coef`, or {_NETWORK}",
    "critic_is_trained": "`vf_coef` and `learning_rate` are not 0, and that nothing has frozen the critic",
    "entropy_up": "raise `ent_coef` (0.001 to 0.01 is usual)",
    "entropy_down": "lower `ent_coef`; 0 is the default",
    "rate": "the actor and the critic",
    "step": "`learning_rate`",
    "scale": "If `train/value_loss` is in the thousands, wrap the environments in `VecNormalize`.",
    "or_weight": ", or lower `vf_coef`",
}
_OURS = {**_PPO, "critic": f"raise `vf_coef`, or {_OWN_RATE}"}
_A2C = {**_PPO, "smaller": "divide `learning_rate` by 3", "brake": ""}
_TRPO = {
    **_PPO,
    "smaller": "lower `target_kl`",
    "brake": "",
    "critic": f"raise `n_critic_updates` or `learning_rate`, which is the critic's alone, or {_NETWORK}",
    "critic_is_trained": "`learning_rate` is not 0, and that nothing has frozen the critic",
    "rate": "the critic alone",
    "step": "`target_kl`",
    "or_weight": "",
}
_REINFORCE = {
    **_A2C,
    "samples": "raise `episodes_per_env` or the number of environments",
    "critic": f"raise `n_critic_updates`, or {_OWN_RATE}. `baseline='leave_one_out'` needs no critic",
    "critic_is_trained": "`learning_rate` is not 0, and that nothing has frozen the critic",
    "or_weight": "",
}

LARGE_RETURNS = {
    "critic": "bring the returns to a scale of about 1 with `VecNormalize` before you change anything about the critic",
    "scale": "",
    "or_weight": "",
}
"""Words for runs whose returns are too large for any critic, in place of the algorithm's own."""

ALGORITHMS = (
    Algorithm(
        "AdaptiveKLPPO",
        frozenset({"train/kl_coef"}),
        {**_OURS, "brake": "A larger `kl_coef` holds the first updates back."},
    ),
    Algorithm("DualClipPPO", frozenset({"train/dual_clip_fraction"}), _OURS),
    Algorithm("TRPO", frozenset({"train/is_line_search_success", "train/cg_damping"}), _TRPO),
    Algorithm(
        "TRPO of sb3-contrib",
        frozenset({"train/is_line_search_success"}),
        {**_TRPO, "entropy_up": _NO_ENTROPY, "entropy_down": _NO_ENTROPY},
    ),
    Algorithm("A2C", frozenset({"train/policy_loss"}), _A2C),
    Algorithm("PPO", frozenset({"train/approx_kl"}), _PPO),
    Algorithm("REINFORCE", frozenset({"train/policy_gradient_loss"}), _REINFORCE),
)
"""Ordered from the most specific keys to the least specific."""


def algorithm_of(run: Run) -> Algorithm:
    """The first of :data:`ALGORITHMS` whose keys the log has, or an unknown algorithm if there is none."""
    known = (algorithm for algorithm in ALGORITHMS if algorithm.keys <= run.series.keys())
    return next(known, Algorithm("an unknown algorithm", frozenset(), _PPO))
