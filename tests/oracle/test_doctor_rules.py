"""The doctor's rules on made-up series: where each begins, from which step on, and what they are computed from."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest

from sb3_ppo_ext.doctor import measures
from sb3_ppo_ext.doctor.algorithms import ALGORITHMS, algorithm_of
from sb3_ppo_ext.doctor.diagnosis import Finding, diagnose, in_words, number, percentage
from sb3_ppo_ext.doctor.keys import MEANINGS
from sb3_ppo_ext.doctor.rules import RULES
from sb3_ppo_ext.doctor.run import Run, Series

N_ROWS = 40
STEPS = 1000 * np.arange(1, N_ROWS + 1)


def run(**columns: Any) -> Run:
    """A run of 40 rows, at steps 1000, 2000, ...; ``train__std=x`` is ``train/std``, a number or one for each row."""
    series = {
        key.replace("__", "/"): Series(STEPS, np.broadcast_to(np.asarray(values, dtype=float), N_ROWS))
        for key, values in columns.items()
    }
    return Run("made up", series)


def found(name: str, made_up: Run) -> Finding | None:
    return next((finding for finding in diagnose(made_up).findings if finding.rule.name == name), None)


def level(name: str, made_up: Run) -> str | None:
    finding = found(name, made_up)
    return None if finding is None else finding.level


def after(first: float, value: float) -> np.ndarray:
    """One row with the first number, then the other."""
    return np.concatenate(([first], np.full(N_ROWS - 1, value)))


def failing(share: float) -> np.ndarray:
    """Of each ten line searches in a row, this share fails."""
    return (np.arange(N_ROWS) % 10 >= round(10 * share)).astype(float)


def falling(share: float) -> np.ndarray:
    """An entropy loss: from -1, on a straight line, to this share less."""
    return -np.linspace(1.0, 1.0 - share, N_ROWS)


# Of each rule: what makes a run whose measure is a number, and numbers from which on it is worth a look, and an alarm.
LIMITS: dict[str, tuple[Callable[[float], Run], float, float | None]] = {
    "learning_rate": (lambda x: run(train__learning_rate=x), 0.01, 0.03),
    "ent_coef": (lambda x: run(train__ent_coef=x), 0.1, 1.0),
    "clip_range": (lambda x: run(train__clip_range=x), 0.4, 0.6),
    "reward_scale": (lambda x: run(train__value_loss=x * x), 300.0, 1000.0),
    "kl": (lambda x: run(train__approx_kl=x), 0.02, 0.1),
    "kl_over_target": (lambda x: run(train__kl=0.5 * x, train__target_kl=0.5), 2.0, 10.0),
    "clip_fraction": (lambda x: run(train__clip_fraction=x), 0.2, 0.5),
    "ratio_max": (lambda x: run(train__ratio_max=x), 30.0, 1000.0),
    "std_growth": (lambda x: run(train__std=after(0.5, 0.5 * x)), 2.0, 5.0),
    "advantage_bias": (lambda x: run(doctor__advantage_mean=-2.0 * x, doctor__advantage_std=2.0), 1.0, None),
    "advantage_skew": (lambda x: run(doctor__advantage_skew=-x), 10.0, None),
    "gradient_clipping": (lambda x: run(train__grad_norm=0.5 * x, doctor__max_grad_norm=0.5), 1000.0, None),
    # Below:
    "gamma": (lambda x: run(doctor__gamma=1.0 - 1.0 / x, rollout__ep_len_mean=100.0), 5.0, 2.0),
    "entropy_left": (lambda x: run(train__entropy_loss=after(-2.0, -2.0 * x)), 0.03, 0.003),
    "std_collapse": (lambda x: run(train__std=after(0.5, 0.5 * x)), 0.05, 0.01),
    "critic_learns_nothing": (lambda x: run(train__explained_variance=x), 0.05, 0.05),
    "explained_variance": (lambda x: run(train__explained_variance=x), -0.05, None),
    "horizon": (lambda x: run(doctor__gamma=0.99, rollout__ep_len_mean=100.0 / x), 0.02, None),
    "speed": (lambda x: run(time__fps=np.where(np.arange(N_ROWS) < 6, 1000.0, 1000.0 * x)), 0.5, None),
}
BELOW = {*list(LIMITS)[list(LIMITS).index("gamma") :], "entropy_slope"}
TESTED_APART = {"not_finite", "unchanged_returns", "constant_targets", "line_search", "kl_coef_bound", "entropy_slope"}


def test_every_rule_is_tested() -> None:
    assert {rule.name for rule in RULES} == set(LIMITS) | TESTED_APART
    assert {rule.name for rule in RULES if rule.below} == BELOW


@pytest.mark.parametrize("name", LIMITS)
def test_a_rule_begins_at_its_limits(name: str) -> None:
    make, watch, alarm = LIMITS[name]
    towards_worse = -1.0 if name in BELOW else 1.0

    def beyond(limit: float, by: float) -> float:
        return limit + towards_worse * by * max(abs(limit), 0.01)

    assert level(name, make(beyond(watch, -0.01))) is None
    if alarm is None:
        assert level(name, make(beyond(watch, 0.01))) == "watch"
        assert level(name, make(beyond(watch, 0.9))) == "watch"
        return
    if alarm != watch:
        assert level(name, make(beyond(watch, 0.01))) == "watch"
        assert level(name, make(beyond(alarm, -0.01))) == "watch"
    assert level(name, make(beyond(alarm, 0.01))) == "alarm"


@pytest.mark.parametrize("rule", [rule for rule in RULES if rule.name in LIMITS], ids=lambda rule: rule.name)
def test_what_is_exactly_at_a_limit_is_not_beyond_it(rule: Any) -> None:
    if rule.name in ("learning_rate", "clip_range", "kl", "clip_fraction", "ent_coef", "ratio_max"):
        assert level(rule.name, LIMITS[rule.name][0](rule.watch)) is None


# ---- Flags, and what is counted ----------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["train/loss", "train/value_loss", "rollout/ep_rew_mean"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_one_number_that_is_none_is_an_alarm(key: str, value: float) -> None:
    column = np.linspace(0.0, 1.0, N_ROWS)
    column[20] = value
    finding = found("not_finite", Run("made up", {key: Series(STEPS, column)}))
    assert finding is not None
    assert (finding.level, finding.since, finding.until) == ("alarm", 21_000, 22_000)
    assert found("not_finite", Run("made up", {key: Series(STEPS, np.linspace(0.0, 1.0, N_ROWS))})) is None


def test_an_explained_variance_of_nan_means_targets_that_do_not_vary() -> None:
    made_up = run(train__explained_variance=math.nan)
    assert level("constant_targets", made_up) == "alarm"
    assert found("not_finite", made_up) is None
    assert found("constant_targets", run(train__explained_variance=0.0)) is None


def test_returns_that_have_never_changed() -> None:
    lengths = {"rollout__ep_len_mean": 200.0}  # so there are five in each of the 1000 steps between two rows
    finding = found("unchanged_returns", run(rollout__ep_rew_mean=-200.0, **lengths))
    assert finding is not None
    assert (finding.level, finding.since, finding.until) == ("alarm", 3000, None)
    solved = np.minimum(25.0 * np.arange(1, N_ROWS + 1), 500.0)  # and constant from then on
    assert found("unchanged_returns", run(rollout__ep_rew_mean=solved, **lengths)) is None
    late = np.where(np.arange(N_ROWS) < 10, 0.0, 1.0)
    finding = found("unchanged_returns", run(rollout__ep_rew_mean=late, **lengths))
    assert finding is not None
    assert (finding.since, finding.until) == (3000, 11_000)
    # One episode, which all rows tell of, is no sign.
    assert found("unchanged_returns", run(rollout__ep_rew_mean=-200.0, rollout__ep_len_mean=39_000.0)) is None


@pytest.mark.parametrize(("share", "expected"), [(0.3, None), (0.4, "watch"), (0.7, "watch"), (0.8, "alarm")])
def test_failed_line_searches_are_counted_over_ten(share: float, expected: str | None) -> None:
    assert level("line_search", run(train__is_line_search_success=failing(share))) == expected


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        ({"train__kl_coef": 1e4}, "alarm"),
        ({"train__kl_coef": 1e-4}, "watch"),
        ({"train__kl_coef": 1.0}, None),
        ({"train__kl_coef": 2.0, "doctor__kl_coef_max": 2.0}, "alarm"),
        ({"train__kl_coef": 0.5, "doctor__kl_coef_min": 0.5}, "watch"),
        ({"train__kl_coef": 1e4, "doctor__kl_coef_max": 1e5}, None),
        ({"train__kl_coef": 1e-4, "doctor__kl_coef_min": 0.0}, None),
    ],
)
def test_the_kl_coefficient_at_its_bounds(columns: dict[str, float], expected: str | None) -> None:
    assert level("kl_coef_bound", run(**columns)) == expected


def test_the_default_bounds_of_the_kl_coefficient_are_the_algorithms() -> None:
    import inspect

    from sb3_ppo_ext import AdaptiveKLPPO

    parameters = inspect.signature(AdaptiveKLPPO).parameters
    assert parameters["kl_coef_min"].default == measures.KL_COEF_MIN
    assert parameters["kl_coef_max"].default == measures.KL_COEF_MAX


@pytest.mark.parametrize(
    ("share", "expected"),
    [(0.05, None), (0.012, "watch"), (0.01, "watch"), (0.0015, "alarm"), (0.0, "alarm"), (-0.5, "alarm")],
)
def test_an_entropy_that_does_not_fall(share: float, expected: str | None) -> None:
    """In 40 rows it falls by this share, on a straight line; rows 10 to 40 are judged, ten in a row."""
    assert level("entropy_slope", run(train__entropy_loss=falling(share))) == expected
    shorter = Series(STEPS[:18], falling(share)[:18])  # of which too few rows are judged
    assert found("entropy_slope", Run("made up", {"train/entropy_loss": shorter})) is None


def test_the_slope_is_that_of_least_squares() -> None:
    entropy = 1.0 + 0.1 * np.random.default_rng(0).standard_normal(N_ROWS)
    series = measures.entropy_slope(run(train__entropy_loss=-entropy))
    assert series is not None
    assert np.isnan(series.values[:9]).all()
    lost = [-np.polyfit(np.arange(n), entropy[:n], 1)[0] * (n - 1) / entropy[0] for n in range(10, 41)]
    np.testing.assert_allclose(series.values[9:], np.maximum.accumulate(lost))


# ---- What the measures leave out ---------------------------------------------------------------------------------


def test_a_kl_with_a_target_is_compared_with_the_target_alone() -> None:
    """17 dimensions have a target of 0.17."""
    made_up = run(train__approx_kl=0.17, train__kl=0.17, train__target_kl=0.17)
    assert not diagnose(made_up).findings
    assert level("kl", run(train__kl_divergence_loss=0.17)) == "alarm"  # sb3-contrib's log has no target


def test_the_entropy_of_box_actions_is_judged_by_their_deviation() -> None:
    assert found("entropy_left", run(train__entropy_loss=after(-1.0, 3.0), train__std=1.0)) is None
    assert found("entropy_left", run(train__entropy_loss=after(-1.0, -0.001))) is not None


def test_a_critic_that_has_explained_the_returns_once_has_learnt_something() -> None:
    solved = np.where(np.arange(N_ROWS) < 10, 0.9, -0.01)
    assert found("critic_learns_nothing", run(train__explained_variance=solved)) is None


@pytest.mark.parametrize(("last", "expected"), [(100.0, "alarm"), (51.0, "alarm"), (49.0, None)])
def test_a_critic_whose_error_has_halved_is_learning(last: float, expected: str | None) -> None:
    """It finds the mean of the returns first: its error falls, and the explained variance is still 0."""
    errors = np.where(np.arange(N_ROWS) < 8, 100.0, last)
    errors[20] = 0.0  # one row is chance
    assert level("critic_learns_nothing", run(train__explained_variance=0.0, train__value_loss=errors)) == expected


def test_where_the_task_is_learnt_the_critic_is_not_judged_by_the_spread_of_returns() -> None:
    """Solved, all returns are alike, and their variance is nothing that could be explained."""
    returns = np.minimum(20.0 + 40.0 * np.arange(N_ROWS), 500.0)
    columns = {"train__explained_variance": -3.0, "doctor__advantage_mean": 5.0, "doctor__advantage_std": 1.0}
    names = {"explained_variance", "advantage_bias"}
    assert not names & {
        finding.rule.name for finding in diagnose(run(rollout__ep_rew_mean=returns, **columns)).findings
    }
    a_little_better = np.minimum(20.0 + np.arange(N_ROWS), 29.0)
    for not_learnt in (np.full(N_ROWS, 20.0), a_little_better, returns[::-1]):
        findings = diagnose(run(rollout__ep_rew_mean=not_learnt, **columns)).findings
        assert names <= {finding.rule.name for finding in findings}


@pytest.mark.parametrize(
    ("name", "column"),
    [("entropy_left", {"train__entropy_loss": after(-1.0, -1e-6)}), ("std_collapse", {"train__std": after(1.0, 1e-6)})],
)
def test_a_policy_that_is_sure_of_a_task_it_has_learnt_is_no_alarm(name: str, column: dict[str, Any]) -> None:
    learnt = np.minimum(20.0 + 40.0 * np.arange(N_ROWS), 500.0)
    assert level(name, run(rollout__ep_rew_mean=20.0, **column)) == "alarm"
    assert level(name, run(rollout__ep_rew_mean=learnt, **column)) == "watch"


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        ({"doctor__gamma": 0.0, "rollout__ep_len_mean": 200.0}, "alarm"),
        ({"doctor__gamma": 0.0, "rollout__ep_len_mean": 1.0}, None),  # a bandit
        ({"doctor__gamma": 0.9, "rollout__ep_len_mean": 200.0}, None),  # Pendulum's entry in the zoo
        ({"doctor__gamma": 1.0, "rollout__ep_len_mean": 200.0}, None),
    ],
)
def test_the_horizon_of_gamma(columns: dict[str, float], expected: str | None) -> None:
    assert level("gamma", run(**columns)) == expected


def test_the_first_rows_do_not_count_for_the_critic() -> None:
    early = np.where(np.arange(N_ROWS) < 5, -5.0, 0.5)
    assert found("explained_variance", run(train__explained_variance=early)) is None
    assert found("kl", run(train__approx_kl=np.where(np.arange(N_ROWS) < 5, 5.0, 0.0))) is not None


# ---- From when to when -------------------------------------------------------------------------------------------


def test_since_and_until_are_the_ends_of_what_lasts() -> None:
    kl = np.full(N_ROWS, 0.01)
    kl[[3, 4]] = 9.0  # two in a row are chance
    kl[10:14] = 0.2
    kl[20:23] = [0.3, 0.7, 0.3]
    finding = found("kl", run(train__approx_kl=kl))
    assert finding is not None
    assert (finding.level, finding.since, finding.until) == ("alarm", 11_000, 24_000)
    assert (finding.worst, finding.last, finding.limit) == (0.7, 0.01, 0.1)
    assert "from step 11,000 to step 24,000, 0.7 at most. It is 0.01 now." in finding.seen
    kl[30:] = 0.15
    finding = found("kl", run(train__approx_kl=kl))
    assert finding is not None
    assert (finding.since, finding.until, finding.last) == (11_000, None, 0.15)
    assert "since step 11,000. It is 0.15 now, and was 0.7 at most." in finding.seen


def test_a_long_series_is_judged_in_fifty_medians() -> None:
    steps = 10 * np.arange(1000)
    values = np.zeros(1000)
    values[::3] = 9.0  # never the median
    assert not diagnose(Run("made up", {"train/approx_kl": Series(steps, values)})).findings
    values[600:] = 0.5
    finding = found("kl", Run("made up", {"train/approx_kl": Series(steps, values)}))
    assert finding is not None
    assert (finding.since, finding.until, finding.worst) == (6000, None, 0.5)
    parts = Series(steps, np.full(1000, math.nan)).in_parts()
    assert len(parts.values) == 50
    assert np.isnan(parts.values).all()


def test_alarms_come_first_and_causes_before_what_follows() -> None:
    made_up = run(train__learning_rate=0.02, train__ent_coef=10.0, train__approx_kl=1.0, train__clip_fraction=0.3)
    names = [(finding.level, finding.rule.name) for finding in diagnose(made_up).findings]
    assert names == [("alarm", "ent_coef"), ("alarm", "kl"), ("watch", "learning_rate"), ("watch", "clip_fraction")]


def test_the_verdict() -> None:
    assert diagnose(run(train__approx_kl=0.01)).verdict() == "Nothing unusual."
    assert diagnose(run(train__approx_kl=0.03)).verdict() == "No alarm; 1 thing to watch."
    made_up = run(train__approx_kl=0.3, train__ratio_max=100.0, train__clip_fraction=0.3)
    assert diagnose(made_up).verdict() == "1 alarm, and 2 things to watch. Begin with the first."
    few = Run("made up", {"train/approx_kl": Series(STEPS[:2], np.zeros(2))})
    assert diagnose(few).verdict() == "The log has only 2 rows: too few to say anything."


# ---- Words -------------------------------------------------------------------------------------------------------

LOGS: dict[str, Sequence[str]] = {
    "DualClipPPO": ["train/approx_kl", "train/clip_range", "train/dual_clip_fraction", "train/policy_gradient_loss"],
    "AdaptiveKLPPO": ["train/approx_kl", "train/kl_coef", "train/kl", "train/policy_gradient_loss"],
    "TRPO": ["train/is_line_search_success", "train/cg_damping", "train/kl"],
    "TRPO of sb3-contrib": ["train/is_line_search_success", "train/kl_divergence_loss"],
    "A2C": ["train/policy_loss", "train/entropy_loss"],
    "PPO": ["train/approx_kl", "train/clip_range", "train/policy_gradient_loss"],
    "REINFORCE": ["train/policy_gradient_loss", "train/grad_norm"],
}


@pytest.mark.parametrize(("name", "keys"), LOGS.items())
def test_an_algorithm_is_known_by_its_keys(name: str, keys: Sequence[str]) -> None:
    assert algorithm_of(run(**{key.replace("/", "__"): 0.0 for key in keys})).name == name
    assert {algorithm.name for algorithm in ALGORITHMS} == set(LOGS)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
def test_what_a_rule_says_is_complete_for_every_algorithm(rule: Any) -> None:
    for algorithm in ALGORITHMS:
        text = rule.first.format_map(algorithm.words).strip()
        assert text.endswith(".")
        assert not re.search(r"  |[.][.]|[.][a-zA-Z`]|[{](?!')", text.replace("{'net_arch': {'pi'", ""))
    assert rule.meaning.endswith(".")
    assert "{" not in rule.meaning + rule.quantity + rule.source
    assert set(rule.keys) <= set(MEANINGS)
    assert rule.source


@pytest.mark.parametrize(
    ("keys", "argument"),
    [
        ({"train/approx_kl": 1.0, "train/learning_rate": 3e-4}, "Divide `learning_rate` (now 0.0003) by 3"),
        ({"train/is_line_search_success": 1.0, "train/kl_divergence_loss": 1.0}, "Lower `target_kl`."),
        ({"train/policy_loss": 0.0, "train/kl": 1.0}, "Divide `learning_rate` by 3."),
    ],
)
def test_what_to_change_is_called_as_the_algorithm_calls_it(keys: dict[str, float], argument: str) -> None:
    finding = found("kl", Run("made up", {key: Series(STEPS, np.full(N_ROWS, x)) for key, x in keys.items()}))
    assert finding is not None
    assert finding.first.startswith(argument)


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0003, "0.0003"), (12.345, "12.3"), (1234.4, "1,234"), (0.0, "0"), (1e12, "1e+12"), (math.inf, "inf")],
)
def test_numbers_are_short(value: float, text: str) -> None:
    assert number(value) == text


@pytest.mark.parametrize(
    ("share", "text"), [(0.2, "20%"), (-0.0, "0%"), (0.123, "12%"), (0.0034, "0.34%"), (1.0, "100%")]
)
def test_percentages_are_short(share: float, text: str) -> None:
    assert percentage(share) == text


def short_log(n_rows: int, **columns: Any) -> Run:
    """The first rows of a run."""
    long = run(**columns)
    return Run("made up", {key: Series(*(array[:n_rows] for array in series)) for key, series in long.series.items()})


def test_a_rule_that_has_too_few_values_is_not_called_fine() -> None:
    def fine(n_rows: int) -> set[str]:
        row = np.arange(float(n_rows))
        keys = ("train/explained_variance", "train/clip_fraction")
        diagnosis = diagnose(Run("made up", {key: Series(row, np.full(n_rows, 0.1)) for key in keys}))
        assert not diagnosis.findings
        assert all(rows == n_rows < rule.fewest_rows for rule, rows in diagnosis.short.items())
        assert len(diagnosis.short) + len(diagnosis.fine) == 5
        return {rule.name for rule in diagnosis.fine}

    assert fine(2) == {"not_finite"}
    assert fine(3) == {"not_finite", "clip_fraction", "constant_targets"}  # three rows in a row
    assert fine(8) == {*fine(3), "explained_variance"}  # which leaves out the first five
    assert fine(15) == {*fine(8), "critic_learns_nothing"}  # ten rows in a row


def test_a_short_log_is_not_given_a_clean_bill() -> None:
    columns = {"train__value_loss": 4e6, "train__clip_fraction": 0.1, "time__fps": 100.0}
    diagnosis = diagnose(short_log(7, **columns))
    assert diagnosis.verdict() == "Nothing unusual so far, but the log is too short for 2 of 4 rules."
    assert in_words(diagnosis)[2] == (
        "The log is too short to look for: the rewards are too large for the critic (7 of 8 rows); the training has "
        "become slower (7 of 8 rows)."
    )
    said = " ".join(in_words(diagnose(short_log(4, **columns))))
    assert "The log has only 4 rows: too few to say anything." in said
    assert "to look for" not in said
    assert not diagnose(short_log(8, time__fps=100.0)).short
    assert set(diagnose(short_log(18, train__entropy_loss=falling(0.0))).short.values()) == {18}
    assert level("entropy_slope", short_log(19, train__entropy_loss=falling(0.0))) == "alarm"
    assert [rule.name for rule in diagnose(short_log(11, train__is_line_search_success=0.0)).short] == ["line_search"]
    assert level("line_search", short_log(12, train__is_line_search_success=0.0)) == "alarm"


def test_a_critic_that_is_far_off_in_all_rows_is_an_alarm_at_once() -> None:
    """Its error is 1e6; the alarm is above 1000, and above 10,000 the start counts, too."""
    assert level("reward_scale", short_log(2, train__value_loss=1e12)) is None
    finding = found("reward_scale", short_log(3, train__value_loss=1e12))
    assert finding is not None
    assert (finding.level, finding.since) == ("alarm", 1000)
    late = np.where(np.arange(N_ROWS) < 2, 1.0, 1e12)
    assert level("reward_scale", short_log(7, train__value_loss=late)) is None
    assert level("reward_scale", short_log(7, train__value_loss=0.9e8)) is None
    assert level("reward_scale", short_log(8, train__value_loss=0.9e8)) == "alarm"


@pytest.mark.parametrize(("n_early", "since"), [(0, 1000), (2, 3000), (5, 6000), (7, 8000)])
def test_since_goes_back_to_where_it_began_also_in_rows_that_are_not_judged(n_early: int, since: int) -> None:
    errors = np.where(np.arange(N_ROWS) < n_early, 10.0, 2000.0)
    finding = found("reward_scale", run(train__value_loss=errors**2))
    assert finding is not None
    assert finding.since == since


def test_it_says_where_judging_begins() -> None:
    """A slope takes ten rows, the share of failures, too."""
    finding = found("entropy_slope", run(train__entropy_loss=falling(0.0)))
    assert finding is not None
    assert finding.seen.endswith("below 0.2% since step 10,000, where judging begins. It is 0% now.")
    finding = found("line_search", run(train__is_line_search_success=np.arange(N_ROWS) >= 20))
    assert finding is not None
    assert "above 70% from step 10,000, where judging begins, to step 23,000" in finding.seen
    assert "judging" not in found("kl", run(train__approx_kl=1.0)).seen  # type: ignore[union-attr]


@pytest.mark.parametrize("algorithm", ALGORITHMS, ids=lambda algorithm: algorithm.name)
def test_no_advice_about_the_critic_contradicts_another(algorithm: Any) -> None:
    """Where returns are far too large, the weight of the critic's loss is to be neither raised nor lowered."""
    columns = {
        "train__explained_variance": -1.0,
        "doctor__advantage_mean": 5.0,
        "doctor__advantage_std": 1.0,
        "train__grad_norm": 1e6,
        "doctor__max_grad_norm": 0.5,
        **dict.fromkeys((key.replace("/", "__") for key in algorithm.keys), 1.0),
    }
    about_the_critic = {"critic_learns_nothing", "explained_variance", "advantage_bias", "gradient_clipping"}
    for value_loss in (1e12, 1.0):
        findings = diagnose(run(train__value_loss=value_loss, **columns)).findings
        advice = {finding.rule.name: finding.first for finding in findings if finding.rule.name in about_the_critic}
        assert advice.keys() == about_the_critic
        assert not [text for text in advice.values() if "aise `vf_coef`" in text]
        lowered = [text for text in advice.values() if "lower `vf_coef`" in text]
        assert len(lowered) == (
            value_loss == 1.0 and algorithm.name not in ("REINFORCE", "TRPO", "TRPO of sb3-contrib")
        )
        assert all("ring the returns to a scale of about 1 with `VecNormalize`" in text for text in advice.values())
