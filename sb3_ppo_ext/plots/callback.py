"""A callback that logs figures of updates to TensorBoard."""

from __future__ import annotations

from typing import cast

from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.logger import Figure, TensorBoardOutputFormat

from sb3_ppo_ext.common.proximal import ProximalAlgorithm
from sb3_ppo_ext.common.rollout.data import RolloutSamples
from sb3_ppo_ext.common.validation import check_int
from sb3_ppo_ext.plots.updates import check_has_objective, draw_update, rollout_of, updated_samples

KEY = "plots/update"
_EXCLUDED = ("stdout", "log", "json", "csv")  # these cannot show figures


class ObjectiveFigureCallback(BaseCallback):
    """
    Logs :func:`update_figure` to TensorBoard as the image ``plots/update``, after every so many updates. The training
    is not affected. The figure is logged at the same step as the other values of its update.

    :param every: number of rollouts between two figures, at least 1; the first figure shows rollout ``every``
    :raises ValueError: if ``every`` is out of range; when the training begins, if the algorithm has no such objective
    """

    def __init__(self, every: int = 10) -> None:
        super().__init__()
        check_int("every", every, minimum=1)
        self.every = every
        self._n_rollouts = 0
        self._rollout: RolloutSamples | None = None  # to be drawn after its update

    def _init_callback(self) -> None:
        check_has_objective("ObjectiveFigureCallback", self.model)

    def _on_step(self) -> bool:
        return True

    def _on_rollout_end(self) -> None:
        self._n_rollouts += 1
        if self._n_rollouts % self.every == 0:
            # When the update is over and the next rollout starts, the buffer is empty.
            self._rollout = rollout_of("ObjectiveFigureCallback", cast(ProximalAlgorithm, self.model))

    def _on_rollout_start(self) -> None:
        figure = self._figure()
        if figure is not None:
            self.logger.record(KEY, figure, exclude=_EXCLUDED)

    def _on_training_end(self) -> None:
        figure = self._figure()
        if figure is not None:  # the last update, which SB3 does not dump
            for writer in self.logger.output_formats:
                if isinstance(writer, TensorBoardOutputFormat):
                    writer.write({KEY: figure}, {KEY: _EXCLUDED}, self.model.num_timesteps)

    def _figure(self) -> Figure | None:
        rollout, self._rollout = self._rollout, None
        if rollout is None:
            return None
        model = cast(ProximalAlgorithm, self.model)
        return Figure(draw_update(model, updated_samples(model, rollout)), close=False)
