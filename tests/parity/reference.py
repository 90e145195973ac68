"""An update of PPO written out plainly, for what SB3 has not; and how often each clip was at work."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3 import PPO


class PlainPPO(PPO):
    """
    SB3's PPO, except for its update: that is one loss per sample, as the papers write it, and torch's own Adam.

    :param args: as PPO takes them
    :param dual_clip: lower bound of the objective in units of a negative advantage; None: no bound
    :param clip_range_high: how far the ratio may rise above 1; None: as far as it may fall below
    :param kwargs: as PPO takes them
    """

    def __init__(
        self, *args: Any, dual_clip: float | None = None, clip_range_high: float | None = None, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self.dual_clip, self.clip_range_high = dual_clip, clip_range_high
        self._happened: defaultdict[str, list[float]] = defaultdict(list)

    def happened(self) -> dict[str, float]:
        """For what share of the samples (of the steps, for norms) each clip was at work in the last update."""
        return {name: float(np.mean(shares)) for name, shares in self._happened.items()}

    def train(self) -> None:
        self._happened.clear()
        self._update_learning_rate(self.policy.optimizer)
        low = self.clip_range(self._current_progress_remaining)
        high = low if self.clip_range_high is None else self.clip_range_high
        vf = None if self.clip_range_vf is None else self.clip_range_vf(self._current_progress_remaining)
        for _ in range(self.n_epochs):
            for batch in self.rollout_buffer.get(self.batch_size):
                actions = batch.actions
                if isinstance(self.action_space, spaces.Discrete):
                    actions = actions.long().flatten()
                values, log_prob, entropy = self.policy.evaluate_actions(batch.observations, actions)
                values, a = values.flatten(), batch.advantages
                if self.normalize_advantage:
                    a = (a - a.mean()) / (a.std() + 1e-8)
                r = (log_prob - batch.old_log_prob).exp()

                above, below = (r > 1 + high) & (a > 0), (r < 1 - low) & (a < 0)
                objective = th.where(above, (1 + high) * a, th.where(below, (1 - low) * a, r * a))
                bounded = (r > self.dual_clip) & (a < 0) if self.dual_clip is not None else th.zeros_like(a).bool()
                objective = th.where(bounded, a * (self.dual_clip or 0.0), objective)

                moved = values - batch.old_values
                far = moved.abs() > vf if vf is not None else th.zeros_like(a).bool()
                error = th.where(far, batch.old_values + moved.sign() * (vf or 0.0), values) - batch.returns

                loss = -objective.mean() + self.vf_coef * error.square().mean()
                loss = loss - self.ent_coef * (-log_prob if entropy is None else entropy).mean()
                self.policy.optimizer.zero_grad()
                loss.backward()
                norm = th.nn.utils.clip_grad_norm_(self.policy.parameters(), self.max_grad_norm)
                self.policy.optimizer.step()
                large = norm > self.max_grad_norm
                for name, cases in zip(
                    ("above", "below", "bounded", "values", "norms"),
                    (above, below, bounded, far, large),
                    strict=True,
                ):
                    self._happened[name].append(cases.float().mean().item())
            self._n_updates += 1
