"""Simulated memories with byte-level shadows.

Every space is a byte array with typed views plus a shadow byte per byte: 0 = not allocated, LIVE = allocated but never
written, READY = written. One gather of the shadow answers "in bounds?" and "initialised?" together. Global memory is
the host's own: an arena (cudaMalloc; every block between guard bytes) and foreign buffers registered in place.
"""

from __future__ import annotations

import bisect
import ctypes
import mmap
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
LIVE, READY = 1, 3
SHARED_BASE = 1024  # first address of the shared window (the first KiB is the system's on real devices)
SHARED_WINDOW, LOCAL_WINDOW, PARAM_WINDOW = 1 << 60, 2 << 60, 3 << 60  # generic addresses
GUARD = 256
REUSE = 1 << 26
_MAP_NORESERVE = 0x4000

# 16-byte elements travel as complex128: numpy copies them bit for bit.
ELEMENT = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64, 16: np.complex128}
_SHIFT = {1: 0, 2: 1, 4: 2, 8: 3, 16: 4}
_FULL = {n: np.array(int.from_bytes(bytes([READY]) * min(n, 8), "little"), ELEMENT[min(n, 8)]) for n in ELEMENT}
_WRITTEN = {**_FULL, 16: np.full(16, READY, np.uint8).view(np.complex128)[0]}
_LIVE = {n: np.array(int.from_bytes(bytes([LIVE]) * min(n, 8), "little"), ELEMENT[min(n, 8)]) for n in ELEMENT}


class Bad(Exception):
    """A refused access: the kind of fault and which of the given lanes committed it first."""

    def __init__(self, kind: str, lane: int, detail: str) -> None:
        super().__init__(detail)
        self.kind, self.lane, self.detail = kind, lane, detail


class Bytes:
    """A byte array with a shadow, addressed by byte offsets (int64 arrays)."""

    def __init__(self, data: Array, shadow: Array) -> None:
        self.size = data.size
        self.data, self.shadow = data, shadow
        self.views = {n: data.view(t) for n, t in ELEMENT.items()}
        self.shadows = {n: shadow.view(t) for n, t in ELEMENT.items()}

    def index(self, offset: Array, width: int) -> Array:
        """Element indices of aligned accesses of `width` bytes."""
        if width == 1:
            return offset
        wrong = offset & (width - 1)
        if wrong.any():
            lane = int(np.flatnonzero(wrong)[0])
            raise Bad("misaligned", lane, f"{width}-byte access, address is {int(wrong[lane])} modulo {width}")
        return offset >> _SHIFT[width]

    def load(self, offset: Array, width: int, *, need: int = READY) -> Array:
        """Loads elements whose bytes must all be READY, or at least LIVE."""
        index = self.index(offset, width)
        shadow = self.shadows[width].take(index)
        seen = shadow.view(np.uint64) if width == 16 else shadow
        if need == LIVE:
            seen = seen | _FULL[width] - _LIVE[width]
        if (seen != _FULL[width]).any():
            self.blame(offset, width)
        return self.views[width].take(index)

    def store(self, offset: Array, width: int, values: Array) -> None:
        index = self.index(offset, width)
        shadow = self.shadows[width].take(index)
        seen = shadow.view(np.uint64) if width == 16 else shadow
        if ((seen & _LIVE[width]) != _LIVE[width]).any():
            self.blame(offset, width)
        self.views[width][index] = values
        self.shadows[width][index] = _WRITTEN[width]

    def blame(self, offset: Array, width: int) -> None:
        state = self.shadow[offset[:, None] + np.arange(width)]
        dead = ((state & LIVE) == 0).any(axis=1)
        if dead.any():
            raise Bad("out-of-bounds", int(np.flatnonzero(dead)[0]), f"{width}-byte access")
        cold = (state != READY).any(axis=1)
        raise Bad("uninitialised-read", int(np.flatnonzero(cold)[0]), f"{width}-byte load")


def lazy_bytes(size: int) -> Array:
    """Zeros that take memory only where they are touched, a page at a time."""
    mapping = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE)
    mapping.madvise(mmap.MADV_NOHUGEPAGE)
    return np.frombuffer(mapping, np.uint8)


def _host_bytes(address: int, size: int) -> Array:
    return np.frombuffer((ctypes.c_uint8 * size).from_address(address), np.uint8)


class Region(Bytes):
    def __init__(self, base: int, data: Array, shadow: Array) -> None:
        super().__init__(data, shadow)
        self.base = base


class GlobalMemory:
    """The device's global memory: an arena for allocations of the simulated runtime and registered host buffers."""

    def __init__(self, arena_bytes: int = 8 << 30) -> None:
        data, shadow = lazy_bytes(arena_bytes), lazy_bytes(arena_bytes)
        self.arena = Region(data.ctypes.data, data, shadow)
        self.regions: list[Region] = [self.arena]
        self.last = self.arena
        self.live: dict[int, int] = {}
        self.top = GUARD
        self.bottom_of_permanent = arena_bytes
        from .global_races import GlobalRaces  # it needs the classes above

        self.races = GlobalRaces(self)

    def allocate(self, size: int, *, permanent: bool = False) -> int:
        """`size` uninitialised bytes, 256-byte aligned, between guard bytes; `permanent` ones cannot be freed."""
        padded = (size + 2 * GUARD - 1) // GUARD * GUARD
        if self.top + padded > self.bottom_of_permanent:
            raise MemoryError(f"arena of {self.arena.size} bytes exhausted")
        if permanent:
            self.bottom_of_permanent -= padded
            offset = self.bottom_of_permanent
        else:
            offset = self.top
            self.top += padded
            self.live[self.arena.base + offset] = size
        self.arena.shadow[offset : offset + size] = LIVE
        return self.arena.base + offset

    def free(self, address: int) -> None:
        """Freed memory is used again only when REUSE bytes of it have gathered: until then, touching it is a fault."""
        size = self.live.pop(address)
        offset = address - self.arena.base
        self.arena.shadow[offset : offset + size] = 0
        end = max((a + n for a, n in self.live.items()), default=self.arena.base) - self.arena.base
        if self.top - end > REUSE:
            self.top = (end + 2 * GUARD - 1) // GUARD * GUARD

    def mark(self, address: int, size: int, state: int) -> None:
        """Declares bytes written (READY) or never written (LIVE)."""
        region = self.find(address)
        if region is None:
            raise KeyError(f"address {address:#x} is not in any allocation")
        start = address - region.base
        region.shadow[start : start + size] = state

    def register(self, address: int, size: int, state: int = READY) -> None:
        """Makes host memory that somebody else owns accessible to kernels."""
        base, end = address & ~15, (address + size + 15) & ~15
        if end == base:
            return
        shadow = np.zeros(end - base, np.uint8)
        shadow[address - base : address - base + size] = state
        self.unregister(address)
        bisect.insort(self.regions, Region(base, _host_bytes(base, end - base), shadow), key=lambda r: r.base)

    def reserve(self, size: int) -> Array:
        """`size` bytes of which none can be accessed until `mark` says so; `unregister` forgets them.

        Only pages that are touched or marked take memory, so that `size` may be larger than the machine's memory.
        """
        padded = (size + 15) & ~15
        data = lazy_bytes(padded)
        address = data.ctypes.data
        bisect.insort(self.regions, Region(address, data, lazy_bytes(padded)), key=lambda r: r.base)
        return data[:size]

    def unregister(self, address: int) -> None:
        self.regions = [r for r in self.regions if r is self.arena or r.base != address & ~15]
        self.last = self.arena

    def find(self, address: int) -> Region | None:
        i = bisect.bisect_right(self.regions, address, key=lambda r: r.base) - 1
        if i >= 0 and address < self.regions[i].base + self.regions[i].size:
            return self.regions[i]
        return None

    def _split(self, address: Array, width: int) -> list[tuple[Region, Array]]:
        parts, left = [], np.ones(address.size, bool)
        while left.any():
            lane = int(np.flatnonzero(left)[0])
            region = self.find(int(address[lane]))
            if region is None:
                raise Bad("out-of-bounds", lane, f"{width}-byte access at {int(address[lane]):#x}: no allocation there")
            mine = left & (address >= region.base) & (address + width <= region.base + region.size)
            if not mine[lane]:
                raise Bad("out-of-bounds", lane, f"{width}-byte access across the end of an allocation")
            parts.append((region, np.flatnonzero(mine)))
            left &= ~mine
        return parts

    def load(self, address: Array, width: int) -> Array:
        """Loads `width` bytes per int64 address."""
        region = self.last
        offset = address - region.base
        if (offset.view(np.uint64) <= region.size - width).all():
            return region.load(offset, width)
        parts = self._split(address, width)
        self.last = parts[0][0]
        out = np.empty(address.size, ELEMENT[width])
        for part, lanes in parts:
            try:
                out[lanes] = part.load(address[lanes] - part.base, width)
            except Bad as bad:
                raise Bad(bad.kind, int(lanes[bad.lane]), bad.detail) from None
        return out

    def store(self, address: Array, width: int, values: Array) -> None:
        region = self.last
        offset = address - region.base
        if (offset.view(np.uint64) <= region.size - width).all():
            region.store(offset, width, values)
            return
        parts = self._split(address, width)
        self.last = parts[0][0]
        for part, lanes in parts:
            try:
                part.store(address[lanes] - part.base, width, values[lanes])
            except Bad as bad:
                raise Bad(bad.kind, int(lanes[bad.lane]), bad.detail) from None
