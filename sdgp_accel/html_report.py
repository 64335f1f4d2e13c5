"""A benchmark's page: one HTML file without scripts, fonts or anything else from elsewhere, for light and dark."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sdgp_accel.benchmark_report import PARTS


@dataclass(frozen=True)
class Segment:
    """A part of a bar, placed in per cent of the chart's width."""

    part: str
    left: float
    width: float
    label: str


@dataclass(frozen=True)
class Bar:
    """One contender's stacked bar."""

    name: str
    note: str
    total: str
    segments: tuple[Segment, ...]


@dataclass(frozen=True)
class Strip:
    """One contender's steps: dots, the middle half and the median, in units of the strip chart's drawing."""

    name: str
    y: float
    dots: tuple[tuple[float, float], ...]
    low: float
    median: float
    high: float


@dataclass(frozen=True)
class LayerRow:
    """Equal layers: bars as (colour, width in per cent of the chart's longest), and what stands beside them."""

    name: str
    shape: str
    bars: tuple[tuple[str, float], ...]
    headline: str
    detail: str


STRIP_WIDTH, STRIP_LEFT, STRIP_ROW = 960, 150, 54


def render(report: Mapping[str, Any]) -> str:
    """The page of `BenchmarkReport.to_dict`, fresh or read back from its JSON.

    ModuleNotFoundError where jinja2 is missing.
    """
    try:
        import jinja2
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("the HTML report needs jinja2: pip install 'sdgp_accel[report]'") from error
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("sdgp_accel"), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    contenders = report["contenders"]
    unit, scale = _unit(max(contender["step"]["median"] for contender in contenders))
    ticks, strips = _strips(contenders, scale)
    return environment.get_template("benchmark.html").render(
        report=report,
        unit=unit,
        parts=[(part, PARTS[part]) for part in PARTS if any(part in c["parts"] for c in contenders)],
        cells={part: [_cell(c["parts"].get(part), scale) for c in contenders] for part in PARTS},
        steps=[_cell(contender["step"]["median"], scale) for contender in contenders],
        bars=_bars(report, scale, unit),
        strips=strips,
        ticks=ticks,
        strip_width=STRIP_WIDTH,
        strip_left=STRIP_LEFT,
        strip_height=len(strips) * STRIP_ROW,
        memory=_memory(contenders),
        measured=_measured_rows(report["layers"]),
        predicted=_predicted_rows(report["prediction"]) if report["prediction"] else [],
        provenance=_flatten(report["provenance"]),
        settings=_flatten(report["settings"]),
        raw=json.dumps(report).replace("<", "\\u003c"),  # nothing in it may end the script element that carries it
    )


def nice_ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers spaced by 1, 2 or 5 times a power of ten inside [low, high]."""
    if not high > low:
        return [low]
    rough = (high - low) / about
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * (1 - 1e-9))
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [index * step for index in range(first, last + 1)]


def _unit(seconds: float) -> tuple[str, float]:
    return ("ms", 1e3) if seconds >= 1e-3 else ("µs", 1e6)


def _cell(seconds: float | None, scale: float) -> str:
    if seconds is None:
        return ""
    value = seconds * scale
    return f"{value:,.0f}" if value >= 1000 else f"{value:.1f}" if value >= 100 else f"{value:.2f}"


def _bars(report: Mapping[str, Any], scale: float, unit: str) -> list[Bar]:
    contenders = report["contenders"]
    longest = max(sum(contender["parts"].values()) for contender in contenders)
    bars = []
    for contender in contenders:
        segments, left = [], 0.0
        for part, seconds in contender["parts"].items():
            width = 100 * seconds / longest
            label = f"{PARTS[part]}: {_cell(seconds, scale)} {unit}"
            segments.append(Segment(part, round(left, 3), round(width, 3), label))
            left += width
        ratio = report["sdgp_over_dense"].get(contender["name"])
        if contender["sdgp"]:
            note = "" if report["kind"] == "measurement" else report["outcome"]
        else:
            fastest = report.get("fastest_sdgp", "SDGP")  # reports of before had one
            note = f"{fastest}: {ratio['median']:.3f} × this" if ratio else ""
        bars.append(Bar(contender["name"], note, _cell(contender["step"]["median"], scale), tuple(segments)))
    return bars


def _strips(contenders: Sequence[Mapping[str, Any]], scale: float) -> tuple[list[tuple[float, str]], list[Strip]]:
    """Axis ticks (position, text) and one strip per contender."""
    low = min(contender["step"]["minimum"] for contender in contenders) * scale
    high = max(contender["step"]["maximum"] for contender in contenders) * scale
    margin = 0.04 * (high - low) or 0.05 * high
    low, high = max(0.0, low - margin), high + margin

    def x(value: Any) -> float:
        place: float = STRIP_LEFT + (value - low) / (high - low) * (STRIP_WIDTH - STRIP_LEFT - 12)
        return round(place, 1)

    strips = []
    for row, contender in enumerate(contenders):
        center = STRIP_ROW * (row + 0.5)
        # Golden-ratio offsets spread the dots of equal steps apart, the same way in every rendering.
        offsets = [((index * 0.618034) % 1.0 - 0.5) * 22 for index in range(len(contender["samples"]))]
        dots = [
            (x(seconds * scale), round(center + offset, 1))
            for seconds, offset in zip(contender["samples"], offsets, strict=True)
        ]
        step = contender["step"]
        places = (x(step[key] * scale) for key in ("low", "median", "high"))
        strips.append(Strip(contender["name"], center, tuple(dots), *places))
    return [(x(tick), f"{tick:g}") for tick in nice_ticks(low, high)], strips


def _memory(contenders: Sequence[Mapping[str, Any]]) -> list[tuple[str, float, str]]:
    """Name, width in per cent and text of each contender's peak."""
    largest = max(contender["peak_bytes"] for contender in contenders) or 1
    unit, size, digits = ("GiB", 2**30, 2) if largest >= 2**30 else ("MiB", 2**20, 1)
    return [
        (c["name"], round(100 * c["peak_bytes"] / largest, 2), f"{c['peak_bytes'] / size:,.{digits}f} {unit}")
        for c in contenders
    ]


def _measured_rows(groups: Sequence[Mapping[str, Any]]) -> list[LayerRow]:
    keys = {"predicted_dense": "predicted", "dense": "dense", "sdgp": "fused"}  # what is drawn, in which colour
    longest = max((group[key] for group in groups for key in keys if group[key] is not None), default=0.0)
    unit, scale = _unit(sum(group["dense"] for group in groups))
    rows = []
    for group in groups:
        drawn = {key: group[key] for key in keys if group[key] is not None}
        predicted = f"{1 - group['predicted_sdgp'] / group['predicted_dense']:.0%} predicted"
        saved = "" if group["sdgp"] is None else _saved(1 - group["sdgp"] / group["dense"]) + ", "
        rows.append(
            LayerRow(
                _times(group["names"]),
                _spaced(group["shape"]),
                tuple((keys[key], 100 * seconds / longest) for key, seconds in drawn.items()),
                saved + predicted,
                " / ".join(_cell(seconds, scale) for seconds in drawn.values()) + f" {unit}",
            )
        )
    return rows


def _saved(share: float) -> str:
    return f"{share:.0%} saved" if share >= 0 else f"{-share:.0%} slower"


def _predicted_rows(prediction: Mapping[str, Any]) -> list[LayerRow]:
    groups = [[prediction["layers"][index] for index in group] for group in prediction["groups"]]
    longest = max((len(group) * group[0]["backward"] for group in groups), default=0.0)
    unit, scale = _unit(prediction["dense_seconds"])
    rows = []
    for group in groups:
        first, calls = group[0], len(group)
        if not first["backward"]:
            continue  # frozen
        seconds = {"dense": first["backward"]}
        seconds |= {key: first[key]["compress"] + first[key]["passes"] for key in ("two_pass", "fused")}
        saves = [
            f"{1 - seconds[key] / seconds['dense']:.0%}" if first[key]["sparse_passes"] else "–"
            for key in ("two_pass", "fused")
        ]
        work = first["work"]
        rows.append(
            LayerRow(
                _times([layer["name"] for layer in group]),
                _spaced(f"{work['positions']}×{work['reduction']}→{work['out_channels']}"),
                tuple((key, 100 * calls * value / longest) for key, value in seconds.items()),
                first["dense_reason"] or " / ".join(saves),
                " / ".join(_cell(calls * value, scale) for value in seconds.values()) + f" {unit}",
            )
        )
    return rows


def _times(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{len(names)} × {names[0]}"


def _spaced(shape: str) -> str:
    return re.sub(r"\d+", lambda number: f"{int(number[0]):,}", shape).replace("×", " × ").replace("→", " → ")


def _flatten(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Nested mappings as (dotted name, text) pairs."""
    pairs: list[tuple[str, str]] = []
    for key, value in values.items():
        if isinstance(value, Mapping):
            pairs += _flatten(value, f"{prefix}{key}.")
        elif value is not None:
            pairs.append((f"{prefix}{key}", str(value)))
    return pairs
