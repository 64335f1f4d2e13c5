"""Tensor maps: the 128 bytes that the shim's cuTensorMapEncodeTiled fills, and which bytes a box of one touches."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
MAGIC = 0x50545854
_ELEMENT_BYTES = {0: 1, 1: 2, 2: 4, 3: 4, 4: 8, 5: 8, 6: 2, 7: 4, 8: 8, 9: 2, 10: 4, 11: 4, 12: 4}
_UNITS = {0: 1, 1: 2, 2: 4, 3: 8}  # CU_TENSOR_MAP_SWIZZLE_* -> 16-byte units per swizzled row


@dataclass(frozen=True)
class TensorMap:
    """A tiled map; dimensions, strides and box innermost first, strides in bytes from dimension 1 on."""

    element: int
    address: int
    extents: tuple[int, ...]
    strides: tuple[int, ...]
    box: tuple[int, ...]
    units: int

    @classmethod
    def decode(cls, raw: bytes) -> TensorMap | None:
        magic, kind, rank, swizzle, _, address = struct.unpack_from("<IBBBBQ", raw)
        if magic != MAGIC:
            return None
        extents = struct.unpack_from("<5I", raw, 16)
        strides, box = struct.unpack_from("<4Q", raw, 40), struct.unpack_from("<5H", raw, 72)
        return cls(_ELEMENT_BYTES[kind], address, extents[:rank], strides[: rank - 1], box[:rank], _UNITS[swizzle])

    @property
    def bytes(self) -> int:
        return int(np.prod(self.box)) * self.element

    def place(self, start: int) -> Array:
        """Shared addresses of the box's 16-byte units in order of the tensor, for a box at `start`."""
        address = start + 16 * np.arange(self.bytes // 16)
        return address ^ ((address >> 7 & (self.units - 1)) << 4)

    def elements(self, coordinates: list[int]) -> tuple[Array, Array]:
        """Addresses of the box's elements, in order, and which of them lie inside the tensor."""
        grids = np.meshgrid(*(np.arange(n) + c for n, c in zip(self.box, coordinates, strict=True)), indexing="ij")
        address, inside = np.full(grids[0].shape, self.address, np.int64), np.ones(grids[0].shape, bool)
        for grid, extent, stride in zip(grids, self.extents, (self.element, *self.strides), strict=True):
            address += grid * stride
            inside &= (grid >= 0) & (grid < extent)
        return address.reshape(-1, order="F"), inside.reshape(-1, order="F")
