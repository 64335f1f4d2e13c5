"""From finished runs to the table, the plot and the JSON that the README refers to."""

from __future__ import annotations

import json
import math
import statistics
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from bench.learning.cells import DENSE, OTHER_PATTERNS, PRUNED, Cell, by_value
from bench.learning.tasks import TASKS, Task

FUNCTIONS = ("mvue", "rescale_magnitude", "magnitude", "random")
PATTERNS = sorted({(2, 4), *OTHER_PATTERNS}, key=lambda pattern: (pattern[0] / pattern[1], pattern))
MISSING = "—"
TITLES = {"grad_input": "grad_input only", "grad_weight": "grad_weight only", "both": "both passes"}


class Entry(NamedTuple):
    """One cell: its score over the seeds, and the difference to the dense run of the same seed on the same device."""

    cell: Cell
    device: str
    seeds: int
    mean: float
    std: float
    delta: float
    delta_std: float
    curve: list[tuple[int, float]]  # step, mean validation score

    @property
    def diverged(self) -> bool:
        """Whether a seed ended with a loss that is no number; mean and delta are none either, then."""
        return not math.isfinite(self.mean)

    def __str__(self) -> str:
        if self.diverged:
            return "diverged"
        digits = 3 if abs(self.mean) < 10 else 2
        return f"{self.mean:.{digits}f} ± {self.std:.{digits}f}"


def summarise(task: Task, lines: Sequence[dict[str, Any]]) -> dict[Cell, Entry]:
    """One entry per cell of `task` that has a dense run of the same seed and device to compare with.

    A cell that ran on several devices is shown from the one with the most seeds, at a tie the one with the most cells.
    Raises ValueError where runs on different data are mixed: their scores cannot be compared.
    """
    lines = [line for line in lines if line["task"] == task.name and line["setup"] == task.setup()]
    data = {line["data_sha256"] for line in lines}
    if len(data) > 1:
        raise ValueError(f"runs of {task.name!r} on {len(data)} different data sets (Python versions): {sorted(data)}")
    runs: dict[str, dict[Cell, dict[int, dict[str, Any]]]] = defaultdict(lambda: defaultdict(dict))
    for line in lines:
        runs[line["environment"]["device"]][Cell(**line["cell"])][line["seed"]] = line
    devices = sorted(runs, key=lambda device: -len(runs[device]))
    entries = {}
    for cell in by_value():
        shared = {device: sorted(runs[device][cell].keys() & runs[device][DENSE].keys()) for device in devices}
        device = max(devices, key=lambda device: len(shared[device]), default="")
        if not device or not shared[device]:
            continue
        by_seed, dense, seeds = runs[device][cell], runs[device][DENSE], shared[device]
        scores = [by_seed[seed]["final"][task.score] for seed in seeds]
        deltas = [score - dense[seed]["final"][task.score] for score, seed in zip(scores, seeds, strict=True)]
        curves = [by_seed[seed]["curve"] for seed in seeds]
        curve = [
            (points[0]["step"], statistics.fmean(point[task.score] for point in points))
            for points in zip(*curves, strict=True)
        ]
        entries[cell] = Entry(cell, device, len(seeds), *_mean_std(scores), *_mean_std(deltas), curve)
    return entries


def write(lines: Sequence[dict[str, Any]], folder: Path) -> None:
    """Write convergence.json, convergence.md, its first tables as convergence_2_4.md, and convergence.png."""
    tables = {task: summarise(task, lines) for task in TASKS.values()}
    tables = {task: entries for task, entries in tables.items() if entries}
    (folder / "convergence.json").write_text(json.dumps(as_json(tables, lines), indent=1) + "\n")
    (folder / "convergence.md").write_text("\n".join(markdown(task, entries) for task, entries in tables.items()))
    (folder / "convergence_2_4.md").write_text(
        "\n".join("\n".join([*heading(task, entries), *two_four(entries)]) for task, entries in tables.items())
    )
    plot(tables, folder / "convergence.png")


def as_json(tables: dict[Task, dict[Cell, Entry]], lines: Sequence[dict[str, Any]]) -> dict[str, Any]:
    environments = {json.dumps(line["environment"], sort_keys=True) for line in lines}
    return {
        "environments": [json.loads(text) for text in sorted(environments)],
        "tasks": {
            task.name: {
                "title": task.title,
                "score": task.score,
                "setup": task.settings(),
                "cells": [_numbers({**entry._asdict(), "cell": str(entry.cell)}) for entry in entries.values()],
            }
            for task, entries in tables.items()
        },
    }


def _numbers(value: Any) -> Any:
    """`value` with null in place of nan, which JSON does not have."""
    if isinstance(value, dict):
        return {key: _numbers(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_numbers(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def markdown(task: Task, entries: dict[Cell, Entry]) -> str:
    """2:4 by pruned pass, and for each choice of passes all patterns."""
    lines = [*heading(task, entries), *two_four(entries)]
    patterns = [f"{n}:{m}" for n, m in PATTERNS]
    for pruned in reversed(PRUNED):
        cells = [[_cell(entries, Cell(function, pruned, n, m)) for function in FUNCTIONS] for n, m in PATTERNS]
        if any(cell.pruned == pruned and (cell.n, cell.m) != (2, 4) for cell in entries):  # else said above
            lines += _table(TITLES[pruned], FUNCTIONS, patterns, cells)
    return "\n".join(lines)


def heading(task: Task, entries: dict[Cell, Entry]) -> list[str]:
    """What the tables of `task` show."""
    measure = "validation loss, nats per byte (lower is better)" if task.score == "loss" else "test accuracy, %"
    seeds = sorted({entry.seeds for entry in entries.values()})
    elsewhere = sorted({entry.device for entry in entries.values()} - {entries[DENSE].device})
    note = f" Run on {entries[DENSE].device}"
    if elsewhere:
        note += f"; cells with * on {', '.join(elsewhere)}, compared to dense runs there"
    return [
        f"### {task.title}",
        "",
        f"Dense: **{entries[DENSE]}** {measure}; mean ± std of {' or '.join(map(str, seeds))} seeds after {task.steps} "
        f"steps; in brackets the mean difference to dense with the same seed.{note}.",
        "",
    ]


def two_four(entries: dict[Cell, Entry]) -> list[str]:
    """The 2:4 table: functions by what is pruned."""
    columns = [*(Cell("", pruned, 2, 4) for pruned in PRUNED), Cell("", "both", 2, 4, dense_head=True)]
    titles = [*(TITLES[pruned] for pruned in PRUNED), "both, but not in the head"]
    rows = [[_cell(entries, replace(column, function=function)) for column in columns] for function in FUNCTIONS]
    return _table("2:4", titles, FUNCTIONS, rows)


def _cell(entries: dict[Cell, Entry], cell: Cell) -> str:
    if cell not in entries:
        return MISSING
    mark = "" if entries[cell].device == entries[DENSE].device else " *"
    delta = "" if entries[cell].diverged else f" ({entries[cell].delta:+.3f})"
    return f"{entries[cell]}{delta}{mark}"


def _table(corner: str, columns: Sequence[str], rows: Sequence[str], cells: Sequence[Sequence[str]]) -> list[str]:
    """A Markdown table; rows and columns without any result are left out."""
    kept = [j for j in range(len(columns)) if any(row[j] != MISSING for row in cells)]
    if not kept:
        return []
    named = [[row, *(values[j] for j in kept)] for row, values in zip(rows, cells, strict=True)]
    filled = [row for row in named if {*row[1:]} != {MISSING}]
    table = [[corner, *(columns[j] for j in kept)], ["---"] * (len(kept) + 1), *filled]
    return [f"| {' | '.join(row)} |" for row in table] + [""]


def plot(tables: dict[Task, dict[Cell, Entry]], path: Path) -> None:
    """A row per task: learning curves, 2:4 by pruned pass, and the other patterns; differences are to dense."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(len(tables), 3, figsize=(15, 4 * len(tables)), squeeze=False, layout="constrained")
    for (curves, passes, patterns), (task, entries) in zip(axes, tables.items(), strict=True):
        curves.plot(*zip(*entries[DENSE].curve, strict=True), color="black", label="dense")
        for index, function in enumerate(FUNCTIONS):
            color, shift = f"C{index}", (index - 1.5) / 8
            both = entries.get(Cell(function, "both", 2, 4))
            if both is not None:
                curves.plot(*zip(*both.curve, strict=True), color=color, label=function)
            _dots(passes, [entries.get(Cell(function, pruned, 2, 4)) for pruned in PRUNED], shift, color)
            _dots(patterns, [entries.get(Cell(function, "both", n, m)) for n, m in PATTERNS], shift, color)
        curves.set_title(task.title, fontsize="medium")
        curves.set(xlabel="step", ylabel=f"{task.score}, both passes pruned 2:4")
        values = [value for _, value in entries[DENSE].curve]
        margin = 0.4 * abs(values[-1] - values[0])  # the curves that diverge leave the picture
        curves.set_ylim(min(values) - margin / 4, max(values) + margin)
        curves.legend()
        passes.set(title="2:4, by pruned pass", ylabel=f"{task.score} minus dense")
        passes.set_xticks(range(len(PRUNED)), [TITLES[pruned] for pruned in PRUNED])
        diverged = "; ×: diverged" if any(entry.diverged for entry in entries.values()) else ""
        patterns.set(title=f"N:M, both passes pruned{diverged}", ylabel=f"{task.score} minus dense")
        patterns.set_xticks(range(len(PATTERNS)), [f"{n}:{m}" for n, m in PATTERNS], fontsize="small")
        for axis in (passes, patterns):
            axis.axhline(0, color="black", linewidth=0.8)
            if task.score == "loss":
                axis.set_yscale("symlog", linthresh=0.05)  # from 0.003 to divergence
                axis.set_ylim(bottom=-0.05)
            axis.grid(axis="y", alpha=0.3)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _dots(axis: Any, entries: Sequence[Entry | None], shift: float, color: str) -> None:
    """Mean difference to dense with the seeds' standard deviation, beside its position; a cross where it diverged."""
    points = [(position + shift, entry) for position, entry in enumerate(entries) if entry is not None]
    crosses = [position for position, entry in points if entry.diverged]
    points = [(position, entry) for position, entry in points if not entry.diverged]
    positions = [position for position, _ in points]
    deltas, stds = [entry.delta for _, entry in points], [entry.delta_std for _, entry in points]
    axis.errorbar(positions, deltas, stds, fmt="o", color=color, capsize=3, markersize=4)
    axis.plot(crosses, [0.97] * len(crosses), "x", color=color, transform=axis.get_xaxis_transform())


def _mean_std(values: Sequence[float]) -> tuple[float, float]:
    if not all(map(math.isfinite, values)):
        return math.nan, math.nan
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0
