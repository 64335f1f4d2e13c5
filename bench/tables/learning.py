"""Does it learn? From bench/convergence.py, whose own tables are in convergence_2_4.md."""

from __future__ import annotations

from pathlib import Path

from bench.tables.sections import NOT_MEASURED, Result, Section


def convergence(results: Path) -> str:
    """The tables that bench/convergence.py wrote."""
    path = results / "convergence_2_4.md"
    if not path.exists():
        return f"{NOT_MEASURED.capitalize()}."
    folded = ("<details><summary>All functions and passes, 2:4</summary>", path.read_text().strip(), "</details>")
    return "\n\n".join(folded)


def convergence_claims(result: Result) -> list[str]:
    claims = []
    for task in result["tasks"].values():
        cells = {cell["cell"]: cell for cell in task["cells"]}
        dense, pruned = cells.get("dense"), cells.get("mvue 2:4 both")
        if dense and pruned:
            digits = 3 if task["score"] == "loss" else 2
            claims.append(f"{task['title']}: {pruned['delta']:+.{digits}f} (dense {dense['mean']:.{digits}f})")
    return claims


CONVERGENCE = Section(
    "final validation loss (digits: accuracy) with the default, `mvue` 2:4 on both passes, minus dense",
    lambda result: isinstance(result, dict) and "tasks" in result and "environments" in result,
    (),
    lambda result: (),
    convergence_claims,
)
