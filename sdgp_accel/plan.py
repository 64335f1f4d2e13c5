"""`plan`: what SDGP could save on a GPU you need not have, layer by layer, from shapes alone."""

from __future__ import annotations

import io
import json
from collections import Counter
from collections.abc import Callable, Container, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from rich import box
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text
from torch import Tensor, nn

from sdgp_accel import batch as batches
from sdgp_accel.backends.cutlass import takes_pattern
from sdgp_accel.config import SDGPConfig
from sdgp_accel.eligibility import Filter, check_model, checked_config, selector
from sdgp_accel.layer_plan import DEFAULT_SCOPE
from sdgp_accel.nn import SDGPLayer
from sdgp_accel.roofline import GPU, SCHEDULES, Choice, Schedule, Work, best_backward, dense_seconds, gpu_figures
from sdgp_accel.targets import takes_own
from sdgp_accel.trace import LayerCall, trace

Select = Callable[[nn.Module, str], bool]

NOTE = (
    "A roofline prediction, not a measurement. Shares are of the forward and backward time of the Linear and Conv2d "
    "layers; attention products, normalisation, activations, the optimizer and launch overheads are left out."
)
MEANINGS: dict[Schedule, str] = {
    "two_pass": "a pass over each gradient compresses it, as in this package",
    "fused": "a bound, reached by nothing here: what computes a gradient writes it compressed",
}


@dataclass(frozen=True)
class LayerPrediction:
    """One call of one layer: its GEMM, its dense times in seconds and the best backward under either schedule.

    dense_reason: why no pass of it can be sparse; empty where one can.
    """

    name: str
    kind: str
    work: Work
    forward: float
    backward: float
    two_pass: Choice
    fused: Choice
    dense_reason: str

    @property
    def shape(self) -> str:
        """The GEMM in one word, T×K→C."""
        return f"{self.work.positions}×{self.work.reduction}→{self.work.out_channels}"

    def choice(self, schedule: Schedule) -> Choice:
        """The best backward under `schedule`."""
        return self.two_pass if schedule == "two_pass" else self.fused

    def saved(self, schedule: Schedule) -> float:
        """Seconds saved per step."""
        return self.backward - self.choice(schedule).seconds


@dataclass(frozen=True)
class PlanReport:
    """The prediction for a whole model. Printable by `rich` and `print`; `to_dict` and `to_json` hold every layer.

    left_out: class -> number of the modules that hold weight matrices of their own and are not among the layers.
    """

    gpu: GPU
    batch: int
    layers: tuple[LayerPrediction, ...]
    left_out: Mapping[str, int]

    @property
    def dense(self) -> float:
        """Seconds of forward and backward of all layers, dense."""
        return sum(layer.forward + layer.backward for layer in self.layers)

    def sparse(self, schedule: Schedule) -> float:
        """The same with every layer's best backward under `schedule`."""
        return sum(layer.forward + layer.choice(schedule).seconds for layer in self.layers)

    def saving(self, schedule: Schedule) -> float:
        """Share of `dense` saved, 0 to 1."""
        return 1.0 - self.sparse(schedule) / self.dense if self.layers else 0.0

    def gaining(self, schedule: Schedule) -> tuple[str, ...]:
        """Names of the layers that would run at least one sparse pass."""
        return tuple(dict.fromkeys(layer.name for layer in self.layers if layer.choice(schedule).sparse_passes))

    @property
    def left_out_note(self) -> str:
        """What `left_out` does to the shares, in words; empty where nothing is left out."""
        if not self.left_out:
            return ""
        kinds = ", ".join(f"{count} × {kind}" for kind, count in self.left_out.items())
        return (
            f"Also left out, though they hold weight matrices of their own and may multiply by them: {kinds}. "
            "They are neither Linear nor Conv2d, or the forward does not call them."
        )

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON-ready values; times in seconds, savings as shares, schedules as in `MEANINGS`."""
        totals: dict[str, Any] = {
            schedule: {
                "seconds": self.sparse(schedule),
                "saving": self.saving(schedule),
                "gaining": list(self.gaining(schedule)),
            }
            for schedule in SCHEDULES
        }
        return {
            "kind": "prediction",
            "note": f"{NOTE} {self.left_out_note}".rstrip(),
            "gpu": {**asdict(self.gpu), "title": self.gpu.title},
            "batch": self.batch,
            "dense_seconds": self.dense,
            "left_out": dict(self.left_out),
            **totals,
            "layers": [asdict(layer) for layer in self.layers],
            "groups": [[self.layers.index(layer) for layer in group] for group in self.groups()],
        }

    def to_json(self) -> str:
        """`to_dict` as text."""
        return json.dumps(self.to_dict(), indent=1)

    def __str__(self) -> str:
        text = io.StringIO()
        Console(file=text, width=140).print(self)
        return text.getvalue()

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        unit, scale = ("ms", 1e3) if self.dense >= 1e-3 else ("µs", 1e6)
        yield self._table(unit, scale)
        layer_count = len({layer.name for layer in self.layers})
        for schedule in SCHEDULES:
            times = f"{_number(self.dense * scale)} → {_number(self.sparse(schedule) * scale)} {unit}"
            yield Text(
                f"{_title(schedule)}: {len(self.gaining(schedule))} of {layer_count} layers gain; forward + backward "
                f"{times}, {self.saving(schedule):.1%} less ({MEANINGS[schedule]})"
            )
        yield Text(NOTE, style="dim")
        if self.left_out:
            yield Text(self.left_out_note, style="yellow")

    def _table(self, unit: str, scale: float) -> Table:
        gpu = self.gpu
        table = Table(
            box=box.SIMPLE_HEAD,
            padding=(0, 1, 0, 0),
            title=f"Prediction for {gpu.title}, batch {self.batch}",
            caption=f"{gpu.tflops:g} TFLOP/s × {gpu.compute_efficiency:g}, {gpu.bandwidth:g} TB/s × "
            f"{gpu.memory_efficiency:g}, 2:4 speed-up {gpu.sparse_speedup:g}; "
            f"{'prune + compress at its measured cost; ' if gpu.compress_costs else ''}backward passes only",
        )
        table.add_column("layer", overflow="fold", min_width=10)
        headers = ["T×K→C", "bound\nby", f"dense\n{unit}"]
        for schedule in SCHEDULES:
            headers += [f"{_title(schedule)}\n{unit}", "\nsaves"]
        for header in headers:
            table.add_column(header, justify="right", no_wrap=True)
        for group in self.groups():
            first, calls, work = group[0], len(group), group[0].work
            name = first.name if calls == 1 else f"{calls} × {first.name}"
            cells = [f"{name} ({first.dense_reason})" if first.dense_reason else name]
            cells += [first.shape, _bound(work, gpu)]
            cells.append(_number(first.backward * calls * scale))
            for schedule in SCHEDULES:
                choice = first.choice(schedule)
                cells.append(_number(choice.seconds * calls * scale))
                cells.append(f"{first.saved(schedule) / first.backward:.1%}" if choice.sparse_passes else "–")
            table.add_row(*cells, style="" if first.fused.sparse_passes else "dim")
        table.add_section()
        total = [f"{len(self.layers)} calls", "", "", _number(self._backward * scale)]
        for schedule in SCHEDULES:
            backward = sum(layer.choice(schedule).seconds for layer in self.layers)
            total += [_number(backward * scale), f"{1.0 - backward / self._backward if self._backward else 0.0:.1%}"]
        table.add_row(*total, style="bold")
        return table

    @property
    def _backward(self) -> float:
        return sum(layer.backward for layer in self.layers)

    def groups(self) -> list[list[LayerPrediction]]:
        """Calls of the same kind and shape together, in the order of the first of each."""
        groups: dict[tuple[str, Work, str], list[LayerPrediction]] = {}
        for layer in self.layers:
            groups.setdefault((layer.kind, layer.work, layer.dense_reason), []).append(layer)
        return list(groups.values())


def plan(
    model: nn.Module,
    batch: Any,
    gpu: str | GPU = "a100",
    config: SDGPConfig | None = None,
    filter_fn: Filter = None,
    **figures: float | None,
) -> PlanReport:
    """Predict what SDGP would save in training `model` on `batch`, without the GPU and without computing anything.

    model: on any device, "meta" included; it is neither run on its own device nor changed.
    batch: what a DataLoader yields: a tensor, a mapping of keyword arguments, or (inputs, targets), on any device.
    gpu: a name of `roofline.GPUS` or a `roofline.GPU`.
    config: which passes are pruned and which layers are left alone; None for the defaults, or, where `model` is
        accelerated, for each SDGP layer's own and every other layer dense, whatever `filter_fn` selects.
    filter_fn: as for `accelerate_`; layers that it does not select stay dense.
    figures: replace single figures of `gpu`, e.g. ``sparse_speedup=1.5``.

    The formulas are those of `sdgp_accel.roofline`. Raises ValueError or TypeError for bad arguments and RuntimeError
    where the model's forward reads values of tensors, so that shapes alone cannot be traced.
    """
    check_model(model)
    own = takes_own(model, config)
    chosen, config = gpu_figures(gpu, **figures), checked_config(config)
    select, calls = selector(filter_fn), trace(model, batch)
    if own:
        select = selector(None)
    layers = tuple(_plan_layer(call, chosen, _own_config(call.module) if own else config, select) for call in calls)
    return PlanReport(chosen, batches.size(batch), layers, _left_out(model, {call.module for call in calls}))


def _left_out(model: nn.Module, traced: Container[nn.Module]) -> Counter[str]:
    """How many modules of each class may multiply by matrices of their own that `traced` does not have."""
    lookups_and_scales = (nn.Embedding, nn.EmbeddingBag, nn.LayerNorm, nn.RMSNorm)
    within_layers = nn.utils.parametrize.ParametrizationList
    return Counter(
        type(module).__name__
        for module in model.modules()
        if module not in traced
        and not isinstance(module, (*lookups_and_scales, within_layers))
        and any(map(_is_matrix, _own_parameters(module)))
    )


def _own_parameters(module: nn.Module) -> list[Tensor]:
    """Its own, and those that its parametrizations compute its own from."""
    named = module.named_parameters()
    return [parameter for name, parameter in named if "." not in name or name.startswith("parametrizations.")]


def _is_matrix(parameter: Tensor) -> bool:
    """Whether it has rows and columns; a token or the positions of one sample, [1, T, C], are added, not multiplied."""
    return parameter.is_floating_point() and parameter.dim() >= 2 and len(parameter) > 1 and parameter[0].numel() > 1


def _own_config(module: nn.Module) -> SDGPConfig:
    """Of a layer of an accelerated model."""
    if isinstance(module, SDGPLayer):
        return replace(module.sdgp_config, min_in_channels=0)  # it is swapped, whatever it says
    return SDGPConfig(grad_input="dense", grad_weight="dense")


def _plan_layer(call: LayerCall, gpu: GPU, config: SDGPConfig, select: Select) -> LayerPrediction:
    name, module, work, _ = call
    reason = _dense_reason(call, config, select)
    wanted = [p for p in work.passes if getattr(config, p) == "sparse"]
    work = replace(work, sparse_passes=() if reason else tuple(wanted))
    dense = dense_seconds(work, gpu)
    kind = "Linear" if isinstance(module, nn.Linear) else "Conv2d"
    scope = DEFAULT_SCOPE["linear" if isinstance(module, nn.Linear) else "conv2d"]
    specs = (config.spec("grad_input", scope), config.spec("grad_weight", scope))
    cost = max((gpu.compress_cost(spec) for spec in specs if spec is not None), default=1.0)
    two_pass, fused = (best_backward(work, gpu, schedule, cost) for schedule in SCHEDULES)
    return LayerPrediction(name, kind, work, dense, dense * len(work.passes), two_pass, fused, reason)


def _dense_reason(call: LayerCall, config: SDGPConfig, select: Select) -> str:
    """Why the kernels could take no pass of this layer; empty where they can."""
    name, module, work, _ = call
    in_channels = module.weight.shape[1]
    if type(module) not in (nn.Linear, nn.Conv2d) and not isinstance(module, SDGPLayer):
        return type(module).__name__  # may compute something else: `accelerate_` leaves subclasses alone
    if isinstance(module, nn.Conv2d) and module.groups > 1:
        return "grouped"
    if in_channels < config.min_in_channels:
        return f"{in_channels} input{'s' if in_channels > 1 else ''}"
    if not select(module, name):
        return "filtered"
    if not any(getattr(config, p) == "sparse" for p in work.passes):
        return "no pass pruned"
    spec = config.spec("grad_input", "group") or config.spec("grad_weight", "group")
    return "" if spec is not None and takes_pattern(spec) else f"{config.n}:{config.m}"


def _title(schedule: Schedule) -> str:
    return schedule.replace("_", "-")


def _number(value: float) -> str:
    return f"{value:.3f}" if value < 100 else f"{value:.1f}"


def _bound(work: Work, gpu: GPU) -> str:
    moved = work.gradient_bytes + work.other_bytes
    return "compute" if work.flops / gpu.flop_rate >= moved / gpu.byte_rate else "memory"
