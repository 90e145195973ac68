"""``sb3-ppo-ext doctor``: what it prints, the page that it writes, and what it refuses."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from sb3_ppo_ext.doctor.charts import Limit, chart
from sb3_ppo_ext.doctor.diagnosis import diagnose
from sb3_ppo_ext.doctor.keys import MEANINGS
from sb3_ppo_ext.doctor.page import page
from sb3_ppo_ext.doctor.run import Run, Series
from tests.contract.pages import BROWSER, Reader, assert_fits_a_phone_and_a_screen
from tests.contract.zoo import Command, error_line

STEPS = 1000 * np.arange(1, 31)


def log(folder: Path, **columns: float | np.ndarray) -> Path:
    """A progress.csv of 30 rows."""
    folder.mkdir(parents=True, exist_ok=True)
    names = ["time/total_timesteps", *(name.replace("__", "/") for name in columns)]
    table = np.column_stack([STEPS, *(np.broadcast_to(column, 30) for column in columns.values())])
    lines = [",".join(names), *(",".join(map(str, row)) for row in table)]
    path = folder / "progress.csv"
    path.write_text("\n".join(lines) + "\n")
    return path


def ill(folder: Path) -> Path:
    return log(
        folder,
        rollout__ep_rew_mean=np.linspace(20.0, 40.0, 30),
        rollout__ep_len_mean=np.linspace(20.0, 40.0, 30),
        train__approx_kl=np.where(np.arange(30) < 20, 0.01, 0.5),
        train__clip_fraction=0.25,
        train__dual_clip_fraction=0.0,
        train__learning_rate=0.005,
    )


def test_a_log_is_diagnosed(command: Command, tmp_path: Path) -> None:
    output = command("doctor", str(ill(tmp_path / "run")))
    assert output.splitlines()[0] == (
        "run/progress.csv: DualClipPPO, 30,000 steps. 1 alarm, and 1 thing to watch. Begin with the first."
    )
    assert "ALARM  The policy moves too far in one update\n" in output
    assert "  seen    The KL divergence of an update has been above 0.1 since step 21,000. It is 0.5 now.\n" in output
    assert "  means   The samples of a rollout say little" in output
    assert "  change  Divide `learning_rate` (now 0.005) by 3, or lower `n_epochs`. `target_kl=0.03` also" in output
    assert output.index("ALARM") < output.index("WATCH  Much of the gradient is clipped away")
    assert (
        "this log lacks: gamma, advantage_mean, advantage_skew. DoctorCallback logs them; the command takes" in output
    )
    assert output.endswith(" by -params gamma:VALUE.\n")


def test_a_folder_of_runs_is_diagnosed_one_after_the_other(command: Command, tmp_path: Path) -> None:
    ill(tmp_path / "logs" / "PPO_1")
    log(tmp_path / "logs" / "PPO_2", train__approx_kl=0.001)
    output = command("doctor", "logs")
    assert re.findall(r"^\S+: .*$", output, re.MULTILINE) == [
        "PPO_1: DualClipPPO, 30,000 steps. 1 alarm, and 1 thing to watch. Begin with the first.",
        "PPO_2: PPO, 30,000 steps. Nothing unusual.",
    ]


def test_a_log_that_cannot_be_read_is_named_after_the_others(command: Command, tmp_path: Path) -> None:
    ill(tmp_path / "logs" / "PPO_1")
    (tmp_path / "logs" / "PPO_0").mkdir()
    (tmp_path / "logs" / "PPO_0" / "progress.csv").touch()
    output = command("doctor", "logs")
    assert output.startswith("PPO_1: DualClipPPO, 30,000 steps. 1 alarm")
    assert error_line(output).startswith("sb3-ppo-ext doctor: left out: logs/PPO_0/progress.csv is empty, or no log")


def test_what_the_log_lacks_may_be_given(command: Command, tmp_path: Path) -> None:
    path = ill(tmp_path)
    assert "ALARM  The agent looks only a few steps ahead" in command("doctor", str(path), "-params", "gamma:0.0")
    output = command("doctor", str(path), "-params", "gamma:0.99")
    assert "a few steps ahead" not in output
    assert output.endswith("need keys that this log lacks: advantage_mean, advantage_skew. DoctorCallback logs them.\n")
    assert "The entropy weighs more than the task" in command("doctor", str(path), "-params", "ent_coef:10")


def test_a_short_log_is_said_to_be_short(command: Command, tmp_path: Path) -> None:
    path = log(tmp_path / "logs" / "a", train__value_loss=4e6)
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:8]))
    output = command("doctor", "logs", "--html")
    assert output.startswith(
        "a: an unknown algorithm, 7,000 steps. Nothing unusual so far, but the log is too short for "
    )
    assert "\nThe log is too short to look for: the rewards are too large for the critic (7 of 8 rows).\n" in output
    text = (tmp_path / "logs" / "doctor.html").read_text()
    assert "too short</h2><ul><li>The rewards are too large for the critic (7 of 8 rows)</li></ul>" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give either a log, or a folder with logs, or --explain KEY"),
        (["run", "--explain", "approx_kl"], "give either a log"),
        (["nowhere"], "nowhere does not exist"),
        (["--explain", "aprox_kl"], "there is no key 'aprox_kl'; the nearest is 'approx_kl'"),
        (["run", "-params", "gama:0.9"], "no rule needs 'gama'; it must be one of gamma, ent_coef"),
        (["run", "-params", "gamma:high"], "gamma='high' is not allowed: it must be a number"),
    ],
)
def test_what_cannot_be_done_is_said_in_one_line(arguments: list[str], message: str, command: Command) -> None:
    ill(Path("run"))
    assert message in error_line(command("doctor", *arguments, code=2))


@pytest.mark.parametrize("key", ["train/approx_kl", "approx_kl"])
def test_a_key_is_explained_with_the_limits_of_its_rules(key: str, command: Command) -> None:
    output = command("doctor", "--explain", key)
    assert output.startswith(f"train/approx_kl: {MEANINGS['train/approx_kl']}\n")
    assert "The KL divergence of an update: above 0.02 is worth a look, above 0.1 is an alarm." in output
    assert "\n  It takes 3 rows.\n" in output


def test_the_rows_that_do_not_count_are_explained(command: Command) -> None:
    output = command("doctor", "--explain", "value_loss")
    left_out = "It takes 8 rows; the first 5, or the first tenth of a longer log, do not count"
    assert f"  {left_out}, unless all are above 10,000.\n" in output
    assert "The largest `train/explained_variance` so far: below 0.05 is an alarm.\n" in output
    assert "\n  One row is enough.\n" in output


def test_help_names_the_command(command: Command) -> None:
    assert re.search(r"^  doctor +read the log of a training", command("--help"), re.MULTILINE)
    assert "LOG_OR_FOLDER" in command("doctor", "--help")


def test_the_page_needs_nothing_else(command: Command, tmp_path: Path) -> None:
    ill(tmp_path / "logs" / "a <run> & more")
    log(tmp_path / "logs" / "b", train__approx_kl=0.001)
    output = command("doctor", "logs", "--html")
    assert output.endswith("With plots:\n  logs/doctor.html\n")
    text = (tmp_path / "logs" / "doctor.html").read_text()
    assert Reader(text).links == ["#run0", "#run1"]
    assert "a &lt;run&gt; &amp; more" in text
    for part in ("The policy moves too far in one update", "Looked for, and not found", "Not looked for", "<svg"):
        assert part in text
    assert 'content="width=device-width, initial-scale=1"' in text

    command("doctor", "logs/a <run> & more", "--html")
    text = (tmp_path / "logs" / "a <run> & more" / "doctor.html").read_text()
    assert Reader(text).links == []
    assert text.count("a &lt;run&gt; &amp; more: diagnosis") == 2  # the title, and the heading


@pytest.mark.parametrize("value", [np.nan, np.inf, 0.0])
def test_any_log_makes_a_page_without_a_warning(value: float) -> None:
    """Also where the only series that is not finite is in no rule's own chart; and where a target is 0."""
    series = Series(np.arange(10), np.full(10, value))
    for keys in (["train/policy_gradient_loss"], ["train/kl", "train/target_kl"], list(MEANINGS)):
        diagnosis = diagnose(Run("any", dict.fromkeys(keys, series)))
        assert "</html>" in page([diagnosis])
        assert value == 0.0 or diagnosis.findings[0].rule.name == "not_finite"


def test_a_chart_draws_each_value_where_it_belongs() -> None:
    """A line from the lower left to the upper right, with a gap, a limit, and a part that is marked."""
    values = np.linspace(0.0, 1.0, 30)
    values[10] = np.nan
    svg = chart(Series(STEPS, values), "a label & more", [Limit(0.5, "alarm")], 16_000, None)
    pieces = [
        np.array([point.split(",") for point in points.split()], dtype=float)
        for points in re.findall(r'<polyline class="line" points="([^"]+)"', svg)
    ]
    assert [len(piece) for piece in pieces] == [10, 19]
    x, y = np.concatenate(pieces).T
    shown = np.delete(np.arange(30), 10)
    np.testing.assert_allclose(x, 50 + 300 * shown / 29, atol=0.06)
    np.testing.assert_allclose(np.diff(y[:10]), (y[-1] - y[0]) / 29, atol=0.11)
    assert 10 <= y[-1] < 30 < 130 < y[0] <= 146  # upwards, which in SVG is towards 0
    ((limit,),) = (re.findall(r'<line class="alarm" x1="50" x2="350" y1="([\d.]+)"', svg),)
    assert float(limit) == pytest.approx((y[0] + y[-1]) / 2, abs=0.06)
    ((left, width),) = re.findall(r'<rect class="ill" x="([\d.]+)" y="10" width="([\d.]+)"', svg)
    assert float(left) == pytest.approx(50 + 300 * 15 / 29, abs=0.06)
    assert float(left) + float(width) == pytest.approx(350, abs=0.11)
    assert 'aria-label="a label &amp; more"' in svg
    assert re.findall(r">([^<]+)</text>", svg) == ["0", "0.5", "1", "1k", "15.5k", "30k"]


def test_a_chart_of_many_magnitudes_is_logarithmic() -> None:
    svg = chart(Series(STEPS, np.logspace(-2, 6, 30)), "any")
    (points,) = re.findall(r'<polyline class="line" points="([^"]+)"', svg)
    heights = np.array([float(point.split(",")[1]) for point in points.split()])
    np.testing.assert_allclose(np.diff(heights), (heights[-1] - heights[0]) / 29, atol=0.11)
    assert re.findall(r">([^<]+)</text>", svg)[:-3] == ["0.01", "1", "100", "10k", "1M"]


@pytest.mark.parametrize(
    "values",
    [[3.0], [3.0, 3.0], [np.nan, 2.0, np.inf], [0.0, 1e-300], [-1e300, 1e300], [1e308, -1e308, 2.0], [1e-320, 1.0]],
)
def test_any_series_can_be_drawn(values: list[float]) -> None:
    svg = chart(Series(np.arange(len(values)), np.array(values)), "any")
    assert svg.startswith("<svg")
    assert "nan" not in svg
    assert "inf" not in svg
    assert chart(Series(np.arange(2), np.full(2, np.nan)), "any") == ""


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="no Chromium")
def test_the_page_fits_a_phone_and_a_screen(command: Command, tmp_path: Path) -> None:
    command("doctor", str(ill(tmp_path / "run")), "--html")
    assert_fits_a_phone_and_a_screen(tmp_path / "run" / "doctor.html", tmp_path)
