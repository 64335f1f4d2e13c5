"""Shared memory of a wave of CTAs, with a happens-before race detector.

Every warp, and every asynchronous agent that reads or writes shared memory by itself (a CTA's TMA loads, its TMA
stores, the tensor cores of each warpgroup), has a clock. Each warp knows, per warp and agent of its cluster, up to
which clock their accesses happen before its own. Barriers join and advance these vectors; `bar.warp.sync` orders the
lanes of one warp; an mbarrier carries them from those that arrive to those that wait.

Per granule (the kernel's narrowest shared access) the detector keeps the last write and each column's last read as
`clock << 16 | column << 5 | lane`. A pair of accesses, one of them a write, by different threads and not ordered this
way is a race. Bytes that a `cp.async` writes belong to the copy from its issue until its thread has waited for its
group: any access before is an async-race. Tensor cores and TMA read through the async proxy: what ordinary stores
wrote must have passed a `fence.proxy.async`, which a second set of vectors (`fenced`) tracks.

What threads of other CTAs do to a CTA's memory has to happen before it exits: its memory is another's from then on.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from .memory import GUARD, LIVE, READY, SHARED_BASE, Bad, Bytes

Array = NDArray[Any]

# A shared::cluster address is offset | (rank + 1) << 24; plain offsets mean the own CTA. On a GPU it is the rank itself
# that stands there, in the address of every variable of a kernel in clusters.
RANK_SHIFT = 24
TMA_LOAD, TMA_STORE, TENSOR = 0, 1, 2  # agents of a CTA; TENSOR + i for warpgroup i
_PROXY = "the async proxy reads what ordinary stores wrote: no fence.proxy.async in between"


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
    """`ctas` copies of a CTA's shared memory of `size` bytes whose live ranges are `extents` [(offset, bytes), ...].

    `threads` per CTA is a multiple of 32, `cluster` CTAs share a clock domain, `agents` says whether asynchronous
    agents take part.
    """

    def __init__(
        self,
        ctas: int,
        threads: int,
        size: int,
        extents: list[tuple[int, int]],
        granule: int,
        cluster: int = 1,
        agents: bool = False,
    ) -> None:
        self.stride = (size + GUARD + 127) // 128 * 128
        super().__init__(np.zeros(ctas * self.stride, np.uint8), np.zeros(ctas * self.stride, np.uint8))
        self.ctas, self.extents, self.granule, self.cluster = ctas, extents, granule, cluster
        self.shift = granule.bit_length() - 1
        self.need = READY  # LIVE: loads of bytes that nothing has written give 0xff (NaN in every float type)
        self.warps = threads // 32  # per CTA
        self.agents = TENSOR + -(-self.warps // 4) if agents else 0
        self.per_cta = self.warps + self.agents
        self.columns = cluster * self.per_cta
        thread = np.arange(ctas * threads)
        self.cta = thread // threads
        self.warp = thread // 32
        self.column_of_warp = np.arange(ctas * self.warps) // self.warps % cluster * self.per_cta
        self.column_of_warp += np.arange(ctas * self.warps) % self.warps
        self.name = self.column_of_warp[self.warp] << 5 | thread % 32  # a thread's identity in a stamp
        granules = self.size >> self.shift
        self.wrote = np.zeros(granules, np.int64)
        self.read = np.zeros(granules * self.columns, np.int64)
        self.atomic = np.zeros(granules, np.int64)
        self.pending = np.zeros(granules, bool)
        self.left = np.zeros(ctas, bool)  # CTAs that have exited
        self.visits = np.zeros((ctas, self.columns), np.int64)  # latest accesses by threads of the cluster's others
        self.reset()

    def reset(self) -> None:
        """A fresh wave: nothing written, no history."""
        self.data[:] = 0xFF
        self.shadow[:] = 0
        image = self.shadow.reshape(self.ctas, self.stride)
        for offset, count in self.extents:
            image[:, offset : offset + count] = LIVE
        for history in (self.wrote, self.read, self.atomic, self.pending, self.left, self.visits):
            history[:] = 0
        total = self.ctas * self.warps
        self.clock = np.ones(total, np.int64)
        self.agent_clock = np.ones((self.ctas, max(self.agents, 1)), np.int64)
        self.known = np.zeros((total, self.columns), np.int64)
        self.fenced = np.zeros((total, self.columns), np.int64)
        self.initialised = np.zeros((total, self.columns), np.int64)
        self.copies = Copies(self.warp.size)
        self.has_atomics = False

    # ---- ordering -------------------------------------------------------------------------------------------------

    def release(self, warps: Array) -> tuple[Array, Array]:
        """What `warps` (wave-wide numbers) pass on when they synchronise: joined known and fenced vectors."""
        joined, fenced = self.known[warps].max(axis=0), self.fenced[warps].max(axis=0)
        columns = self.column_of_warp[warps]
        joined[columns] = np.maximum(joined[columns], self.clock[warps])
        self.clock[warps] += 1
        return joined, fenced

    def fence_initialisation(self, warps: Array) -> None:
        """fence.mbarrier_init: what `release_initialised` passes on of each of `warps`."""
        self.initialised[warps] = self.known[warps]
        self.initialised[warps, self.column_of_warp[warps]] = self.clock[warps]
        self.clock[warps] += 1

    def has_fenced(self, warp: int, clock: int) -> bool:
        """Whether the async proxy sees the mbarriers that `warp` initialised at `clock`."""
        column = self.column_of_warp[warp]
        return bool(max(self.initialised[warp, column], self.fenced[warp, column]) >= clock)

    def release_initialised(self, warps: Array) -> tuple[Array, Array]:
        """What `warps` pass on with a relaxed arrival: `release` as of their latest fence.mbarrier_init."""
        return self.initialised[warps].max(axis=0), np.zeros(self.columns, np.int64)

    def acquire(self, warps: Array, joined: Array, fenced: Array) -> None:
        self.known[warps] = np.maximum(self.known[warps], joined)
        self.fenced[warps] = np.maximum(self.fenced[warps], fenced)

    def knows(self, warps: Array, joined: Array) -> bool:
        """Whether what `release` once returned happens before what each of `warps` does next."""
        known = self.known[warps].copy()
        known[np.arange(warps.size), self.column_of_warp[warps]] = self.clock[warps]
        return bool((known >= joined).all())

    def barrier(self, warps: Array) -> None:
        """Orders everything before among `warps`, all of one cluster."""
        self.acquire(warps, *self.release(warps))

    def barrier_everywhere(self) -> None:
        """`barrier` for all warps of each CTA at once."""
        for vectors in (self.known, self.fenced) if self.agents else (self.known,):
            rows = vectors.reshape(self.ctas, self.warps, self.columns)
            rows[:] = rows.max(axis=1, keepdims=True)
        clocks = self.clock.reshape(self.ctas, self.warps)
        for rank in range(self.cluster):
            first = rank * self.per_cta
            rows = self.known.reshape(self.ctas, self.warps, self.columns)[rank :: self.cluster]
            rows[:, :, first : first + self.warps] = clocks[rank :: self.cluster, None]
        self.clock += 1

    def warp_sync(self, warps: Array) -> None:
        self.known[warps, self.column_of_warp[warps]] = self.clock[warps]
        self.clock[warps] += 1

    def proxy_fence(self, warps: Array) -> None:
        """fence.proxy.async: everything these warps know of (and did) is now visible to the async proxy."""
        self.known[warps, self.column_of_warp[warps]] = self.clock[warps]
        self.fenced[warps] = np.maximum(self.fenced[warps], self.known[warps])
        self.clock[warps] += 1

    def leave(self, ctas: Array) -> None:
        """These CTAs exit; raises Bad with a thread of one where another may still access its memory."""
        self.left[ctas] = True
        for cta in ctas:
            first = cta * self.warps
            late = np.flatnonzero(self.visits[cta] > self.known[first : first + self.warps].max(axis=0))
            if late.size:
                who = self.describe(int(late[0]) << 5)
                raise Bad("shared-race", int(first * 32), f"exits with no barrier after the access by {who}")

    # ---- accesses by threads --------------------------------------------------------------------------------------

    def offsets(self, address: Array, threads: Array, width: int, *, awaited: bool = False) -> Array:
        """Shared addresses (any integer type) to byte offsets in this array, bounds-checked against one CTA's
        window. awaited: of a transfer, whose bytes that CTA waits for.
        """
        inside = address.astype(np.int64)
        cta = self.cta[threads]
        rank = (inside >> RANK_SHIFT) - 1
        if (rank != -1).any():
            if (rank >= self.cluster).any():
                lane = int((rank >= self.cluster).argmax())
                raise Bad("out-of-bounds", lane, f"{width}-byte shared access at address {int(inside[lane]):#x}")
            own, cta = cta, np.where(rank < 0, cta, cta // self.cluster * self.cluster + rank)
            abroad = own != cta
            if self.left[cta[abroad]].any():
                raise Bad(
                    "out-of-bounds", int((abroad & self.left[cta]).argmax()), "the memory of a CTA that has exited"
                )
            if not awaited:
                warps = self.warp[threads][abroad]
                self.visits[cta[abroad], self.column_of_warp[warps]] = self.clock[warps]
            inside = inside & (1 << RANK_SHIFT) - 1
        inside = inside - SHARED_BASE
        wrong = (inside < 0) | (inside > self.stride - width)
        if wrong.any():
            lane = int(np.flatnonzero(wrong)[0])
            raise Bad("out-of-bounds", lane, f"{width}-byte shared access at offset {int(inside[lane])}")
        return inside + cta * self.stride

    def granules(self, offset: Array, width: int) -> Array:
        first = (offset >> self.shift)[:, None]
        count = max(1, width >> self.shift)
        return first if count == 1 else first + np.arange(count)

    def stamps(self, threads: Array) -> Array:
        return self.clock[self.warp[threads]] << 16 | self.name[threads]

    def load_at(self, address: Array, threads: Array, width: int) -> Array:
        offset = self.offsets(address, threads, width)
        values = self.load(offset, width, need=self.need)
        granules = self.granules(offset, width)
        self.check_writes(granules, threads)
        index = granules * self.columns + self.column_of_warp[self.warp[threads]][:, None]
        self.read[index] = self.stamps(threads)[:, None]
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
        self.wrote[granules] = self.stamps(threads)[:, None]

    def copy_to(self, address: Array, threads: Array, width: int, values: Array) -> None:
        """The shared side of a cp.async: data lands now, but the bytes stay the copy's until it is waited for."""
        self.store_at(address, threads, width, values)
        granules = self.granules(self.offsets(address, threads, width), width)
        self.pending[granules] = True
        self.copies.add(granules, threads)

    def wait(self, threads: Array, allowed: int | None) -> None:
        for granules, owners in self.copies.finish(threads, allowed):
            self.pending[granules] = False
            self.wrote[granules] = self.stamps(owners)[:, None]

    def atomic_at(self, address: Array, threads: Array, width: int) -> Array:
        """Checks and records an atomic; returns the byte offsets for the caller to read and modify."""
        offset = self.offsets(address, threads, width)
        granules = self.granules(offset, width)
        self.check_all(granules, threads, against_atomics=False)
        self.load(offset, width)
        self.atomic[granules] = self.stamps(threads)[:, None]
        self.has_atomics = True
        return offset

    def check_writes(self, granules: Array, threads: Array, *, against_atomics: bool = True) -> None:
        self.check_pending(granules)
        self._check(self.wrote[granules], threads, "write")
        if self.has_atomics and against_atomics:
            self._check(self.atomic[granules], threads, "atomic")

    def check_pending(self, granules: Array) -> None:
        if self.copies.open:
            busy = self.pending[granules]
            if busy.any():
                lane = int(np.flatnonzero(busy.any(axis=1))[0])
                raise Bad("async-race", lane, "a cp.async to these bytes has not been waited for")

    def check_all(self, granules: Array, threads: Array, *, against_atomics: bool = True) -> None:
        self.check_writes(granules, threads, against_atomics=against_atomics)
        seen = self.read[granules[:, :, None] * self.columns + np.arange(self.columns)]
        known = self.known[self.warp[threads]][:, None, :]
        wrong = ((seen >> 16) > known) & ((seen & 0xFFFF) != self.name[threads][:, None, None])
        if wrong.any():
            lane, granule, column = (int(i[0]) for i in np.nonzero(wrong))
            self._blame(lane, int(seen[lane, granule, column]) & 0xFFFF, "read")

    def _check(self, seen: Array, threads: Array, what: str) -> None:
        writer = seen & 0xFFFF
        known = self.known[self.warp[threads][:, None], writer >> 5]
        wrong = ((seen >> 16) > known) & (writer != self.name[threads][:, None])
        if wrong.any():
            lane, granule = (int(i[0]) for i in np.nonzero(wrong))
            self._blame(lane, int(writer[lane, granule]), what)

    def describe(self, name: int) -> str:
        """Who a stamp names."""
        rank, column = divmod(name >> 5, self.per_cta)
        where = f" of CTA {rank} of the cluster" if self.cluster > 1 else " of the same CTA"
        if column < self.warps:
            return f"thread {column * 32 + (name & 31)}{where}"
        agent = column - self.warps
        kinds = {TMA_LOAD: "a TMA load", TMA_STORE: "a TMA store"}
        return kinds.get(agent, f"the tensor cores of warpgroup {agent - TENSOR}") + where

    def _blame(self, lane: int, other: int, what: str) -> None:
        raise Bad("shared-race", lane, f"no barrier after the {what} by {self.describe(other)}")

    # ---- accesses by asynchronous agents ---------------------------------------------------------------------------

    def agent_column(self, cta: int, agent: int) -> int:
        return cta % self.cluster * self.per_cta + self.warps + agent

    def agent_write(self, offset: Array, width: int, values: Array, cta: int, agent: int, warp: int) -> None:
        """A write into CTA `cta` that warp `warp` started; `offset` are byte offsets in this array."""
        granules = self.granules(offset, width)
        self.check_pending(granules)
        known = self.known[warp].copy()
        known[self.column_of_warp[warp]] = self.clock[warp]
        wrote = self.wrote[granules]
        self._check_agent(wrote, known[(wrote & 0xFFFF) >> 5], "write")
        seen = self.read[granules[:, :, None] * self.columns + np.arange(self.columns)]
        self._check_agent(seen, known, "read")
        self.store(offset, width, values)
        stamp = self.agent_clock[cta, agent] << 16 | self.agent_column(cta, agent) << 5
        self.wrote[granules] = stamp

    def agent_read(self, offset: Array, width: int, cta: int, agent: int, warps: Array) -> Array:
        """A read from CTA `cta` through the async proxy that `warps` started together."""
        values = self.load(offset, width, need=self.need)
        granules = self.granules(offset, width)
        self.check_pending(granules)
        wrote = self.wrote[granules]
        column = (wrote & 0xFFFF) >> 5
        known = self.known[warps].min(axis=0)
        columns = self.column_of_warp[warps]
        if warps.size == 1:
            known[columns] = self.clock[warps]
        self._check_agent(wrote, known[column], "write")
        fenced = self.fenced[warps].min(axis=0)
        by_thread = column % self.per_cta < self.warps
        self._check_agent(np.where(by_thread, wrote, 0), fenced[column], "write", _PROXY)
        stamp = self.agent_clock[cta, agent] << 16 | self.agent_column(cta, agent) << 5
        self.read[granules * self.columns + self.agent_column(cta, agent)] = stamp
        return values

    def _check_agent(self, seen: Array, known: Array, what: str, why: str = "") -> None:
        wrong = (seen >> 16) > known
        if wrong.any():
            place = tuple(int(i[0]) for i in np.nonzero(wrong))
            other = self.describe(int(seen[place]) & 0xFFFF)
            raise Bad(
                "shared-race", 0, why + f" (written by {other})" if why else f"no barrier after the {what} by {other}"
            )
