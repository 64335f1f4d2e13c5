"""The two backward GEMMs as dense ops on a gradient that may or may not have been pruned."""

from __future__ import annotations

import torch
from torch import Tensor

from sdgp_accel.geometry import Conv2dGeometry, Geometry, LinearGeometry


def dgrad(dy: Tensor, weight: Tensor, geometry: Geometry) -> Tensor:
    """dX from dY: [..., C_out] → [..., C_in] for Linear, [N, C_out, P, Q] → [N, C_in, H, W] for Conv2d."""
    if isinstance(geometry, LinearGeometry):
        return dy @ weight
    # Only the shape and the memory format of the input matter to its own gradient.
    memory_format = _memory_format(geometry.channels_last)
    x = torch.empty(geometry.input_shape, dtype=dy.dtype, device=dy.device, memory_format=memory_format)
    dx, _, _ = _convolution_backward(dy, x, weight, geometry, (True, False, False))
    result: Tensor = dx.contiguous(memory_format=memory_format)
    return result


def wgrad(dy: Tensor, x: Tensor, geometry: Geometry) -> Tensor:
    """dW from dY [..., C_out] and x [..., C_in] for Linear, [N, C_out, P, Q] and [N, C_in, H, W] for Conv2d."""
    if isinstance(geometry, LinearGeometry):
        return matrix_view(dy, geometry).t() @ matrix_view(x, geometry)
    memory_format = _memory_format(geometry.channels_last)
    weight = torch.empty(geometry.weight_shape, dtype=dy.dtype, device=dy.device, memory_format=memory_format)
    _, dw, _ = _convolution_backward(dy, x, weight, geometry, (False, True, False))
    result: Tensor = dw.contiguous(memory_format=memory_format)
    return result


def both(dy: Tensor, x: Tensor, weight: Tensor, geometry: Geometry) -> tuple[Tensor, Tensor]:
    """`dgrad` and `wgrad` as an ordinary layer computes them."""
    if isinstance(geometry, LinearGeometry):
        return dgrad(dy, weight, geometry), wgrad(dy, x, geometry)
    dx, dw, _ = _convolution_backward(dy, x, weight, geometry, (True, True, False))
    return dx, dw


def wgrad_into(dy: Tensor, x: Tensor, geometry: Geometry, out: Tensor | None, accumulate: bool) -> Tensor:
    """`wgrad`, delivered to `out` (default: a new tensor) in its dtype: written, or added where `accumulate`."""
    if out is None:
        return wgrad(dy, x, geometry)
    dw = wgrad(dy.to(out.dtype), x.to(out.dtype), geometry)
    return out.add_(dw) if accumulate else out.copy_(dw)


def bias_gradient(dy: Tensor, geometry: Geometry) -> Tensor:
    """db [C_out]: the sum of dY over its positions."""
    return matrix_view(dy, geometry).sum(0) if isinstance(geometry, LinearGeometry) else dy.sum((0, 2, 3))


def matrix_view(dy: Tensor, geometry: Geometry) -> Tensor:
    """dY (or a Linear layer's x) as [T, C]: a view of what is contiguous or channels_last, a copy of other layouts."""
    if isinstance(geometry, LinearGeometry):
        return dy if dy.dim() == 2 else dy.reshape(geometry.positions, dy.shape[-1])
    if dy.is_contiguous(memory_format=torch.channels_last):
        channels = dy.shape[1]
        return dy.as_strided((geometry.positions, channels), (channels, 1))  # half the time of the two calls below
    return dy.permute(0, 2, 3, 1).flatten(0, 2)


def layer_view(matrix: Tensor, geometry: Geometry) -> Tensor:
    """[T, C] as `dgrad` and `wgrad` take it: itself for Linear, [N, C, P, Q] (channels_last) for Conv2d."""
    if isinstance(geometry, LinearGeometry):
        return matrix
    shape = (geometry.batch, geometry.out_height, geometry.out_width, geometry.out_channels)
    return matrix.view(shape).permute(0, 3, 1, 2)


def _convolution_backward(
    dy: Tensor, x: Tensor, weight: Tensor, geometry: Conv2dGeometry, wanted: tuple[bool, bool, bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of x, weight and bias that are wanted; None for the others."""
    gradients: tuple[Tensor, Tensor, Tensor] = torch.ops.aten.convolution_backward.default(
        dy, x, weight, None, geometry.stride, geometry.padding, geometry.dilation, False, (0, 0), geometry.groups,
        wanted,
    )  # fmt: skip
    return gradients


def _memory_format(channels_last: bool) -> torch.memory_format:
    return torch.channels_last if channels_last else torch.contiguous_format
