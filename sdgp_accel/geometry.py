"""The shapes a layer's backward works with, reduced to the [T, C] matrix view of the output gradient.

T counts the output positions (n-major, then p, then q; for Linear: tokens), C the output channels.
"""

from __future__ import annotations

from typing import NamedTuple


class LinearGeometry(NamedTuple):
    """``y = x W^T``: x [tokens, in_channels], W [out_channels, in_channels], dY [tokens, out_channels].

    `positions_per_sample` is the length of the last token axis of an input of rank >= 3, else 1.
    """

    tokens: int
    in_channels: int
    out_channels: int
    positions_per_sample: int = 1

    @property
    def positions(self) -> int:
        """T, the rows of the gradient matrix."""
        return self.tokens

    @property
    def groups(self) -> int:
        """1: a Linear layer has no groups."""
        return 1


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
