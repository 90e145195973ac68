"""``sb3-ppo-ext study show``: the best trials as text, and all of them as a page and a picture."""

from __future__ import annotations

import inspect
import math
import re
import shlex
from html import escape, unescape
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from optuna.trial import TrialState, create_trial
from PIL import Image

from sb3_ppo_ext.zoo import ALGORITHMS, register
from sb3_ppo_ext.zoo.search_spaces import CONVERTERS, SAMPLERS
from sb3_ppo_ext.zoo.study.candidates import Candidate, make_candidate, store_result
from sb3_ppo_ext.zoo.study.page import Missing, page
from sb3_ppo_ext.zoo.study.plots import Plot, hyperparam_plots, search_plots
from sb3_ppo_ext.zoo.study.report import trial_table
from sb3_ppo_ext.zoo.study.study import ZooStudy
from sb3_ppo_ext.zoo.study.task import Task
from sb3_ppo_ext.zoo.study.trials import BUDGET, explain_drawn, format_value
from tests.contract.pages import BROWSER, Reader, assert_fits_a_phone_and_a_screen
from tests.contract.zoo import STUDY_FOLDER, Command, error_line, finished_study, journal

PAGE, PICTURE = STUDY_FOLDER / "report.html", STUDY_FOLDER / "report.png"
NAME = ["--study-name", "dual_clip_ppo_Held-v0", "-f", "logs"]


def evaluated(study: ZooStudy, results: dict[int | None, list[float]]) -> None:
    """Keep results of ``study evaluate``: by the trial, or None for the default, a mean reward for each seed."""
    register()
    for number, means in results.items():
        candidate = make_candidate(study, None if number is None else study.trial(number), 0)
        for seed, mean in enumerate(means, 1000):
            store_result(study, candidate, seed, {"mean": mean, "std": 0.0, "n_episodes": 20})


def add(study: ZooStudy, state: TrialState, **values: Any) -> None:
    """Add a trial of 64 steps and four evaluations."""
    study.optuna_study.add_trial(create_trial(state=state, user_attrs={BUDGET: [64, 4]}, **values))


def table(text: str, heading: str) -> list[list[str]]:
    """The cells of the first table below a heading of the page."""
    below = text[text.index(f"<h2>{heading}</h2>") :]
    rows = re.findall(r"<tr>(.*?)</tr>", below[: below.index("</table>")])
    cells = [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row) for row in rows]
    return [[unescape(cell.replace("<wbr>", "")) for cell in row] for row in cells]


def commands(text: str) -> list[list[str]]:
    """What the page says to go on with."""
    return [shlex.split(unescape(command)) for command in re.findall(r"<pre>(.*?)</pre>", text)]


def drawn(plot: Plot) -> Axes:
    axes = Figure().subplots()
    plot.draw(axes)
    return axes


def points(axes: Axes) -> dict[str, list[list[float]]]:
    """What is drawn, by what the legend calls it."""
    return {str(line.get_label()): np.column_stack(line.get_data()).tolist() for line in axes.lines}


@pytest.mark.usefixtures("held_space")
def test_the_best_trials_are_shown_as_text_page_and_picture(command: Command, tmp_path: Path) -> None:
    study = finished_study(tmp_path, 3.0, 5.0, 4.0).optuna_study
    output = command("study", "show", "--top", "2")
    best = [study.trials[1], study.trials[2]]
    for trial in best:
        assert f"trial {trial.number}" in output
        assert f"{trial.params['learning_rate']:.3g}" in output
        assert f"{1 - trial.params['one_minus_gamma']:.5g}" in output
    assert "one_minus_gamma" not in output
    assert "study dual_clip_ppo_Held-v0: 3 complete. The best is trial 1: 5.00, of one training." in output
    assert f"optuna-dashboard {STUDY_FOLDER / 'study.log'}" in output
    assert "takes at least 10 complete trials, and there are 3" in output
    assert "takes at least 10 complete trials, and there are 3" in PAGE.read_text()
    assert "explains" not in output
    assert "Train the best again" in output
    assert "No trial has been trained again yet." in PAGE.read_text()
    assert [line[1:] for line in commands(PAGE.read_text())[:-1]] == [["study", "evaluate", *NAME]]

    for trial in best * 4:
        study.add_trial(trial)
    study.add_trial(create_trial(state=TrialState.FAIL, user_attrs={"reason": "It was <tired>"}))
    output = command("study", "show", "--top", "2")
    names, shares = output.splitlines()[5:7]
    assert sorted(names.split()) == ["gamma", "hidden", "rate", "value"]  # "rate" is the second line of learning_rate
    assert re.fullmatch(r" +explains( +\d+%){3}", shares)
    assert "trial 11: It was <tired>" in output
    text = PAGE.read_text()
    Reader(text)
    body = text[text.index("<body>") :]
    for of_the_picture in ("#1d2430", "#5c6675", "#0072b2", "DejaVu", "<g id="):
        assert of_the_picture not in body  # the page has colours and fonts of its own
    marks = set(re.findall(r'<path id="(\w+)" ([^>]*)>', text))  # which the plots of the page share
    assert len({name for name, _ in marks}) == len(marks) > 2
    assert text.count("<svg") == 5  # the search, importances, three hyper-parameters
    assert "<span>Which hyper-parameters matter</span>" in text
    assert sorted(re.findall(r"<figcaption><code>(\w+)</code>", text)) == ["gamma", "hidden", "learning_rate"]
    assert "one_minus" not in text
    assert "dual_clip_ppo on Held-v0, 64 steps a trial, evaluated 1 time" in text
    head, *rows = table(text, "All trials")
    assert head[:7] == ["trial", "state", "reward", "steps", "time", "reason", "gamma"]
    assert [row[:3] for row in rows[:2] + rows[-1:]] == [
        ["1", "complete", "5.00"],
        ["3", "complete", "5.00"],
        ["11", "failed", ""],
    ]
    assert len(rows) == 12
    assert rows[-1][5] == "It was <tired>"
    assert rows[0][6] == "0.98"
    assert len(text) < 400_000
    with Image.open(PICTURE) as picture:
        pixels = np.asarray(picture)
    assert pixels.shape[:2] == (2 * 375, 3 * 540)
    for part in (pixels[:375, :540], pixels[:375, 540:1080], pixels[:375, 1080:], pixels[375:, :540]):
        assert part.std() > 10  # something is drawn everywhere


@pytest.mark.usefixtures("held_space")
def test_the_page_says_what_evaluate_found_and_how_to_go_on(command: Command, tmp_path: Path) -> None:
    study = finished_study(tmp_path, 3.0, 5.0, 4.0)
    evaluated(study, {None: [2.0, 3.0], 1: [1.0, 2.0], 2: [3.0, 4.0]})
    output = command("study", "show")
    text = PAGE.read_text()
    assert table(text, "Trained again, on fresh seeds") == [
        ["", "in the study", "mean", "std", "seeds"],
        ["trial 2", "4.00", "3.50", "0.71", "3.0 4.0"],
        ["default", "-", "2.50", "0.71", "2.0 3.0"],
        ["trial 1", "5.00", "1.50", "0.71", "1.0 2.0"],
    ]
    said = "The winner is trial 2: 3.50 +/- 0.71 across 2 seeds, the default 2.50 +/- 0.71 across 2 seeds."
    assert said in output
    assert said in text
    export, train, _ = commands(text)
    assert export[1:] == ["study", "export", *NAME]
    command(*export[1:])
    assert train[1:3] == ["train", "--algo"]
    assert Path(train[-1]).read_text().startswith("# Trial 2 of")


@pytest.mark.usefixtures("held_space")
def test_a_default_that_no_trial_beats_is_what_to_go_on_with(command: Command, tmp_path: Path) -> None:
    study = finished_study(tmp_path, 3.0, 5.0)
    evaluated(study, {None: [4.0], 0: [3.0, 2.0]})
    output = command("study", "show")
    assert "The winner is the default: no trial beats the entry that they started from. Not all were trained" in output
    asked = commands(PAGE.read_text())
    assert asked[0][1:3] == ["study", "evaluate"]  # trial 1, the best, was not trained again
    assert asked[1][1:6] == ["train", "--algo", "dual_clip_ppo", "--env", "Held-v0"]
    assert len(asked) == 3


@pytest.mark.usefixtures("held_space")
def test_pruned_and_failed_trials_are_shown_by_their_evaluations(command: Command, tmp_path: Path) -> None:
    study = finished_study(tmp_path)
    assert "has no complete trial yet" in error_line(command("study", "show", code=2))  # nor any other
    add(study, TrialState.PRUNED, intermediate_values={2: 7.0, 1: 6.0})
    add(study, TrialState.PRUNED)
    add(study, TrialState.FAIL, intermediate_values={1: math.inf, 2: math.nan})
    add(study, TrialState.RUNNING, intermediate_values={1: 2.0})
    lost = {"trial": "9", "seed": 1, "n_timesteps": 64, "mean": 1.0}
    study.optuna_study.set_user_attr("sb3_ppo_ext_evaluation_9_any_1", lost)
    output = command("study", "show")
    assert "which cannot be shown: study 'dual_clip_ppo_Held-v0' has no trial 9" in output
    assert "1 running, 2 pruned, 1 failed. No trial is complete yet." in output
    text = PAGE.read_text()
    Reader(text)
    assert "which cannot be shown: study &#x27;dual_clip_ppo_Held-v0&#x27; has no trial 9" in text
    assert [row[:4] for row in table(text, "All trials")[1:]] == [
        ["0", "pruned", "7.00", "32"],
        ["1", "pruned", "", "0"],
        ["2", "failed", "nan", "32"],
        ["3", "running", "2.00", "16"],
    ]
    assert [command[0] for command in commands(text)] == ["optuna-dashboard"]
    assert "Reward by hyper-parameter" not in text  # there are none

    history, evaluations = map(drawn, search_plots(study, {}, []))
    shown = points(history)
    assert np.isnan(shown.pop("failed")).tolist() == [[False, True]]
    assert shown == {"pruned": [[0, 7]], "running": [[3, 2]], "no value": [[1, 0]]}
    assert points(evaluations)["pruned"] == [[16, 6], [32, 7]]
    assert [text.get_text() for text in history.get_legend().get_texts()] == ["pruned", "running", "failed", "no value"]

    add(study, TrialState.COMPLETE, value=3.0, intermediate_values={1: 1.0, 4: 3.0})
    add(study, TrialState.COMPLETE, value=2.0)
    history, evaluations = map(drawn, search_plots(study, {}, []))
    assert points(history)["complete"] == [[4, 3], [5, 2]]
    assert points(history)["best so far"] == [[4, 3], [5, 3], [5, 3]]
    assert points(history)["best"] == [[4, 3]]
    assert points(evaluations)["trial 4, the best"] == [[16, 1], [64, 3]]


def test_the_plot_of_what_was_trained_again_has_each_seed_and_their_mean() -> None:
    study = ZooStudy("any", "any", Path(), optuna.create_study(), [])
    trial, default = Candidate("0", {}, 3.0, {1: 2.0, 2: 4.0}), Candidate("default", {}, None, {1: 1.0})
    axes = drawn(search_plots(study, {}, [trial, default])[-1])
    assert [label.get_text() for label in axes.get_yticklabels()] == ["default", "trial 0"]
    shown = [line.get_xydata().tolist() for line in axes.lines if line.get_marker() in ("o", "D")]
    assert shown == [[], [[1, 0]], [[1, -0.2]], [[3, 1]], [[2, 1], [4, 1]], [[3, 0.8]]]


def test_several_objectives_are_refused(command: Command) -> None:
    optuna.create_study(storage=journal(Path("two.log")), study_name="two", directions=["maximize", "maximize"])
    output = error_line(command("study", "show", "--storage", "two.log", code=2))
    assert "study 'two' does not maximize one value" in output


def drawn_study(algo: str, n_trials: int) -> ZooStudy:
    """A study of trials that were drawn at random; the value of each is its number."""
    register()
    found = optuna.create_study(direction="maximize", sampler=optuna.samplers.RandomSampler(seed=0))
    found.set_user_attr("sb3_ppo_ext", vars(Task(algo, "CartPole-v1", 0, "", [], [], [], [])))
    for _ in range(n_trials):
        SAMPLERS[algo](found.ask(), 0, 4, {})
    for trial in found.trials:
        found.tell(trial.number, trial.number)
    return ZooStudy("any", "any", Path(), found, [])


@pytest.mark.parametrize("algo", CONVERTERS)
def test_the_table_of_trials_fits_100_columns_and_names_what_does_not(algo: str) -> None:
    study = drawn_study(algo, 10)
    trials = study.best_trials()
    for explained in ({}, {"n_envs": 0.75, "one_minus_gamma": 0.25}):
        lines = trial_table(study, trials, explained)
        assert 80 < max(map(len, lines)) <= 100
        first = next(place for place, line in enumerate(lines) if "trial 9" in line)
        assert first <= 2 + bool(explained)  # of the names
        head, rows, rest = lines[:first], lines[first : first + 10], " ".join(lines[first + 11 :])
        assert [row.split()[:3] for row in rows] == [["trial", str(n), f"{n}.00"] for n in range(9, -1, -1)]
        assert ["explains" in line for line in head] == [False] * (len(head) - 1) + [bool(explained)]
        if explained:
            assert head[-1].split()[:2] == ["explains", "25%"]  # n_envs, the same in all trials, comes last
            assert head[-2].split()[:2] == ["value", "gamma"]
        labels = {label for label, _ in study.hyperparams(trials[0]).values()}
        left_out = set(rest.removeprefix("Only on the page: ").removesuffix(".").split(", "))
        assert left_out < labels
        parts = " ".join(head).replace("_", " ").split()
        assert all(set(label.split("_")) <= set(parts) for label in labels - left_out)


@pytest.mark.parametrize("algo", CONVERTERS)
def test_hyperparameters_are_shown_and_not_the_numbers_that_were_drawn(algo: str) -> None:
    study = drawn_study(algo, 4)
    found = study.optuna_study
    converted = CONVERTERS[algo](dict(found.trials[3].params))
    hyperparams = dict(study.hyperparams(found.trials[3]).values())
    assert hyperparams.pop("net_arch") == converted.pop("policy_kwargs")["net_arch"]
    assert converted.items() <= hyperparams.items()

    plots = {plot.name: drawn(plot) for plot in hyperparam_plots(study, {})}
    assert not [name for name in {**hyperparams, **plots} if name.endswith("_pow") or "one_minus" in name]
    for name in plots.keys() & {"gamma", "batch_size", "learning_rate", "net_arch", "baseline", "layer_norm"}:
        axes = plots[name]
        ((x, value),) = points(axes)["best"]
        assert value == 3.0
        low, high = sorted(axes.get_xlim())
        assert low < x < high
        wanted = CONVERTERS[algo](dict(found.trials[3].params))
        wanted = {**wanted, **wanted["policy_kwargs"]}[name]
        if name in ("net_arch", "baseline", "layer_norm"):
            ticks = [tick.get_text() for tick in axes.get_xticklabels()]
            assert ticks[round(x)] == format_value(wanted)
        else:
            number = float(str(wanted).split("_")[-1])  # of a schedule, what it begins with
            assert float(axes.xaxis.get_major_formatter()(x)) == pytest.approx(number, rel=1e-2)
    assert plots["gamma"].xaxis.get_inverted()  # a larger gamma is further to the right


@pytest.mark.parametrize(
    ("algo", "drawn"),
    [
        ("dual_clip_ppo", ["n_minibatches", "clip_range_ratio", "data", "learning_rate_schedule"]),
        ("adaptive_kl_ppo", ["n_minibatches", "data", "learning_rate_schedule"]),
        ("trpo_ext", ["n_minibatches"]),
        ("reinforce", ["n_episodes", "learning_rate_schedule"]),
    ],
)
def test_what_is_drawn_and_is_no_argument_is_explained(algo: str, drawn: list[str]) -> None:
    """Every name on the page is an argument, of the policy or of the environments, or is explained by some."""
    study = drawn_study(algo, 12)
    labels = {label for trial in study.trials() for label, _ in study.hyperparams(trial).values()}
    said = explain_drawn(labels)
    assert re.findall(r"(?:: |; )(\w+) (?:=|is)", said) == drawn
    known = [*inspect.signature(ALGORITHMS[algo]).parameters, "net_arch", "layer_norm", "n_envs"]
    assert labels - set(drawn) <= set(known)
    assert set(re.findall(r"\w+_\w+", said)) - set(drawn) <= set(known)
    assert escape(said) in page(study, [], [], hyperparam_plots(study, {}), Missing("", ""), {})
    assert explain_drawn(["gamma"]) == ""


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("lin_4.747180892818615e-05", "lin_4.75e-05"),
        ("cos_3e-4_1e-5", "cos_3e-4_1e-5"),
        (0.99512345, "0.99512"),
        ({}, "on"),  # kl_adaptive_lr, with its defaults
        ({"pi": [64], "vf": [64]}, "[64]"),
        ({"pi": [64], "vf": [8]}, "pi [64], vf [8]"),
    ],
)
def test_values_are_written_in_a_few_digits(value: object, words: str) -> None:
    assert format_value(value) == words


@pytest.mark.slow
@pytest.mark.usefixtures("held_space")
@pytest.mark.skipif(BROWSER is None, reason="no Chromium")
def test_the_page_fits_a_phone_and_a_screen(command: Command, tmp_path: Path) -> None:
    study = finished_study(tmp_path, *range(10))
    add(study, TrialState.FAIL)
    evaluated(study, {None: [2.0] * 5, 1: [1.0] * 5})
    command("study", "show")
    assert_fits_a_phone_and_a_screen(PAGE, tmp_path)
