"""The page: complete, self-contained, safe against names with markup, drawn to scale."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import asdict, replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

from sdgp_accel import SDGPConfig, html_report
from sdgp_accel.html_report import nice_ticks, render
from sdgp_accel.plan import plan
from sdgp_accel.roofline import SCHEDULES
from sdgp_accel.timing import Stats
from tests.test_benchmark import measured_report

FASTER = (0.8, 0.81, 0.79)
VOID = {"meta", "br"}  # HTML's elements without an end


class Structure(HTMLParser):
    """Checks nesting and collects attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.tags: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def _parse(page: str) -> Structure:
    structure = Structure()
    structure.feed(page)
    structure.close()
    assert structure.open == []
    return structure


def test_self_contained_and_well_formed() -> None:
    page = render(measured_report(FASTER).to_dict())
    structure = _parse(page)
    assert not {"link", "img", "iframe", "object", "embed"} & set(structure.tags)
    assert not {"src", "href", "srcset"} & {name for name, _ in structure.attributes}
    assert "@import" not in page
    assert "url(" not in page
    assert not re.search(r"(https?:)?//[a-z]", page)
    assert structure.tags.count("script") == 1  # the data, which nothing runs
    assert ("type", "application/json") in structure.attributes


def test_page_carries_its_data_and_renders_again_from_it() -> None:
    report = measured_report(FASTER).to_dict()
    page = render(report)
    raw = re.search(r'id="data">(.*?)</script>', page, re.DOTALL)
    assert raw is not None
    data = json.loads(raw.group(1))
    assert data == json.loads(json.dumps(report))
    assert render(data) == page


def test_names_with_markup_are_escaped() -> None:
    page = render(replace(measured_report(FASTER), name="</script><b>&model").to_dict())
    assert "<b>&model" not in page
    assert "&lt;b&gt;&amp;model" in page
    _parse(page)


def test_bars_are_drawn_to_scale() -> None:
    page = render(measured_report(FASTER).to_dict())
    lefts, widths = zip(
        *((float(left), float(width)) for left, width in re.findall(r"left:([\d.]+)%;width:([\d.]+)%", page)),
        strict=True,
    )
    # dense: 4 parts, SDGP: 6, dense compiled (the longest): 3; 1.1 s is the full width.
    assert len(widths) == 13
    assert sum(widths[:4]) == pytest.approx(100 / 1.1, abs=0.1)
    assert sum(widths[4:10]) == pytest.approx(80 / 1.1, abs=0.1)
    assert sum(widths[10:]) == pytest.approx(100, abs=0.1)
    for index in range(13):
        starts = index in (0, 4, 10)
        assert lefts[index] == pytest.approx(0 if starts else lefts[index - 1] + widths[index - 1], abs=0.01)


@pytest.mark.parametrize(
    ("seconds", "text"), [(1.2344, "1,234 ms"), (0.1234, "123.4 ms"), (0.01234, "12.34 ms"), (0.0001234, "123.4 µs")]
)
def test_times_have_the_unit_and_the_digits_to_be_read(seconds: float, text: str) -> None:
    page = render(measured_report((seconds,) * 3, (seconds,) * 3).to_dict())
    assert text in " ".join(re.sub(r"<[^>]*>", " ", page).split())


def test_memory_and_predictions_are_drawn_to_scale() -> None:
    peaks = [{"name": name, "peak_bytes": peak << 20} for name, peak in (("dense", 40), ("SDGP", 50))]
    assert html_report._memory(peaks) == [("dense", 80.0, "40.0 MiB"), ("SDGP", 100.0, "50.0 MiB")]
    (_, (_, width, text)) = html_report._memory([*peaks, {"name": "large", "peak_bytes": 5 << 28}])[1:]
    assert (width, text) == (100.0, "1.25 GiB")
    # The first layer's input needs no gradient; the other two are drawn together.
    model = torch.nn.Sequential(*(torch.nn.Linear(256, 256) for _ in range(3)))
    prediction = plan(model, torch.empty(64, 256)).to_dict()
    seconds = [sum(prediction["layers"][index]["backward"] for index in group) for group in prediction["groups"]]
    assert len(seconds) == 2
    rows = html_report._predicted_rows(prediction)
    assert [dict(row.bars)["dense"] for row in rows] == pytest.approx([100 * s / max(seconds) for s in seconds])


def test_measured_layers_are_drawn_beside_what_was_predicted() -> None:
    seconds = {"predicted_dense": 2e-3, "predicted_sdgp": 1.5e-3, "dense": 4e-3, "sdgp": 1e-3}
    (row,) = html_report._measured_rows([{"names": ["a", "b"], "shape": "10×20→30000", **seconds}])
    assert (row.name, row.shape) == ("2 × a", "10 × 20 → 30,000")
    assert row.bars == (("predicted", 50.0), ("dense", 100.0), ("fused", 25.0))
    assert (row.headline, row.detail) == ("75% saved, 25% predicted", "2.00 / 4.00 / 1.00 ms")


@pytest.mark.parametrize(
    ("tokens", "saves", "unit", "scale"), [(4096, (True, True), "ms", 1e3), (16, (False, True), "µs", 1e6)]
)
def test_predicted_savings_are_those_of_the_plan(
    tokens: int, saves: tuple[bool, bool], unit: str, scale: float
) -> None:
    with torch.device("meta"):
        model = torch.nn.Sequential(*(torch.nn.Linear(4096, 4096) for _ in range(3)))
        report = plan(model, torch.empty(tokens, 4096))
    layer, (_, row) = report.layers[1], html_report._predicted_rows(report.to_dict())
    assert row.name == "2 × 1"
    drawn, headline, times = dict(row.bars), [], [layer.backward]
    for schedule, gains in zip(SCHEDULES, saves, strict=True):
        saved = layer.saved(schedule) / layer.backward
        assert (saved > 0) is gains
        assert drawn[schedule] == pytest.approx((1 - saved) * drawn["dense"])
        headline.append(f"{saved:.0%}" if gains else "–")
        times.append(layer.backward - layer.saved(schedule))
    assert row.headline == " / ".join(headline)
    assert row.detail == " / ".join(html_report._cell(2 * seconds, scale) for seconds in times) + f" {unit}"


def test_predictions_say_what_stays_dense_and_leave_out_what_has_no_backward() -> None:
    model = torch.nn.Sequential(*(torch.nn.Conv2d(*channels, 1) for channels in ((2, 64), (64, 64), (64, 64))))
    model[0].requires_grad_(False)
    config = SDGPConfig(grad_input="dense", grad_weight="dense")
    rows = html_report._predicted_rows(plan(model, torch.empty(8, 2, 16, 16), config=config).to_dict())
    assert [(row.name, row.shape, row.headline) for row in rows] == [
        ("1", "2,048 × 64 → 64", "no pass pruned"), ("2", "2,048 × 64 → 64", "no pass pruned")
    ]  # fmt: skip


def test_settings_and_origin_are_listed_by_their_dotted_names() -> None:
    report = measured_report(FASTER)
    gpu = {"name": "NVIDIA H100", "state": {"pstate": "P0"}}
    report = replace(report, provenance={**report.provenance, "gpu": gpu})
    page = " ".join(re.sub(r"<[^>]*>", " ", render(report.to_dict())).split())
    assert "versions.torch 2 gpu.name NVIDIA H100 gpu.state.pstate P0" in page
    assert "git_revision" not in page.split("Where these numbers come from")[1].split("This page")[0]  # there is none


def test_says_what_is_measured_and_what_predicted() -> None:
    page = render(measured_report(FASTER).to_dict())
    assert 'class="verdict faster"' in page
    assert "SDGP: 0.800 × this" in page
    assert [bar.note.split(":")[0] for bar in html_report._bars(measured_report(FASTER).to_dict(), 1.0, "s")] == [
        "SDGP", "", "SDGP"
    ]  # fmt: skip
    assert "Layer by layer, measured against the roofline" in page
    group = measured_report(FASTER).layers[0]
    predicted = 1 - group.predicted_sdgp / group.predicted_dense
    assert f"50% saved, {predicted:.0%} predicted" in page  # every layer: 0.1 of 0.2 s
    assert re.search(r'<span class="tag">prediction</span>', page)
    without = replace(measured_report(FASTER), accelerated=False).to_dict()
    assert [bar.note for bar in html_report._bars(without, 1.0, "s")] == ["", "emulated", ""]
    emulated = render(without)
    assert "dense, measured" in emulated
    assert "SDGP, measured" not in emulated
    assert "% saved" not in emulated
    slower = measured_report((1.3, 1.3, 1.3)).to_dict()
    slower["layers"][0]["sdgp"] = 3 * slower["layers"][0]["dense"]
    page = render(slower)
    assert 'class="verdict slower"' in page
    assert "200% slower, " in page


def test_both_colour_schemes() -> None:
    page = render(measured_report(FASTER).to_dict())
    assert "prefers-color-scheme: dark" in page
    light, dark = (set(re.findall(r"(--[a-z_-]+):", block)) for block in page.split("prefers-color-scheme: dark")[:2])
    assert light <= dark
    assert set(re.findall(r"var\((--[a-z_-]+)\)", page)) <= light


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (93.7, 104.2), (0.00013, 0.00019), (0, 12345.0), (-3, 7)])
def test_ticks_are_round_and_inside(low: float, high: float) -> None:
    ticks = nice_ticks(low, high)
    assert 2 <= len(ticks) <= 8
    assert all(low - 1e-9 <= tick <= high + 1e-9 for tick in ticks)
    step = ticks[1] - ticks[0]
    assert ticks == pytest.approx([ticks[0] + index * step for index in range(len(ticks))])
    mantissa = float(f"{step:.6e}".split("e")[0])
    assert mantissa in (1.0, 2.0, 5.0)
    assert nice_ticks(3.0, 3.0) == [3.0]


def test_missing_jinja_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(ModuleNotFoundError, match=r"sdgp_accel\[report\]"):
        measured_report(FASTER).save_html(tmp_path / "page.html")


def _steps(name: str, *samples: float) -> dict[str, object]:
    return {"name": name, "samples": samples, "step": asdict(Stats.of(samples))}


def test_steps_lie_where_the_ticks_say() -> None:
    contenders = [_steps("dense", 0.010, 0.012, 0.015), _steps("SDGP", 0.008, 0.009, 0.016)]
    ticks, strips = html_report._strips(contenders, 1e3)
    (left, first), (right, last) = ticks[0], ticks[-1]
    slope = (right - left) / (float(last) - float(first))
    for contender, strip in zip(contenders, strips, strict=True):
        step = contender["step"]
        expected = [left + slope * (1e3 * seconds - float(first)) for seconds in contender["samples"]]
        assert [x for x, _ in strip.dots] == pytest.approx(expected, abs=0.2)
        quartiles = [left + slope * (1e3 * step[key] - float(first)) for key in ("low", "median", "high")]
        assert [strip.low, strip.median, strip.high] == pytest.approx(quartiles, abs=0.2)
        assert all(html_report.STRIP_LEFT < x < html_report.STRIP_WIDTH for x, _ in strip.dots)
    _, (strip,) = html_report._strips([_steps("alone", 0.01)], 1e3)  # all steps alike
    assert html_report.STRIP_LEFT < strip.median < html_report.STRIP_WIDTH
