"""``sb3-ppo-ext study show``: what a study has found, as text, as a page and as a picture."""

from __future__ import annotations

import argparse
import copy
import html
import io
import shlex
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.exceptions import ExperimentalWarning
from optuna.importance import PedAnovaImportanceEvaluator, get_param_importances
from optuna.trial import FrozenTrial, TrialState

from sb3_ppo_ext.zoo.storage import StudyError
from sb3_ppo_ext.zoo.study import Place
from sb3_ppo_ext.zoo.study_results import results, table, trained_again
from sb3_ppo_ext.zoo.trials import REASON, real

_FEWEST = 10  # complete trials that importances are computed from
_PLOTS = {
    "optimization_history": "History",
    "param_importances": "Importances",
    "slice": "Value by hyper-parameter",
    "intermediate_values": "Evaluations of each trial",
    "timeline": "When each trial ran",
}
_WIDTH = 1600  # of the picture, in pixels
_STYLE = (
    "body{font-family:sans-serif;margin:2em}table{border-collapse:collapse}td,th{padding:.2em .7em;text-align:right}"
)


def show(place: Place, options: argparse.Namespace, program: Sequence[str]) -> None:
    """
    Print the best trials and what became of them, and write the plots.

    :param place: the study
    :param options: of ``study show``
    :param program: how ``sb3-ppo-ext`` was started
    """
    best = place.best()[: options.top]
    importances = _importances(place)
    print(_summary(place))
    explains = ", and how much of the difference between good trials and others a hyper-parameter explains"
    print(f"\nThe best trials, of one training each{explains if importances else ''}:\n")
    for line in _best(place, best, importances):
        print(line)
    if not importances:
        print(f"\nWhich hyper-parameters matter is not shown: {_no_importances(place)}.")
    where = ["--study-name", place.name, "-f", options.log_folder]
    where += ["--storage", options.storage] if options.storage else []
    evaluation = _evaluation(place)
    if evaluation:
        print("\nTrained again, on fresh seeds.", *evaluation, sep="\n")
    errors = _errors(place)
    if errors:
        print("\nEnded early, for a reason that is known:", *(f"  {line}" for line in errors), sep="\n")
    page, picture = _plots(place, evaluation)
    print(f"\nPlots:\n  {page}\n  {picture}")
    if evaluation:
        print(f"\nWrite the best as YAML:\n  {shlex.join([*program, 'study', 'export', *where])}")
    else:
        print(f"\nTrain the best again, on fresh seeds:\n  {shlex.join([*program, 'study', 'evaluate', *where])}")
    print(f"\nLive, in a browser (pip install optuna-dashboard):\n  optuna-dashboard {shlex.quote(place.storage)}")


def _summary(place: Place) -> str:
    """
    :param place: the study
    :return: how many trials it has of each kind
    """
    counts = [(len(place.trials(state)), state.name.lower().replace("fail", "failed")) for state in TrialState]
    return f"study {place.name}: {', '.join(f'{count} {name}' for count, name in counts if count)}"


def _best(place: Place, best: Sequence[FrozenTrial], importances: dict[str, float]) -> list[str]:
    """
    :param place: the study
    :param best: of its trials
    :param importances: by the sampler's names
    :return: the lines of a table, with a column for each trial
    """
    values = [place.values(trial) for trial in best]
    names = dict.fromkeys([*importances, *(name for of_trial in values for name in of_trial)])
    rows = [["", *(["explains"] if importances else []), *(f"trial {trial.number}" for trial in best)]]
    rows += [["value", *([""] if importances else []), *(f"{trial.value:.2f}" for trial in best)]]
    for name in names:
        label = next((of_trial[name][0] for of_trial in values if name in of_trial), real(name, 0)[0])
        importance = [f"{importances[name]:.0%}" if name in importances else ""] if importances else []
        rows += [[label, *importance, *(_short(of_trial[name][1]) if name in of_trial else "" for of_trial in values)]]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        f"  {label:<{widths[0]}} " + " ".join(f"{cell:>{width}}" for cell, width in zip(cells, widths[1:], strict=True))
        for label, *cells in rows
    ]


def _short(value: Any) -> str:
    """
    :param value: of a hyper-parameter
    """
    if isinstance(value, dict):  # a net_arch, which is often the same for actor and critic
        parts = {name: _short(part) for name, part in value.items()}
        if len(set(parts.values())) == 1:
            return next(iter(parts.values()))
        return ", ".join(f"{name} {part}" for name, part in parts.items())
    if isinstance(value, float):
        return f"{value:.5g}" if 0.9 < value < 1 else f"{value:.3g}"  # 1 - value matters there
    return getattr(value, "__name__", str(value))


def _evaluation(place: Place) -> list[str]:
    """
    :param place: the study
    :return: the lines of a table of what was trained again; none, if nothing was
    """
    if not results(place):
        return []
    try:
        return table(trained_again(place))
    except StudyError as error:
        return [f"There are results, which cannot be shown: {error}"]


def _errors(place: Place) -> list[str]:
    """
    :param place: the study
    :return: for each reason that a trial has failed or was pruned for, a line
    """
    numbers: dict[str, list[str]] = {}
    for trial in place.trials():
        if REASON in trial.user_attrs:
            numbers.setdefault(trial.user_attrs[REASON], []).append(str(trial.number))
    return [
        f"{'trial' if len(them) == 1 else 'trials'} {', '.join(them)}: {reason}" for reason, them in numbers.items()
    ]


def _no_importances(place: Place) -> str:
    """
    :param place: the study
    :return: why no importances are shown
    """
    complete = len(place.trials(TrialState.COMPLETE))
    if complete < _FEWEST:
        return f"that takes at least {_FEWEST} complete trials, and there are {complete}"
    return "the trials do not differ enough"


def _importances(place: Place) -> dict[str, float]:
    """
    :param place: the study
    :return: by the sampler's names, the largest first; nothing if there are too few trials to tell
    """
    if len(place.trials(TrialState.COMPLETE)) < _FEWEST:
        return {}
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        warnings.simplefilter("ignore", ExperimentalWarning)
        try:
            return get_param_importances(place.study, evaluator=PedAnovaImportanceEvaluator())
        except (ValueError, RuntimeError, UserWarning):
            return {}


def _with_real_values(place: Place) -> optuna.Study:
    """
    :param place: the study
    :return: a copy in memory for Optuna's plots: with the names and values that are meant in place of the sampler's,
        and evaluations by the number of steps
    """
    copied = optuna.create_study(direction="maximize", study_name=place.name)
    trials = [copy.deepcopy(trial) for trial in place.trials()]
    values = [place.values(trial) for trial in trials]
    choices: dict[str, dict[Any, Any]] = {}  # all that were chosen, by name
    for trial, of_trial in zip(trials, values, strict=True):
        for key, distribution in trial.distributions.items():
            if isinstance(distribution, CategoricalDistribution):
                choices.setdefault(key, {})[_short(of_trial[key][1])] = None
    for trial, of_trial in zip(trials, values, strict=True):
        params: dict[str, Any] = {}
        distributions: dict[str, BaseDistribution] = {}
        for key, distribution in trial.distributions.items():
            if distribution.single():
                continue
            name, value = real(key, trial.params[key])
            if isinstance(distribution, (IntDistribution, FloatDistribution)):
                low, high = sorted(real(key, bound)[1] for bound in (distribution.low, distribution.high))
                whole = isinstance(low, int)
                log = (distribution.log or key.endswith("_pow")) and low > 0 and not key.startswith("one_minus_")
                distributions[name] = (IntDistribution if whole else FloatDistribution)(low, high, log=log)
                params[name] = value
            else:
                distributions[name] = CategoricalDistribution(tuple(choices[key]))
                params[name] = _short(of_trial[key][1])
        trial.params, trial.distributions = params, distributions
        n_timesteps, n_evaluations = trial.user_attrs.get("budget", (1, 1))
        trial.intermediate_values = {
            step * n_timesteps // n_evaluations: value for step, value in trial.intermediate_values.items()
        }
        copied.add_trial(trial)
    return copied


def _plots(place: Place, evaluation: Sequence[str]) -> tuple[Path, Path]:
    """
    :param place: the study
    :param evaluation: what was trained again
    :return: the page and the picture with all plots
    """
    try:
        import matplotlib.pyplot as plt
        import optuna.visualization as interactive
        import optuna.visualization.matplotlib as still
        from PIL import Image
    except ImportError as error:
        raise StudyError(f"the plots need {error.name}: pip install 'sb3-ppo-ext[zoo]'") from error

    page, picture = place.folder / "report.html", place.folder / "report.png"
    parts = _head(place, evaluation)
    images: list[Image.Image] = []
    shown = _with_real_values(place)
    plt.switch_backend("agg")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # optuna says of each plot that it is experimental, matplotlib of its layout
        for name, heading in _PLOTS.items():
            options = {"evaluator": PedAnovaImportanceEvaluator()} if name == "param_importances" else {}
            try:
                if options and not _importances(place):
                    raise ValueError(f"Not shown: {_no_importances(place)}.")
                figure = getattr(interactive, f"plot_{name}")(shown, **options)
                getattr(still, f"plot_{name}")(shown, **options)
            except (ValueError, RuntimeError) as error:
                parts.append(f"<h2>{heading}</h2><p>{html.escape(str(error))}</p>")
                continue
            figure.update_layout(title=None, showlegend=True)
            if name == "intermediate_values":
                figure.update_xaxes(title="Steps")
                plt.gca().set_xlabel("Steps")
                if len(shown.trials) > _FEWEST:
                    plt.gca().legend().remove()  # names every trial
            # The library goes into the page, once, so that it needs no network.
            content = figure.to_html(full_html=False, include_plotlyjs=not images)
            parts.append(f"<h2>{heading}</h2>{content}")
            buffer = io.BytesIO()
            if name != "slice":  # which is as wide as it has hyper-parameters
                plt.gcf().set_size_inches(14, 5)
            plt.gcf().savefig(buffer, format="png", dpi=100, bbox_inches="tight")
            image = Image.open(buffer).convert("RGB")
            images.append(image.resize((_WIDTH, image.height * _WIDTH // image.width)))
            plt.close("all")
    page.write_text("\n".join(parts), encoding="utf-8")
    whole = Image.new("RGB", (_WIDTH, sum(image.height for image in images)), "white")
    top = 0
    for image in images:
        whole.paste(image, (0, top))
        top += image.height
    whole.save(picture)
    return page, picture


def _head(place: Place, evaluation: Sequence[str]) -> list[str]:
    """
    :param place: the study
    :param evaluation: what was trained again
    :return: what the page has above the plots
    """
    title = html.escape(f"Study {place.name}")
    parts = [f"<!doctype html><meta charset='utf-8'><title>{title}</title><style>{_STYLE}</style><h1>{title}</h1>"]
    parts += [f"<p>{html.escape(_summary(place))}</p>"]
    if evaluation:
        lines = html.escape("\n".join(evaluation))
        parts += [f"<h2>Trained again, on fresh seeds</h2><pre>{lines}</pre>"]
    trials = place.trials()
    values = [place.values(trial) for trial in trials]
    names = {name: label for of_trial in values for name, (label, _) in of_trial.items()}
    parts += ["<h2>All trials</h2><table>", _row("th", ["trial", "state", "value", *names.values(), "reason"])]
    for trial, of_trial in zip(trials, values, strict=True):
        last = list(trial.intermediate_values.values())[-1:]
        value = [f"{value:.2f}" for value in ([trial.value] if trial.value is not None else last)]
        state = trial.state.name.lower().replace("fail", "failed")
        cells = [_short(of_trial[name][1]) if name in of_trial else "" for name in names]
        parts += [_row("td", [str(trial.number), state, *(value or [""]), *cells, trial.user_attrs.get(REASON, "")])]
    return [*parts, "</table>"]


def _row(tag: str, cells: Sequence[str]) -> str:
    """
    :param tag: of a cell
    :param cells: of a row
    """
    return f"<tr>{''.join(f'<{tag}>{html.escape(cell)}</{tag}>' for cell in cells)}</tr>"
