"""The page of the study of old data: what runs have reached, and what they say of each hypothesis."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("rliable", reason="the extra [report] is not installed")

from matplotlib.image import imread

from benchmarks.learning import run as run_module
from benchmarks.learning.arms import ARMS
from benchmarks.learning.cases import Run, entry
from benchmarks.learning.conditions import Condition
from benchmarks.staleness import figures, report
from benchmarks.staleness.hypotheses import ANSWERS, answers, hypotheses
from benchmarks.staleness.results import Pair, Runs, Study

N_RESAMPLES = 20


def test_the_page_says_what_the_runs_have_reached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_module, "N_EVALUATIONS", 2)
    monkeypatch.setattr(run_module, "N_EPISODES", 1)
    run = Run("lag-1-epochs-10", "LunarLander-v3", "dual_clip_3", 0)
    path = run.path(tmp_path / run.set)
    path.parent.mkdir(parents=True)
    tiny = {"n_timesteps": 200, "n_steps": 40, "batch_size": 20, "torch_compile": False}
    run_module.make_run(run, entry(run, tiny), path)
    record = json.loads(path.read_text())
    assert record["hyper_parameters"]["lag"] == 1
    assert {"end_cut_share_3", "end_ratio_max"} <= set(record["log"])
    for arm, reached in (("ppo", 5.02), ("dual_clip_3", 4.02)):  # the latter is a score of 0.5
        record["evaluation"]["mean"] = [200.0, *[reached] * 5]
        for seed in range(3):
            (path.parent / f"{arm}-{seed}.json").write_text(json.dumps({**record, "algo": arm, "seed": seed}))
    cells = ["3", "4", "0.50 [0.50, 0.50]", "0.00 [0.00, 0.00]", "0%"]
    assert row(tmp_path, "LunarLander-v3", "second clip, c = 3") == cells
    assert "6 runs" in (tmp_path / "report.md").read_text()
    assert imread(tmp_path / "figures" / "activation-lag.png").std() > 0.0
    assert "</svg>" in (tmp_path / "figures" / "activation-lag.svg").read_text()
    assert not (tmp_path / "figures" / "activation-reuse.png").exists()

    (path.parent / "ppo-2.json").unlink()  # two runs say nothing of who is better
    record["evaluation"]["mean"] = [200.0, *[-100.0] * 5]  # below half of the best score
    (path.parent / "dual_clip_3-2.json").write_text(json.dumps({**record, "algo": "dual_clip_3", "seed": 2}))
    assert row(tmp_path, "LunarLander-v3", "second clip, c = 3")[-2:] == ["-", "33%"]


def row(folder: Path, tasks: str, label: str) -> list[str]:
    """The cells of an arm in the last table, what runs have reached."""
    report.write_report(folder, N_RESAMPLES)
    page = (folder / "report.md").read_text()
    assert "## Lag 1, 10 epochs" in page
    found = [line for line in page.splitlines() if line.startswith(f"| {tasks} | {label} |")][-1]
    return [cell.strip() for cell in found.strip("|").split("|")[2:]]


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="has no runs"):
        report.write_report(tmp_path)


def test_each_hypothesis_is_answered() -> None:
    assert list(hypotheses()) == list(ANSWERS) == list(range(1, 16))
    assert hypotheses()[9] == "Collapse"
    assert [outcome for _, _, outcome in answers({}, N_RESAMPLES)] == ["not enough runs"] * 15


LOW, MIDDLE, HIGH = [0.0, 0.1, 0.2], [0.1, 0.2, 0.3], [0.8, 0.9, 1.0]


def some(scores: list[float] = MIDDLE, **logged: float) -> Runs:
    """Three runs."""
    names = {"share": "end_cut_share_3", "gradient": "end_cut_gradient_3", "share_low": "end_cut_share_1.5"}
    numbers = {name: np.full(3, logged.get(short, 0.0)) for short, name in names.items()}
    collapsed = np.full(3, logged.get("collapsed", 0.0))
    return Runs(np.array(scores), np.array(scores), collapsed, numbers, np.ones(3))


def of(name: str, **arms: Runs) -> Study:
    condition = Condition.of_set(name)
    assert condition is not None
    return {Pair(condition, arm.replace("_dot_", ".")): {"Hopper-v5": runs} for arm, runs in arms.items()}


def with_shares(what: str, steps: tuple[int, ...], shares: list[float], gradients: list[float] | None = None) -> Study:
    study: Study = {}
    for step, share, gradient in zip(steps, shares, gradients or [0.0] * len(shares), strict=True):
        study |= of(f"{what if step else 'lag'}-{step}-epochs-10", ppo=some(share=share, gradient=gradient))
    return study


LAGS, REUSED = (0, 1, 4, 16), (0, 1, 3, 7)
GRADIENTS = [0.0, 1e-4, 1e-2, 0.2]
OLD, K7 = "lag-16-epochs-10", "reuse-7-epochs-10"
WORSE_BY_C = of(OLD, ppo=some(HIGH), dual_clip_3=some(LOW))
LARGER = of(f"{OLD}-learning_rate_x3", ppo=some(LOW, share=2.1e-3), dual_clip_3=some(HIGH))


@pytest.mark.parametrize(
    ("number", "study", "holds"),
    [
        (1, of("lag-0-epochs-10", ppo=some(share=9e-5, gradient=9e-3)), True),
        (1, of("lag-0-epochs-10", ppo=some(share=2e-4, gradient=9e-3)), False),
        (1, of("lag-0-epochs-10", ppo=some(share=9e-5, gradient=0.02)), False),
        (2, with_shares("lag", LAGS, [0.0, 1e-5, 1e-4, 2e-3], GRADIENTS), True),
        (2, with_shares("lag", LAGS, [0.0, 1e-5, 1e-4, 9e-4], GRADIENTS), False),  # too few
        (2, with_shares("lag", LAGS, [0.0, 1e-4, 1e-5, 2e-3], GRADIENTS), False),  # fewer with more lag
        (2, with_shares("lag", LAGS, [0.0, 1e-6, 1e-4, 2.1e-3], GRADIENTS), False),  # growing faster than their share
        (3, of("lag-0-epochs-10", ppo=some(), dual_clip_3=some()), True),
        (3, of("lag-0-epochs-10", ppo=some(LOW), dual_clip_3=some(HIGH)), False),
        (4, of(OLD, ppo=some(LOW), dual_clip_3=some(HIGH)), True),
        (4, of(OLD, ppo=some(), dual_clip_3=some()), False),
        (5, of(OLD, dual_clip_1_dot_5=some(share_low=0.011), dual_clip_3=some(share=1e-3)), True),
        (5, of(OLD, dual_clip_1_dot_5=some(share_low=9e-3), dual_clip_3=some(share=1e-3)), False),
        (5, of(OLD, dual_clip_1_dot_5=some(LOW, share_low=0.011), dual_clip_3=some(share=1e-3)), False),
        (6, of(OLD, target_kl=some(), dual_clip_3=some()), True),
        (6, of(OLD, target_kl=some(LOW), dual_clip_3=some()), False),
        (7, of(OLD, truncated=some(LOW), dual_clip_3=some(HIGH)), True),
        (7, of(OLD, truncated=some(), dual_clip_3=some()), False),
        (8, WORSE_BY_C | of(f"{OLD}-no_gradient_clipping", ppo=some(LOW), dual_clip_3=some(HIGH)), True),
        (8, WORSE_BY_C | of(f"{OLD}-no_gradient_clipping", ppo=some(HIGH), dual_clip_3=some(LOW)), False),
        (9, of(OLD, ppo=some(collapsed=1.0), dual_clip_3=some(collapsed=0.0)), True),
        (9, of(OLD, ppo=some(collapsed=1.0), dual_clip_3=some(collapsed=1.0)), False),
        (10, with_shares("reuse", REUSED, [0.0, 1e-5, 1e-4, 2e-3]), True),
        (10, with_shares("reuse", REUSED, [0.0, 1e-5, 1e-4, 9e-4]), False),
        (11, of(K7, ppo=some(), dual_clip_3=some()), True),
        (11, of(K7, ppo=some(HIGH), dual_clip_3=some(LOW)), False),
        (12, of("lag-0-epochs-10", ppo=some(LOW)) | of("reuse-3-epochs-10", ppo=some(HIGH)), True),
        (12, of("lag-0-epochs-10", ppo=some()) | of("reuse-3-epochs-10", ppo=some()), False),
        (13, of(OLD, decoupled=some(HIGH), dual_clip_3=some(LOW)), True),
        (13, of(OLD, decoupled=some(), dual_clip_3=some()), False),
        (14, of(K7, decoupled=some(), ppo=some()), True),
        (14, of(K7, decoupled=some(LOW), ppo=some()), False),
        (15, LARGER | of(OLD, ppo=some(HIGH, share=1e-3), dual_clip_3=some(LOW)), True),
        (15, LARGER | of(OLD, ppo=some(HIGH, share=1.1e-3), dual_clip_3=some(LOW)), False),
        (15, LARGER | of(OLD, ppo=some(LOW, share=1e-3), dual_clip_3=some(HIGH)), False),
    ],
)
def test_what_runs_say_of_a_hypothesis(number: int, study: Study, holds: bool) -> None:
    _, numbers, outcome = answers(study, N_RESAMPLES)[number - 1]
    assert outcome.startswith("**holds**" if holds else "**does not hold**"), numbers
    for pair, by_env in study.items():
        two = {env: runs._replace(scores=runs.scores[:2]) for env, runs in by_env.items()}
        assert answers({**study, pair: two}, N_RESAMPLES)[number - 1][1:] == ["-", "not enough runs"]


def test_the_numbers_that_decide_stand_in_the_table() -> None:
    study = of(OLD, ppo=some([0.0, 0.2, 0.4]), dual_clip_3=some([0.1, 0.3, 0.5]))
    # Of nine pairs six are above: 0.1 > 0; 0.3 > 0, 0.2; 0.5 > all. The IQM of three runs is their mean.
    name, numbers, _ = answers(study, N_RESAMPLES)[3]
    assert name == "4. An effect on old data"
    assert numbers.startswith("P(c = 3 > PPO) 0.67 [")
    assert "IQM 0.30 [" in numbers
    assert numbers.endswith("(1 task, 3 runs of each)")


def test_of_several_claims_those_that_are_not_so_are_named() -> None:
    study = with_shares("lag", LAGS, [0.0, 1e-4, 1e-5, 9e-4], GRADIENTS)
    outcome = answers(study, N_RESAMPLES)[1][2]
    assert outcome == "**does not hold**: not growing at each step, not above 1 in 1,000"


def test_each_arm_has_a_colour_and_a_marker_of_its_own() -> None:
    styles: Any = figures.STYLES
    assert list(styles) == list(ARMS)
    assert len({style.marker for style in styles.values()}) == len({s.color for s in styles.values()}) == len(ARMS)


def test_a_figure_shows_the_means_of_the_runs() -> None:
    study = with_shares("lag", LAGS, [0.0, 1e-5, 1e-4, 2e-3])
    figure = figures.activation(study, [Condition(lag=lag) for lag in LAGS], "lag", N_RESAMPLES)
    assert figure is not None
    (line,) = figure.axes[0].get_lines()
    np.testing.assert_allclose(np.asarray(line.get_ydata(), dtype=float), [0.0, 1e-5, 1e-4, 2e-3])
    assert figures.activation(study, [Condition(reuse=k) for k in REUSED], "K", N_RESAMPLES) is None
