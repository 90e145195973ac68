"""A diagnosis as one page of HTML that needs nothing else: for a screen of any size, and for paper."""

from __future__ import annotations

import re
from collections.abc import Sequence
from html import escape

from sb3_ppo_ext.doctor.charts import Limit, chart
from sb3_ppo_ext.doctor.diagnosis import Diagnosis, Finding, number, percentage
from sb3_ppo_ext.doctor.keys import MEANINGS
from sb3_ppo_ext.doctor.run import Run

STYLE = """
:root { color-scheme: light dark; --ink: #1d2430; --soft: #5c6675; --paper: #fff; --card: #f6f7f9; --rule: #dde1e7;
  --line: #2563b8; --alarm: #c62f2f; --watch: #a86400; --fine: #1f7a46; --ill: #c62f2f1f; }
@media screen and (prefers-color-scheme: dark) { :root { --ink: #e4e8ee; --soft: #9aa5b4; --paper: #14181e;
  --card: #1d232b; --rule: #333c48; --line: #79aef2; --alarm: #ff7b72; --watch: #e3a33e; --fine: #5fc98b;
  --ill: #ff7b7226; } }
* { box-sizing: border-box; } a { color: var(--line); }
body { margin: 0 auto; max-width: 64rem; padding: 1.2rem 1rem 3rem; background: var(--paper); color: var(--ink);
  font: 1rem/1.5 system-ui, "Segoe UI", Roboto, "Helvetica Neue", "Liberation Sans", sans-serif;
  overflow-wrap: anywhere; }
h1 { font-size: 1.5rem; margin: 0 0 .3rem; } h2 { font-size: 1.25rem; margin: 2.2rem 0 .2rem; }
h3 { font-size: 1.05rem; margin: 0; line-height: 1.3; } p { margin: .4rem 0; } .soft { color: var(--soft); }
code { font: .88em ui-monospace, "DejaVu Sans Mono", Menlo, Consolas, monospace; background: var(--card);
  border-radius: .25rem; padding: .05em .3em; }
.verdict { font-size: 1.1rem; font-weight: 600; }
.finding { border: 1px solid var(--rule); border-left: .4rem solid var(--colour); border-radius: .4rem;
  padding: .8rem 1rem; margin: 1rem 0; display: grid; grid-template-columns: minmax(0, 1fr); gap: .2rem 1.2rem; }
.alarm { --colour: var(--alarm); } .watch { --colour: var(--watch); --ill: #a864001f; } .fine { color: var(--fine); }
.badge { color: var(--colour); font-size: .78rem; font-weight: 700; letter-spacing: .06em; text-transform: uppercase; }
dl { margin: .5rem 0 0; } dt { color: var(--soft); font-size: .85rem; } dd { margin: 0 0 .5rem; }
.change { font-weight: 600; } .source { font-size: .8rem; color: var(--soft); }
.charts { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fill, minmax(min(100%, 18rem), 1fr)); }
figure { margin: 0; padding: .6rem .6rem .4rem; background: var(--card); border-radius: .4rem; }
figcaption { font-size: .85rem; } figcaption .soft { font-size: .8rem; line-height: 1.35; }
.finding figure { align-self: start; }
svg { display: block; width: 100%; height: auto; } svg text { fill: var(--soft); font-size: 11px; }
.grid { stroke: var(--rule); stroke-width: 1; } .line { fill: none; stroke: var(--line); stroke-width: 1.8;
  stroke-linejoin: round; } .dot { fill: var(--line); } .ill { fill: var(--ill); }
line.alarm { stroke: var(--alarm); } line.watch { stroke: var(--watch); }
line.alarm, line.watch { stroke-dasharray: 5 4; stroke-width: 1.4; }
ul { padding-left: 1.2rem; margin: .4rem 0; } .wide { overflow-x: auto; } pre { overflow-x: auto; font-size: .85rem; }
table { border-collapse: collapse; font-size: .88rem; } th { color: var(--soft); font-weight: 600; }
th, td { padding: .25rem .7rem; text-align: right; border-bottom: 1px solid var(--rule); white-space: nowrap; }
@media (min-width: 46rem) { .finding { grid-template-columns: minmax(0, 1fr) 21rem; } }
@media print { body { max-width: none; padding: 0; font-size: 10pt; } figure, .finding { break-inside: avoid; }
  .wide { overflow: visible; }
  h2 { break-after: avoid; } * { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
  .charts { grid-template-columns: 1fr 1fr 1fr; } .finding { grid-template-columns: minmax(0, 1fr) 7cm; } }
"""

"""Of the pages that this package writes: classes of the parts of a page."""

# Drawn first, in this order; what else was logged follows. Settings that never change are left out.
_FIRST_KEYS = (
    "rollout/ep_rew_mean", "eval/mean_reward", "rollout/ep_len_mean", "rollout/success_rate", "train/approx_kl",
    "train/kl", "train/clip_fraction", "train/ratio_max", "train/entropy_loss", "train/std",
    "train/explained_variance", "train/value_loss", "train/grad_norm", "train/is_line_search_success",
    "train/kl_coef",
)  # fmt: skip
_NO_CHARTS = ("time/total_timesteps", "time/iterations", "time/time_elapsed", "train/n_updates")


def page(diagnoses: Sequence[Diagnosis]) -> str:
    """
    :param diagnoses: of one run or several
    :return: the page
    """
    one = len(diagnoses) == 1
    title = f"{diagnoses[0].run.name}: diagnosis" if one else f"{len(diagnoses)} trainings: diagnosis"
    parts = [
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head><body><h1>{escape(title)}</h1>"
    ]
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
    return "\n".join([*parts, "</body></html>\n"])


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
    if diagnosis.blind:
        items = "".join(f"<li>{escape(rule.title)}</li>" for rule in diagnosis.blind)
        parts.append(
            f"<h2>Not looked for</h2><p>The log lacks what <code>DoctorCallback</code> adds to it.</p><ul>{items}</ul>"
        )
    return parts


def _card(finding: Finding, run: Run) -> str:
    rule = finding.rule
    limits = [Limit(finding.limit, finding.level)]
    series = rule.measure(run)
    write = percentage if rule.is_percentage else number
    caption = f"The limit, {write(limits[0].value)}, is dashed."
    if rule.is_flag:  # a picture of 0 and 1 shows nothing
        key = next(key for key in rule.keys if key in run.series)
        series, limits, caption = run.series[key], [], key
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
    """With names in backticks as code."""
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", escape(text, quote=False))
