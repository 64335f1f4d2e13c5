"""What `accelerate_` did to each layer, and why, as data and as a table."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table


@dataclass(frozen=True)
class LayerReport:
    """One layer with weights.

    name: its (first) name in the model; aliases: further names of the same module.
    kind: its class before the swap; shape: in words, e.g. ``64→128 3x3 /2``.
    swapped: True where its backward is SDGP's now.
    dgrad, wgrad: what that pass consumes, e.g. ``mvue 2:4`` or ``dense``.
    backend: ``"reference"``, ``"cutlass"`` or ``"dense"``.
    reason: why it was swapped or not, or why it has this backend.
    """

    name: str
    kind: str
    shape: str
    swapped: bool
    dgrad: str
    wgrad: str
    backend: str
    reason: str
    aliases: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain types only, for JSON."""
        return {**vars(self), "aliases": list(self.aliases)}


@dataclass(frozen=True)
class SwapReport:
    """Every layer with weights, in the model's order. Prints as a table; ``len`` counts the swapped ones."""

    layers: tuple[LayerReport, ...]

    @property
    def swapped(self) -> tuple[LayerReport, ...]:
        """The layers that are SDGP layers now."""
        return tuple(layer for layer in self.layers if layer.swapped)

    @property
    def skipped(self) -> tuple[LayerReport, ...]:
        """The layers that stay as they are."""
        return tuple(layer for layer in self.layers if not layer.swapped)

    def __len__(self) -> int:
        return len(self.swapped)

    def __bool__(self) -> bool:
        return True  # an empty report is still a report

    def __getitem__(self, name: str) -> LayerReport:
        """The layer called `name` (any of its names); KeyError for others."""
        for layer in self.layers:
            if name == layer.name or name in layer.aliases:
                return layer
        raise KeyError(name)

    def to_dict(self) -> dict[str, Any]:
        """Plain types only, for JSON."""
        return {
            "swapped": len(self.swapped),
            "skipped": len(self.skipped),
            "layers": [layer.to_dict() for layer in self.layers],
        }

    def table(self) -> Table:
        """The report as a rich table, its reasons numbered and listed below."""
        title = f"{len(self.swapped)} of {len(self.layers)} layers swapped"
        table = Table(title=title, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), caption_justify="left")
        table.add_column("layer", overflow="fold")
        for column in ("what", "dgrad, wgrad", "backend", "why"):
            table.add_column(column)
        numbers: dict[str, int] = {}
        for layer in self.layers:
            number = numbers.setdefault(layer.reason, len(numbers) + 1)
            passes = layer.dgrad if layer.dgrad == layer.wgrad else f"{layer.dgrad}, {layer.wgrad}"
            table.add_row(
                ", ".join((layer.name or "(the model)", *layer.aliases)),
                f"{layer.kind} {layer.shape}",
                passes if layer.swapped else "",
                layer.backend if layer.swapped else "",
                str(number),
                style=None if layer.swapped else "dim",
            )
        table.caption = "\n".join(f" {number}: {reason}" for reason, number in numbers.items())
        return table

    def __rich__(self) -> Table:
        return self.table()

    def __str__(self) -> str:
        console = Console(width=120, color_system=None)
        with console.capture() as capture:
            console.print(self.table())
        return capture.get()
