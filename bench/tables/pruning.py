"""Prune and compress along both axes, in units of a copy of the same tensor, from bench/kernels.py."""

from __future__ import annotations

from bench.tables.sections import Result, Row, Section, microseconds, spread, times


def both_operands(result: Result) -> list[Row]:
    """The rows that write both operands and nothing else."""
    return [row for row in result["rows"] if row["needs"] == {"dgrad": True, "wgrad": True, "bias": False}]


def prune_row(row: Row) -> list[str]:
    tiles = row.get("torch_tiles")
    return [
        row["case"],
        f"{row['t']} × {row['c']} {row['dtype']}",
        row["rule"],
        microseconds(row["microseconds"]["kernel"]["median"]),
        f"**{times(row['clones'])}**",
        times(tiles) if tiles else "—",  # it prunes 2:4 by magnitude and nothing else
    ]


def prune_claims(result: Result) -> list[str]:
    ratios: dict[str, list[float]] = {}
    for row in both_operands(result):
        ratios.setdefault(row["rule"], []).append(row["clones"])
    return ["; ".join(f"{rule} {spread(values)}" for rule, values in ratios.items())]


PRUNE = Section(
    "prune + compress, both operands: time over `clone()` of the gradient",
    lambda result: isinstance(result, dict) and result.get("benchmark") == "kernels" and "rows" in result,
    ("layer", "gradient", "rule", "µs", "over `clone()`", "over `torch._sparse_semi_structured_tile`"),
    lambda result: map(prune_row, both_operands(result)),
    prune_claims,
)
