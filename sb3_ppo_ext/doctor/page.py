"""A diagnosis as one HTML page that loads no other files, for screens of any size and for paper."""

from __future__ import annotations

import re
from collections.abc import Sequence
from html import escape

from sb3_ppo_ext.doctor.charts import Limit, chart
from sb3_ppo_ext.doctor.diagnosis import Diagnosis, Finding, measured, number, percentage, too_short
from sb3_ppo_ext.doctor.document import document
from sb3_ppo_ext.doctor.keys import MEANINGS
from sb3_ppo_ext.doctor.run import Run

# Keys that are drawn first, in this order. The other keys follow, without those that never change.
_FIRST_KEYS = (
    "rollout/ep_rew_mean", "eval/mean_reward", "rollout/ep_len_mean", "rollout/success_rate", "train/approx_kl",
    "train/kl", "train/clip_fraction", "train/ratio_max", "train/entropy_loss", "train/std",
    "train/explained_variance", "train/value_loss", "train/grad_norm", "train/is_line_search_success",
    "train/kl_coef",
)  # fmt: skip
_NO_CHARTS = ("time/total_timesteps", "time/iterations", "time/time_elapsed", "train/n_updates")


def page(diagnoses: Sequence[Diagnosis]) -> str:
    """
    :param diagnoses: diagnoses of one or several runs
    :return: the page
    """
    one = len(diagnoses) == 1
    title = f"{diagnoses[0].run.name}: diagnosis" if one else f"{len(diagnoses)} trainings: diagnosis"
    parts = []
    if not one:
        links = (
            f'<li><a href="#run{index}">{escape(diagnosis.run.name)}</a>: {escape(diagnosis.verdict())}</li>'
            for index, diagnosis in enumerate(diagnoses)
        )
        parts.append(f"<ul>{''.join(links)}</ul>")
    for index, diagnosis in enumerate(diagnoses):
        if not one:
            parts.append(f'<h2 id="run{index}">{escape(diagnosis.run.name)}</h2>')
        parts += _section(diagnosis)
    return document(title, parts)


def _section(diagnosis: Diagnosis) -> list[str]:
    run = diagnosis.run
    parts = [f'<p class="soft">{escape(diagnosis.algorithm.name)}, {run.n_steps:,} steps, {run.n_rows:,} rows</p>']
    level = "" if diagnosis.findings else " fine"
    parts.append(f'<p class="verdict{level}">{escape(diagnosis.verdict())}</p>')
    parts += [_card(finding, run) for finding in diagnosis.findings]
    parts += ["<h2>What was logged</h2>", '<div class="charts">', *_charts(diagnosis), "</div>"]
    if diagnosis.fine:
        items = "".join(f"<li>{escape(rule.title)}</li>" for rule in diagnosis.fine)
        parts.append(f"<h2>Looked for, and not found</h2><ul>{items}</ul>")
    if diagnosis.short:
        items = "".join(f"<li>{escape(text[0].upper() + text[1:])}</li>" for text in too_short(diagnosis))
        parts.append(f"<h2>Not looked for: the log is too short</h2><ul>{items}</ul>")
    if diagnosis.blind:
        items = "".join(f"<li>{escape(rule.title)}</li>" for rule in diagnosis.blind)
        parts.append(
            f"<h2>Not looked for</h2><p>The log lacks keys that <code>DoctorCallback</code> logs.</p><ul>{items}</ul>"
        )
    return parts


def _card(finding: Finding, run: Run) -> str:
    rule = finding.rule
    limits = [Limit(finding.limit, finding.level)]
    series = measured(rule, run)
    write = percentage if rule.is_percentage else number
    caption = f"The limit, {write(limits[0].value)}, is dashed."
    if rule.is_flag:  # a chart of 0 and 1 shows nothing, so the logged series is drawn
        key = next((key for key in rule.keys if key in run.series), "")
        series, limits, caption = run.series.get(key), [], key
    drawing = "" if series is None else chart(series, rule.title, limits, finding.since, finding.until)
    figure = f'<figure>{drawing}<figcaption class="soft">{escape(caption)}</figcaption></figure>' if drawing else ""
    return (
        f'<section class="finding {finding.level}"><div><span class="badge">{finding.level}</span>'
        f"<h3>{escape(rule.title)}</h3><dl><dt>Seen</dt><dd>{_marked(finding.seen)}</dd>"
        f"<dt>What it usually means</dt><dd>{_marked(rule.meaning)}</dd>"
        f'<dt>Change first</dt><dd class="change">{_marked(finding.first)}</dd></dl>'
        f'<p class="source">Where the limits come from: {escape(rule.source)}.</p></div>{figure}</section>'
    )


def _charts(diagnosis: Diagnosis) -> list[str]:
    run = diagnosis.run
    keys = [key for key in _FIRST_KEYS if key in run.series]
    keys += sorted(key for key in run.series if key not in (*_FIRST_KEYS, *_NO_CHARTS))
    figures = []
    for key in keys:
        series = run.series[key]
        if key not in _FIRST_KEYS and (len(series.values) < 2 or (series.values == series.values[0]).all()):
            continue
        finding = next((finding for finding in diagnosis.findings if key == finding.rule.keys[0]), None)
        marks = (None, None) if finding is None else (finding.since, finding.until)
        colour = "" if finding is None else f' class="{finding.level}"'
        drawing = chart(series, key, (), *marks)
        if drawing:
            meaning = f'<br><span class="soft">{_marked(MEANINGS[key])}</span>' if key in MEANINGS else ""
            figures.append(
                f"<figure{colour}>{drawing}<figcaption><code>{escape(key)}</code>{meaning}</figcaption></figure>"
            )
    return figures


def _marked(text: str) -> str:
    """Escape a text, and mark names in backticks as code."""
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", escape(text, quote=False))
