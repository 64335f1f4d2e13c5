"""The backward of a layer as one custom op: ``sdgp::linear_backward`` and ``sdgp::conv2d_backward``.

Each returns the gradients that its arguments ask for, in the order input, weight, bias: dX where `weight` is
given, dW where `x` is given, db where `bias` is true. One op (not three) because the two passes share one
prune+compress; an op at all because that makes the backward opaque to ``torch.compile``, which would otherwise
trace the pruning. Defined through `torch.library.Library` rather than the `custom_op` decorator, which costs 5 µs
more per call.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from sdgp_accel import philox
from sdgp_accel.backends import Needs, decide, dense
from sdgp_accel.geometry import Conv2dGeometry, Geometry, LinearGeometry
from sdgp_accel.stages import stage

_library = torch.library.Library("sdgp", "FRAGMENT")  # type: ignore[no-untyped-call]

# nondeterministic_seeded: the ops draw from torch's generator, so equal calls must not be merged or recomputed.
_TAGS = (torch.Tag.nondeterministic_seeded, torch.Tag.pt2_compliant_tag)


def _linear_backward(dy: Tensor, x: Tensor | None, weight: Tensor | None, bias: bool, plan: str) -> list[Tensor]:
    in_channels = _linear_in_channels(x, weight)
    rows = dy.unsqueeze(0) if dy.dim() == 1 else dy.flatten(0, -2)
    geometry = LinearGeometry(
        tokens=rows.shape[0],
        in_channels=in_channels,
        out_channels=dy.shape[-1],
        positions_per_sample=dy.shape[-2] if dy.dim() > 2 else 1,
    )
    if x is not None:
        x = x.unsqueeze(0) if x.dim() == 1 else x.flatten(0, -2)
    gradients = _backward(rows, rows, x, weight, bias, geometry, plan)
    if weight is not None:
        gradients[0] = gradients[0].view(*dy.shape[:-1], in_channels)
    return gradients


def _conv2d_backward(
    dy: Tensor,
    x: Tensor | None,
    weight: Tensor | None,
    bias: bool,
    input_shape: list[int],
    weight_shape: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    channels_last: bool,
    plan: str,
) -> list[Tensor]:
    geometry = Conv2dGeometry(
        *_four(input_shape),
        *_four(dy.shape)[1:],
        kernel=_two(weight_shape[2:]),
        stride=_two(stride),
        padding=_two(padding),
        dilation=_two(dilation),
        groups=groups,
        channels_last=channels_last,
    )
    return _backward(dy, None, x, weight, bias, geometry, plan)


def _backward(
    dy: Tensor,
    dy2d: Tensor | None,
    x: Tensor | None,
    weight: Tensor | None,
    bias: bool,
    geometry: Geometry,
    plan_text: str,
) -> list[Tensor]:
    """Run the passes that are asked for, each on its pruned operand or on the dense gradient."""
    backend, plan, _ = decide(plan_text, geometry, dy.dtype, dy.device)
    needs = Needs(
        dgrad=backend is not None and weight is not None and plan.grad_input is not None,
        wgrad=backend is not None and x is not None and plan.grad_weight is not None,
        bias=bias,
    )
    gradients: list[Tensor] = []
    with _no_autocast(dy):
        dgrad = wgrad = db = None
        if backend is not None and (needs.dgrad or needs.wgrad):
            with stage("prune_compress"):
                # A view for Linear and for channels_last gradients, one copy for others.
                matrix = dy.permute(0, 2, 3, 1).flatten(0, 2) if dy2d is None else dy2d
                rng = philox.Rng(philox.draw(dy.device), philox.data_parallel_rank(), 0) if plan.draws else None
                dgrad, wgrad, db = backend.prune_compress(matrix, plan, rng, geometry.positions_per_sample, needs)
                del matrix
        elif bias:
            db = dy.sum([d for d in range(dy.dim()) if d != 1])
        if weight is not None:
            with stage("dgrad"):
                if backend is not None and needs.dgrad:
                    gradients.append(backend.dgrad(dgrad, weight, geometry))
                    dgrad = None  # freed before wgrad allocates
                else:
                    gradients.append(dense.dgrad(dy, weight, geometry))
        if x is not None:
            with stage("wgrad"):
                if backend is not None and needs.wgrad:
                    gradients.append(backend.wgrad(wgrad, x, geometry))
                else:
                    gradients.append(dense.wgrad(dy, x, geometry))
        if db is not None:
            gradients.append(db)
    return gradients


def _two(values: Sequence[int]) -> tuple[int, int]:
    return values[0], values[1]


def _four(values: Sequence[int]) -> tuple[int, int, int, int]:
    return values[0], values[1], values[2], values[3]


def _no_autocast(dy: Tensor) -> contextlib.AbstractContextManager[Any]:
    """A backward called under autocast must still compute in the dtype its forward used."""
    device_type = dy.device.type
    if torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return contextlib.nullcontext()


def _linear_in_channels(x: Tensor | None, weight: Tensor | None) -> int:
    operand = weight if weight is not None else x
    return 0 if operand is None else operand.shape[-1]


def _linear_backward_fake(dy: Tensor, x: Tensor | None, weight: Tensor | None, bias: bool, plan: str) -> list[Tensor]:
    in_channels, out_channels = _linear_in_channels(x, weight), dy.shape[-1]
    gradients = []
    if weight is not None:
        gradients.append(dy.new_empty((*dy.shape[:-1], in_channels)))
    if x is not None:
        gradients.append(dy.new_empty((out_channels, in_channels)))
    if bias:
        gradients.append(dy.new_empty(out_channels))
    return gradients


def _conv2d_backward_fake(
    dy: Tensor,
    x: Tensor | None,
    weight: Tensor | None,
    bias: bool,
    input_shape: list[int],
    weight_shape: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    channels_last: bool,
    plan: str,
) -> list[Tensor]:
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    gradients = []
    if weight is not None:
        gradients.append(torch.empty(input_shape, dtype=dy.dtype, device=dy.device, memory_format=memory_format))
    if x is not None:
        gradients.append(torch.empty(weight_shape, dtype=dy.dtype, device=dy.device, memory_format=memory_format))
    if bias:
        gradients.append(dy.new_empty(dy.shape[1]))
    return gradients


def _double_backward(ctx: Any, *gradients: Any) -> Any:
    raise RuntimeError(
        "double backward through an SDGP layer is not supported (its backward prunes and is not differentiable); "
        "call sdgp_accel.restore_(model) or accelerate_ only the layers that are differentiated once"
    )


def _register(name: str, signature: str, implementation: Callable[..., Any], fake: Callable[..., Any]) -> None:
    _library.define(name + signature, tags=_TAGS)  # type: ignore[no-untyped-call]
    _library.impl(name, implementation, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
    torch.library.register_fake(f"sdgp::{name}", fake, lib=_library)
    torch.library.register_autograd(f"sdgp::{name}", _double_backward, lib=_library)


_register(
    "linear_backward",
    "(Tensor dy, Tensor? x, Tensor? weight, bool bias, str plan) -> Tensor[]",
    _linear_backward,
    _linear_backward_fake,
)
_register(
    "conv2d_backward",
    "(Tensor dy, Tensor? x, Tensor? weight, bool bias, SymInt[] input_shape, SymInt[] weight_shape, "
    "int[] stride, int[] padding, int[] dilation, int groups, bool channels_last, str plan) -> Tensor[]",
    _conv2d_backward,
    _conv2d_backward_fake,
)
