"""Tensor maps: the 128 bytes that the shim's cuTensorMapEncode* fill, and which bytes a box of one touches."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .memory import Bad
from .numerics import bf16_to_f32, f32_to_bf16

Array = NDArray[Any]
MAGIC = 0x50545854
_ELEMENT_BYTES = {0: 1, 1: 2, 2: 4, 3: 4, 4: 8, 5: 8, 6: 2, 7: 4, 8: 8, 9: 2, 10: 4, 11: 4, 12: 4}
# What reductions compute in, by CUtensorMapDataType; bfloat16 (9) has no NumPy type.
_NUMBERS = {2: np.uint32, 3: np.int32, 4: np.uint64, 5: np.int64, 6: np.float16, 7: np.float32, 8: np.float64}
_REDUCTIONS = {"add": np.add, "min": np.minimum, "max": np.maximum}
_UNITS = {0: 1, 1: 2, 2: 4, 3: 8}  # CU_TENSOR_MAP_SWIZZLE_* -> 16-byte units per swizzled row


@dataclass(frozen=True)
class TensorMap:
    """A tiled or im2col map; dimensions, strides and box innermost first, strides in bytes from dimension 1 on.

    im2col: the box is (channels, pixels), `lower` and `upper` are the corners of the pixel box and `steps` its strides.
    """

    element: int  # bytes
    kind: int  # CUtensorMapDataType
    address: int
    extents: tuple[int, ...]
    strides: tuple[int, ...]
    box: tuple[int, ...]
    units: int
    is_im2col: bool
    lower: tuple[int, ...]
    upper: tuple[int, ...]
    steps: tuple[int, ...]

    @classmethod
    def decode(cls, raw: bytes) -> TensorMap | None:
        magic, kind, rank, swizzle, _, address = struct.unpack_from("<IBBBBQ", raw)
        if magic != MAGIC:
            return None
        extents = struct.unpack_from("<5I", raw, 16)
        strides, box = struct.unpack_from("<4Q", raw, 40), struct.unpack_from("<5H", raw, 72)
        lower, upper = struct.unpack_from("<3h", raw, 82), struct.unpack_from("<3h", raw, 88)
        *steps, is_im2col = struct.unpack_from("<6B", raw, 94)
        return cls(
            _ELEMENT_BYTES[kind],
            kind,
            address,
            extents[:rank],
            strides[: rank - 1],
            box[: 2 if is_im2col else rank],
            _UNITS[swizzle],
            bool(is_im2col),
            lower[: rank - 2],
            upper[: rank - 2],
            tuple(steps[1 : rank - 1]),
        )

    @property
    def rank(self) -> int:
        return len(self.extents)

    @property
    def bytes(self) -> int:
        return int(np.prod(self.box)) * self.element

    def reduce(self, name: str, old: Array, new: Array) -> Array | None:
        """`name` of two arrays of bit patterns, rounded to the element's type; None where TMA has no such reduction."""
        function = _REDUCTIONS.get(name)
        if function is None or (self.kind != 9 and self.kind not in _NUMBERS):
            return None
        if self.kind == 9:
            result: Array = f32_to_bf16(function(bf16_to_f32(old), bf16_to_f32(new)))
            return result
        number = _NUMBERS[self.kind]
        return np.asarray(function(old.view(number), new.view(number))).view(old.dtype)

    def place(self, start: int) -> Array:
        """Shared addresses of the box's 16-byte units in order of the tensor, for a box at `start`."""
        address = start + 16 * np.arange(self.bytes // 16)
        return address ^ ((address >> 7 & (self.units - 1)) << 4)

    def elements(self, coordinates: list[int], offsets: list[int]) -> tuple[Array, Array]:
        """Addresses of the box's elements, in order, and which of them lie inside the tensor.

        `offsets` (im2col) are added to the coordinates of each pixel: the position in the filter.
        """
        if self.is_im2col:
            pixels = self._pixels(coordinates[1:], offsets)
            channel = np.arange(self.box[0]) + coordinates[0]
            grids = [np.broadcast_to(channel[:, None], (self.box[0], self.box[1])), *(p[None, :] for p in pixels)]
        else:
            ranges = (np.arange(n) + c for n, c in zip(self.box, coordinates, strict=True))
            grids = np.meshgrid(*ranges, indexing="ij")
        address, inside = np.full(grids[0].shape, self.address, np.int64), np.ones(grids[0].shape, bool)
        for grid, extent, stride in zip(grids, self.extents, (self.element, *self.strides), strict=True):
            address += grid * stride
            inside &= (grid >= 0) & (grid < extent)
        return address.reshape(-1, order="F"), inside.reshape(-1, order="F")

    def _pixels(self, start: list[int], offsets: list[int]) -> list[Array]:
        """Coordinates (w, h, ..., n) of the column's pixels.

        The pixel box spans `lower` to extent - 1 + `upper`, in steps; from `start` on, pixels follow each other in it,
        w fastest, then on into the next image.
        """
        counts = [
            (extent - 1 + upper - lower) // step + 1
            for extent, upper, lower, step in zip(self.extents[1:-1], self.upper, self.lower, self.steps, strict=True)
        ]
        index = start[-1]
        for position, count, lower, step in reversed(list(zip(start, counts, self.lower, self.steps, strict=False))):
            if (position - lower) % step or not 0 <= (position - lower) // step < count:
                raise Bad("launch", 0, f"im2col start {start} is not a pixel of the box")
            index = index * count + (position - lower) // step
        indices = index + np.arange(self.box[1])
        result = []
        for count, lower, step, offset in zip(counts, self.lower, self.steps, offsets, strict=True):
            result.append(indices % count * step + lower + offset)
            indices = indices // count
        return [*result, indices]
