"""Markdown tables from the result files under bench/results/: what the README shows of them.

Files are told apart by what they hold. Each table names the file it came from, the machine and the versions; a
benchmark without a file is "not measured yet".
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

NOT_MEASURED = "Not measured yet."
LONG = 14  # table lines from which on a table is folded
PEERS = {"dense cuBLAS": "cublas", "cuSPARSELt": "cslt"}
Result = Any  # a result file's JSON


def layers(results: Path) -> str:
    """One layer's backward, from bench/layers.py."""

    def is_layers(result: Result) -> bool:
        return isinstance(result, dict) and result.get("benchmark") == "layers"

    def row(row: dict[str, Any]) -> list[str]:
        name = [row["layer"], shape(row["geometry"]), f"`{row['prune']}`"]
        if "unsupported" in row:
            return [*name, "", "", "", "", "", f"dense: {row['unsupported']}"]
        ms = row["milliseconds"]
        passes = [name for name, pruned in zip(("dgrad", "wgrad"), row["auto_prunes"], strict=True) if pruned]
        auto = f"{' + '.join(passes)} sparse, {times(row['auto_speedup'])}" if passes else "dense"
        return [
            *name,
            microseconds(1e3 * (ms["dense_dgrad"] + ms["dense_wgrad"])),
            microseconds(1e3 * ms["compress_both"]),
            times(ms["dense_dgrad"] / ms["sparse_dgrad"]),
            times(ms["dense_wgrad"] / ms["sparse_wgrad"]),
            f"**{times(row['backward_speedup'])}**",
            auto,
        ]

    columns = (
        "layer", "in → out, positions", "prune", "dense, µs", "prune + compress, µs", "dgrad", "wgrad",
        "whole backward", 'what `backend="auto"` runs',
    )  # fmt: skip

    def summary(result: Result) -> list[str]:
        lines = []
        for function in dict.fromkeys(row["prune"] for row in result["rows"]):
            rows = [row for row in result["rows"] if row["prune"] == function and "unsupported" not in row]
            if rows:
                sparse, auto = (spread(row[key] for row in rows) for key in ("backward_speedup", "auto_speedup"))
                used = sum(any(row["auto_prunes"]) for row in rows)
                lines.append(
                    f"`{function}`: the whole backward, compression included, runs at {sparse} the speed of dense over "
                    f"{len(rows)} layers; `auto` prunes {used} of them and runs at {auto}."
                )
        return lines

    return section(results, is_layers, columns, lambda result: map(row, result["rows"]), summary)


def gemm(results: Path) -> str:
    """The sparse products by themselves against their peers."""

    def is_gemm(result: Result) -> bool:
        return isinstance(result, dict) and bool(result.get("results")) and "pas" in result["results"][0]

    def row(row: dict[str, Any]) -> list[str]:
        us = medians(row["us"])
        ours = us["ours"]
        cutlass = [value for name, value in us.items() if name.startswith("peer_")]
        return [
            f"{row['layer']}, {row['T']} positions",
            row["pas"],
            f"{row['m']} × {row['n']} × {row['k']}",
            microseconds(ours),
            f"{2e-6 * row['m'] * row['n'] * row['k'] / ours:.0f}",
            times(us["cublas"] / ours) if "cublas" in us else "—",
            times(us["cslt"] / ours) if "cslt" in us else "—",
            times(min(cutlass) / ours) if cutlass else "—",
        ]

    columns = (
        "layer", "pass", "m × n × k", "ours, µs", "dense-equivalent TFLOP/s", "over cuBLAS (dense)", "over cuSPARSELt",
        "over CUTLASS's sparse collective",
    )  # fmt: skip

    def summary(result: Result) -> list[str]:
        lines = []
        for name in ("dgrad", "wgrad"):
            rows = [medians(row["us"]) for row in result["results"] if row["pas"] == name]
            peers = [(peer, [us[key] / us["ours"] for us in rows if key in us]) for peer, key in PEERS.items()]
            claims = [f"{spread(ratios)} {peer}" for peer, ratios in peers if ratios]
            if claims:
                lines.append(f"{name}: {', '.join(claims)} over {len(rows)} shapes.")
        return lines

    return section(results, is_gemm, columns, lambda result: map(row, result["results"]), summary)


def prune(results: Path) -> str:
    """Prune and compress along both axes, in units of a copy of the same tensor, from bench/kernels.py."""

    def is_prune(result: Result) -> bool:
        return isinstance(result, dict) and result.get("benchmark") == "kernels" and "rows" in result

    def both(result: Result) -> list[dict[str, Any]]:
        """The rows that write both operands and nothing else."""
        return [row for row in result["rows"] if row["needs"] == {"dgrad": True, "wgrad": True, "bias": False}]

    def row(row: dict[str, Any]) -> list[str]:
        tiles = row.get("torch_tiles")
        return [
            row["case"],
            f"{row['t']} × {row['c']} {row['dtype']}",
            row["rule"],
            microseconds(row["microseconds"]["kernel"]["median"]),
            f"**{times(row['clones'])}**",
            times(tiles) if tiles else "—",
        ]

    columns = (
        "layer", "gradient", "rule", "µs", "over `clone()`", "over `torch._sparse_semi_structured_tile`",
    )  # fmt: skip

    def summary(result: Result) -> list[str]:
        ratios: dict[str, list[float]] = {}
        for row in both(result):
            ratios.setdefault(row["rule"], []).append(row["clones"])
        costs = [f"{rule} {spread(values)}" for rule, values in ratios.items()]
        return [f"Time over that of `clone()` of the gradient: {', '.join(costs)}."]

    return section(results, is_prune, columns, lambda result: map(row, both(result)), summary)


def step_time(results: Path) -> str:
    """Whole training steps, from bench/step_time.py. Emulations are not savings and stay out."""

    def is_step(result: Result) -> bool:
        return isinstance(result, dict) and "contenders" in result and result.get("kind") != "emulated"

    def row(result: dict[str, Any]) -> list[list[str]]:
        ms = {contender["name"]: 1e3 * contender["step"]["median"] for contender in result["contenders"]}
        sdgp = next(contender for contender in result["contenders"] if contender["sdgp"])
        dense = [name for contender in result["contenders"] if not contender["sdgp"] for name in [contender["name"]]]
        ratios = result["sdgp_over_dense"]
        saved = min((1 - ratios[name]["median"] for name in dense if name in ratios), default=None)
        settings = result["settings"]["config"]
        return [
            [
                f"{result['model']}, batch {result['batch']}",
                f"`{settings['prune']}`" if isinstance(settings["prune"], str) else str(settings["prune"]),
                "; ".join(f"{name} {ms[name]:.2f}" for name in dense),
                f"{ms[sdgp['name']]:.2f}",
                "—" if saved is None else f"**{100 * saved:+.1f} %**",
            ]
        ]

    columns = ("model", "prune", "dense step, ms", "SDGP step, ms", "saved over the fastest dense")
    return section(results, is_step, columns, row)


def section(
    results: Path,
    accepts: Callable[[Result], bool],
    columns: Sequence[str],
    rows: Callable[[Result], Iterable[Sequence[str]]],
    summary: Callable[[Result], list[str]] = lambda result: [],
) -> str:
    """For each file that `accepts` takes: its summary, where it comes from, and its table, folded where it is long."""
    texts = []
    for path in sorted(results.glob("*.json")):
        result = json.loads(path.read_text())
        if not accepts(result):
            continue
        head = [f"| {' | '.join(columns)} |", f"| {' | '.join(['---'] * len(columns))} |"]
        table = [*head, *(f"| {' | '.join(row)} |" for row in rows(result))]
        if len(table) > LONG:
            table = ["<details><summary>All measurements</summary>", "", *table, "", "</details>"]
        source = f"From [{path.name}](bench/results/{path.name}): {machine(result)}."
        texts.append("\n".join([*(f"- {line}" for line in summary(result)), "", *table, "", source]).strip())
    return "\n\n".join(texts) or NOT_MEASURED


def spread(ratios: Iterable[float]) -> str:
    """Median and range of speed ratios."""
    values = sorted(ratios)
    return f"{times(statistics.median(values))} ({values[0]:.2f} to {values[-1]:.2f})"


def machine(result: Result) -> str:
    """GPU, driver, clocks and versions, as far as the file records them."""
    if not isinstance(result, dict):
        return "machine not recorded in the file"
    if "meta" in result:
        meta = result["meta"]
        known = [meta.get("smi") or meta.get("gpu")]
        known += [f"{name} {meta[name]}" for name in ("torch", "cuda", "cusparselt") if name in meta]
        return ", ".join(filter(None, known))
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
    return ", ".join(filter(None, known)) or "machine not recorded in the file"


def shape(geometry: dict[str, Any]) -> str:
    """A layer's geometry in words."""
    if "kernel" not in geometry:
        return f"{geometry['in_channels']} → {geometry['out_channels']}, {geometry['tokens']}"
    height, width = geometry["kernel"]
    stride = "" if set(geometry["stride"]) == {1} else f" /{geometry['stride'][0]}"
    positions = f"{geometry['batch']}×{geometry['out_height']}×{geometry['out_width']}"
    return f"{geometry['in_channels']} → {geometry['out_channels']} {height}×{width}{stride}, {positions}"


def medians(samples: dict[str, list[float]]) -> dict[str, float]:
    return {name: statistics.median(values) for name, values in samples.items()}


def microseconds(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}"


def times(ratio: float) -> str:
    return f"{ratio:.2f} ×"
