"""The doctor as a callback of a training."""

from __future__ import annotations

from typing import Any

from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.logger import KVWriter

from sb3_ppo_ext.common.errors import ArgumentError
from sb3_ppo_ext.doctor.diagnosis import Diagnosis, diagnose, finding_in_words
from sb3_ppo_ext.doctor.measurements import measurements
from sb3_ppo_ext.doctor.run import run_of_rows


class _Rows(KVWriter):
    """Keeps the rows that are logged."""

    def __init__(self) -> None:
        self.rows: list[tuple[int, dict[str, Any]]] = []

    def write(self, key_values: dict[str, Any], key_excluded: dict[str, tuple[str, ...]], step: int = 0) -> None:
        self.rows.append((step, dict(key_values)))

    def close(self) -> None:
        pass


class DoctorCallback(BaseCallback):
    """
    Reads the log of a training while it runs, and says what looks wrong: what was seen and since when, what it usually
    means, and what to change first. It works with every on-policy algorithm of Stable-Baselines3, sb3-contrib and this
    package.

    It also logs what the algorithms do not log: the distribution of advantages and returns, and hyper-parameters that
    the rules need, all under ``doctor/``. ``sb3-ppo-ext doctor`` reads them there.

    It sees only what the logger dumps: with ``log_interval=None`` nothing, and with ``log_interval=100`` one rollout in
    a hundred.

    :param verbose: 0 to print nothing and only provide :attr:`diagnosis`; 1 to print each finding once, when it
        appears, and again if its level rises from "watch" to "alarm"
    """

    def __init__(self, verbose: int = 1) -> None:
        super().__init__(verbose)
        self._log = _Rows()
        self._told: dict[str, str] = {}
        self._next_check = 1

    @property
    def diagnosis(self) -> Diagnosis:
        """What the rules say about the training so far."""
        name = type(self.model).__name__ if hasattr(self, "model") else "run"
        return diagnose(run_of_rows(name, self._log.rows))

    def _init_callback(self) -> None:
        if not hasattr(self.model, "rollout_buffer"):
            raise ArgumentError(
                f"DoctorCallback is not allowed with {type(self.model).__name__}: it is for on-policy algorithms"
            )

    def _on_training_start(self) -> None:
        if self.model.num_timesteps == 0:  # otherwise an earlier training continues
            self._log, self._told, self._next_check = _Rows(), {}, 1
        self._stop_reading()  # an interrupted training may have left a writer
        self.logger.output_formats.append(self._log)

    def _on_step(self) -> bool:
        return True

    def _on_rollout_start(self) -> None:
        n_rows = len(self._log.rows)
        if n_rows >= self._next_check:
            self._next_check = n_rows + 1 + n_rows // 20  # so that a long training is not slowed down
            self._say_what_is_new()

    def _on_rollout_end(self) -> None:
        for name, value in measurements(self.model).items():
            if f"train/{name}" not in self.logger.name_to_value:
                self.logger.record(f"doctor/{name}", value)

    def _on_training_end(self) -> None:
        if self.logger.name_to_value:  # the last update, which was not dumped
            self._log.write(self.logger.name_to_value, {}, self.model.num_timesteps)
        self._stop_reading()
        diagnosis = self._say_what_is_new()
        if self.verbose >= 1:
            print(f"Doctor: {diagnosis.verdict()}")

    def _stop_reading(self) -> None:
        formats = self.logger.output_formats
        formats[:] = [writer for writer in formats if not isinstance(writer, _Rows)]

    def _say_what_is_new(self) -> Diagnosis:
        diagnosis = self.diagnosis
        for finding in diagnosis.findings:
            if self._told.get(finding.rule.name) not in ("alarm", finding.level):
                self._told[finding.rule.name] = finding.level
                if self.verbose >= 1:
                    print("Doctor:", *finding_in_words(finding), sep="\n")
        return diagnosis
