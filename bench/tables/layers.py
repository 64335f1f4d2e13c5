"""One layer's backward, from bench/layers.py."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from bench.prediction import geometry_of, gpu_of, predict
from bench.tables.sections import Result, Row, Section, microseconds, spread, times
from sdgp_accel.roofline import GPU, Work
from sdgp_accel.tuning import BackwardTimes


def layer_rows(result: Result) -> Iterable[list[str]]:
    gpu = gpu_of(result.get("provenance") or {})
    return [layer_row(row, gpu) for row in result["rows"]]


def layer_row(row: Row, gpu: GPU | None) -> list[str]:
    work = Work.of(geometry_of(row["geometry"]))
    size = f"{work.flops * 1e-9:.1f}, {1e-6 * (work.gradient_bytes + work.other_bytes):.0f}"
    name = [row["layer"], shape(row["geometry"]), size, f"`{row['prune']}`"]
    if "unsupported" in row:
        return [*name, *[""] * 10, f"dense: {row['unsupported']}"]
    ms = BackwardTimes(**row["milliseconds"])
    predicted = None if gpu is None else predict(row, gpu)
    passes = [name for name, pruned in zip(("dgrad", "wgrad"), row["auto_prunes"], strict=True) if pruned]
    auto = f"{' + '.join(passes)} sparse, {times(row['auto_speedup'])}" if passes else "dense"
    return [
        *name,
        microseconds(1e3 * ms.dense),
        f"{2e-9 * work.flops / ms.dense:.0f}",
        f"{microseconds(1e3 * predicted.dense)}" if predicted else "—",
        microseconds(1e3 * ms.compress_both),
        microseconds(1e3 * predicted.compress_both) if predicted else "—",
        times(ms.dense_dgrad / ms.sparse_dgrad),
        times(ms.dense_wgrad / ms.sparse_wgrad),
        times(predicted.dense_dgrad / predicted.sparse_dgrad) if predicted else "—",
        f"**{times(row['backward_speedup'])}**",
        times(predicted.dense / predicted.totals()[True, True]) if predicted else "—",
        auto,
    ]


def layer_notes(result: Result) -> list[str]:
    """How far the predictions are off."""
    gpu = gpu_of(result.get("provenance") or {})
    rows = [row for row in result["rows"] if "unsupported" not in row]
    if gpu is None or not rows:
        return []
    ratios: dict[str, list[float]] = {"dense": [], "prune + compress": [], "products": [], "whole backward": []}
    for row in rows:
        ms, predicted = BackwardTimes(**row["milliseconds"]), predict(row, gpu)
        ratios["dense"].append(predicted.dense / ms.dense)
        ratios["prune + compress"].append(predicted.compress_both / ms.compress_both)
        products = [part.sparse_dgrad + part.sparse_wgrad for part in (predicted, ms)]
        ratios["products"].append(products[0] / products[1])
        ratios["whole backward"].append(predicted.totals()[True, True] / ms.totals()[True, True])
    off = "; ".join(f"{part} {spread(values)}" for part, values in ratios.items())
    return [f"Predicted columns: the roofline {gpu.title} (`sdgp plan`). Predicted over measured time: {off}."]


def layer_claims(result: Result) -> list[str]:
    claims = []
    for function in dict.fromkeys(row["prune"] for row in result["rows"]):
        rows = [row for row in result["rows"] if row["prune"] == function and "unsupported" not in row]
        if rows:
            sparse, auto = (spread(row[key] for row in rows) for key in ("backward_speedup", "auto_speedup"))
            used = sum(any(row["auto_prunes"]) for row in rows)
            alone = [weight_gradient_alone(row) for row in rows]
            only = f"; with the weight gradient alone pruned {spread(filter(None, alone))}" if any(alone) else ""
            claims.append(f"`{function}`: {sparse}; `auto` prunes {used} of {len(rows)} layers: {auto}{only}")
    return claims


def weight_gradient_alone(row: Row) -> float | None:
    """The whole backward's speed over dense with dgrad dense, from the times of its parts."""
    ms = BackwardTimes(**row["milliseconds"])
    total = ms.totals().get((False, True))
    return None if total is None else ms.dense / total


LAYERS = Section(
    "one layer's backward, compression included: speed over dense",
    lambda result: isinstance(result, dict) and result.get("benchmark") == "layers",
    (
        "layer", "in → out, positions", "GFLOP, MB per dense pass", "prune", "dense, µs", "TFLOP/s", "predicted, µs",
        "prune + compress, µs", "predicted, µs", "dgrad", "wgrad", "each, predicted", "whole backward", "predicted",
        'what `backend="auto"` runs',
    ),
    layer_rows,
    layer_claims,
    layer_notes,
)  # fmt: skip


def shape(geometry: dict[str, Any]) -> str:
    """A layer's geometry in words."""
    if "kernel" not in geometry:
        return f"{geometry['in_channels']} → {geometry['out_channels']}, {geometry['tokens']}"
    height, width = geometry["kernel"]
    stride = "" if set(geometry["stride"]) == {1} else f" /{geometry['stride'][0]}"
    positions = f"{geometry['batch']}×{geometry['out_height']}×{geometry['out_width']}"
    return f"{geometry['in_channels']} → {geometry['out_channels']} {height}×{width}{stride}, {positions}"
