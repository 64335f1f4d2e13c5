"""Geometries against the shapes that torch itself produces."""

from __future__ import annotations

import itertools

import pytest
import torch

from sdgp_accel.geometry import Conv2dGeometry, LinearGeometry, flat


@pytest.mark.parametrize("groups", [1, 2])
def test_conv2d_output_size_is_torchs(groups: int) -> None:
    for kernel, stride, padding, dilation in itertools.product(
        ((1, 1), (3, 2)), ((1, 1), (2, 3)), ((0, 0), (2, 1)), ((1, 1), (2, 1))
    ):
        x, weight = torch.empty(2, 4, 9, 11, device="meta"), torch.empty(6, 4 // groups, *kernel, device="meta")
        y = torch.conv2d(x, weight, None, stride, padding, dilation, groups)
        geometry = Conv2dGeometry.of(x.shape, weight.shape, (*stride, *padding, *dilation, groups), False)
        assert (geometry.batch, geometry.out_channels, geometry.out_height, geometry.out_width) == y.shape
        assert geometry.positions == y.numel() // 6
        assert geometry.positions_per_sample == y.numel() // 12
        assert (geometry.input_shape, geometry.weight_shape) == (x.shape, weight.shape)


@pytest.mark.parametrize(
    ("shape", "tokens", "per_sample"),
    [((8,), 1, 1), ((5, 8), 5, 1), ((3, 5, 8), 15, 5), ((2, 3, 5, 8), 30, 5), ((0, 8), 0, 1)],
)
def test_linear(shape: tuple[int, ...], tokens: int, per_sample: int) -> None:
    geometry = LinearGeometry.of(shape, 6)
    assert geometry == (tokens, 8, 6, per_sample)
    assert (geometry.positions, geometry.groups) == (tokens, 1)


def test_windows_are_flattened_vertical_first() -> None:
    assert flat(((1, 2), (3,), (4, 5), 6)) == (1, 2, 3, 3, 4, 5, 6)
    for window in ((0, 1, 0, 0, 1, 1, 1), (1, 0, 0, 0, 1, 1, 1)):
        with pytest.raises(ValueError, match="stride must be positive"):
            Conv2dGeometry.of((1, 2, 8, 8), (4, 2, 3, 3), window, False)
