"""What `validate` found, as data and as a table."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from sdgp_accel.report import SwapReport, as_text

SCHEMA = 1
BIAS_STANDARD_ERRORS = 6.0


@dataclass(frozen=True)
class Bias:
    """How far the mean of repeated draws of a pruned gradient lies from the dense one, along the dense one.

    value: mean of <g_r, g> / <g, g> - 1 over the draws g_r; standard_error: an upper bound of that mean's.
    """

    value: float
    standard_error: float
    draws: int

    @property
    def within_noise(self) -> bool:
        """True where an unbiased estimate explains the value."""
        return abs(self.value) <= BIAS_STANDARD_ERRORS * self.standard_error + 1e-3


@dataclass(frozen=True)
class PassCheck:
    """One pass of one call of one layer.

    prune: what the pass consumes, e.g. ``mvue 2:4`` or ``dense``. terms: products summed for one value.
    error: Frobenius norm of the difference between the backend's result and float64 dense ops on the same pruned
    gradient, over the norm of the latter; tolerance: the most that rounding explains. cosine, norm_ratio: of the
    pruned gradient's result against the true dense one. bias: for ``mvue`` only. end_to_end_cosine: wgrad only,
    of the weight's gradient in a whole pruned backward pass against the dense one.
    """

    layer: str
    pass_name: str
    prune: str
    backend: str
    dtype: str
    terms: int
    error: float
    tolerance: float
    cosine: float
    norm_ratio: float
    bias: Bias | None = None
    end_to_end_cosine: float | None = None

    @property
    def ok(self) -> bool:
        """True where the error is within the tolerance and the bias within its noise; False for NaN."""
        return not self.problem

    @property
    def problem(self) -> str:
        """What is wrong, with the numbers that say so; empty where nothing is."""
        if not self.error <= self.tolerance:  # NaN too
            return f"error {self.error:.2e}, allowed {self.tolerance:.2e}"
        if self.bias is not None and not self.bias.within_noise:
            bias, noise = 100 * self.bias.value, 100 * self.bias.standard_error
            return f"bias {bias:+.2f} % in {self.bias.draws} draws, with a standard error of {noise:.2f} %"
        return ""


@dataclass(frozen=True)
class ValidationReport:
    """Every checked pass, in the order in which the backward pass met them, and what was not swapped."""

    checks: tuple[PassCheck, ...]
    swap: SwapReport

    @property
    def ok(self) -> bool:
        """True where every check is."""
        return all(check.ok for check in self.checks)

    @property
    def failures(self) -> tuple[PassCheck, ...]:
        """The checks that failed."""
        return tuple(check for check in self.checks if not check.ok)

    def to_dict(self) -> dict[str, Any]:
        """Plain types only, for JSON, which has no NaN and no inf: None stands for them."""
        return {
            "schema": SCHEMA,
            "ok": self.ok,
            "checks": [{**_finite(asdict(check)), "ok": check.ok} for check in self.checks],
            "swap": self.swap.to_dict(),
        }

    def table(self) -> Table:
        """The checks as a rich table; what is the same for all of them stands in its title."""
        table = Table(title=self._title(), box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), caption_justify="left")
        table.add_column("layer", overflow="fold")
        table.add_column("pass")
        for column in ("error", "allowed", "cosine", "norm", "bias", "in all"):
            table.add_column(column, justify="right", no_wrap=True)
        table.add_column("", no_wrap=True)
        for check in self.checks:
            bias, overall = check.bias, check.end_to_end_cosine
            table.add_row(
                check.layer,
                check.pass_name,
                f"{check.error:.1e}",
                f"{check.tolerance:.1e}",
                f"{check.cosine:.4f}",
                f"{check.norm_ratio:.3f}",
                "" if bias is None else f"{100 * bias.value:+.1f}±{100 * bias.standard_error:.1f}%",
                "" if overall is None else f"{overall:.4f}",
                Text("ok", "green") if check.ok else Text("FAILED", "bold red"),
            )
        table.caption = (
            "error, allowed: relative, against float64 on the same pruned gradient\n"
            "cosine, norm:   of the layer's gradient against the dense one, for one dY\n"
            "bias:           of the mean of repeated draws, along the dense gradient\n"
            "in all:         cosine of the weight's gradient when every layer prunes"
        )
        return table

    def _title(self) -> str:
        shared = {
            name: {getattr(check, field) for check in self.checks}
            for name, field in (("", "prune"), ("by ", "backend"), ("in ", "dtype"))
        }
        common = " ".join(name + " or ".join(sorted(values)) for name, values in shared.items() if values)
        return f"{len(self.checks)} passes checked, {len(self.failures)} failed: {common}".rstrip(": ")

    def __rich__(self) -> Table:
        return self.table()

    def __str__(self) -> str:
        return as_text(self.table())


def _finite(value: Any) -> Any:
    """`value`, with None for what is NaN or inf in it."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
