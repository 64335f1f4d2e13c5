"""What `benchmark` found: as a table, as JSON and (with `html_report`) as a page to look at."""

from __future__ import annotations

import io
import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console, ConsoleOptions, RenderResult
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from sdgp_accel.plan import PlanReport
from sdgp_accel.report import SwapReport
from sdgp_accel.roofline import GPU
from sdgp_accel.timing import Stats

SCHEMA = 1

# Parts of a step in the order in which they happen, with what to call them.
PARTS = {
    "forward": "forward",
    "prune_compress": "prune + compress",
    "dgrad": "dgrad",
    "wgrad": "wgrad",
    "dense_layers": "dense dgrad + wgrad",
    "other_backward": "other backward",
    "backward": "backward, not split",
    "optimizer": "optimizer",
}

_COLOURS = {"faster": "green", "slower": "red", "even": "yellow", "emulated": "yellow", "unpruned": "yellow"}


@dataclass(frozen=True)
class ContenderResult:
    """One contender's step in seconds and bytes.

    stages, layers: seconds of the backward's stages and of each layer's dgrad and wgrad with all that belongs to them,
    from shares measured in steps of their own. samples: every counted step, in the order in which they ran; those of
    two contenders at the same index ran in the same round. peak_bytes: the step's highest allocation beyond what was
    there when it began. loss: of the last step.
    """

    name: str
    sdgp: bool
    compiled: bool
    step: Stats
    forward: Stats
    backward: Stats
    optimizer: Stats
    stages: dict[str, float]
    layers: dict[str, float]
    peak_bytes: int
    loss: float
    samples: tuple[float, ...]

    @property
    def parts(self) -> dict[str, float]:
        """Median seconds of each of `PARTS` that this step has; what no stage accounts for is "other_backward"."""
        known = {"forward": self.forward.median, **self.stages, "optimizer": self.optimizer.median}
        rest = max(0.0, self.backward.median - sum(self.stages.values()))
        known["other_backward" if self.stages else "backward"] = rest
        return {part: known[part] for part in PARTS if part in known}

    def to_dict(self) -> dict[str, Any]:
        """Plain types only, for JSON."""
        loss = self.loss if math.isfinite(self.loss) else None  # JSON has no NaN
        return {**asdict(self), "samples": list(self.samples), "parts": self.parts, "loss": loss}


@dataclass(frozen=True)
class LayerGroup:
    """Layers of equal shape and the seconds of their backward, all of them together; sdgp: None where emulated."""

    names: tuple[str, ...]
    shape: str
    dense: float
    sdgp: float | None
    predicted_dense: float
    predicted_sdgp: float


@dataclass(frozen=True)
class BenchmarkReport:
    """A benchmark of one model. Printable by `rich` and `print`; saved by `save_json` and `save_html`.

    accelerated: whether any layer ran on sparse tensor cores. Where it is false, the SDGP times are those of an
    emulation, or of the dense backward where nothing was pruned, and no saving is stated anywhere. contenders: dense,
    SDGP, then both the other way, compiled or eager. prediction: None where shapes alone do not run the model;
    ``settings["unpredicted"]`` says why.
    """

    name: str
    batch: int
    accelerated: bool
    contenders: tuple[ContenderResult, ...]
    swap: SwapReport
    prediction: PlanReport | None
    settings: dict[str, Any]
    provenance: dict[str, Any]

    @property
    def sdgp(self) -> ContenderResult:
        """The first contender with SDGP layers: the one whose stages and layers are shown."""
        return next(contender for contender in self.contenders if contender.sdgp)

    @property
    def fastest_sdgp(self) -> ContenderResult:
        """The SDGP contender with the shortest median step: the one that is compared."""
        return min((c for c in self.contenders if c.sdgp), key=lambda contender: contender.step.median)

    @property
    def fastest_dense(self) -> ContenderResult:
        """The dense contender with the shortest median step."""
        return min((c for c in self.contenders if not c.sdgp), key=lambda contender: contender.step.median)

    def ratio(self, dense: ContenderResult) -> Stats:
        """The fastest SDGP step over that of `dense`, paired by round: below 1 where SDGP is faster."""
        return Stats.of([ours / theirs for ours, theirs in zip(self.fastest_sdgp.samples, dense.samples, strict=True)])

    @property
    def machine(self) -> str:
        """The GPU's or CPU's name."""
        gpu = self.provenance["gpu"]
        return str(gpu["name"] if gpu else self.provenance["cpu"]["name"])

    @property
    def outcome(self) -> str:
        """The fastest SDGP step is "faster" or "slower" than the fastest dense one, "even" where 1 lies in the middle
        half of the paired ratios; "emulated" or "unpruned" where nothing is accelerated."""
        if not self.accelerated:
            return "emulated" if "prune_compress" in self.sdgp.stages else "unpruned"
        ratio = self.ratio(self.fastest_dense)
        return "even" if ratio.low <= 1 <= ratio.high else "faster" if ratio.median < 1 else "slower"

    @property
    def verdict(self) -> str:
        """What the numbers say, in words."""
        if self.prediction is None:
            prediction = f"What a GPU could save is not predicted: {self.settings['unpredicted']}."
        else:
            prediction = f"What the {self.prediction.gpu.title} could save is predicted below."
        if self.outcome == "emulated":
            where = "a GPU that runs no layer sparse" if self.provenance["gpu"] else "a CPU"
            return (
                f"Nothing is accelerated here: this is {where} ({self.machine}), where gradients are pruned and then "
                "multiplied by the ordinary dense operations. The times are the cost of that emulation and say "
                f"nothing about savings. {prediction}"
            )
        if self.outcome == "unpruned":
            reason = next((layer.reason for layer in self.swap.swapped), "no layer was swapped")
            return (
                f"Nothing is pruned or accelerated here ({self.machine}): every layer runs the ordinary dense "
                f"backward, because {reason}. The contenders compute the same, and what differs is noise. {prediction}"
            )
        ratio, ours, dense = self.ratio(self.fastest_dense), self.fastest_sdgp.name, self.fastest_dense.name
        measured = (
            f"{1 - ratio.median:+.1%} saved per step, {1 - ratio.high:+.1%} to {1 - ratio.low:+.1%} in the middle half "
            f"of the paired steps, measured on {self.machine}."
        )
        claims = {
            "faster": f"The {ours} step is faster than {dense}: ",
            "slower": f"The {ours} step is slower than {dense}: ",
            "even": f"{ours} and {dense} take equally long as far as these steps can tell: ",
        }
        return claims[self.outcome] + measured

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON-ready values; times in seconds."""
        ratios = {c.name: asdict(self.ratio(c)) for c in self.contenders if not c.sdgp} if self.accelerated else {}
        return {
            "schema": SCHEMA,
            "kind": "measurement" if self.accelerated else self.outcome,
            "model": self.name,
            "batch": self.batch,
            "machine": self.machine,
            "outcome": self.outcome,
            "verdict": self.verdict,
            "contenders": [contender.to_dict() for contender in self.contenders],
            "fastest_sdgp": self.fastest_sdgp.name,
            "sdgp_over_dense": ratios,
            "swap": self.swap.to_dict(),
            "prediction": None if self.prediction is None else self.prediction.to_dict(),
            "layers": [asdict(group) for group in self.layers],
            "settings": self.settings,
            "provenance": self.provenance,
        }

    @property
    def layers(self) -> list[LayerGroup]:
        """Measured and predicted backward of equal layers; empty on a CPU, where compilation hides the layers and where
        nothing is predicted."""
        if self.provenance["gpu"] is None or self.prediction is None:
            return []
        dense, ours = self.contenders[0].layers, self.sdgp.layers
        found = []
        for group in self.prediction.groups():
            names = list(dict.fromkeys(layer.name for layer in group))
            if all(name in dense and name in ours for name in names):
                found.append(
                    LayerGroup(
                        names=tuple(names),
                        shape=group[0].shape,
                        dense=sum(dense[name] for name in names),
                        sdgp=sum(ours[name] for name in names) if self.accelerated else None,
                        predicted_dense=sum(layer.backward for layer in group),
                        predicted_sdgp=sum(layer.two_pass.seconds for layer in group),
                    )
                )
        return found

    def save_json(self, path: str | Path) -> None:
        """Write `to_dict` to `path`."""
        Path(path).write_text(json.dumps(self.to_dict(), indent=1) + "\n")

    def save_html(self, path: str | Path) -> None:
        """Write a self-contained page to `path`. ModuleNotFoundError without the ``report`` extra."""
        from sdgp_accel.html_report import render  # needs jinja2, which only this needs

        Path(path).write_text(render(self.to_dict()))

    def __str__(self) -> str:
        text = io.StringIO()
        Console(file=text, width=140).print(self)
        return text.getvalue()

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield self._table()
        if self.layers and self.prediction is not None:
            yield self._layer_table(self.prediction.gpu)
        yield Panel(Text(self.verdict), border_style=_COLOURS[self.outcome], expand=False)
        if not self.accelerated and self.prediction is not None:
            yield self.prediction

    def _table(self) -> Table:
        left_out = [f"{name} left out: {reason}" for name, reason in self.settings.get("left_out", {}).items()]
        # Four contenders and their labels fit the 80 columns of a narrow terminal.
        table = Table(
            box=box.SIMPLE_HEAD,
            padding=(0, 1, 0, 0),
            title=f"{self.name}, batch {self.batch}: ms per step on {self.machine}",
            caption="\n".join([f"medians of {self.settings['steps']} steps, in turns", *left_out]),
        )
        table.add_column("", no_wrap=True)
        for contender in self.contenders:
            name = contender.name.replace(", ", ",\n")
            remark = f"\n({self.outcome})" if contender.sdgp and not self.accelerated else ""
            table.add_column(name + remark, justify="right", no_wrap=True)
        for part, title in PARTS.items():
            seconds = [contender.parts.get(part) for contender in self.contenders]
            if any(value is not None for value in seconds):
                table.add_row(title, *("" if value is None else _ms(value) for value in seconds))
        table.add_section()
        steps = [contender.step for contender in self.contenders]
        table.add_row("step", *(_ms(step.median) for step in steps), style="bold")
        table.add_row("middle half", *(f"{_ms(step.low)} …\n{_ms(step.high)}" for step in steps), style="dim")
        if self.accelerated:
            ratios = ["" if c.sdgp else f"{self.ratio(c).median:.3f}" for c in self.contenders]
            table.add_row(f"{self.fastest_sdgp.name} / this", *ratios)
        table.add_row("peak MiB in a step", *(f"{c.peak_bytes / 2**20:,.1f}" for c in self.contenders))
        return table

    def _layer_table(self, gpu: GPU) -> Table:
        table = Table(
            box=box.SIMPLE_HEAD,
            title="backward of the layers, compression included: ms per step",
            caption=f"roofline: predicted dense ms and two-pass saving on the {gpu.title}",
        )
        table.add_column("layer", overflow="fold", min_width=10)
        for header in ("T×K→C", "dense", "roofline", "SDGP", "saves", "roofline"):
            table.add_column(header, justify="right", no_wrap=True)
        for group in self.layers:
            name = group.names[0] if len(group.names) == 1 else f"{len(group.names)} × {group.names[0]}"
            ours = ("", "") if group.sdgp is None else (_ms(group.sdgp), f"{1 - group.sdgp / group.dense:.1%}")
            predicted = f"{1 - group.predicted_sdgp / group.predicted_dense:.1%}"
            table.add_row(name, group.shape, _ms(group.dense), _ms(group.predicted_dense), *ours, predicted)
        return table


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:,.3f}" if seconds < 0.1 else f"{seconds * 1e3:,.1f}"
