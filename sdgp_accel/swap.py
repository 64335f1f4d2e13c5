"""`accelerate_`, `restore_` and `set_active_`: exchange the classes of a model's layers in place, or their plans.

Only ``module.__class__`` changes (and one attribute is added), so the module object, its Parameters, hooks,
names, buffers, dtype, device, memory format and training flag are the ones it had.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import NamedTuple

from torch import nn

from sdgp_accel.config import SDGPConfig
from sdgp_accel.eligibility import SWAPS, Filter, check_model, checked_config, layers_with_weights, selector, why_not
from sdgp_accel.nn import SDGPConv2d, SDGPLayer, SDGPLinear, layer_kind, warn_of_scope
from sdgp_accel.report import LayerReport, SwapReport, describe_skipped, describe_swapped

_ORIGINALS = {swapped: original for original, swapped in SWAPS.items()}


class Step(NamedTuple):
    """What `accelerate_` will do to one module; `config` None: make (or leave) it an ordinary layer."""

    module: nn.Module
    config: SDGPConfig | None
    report: LayerReport


def accelerate_(model: nn.Module, config: SDGPConfig | None = None, filter_fn: Filter = None) -> SwapReport:
    """Give every eligible Linear and Conv2d of `model`, in place, a backward that prunes by `config`.

    filter_fn: ``(module, name) -> bool``, or one or several glob patterns of names (``"blocks.*.mlp.*"``);
        None takes every layer. A shared module counts as selected where any of its names is. Layers that are
        not selected are left alone, so several calls can give several configurations to parts of a model.

    Idempotent; calling it again with another configuration replaces the old one. All or nothing: whatever it
    raises, it raises before the first layer changes. Exact `nn.Linear` and `nn.Conv2d` only: subclasses may
    compute something else. Warns where no layer is eligible.

    Returns a `SwapReport` of every layer with weights. Raises TypeError for wrong argument types, and
    RuntimeError where ``fallback="error"`` and a layer cannot run on the kernels.
    """
    steps = plan_swap(model, config, filter_fn)
    report = SwapReport(tuple(step.report for step in steps))
    if not report.swapped:  # here, where nothing has changed yet: a warning may be an error
        warnings.warn("accelerate_ found no layer to swap in this model; see the returned report", stacklevel=2)
    for step in steps:
        if step.config is not None:
            swap_layer(step.module, step.config)
        elif isinstance(step.module, SDGPLayer):
            restore_layer(step.module)
    return report


def restore_(model: nn.Module) -> nn.Module:
    """Turn every SDGP layer of `model` back into `nn.Linear` or `nn.Conv2d`, in place, and return `model`.

    Raises RuntimeError, before changing anything, where a wrapper (FSDP2, parametrizations) has derived its
    own class from an SDGP layer, or a hook of another library has replaced its forward: undo that first.
    """
    check_model(model)
    layers = [module for module in model.modules() if isinstance(module, SDGPLayer)]
    for module in layers:
        _check_restorable(module)
    for module in layers:
        restore_layer(module)
    return model


def plan_swap(model: nn.Module, config: SDGPConfig | None = None, filter_fn: Filter = None) -> list[Step]:
    """What `accelerate_` would do with these arguments; raises what it raises, changes nothing."""
    check_model(model)
    config = checked_config(config)
    select = selector(filter_fn)
    return [_plan_step(module, names, config, select) for module, names in layers_with_weights(model)]


def swap_layer(module: nn.Module, config: SDGPConfig) -> None:
    """Make an exact nn.Linear or nn.Conv2d (or one that is swapped already) an SDGP layer with `config`."""
    if type(module) in SWAPS:
        module.__class__ = SWAPS[type(module)]
    assert isinstance(module, SDGPLayer)
    module.sdgp_config = config


def _check_restorable(module: SDGPLayer) -> None:
    if type(module) not in _ORIGINALS:
        raise RuntimeError(
            f"{type(module).__name__} cannot become an ordinary layer again: its class was derived from an SDGP layer "
            "(by fully_shard, a parametrization or a subclass); undo that first, or switch pruning off: "
            "set_active_(model, False)"
        )
    if "forward" in vars(module):
        raise RuntimeError(
            f"{type(module).__name__} cannot become an ordinary layer again: its forward was replaced (by a hook of "
            "another library); undo that first, or switch pruning off: set_active_(model, False)"
        )


def restore_layer(module: SDGPLayer) -> None:
    """Make an SDGPLinear or SDGPConv2d an ordinary layer again; RuntimeError for classes derived from them."""
    _check_restorable(module)
    original = _ORIGINALS[type(module)]
    for name in ("_sdgp_config", "_sdgp_active", "_sdgp_plan"):
        module.__dict__.pop(name, None)
    module.__class__ = original


def set_active_(model: nn.Module, active: bool) -> nn.Module:
    """Switch the pruning of every SDGP layer of `model` off or on again, in place, and return `model`.

    A layer that is off runs the ordinary dense backward, from its next forward pass on; its configuration stays, and
    `accelerate_` does not switch it on. Costs nothing per step either way: the layer's plan is exchanged. Under
    torch.compile the next step recompiles, once for each of the two states; a captured CUDA graph has to be captured
    again. Switch between steps: the backward of a checkpointed part runs its forward again and would not find what it
    expects (CheckpointError). Checkpoints on disk do not hold the switch: set it again when training resumes (recipes
    and callbacks do).

    Raises TypeError for a `model` that is no module or an `active` that is no bool. Warns where no layer is swapped.
    """
    check_model(model)
    if not isinstance(active, bool):
        raise TypeError(f"active must be True or False; got {active!r}")
    layers = [module for module in model.modules() if isinstance(module, SDGPLayer)]
    for layer in layers:
        layer.sdgp_active = active
    if not layers:
        warnings.warn("set_active_ found no SDGP layer in this model; call accelerate_ first", stacklevel=2)
    return model


def _plan_step(
    module: nn.Module, names: list[str], config: SDGPConfig, select: Callable[[nn.Module, str], bool]
) -> Step:
    """Decide about one module without touching it."""
    if not any(select(module, name) for name in names):
        if isinstance(module, (SDGPLinear, SDGPConv2d)):
            kept = module.sdgp_config
            return Step(module, kept, describe_swapped(module, names, kept, "not selected: keeps its configuration"))
        return Step(module, None, describe_skipped(module, names, "not selected by filter_fn"))
    reason = why_not(module, config)
    if reason is not None:
        if isinstance(module, SDGPLayer):
            _check_restorable(module)
        return Step(module, None, describe_skipped(module, names, reason))
    assert isinstance(module, (nn.Linear, nn.Conv2d))
    warn_of_scope(layer_kind(module), config)  # here, where nothing has changed yet: a warning may be an error
    return Step(module, config, describe_swapped(module, names, config, None))
