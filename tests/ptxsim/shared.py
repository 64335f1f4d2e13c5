"""Shared memory of a wave of CTAs, with a happens-before race detector.

Each warp has a clock and knows, per warp of its CTA, up to which clock that warp's accesses happen before its own.
Barriers join and advance these vectors; `bar.warp.sync` orders the lanes of one warp. Per granule (the kernel's
narrowest shared access) the detector keeps the last write and each warp's last read as `clock << 16 | thread`. A pair
of accesses, one of them a write, by different threads and not ordered this way is a race. Bytes that a `cp.async`
writes belong to the copy from its issue until its thread has waited for its group: any access before is an async-race.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from .memory import GUARD, LIVE, READY, SHARED_BASE, Bad, Bytes

Array = NDArray[Any]


class Copies:
    """cp.async records of one wave: shared granules, issuing threads, and their group numbers."""

    def __init__(self, threads: int) -> None:
        self.group = np.zeros(threads, np.int64)  # the group that the next copy of a thread joins
        self.open: list[tuple[Array, Array, Array]] = []  # (granules [n, k], threads [n], groups [n])

    def add(self, granules: Array, threads: Array) -> None:
        self.open.append((granules, threads, self.group[threads]))

    def finish(self, threads: Array, allowed: int | None) -> list[tuple[Array, Array]]:
        """Completes all but the newest `allowed` committed groups of each thread (None: everything)."""
        limit = np.full(self.group.size, -1, np.int64)
        limit[threads] = self.group[threads] - allowed if allowed is not None else np.iinfo(np.int64).max
        done, still = [], []
        for granules, owners, groups in self.open:
            ready = groups < limit[owners]
            if ready.all():
                done.append((granules, owners))
            elif ready.any():
                done.append((granules[ready], owners[ready]))
                still.append((granules[~ready], owners[~ready], groups[~ready]))
            else:
                still.append((granules, owners, groups))
        self.open = still
        return done


class SharedMemory(Bytes):
    """`ctas` copies of a CTA's shared memory of `size` bytes whose live ranges are `extents` [(offset, bytes), ...]."""

    def __init__(self, ctas: int, threads: int, size: int, extents: list[tuple[int, int]], granule: int) -> None:
        self.stride = (size + GUARD + 127) // 128 * 128
        super().__init__(np.zeros(ctas * self.stride, np.uint8), np.zeros(ctas * self.stride, np.uint8))
        self.ctas, self.extents, self.granule = ctas, extents, granule
        self.shift = granule.bit_length() - 1
        self.need = READY  # LIVE: loads of bytes that nothing has written give 0xff (NaN in every float type)
        self.warps = threads // 32  # per CTA
        thread = np.arange(ctas * threads)
        self.origin = thread // threads * self.stride - SHARED_BASE
        self.local = thread % threads
        self.warp = thread // 32
        granules = self.size >> self.shift
        self.wrote = np.zeros(granules, np.int64)
        self.read = np.zeros(granules * self.warps, np.int64)
        self.atomic = np.zeros(granules, np.int64)
        self.pending = np.zeros(granules, bool)
        self.reset()

    def reset(self) -> None:
        """A fresh wave: nothing written, no history."""
        self.data[:] = 0xFF
        self.shadow[:] = 0
        image = self.shadow.reshape(self.ctas, self.stride)
        for offset, count in self.extents:
            image[:, offset : offset + count] = LIVE
        for history in (self.wrote, self.read, self.atomic, self.pending):
            history[:] = 0
        total = self.ctas * self.warps
        self.clock = np.ones(total, np.int64)
        self.known = np.zeros((total, self.warps), np.int64)
        self.copies = Copies(self.local.size)
        self.has_atomics = False

    # ---- ordering -------------------------------------------------------------------------------------------------

    def barrier(self, cta: int, warps: Array) -> None:
        """Orders everything before among `warps` (wave-wide numbers, all of one CTA)."""
        local = warps - cta * self.warps
        joined = self.known[warps].max(axis=0)
        joined[local] = np.maximum(joined[local], self.clock[warps])
        self.known[warps] = joined
        self.clock[warps] += 1

    def barrier_everywhere(self) -> None:
        """`barrier` for all warps of every CTA at once."""
        self.known.reshape(self.ctas, self.warps, self.warps)[:] = self.clock.reshape(self.ctas, 1, self.warps)
        self.clock += 1

    def warp_sync(self, warps: Array) -> None:
        self.known[warps, warps % self.warps] = self.clock[warps]
        self.clock[warps] += 1

    # ---- accesses -------------------------------------------------------------------------------------------------

    def offsets(self, address: Array, threads: Array, width: int) -> Array:
        """Shared addresses (any integer type) to byte offsets in this array, bounds-checked against the CTA's own
        window.
        """
        inside = address.astype(np.int64) - SHARED_BASE
        wrong = (inside < 0) | (inside > self.stride - width)
        if wrong.any():
            lane = int(np.flatnonzero(wrong)[0])
            raise Bad("out-of-bounds", lane, f"{width}-byte shared access at offset {int(inside[lane])}")
        return inside + (self.origin[threads] + SHARED_BASE)

    def granules(self, offset: Array, width: int) -> Array:
        first = (offset >> self.shift)[:, None]
        count = max(1, width >> self.shift)
        return first if count == 1 else first + np.arange(count)

    def load_at(self, address: Array, threads: Array, width: int) -> Array:
        offset = self.offsets(address, threads, width)
        values = self.load(offset, width, need=self.need)
        granules = self.granules(offset, width)
        self.check_writes(granules, threads)
        stamp = self.clock[self.warp[threads]] << 16 | self.local[threads]
        index = granules * self.warps + (self.local[threads] >> 5)[:, None]
        self.read[index] = stamp[:, None]
        return values

    def store_at(self, address: Array, threads: Array, width: int, values: Array) -> None:
        offset = self.offsets(address, threads, width)
        granules = self.granules(offset, width)
        self.check_all(granules, threads)
        self.store(offset, width, values)
        kept = self.views[width].take(offset >> (width.bit_length() - 1))
        lost = (kept.view(np.uint64) != values.view(np.uint64)) if width == 16 else kept != values
        if lost.any():
            lane = int(np.flatnonzero(lost)[0]) // (2 if width == 16 else 1)
            raise Bad("shared-race", lane, "two lanes of one store write different values to the same bytes")
        self.wrote[granules] = (self.clock[self.warp[threads]] << 16 | self.local[threads])[:, None]

    def copy_to(self, address: Array, threads: Array, width: int, values: Array) -> None:
        """The shared side of a cp.async: data lands now, but the bytes stay the copy's until it is waited for."""
        self.store_at(address, threads, width, values)
        granules = self.granules(self.offsets(address, threads, width), width)
        self.pending[granules] = True
        self.copies.add(granules, threads)

    def wait(self, threads: Array, allowed: int | None) -> None:
        for granules, owners in self.copies.finish(threads, allowed):
            self.pending[granules] = False
            self.wrote[granules] = (self.clock[self.warp[owners]] << 16 | self.local[owners])[:, None]

    def atomic_at(self, address: Array, threads: Array, width: int) -> Array:
        """Checks and records an atomic; returns the byte offsets for the caller to read and modify."""
        offset = self.offsets(address, threads, width)
        granules = self.granules(offset, width)
        self.check_all(granules, threads, against_atomics=False)
        self.load(offset, width)
        self.atomic[granules] = (self.clock[self.warp[threads]] << 16 | self.local[threads])[:, None]
        self.has_atomics = True
        return offset

    def check_writes(self, granules: Array, threads: Array, *, against_atomics: bool = True) -> None:
        if self.copies.open:
            busy = self.pending[granules]
            if busy.any():
                raise Bad(
                    "async-race",
                    int(np.flatnonzero(busy.any(axis=1))[0]),
                    "a cp.async to these bytes has not been waited for",
                )
        self._check(self.wrote[granules], threads, "write")
        if self.has_atomics and against_atomics:
            self._check(self.atomic[granules], threads, "atomic")

    def check_all(self, granules: Array, threads: Array, *, against_atomics: bool = True) -> None:
        self.check_writes(granules, threads, against_atomics=against_atomics)
        seen = self.read[granules[:, :, None] * self.warps + np.arange(self.warps)]
        known = self.known[self.warp[threads]][:, None, :]
        wrong = ((seen >> 16) > known) & ((seen & 0xFFFF) != self.local[threads][:, None, None])
        if wrong.any():
            lane, granule, warp = (int(i[0]) for i in np.nonzero(wrong))
            self._blame(lane, int(seen[lane, granule, warp]) & 0xFFFF, "read")

    def _check(self, seen: Array, threads: Array, what: str) -> None:
        writer = seen & 0xFFFF
        known = self.known[self.warp[threads][:, None], writer >> 5]
        wrong = ((seen >> 16) > known) & (writer != self.local[threads][:, None])
        if wrong.any():
            lane, granule = (int(i[0]) for i in np.nonzero(wrong))
            self._blame(lane, int(writer[lane, granule]), what)

    def _blame(self, lane: int, other: int, what: str) -> None:
        raise Bad("shared-race", lane, f"no barrier after the {what} by thread {other} of the same CTA")
