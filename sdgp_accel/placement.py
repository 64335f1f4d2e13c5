"""Which kernel would run the backward of each layer of a model, on a GPU that need not be here."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from sdgp_accel.backends.cutlass import BACKEND
from sdgp_accel.backends.gpu import Device
from sdgp_accel.backends.products import rank
from sdgp_accel.backends.tiles import Tiling
from sdgp_accel.config import SDGPConfig
from sdgp_accel.layer_plan import decode, plan_string
from sdgp_accel.nn import decide_layer, layer_kind
from sdgp_accel.swap import plan_swap
from sdgp_accel.trace import LayerCall, trace

# With the multiprocessors of the best-known GPU of each compute capability: A100, RTX 3090, RTX 4090, H100 SXM.
GPUS = {"80": Device((8, 0), 108), "86": Device((8, 6), 82), "89": Device((8, 9), 128), "90": Device((9, 0), 132, True)}


@dataclass(frozen=True)
class Placement:
    """One call of one layer: the kernel of each pass (family, tile, × parts of a split-K), or ``"dense"`` and why.

    shape: the forward GEMM as T×K→C.
    """

    name: str
    shape: str
    dgrad: str
    wgrad: str
    reason: str


def placements(
    model: nn.Module, batch: Any, gpu: Device, config: SDGPConfig | None = None, dtype: torch.dtype = torch.bfloat16
) -> tuple[Placement, ...]:
    """Where each Linear and Conv2d of `model` would run with ``backend="cutlass"`` and kernels built for `gpu`.

    model, batch: as for `plan`, on any device, "meta" included. dtype: that the layers compute in. ``backend="auto"``
    measures on the GPU itself, and may leave dense what could run sparse.

    Raises what `accelerate_` and `plan` raise.
    """
    config = replace(config or SDGPConfig(), backend="cutlass")
    steps = {step.module: step for step in plan_swap(model, replace(config, backend="reference"))}
    return tuple(
        _place(call, gpu, config if steps[call.module].config else None, steps[call.module].report.reason, dtype)
        for call in trace(model, batch)
    )


def _place(call: LayerCall, gpu: Device, config: SDGPConfig | None, reason: str, dtype: torch.dtype) -> Placement:
    work = call.work
    shape = f"{work.positions}×{work.reduction}→{work.out_channels}"
    if config is None:
        return Placement(call.name, shape, "dense", "dense", reason)
    _, decision = decide_layer(call.module, call.input, replace(config, backend="reference"))
    geometry = decision.geometry
    plan = decode(plan_string(layer_kind(call.module), config))
    unsupported = BACKEND.unsupported(geometry, plan._replace(backend="auto"), dtype, call.input.device)
    if unsupported is not None:
        return Placement(call.name, shape, "dense", "dense", unsupported)
    dgrad = _kernel(rank(geometry, "dgrad", gpu)[0]) if plan.grad_input and "grad_input" in work.passes else "dense"
    wgrad = _kernel(rank(geometry, "wgrad", gpu)[0]) if plan.grad_weight and "grad_weight" in work.passes else "dense"
    return Placement(
        call.name, shape, dgrad, wgrad, "" if "grad_input" in work.passes else "its input needs no gradient"
    )


def _kernel(tiling: Tiling) -> str:
    split_k = f" ×{tiling.splits}" if tiling.splits > 1 else " shared" if tiling.owned_steps else ""
    return f"{tiling.family} {tiling.tile}{split_k}"
