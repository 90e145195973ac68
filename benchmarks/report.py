"""What was measured, as Markdown tables, CSV and a plot."""

from __future__ import annotations

import csv
import importlib
import math
import os
import platform
import shlex
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from benchmarks.cases import ENVIRONMENT, LIMITS, OURS, PRODUCTS, ROOT, Settings, Side, Suite, Workload
from benchmarks.machine import commit, processor
from benchmarks.measuring import Measured, ratio, ratio_of_all
from benchmarks.tasks import Turn


class Report:
    """
    Collects what is measured and writes it to files, after each case: a run that is broken off leaves something.

    :param suite: that is measured
    :param settings: of the run
    :param out: folder
    """

    def __init__(self, suite: Suite, settings: Settings, out: Path) -> None:
        self._suite = suite
        self._settings = settings
        self._out = out
        self._about_run = [command_line("throughput", sys.argv[1:]), *_machine()]
        if settings.before:
            self._about_run.append(f"the version before: commit {commit(Path(settings.before))}")
        self._results: dict[Workload, dict[Side, Measured]] = {}

    def file(self, suffix: str) -> Path:
        """:param suffix: of the name of one of the files"""
        return self._out / f"{self._suite.stem}.{suffix}"

    def add(self, workload: Workload, results: dict[Side, Measured]) -> None:
        """
        :param workload: a case of the suite
        :param results: of its sides
        """
        self._results[workload] = results
        tables = self._growth_tables() if self._suite.axes else self._goal_tables()
        blocks = [self._head(), *tables, [f"- {note}" for note in [*self._suite.notes, *self._warnings()]]]
        self._out.mkdir(parents=True, exist_ok=True)
        self.file("md").write_text("\n\n".join("\n".join(block) for block in blocks).rstrip() + "\n")
        self._write_csv()

    def failures(self) -> list[str]:
        """A line for each side that could not do its work."""
        return [
            f"**Failed**: {side} on {workload}: {' '.join(m.failure.split())}"
            for workload, sides in self._results.items()
            for side, m in sides.items()
            if m.failure
        ]

    def _warnings(self) -> list[str]:
        """What the reader should know about how well it was measured."""
        shares = [
            (m.processor_share(), f"{side} on {workload}")
            for workload, sides in self._results.items()
            for side, m in sides.items()
            if side.n_processes == 1 or side.who in OURS  # SB3 waits for its environments' processes
        ]
        share, worst = min(shares)
        if self._settings.device != "cpu" or share >= 0.97:
            return self.failures()
        disturbed = "**Disturbed**: something else ran on the machine; do not trust the numbers. At worst,"
        return [*self.failures(), f"{disturbed} {worst} had a processor in {share:.0%} of its time"]

    def _head(self) -> list[str]:
        measured = [m for sides in self._results.values() for m in sides.values()]
        versions = {name: version for m in measured for name, version in m.versions.items()}
        devices = sorted({m.device for m in measured} - {"", "cpu"})
        settings = self._settings
        held = (
            f", held to {settings.cores} core(s)"
            if settings.device == "cpu" and hasattr(os, "sched_setaffinity")
            else ""
        )
        command, *machine = self._about_run
        return [
            f"# {self._suite.title}\n\n```\n{command}\n```\n",
            *(f"- {line}" for line in [*machine, *devices]),
            f"- {', '.join(f'{name} {version}' for name, version in versions.items()) or 'no side could start'}",
            f"- {settings.repeats} turn(s) of each side after {settings.n_warm_up} warm-up iteration(s); "
            f"{settings.threads} thread(s){held}; device {settings.device}",
        ]

    def _goal_tables(self) -> Iterable[list[str]]:
        """How the sides compare, and a table for each case."""
        rows = []
        for goal in self._suite.goals:
            if goal.workload not in self._results:
                continue
            ours, peer = (self._results[goal.workload][side] for side in (goal.ours, goal.peer))
            reached = ratio(ours, peer)
            verdict = "" if goal.least is None else "yes" if reached.median >= goal.least else "**no**"
            rows.append(
                [
                    str(goal),
                    str(goal.workload),
                    "torch_compile" if goal.ours.torch_compile else "",
                    "" if goal.least is None else f">= {goal.least}",
                    str(reached),
                    _number(ratio_of_all(ours, peer), ".2f"),
                    "**failed**" if ours.failure or peer.failure else verdict,
                    str(ratio(ours, peer, "collect")),
                    str(ratio(ours, peer, "train")),
                ]
            )
        if rows:
            head = ["work", "on", "switch", "goal", "times faster", "all turns together", "held", "collect alone"]
            yield table([*head, "train alone"], rows)
        yield from self._model_on_paper()
        for workload, sides in self._results.items():
            yield [f"## {workload}"]
            yield _side_table(sides)

    def _model_on_paper(self) -> Iterable[list[str]]:
        """For more processes than were measured."""
        from benchmarks.several import model_on_paper

        rows: list[list[str]] = []
        for workload, sides in self._results.items():
            for side, several in sides.items():
                if side.n_processes > 1 and side.who in OURS:
                    rows += model_on_paper(side, workload, sides[replace(side, n_processes=1)], several)
        if rows:
            head = ["side", "on", "processes", "us a message, one machine", "times one process"]
            yield [
                "## On paper: more processes\n\nFrom measured parts, as benchmarks/README.md says. Each process has a "
                "core of its own, and the work of one."
            ]
            yield table([*head, "us a message, many machines", "times one process"], rows)

    def _growth_tables(self) -> Iterable[list[str]]:
        """For each of what grows, the steps a second."""
        for name, workloads in self._suite.axes.items():
            rows = []
            for value, workload in workloads.items():
                if workload in self._results:
                    ours, peer, compiled, environment = self._results[workload].values()
                    speeds = (_rate(m).partition(" ")[0] for m in (peer, ours, compiled, environment))
                    rows.append([str(value), *speeds, str(ratio(ours, peer)), str(ratio(compiled, peer))])
            if rows:
                first = next(iter(workloads.values()))
                our_side, peer_side, compiled_side, _ = self._suite.cases[first]
                head = [f"{side}, steps/s" for side in (peer_side, our_side, compiled_side, ENVIRONMENT)]
                yield [f"## Growing: {name}\n\nThe first line: {first}."]
                yield table([name, *head, "times faster", "times faster, compiled"], rows)

    def _write_csv(self) -> None:
        with self.file("csv").open("w", newline="") as file:
            file.writelines(f"# {line}\n" for line in self._about_run)
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow([*Workload.__dataclass_fields__, "side", "phase", "turn", *Turn._fields, "peak_mib"])
            for workload, sides in self._results.items():
                for side, m in sides.items():
                    peak = _number(m.peaks.get("host", math.nan), ".1f")
                    for phase, turns in (("first run", m.first_run), ("warm-up", m.warm_up), ("measured", m.turns)):
                        for i, turn in enumerate(turns):
                            numbers = [turn.steps, *(f"{value:.6f}" for value in turn[1:])]
                            writer.writerow([*asdict(workload).values(), side, phase, i, *numbers, peak])

    def plot(self) -> None:
        """Draw what the tables say, if there is matplotlib; it is not among the requirements."""
        try:
            importlib.import_module("matplotlib").use("Agg")
            plt: Any = importlib.import_module("matplotlib.pyplot")
        except ImportError:
            print("No plot was drawn: pip install matplotlib", file=sys.stderr)
            return
        if self._suite.axes:
            self._plot_growth(plt)
        elif self._suite.goals:
            self._plot_ratios(plt)
        else:
            return
        figure = plt.gcf()
        figure.text(0.01, 0.01, "\n".join(self._about_run), fontsize=6, color="0.4")
        figure.savefig(self.file("png"), dpi=150, bbox_inches="tight", metadata={"Software": None})
        plt.close(figure)

    def _plot_ratios(self, plt: Any) -> None:
        """A bar for each ratio, with its spread and its goal."""
        goals = self._suite.goals[::-1]
        height = 1.6 + 0.34 * len(goals)
        figure, axes = plt.subplots(figsize=(9, height))
        for y, goal in enumerate(goals):
            sides = self._results[goal.workload]
            reached = ratio(sides[goal.ours], sides[goal.peer])
            if not math.isnan(reached.median):
                axes.barh(y, reached.median, color="tab:blue" if goal.ours.torch_compile else "tab:cyan", height=0.7)
                axes.plot([reached.low, reached.high], [y, y], color="black", linewidth=1)
                axes.text(reached.high + 0.05, y, f"{reached.median:.2f}", va="center", fontsize=7)
            if goal.least is not None:
                axes.plot([goal.least] * 2, [y - 0.42, y + 0.42], color="tab:red")
        axes.axvline(1.0, color="0.5", linewidth=0.8)
        labels = [f"{g.ours} / {g.peer}\n{g.workload.env}, {g.workload.n_envs} env(s)" for g in goals]
        axes.set_yticks(range(len(goals)), labels, fontsize=6)
        axes.set_xlabel("times as many steps a second; line: least and greatest of the pairs; red: goal")
        axes.margins(x=0.08, y=0.01)
        figure.tight_layout(rect=(0, 0.5 / height, 1, 1))

    def _plot_growth(self, plt: Any) -> None:
        """Steps a second against what grows."""
        figure, panels = plt.subplots(1, len(self._suite.axes), figsize=(12, 4.4), sharey=True)
        for panel, (name, workloads) in zip(panels, self._suite.axes.items(), strict=True):
            values = list(workloads)
            for side in next(iter(self._suite.cases.values())):
                speeds = [self._results[workload][side].per_second() for workload in workloads.values()]
                median, low, high = zip(*speeds, strict=True)
                style = {"color": "0.6", "linestyle": "--"} if side == ENVIRONMENT else {"marker": "o", "markersize": 4}
                panel.plot(values, median, label=str(side), **style)
                panel.fill_between(values, low, high, alpha=0.2, color=style.get("color"))
            panel.set_xscale("log", base=2)
            panel.set_yscale("log")
            panel.set_xticks(values, [str(value) for value in values])
            panel.set_xlabel(name)
            panel.grid(alpha=0.3, which="both")
        panels[0].set_ylabel("steps a second")
        panels[0].legend(fontsize=7)
        figure.tight_layout(rect=(0, 0.08, 1, 1))


def _side_table(results: dict[Side, Measured]) -> list[str]:
    """
    :param results: of the sides that took turns
    :return: a table with a line for each
    """
    limit = results[ENVIRONMENT].per_step()
    rows = []
    for side, m in results.items():
        total, *parts = (_number(m.per_step(part) * 1e6, ".1f") for part in ("seconds", "collect", "train", "rest"))
        compiling = ["", "", ""]
        if side.torch_compile:
            seconds = m.compile_seconds(m.first_run)
            eager = results.get(replace(side, torch_compile=False))
            saved = math.nan if eager is None else eager.per_step() - m.per_step()
            pays_back = "never" if saved <= 0 else _number(max(seconds, 0) / saved, ",.0f")
            compiling = [_number(seconds, ".1f"), _number(m.compile_seconds(m.warm_up), ".1f"), pays_back]
        memory = _number(m.peaks.get("host", math.nan))
        if "device" in m.peaks:
            memory += f" + {_number(m.peaks['device'])} on the device"
        share = "" if side == PRODUCTS else _number(limit / m.per_step(), ".0%")
        rows.append([str(side), _rate(m), total, *(["", "", ""] if side.who in LIMITS else parts), share, memory])
        rows[-1] += compiling
        if PRODUCTS in results:
            rows[-1].append("" if side.who in LIMITS else str(ratio(results[PRODUCTS], m, "train")))
    head = ["side", "steps/s", "us a step", "collect", "train", "rest", "environment's share", "peak MiB"]
    head += ["compile s, first run", "next runs", "pays back after steps"]
    return table([*head, "train, times the products"] if PRODUCTS in results else head, rows)


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """A Markdown table, whose first column is text."""
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *rows]
    return ["| " + " | ".join(cells) + " |" for cells in lines]


def _number(value: float, form: str = ".0f") -> str:
    return "-" if math.isnan(value) else format(value, form)


def _rate(m: Measured) -> str:
    speed = m.per_second()
    return "**failed**" if m.failure else f"{speed.median:,.0f} ({speed.low:,.0f} to {speed.high:,.0f})"


def command_line(module: str, arguments: Sequence[str]) -> str:
    """
    A command as it is printed: of absolute paths, only the last part.

    :param module: of this package
    :param arguments: that it was started with
    """
    words = []
    for word in arguments:
        option, is_joined, value = word.rpartition("=")
        words.append(f"{option}{is_joined}{Path(value).name if Path(value).is_absolute() else value}")
    return shlex.join(["python", "-m", f"benchmarks.{module}", *words])


def _machine() -> list[str]:
    """What the run is made on."""
    load = f"load average at the start {os.getloadavg()[0]:.1f}"
    return [
        f"{processor()}, {os.cpu_count()} cores, {platform.system()} {platform.machine()}; {load}",
        f"{time.strftime('%Y-%m-%d', time.gmtime())}, commit {commit(ROOT)}",
    ]
