"""The frame and style sheet of all HTML pages of this package, for screens of any size and for paper."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape

_STYLE = """
:root { color-scheme: light dark; --ink: #1d2430; --soft: #5c6675; --paper: #fff; --card: #f6f7f9; --rule: #dde1e7;
  --line: #2563b8; --alarm: #c62f2f; --watch: #a86400; --fine: #1f7a46; --ill: #c62f2f1f;
  --blue: #0072b2; --vermillion: #d55e00; }
@media screen and (prefers-color-scheme: dark) { :root { --ink: #e4e8ee; --soft: #9aa5b4; --paper: #14181e;
  --card: #1d232b; --rule: #333c48; --line: #79aef2; --alarm: #ff7b72; --watch: #e3a33e; --fine: #5fc98b;
  --ill: #ff7b7226; --blue: #56b4e9; --vermillion: #e69f00; } }
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
ul { padding-left: 1.2rem; margin: .4rem 0; } .table { overflow-x: auto; }
pre { background: var(--card); border-radius: .4rem; padding: .5rem .7rem; margin: .3rem 0 .8rem; white-space: pre-wrap;
  font: .85rem/1.45 ui-monospace, "DejaVu Sans Mono", Menlo, Consolas, monospace; }
table { border-collapse: collapse; font-size: .88rem; } th { color: var(--soft); font-weight: 600; }
th, td { padding: .25rem .7rem; text-align: right; border-bottom: 1px solid var(--rule); white-space: nowrap; }
th { white-space: normal; overflow-wrap: normal; vertical-align: bottom; line-height: 1.2; }
td.words { white-space: normal; } .words { text-align: left; }
tr > :first-child { text-align: left; position: sticky; left: 0; background: var(--paper); }
@media (max-width: 30rem) { th, td { padding: .25rem .4rem; } }
@media (min-width: 46rem) { .finding { grid-template-columns: minmax(0, 1fr) 21rem; } }
@media print { :root { font-size: 10pt; } body { max-width: none; padding: 0; }
  figure, .finding, ul { break-inside: avoid; } h2, h2 + p { break-after: avoid; }
  .table { overflow: visible; } tr > :first-child { position: static; }
  .wide { page: wide; } .wide table { font-size: 6.5pt; }
  .wide th, .wide td { padding: .15rem .25rem; } @page wide { size: landscape; margin: 1cm; }
  * { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
  svg { overflow: visible; } svg text { font-size: 14px; }
  .charts { grid-template-columns: 1fr 1fr 1fr; } .finding { grid-template-columns: minmax(0, 1fr) 7cm; } }
"""


def document(title: str, parts: Iterable[str]) -> str:
    """
    :param title: title and heading of the page
    :param parts: HTML below the heading
    :return: a page that loads no other files
    """
    head = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head><body><h1>{escape(title)}</h1>"
    )
    return "\n".join([head, *parts, "</body></html>\n"])
