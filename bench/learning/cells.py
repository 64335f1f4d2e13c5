"""The experiment matrix: one cell is one way to prune on one task; it is run with several seeds."""

from __future__ import annotations

from dataclasses import dataclass

from sdgp_accel.config import FUNCTIONS, PASSES, SDGPConfig

# The patterns of the SDGP paper's tables (arXiv:2202.00774), 2:4 apart.
OTHER_PATTERNS = ((1, 4), (1, 8), (2, 8), (4, 8), (2, 16), (4, 16), (8, 16), (4, 32), (8, 32), (16, 32))
PRUNED = (*PASSES, "both")


@dataclass(frozen=True)
class Cell:
    """`function` keeps `n` of `m` in the passes `pruned`; ``Cell("dense")`` is the baseline.

    With `dense_head` the last layer, whose gradient is softmax minus target, is left alone.
    """

    function: str
    pruned: str = ""
    n: int = 0
    m: int = 0
    dense_head: bool = False

    def config(self) -> SDGPConfig | None:
        """What `accelerate_` is given, or None for the baseline. The reference backend, for it runs everywhere."""
        if self.function == "dense":
            return None
        return SDGPConfig(
            prune=self.function,
            n=self.n,
            m=self.m,
            grad_input="dense" if self.pruned == "grad_weight" else "sparse",
            grad_weight="dense" if self.pruned == "grad_input" else "sparse",
            backend="reference",
        )

    def __str__(self) -> str:
        if self.function == "dense":
            return self.function
        return f"{self.function} {self.n}:{self.m} {self.pruned}{', dense head' if self.dense_head else ''}"


DENSE = Cell("dense")


def by_value(patterns: tuple[tuple[int, int], ...] = OTHER_PATTERNS) -> list[Cell]:
    """Every cell, the most telling first: dense, 2:4 in each choice of passes, 2:4 but for the head, other patterns."""
    functions = sorted(FUNCTIONS, key=("mvue", "rescale_magnitude", "magnitude", "random").index)
    two_four = [Cell(function, pruned, 2, 4) for pruned in ("both", *PASSES) for function in functions]
    dense_heads = [Cell(function, "both", 2, 4, dense_head=True) for function in functions]
    others = [
        Cell(function, pruned, n, m) for pruned in ("both", *PASSES) for function in functions for n, m in patterns
    ]
    return [DENSE, *two_four, *dense_heads, *others]
