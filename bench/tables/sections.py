"""What is common to the tables of all kinds of result files.

Each table names the files it came from, the machine and the versions; what has no file is "not measured yet". Columns
called "predicted" hold a roofline's figures (`sdgp plan`), never measurements.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich import box
from rich.console import Console
from rich.table import Table as RichTable

NOT_MEASURED = "not measured yet"
Result = Any  # a result file's JSON
Row = dict[str, Any]


class Section(NamedTuple):
    """One kind of result file: which files are of that kind, their table, and what they come down to.

    claims: sentences without verbs, each true of the whole file, for the README's summary. notes: what stands below the
    table.
    """

    question: str
    accepts: Callable[[Result], bool]
    columns: Sequence[str]
    rows: Callable[[Result], Iterable[Sequence[str]]]
    claims: Callable[[Result], list[str]]
    notes: Callable[[Result], list[str]] = lambda result: []


class DamagedResult(ValueError):
    """A result file that holds something else; the message names it."""


def files(section: Section, results: Path) -> list[tuple[Path, Result]]:
    """The result files of `section`, by name. Raises DamagedResult for one that no table can be made of."""
    found = []
    for path in sorted(results.glob("*.json")):
        try:
            result = json.loads(path.read_text(encoding="utf-8"))
            if section.accepts(result):
                for part in (section.rows, section.claims, section.notes, machine, gpu_name):
                    list(part(result))  # here, where an error can be told with the file's name
                found.append((path, result))
        except (OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError) as error:
            raise DamagedResult(f"{path} is damaged or no result of this project: {error!r}") from error
    return found


def render(section: Section, results: Path) -> str:
    """A table for each file of `section`, and where it comes from, for a page that lies beside the files."""
    texts = []
    for path, result in files(section, results):
        lines = table(section.columns, section.rows(result))
        texts.append("\n".join([*lines, "", *section.notes(result), f"From {source(path)}: {machine(result)}."]))
    return "\n\n".join(texts) or f"{NOT_MEASURED.capitalize()}."


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """The lines of a Markdown table."""
    head = [f"| {' | '.join(columns)} |", f"| {' | '.join(['---'] * len(columns))} |"]
    return head + [f"| {' | '.join(row)} |" for row in rows]


def print_table(section: Section, result: Result) -> None:
    """The same on the terminal."""
    shown = RichTable(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for index, column in enumerate(section.columns):
        shown.add_column(plain(column), justify="right" if index > 1 else "left", no_wrap=index == 0)
    for row in section.rows(result):
        shown.add_row(*map(plain, row))
    console = Console(width=220)
    console.print(shown)
    for line in section.notes(result):
        console.print(plain(line))


def plain(text: str) -> str:
    """Without Markdown's marks."""
    return text.replace("**", "").replace("`", "")


def source(path: Path, folder: str = "") -> str:
    """A link to a result file in `folder`."""
    return f"[{path.name}]({folder}{path.name})"


def spread(ratios: Iterable[float]) -> str:
    """Median and range of speed ratios."""
    values = sorted(ratios)
    middle = times(statistics.median(values))
    return middle if len(values) == 1 else f"{middle} ({values[0]:.2f}–{values[-1]:.2f})"


def gpu_name(result: Result) -> str:
    """What the numbers were measured on, as far as the file records it."""
    if "environments" in result:
        return ", ".join(dict.fromkeys(environment["device"] for environment in result["environments"]))
    origin = result.get("provenance") or {}
    return str((origin.get("gpu") or origin.get("cpu") or {}).get("name", ""))


def machine(result: Result) -> str:
    """GPU, driver, clocks and versions, as far as the file records them."""
    if not isinstance(result, dict):
        return "machine not recorded in the file"
    origin = result.get("provenance") or {}
    gpu = origin.get("gpu") or {}
    state = gpu.get("state_under_load") or gpu.get("state") or {}
    known = [
        gpu.get("name") or origin.get("cpu", {}).get("name"),
        state and f"driver {state.get('driver_version')}, {state.get('clocks.sm')}, {state.get('power.draw')}",
        gpu and f"CUDA {gpu.get('cuda')}",
        *(f"{name} {version}" for name, version in origin.get("versions", {}).items() if name == "torch"),
        origin.get("git_revision") and f"revision {origin['git_revision'][:12]}",
    ]
    text = ", ".join(filter(None, known)) or "machine not recorded in the file"
    return f"{text}. {origin['note'].rstrip('.')}" if origin.get("note") else text


def microseconds(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}"


def times(ratio: float) -> str:
    return f"{ratio:.2f} ×"
