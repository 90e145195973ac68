"""``sb3-ppo-ext study show``: the best trials as text, and all of them as a page and a picture."""

import re
from pathlib import Path

import numpy as np
import optuna
import pytest
from optuna.trial import TrialState
from PIL import Image

from sb3_ppo_ext.common.validation import value_at
from sb3_ppo_ext.zoo import register
from sb3_ppo_ext.zoo.search_spaces import CONVERTERS, SAMPLERS
from sb3_ppo_ext.zoo.study.plots import decoded_study
from sb3_ppo_ext.zoo.study.study import ZooStudy
from sb3_ppo_ext.zoo.study.task import Task
from tests.contract.zoo import STUDY_FOLDER, Command, finished_study


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
    assert "study dual_clip_ppo_Held-v0: 3 complete" in output
    assert f"optuna-dashboard {STUDY_FOLDER / 'study.log'}" in output
    assert "takes at least 10 complete trials, and there are 3" in output
    assert "explains" not in output
    assert "Train the best again" in output

    for trial in best * 4:
        study.add_trial(trial)
    study.add_trial(optuna.trial.create_trial(state=TrialState.FAIL, user_attrs={"reason": "It was <tired>"}))
    output = command("study", "show", "--top", "2")
    assert re.search(r"gamma +\d+%", output)
    assert "trial 11: It was <tired>" in output
    page = (STUDY_FOLDER / "report.html").read_text()
    for heading in ("History", "Importances", "Value by hyper-parameter", "Evaluations of each trial", "All trials"):
        assert f"<h2>{heading}</h2>" in page
    assert page.count("<tr>") == 13
    assert "<td>failed</td>" in page
    assert "It was &lt;tired&gt;" in page
    assert page.count("Plotly.newPlot(") >= 5
    assert "one_minus" not in page
    assert "plotly.js v" in page  # the library itself: the page needs no network
    with Image.open(STUDY_FOLDER / "report.png") as picture:
        pixels = np.asarray(picture)
    assert pixels.shape[1] == 1600
    thirds = np.array_split(pixels, 3)
    assert min(third.std() for third in thirds) > 10  # something is drawn everywhere


@pytest.mark.parametrize("algo", CONVERTERS)
def test_hyperparameters_are_shown_and_not_the_numbers_that_were_drawn(algo: str) -> None:
    register()
    found = optuna.create_study(direction="maximize", sampler=optuna.samplers.RandomSampler(seed=0))
    found.set_user_attr("sb3_ppo_ext", vars(Task(algo, "CartPole-v1", 0, "", [], [], [], [])))
    for _ in range(4):
        SAMPLERS[algo](found.ask(), 0, 4, {})
    for trial in found.trials:
        found.tell(trial.number, 1.0)
    study = ZooStudy("any", "any", Path(), found, [])
    for trial, decoded in zip(found.trials, decoded_study(study).trials, strict=True):
        converted = CONVERTERS[algo](dict(trial.params))
        network = converted.pop("policy_kwargs")["net_arch"]
        hyperparams = dict(study.hyperparams(trial).values())
        assert hyperparams.pop("net_arch") == network
        assert converted.items() <= hyperparams.items()
        assert not [name for name in {**hyperparams, **decoded.params} if name.endswith("_pow") or "one_minus" in name]
        assert decoded.params.pop("net_arch") == str(network["pi"])
        if "learning_rate" in hyperparams:  # plots want a number, also of a schedule: what it begins with
            assert decoded.params.pop("learning_rate") == value_at(hyperparams["learning_rate"], 1.0)
        assert {name: str(value) for name, value in decoded.params.items()}.items() <= {
            name: str(value) for name, value in hyperparams.items()
        }.items()
