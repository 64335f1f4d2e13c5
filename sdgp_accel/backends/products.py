"""Launches of the sparse products: which of the two families of kernels takes a product, in which tilings, and what is
the same for all products of one shape.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import torch

from sdgp_accel.backends import CACHED_DECISIONS, gpu, tiles
from sdgp_accel.backends.sweep import DTYPE_NAMES, Storage, padded
from sdgp_accel.backends.tiles import Product, Tiling, rank_tilings
from sdgp_accel.geometry import Conv2dGeometry, Geometry, LinearGeometry

MAX_SIZE = (1 << 31) - 1024  # the products count positions and channels, rounded up to tiles, in 32 bits
# TMA's im2col mode has 8 signed bits for the corners of a 4-D tensor's box and strides of at most 8 (CUDA driver API,
# cuTensorMapEncodeIm2col); the corners go beyond padding and reach of the filter by less than a stride.
MAX_REACH, MAX_STRIDE = 120, 8
MAX_RESIDUES = 65535  # of a strided dgrad, which has a row of blocks for each: the y dimension of a grid
ALIGNMENT = 16  # bytes, of the weight or x: TMA's, and cp.async's copies


def too_large(geometry: Geometry) -> str | None:
    """Why the products of this layer cannot run on sparse tensor cores."""
    positions, columns = geometry.positions, padded(geometry.in_channels, tiles.TAP_COLUMNS)
    if isinstance(geometry, Conv2dGeometry):
        if (residues := math.prod(geometry.stride)) > MAX_RESIDUES:
            return f"sparse dgrad takes strides with at most {MAX_RESIDUES} residues; got {residues}"
        positions = max(positions, geometry.batch * geometry.height * geometry.width)
        columns *= math.prod(geometry.kernel)
    largest = max(positions, geometry.out_channels, columns)
    return f"sparse products count rows and columns in 32 bits; got {largest}" if largest > MAX_SIZE else None


def choose_family(geometry: Geometry, device: gpu.Device) -> tiles.Family:
    """The kernels that run this product on this GPU."""
    if geometry.in_channels % 8:  # the length of the rows of X, W and their gradients
        return tiles.SM80_ANY
    if device.wgmma and _tma_can_reach(geometry):
        return tiles.SM90
    if device.shared_bytes is None:
        fits = device.capability not in tiles.SMALL_SHARED_MEMORY
    else:
        fits = device.shared_bytes >= tiles.LARGEST_SHARED_BYTES
    return tiles.SM80 if fits else tiles.SM80_SMALL


def _tma_can_reach(geometry: Geometry) -> bool:
    if isinstance(geometry, LinearGeometry) or _is_pointwise(geometry):
        return True
    filter_reach = (d * (k - 1) for d, k in zip(geometry.dilation, geometry.kernel, strict=True))
    return max(*geometry.padding, *filter_reach) <= MAX_REACH and max(geometry.stride) <= MAX_STRIDE


def rank(
    geometry: Geometry, product: Product, device: gpu.Device, family: tiles.Family | None = None
) -> tuple[Tiling, ...]:
    """The tilings that run this product on this GPU, best predicted first. family: default the one that fits."""
    family = family or choose_family(geometry, device)
    c_in, conv, shares = geometry.in_channels, False, True
    if isinstance(geometry, Conv2dGeometry) and not _is_pointwise(geometry):
        conv = True
        c_in = padded(c_in, family.tap_columns)
        # A strided dgrad is several products; and blocks of k begin anew with each tap.
        shares = product == "wgrad" or (geometry.stride == (1, 1) and geometry.out_channels % tiles.TILE_K == 0)
    m, n, k = _product_size(geometry, product, c_in)
    return rank_tilings(family, product, m, n, k, device.multiprocessors, conv, shares)


def _product_size(geometry: Geometry, product: Product, c_in: int) -> tuple[int, int, int]:
    """(m, n, k) of dgrad or wgrad as one product; of a convolution's, the taps of the filter included.

    A strided dgrad meets a part of the taps at each pixel: on average one of stride x stride.
    """
    c_out, taps, met, inputs = geometry.out_channels, 1, 1, geometry.positions
    if isinstance(geometry, Conv2dGeometry):
        taps = geometry.kernel[0] * geometry.kernel[1]
        met = -(-taps // (geometry.stride[0] * geometry.stride[1]))
        inputs = geometry.batch * geometry.height * geometry.width
    return (inputs, c_in, c_out * met) if product == "dgrad" else (c_out, c_in * taps, geometry.positions)


class Launch(NamedTuple):
    """What is the same in every product of one shape: the launch but for addresses, and what to allocate.

    metadata_at: in the operand's `Storage`. workspace: bytes that the kernel needs. shape, strides: of the result; a
    convolution's is channels_last. final: False where the layer wants it contiguous.
    """

    kernel: Any
    metadata_at: int
    workspace: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    final: bool

    def run(self, values: int, b: int, out: int, workspace: int, stream: int) -> None:
        """Multiply the operand whose values begin at `values` by the weight or x at `b`, to `out` (or add to it).

        All of them addresses; b and out in one block, channels innermost. stream: of the current device.
        """
        self.kernel(values, values + self.metadata_at, b, out, workspace, stream)


@functools.lru_cache(maxsize=CACHED_DECISIONS)
def plan_product(
    kernels: Any,
    geometry: Geometry,
    product: Product,
    dtype: torch.dtype,
    device: torch.device,
    tiling: Tiling | None,
    out_dtype: torch.dtype,
    accumulate: bool = False,
    is_aligned: bool = True,
) -> Launch | None:
    """The launch with `tiling`, by default the best predicted; None where there is no sparse product.

    is_aligned: whether the weight or x begins at a multiple of 16 bytes; otherwise kernels that need not.
    """
    if tiling is None or not is_aligned:
        if too_large(geometry):
            return None
        tiling = rank(geometry, product, gpu.device_facts(device), None if is_aligned else tiles.SM80_ANY)[0]
    c_in, c_out, positions = geometry.in_channels, geometry.out_channels, geometry.positions
    storage = Storage.of(1 if product == "dgrad" else 0, positions, c_out)
    arguments: dict[str, Any] = {
        "splits": tiling.splits, "owned_blocks": tiling.owned_steps, "group_n": tiling.group_n,
        "cluster_size": tiling.cluster_size,
        "sm_count": gpu.device_facts(device).multiprocessors, "out_is_float": out_dtype == torch.float32,
        "accumulate": accumulate, "padded_k": storage.k,
    }  # fmt: skip
    instance = f"{product}_{DTYPE_NAMES[dtype]}_{tiling.tile}"
    final = True
    if isinstance(geometry, Conv2dGeometry):
        g = geometry
        shape: tuple[int, ...] = g.input_shape if product == "dgrad" else g.weight_shape
        _, channels, height, width = shape
        strides: tuple[int, ...] = (channels * height * width, 1, channels * width, channels)
        final = g.channels_last
    else:
        shape, strides = (positions, c_in) if product == "dgrad" else geometry.weight_shape, (c_in, 1)
    if isinstance(geometry, LinearGeometry) or _is_pointwise(geometry):
        m, k = (positions, c_out) if product == "dgrad" else (c_out, positions)
        kernel = kernels.SparseGemm(f"sdgp_{tiling.family}_{instance}", m=m, n=c_in, k=k, **arguments)
    else:
        kernel = kernels.SparseConv(
            f"sdgp_{tiling.family}_conv_{instance}",
            shape=(g.batch, g.height, g.width, c_in, g.out_height, g.out_width, c_out, *g.kernel),
            window=(*g.stride, *g.padding, *g.dilation), **arguments,
        )  # fmt: skip
    workspace = tiles.workspace_bytes(tiling, math.prod(shape), gpu.device_facts(device).multiprocessors)
    return Launch(kernel, storage.metadata_at, workspace, shape, strides, final)


def _is_pointwise(geometry: Conv2dGeometry) -> bool:
    return geometry.kernel == (1, 1) and geometry.stride == (1, 1) and geometry.padding == (0, 0)
