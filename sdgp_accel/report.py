"""What `accelerate_` did to each layer, and why, as data and as a table."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.nn.modules.conv import _ConvNd

from sdgp_accel.backends import Decision, decide
from sdgp_accel.config import PruneSpec, SDGPConfig
from sdgp_accel.geometry import Conv2dGeometry, Geometry, LinearGeometry, pair
from sdgp_accel.layer_plan import INACTIVE, plan_string
from sdgp_accel.nn import SDGPConv2d, SDGPLayer, SDGPLinear, layer_kind

if TYPE_CHECKING:
    from sdgp_accel.tuning.record import BackwardTimes

MOST_FOOTNOTES = 6


@dataclass(frozen=True)
class LayerReport:
    """One layer with weights.

    name: its (first) name in the model; aliases: further names of the same module.
    kind: its class before the swap; shape: in words, e.g. ``64→128 3x3 /2``.
    swapped: True where its backward is SDGP's now.
    dgrad, wgrad: what that pass consumes, e.g. ``mvue 2:4`` or ``dense``.
    backend: ``"reference"``, ``"cutlass"`` or ``"dense"``.
    reason: why it was swapped or not, or why it has this backend.
    times: milliseconds of the parts of its backward where they have been measured (`sdgp_accel.tune`).
    tilings: how the sparse products are launched, where that has been measured.
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
    times: BackwardTimes | None = None
    tilings: tuple[str, ...] = ()

    def decided(self, decision: Decision | None) -> LayerReport:
        """The report with what was decided for a shape in place of the preview; itself for None."""
        if decision is None:
            return self
        pruned = decision.backend is not None
        specs = (decision.plan.grad_input, decision.plan.grad_weight) if pruned else (None, None)
        return replace(
            self,
            dgrad=_describe(specs[0]),
            wgrad=_describe(specs[1]),
            backend=decision.name,
            reason=decision.reason,
            times=decision.times,
            tilings=tuple(
                str(tiling)
                for spec, tiling in zip(specs, decision.tilings, strict=True)
                if spec is not None and tiling is not None
            ),
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain types only, for JSON."""
        times = None if self.times is None else self.times._asdict()
        return {**vars(self), "aliases": list(self.aliases), "times": times, "tilings": list(self.tilings)}


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
        """The report as a rich table. A few reasons that repeat are numbered and listed below it; many stand in their
        rows. With the times of the layers that have been measured."""
        title = f"{len(self.swapped)} of {len(self.layers)} layers swapped"
        table = Table(title=title, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), caption_justify="left")
        table.add_column("layer", overflow="fold")
        for column in ("what", "dgrad, wgrad", "backend"):
            table.add_column(column)
        timed = any(layer.times is not None for layer in self.layers)
        if timed:
            for column in ("dgrad\nms", "wgrad\nms", "prune +\ncompress", "backward\nms"):
                table.add_column(column, justify="right", no_wrap=True)
        table.add_column("why")
        reasons = list(dict.fromkeys(layer.reason for layer in self.layers))
        numbered = len(reasons) <= MOST_FOOTNOTES
        for layer in self.layers:
            passes = layer.dgrad if layer.dgrad == layer.wgrad else f"{layer.dgrad}, {layer.wgrad}"
            table.add_row(
                ", ".join((layer.name or "(the model)", *layer.aliases)),
                f"{layer.kind} {layer.shape}",
                passes if layer.swapped else "",
                layer.backend if layer.swapped else "",
                *(_times(layer) if timed else ()),
                str(reasons.index(layer.reason) + 1) if numbered else layer.reason,
                style=None if layer.swapped else "dim",
            )
        if numbered:
            table.caption = "\n".join(f" {number}: {reason}" for number, reason in enumerate(reasons, start=1))
        return table

    def __rich__(self) -> Table:
        return self.table()

    def __str__(self) -> str:
        return as_text(self.table())


def _times(layer: LayerReport) -> tuple[str, str, str, str]:
    """Dense → sparse of dgrad, of wgrad, prune + compress for both, and the whole backward dense → as it runs."""
    times = layer.times
    if times is None:
        return "", "", "", ""
    timed = (times.compress_both, times.compress_dgrad, times.compress_wgrad)
    compress = next((ms for ms in timed if ms is not None), None)
    runs = times.totals()[layer.dgrad != "dense", layer.wgrad != "dense"]
    return (
        _arrow(times.dense_dgrad, times.sparse_dgrad),
        _arrow(times.dense_wgrad, times.sparse_wgrad),
        "" if compress is None else f"{compress:.3f}",
        _arrow(times.dense, runs),
    )


def _arrow(dense: float, sparse: float | None) -> str:
    return f"{dense:.3f}" if sparse is None else f"{dense:.3f}→{sparse:.3f}"


def as_text(table: Table) -> str:
    """`table` as plain text, 120 columns wide."""
    console = Console(width=120, color_system=None)
    with console.capture() as capture:
        console.print(table)
    return capture.get()


def describe_skipped(module: nn.Module, names: list[str], reason: str) -> LayerReport:
    """The row of a layer that is not swapped, because of `reason`."""
    return LayerReport(names[0], _class_name(module), _shape(module), False, "dense", "dense", "dense", reason,
                       tuple(names[1:]))  # fmt: skip


def describe_swapped(
    module: nn.Linear | nn.Conv2d, names: list[str], config: SDGPConfig, reason: str | None
) -> LayerReport:
    """The row of a layer that is swapped with `config`; `reason` precedes that of its backend."""
    active = not isinstance(module, SDGPLayer) or module.sdgp_active
    decision, remark = _preview(plan_string(layer_kind(module), config) if active else INACTIVE, module)
    if not active:
        remark = "switched off by set_active_"
    dense = decision.backend is None
    return LayerReport(
        name=names[0],
        kind=_class_name(module),
        shape=_shape(module),
        swapped=True,
        dgrad=_describe(None if dense else decision.plan.grad_input),
        wgrad=_describe(None if dense else decision.plan.grad_weight),
        backend=decision.name,
        reason="; ".join(filter(None, (reason, decision.reason, remark))),
        aliases=tuple(names[1:]),
    )


def describe_as_it_is(module: nn.Module, listed: LayerReport) -> LayerReport:
    """`listed` for a question that selects no layers: an SDGP layer with its configuration, another as not swapped."""
    if isinstance(module, (SDGPLinear, SDGPConv2d)):
        return describe_swapped(module, [listed.name, *listed.aliases], module.sdgp_config, None)
    return replace(listed, reason="not an SDGP layer: accelerate_ has not swapped it")


def _preview(plan_text: str, module: nn.Linear | nn.Conv2d) -> tuple[Decision, str | None]:
    """What `decide` says for the layer's weight as it is now, on the smallest batch; shapes may still change it.

    A float32 weight is judged as autocast would present it, since that is how such layers meet the kernels.
    """
    device, dtype = module.weight.device, module.weight.dtype
    geometry = _smallest_geometry(module)
    if dtype == torch.float32 and device.type == "cuda":
        plain = decide(plan_text, geometry, dtype, device)
        mixed = decide(plan_text, geometry, torch.bfloat16, device)
        return mixed, None if plain.name == mixed.name else f"under autocast; without it: {plain.reason}"
    return decide(plan_text, geometry, dtype, device), None


def _smallest_geometry(module: nn.Linear | nn.Conv2d) -> Geometry:
    if isinstance(module, nn.Linear):
        return LinearGeometry(2, module.in_features, module.out_features, 2)
    stride, dilation = pair("stride", module.stride), pair("dilation", module.dilation)
    kernel = module.kernel_size
    height, width = (d * (k - 1) + 1 for d, k in zip(dilation, kernel, strict=True))
    return Conv2dGeometry.of(
        (1, module.in_channels, height, width),
        (module.out_channels, module.in_channels // module.groups, *kernel),
        (*stride, 0, 0, *dilation, module.groups),
        # A 1x1 filter is both, and goes with its input.
        channels_last=module.weight.is_contiguous(memory_format=torch.channels_last),
    )


def _describe(spec: PruneSpec | None) -> str:
    return "dense" if spec is None else f"{spec.function} {spec.n}:{spec.m}"


def _class_name(module: nn.Module) -> str:
    """Of an SDGP layer, the class that it replaced, whatever fully_shard and parametrizations have derived since."""
    kind = type(module)
    while issubclass(kind, SDGPLayer) and kind.__name__.startswith(("FSDP", "Parametrized")):
        kind = kind.__bases__[-1]
    return "Linear" if kind is SDGPLinear else "Conv2d" if kind is SDGPConv2d else kind.__name__


def _shape(module: nn.Module) -> str:
    if isinstance(module, nn.Linear):
        return f"{module.in_features}→{module.out_features}"
    if isinstance(module, _ConvNd):
        text = f"{module.in_channels}→{module.out_channels} {'x'.join(map(str, module.kernel_size))}"
        stride = [module.stride] if isinstance(module.stride, int) else module.stride
        strides = set(stride)
        if strides != {1}:
            text += f" /{'x'.join(map(str, strides if len(strides) == 1 else stride))}"
        return text + (f" groups {module.groups}" if module.groups > 1 else "")
    weights = [parameter for name, parameter in module.named_parameters(recurse=False) if "weight" in name]
    lazy = nn.parameter.UninitializedParameter
    return ", ".join("x".join(map(str, weight.shape)) for weight in weights if not isinstance(weight, lazy))
