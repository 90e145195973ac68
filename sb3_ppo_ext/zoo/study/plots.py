"""Optuna's plots of a study, on one page and in one picture."""

from __future__ import annotations

import copy
import html
import io
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.exceptions import ExperimentalWarning
from optuna.importance import PedAnovaImportanceEvaluator, get_param_importances
from optuna.trial import TrialState

from sb3_ppo_ext.common.saving.files import write_whole
from sb3_ppo_ext.doctor.page import STYLE
from sb3_ppo_ext.zoo.errors import StudyError
from sb3_ppo_ext.zoo.study.storage import state_name
from sb3_ppo_ext.zoo.study.study import ZooStudy
from sb3_ppo_ext.zoo.study.trials import BUDGET, REASON, decode_param, format_value

_FEWEST = 10  # complete trials that importances are computed from
_PLOTS = {
    "optimization_history": "History",
    "param_importances": "Importances",
    "slice": "Value by hyper-parameter",
    "intermediate_values": "Evaluations of each trial",
    "timeline": "When each trial ran",
}
_WIDTH = 1600  # of the picture, in pixels
# Of the plots in the page, as of the text around them.
_LAYOUT = {
    "title": None,  # stands above
    "showlegend": True,
    "template": "plotly_white",
    "font": {"family": "system-ui, 'Segoe UI', Roboto, 'Liberation Sans', sans-serif"},
}


def why_no_importances(study: ZooStudy) -> str:
    """Why :func:`importances` are not there, for a message."""
    complete = len(study.trials(TrialState.COMPLETE))
    if complete < _FEWEST:
        return f"that takes at least {_FEWEST} complete trials, and there are {complete}"
    return "the trials do not differ enough"


def importances(study: ZooStudy) -> dict[str, float]:
    """
    :param study: the study
    :return: by the sampler's names, the largest first; nothing if there are too few trials to tell
    """
    if len(study.trials(TrialState.COMPLETE)) < _FEWEST:
        return {}
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        warnings.simplefilter("ignore", ExperimentalWarning)
        try:
            return get_param_importances(study.optuna_study, evaluator=PedAnovaImportanceEvaluator())
        except (ValueError, RuntimeError, UserWarning):
            return {}


def decoded_study(study: ZooStudy) -> optuna.Study:
    """
    :param study: the study
    :return: a copy in memory for Optuna's plots: with hyper-parameters in place of the numbers that were drawn, and
        evaluations by the number of steps
    """
    decoded = optuna.create_study(direction="maximize", study_name=study.name)
    trials = [copy.deepcopy(trial) for trial in study.trials()]
    hyperparams = [study.hyperparams(trial) for trial in trials]
    choices: dict[str, dict[Any, Any]] = {}  # all that were chosen, by name
    for trial, values in zip(trials, hyperparams, strict=True):
        for key, distribution in trial.distributions.items():
            if isinstance(distribution, CategoricalDistribution):
                choices.setdefault(key, {})[format_value(values[key][1])] = None
    for trial, values in zip(trials, hyperparams, strict=True):
        params: dict[str, Any] = {}
        distributions: dict[str, BaseDistribution] = {}
        for key, distribution in trial.distributions.items():
            if distribution.single():
                continue
            name, value = decode_param(key, trial.params[key])
            if isinstance(distribution, (IntDistribution, FloatDistribution)):
                low, high = sorted(decode_param(key, bound)[1] for bound in (distribution.low, distribution.high))
                whole = isinstance(low, int)
                log = (distribution.log or key.endswith("_pow")) and low > 0 and not key.startswith("one_minus_")
                distributions[name] = (IntDistribution if whole else FloatDistribution)(low, high, log=log)
                params[name] = value
            else:
                distributions[name] = CategoricalDistribution(tuple(choices[key]))
                params[name] = format_value(values[key][1])
        trial.params, trial.distributions = params, distributions
        n_timesteps, n_evaluations = trial.user_attrs.get(BUDGET, (1, 1))
        trial.intermediate_values = {
            step * n_timesteps // n_evaluations: value for step, value in trial.intermediate_values.items()
        }
        decoded.add_trial(trial)
    return decoded


def write_plots(study: ZooStudy, evaluation: Sequence[str], commands: Mapping[str, str]) -> tuple[Path, Path]:
    """
    :param study: the study
    :param evaluation: the lines of a table of what was trained again
    :param commands: to go on with, each by what it does
    :return: the page and the picture with all plots
    """
    try:
        import matplotlib.pyplot as plt
        import optuna.visualization as interactive
        import optuna.visualization.matplotlib as still
        from PIL import Image
    except ImportError as error:
        raise StudyError(f"the plots need {error.name}: pip install 'sb3-ppo-ext[zoo]'") from error

    parts = _page_head(study, evaluation, commands)
    images: list[Image.Image] = []
    decoded = decoded_study(study)
    plt.switch_backend("agg")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # optuna says of each plot that it is experimental, matplotlib of its layout
        for name, heading in _PLOTS.items():
            options = {"evaluator": PedAnovaImportanceEvaluator()} if name == "param_importances" else {}
            try:
                if options and not importances(study):
                    raise ValueError(f"Not shown: {why_no_importances(study)}.")
                figure = getattr(interactive, f"plot_{name}")(decoded, **options)
                getattr(still, f"plot_{name}")(decoded, **options)
            except (ValueError, RuntimeError) as error:
                parts.append(f"<h2>{heading}</h2><p>{html.escape(str(error))}</p>")
                continue
            figure.update_layout(**_LAYOUT)
            if name == "intermediate_values":
                figure.update_xaxes(title="Steps")
                plt.gca().set_xlabel("Steps")
                if len(decoded.trials) > _FEWEST:
                    plt.gca().legend().remove()  # names every trial
            # The library goes into the page, once, so that it needs no network.
            content = figure.to_html(full_html=False, include_plotlyjs=not images)
            parts.append(f'<h2>{heading}</h2><div class="wide">{content}</div>')
            buffer = io.BytesIO()
            if name != "slice":  # which is as wide as it has hyper-parameters
                plt.gcf().set_size_inches(14, 5)
            plt.gcf().savefig(buffer, format="png", dpi=100, bbox_inches="tight")
            image = Image.open(buffer).convert("RGB")
            images.append(image.resize((_WIDTH, image.height * _WIDTH // image.width)))
            plt.close("all")
    joined = Image.new("RGB", (_WIDTH, sum(image.height for image in images)), "white")
    top = 0
    for image in images:
        joined.paste(image, (0, top))
        top += image.height
    png = io.BytesIO()
    joined.save(png, "png")

    page, picture = study.folder / "report.html", study.folder / "report.png"
    write_whole(page, memoryview("\n".join([*parts, "</body></html>\n"]).encode()))
    write_whole(picture, png.getbuffer())
    return page, picture


def _page_head(study: ZooStudy, evaluation: Sequence[str], commands: Mapping[str, str]) -> list[str]:
    """
    :param study: the study
    :param evaluation: the lines of a table of what was trained again
    :param commands: to go on with, each by what it does
    :return: what the page has above the plots
    """
    title = html.escape(f"Study {study.name}")
    parts = [
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{title}</title><style>{STYLE}</style></head><body><h1>{title}</h1>"
    ]
    parts += [f'<p class="verdict">{html.escape(study.counts())}</p>', "<h2>Go on</h2>"]
    for what, command in commands.items():
        parts += [f"<p>{html.escape(what)}:</p><pre>{html.escape(command)}</pre>"]
    if evaluation:
        lines = html.escape("\n".join(evaluation))
        parts += [f"<h2>Trained again, on fresh seeds</h2><pre>{lines}</pre>"]
    trials = study.trials()
    hyperparams = [study.hyperparams(trial) for trial in trials]
    names = {name: label for values in hyperparams for name, (label, _) in values.items()}
    parts += [
        '<h2>All trials</h2><div class="wide"><table>',
        _row("th", ["trial", "state", "value", *names.values(), "reason"]),
    ]
    for trial, values in zip(trials, hyperparams, strict=True):
        last = list(trial.intermediate_values.values())[-1:]
        value = [f"{value:.2f}" for value in ([trial.value] if trial.value is not None else last)] or [""]
        cells = [format_value(values[name][1]) if name in values else "" for name in names]
        reason = trial.user_attrs.get(REASON, "")
        parts += [_row("td", [str(trial.number), state_name(trial.state), *value, *cells, reason])]
    return [*parts, "</table></div>"]


def _row(tag: str, cells: Sequence[str]) -> str:
    return f"<tr>{''.join(f'<{tag}>{html.escape(cell)}</{tag}>' for cell in cells)}</tr>"
