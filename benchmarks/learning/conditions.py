"""What the runs of a set have in common in the study of old data: how old it is, and side checks."""

from __future__ import annotations

import re
from typing import Any, NamedTuple

BUDGET = 300_000

CHECKS: dict[str, dict[str, Any]] = {
    "learning_rate_x3": {"learning_rate": 9e-4},
    "no_gradient_clipping": {"max_grad_norm": 1e9},  # which no gradient reaches; JSON has no infinity
}


class Condition(NamedTuple):
    """
    Either the rollouts wait, or they are reused, or they are fresh.

    :param lag: updates that each rollout waits before it is learnt from, once
    :param reuse: K, the rollouts before the newest that an update learns from too
    :param n_epochs: of an update
    :param check: a key of :data:`CHECKS`; None: the documented defaults
    """

    lag: int = 0
    reuse: int = 0
    n_epochs: int = 10
    check: str | None = None

    @classmethod
    def of_set(cls, name: str) -> Condition | None:
        """
        :param name: of a set of runs
        :return: None if it is none of this study
        """
        found = re.fullmatch(r"(lag|reuse)-(\d+)-epochs-(\d+)(?:-(\w+))?", name)
        if found is None or found[4] not in (None, *CHECKS):
            return None
        return cls(n_epochs=int(found[3]), check=found[4], **{found[1]: int(found[2])})

    @property
    def set(self) -> str:
        """The name of the set of runs, and of their folder."""
        age = f"reuse-{self.reuse}" if self.reuse else f"lag-{self.lag}"
        return "-".join([age, f"epochs-{self.n_epochs}", *([self.check] if self.check else [])])

    def __str__(self) -> str:
        age = f"{self.reuse} reused" if self.reuse else f"lag {self.lag}"
        return ", ".join([age, f"{self.n_epochs} epochs", *([self.check.replace("_", " ")] if self.check else [])])

    def refusal(self, arm: str) -> str | None:
        """
        :param arm: a key of :data:`benchmarks.learning.arms.ARMS`
        :return: why it is not run here; None if it is
        """
        if arm == "decoupled" and not (self.lag or self.reuse):
            return "on fresh data the policy that acted is the one that an update begins with, so that decoupled is ppo"
        return None

    def entry(self, arm: str) -> dict[str, Any]:
        """
        :param arm: a key of :data:`benchmarks.learning.arms.ARMS`
        :return: the hyper-parameters that a run has of the condition
        """
        values: dict[str, Any] = {"n_epochs": self.n_epochs, "n_timesteps": BUDGET, **CHECKS.get(self.check or "", {})}
        if not self.reuse:
            return {"lag": self.lag, **values}
        if arm == "decoupled":
            values["reuse"] = {"proximal": "newest"}
        return {"n_reused_rollouts": self.reuse, **values}
