"""The page: complete, self-contained, safe against names with markup, drawn to scale."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

from sdgp_accel import html_report
from sdgp_accel.html_report import nice_ticks, render
from sdgp_accel.plan import plan
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
    widths = [float(width) for width in re.findall(r"left:[\d.]+%;width:([\d.]+)%", page)]
    # dense: 4 parts, SDGP: 6, dense compiled (the longest): 3; 1.1 s is the full width.
    assert len(widths) == 13
    assert sum(widths[:4]) == pytest.approx(100 / 1.1, abs=0.1)
    assert sum(widths[4:10]) == pytest.approx(80 / 1.1, abs=0.1)
    assert sum(widths[10:]) == pytest.approx(100, abs=0.1)


def test_memory_and_predictions_are_drawn_to_scale() -> None:
    peaks = [{"name": name, "peak_bytes": peak << 20} for name, peak in (("dense", 40), ("SDGP", 50))]
    assert html_report._memory(peaks) == [("dense", 80.0, "40.0 MiB"), ("SDGP", 100.0, "50.0 MiB")]
    # The first layer's input needs no gradient; the other two are drawn together.
    model = torch.nn.Sequential(*(torch.nn.Linear(256, 256) for _ in range(3)))
    prediction = plan(model, torch.empty(64, 256)).to_dict()
    seconds = [sum(prediction["layers"][index]["backward"] for index in group) for group in prediction["groups"]]
    assert len(seconds) == 2
    rows = html_report._predicted_rows(prediction)
    assert [dict(row.bars)["dense"] for row in rows] == pytest.approx([100 * s / max(seconds) for s in seconds])


def test_says_what_is_measured_and_what_predicted() -> None:
    page = render(measured_report(FASTER).to_dict())
    assert 'class="verdict faster"' in page
    assert "SDGP: 0.800 × this" in page
    assert "Layer by layer, measured against the roofline" in page
    assert "50% saved, " in page  # every layer: 0.1 of 0.2 s
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
