"""The backward of a layer as one custom op: ``sdgp::linear_backward`` and ``sdgp::conv2d_backward``.

Each returns the gradients that its arguments ask for, in the order input, weight, bias: dX where `weight` is
given, dW where `x` is given, db where `bias` is true. One op, not three, because both passes share one
prune+compress; an op at all so that torch.compile does not trace into the pruning. Defined on a
`torch.library.Library`: the `custom_op` decorator costs 5 µs more per call.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sdgp_accel import philox
from sdgp_accel.backends import Decision, Gradients, Needs, decide_conv2d, decide_linear, dense
from sdgp_accel.stages import is_recording, stage

_library = torch.library.Library("sdgp", "FRAGMENT")  # type: ignore[no-untyped-call]

# nondeterministic_seeded: the ops draw from torch's generator, so equal calls must not be merged or recomputed.
_TAGS = (torch.Tag.nondeterministic_seeded, torch.Tag.pt2_compliant_tag)

_UNCHANGED = contextlib.nullcontext()

LINEAR_SIGNATURE = "(Tensor dy, Tensor? x, Tensor? weight, bool bias, str plan) -> Tensor[]"
CONV2D_SIGNATURE = (
    "(Tensor dy, Tensor? x, Tensor? weight, bool bias, SymInt[] absent_shape, int[] window, bool channels_last, "
    "str plan) -> Tensor[]"
)


def _linear_backward(dy: Tensor, x: Tensor | None, weight: Tensor | None, bias: bool, plan: str) -> list[Tensor]:
    """dy [..., C_out], x [..., C_in], weight [C_out, C_in]; at least one of x and weight is given."""
    input_shape = (*dy.shape[:-1], _in_features(x, weight))
    deterministic = torch.are_deterministic_algorithms_enabled()
    decision = decide_linear(plan, input_shape, dy.shape[-1], dy.dtype, dy.device, deterministic, dy.dtype)
    return _present(run(dy, x, weight, bias, decision))


def _conv2d_backward(
    dy: Tensor,
    x: Tensor | None,
    weight: Tensor | None,
    bias: bool,
    absent_shape: list[int],
    window: list[int],
    channels_last: bool,
    plan: str,
) -> list[Tensor]:
    """dy [N, C_out, P, Q], x [N, C_in, H, W], weight [C_out, C_in / groups, R, S].

    absent_shape: the shape of whichever of x and weight is not given. window: stride, padding, dilation (two each)
    and groups. channels_last: the memory format of dX and dW.
    """
    input_shape = tuple(absent_shape if x is None else x.shape)
    weight_shape = tuple(absent_shape if weight is None else weight.shape)
    deterministic = torch.are_deterministic_algorithms_enabled()
    stride, padding, dilation = (tuple(window[i : i + 2]) for i in (0, 2, 4))
    decision = decide_conv2d(
        plan, input_shape, weight_shape, (stride, padding, dilation, window[6]), channels_last, dy.dtype, dy.device,
        deterministic, dy.dtype,
    )  # fmt: skip
    return _present(run(dy, x, weight, bias, decision))


def _present(gradients: Gradients) -> list[Tensor]:
    return [gradient for gradient in gradients if gradient is not None]


def run(dy: Tensor, x: Tensor | None, weight: Tensor | None, bias: bool, decision: Decision) -> Gradients:
    """The gradients that are asked for, each pass on its pruned operand or on dY as it is.

    Linear: dy [..., C_out], x [..., C_in]; Conv2d: dy [N, C_out, P, Q], x [N, C_in, H, W]. What the ops do, and what
    the eager backward calls directly.
    """
    if decision.single is not None:
        decision = decision.where(weight is not None, x is not None)
    if decision.bound is not None and not is_recording():
        gradients = decision.bound(dy, x, weight, bias)
        if gradients is not None:
            return gradients
    geometry, backend, plan, draws, _, tilings, *_ = decision
    prune_dgrad = backend is not None and weight is not None and plan.grad_input is not None
    prune_wgrad = backend is not None and x is not None and plan.grad_weight is not None
    with _autocast_off(device_type(dy)):
        dgrad = wgrad = dx = dw = db = None
        if backend is not None and (prune_dgrad or prune_wgrad):
            with stage("prune_compress"):
                rng = philox.Rng(philox.next_seed(dy.device), philox.data_parallel_rank(), 0) if draws else None
                needs = Needs(prune_dgrad, prune_wgrad, bias)
                dgrad, wgrad, db = backend.prune_compress(dy, geometry, plan, rng, needs)
        elif bias:
            db = dense.bias_gradient(dy, geometry)
        if weight is not None:
            with stage("dgrad"):
                if backend is not None and prune_dgrad:
                    # The geometry of a Linear layer knows its input as a matrix only.
                    shape = (*dy.shape[:-1], weight.shape[1]) if weight.dim() == 2 and dy.dim() != 2 else None
                    dx = backend.dgrad(dgrad, weight, geometry, tilings.dgrad, shape)
                    dgrad = None  # freed before wgrad allocates
                else:
                    dx = dense.dgrad(dy, weight, geometry)
        if x is not None:
            with stage("wgrad"):
                if backend is not None and prune_wgrad:
                    dw = backend.wgrad(wgrad, x, geometry, tilings.wgrad)
                else:
                    dw = dense.wgrad(dy, x, geometry)
    return dx, dw, db


def device_type(tensor: Tensor) -> str:
    """What ``tensor.device.type`` says, three times as fast."""
    return "cuda" if tensor.is_cuda else "cpu" if tensor.is_cpu else tensor.device.type


def _autocast_off(device_type: str) -> contextlib.AbstractContextManager[Any]:
    """A backward called under autocast must still compute in the dtypes of its forward."""
    if torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return _UNCHANGED


def _in_features(x: Tensor | None, weight: Tensor | None) -> int:
    operand = x if weight is None else weight
    assert operand is not None
    return operand.shape[-1]


def _linear_backward_fake(dy: Tensor, x: Tensor | None, weight: Tensor | None, bias: bool, plan: str) -> list[Tensor]:
    in_features, out_features = _in_features(x, weight), dy.shape[-1]
    gradients = []
    if weight is not None:
        gradients.append(dy.new_empty((*dy.shape[:-1], in_features)))
    if x is not None:
        gradients.append(dy.new_empty((out_features, in_features)))
    if bias:
        gradients.append(dy.new_empty(out_features))
    return gradients


def _conv2d_backward_fake(
    dy: Tensor,
    x: Tensor | None,
    weight: Tensor | None,
    bias: bool,
    absent_shape: list[int],
    window: list[int],
    channels_last: bool,
    plan: str,
) -> list[Tensor]:
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    gradients = []
    if weight is not None:
        shape = absent_shape if x is None else x.shape
        gradients.append(torch.empty(shape, dtype=dy.dtype, device=dy.device, memory_format=memory_format))
    if x is not None:
        shape = absent_shape if weight is None else weight.shape
        gradients.append(torch.empty(shape, dtype=dy.dtype, device=dy.device, memory_format=memory_format))
    if bias:
        gradients.append(dy.new_empty(dy.shape[1]))
    return gradients


def _register(name: str, signature: str, implementation: Callable[..., Any], fake: Callable[..., Any]) -> None:
    _library.define(name + signature, tags=_TAGS)  # type: ignore[no-untyped-call]
    _library.impl(name, implementation, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
    torch.library.register_fake(f"sdgp::{name}", fake, lib=_library)


_register("linear_backward", LINEAR_SIGNATURE, _linear_backward, _linear_backward_fake)
_register("conv2d_backward", CONV2D_SIGNATURE, _conv2d_backward, _conv2d_backward_fake)

linear_backward = torch.ops.sdgp.linear_backward.default
conv2d_backward = torch.ops.sdgp.conv2d_backward.default
