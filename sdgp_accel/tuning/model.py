"""`tune`: what each layer of a model runs, decided before the first step."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from sdgp_accel import batch as batches
from sdgp_accel.backends import Decision, forget_decisions
from sdgp_accel.config import SDGPConfig
from sdgp_accel.model_state import buffers_of_its_own, left_as_it_was
from sdgp_accel.nn import SDGPLayer, decide_layer, layer_input
from sdgp_accel.report import LayerReport, SwapReport, describe_as_it_is
from sdgp_accel.swap import plan_swap


def tune(
    model: nn.Module, batch: Any, config: SDGPConfig | None = None, *, autocast: torch.dtype | None = None
) -> SwapReport:
    """Decide now, on the shapes of `batch`, what each SDGP layer of `model` runs, and report it with the times.

    Without this call each shape is decided where it is first used. With ``backend="auto"`` on a GPU that has the
    kernels, deciding means measuring dense and sparse dgrad and wgrad and prune + compress; what this machine has
    measured before is remembered (`sdgp_accel.tuning.cache`). Among data-parallel processes call it after
    ``init_process_group``, in any of them or in all; where the forward itself communicates (FSDP, SyncBatchNorm), in
    all.

    batch: what a DataLoader yields: a tensor, a mapping of keyword arguments, or (inputs, targets). config: decide
    for what ``accelerate_(model, config)`` would make of the model; None for the layers that are swapped already.
    autocast: the dtype of the autocast that training runs under. One forward pass; the model is left as it was. Layers
    that the pass does not reach are reported as `accelerate_` reports them, those that `set_active_` has switched off
    with what they run when they are on again, and all as if their inputs needed a gradient.

    Raises what `accelerate_` raises for `model` and `config`, and ValueError or TypeError for a bad `batch` or
    `autocast`.
    """
    batches.check_autocast(autocast)
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        forget_decisions()  # each process may have taken its own before the group was there
    decisions: dict[nn.Module, Decision] = {}

    def after_forward(module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any], output: Tensor) -> None:
        assert isinstance(module, (nn.Linear, nn.Conv2d))
        x = layer_input(inputs, named)
        decision = decide_layer(module, x.to(output.dtype), configs[module])[1]
        decisions[module] = decision.where(True, module.weight.requires_grad)  # the pass does not tell of inputs

    steps = plan_swap(model, config, (lambda module, name: False) if config is None else None)
    listed = [describe_as_it_is(step.module, step.report) if config is None else step.report for step in steps]
    configs = {step.module: step.config for step in steps if step.config is not None}
    handles = [layer.register_forward_hook(after_forward, with_kwargs=True) for layer in configs]
    device = next(model.parameters(), torch.empty(0)).device
    try:
        with (
            left_as_it_was(model),
            buffers_of_its_own(model),
            torch.no_grad(),
            torch.autocast(device.type, autocast, enabled=autocast is not None),
        ):
            batches.forward(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    layers = zip(steps, listed, strict=True)
    return SwapReport(tuple(_decided(step.module, report, decisions.get(step.module)) for step, report in layers))


def _decided(module: nn.Module, listed: LayerReport, decision: Decision | None) -> LayerReport:
    report = listed.decided(decision)
    if decision is None or not isinstance(module, SDGPLayer) or module.sdgp_active:
        return report
    return replace(report, reason=f"{report.reason}; switched off by set_active_, and dense until it is on again")
