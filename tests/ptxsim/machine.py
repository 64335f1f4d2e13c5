"""Runs one kernel launch: waves of CTAs in lockstep, every register a vector over all threads of the wave.

Threads at the same basic block form a group; the group with the lowest block runs until its block ends (min-PC
scheduling, which reconverges structured code). A block with warp-collective instructions waits for those lanes of its
warps that can still reach it, the head of a loop for those still in an iteration. A group that monopolises the
machine (a spin loop) is set aside from time to time so that others can progress. Each block is compiled once per wave
shape into two lists of closures over persistent arrays: one for "all threads active" and one that obeys the wave's
active mask.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .faults import SimError
from .memory import LIVE, READY, SHARED_BASE, Bad, Bytes, GlobalMemory
from .program import Block, Program, decode, is_poll
from .ptx import TYPE_BYTES, Instr, Kernel, Module, Reg
from .shared import SharedMemory

Array = NDArray[Any]
Closure = Callable[[], Any]
Dim3 = tuple[int, int, int]

WAVE_THREADS = 2048
WAVE_SHARED_BYTES = 1 << 21
STALLS = 200  # failed mbarrier waits in a row, nothing else being able to run
BLOCK_BUDGET = 4_000_000
PATIENCE = 4000  # block executions before a group that keeps running yields to the others


@dataclass
class Counters:
    """Traffic and work of one launch. Bytes are those requested by active threads."""

    warp_instructions: int = 0
    global_load: int = 0
    global_store: int = 0
    shared_load: int = 0
    shared_store: int = 0
    async_copy: int = 0
    mma: int = 0
    mma_sparse: int = 0

    def add(self, other: Counters) -> None:
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)


@dataclass
class Device:
    """What kernels share between launches."""

    memory: GlobalMemory
    symbols: dict[str, int]  # .global and .const variables -> address
    # Loads of never-written shared memory give NaN patterns instead of a fault: for pipelines that prefetch one tile
    # too many.
    poison_shared: bool = False


class Wave:
    """State of `ctas` concurrent CTAs of one program, reusable for every wave of every launch of the same shape."""

    def __init__(
        self, device: Device, program: Program, block: Dim3, ctas: int, dynamic_shared: int, cluster: Dim3 = (1, 1, 1)
    ) -> None:
        from .isa import compile_instr, hopper  # isa's closures are bound to a Wave

        self.device, self.program = device, program
        self.memory = device.memory
        self.threads = block[0] * block[1] * block[2]
        self.padded = -(-self.threads // 32) * 32
        self.ctas = ctas
        self.size = ctas * self.padded
        self.warps = self.size // 32
        self.block = block
        self.cluster_shape = cluster
        self.cluster = cluster[0] * cluster[1] * cluster[2]
        self.dynamic_shared = dynamic_shared
        self.mask = np.zeros(self.size, bool)
        self.exited = np.zeros(self.size, bool)
        self.scratch = np.zeros(self.size, bool)  # predicate & mask of the instruction in flight
        self.carry = np.zeros(self.size, bool)  # the condition-code register
        self.counters = Counters()
        self.regs = {name: self._register(kind) for name, kind in program.kernel.regs.items()}
        self.params = np.zeros(max(program.param_size, 16), np.uint8)
        self.local = Bytes(
            np.zeros(self.size * program.local_size, np.uint8), np.ones(self.size * program.local_size, np.uint8)
        )
        self._shared()
        self._special()
        self.mbarriers: dict[int, hopper.Mbarrier] = {}  # by byte offset in the wave's shared memory
        self.polls = {
            blk.index: hopper.poll(self, blk.instrs[0])
            for blk in program.blocks
            if blk.instrs and is_poll(blk.instrs[0])
        }
        self.blocks: list[tuple[list[Closure], list[Closure]]] = []
        for blk in program.blocks:
            pairs = [compile_instr(self, instr) for instr in blk.instrs]
            self.blocks.append(([p[0] for p in pairs], [p[1] for p in pairs]))
        self._predicates = [self._branch_predicate(blk.terminator) for blk in program.blocks]

    def _register(self, kind: str) -> Array:
        if kind == "pred":
            return np.zeros(self.size, bool)
        return np.zeros(
            self.size, {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64, 16: np.complex128}[TYPE_BYTES[kind]]
        )

    def _shared(self) -> None:
        static = -(-self.program.shared_static // 1024) * 1024
        self.dynamic_offset = static
        extents = [*self.program.shared_extents, (static, self.dynamic_shared)]
        widths = [_shared_width(i) for b in self.program.blocks for i in b.instrs]
        self.shared = SharedMemory(
            self.ctas,
            self.padded,
            static + self.dynamic_shared,
            extents,
            granule=min([16, *(w for w in widths if w)]),
            cluster=self.cluster,
            agents=any(i.opcode in ("wgmma", "mbarrier") for b in self.program.blocks for i in b.instrs),
        )

    def _special(self) -> None:
        lane = np.arange(self.size, dtype=np.uint32)
        tid = lane % np.uint32(self.padded)
        bx, by = np.uint32(self.block[0]), np.uint32(self.block[1])
        one = np.uint32(1)
        inside = lane & np.uint32(31)
        self.tid = tid
        self.special: dict[str, Array] = {
            "%tid.x": tid % bx,
            "%tid.y": tid // bx % by,
            "%tid.z": tid // (bx * by),
            **{f"%ntid.{a}": np.full(self.size, n, np.uint32) for a, n in zip("xyz", self.block, strict=True)},
            **{f"%ctaid.{a}": np.zeros(self.size, np.uint32) for a in "xyz"},
            **{f"%nctaid.{a}": np.zeros(self.size, np.uint32) for a in "xyz"},
            "%laneid": inside,
            "%warpid": tid // np.uint32(32),
            "%nwarpid": np.full(self.size, self.padded // 32, np.uint32),
            "%lanemask_eq": one << inside,
            "%lanemask_lt": (one << inside) - one,
            "%lanemask_le": ((np.uint64(2) << inside.astype(np.uint64)) - np.uint64(1)).astype(np.uint32),
            "%lanemask_gt": ~((np.uint64(2) << inside.astype(np.uint64)) - np.uint64(1)).astype(np.uint32),
            "%lanemask_ge": ~((one << inside) - one),
            "%dynamic_smem_size": np.full(self.size, self.dynamic_shared, np.uint32),
            "%total_smem_size": np.full(self.size, self.dynamic_offset + self.dynamic_shared, np.uint32),
            "%cluster_ctarank": lane // np.uint32(self.padded) % np.uint32(self.cluster),
            "%cluster_nctarank": np.full(self.size, self.cluster, np.uint32),
            **{
                f"%cluster_nctaid.{a}": np.full(self.size, n, np.uint32)
                for a, n in zip("xyz", self.cluster_shape, strict=True)
            },
            **{
                f"%{n}.{a}": np.zeros(self.size, np.uint32)
                for a in "xyz"
                for n in ("cluster_ctaid", "clusterid", "nclusterid")
            },
            "%smid": lane // np.uint32(self.padded),
            "%nsmid": np.full(self.size, self.ctas, np.uint32),
            "%gridid": np.zeros(self.size, np.uint64),
            **{
                n: np.zeros(self.size, np.uint32) for n in ("%clock", "%clock_hi", "%globaltimer_lo", "%globaltimer_hi")
            },
            **{n: np.zeros(self.size, np.uint64) for n in ("%clock64", "%globaltimer")},
        }

    @staticmethod
    def pairs(register: Array, half: np.dtype[Any]) -> Array:
        """A 32-bit register's halves, [threads, 2], low half first."""
        return register.view(half).reshape(-1, 2)

    def _branch_predicate(self, instr: Instr | None) -> Array | None:
        return self.regs[instr.pred.name] if instr is not None and instr.pred is not None else None

    def address_of(self, name: str) -> tuple[str, int]:
        """Space and address of a variable."""
        program = self.program
        if name in program.shared:
            return "shared", SHARED_BASE + program.shared[name]
        if name in program.dynamic_shared:
            return "shared", SHARED_BASE + self.dynamic_offset
        if name in program.local:
            return "local", program.local[name]
        if name in program.params:
            return "param", program.params[name][0]
        return "global", self.device.symbols[name]

    # ---- faults ---------------------------------------------------------------------------------------------------

    def thread_name(self, thread: int) -> str:
        position = thread % self.padded
        bx, by, _ = self.block
        tid = (position % bx, position // bx % by, position // (bx * by))
        cta = tuple(int(self.special[f"%ctaid.{a}"][thread]) for a in "xyz")
        return f"thread {tid} of block {cta}"

    def fault(self, kind: str, detail: str, instr: Instr | None, thread: int) -> SimError:
        return SimError(
            kind,
            detail,
            kernel=self.program.kernel.name,
            line=instr.line if instr else 0,
            text=instr.text if instr else "",
            thread=self.thread_name(thread),
        )

    def blame(self, bad: Bad, instr: Instr, threads: Array | None) -> SimError:
        return self.fault(bad.kind, bad.detail, instr, bad.lane if threads is None else int(threads[bad.lane]))

    # ---- scheduling -----------------------------------------------------------------------------------------------

    def start(self, first: int, count: int, grid: Dim3, params: bytes) -> None:
        """Loads CTAs first .. first+count of the grid."""
        self.params[: len(params)] = np.frombuffer(params, np.uint8)
        cta = np.repeat(np.arange(first, first + self.ctas), self.padded)
        # CTAs are numbered cluster by cluster.
        shape = self.cluster_shape
        where = _coordinates(cta // self.cluster, tuple(g // c for g, c in zip(grid, shape, strict=True)))
        inside = _coordinates(cta % self.cluster, shape)
        for axis, extent, size, outer, inner in zip("xyz", grid, shape, where, inside, strict=True):
            self.special[f"%ctaid.{axis}"][:] = outer * size + inner
            self.special[f"%cluster_ctaid.{axis}"][:] = inner
            self.special[f"%clusterid.{axis}"][:] = outer
            self.special[f"%nctaid.{axis}"][:] = extent
            self.special[f"%nclusterid.{axis}"][:] = extent // size
        self.shared.reset()
        self.shared.need = LIVE if self.device.poison_shared else READY
        self.exited[:] = (cta >= first + count) | (self.tid >= self.threads)
        self.waiting: dict[tuple[int, int], _Barrier] = {}
        self.groups: dict[int, Array] = {0: ~self.exited}
        self.mbarriers.clear()
        self.cluster_barrier = _ClusterBarrier(self)
        self.events = 0  # counts changes of mbarriers: what a stalled wait hopes for
        self.stall = (0, 0)
        self.spins = 0
        self.aside: Array | None = None

    def run(self) -> None:
        budget = BLOCK_BUDGET
        blocks, program = self.blocks, self.program.blocks
        counters = self.counters
        while self.groups or self.waiting or self.cluster_barrier.waiting:
            if not self.groups:
                self._deadlock()
            index, mask, active = self._pick()
            full, masked = blocks[index]
            if active == self.size:
                for step in full:
                    step()
            else:
                self.mask[:] = mask
                for step in masked:
                    step()
            counters.warp_instructions += (len(full) + 1) * (active >> 5 or 1)
            self._leave(index, program[index], mask, active)
            budget -= 1
            if budget == 0:
                raise self.fault(
                    "no-progress", f"{BLOCK_BUDGET} blocks executed", program[index].instrs[0], int(mask.argmax())
                )

    def _pick(self) -> tuple[int, Array, int]:
        """The next group to run: block, mask, number of active threads."""
        groups = self.groups
        if len(groups) == 1 and not self.polls:
            self.spins = 0
            self.aside = None
            ((index, mask),) = groups.items()
            groups.clear()
            return index, mask, int(np.count_nonzero(mask))
        self.spins += 1
        if self.spins > PATIENCE:
            self.spins = 0
            lowest = groups[min(groups)]
            warps = lowest.reshape(-1, 32).any(axis=1)
            rest = np.logical_or.reduce(list(groups.values())) & ~np.repeat(warps, 32)
            self.aside = np.repeat(warps, 32) if self.aside is None and rest.any() else None
        held = polling = None
        for index in sorted(groups):
            mask = groups[index]
            if self.aside is not None:
                mask = mask & ~self.aside
                if not mask.any():
                    continue
            block = self.program.blocks[index]
            ready = self._ready(index, block, mask) if block.collective or block.loop else mask
            if index in self.polls:
                threads = ready.nonzero()[0]
                passing = self.polls[index](threads)
                if not passing.all():
                    polling = polling or (index, mask)
                    ready = ready.copy()
                    ready[threads[~passing]] = False
            elif held is None:
                held = (index, mask)
            if ready.any():
                return self._take(index, ready)
        if held is not None:
            return self._take(*held)
        if polling is None:  # everyone is set aside: start over
            self.aside = None
            return self._pick()
        return self._stalled(*polling)

    def _stalled(self, index: int, mask: Array) -> tuple[int, Array, int]:
        """Nobody can run but threads whose mbarrier wait fails. They may have something else to do: let the wait
        fail.
        """
        events, count = self.stall
        self.stall = (self.events, count + 1 if events == self.events else 0)
        if self.stall[1] > STALLS:
            from .isa import hopper

            instr, thread = self.program.blocks[index].instrs[0], int(mask.argmax())
            detail = "no thread can run; " + hopper.explain(self, instr, thread)
            raise self.fault("deadlock", detail, instr, thread)
        return self._take(index, mask)

    def _take(self, index: int, mask: Array) -> tuple[int, Array, int]:
        left = self.groups.pop(index) & ~mask
        if left.any():
            self.groups[index] = left
        return index, mask, int(np.count_nonzero(mask))

    def _ready(self, index: int, block: Block, mask: Array) -> Array:
        """The part of a group whose warps have no lane elsewhere that should come here first.

        Those are, for a collective block, lanes that can reach it without going around a loop, and for the head of a
        loop, lanes that are still in an iteration.
        """
        width = 128 if block.collective == 128 and self.padded % 128 == 0 else 32
        coming = np.zeros(self.size // width, bool)
        for other, lanes in self.groups.items():
            ahead = block.collective and self.program.blocks[other].ahead >> index & 1
            if other != index and (ahead or block.loop >> other & 1):
                coming |= lanes.reshape(-1, width).any(axis=1)
        return mask & ~np.repeat(coming, width) if coming.any() else mask

    def _go(self, index: int, mask: Array) -> None:
        present = self.groups.get(index)
        self.groups[index] = mask if present is None else present | mask

    def _leave(self, index: int, block: Block, mask: Array, active: int) -> None:
        terminator: Instr | None = block.terminator
        if terminator is None:
            self._go(index + 1, mask)
            return
        opcode = terminator.opcode
        pred = self._predicates[index]
        taken = mask
        if pred is not None:
            assert terminator.pred is not None
            taken = mask > pred if terminator.pred.negated else mask & pred
        if opcode == "bra":
            hits = active if pred is None else int(np.count_nonzero(taken))
            if hits:
                self._go(block.successors[0], taken)
            if hits < active:
                self._go(block.successors[1], mask > taken if hits else mask)
        elif opcode in ("ret", "exit"):
            self.exited |= taken
            if pred is not None and not np.array_equal(taken, mask):
                self._go(index + 1, mask & ~taken)
            if self.waiting:
                self._release()
            self.cluster_barrier.settle()
        elif opcode in ("bar", "barrier"):
            if pred is not None and not np.array_equal(taken, mask):
                self._go(index + 1, mask & ~taken)
            if taken.any() and terminator.mods[0] == "cluster":
                self._check_aligned(terminator, taken)
                self.cluster_barrier.execute(terminator, index, taken)
            elif taken.any():
                self._arrive(terminator, index, taken)
        elif opcode == "trap":
            if taken.any():
                raise self.fault("trap", "trap executed", terminator, int(taken.argmax()))
            self._go(index + 1, mask)
        elif opcode == "brx":
            self._indexed(terminator, block, taken)

    def _indexed(self, instr: Instr, block: Block, mask: Array) -> None:
        register = instr.operands[0]
        assert isinstance(register, Reg)
        choice = self.regs[register.name]
        for i, target in enumerate(block.successors):
            part = mask & (choice == i)
            if part.any():
                self._go(target, part)

    # ---- barriers -------------------------------------------------------------------------------------------------

    def _operand(self, operand: Any, thread: int) -> int:
        return int(self.regs[operand.name][thread]) if isinstance(operand, Reg) else int(operand.value)

    def _leaving(self) -> Array:
        """Threads that have exited, or whose next instruction is the exit: an early return before a barrier is
        legal.
        """
        gone = self.exited
        for index, mask in self.groups.items():
            block = self.program.blocks[index]
            if (
                not block.instrs
                and block.terminator is not None
                and block.terminator.opcode in ("ret", "exit")
                and block.terminator.pred is None
            ):
                gone = gone | mask
        return gone

    def _check_aligned(self, instr: Instr, mask: Array) -> None:
        if instr.opcode != "bar" and "aligned" not in instr.mods:
            return
        lanes = mask.reshape(-1, 32)
        partial = lanes.any(axis=1) & ~(lanes | self._leaving().reshape(-1, 32)).all(axis=1)
        if partial.any():
            warp = int(partial.argmax())
            missing = np.flatnonzero(~(lanes[warp] | self.exited[warp * 32 : warp * 32 + 32]))
            detail = f"lanes {missing.tolist()} of the warp do not execute it"
            raise self.fault("divergent-aligned", detail, instr, int(lanes[warp].argmax()) + warp * 32)

    def _arrive(self, instr: Instr, index: int, mask: Array) -> None:
        mods = instr.mods
        kind = "arrive" if "arrive" in mods else "red" if "red" in mods else "sync"
        self._check_aligned(instr, mask)
        operands = instr.operands[1:] if kind == "red" else instr.operands
        everyone = len(operands) <= (2 if kind == "red" else 1) and kind != "arrive"
        if (
            everyone
            and kind == "sync"
            and not self.waiting
            and not isinstance(operands[0], Reg)
            and (mask | self.exited).all()
        ):
            self.shared.barrier_everywhere()
            self._go(index + 1, mask)
            return
        for cta in np.flatnonzero(mask.reshape(self.ctas, -1).any(axis=1)):
            here = slice(cta * self.padded, (cta + 1) * self.padded)
            part = np.zeros_like(mask)
            part[here] = mask[here]
            numbers = part.nonzero()[0]
            ids = {self._operand(operands[0], t) for t in numbers[::32]} if operands else {0}
            for number in ids:
                mine = part
                if isinstance(operands[0], Reg):
                    mine = part & (self.regs[operands[0].name] == number)
                expected = None if everyone else self._operand(operands[1], int(mine.argmax()))
                barrier = self.waiting.setdefault((int(cta), number), _Barrier(self.size))
                barrier.add(instr, index, mine, expected, kind)
                if kind == "arrive":
                    self._go(index + 1, mine)
        self._release()

    def _release(self) -> None:
        for key in list(self.waiting):
            barrier, cta = self.waiting[key], key[0]
            here = slice(cta * self.padded, (cta + 1) * self.padded)
            if barrier.expected is None:
                if not (barrier.arrived | self.exited)[here].all():
                    continue
            else:
                warps = np.flatnonzero(barrier.arrived.reshape(-1, 32).any(axis=1))
                if warps.size * 32 < barrier.expected:
                    continue
                if warps.size * 32 > barrier.expected:
                    raise self.fault(
                        "deadlock",
                        f"barrier {key[1]} expects {barrier.expected} threads, {warps.size * 32} arrived",
                        barrier.instr,
                        int(barrier.arrived.argmax()),
                    )
            del self.waiting[key]
            self.shared.barrier(np.flatnonzero(barrier.arrived.reshape(-1, 32).any(axis=1)))
            for block, mask in barrier.resume.items():
                self._reduce(barrier, block, mask)
                self._go(block, mask)

    def _reduce(self, barrier: _Barrier, block: int, mask: Array) -> None:
        instr = barrier.reductions.get(block)
        if instr is None:
            return
        source, target = instr.operands[-1], instr.operands[0]
        assert isinstance(source, Reg)
        assert isinstance(target, Reg)
        votes = self.regs[source.name][mask] ^ source.negated
        out = self.regs[target.name]
        operation = next(m for m in instr.mods if m in ("popc", "and", "or"))
        out[mask] = {"popc": votes.sum(), "and": votes.all(), "or": votes.any()}[operation]

    def _deadlock(self) -> None:
        if not self.waiting:
            mask, _, instr = self.cluster_barrier.waiting[0]
            raise self.fault("deadlock", "cluster barrier: no thread can run", instr, int(mask.argmax()))
        (cta, number), barrier = next(iter(self.waiting.items()))
        here = slice(cta * self.padded, (cta + 1) * self.padded)
        count = int(barrier.arrived[here].sum())
        wanted = barrier.expected if barrier.expected is not None else int((~self.exited[here]).sum())
        raise self.fault(
            "deadlock",
            f"barrier {number}: {count} of {wanted} threads arrived and no thread can run",
            barrier.instr,
            int(barrier.arrived.argmax()),
        )


class _Barrier:
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


class _ClusterBarrier:
    """barrier.cluster: arrivals and waits of the threads of each cluster."""

    def __init__(self, wave: Wave) -> None:
        self.wave = wave
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
                joined = wave.shared.release(warps)
                self.passing[number] = tuple(
                    np.maximum(a, b) for a, b in zip(self.passing[number], joined, strict=True)
                )
            self.arrived |= mask
            self.joined_at[mask] = self.phase[cluster[mask]]
            wave._go(index + 1, mask)
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
                wave._go(index + 1, free)
            if (mask & ~free).any():
                still.append((mask & ~free, index, instr))
        self.waiting = still


def _coordinates(index: Array, shape: tuple[int, ...]) -> tuple[Array, Array, Array]:
    return index % shape[0], index // shape[0] % shape[1], index // (shape[0] * shape[1])


def _shared_width(instr: Instr) -> int:
    """Bytes of the narrowest piece in which `instr` may touch shared memory, 0 if it does not."""
    if instr.opcode in ("ld", "st", "atom", "red"):
        generic = not any(m.split("::")[0] in ("global", "const", "local", "param") for m in instr.mods)
        if generic or any(m.startswith("shared") for m in instr.mods):
            count = next((int(m[1]) for m in instr.mods if m in ("v2", "v4")), 1)
            return min(16, TYPE_BYTES[instr.mods[-1]] * count)
    if instr.opcode == "cp" and instr.mods[0] == "async" and len(instr.operands) > 2:
        size = instr.operands[2]
        return int(getattr(size, "value", 4))
    return 0


class Launcher:
    """Decoded programs and compiled waves, by kernel and launch shape."""

    def __init__(self, device: Device) -> None:
        self.device = device
        self.programs: dict[int, Program] = {}
        self.waves: dict[tuple[int, Dim3, int, int, Dim3], Wave] = {}

    def launch(
        self,
        module: Module,
        kernel: Kernel,
        grid: Dim3,
        block: Dim3,
        dynamic_shared: int,
        params: bytes,
        cluster: Dim3 = (1, 1, 1),
    ) -> Counters:
        program = self.programs.get(id(kernel))
        if program is None:
            program = self.programs[id(kernel)] = decode(kernel, module.variables)
        threads = -(-block[0] * block[1] * block[2] // 32) * 32
        total = grid[0] * grid[1] * grid[2]
        size = cluster[0] * cluster[1] * cluster[2]
        shared = dynamic_shared + program.shared_static + 1024
        ctas = max(1, min(total, WAVE_THREADS // threads, WAVE_SHARED_BYTES // shared) // size) * size
        key = (id(kernel), block, ctas, dynamic_shared, cluster)
        wave = self.waves.get(key)
        if wave is None:
            if len(self.waves) > 24:
                self.waves.clear()
            wave = self.waves[key] = Wave(self.device, program, block, ctas, dynamic_shared, cluster)
        wave.counters = Counters()
        with np.errstate(all="ignore"):
            for first in range(0, total, ctas):
                wave.start(first, min(ctas, total - first), grid, params)
                wave.run()
        return wave.counters
