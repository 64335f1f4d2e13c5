"""The summary in the README, and speed.md beside the files."""

from __future__ import annotations

from pathlib import Path

from bench.tables.checks import CHECKS
from bench.tables.layers import LAYERS
from bench.tables.learning import CONVERGENCE
from bench.tables.products import GEMM
from bench.tables.pruning import PRUNE
from bench.tables.sections import NOT_MEASURED, files, gpu_name, render, table
from bench.tables.steps import STEP_TIME

SPEED = {
    "One layer's backward, prune + compress and both products included (`python -m bench.layers`)": LAYERS,
    "Sparse products alone, bf16 with float32 sums (`python -m bench.gemm`)": GEMM,
    "Prune + compress alone, both operands in one pass (`python -m bench.kernels`)": PRUNE,
}


def speed(results: Path) -> str:
    """The page with every measurement of layers, products and prune + compress."""
    parts = ["# Speed: every measurement", "Built by `python -m bench.report` from the files named below the tables."]
    for title, section in SPEED.items():
        parts += [f"## {title}", render(section, results)]
    return "\n\n".join(parts) + "\n"


def summary(results: Path) -> str:
    """One row per question: what its result files come down to, and on which machines; each where there are several."""
    rows = []
    for section in (CONVERGENCE, STEP_TIME, LAYERS, GEMM, PRUNE, CHECKS):
        found = [result for _, result in files(section, results)]
        gpus = dict.fromkeys(gpu_name(result) for result in found)
        claims = [
            f"{claim} ({gpu_name(result)})" if len(gpus) > 1 else claim
            for result in found
            for claim in section.claims(result)
        ]
        rows.append([section.question, "<br>".join(claims) or NOT_MEASURED, ", ".join(filter(None, gpus))])
    return "\n".join(table(("", "measured", "on"), rows))
