"""Which algorithm has written a log, and what its arguments are called."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from sb3_ppo_ext.doctor.run import Run


class Algorithm(NamedTuple):
    """
    An algorithm as its log shows it.

    :param name: as its users know it
    :param keys: log keys that it has and those after it in :data:`ALGORITHMS` lack
    :param words: what rules say of it: by a name in braces in their texts, a part of a sentence
    """

    name: str
    keys: frozenset[str]
    words: Mapping[str, str]


_EPOCHS = "`learning_rate` by a factor of 3, or `n_epochs`"
_STEPS = "`n_steps` or the number of environments"
_NET = "the critic's network (`policy_kwargs={'net_arch': {'pi': [64, 64], 'vf': [256, 256]}}`)"
_OWN_RATE = "`critic_learning_rate` in `policy_kwargs`"

_PPO = {
    "smaller": f"Lower {_EPOCHS}; `target_kl=0.03` ends an update that goes too far",
    "samples": f"Raise {_STEPS}",
    "critic": f"Raise `vf_coef` or {_NET}, and lower `gae_lambda` last",
    "critic_is_trained": "`vf_coef` is above 0, that `learning_rate` is not 0, and that nothing has frozen the critic",
    "entropy_up": "Raise `ent_coef` (0.001 to 0.01 is usual)",
    "entropy_down": "Lower `ent_coef`; 0 is the default",
    "rate": "the actor and the critic",
    "rate_or_target": "`learning_rate`",
}
_OURS = {"critic": f"Raise `vf_coef`, {_NET} or {_OWN_RATE}"}
_TRPO = {
    "smaller": "Lower `target_kl`",
    "samples": f"Raise {_STEPS}",
    "critic": f"Raise `n_critic_updates`, `learning_rate` (in TRPO it is the critic's alone) or {_NET}",
    "critic_is_trained": "`learning_rate` (in TRPO the critic's) is not 0, and that nothing has frozen the critic",
    "rate": "the critic; the step of the actor follows from `target_kl`",
    "rate_or_target": "`target_kl`",
}

ALGORITHMS = (
    Algorithm("AdaptiveKLPPO", frozenset({"train/kl_coef"}), {
        **_PPO, **_OURS, "smaller": f"Lower {_EPOCHS}; a larger `kl_coef` holds the first updates back",
    }),
    Algorithm("DualClipPPO", frozenset({"train/dual_clip_fraction"}), {**_PPO, **_OURS}),
    Algorithm("TRPO", frozenset({"train/is_line_search_success", "train/cg_damping"}), {
        **_TRPO,
        "entropy_up": "Raise `ent_coef` (0.001 to 0.01 is usual)",
        "entropy_down": "Lower `ent_coef`; 0 is the default",
    }),
    Algorithm("TRPO of sb3-contrib", frozenset({"train/is_line_search_success"}), {
        **_TRPO,
        "entropy_up": "Lower `target_kl`: this TRPO has no weight for the entropy",
        "entropy_down": "Look at the rewards: this TRPO has no weight for the entropy that could be lowered",
    }),
    Algorithm("A2C", frozenset({"train/policy_loss"}), {**_PPO, "smaller": "Lower `learning_rate` by a factor of 3"}),
    Algorithm("PPO", frozenset({"train/approx_kl"}), _PPO),
    Algorithm("REINFORCE", frozenset({"train/policy_gradient_loss"}), {
        **_OURS,
        "smaller": "Lower `learning_rate` by a factor of 3",
        "samples": "Raise `episodes_per_env` or the number of environments",
        "critic": f"Raise `n_critic_updates`, {_OWN_RATE} or {_NET}; or take `baseline='leave_one_out'`, which needs "
        "no critic",
        "critic_is_trained": "`learning_rate` is not 0, and that nothing has frozen the critic",
        "entropy_up": _PPO["entropy_up"],
        "entropy_down": _PPO["entropy_down"],
        "rate": "the actor and the critic",
        "rate_or_target": "`learning_rate`",
    }),
)  # fmt: skip
"""From the one with the most particular keys on."""


def algorithm_of(run: Run) -> Algorithm:
    """The first of :data:`ALGORITHMS` whose keys the log has; of a log without any, one that is called "unknown"."""
    known = (algorithm for algorithm in ALGORITHMS if algorithm.keys <= run.series.keys())
    return next(known, Algorithm("an unknown algorithm", frozenset(), _PPO))
