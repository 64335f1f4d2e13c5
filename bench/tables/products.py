"""The sparse products by themselves against their peers, from bench/gemm.py."""

from __future__ import annotations

import statistics

from bench.tables.sections import NOT_MEASURED, Result, Row, Section, microseconds, spread, times

PEERS = {"cublas": "cuBLAS (dense)", "cslt": "cuSPARSELt", "semi_structured": "`torch._sparse_semi_structured_mm`"}


def gemm_row(row: Row) -> list[str]:
    us = medians(row["us"])
    ours = us["ours"]
    missing = (NOT_MEASURED, "does not run")
    return [
        f"{row['layer']}, {row['T']} positions",
        row["pas"],
        f"{row['m']} × {row['n']} × {row['k']}",
        microseconds(ours),
        f"{2e-6 * row['m'] * row['n'] * row['k'] / ours:.0f}",
        *(times(us[peer] / ours) if peer in us else missing[peer in row.get("unavailable", ())] for peer in PEERS),
    ]


def gemm_claims(result: Result) -> list[str]:
    claims = []
    for name in ("dgrad", "wgrad"):
        rows = [medians(row["us"]) for row in result["results"] if row["pas"] == name]
        peers = [(peer, [us[key] / us["ours"] for us in rows if key in us]) for key, peer in PEERS.items()]
        over = [f"{spread(ratios)} {peer}" for peer, ratios in peers if ratios]
        if over:
            family = fallback(result)
            claims.append(f"{f'{family} fallback, ' if family else ''}{name}, {len(rows)} shapes: {', '.join(over)}")
    return claims


def fallback(result: Result) -> str | None:
    """The family of kernels measured, where it is not the one that this GPU takes."""
    return next((row["fallback"] for row in result["results"] if row.get("fallback")), None)


def gemm_notes(result: Result) -> list[str]:
    family = fallback(result)
    if family is None:
        return []
    return [f"These are the {family} kernels, the fallback for shapes that this GPU's own kernels cannot take."]


GEMM = Section(
    "sparse products alone: speed over",
    lambda result: isinstance(result, dict) and bool(result.get("results")) and "pas" in result["results"][0],
    (
        "layer", "pass", "m × n × k", "ours, µs", "dense-equivalent TFLOP/s",
        *(f"over {peer}" for peer in PEERS.values()),
    ),
    lambda result: map(gemm_row, result["results"]),
    gemm_claims,
    gemm_notes,
)  # fmt: skip


def medians(samples: dict[str, list[float]]) -> dict[str, float]:
    return {name: statistics.median(values) for name, values in samples.items()}
