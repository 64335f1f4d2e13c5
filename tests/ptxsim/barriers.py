"""Barriers at which threads wait: those of a CTA (bar, barrier) and those of a cluster (barrier.cluster)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from .faults import SimError
from .ptx import Instr, Reg

if TYPE_CHECKING:
    from .scheduler import Scheduler

Array = NDArray[Any]
BARRIERS = 16  # of a CTA (PTX ISA, bar)


class _Arrivals:
    """Arrivals at one named barrier of one CTA."""

    def __init__(self, size: int) -> None:
        self.arrived = np.zeros(size, bool)
        self.resume: dict[int, Array] = {}
        self.reductions: dict[int, Instr] = {}
        self.expected: int | None = None
        self.instr: Instr | None = None

    def add(self, instr: Instr, index: int, mask: Array, expected: int | None, kind: str) -> None:
        self.instr, self.expected = instr, expected
        self.arrived = self.arrived | mask
        if kind != "arrive":
            self.resume[index + 1] = self.resume[index + 1] | mask if index + 1 in self.resume else mask
        if kind == "red":
            self.reductions[index + 1] = instr


class NamedBarriers:
    """The barriers of every CTA of a wave: sync, arrive and red."""

    def __init__(self, scheduler: Scheduler) -> None:
        self.scheduler = scheduler
        self.wave = scheduler.wave
        self.waiting: dict[tuple[int, int], _Arrivals] = {}  # by CTA and number

    def _operand(self, operand: Any, thread: int) -> int:
        return int(self.wave.regs[operand.name][thread]) if isinstance(operand, Reg) else int(operand.value)

    def execute(self, instr: Instr, index: int, mask: Array) -> None:
        mods = instr.mods
        kind = "arrive" if "arrive" in mods else "red" if "red" in mods else "sync"
        operands = instr.operands[1:] if kind == "red" else instr.operands
        everyone = len(operands) <= (2 if kind == "red" else 1) and kind != "arrive"
        if (
            everyone
            and kind == "sync"
            and not self.waiting
            and not isinstance(operands[0], Reg)
            and (mask | self.wave.exited).all()
        ):
            self.wave.shared.barrier_everywhere()
            self.scheduler.go(index + 1, mask)
            return
        for cta in np.flatnonzero(mask.reshape(self.wave.ctas, -1).any(axis=1)):
            here = slice(cta * self.wave.padded, (cta + 1) * self.wave.padded)
            part = np.zeros_like(mask)
            part[here] = mask[here]
            numbers = part.nonzero()[0]
            ids = {self._operand(operands[0], t) for t in numbers[::32]} if operands else {0}
            for number in ids:
                mine = part
                if isinstance(operands[0], Reg):
                    mine = part & (self.wave.regs[operands[0].name] == number)
                if not 0 <= number < BARRIERS:
                    detail = f"barrier {number}, where a CTA has {BARRIERS}"
                    raise self.wave.fault("out-of-bounds", detail, instr, int(mine.argmax()))
                expected = None if everyone else self._operand(operands[1], int(mine.argmax()))
                barrier = self.waiting.setdefault((int(cta), number), _Arrivals(self.wave.size))
                barrier.add(instr, index, mine, expected, kind)
                if kind == "arrive":
                    self.scheduler.go(index + 1, mine)
        self.settle()

    def settle(self) -> None:
        for key in list(self.waiting):
            barrier, cta = self.waiting[key], key[0]
            here = slice(cta * self.wave.padded, (cta + 1) * self.wave.padded)
            if barrier.expected is None:
                if not (barrier.arrived | self.wave.exited)[here].all():
                    continue
            else:
                warps = np.flatnonzero(barrier.arrived.reshape(-1, 32).any(axis=1))
                if warps.size * 32 < barrier.expected:
                    continue
                if warps.size * 32 > barrier.expected:
                    raise self.wave.fault(
                        "deadlock",
                        f"barrier {key[1]} expects {barrier.expected} threads, {warps.size * 32} arrived",
                        barrier.instr,
                        int(barrier.arrived.argmax()),
                    )
            del self.waiting[key]
            self.wave.shared.barrier(np.flatnonzero(barrier.arrived.reshape(-1, 32).any(axis=1)))
            for block, mask in barrier.resume.items():
                self._reduce(barrier, block, mask)
                self.scheduler.go(block, mask)

    def _reduce(self, barrier: _Arrivals, block: int, mask: Array) -> None:
        instr = barrier.reductions.get(block)
        if instr is None:
            return
        source, target = instr.operands[-1], instr.operands[0]
        assert isinstance(source, Reg)
        assert isinstance(target, Reg)
        votes = self.wave.regs[source.name][mask] ^ source.negated
        out = self.wave.regs[target.name]
        operation = next(m for m in instr.mods if m in ("popc", "and", "or"))
        out[mask] = {"popc": votes.sum(), "and": votes.all(), "or": votes.any()}[operation]

    def deadlock(self) -> SimError:
        (cta, number), barrier = next(iter(self.waiting.items()))
        here = slice(cta * self.wave.padded, (cta + 1) * self.wave.padded)
        count = int(barrier.arrived[here].sum())
        wanted = barrier.expected if barrier.expected is not None else int((~self.wave.exited[here]).sum())
        return self.wave.fault(
            "deadlock",
            f"barrier {number}: {count} of {wanted} threads arrived and no thread can run",
            barrier.instr,
            int(barrier.arrived.argmax()),
        )


class ClusterBarriers:
    """barrier.cluster: arrivals and waits of the threads of each cluster."""

    def __init__(self, scheduler: Scheduler) -> None:
        self.scheduler = scheduler
        self.wave = wave = scheduler.wave
        self.clusters = wave.ctas // wave.cluster
        self.arrived = np.zeros(wave.size, bool)
        self.phase = np.zeros(self.clusters, np.int64)
        self.joined_at = np.zeros(wave.size, np.int64)  # the phase in which a thread last arrived
        self.passing = [(np.zeros(wave.shared.columns, np.int64),) * 2 for _ in range(self.clusters)]
        self.released = list(self.passing)
        self.waiting: list[tuple[Array, int, Instr]] = []

    def execute(self, instr: Instr, index: int, mask: Array) -> None:
        wave = self.wave
        cluster = np.arange(wave.size) // (wave.padded * wave.cluster)
        if "arrive" in instr.mods:
            for number in np.unique(cluster[mask]):
                warps = np.unique(np.flatnonzero(mask & (cluster == number)) // 32)
                relaxed = "relaxed" in instr.mods
                joined = wave.shared.release_initialised(warps) if relaxed else wave.shared.release(warps)
                self.passing[number] = tuple(
                    np.maximum(a, b) for a, b in zip(self.passing[number], joined, strict=True)
                )
            self.arrived |= mask
            self.joined_at[mask] = self.phase[cluster[mask]]
            self.scheduler.go(index + 1, mask)
        else:
            self.waiting.append((mask, index, instr))
        self.settle()

    def settle(self) -> None:
        wave = self.wave
        if not self.arrived.any() and not self.waiting:
            return
        per_cluster = self.arrived.reshape(self.clusters, -1)
        complete = (per_cluster | wave.exited.reshape(self.clusters, -1)).all(axis=1) & per_cluster.any(axis=1)
        for number in complete.nonzero()[0]:
            self.phase[number] += 1
            per_cluster[number] = False
            self.released[number] = self.passing[number]
        cluster = np.arange(wave.size) // (wave.padded * wave.cluster)
        still = []
        for mask, index, instr in self.waiting:
            free = mask & (self.joined_at < self.phase[cluster])
            for number in np.unique(cluster[free]):
                warps = np.unique(np.flatnonzero(free & (cluster == number)) // 32)
                wave.shared.acquire(warps, *self.released[number])
            if free.any():
                self.scheduler.go(index + 1, free)
            if (mask & ~free).any():
                still.append((mask & ~free, index, instr))
        self.waiting = still

    def deadlock(self) -> SimError:
        mask, _, instr = self.waiting[0]
        return self.wave.fault("deadlock", "cluster barrier: no thread can run", instr, int(mask.argmax()))
