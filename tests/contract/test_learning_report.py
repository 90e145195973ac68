"""`make report`: the page and the figures of the learning curves, from a small sample of real runs."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("rliable", reason="the extra [report] is not installed")

import matplotlib as mpl
from matplotlib.image import imread
from rliable import metrics

from benchmarks.learning import figures, report, statistics
from benchmarks.learning.results import Results, of_algo, read_records, results_of, score_matrix

SAMPLE = Path(__file__).parent / "files" / "learning"
N_RESAMPLES = 20


def sample() -> Results:
    return results_of(read_records(SAMPLE / "defaults"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("learning")
    shutil.copytree(SAMPLE, folder, dirs_exist_ok=True)
    report.write_report(folder, N_RESAMPLES)
    return folder


@pytest.fixture(scope="module")
def page(folder: Path) -> str:
    return (folder / "report.md").read_text()


def cells(page: str, heading: str, row: str) -> list[str]:
    """Of a table under a heading, the cells of a row."""
    section = page.split(heading, 1)[1]
    found = re.search(rf"^\| {re.escape(row)} \|(.*)\|$", section, re.MULTILINE)
    assert found is not None
    return [cell.strip() for cell in found[1].split("|")]


def test_every_figure_of_the_page_is_there_as_png_and_svg(folder: Path, page: str) -> None:
    names = re.findall(r"!\[.*\]\((.*)\.png\)", page)
    assert len(names) == 5
    for name in names:
        assert imread(folder / f"{name}.png").std() > 0.0
        assert "</svg>" in (folder / f"{name}.svg").read_text()
    assert sorted(path.name for path in (folder / "figures").iterdir()) == sorted(
        f"{Path(name).name}.{suffix}" for name in names for suffix in ("png", "svg")
    )


def test_what_a_run_reaches_is_the_mean_of_its_last_tenth(page: str) -> None:
    files = sorted((SAMPLE / "defaults" / "Hopper-v5").glob("trpo-*.json"))
    last = [json.loads(file.read_text())["evaluation"]["mean"][-1] for file in files]  # one of ten evaluations
    # The columns are those of the five algorithms of the sample, in the order of the suite.
    point, low, high, runs = re.findall(r"-?[\d.]+", cells(page, "### What they reach", "Hopper-v5")[3])
    assert float(point) == pytest.approx(np.mean(last), rel=1e-3)
    assert min(last) - 0.01 <= float(low) <= float(point) <= float(high) <= max(last) + 0.01
    assert runs == "3"


def test_one_run_has_no_interval(page: str) -> None:
    assert re.fullmatch(r"[\d.]+ \(1\)", cells(page, "### What they reach", "CartPole-v1")[2])


def test_what_is_missing_is_said(page: str) -> None:
    # The sample has 25 runs, and the suite no SB3's PPO on CartPole-v1, of which three are.
    assert "**Missing**: 634 of the 656 runs of the suite" in page
    assert "**Missing**: all 60 runs of `tuned`" in page
    # Ten seeds of eleven environments, of which three seeds of two are there.
    counts = re.search(r"^- sb3-contrib TRPO: (.*)$", page, re.MULTILINE)
    assert counts is not None
    assert "CartPole-v1 7" in counts[1]
    assert "Ant-v5 10" in counts[1]
    assert "Humanoid" not in counts[1]


def test_published_figures_stand_beside_ours(page: str) -> None:
    assert "not the same tasks" in page
    assert cells(page, "### Beside published", "sb3-contrib TRPO, v3, 3 seeds") == [
        "1803",
        "3372",
        "4502",
        "359",
        "3554",
    ]
    ours = cells(page, "### Beside published", "TRPO, here, v5")
    assert ours == ["", cells(page, "### What they reach", "Hopper-v5")[3], "", "", ""]


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="has no runs"):
        report.write_report(tmp_path)


def test_any_part_of_the_runs_makes_a_page_and_always_the_same(tmp_path: Path) -> None:
    file = Path("defaults", "Hopper-v5", "trpo-1.json")
    (tmp_path / file).parent.mkdir(parents=True)
    shutil.copy(SAMPLE / file, tmp_path / file)
    made = []
    for _ in range(2):
        report.write_report(tmp_path, N_RESAMPLES)
        made.append({path.name: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()})
    assert made[0] == made[1]
    assert sorted(made[0]) == [
        *(f"defaults-{name}.{suffix}" for name in ("curves", "seconds") for suffix in ("png", "svg")),
        "report.md",
        "trpo-1.json",
    ]
    page = made[0]["report.md"].decode()
    assert re.fullmatch(r"[\d.]+ \(1\)", cells(page, "### What they reach", "Hopper-v5")[0])


def test_ppo_is_that_of_sb3_where_it_was_run() -> None:
    records = read_records(SAMPLE / "defaults")
    ours = [{**record, "algo": "ppo"} for record in records if record["algo"] == "dual_clip_ppo"]
    of_sb3 = [record for record in records if record["algo"] == "sb3_ppo" and record["env"] == "Hopper-v5"]
    chosen = of_algo(results_of(ours + of_sb3), "sb3_ppo")
    assert {env: curves.algo for env, curves in chosen.items()} == {"CartPole-v1": "ppo", "Hopper-v5": "sb3_ppo"}


def test_scores_are_those_of_the_runs_that_all_environments_have() -> None:
    curves = of_algo(sample(), "trpo")
    curves["Hopper-v5"] = curves["Hopper-v5"]._replace(returns=np.full((2, 10), 3800.0))  # two runs
    # Score 0 is 23.68 and score 1 is 475.
    curves["CartPole-v1"] = curves["CartPole-v1"]._replace(returns=np.repeat([[23.68], [475.0], [0.0]], 10, axis=1))
    scores = score_matrix(curves, ["CartPole-v1", "Hopper-v5"])
    assert scores is not None
    np.testing.assert_allclose(scores, [[0.0, 1.0], [1.0, 1.0]], atol=1e-12)
    assert score_matrix(curves, ["CartPole-v1", "Ant-v5"]) is None


def test_an_environment_with_one_run_does_not_hide_the_runs_of_another() -> None:
    def runs(env: str, n: int) -> dict[str, Any]:
        records = [record for record in read_records(SAMPLE / "defaults") if record["algo"] == "dual_clip_ppo"]
        (curves,) = results_of([{**records[0], "env": env, "seed": seed} for seed in range(n)]).values()
        return {env: curves}

    ten, three, one = runs("HalfCheetah-v5", 10), runs("Hopper-v5", 3), runs("Ant-v5", 1)
    envs = ["Ant-v5", "Hopper-v5", "HalfCheetah-v5"]
    ours, peer = {**ten, **three, **one}, {**ten, **three, **one}
    assert report.comparable([ours, peer], envs) == ["Hopper-v5", "HalfCheetah-v5"]
    assert report.comparable([ours, {**ten, **one}], envs) == ["HalfCheetah-v5"]
    assert report.comparable([ours, one], envs) == ["Ant-v5"]  # better than nothing
    assert report.comparable([ours, {}], envs) == []
    # The ten are seen, although only three of them count beside the three of the other.
    assert report.together_and_alone([ours, peer], envs) == [["Hopper-v5", "HalfCheetah-v5"], ["HalfCheetah-v5"]]
    assert report.together_and_alone([ours, {**ten, **one}], envs) == [["HalfCheetah-v5"]]
    assert report.together_and_alone([ours, {}], envs) == [[]]


def test_compiling_is_no_part_of_the_seconds() -> None:
    records = read_records(SAMPLE / "defaults")
    slow = next(record for record in records if record["algo"] == "dual_clip_ppo")
    slow["total"]["compile_seconds"] = 5.0
    slow["seconds"]["process"] = [1.0, 7.0, 8.0, 9.0, 10.0, 11.0, 12.0, 13.0, 14.0, 15.0]
    seconds = results_of([slow])[slow["env"], "dual_clip_ppo"].seconds
    assert seconds.tolist() == [[0.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0, 10.0]]


def test_probability_of_improvement_is_that_of_rliable() -> None:
    ours = np.array([[1.0, 5.0], [2.0, 5.0], [3.0, 5.0]])
    peer = np.array([[0.0, 9.0], [2.0, 1.0], [7.0, 5.0]])
    # Of nine pairs on the first task four are above and one is a tie; on the second, three above and three ties.
    expected = ((4 + 0.5) / 9 + (3 + 1.5) / 9) / 2
    found = statistics.probability_of_improvement(ours, peer, N_RESAMPLES)
    assert found.point == pytest.approx(expected)
    assert metrics.probability_of_improvement(ours, peer) == pytest.approx(expected)


@pytest.mark.parametrize("n_runs", [1, 3, 4, 10])
def test_the_curve_is_the_interquartile_mean_of_rliable(n_runs: int) -> None:
    returns = np.random.default_rng(0).normal(size=(n_runs, 4))
    expected = [metrics.aggregate_iqm(column) for column in returns.T]
    np.testing.assert_allclose(statistics.iqm_curve(returns, N_RESAMPLES).point, expected)


def test_an_interval_is_a_bootstrap_of_the_runs() -> None:
    # The mean of three numbers drawn from 0, 0 and 1 with replacement is k / 3 with the probabilities of a binomial
    # distribution of three draws at 1/3: (8, 12, 6, 1) / 27. So 2.5 % of it lie at 0, and 97.5 % are reached within 1.
    found = statistics.mean(np.array([0.0, 0.0, 1.0]), 2000)
    assert found.point == pytest.approx(1 / 3)
    assert found.low == 0.0
    assert found.high in (pytest.approx(2 / 3), 1.0)
    numbers = np.random.default_rng(0).normal(size=5)
    assert statistics.mean(numbers, N_RESAMPLES) == statistics.mean(numbers, N_RESAMPLES)  # to the last bit
    with_two = statistics.mean(np.array([0.0, 1.0]), N_RESAMPLES)
    assert np.isnan(with_two.low)
    assert with_two.point == 0.5


def test_a_profile_is_the_share_of_runs_above_a_threshold() -> None:
    scores = np.array([[0.1, 0.9], [0.2, 0.8], [0.3, 0.7]])
    found = statistics.profile(scores, np.array([0.0, 0.25, 0.75, 1.0]), N_RESAMPLES)
    np.testing.assert_allclose(found.point, [1.0, 4 / 6, 2 / 6, 0.0])


def test_no_two_algorithms_look_alike() -> None:
    styles = figures.STYLES.values()
    assert len({style.marker for style in styles}) == len(figures.STYLES)
    # In grey, solid lines of ours and dashes of peers; by colour, all but the two PPOs, whose dashes differ.
    assert len({(style.color, str(style.dash)) for style in styles}) == len(figures.STYLES)
    assert all(mpl.colors.is_color_like(style.color) for style in styles)
