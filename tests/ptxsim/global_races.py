"""Races on global memory between the CTAs of one launch: bytes that one writes and another reads or writes, with
nothing that orders the two. CTAs of a cluster count as one.

Order comes from atomics that return a value, and from acquire, release and volatile accesses: each passes on, at its
address, everything its CTA knows, and learns what was passed on there before. (Fences are taken for granted.) Other
atomics and TMA reductions may meet each other, not ordinary accesses. A kernel's end orders everything, but for kernels
that overlap the one before them (programmatic dependent launch): until a CTA has executed griddepcontrol.wait, it may
not touch what that one writes, or write what it reads, nor what those before did that it overlaps in turn.

Following every access takes time and 8 bytes per byte, so it is asked for: `SimEngine.following_global_memory`.
Per 2 bytes of global memory the detector keeps the last write and the last read as launch, CTA and the CTA's clock.
Accesses of single bytes are not followed.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from .memory import Bad, GlobalMemory, Region, lazy_bytes

Array = NDArray[Any]

SHIFT, FIELD = 20, (1 << 20) - 1  # stamp: launch << 41 | atomic << 40 | cta << 20 | clock
ATOMIC, LAUNCH = 1 << 40, 41
SEVERAL = FIELD  # in place of a CTA: several have read


def _history(granules: int) -> Array:
    return np.zeros(granules, np.int64) if granules < 1 << 20 else lazy_bytes(granules * 8).view(np.int64)


class GlobalRaces:
    """The history of one device's global memory."""

    def __init__(self, memory: GlobalMemory) -> None:
        self.memory = memory
        self.follows = False
        self.launch = 0
        self.histories: dict[int, tuple[Region, Array, Array]] = {}  # by region: last writes and reads
        self.running = 0  # the first launch that may not have ended when this one begins
        self.begin(1)

    def begin(self, ctas: int, *, overlaps: bool = False) -> None:
        """A launch of this many CTAs (clusters)."""
        if not overlaps:
            self.running = self.launch + 1
        self.launch += 1
        self.waited = np.zeros(ctas if self.follows else 1, bool)
        self.clock = np.ones(ctas if self.follows else 1, np.int64)
        self.known: Array | None = None  # [cta, cta]: up to which clock of the second the first knows; None: nothing
        self.passed_on: dict[int, Array] = {}  # by address
        self.histories = {key: found for key, found in self.histories.items() if found[0] in self.memory.regions}

    def wait(self, ctas: Array) -> None:
        """These have seen the kernels before end."""
        if self.follows:
            self.waited[ctas] = True

    def synchronise(self, address: Array, ctas: Array) -> None:
        """Accesses that order what is before them and what is after."""
        if not self.follows:
            return
        if self.known is None:
            self.known = np.zeros((self.clock.size, self.clock.size), np.int64)
        for where, cta in zip(address.tolist(), ctas.tolist(), strict=True):
            before = self.passed_on.get(where)
            if before is not None:
                np.maximum(self.known[cta], before, out=self.known[cta])
            self.known[cta, cta] = self.clock[cta]
            self.passed_on[where] = self.known[cta].copy()
            self.clock[cta] += 1

    def access(self, address: Array, ctas: Array, width: int, *, write: bool, atomic: bool = False) -> None:
        """Checks and records; raises Bad with the lane."""
        if not self.follows or width < 2:
            return
        left = np.arange(address.size)
        while left.size:
            region = self.memory.find(int(address[left[0]]))
            if region is None:
                return  # the access itself is a fault
            offset = address[left] - region.base
            inside = (offset >= 0) & (offset < region.size)
            lanes = left[inside]
            self._access(region, offset[inside], lanes, ctas[lanes], width, write, atomic)
            left = left[~inside]

    def _access(
        self, region: Region, offset: Array, lanes: Array, ctas: Array, width: int, write: bool, atomic: bool
    ) -> None:
        if id(region) not in self.histories:
            self.histories[id(region)] = (region, _history(region.size // 2 + 8), _history(region.size // 2 + 8))
        _, wrote, read = self.histories[id(region)]
        granules = (offset >> 1)[:, None] + np.arange(width // 2)
        stamp = self.launch << LAUNCH | ctas << SHIFT | self.clock[ctas]
        if atomic:
            stamp = stamp | ATOMIC
        last = wrote[granules]
        self._check(last, ctas, lanes, "written", atomic)
        if not write:
            before = read[granules]
            other = (before >> LAUNCH == self.launch) & (before >> SHIFT & FIELD != ctas[:, None])
            several = self.launch << LAUNCH | SEVERAL << SHIFT | before & stamp[:, None] & ATOMIC
            read[granules] = np.where(other, several, stamp[:, None])
            return
        self._check(read[granules], ctas, lanes, "read", atomic)
        wrote[granules] = stamp[:, None]
        together = wrote[granules] != stamp[:, None]
        if together.any() and not atomic:
            lane = int(np.flatnonzero(together.any(axis=1))[0])
            raise Bad("global-race", int(lanes[lane]), "two CTAs write these bytes, and nothing orders them")

    def _check(self, last: Array, ctas: Array, lanes: Array, what: str, atomic: bool) -> None:
        launch, other = last >> LAUNCH, last >> SHIFT & FIELD
        early = (launch >= self.running) & (launch < self.launch) & ~self.waited[ctas][:, None]
        if early.any():
            lane = int(np.nonzero(early)[0][0])
            detail = f"{what} by a kernel that this one overlaps, and no griddepcontrol.wait before"
            raise Bad("global-race", int(lanes[lane]), detail)
        wrong = (launch == self.launch) & (other != ctas[:, None])
        if not wrong.any():
            return
        if atomic:
            wrong &= last & ATOMIC == 0
        if self.known is not None:
            ordered = self.known[ctas[:, None], np.minimum(other, self.clock.size - 1)] >= last & FIELD
            # Which of several readers are ordered is not kept: a CTA that has synchronised is believed.
            ordered |= (other == SEVERAL) & (self.known[ctas].sum(axis=1) > 0)[:, None]
            wrong &= ~ordered
        if wrong.any():
            lane, granule = (int(i[0]) for i in np.nonzero(wrong))
            who = int(other[lane, granule])
            by = "other CTAs" if who == SEVERAL else f"CTA (or cluster) {who}"
            raise Bad("global-race", int(lanes[lane]), f"{what} by {by} in this launch, and nothing orders the two")
