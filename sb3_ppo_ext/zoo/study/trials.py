"""Trials of a study: their hyper-parameters, values and errors, and how one is run."""

from __future__ import annotations

import copy
import re
import traceback
from collections.abc import Iterable
from datetime import datetime
from typing import Any

import optuna
import rl_zoo3.exp_manager
from optuna.trial import FrozenTrial, TrialState
from rl_zoo3.exp_manager import ExperimentManager

from sb3_ppo_ext.zoo.errors import StudyError
from sb3_ppo_ext.zoo.search_spaces import POLICY

# Attributes of a trial that we store.
REASON = "reason"  # why it has failed or was pruned
WORKER = "worker"  # the name of the process that runs it
BUDGET = "budget"  # its steps and evaluations

_MAX_ERRORS = 10  # `train -optimize` ends after this many errors in a row

_DRAWN = {
    "n_minibatches": "n_minibatches = n_envs * n_steps / batch_size",
    "n_episodes": "n_episodes = n_envs * episodes_per_env",
    "clip_range_ratio": "clip_range_ratio = clip_range_high / clip_range",
    "data": "data is fresh, recomputed (recompute_advantages) or reused (n_reused_rollouts, reuse)",
    "learning_rate_schedule": "learning_rate_schedule is const, lin or cos (in learning_rate)",
}
"""What is drawn by a name that is no argument of an algorithm, and the arguments that it becomes."""

Params = dict[str, Any]


def evaluate_python(value: Any) -> Any:
    """
    :param value: a value of an entry; where rl_zoo3 allows it, a string of Python, e.g. for ``policy_kwargs``
    :return: the value as rl_zoo3 evaluates it
    """
    return eval(value, vars(rl_zoo3.exp_manager)) if isinstance(value, str) else value


def merge_hyperparams(entry: Params, drawn: Params) -> Params:
    """
    Merge the hyper-parameters of a trial into those of the entry, which they replace. Only keyword arguments, whose
    names end in ``_kwargs``, are merged one by one, at any depth. So an entry keeps its features extractor when the
    width of the layers is drawn. A ``net_arch`` is replaced as a whole.

    :param entry: hyper-parameters of the entry
    :param drawn: hyper-parameters of a trial
    :return: the merged hyper-parameters; the arguments are not changed
    """
    both = {**entry, **drawn}
    for name in entry.keys() & drawn.keys():
        if name.endswith("_kwargs"):
            before, after = evaluate_python(entry[name]), evaluate_python(drawn[name])
            if isinstance(before, dict) and isinstance(after, dict):
                both[name] = merge_hyperparams(before, after)
    return both


def decode_param(name: str, value: Any) -> tuple[str, Any]:
    """
    :param name: name of a drawn number in rl_zoo3's samplers and ours
    :param value: the drawn number
    :return: the hyper-parameter and its value: ``batch_size`` and 32 for ``batch_size_pow`` and 5
    """
    if name.startswith("one_minus_"):
        return name.removeprefix("one_minus_"), 1 - value
    if name.endswith("_pow"):
        return name.removesuffix("_pow"), 2**value
    return name, value


def explain_drawn(names: Iterable[str]) -> str:
    """Sentences that say which arguments the numbers become that are drawn in another form; empty if none is."""
    known = set(names)
    drawn = [text for name, text in _DRAWN.items() if name in known]
    if "kl_adaptive_lr" in known and drawn:
        drawn[-1] += ", or kl (kl_adaptive_lr)"
    if not drawn:
        return ""
    return f"The search draws some numbers in another form: {'; '.join(drawn)}. `study export` writes the arguments."


def format_value(value: Any) -> str:
    """The value of a hyper-parameter in a short form."""
    if value == {}:  # a part of an algorithm that is on, with its defaults
        return "on"
    if isinstance(value, dict):  # a net_arch, which is often the same for actor and critic
        parts = {name: format_value(part) for name, part in value.items()}
        if len(set(parts.values())) == 1:
            return next(iter(parts.values()))
        return ", ".join(f"{name} {part}" for name, part in parts.items())
    if isinstance(value, float):
        return f"{value:.5g}" if 0.9 < value < 1 else f"{value:.3g}"  # 1 - value matters there
    if isinstance(value, str):  # a schedule contains numbers, too
        return re.sub(r"\d+\.\d+(e-?\d+)?", lambda number: format_value(float(number[0])), value)
    return getattr(value, "__name__", str(value))


def evaluations(trial: FrozenTrial) -> dict[int, float]:
    """The results of a trial's evaluations by their steps, or by their numbers if another program ran the trial."""
    n_timesteps, n_evaluations = trial.user_attrs.get(BUDGET, (1, 1))
    return {number * n_timesteps // n_evaluations: value for number, value in sorted(trial.intermediate_values.items())}


def last_value(trial: FrozenTrial) -> float | None:
    """The value of a trial, or else that of its last evaluation, or None if there was no evaluation."""
    return next(reversed(evaluations(trial).values()), None) if trial.value is None else float(trial.value)


def duration(trial: FrozenTrial) -> str:
    """How long a trial took, or has been running."""
    start, end = trial.datetime_start or datetime.now(), trial.datetime_complete or datetime.now()
    return f"{(end - start).total_seconds():.0f} s"


class _TrialHyperparams(dict[str, Any]):
    """
    The hyper-parameters of an entry. rl_zoo3 copies them for each trial and updates the copy with the drawn ones. A
    plain update would drop the entry's ``policy_kwargs``; this one merges them.

    :param hyperparams: hyper-parameters of the entry
    :param normalize_kwargs: arguments of the trial's ``VecNormalize``, which get the gamma of the trial
    """

    def __init__(self, hyperparams: Params, normalize_kwargs: Params) -> None:
        super().__init__(hyperparams)
        self.normalize_kwargs = normalize_kwargs

    def copy(self) -> _TrialHyperparams:
        return _TrialHyperparams(self, self.normalize_kwargs)

    def update(self, drawn: Params) -> None:  # type: ignore[override]
        super().update(merge_hyperparams(self, drawn))
        if "gamma" in drawn:
            self.normalize_kwargs["gamma"] = drawn["gamma"]


def run_trial(manager: ExperimentManager, trial: optuna.Trial) -> float:
    """
    Run rl_zoo3's objective. A trial that ends with an error is marked as failed, not as pruned, and stores the reason.

    rl_zoo3 prunes a trial that raises a ValueError or an AssertionError, for example for a NaN, and drops the message.
    Here such a trial has the value NaN; Optuna marks it as failed and goes on with the next trial.

    :param manager: manager of the study
    :param trial: trial to run
    :return: the mean reward of the last evaluation; NaN if an error ended the training
    """
    own = copy.copy(manager)  # trials may run in threads, with different gammas
    own.normalize_kwargs = dict(manager.normalize_kwargs)
    own._hyperparams = _TrialHyperparams(manager._hyperparams, own.normalize_kwargs)
    trial.set_user_attr(POLICY, str(own._hyperparams["policy"]))
    try:
        return float(ExperimentManager.objective(own, trial))
    except optuna.TrialPruned as pruned:
        error = pruned.__cause__
        *_, (innermost, _) = traceback.walk_tb(pruned.__traceback__)
        if error is None or innermost.f_globals["__name__"] != "rl_zoo3.exp_manager":
            if pruned.args:  # a callback gave a reason
                trial.set_user_attr(REASON, str(pruned))
            raise
        trial.set_user_attr(REASON, _describe(error))
        if _all_recent_failed(trial):
            raise StudyError(f"{_MAX_ERRORS} trials in a row have failed, the last with {_describe(error)}") from error
        return float("nan")
    except Exception as error:
        trial.set_user_attr(REASON, _describe(error))
        raise


def _describe(error: BaseException) -> str:
    """An error's type and message, in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}".removesuffix(": ")


def _all_recent_failed(trial: optuna.Trial) -> bool:
    """Whether the trials before this one, which failed with an error, failed with errors as well."""
    ended = [other for other in trial.study.get_trials(deepcopy=False) if other.state.is_finished()]
    last = ended[1 - _MAX_ERRORS :]
    return len(last) == _MAX_ERRORS - 1 and all(map(failed_with_error, last))


def failed_with_error(trial: FrozenTrial) -> bool:
    """Whether a trial was ended by an error, and not by an interruption."""
    return trial.state is TrialState.FAIL and REASON in trial.user_attrs
