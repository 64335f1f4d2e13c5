"""The GEMMs of a model's Linear and Conv2d layers, found by running its forward on shapes alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call

from sdgp_accel import batch as batches
from sdgp_accel.nn import layer_input
from sdgp_accel.roofline import Work


class LayerCall(NamedTuple):
    """One call of one layer; its input is a meta tensor."""

    name: str
    module: nn.Linear | nn.Conv2d
    work: Work
    input: Tensor


def trace(model: nn.Module, batch: Any) -> list[LayerCall]:
    """Every call of an nn.Linear or nn.Conv2d (subclasses included) in one forward of `model` on `batch`.

    Works on any device, "meta" included; nothing is computed, allocated or changed, and what torch.compile has wrapped
    runs eagerly. RuntimeError where the forward needs values, which shapes do not have.
    """
    model = getattr(model, "_orig_mod", model)  # what torch.compile wrapped, without it in the names
    # Parameters and buffers are replaced by their shapes for the time of one call: no copy of a large model, no
    # running statistics touched.
    shapes = {
        name: torch.empty_like(parameter, device="meta").requires_grad_(parameter.requires_grad)
        for name, parameter in model.named_parameters()
    } | {name: torch.empty_like(buffer, device="meta") for name, buffer in model.named_buffers()}
    calls: list[LayerCall] = []

    def recorder(name: str) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any], Tensor], None]:
        def record(module: nn.Module, args: tuple[Any, ...], named: dict[str, Any], output: Tensor) -> None:
            assert isinstance(module, (nn.Linear, nn.Conv2d))
            x = layer_input(args, named)
            calls.append(LayerCall(name, module, _work(module, x, output), x))

        return record

    handles = [
        module.register_forward_hook(recorder(name), with_kwargs=True)
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, nn.Conv2d))
    ]
    # What the forward leaves in its modules is of shapes only: a weight that hooks have computed, a cache of positions.
    modules = [module for module in model.modules() if not isinstance(module, torch.jit.ScriptModule)]
    states = [(module, dict(vars(module)), dict(module._buffers)) for module in modules]
    inputs, _ = batches.split(batches.to(batch, "meta"))
    args, kwargs = ((), dict(inputs)) if isinstance(inputs, Mapping) else (inputs, None)
    try:
        with torch.enable_grad(), torch.compiler.set_stance("force_eager"):
            functional_call(model, shapes, args, kwargs)
    except RuntimeError as error:  # NotImplementedError is one, too
        raise RuntimeError(f"the forward of {type(model).__name__} cannot run on shapes alone: {error}") from error
    finally:
        for handle in handles:
            handle.remove()
        for module, attributes, buffers in states:
            for now, before in ((vars(module), attributes), (module._buffers, buffers)):
                now.clear()
                now.update(before)
    return calls


def _work(module: nn.Linear | nn.Conv2d, x: Tensor, y: Tensor) -> Work:
    out_channels = module.weight.shape[0]
    passes = (("grad_input",) if x.requires_grad else ()) + (("grad_weight",) if module.weight.requires_grad else ())
    return Work(
        positions=y.numel() // out_channels,
        reduction=module.weight[0].numel(),
        out_channels=out_channels,
        inputs=x.numel(),
        passes=passes,
        sparse_passes=passes,
    )
