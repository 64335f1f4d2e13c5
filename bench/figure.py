"""One picture of the measured speeds under bench/results/: what `tables` says in numbers, for the README.

Its PNG carries a digest of the result files that it was drawn from, so that a check can tell whether it is of them.
"""

from __future__ import annotations

import hashlib
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.tables.layers import LAYERS
from bench.tables.products import GEMM, PEERS, fallback, medians
from bench.tables.pruning import PRUNE, both_operands
from bench.tables.sections import NOT_MEASURED, Result, files, gpu_name
from bench.tables.steps import CONTENDERS, STEP_TIME
from sdgp_accel.tuning import BackwardTimes

SECTIONS = (STEP_TIME, LAYERS, GEMM, PRUNE)
COLORS = {"mvue": "C0", "rescale_magnitude": "C1"}
DIGEST = "Source"  # the PNG's text field


def digest(results: Path) -> str:
    """Of all the result files that the picture shows."""
    total = hashlib.sha256()
    for section in SECTIONS:
        for path, _ in files(section, results):
            total.update(path.name.encode() + b"\0" + path.read_bytes())
    return total.hexdigest()


def is_current(path: Path, results: Path) -> bool:
    """Whether the picture at `path` was drawn from what is in `results` now."""
    from PIL import Image

    if not path.exists():
        return False
    with Image.open(path) as image:
        return image.info.get(DIGEST) == digest(results)


def draw(results: Path, path: Path) -> None:
    """Whole steps and prune + compress on the left, layers in the middle, products on the right."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure = pyplot.figure(figsize=(17, 10.5), layout="constrained")
    grid = figure.add_gridspec(2, 3, width_ratios=(1, 1.15, 1.15))
    panels = ((steps, grid[0, 0]), (layers, grid[:, 1]), (products, grid[:, 2]), (prune, grid[1, 0]))
    for (draw_panel, place), section in zip(panels, SECTIONS, strict=True):
        draw_panel(figure.add_subplot(place), [result for _, result in files(section, results)])
    figure.savefig(path, dpi=100, metadata={DIGEST: digest(results)})
    pyplot.close(figure)


def steps(axis: Any, results: Sequence[Result]) -> None:
    """Bars: each contender's step over the fastest dense one."""
    axis.set_title("Whole training step over the fastest dense one (shorter is better)", fontsize="medium")
    styles = dict(zip(CONTENDERS, ("silver", "grey", "lightskyblue", "C0"), strict=True))
    results = results[::-1]  # the first on top
    for row, result in enumerate(results):
        times = {contender["name"]: contender["step"]["median"] for contender in result["contenders"]}
        dense = min(c["step"]["median"] for c in result["contenders"] if not c["sdgp"])
        shown = [name for name in styles if name in times]
        for place, name in enumerate(shown):
            position = row - (place - (len(shown) - 1) / 2) / 5
            label = name if row == 0 else None
            axis.barh(position, times[name] / dense, height=0.18, color=styles[name], label=label)
    labels = [f"{result['model']}\nbatch {result['batch']}\n{short(result)}" for result in results]
    rows(axis, labels)
    axis.set_xlim(right=1.95)  # beside the bars, the legend
    if results:
        axis.legend(loc="upper right", fontsize="small")


def prune(axis: Any, results: Sequence[Result]) -> None:
    """Dots: prune + compress of one gradient over a copy of it, by rule."""
    axis.set_title(f"Prune + compress, both operands, over clone() ({gpus(results)})", fontsize="medium")
    found: dict[str, list[float]] = {}
    for result in results:
        for row in both_operands(result):
            found.setdefault(row["rule"], []).append(row["clones"])
    for row, ratios in enumerate(found.values()):
        axis.plot(ratios, [row] * len(ratios), "o", color="C0", alpha=0.6)
    rows(axis, list(found))


def layers(axis: Any, results: Sequence[Result]) -> None:
    """Dots: dense backward over sparse backward, with each prune function, and of the products alone."""
    axis.set_title(f"One layer's backward: speed over dense ({gpus(results)})", fontsize="medium")
    speedups: dict[str, dict[str, float]] = {}
    alone: dict[str, list[float]] = {}
    for result in results:
        for row in result["rows"]:
            if "unsupported" not in row:
                ms = BackwardTimes(**row["milliseconds"])
                speedups.setdefault(row["layer"], {})[row["prune"]] = row["backward_speedup"]
                alone.setdefault(row["layer"], []).append(ms.dense / (ms.sparse_dgrad + ms.sparse_wgrad))
    order = sorted(speedups, key=lambda layer: max(speedups[layer].values()))
    axis.axvspan(0, 1, color="gainsboro", alpha=0.5, zorder=0, label="slower than dense: not what auto takes")
    both = [statistics.median(alone[layer]) for layer in order]
    axis.plot(both, range(len(order)), "|", color="grey", markersize=9, label="products alone")
    for function, color in COLORS.items():
        points = [(speedups[layer][function], row) for row, layer in enumerate(order) if function in speedups[layer]]
        if points:
            axis.plot(*zip(*points, strict=True), "o", color=color, label=f"{function}, prune + compress included")
    rows(axis, order)
    axis.set_xlim(left=0.25)
    legend_below(axis)


def products(axis: Any, results: Sequence[Result]) -> None:
    """Dots: peers' times over ours, where those are the GPU's own kernels."""
    results = [result for result in results if fallback(result) is None]
    axis.set_title(f"Sparse products alone: speed over peers ({gpus(results)})", fontsize="medium")
    found = [row for result in results for row in result["results"]]
    order = list(dict.fromkeys(row["layer"] for row in found))[::-1]
    for peer, color in (("cublas", "C2"), ("cslt", "C3")):
        for name, marker in (("dgrad", "o"), ("wgrad", "s")):
            points = []
            for row in found:
                us = medians(row["us"])
                if row["pas"] == name and peer in us:
                    points.append((us[peer] / us["ours"], order.index(row["layer"])))
            if points:
                label = f"{name}, over {PEERS[peer]}"
                axis.plot(*zip(*points, strict=True), marker, color=color, alpha=0.7, markersize=5, label=label)
    rows(axis, order)
    legend_below(axis)


def rows(axis: Any, labels: Sequence[str]) -> None:
    """Names on the left, a line where nothing is gained or lost."""
    axis.set_yticks(range(len(labels)), labels, fontsize="small")
    axis.axvline(1, color="black", linewidth=0.8)
    axis.grid(axis="x", alpha=0.3)
    axis.margins(y=0.02)
    if not labels:
        axis.text(0.5, 0.5, NOT_MEASURED, ha="center", transform=axis.transAxes)


def legend_below(axis: Any) -> None:
    if axis.get_legend_handles_labels()[0]:
        axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.03), ncols=2, fontsize="small")


def gpus(results: Sequence[Result]) -> str:
    """Those that `results` were measured on."""
    return ", ".join(dict.fromkeys(map(short, results)))


def short(result: Result) -> str:
    """The GPU's name without maker and memory."""
    return " ".join(gpu_name(result).removeprefix("NVIDIA ").split()[:1])
