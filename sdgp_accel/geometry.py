"""The shapes a layer's backward works with, reduced to the [T, C] matrix view of the output gradient.

T counts the output positions (n-major, then p, then q; for Linear: tokens), C the output channels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple


class LinearGeometry(NamedTuple):
    """``y = x W^T``: x [tokens, in_channels], W [out_channels, in_channels], dY [tokens, out_channels].

    `positions_per_sample` is the length of the last token axis of an input of rank >= 3, else 1.
    """

    tokens: int
    in_channels: int
    out_channels: int
    positions_per_sample: int = 1

    @classmethod
    def of(cls, input_shape: Sequence[int], out_features: int) -> LinearGeometry:
        """From the shape of an input [..., in_features]."""
        per_sample = input_shape[-2] if len(input_shape) > 2 else 1
        return cls(math.prod(input_shape[:-1]), input_shape[-1], out_features, per_sample)

    @property
    def positions(self) -> int:
        """T, the rows of the gradient matrix."""
        return self.tokens

    @property
    def groups(self) -> int:
        """1: a Linear layer has no groups."""
        return 1

    @property
    def weight_shape(self) -> tuple[int, int]:
        """Shape of W."""
        return self.out_channels, self.in_channels


# Stride, padding and dilation of a convolution, vertical first, and its groups, as `nn.Conv2d` has them.
Window = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], int]


def flat(window: Window) -> tuple[int, ...]:
    """The seven integers of a window. torch takes one number for both directions."""
    stride, padding, dilation = ((pair[0], pair[-1]) for pair in window[:3])
    return *stride, *padding, *dilation, window[3]


def pair(argument: str, value: int | Sequence[int]) -> tuple[int, int]:
    """(vertical, horizontal) of what torch takes as one number or two; TypeError or ValueError naming `argument`."""
    if isinstance(value, int):
        return value, value
    if not isinstance(value, Sequence) or not all(isinstance(item, int) for item in value):
        raise TypeError(f"{argument} must be an int or two of them; got {value!r}")
    if len(value) not in (1, 2):
        raise ValueError(f"{argument} must be an int or two of them; got {value!r}")
    return value[0], value[-1]


class Conv2dGeometry(NamedTuple):
    """A 2-D convolution: x [batch, in_channels, height, width] → y [batch, out_channels, out_height, out_width].

    `kernel`, `stride`, `padding` and `dilation` are (vertical, horizontal); padding is symmetric and of
    zeros: other paddings are applied to the input before the convolution. `channels_last` is the memory
    format of the input gradient and of the weight gradient.
    """

    batch: int
    in_channels: int
    height: int
    width: int
    out_channels: int
    out_height: int
    out_width: int
    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int
    channels_last: bool

    @classmethod
    def of(
        cls, input_shape: Sequence[int], weight_shape: Sequence[int], window: Sequence[int], channels_last: bool
    ) -> Conv2dGeometry:
        """From the shapes of x [N, C_in, H, W] and W [C_out, C_in / groups, R, S].

        window: stride, padding and dilation (two each, vertical first) and groups. Raises ValueError for a stride < 1.
        """
        n, c_in, h, w = input_shape
        c_out, _, r, s = weight_shape
        stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w, groups = window
        if stride_h < 1 or stride_w < 1:
            raise ValueError(f"stride must be positive; got {stride_h, stride_w}")
        p = (h + 2 * pad_h - dilation_h * (r - 1) - 1) // stride_h + 1
        q = (w + 2 * pad_w - dilation_w * (s - 1) - 1) // stride_w + 1
        return cls(
            n, c_in, h, w, c_out, p, q, (r, s), (stride_h, stride_w), (pad_h, pad_w), (dilation_h, dilation_w),
            groups, channels_last,
        )  # fmt: skip

    @property
    def positions(self) -> int:
        """T, the rows of the gradient matrix."""
        return self.batch * self.out_height * self.out_width

    @property
    def positions_per_sample(self) -> int:
        """Consecutive rows of the gradient matrix that belong to one sample."""
        return self.out_height * self.out_width

    @property
    def input_shape(self) -> tuple[int, int, int, int]:
        """Shape of x."""
        return self.batch, self.in_channels, self.height, self.width

    @property
    def weight_shape(self) -> tuple[int, int, int, int]:
        """Shape of W."""
        return self.out_channels, self.in_channels // self.groups, *self.kernel


Geometry = LinearGeometry | Conv2dGeometry
