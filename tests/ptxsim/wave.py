"""State of the CTAs that run together: every register a vector over all their threads, compiled code, memories."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from .faults import SimError
from .in_flight import InFlight
from .memory import LIVE, READY, SHARED_BASE, Bad, Bytes, GlobalMemory
from .program import Program, is_poll
from .ptx import TYPE_BYTES, Instr
from .shared import RANK_SHIFT, SharedMemory

if TYPE_CHECKING:
    from .isa.hopper import Mbarrier

Array = NDArray[Any]
REGISTERS = 65536  # of a multiprocessor
Closure = Callable[[], Any]
Dim3 = tuple[int, int, int]


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
        self.waited = np.zeros(ctas, bool)  # for the kernel before in the stream
        self.registers_at_launch = min(255, REGISTERS // self.padded) // 8 * 8  # of a thread, at most
        self.registers = np.zeros(self.warps, np.int64)  # of a thread of each warp, as setmaxnreg leaves them
        self.owner = np.zeros(self.size, np.int64)
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
        self.mbarriers: dict[int, Mbarrier] = {}  # by byte offset in the wave's shared memory
        self.in_flight = InFlight(self, program.wgmma_registers)
        self.events = 0  # counts changes of mbarriers: what a stalled wait hopes for
        self.polls = {
            blk.index: hopper.poll(self, blk.instrs[0])
            for blk in program.blocks
            if blk.instrs and is_poll(blk.instrs[0])
        }
        self.blocks: list[tuple[list[Closure], list[Closure]]] = []
        for blk in program.blocks:
            pairs = [compile_instr(self, instr) for instr in blk.instrs]
            self.blocks.append(([p[0] for p in pairs], [p[1] for p in pairs]))

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
        self.shared = SharedMemory(
            self.ctas,
            self.padded,
            static + self.dynamic_shared,
            extents,
            granule=self.program.granule,
            cluster=self.cluster,
            agents=self.program.agents,
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

    def address_bits(self, name: str) -> Array | int:
        """What stands above a variable's address when it is taken: of shared memory in a cluster, whose it is."""
        if self.cluster == 1 or self.address_of(name)[0] != "shared":
            return 0
        return self.special["%cluster_ctarank"].astype(np.uint64) + np.uint64(1) << np.uint64(RANK_SHIFT)

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

    def check_end(self, ctas: int, *, overlaps: bool) -> None:
        """Faults that only the end of the first `ctas` CTAs shows. overlaps: with the kernel before."""
        if overlaps and not self.waited[:ctas].all():
            detail = "a block ends without griddepcontrol.wait, and with it perhaps before the kernel before"
            raise SimError("launch", detail, kernel=self.program.kernel.name)
        held = int(self.registers.reshape(self.ctas, -1).sum(axis=1).max()) * 32
        if held > (had := self.registers_at_launch * self.padded):
            detail = f"setmaxnreg waits for ever: a block asks for {held} registers in all and was launched with {had}"
            raise SimError("deadlock", detail, kernel=self.program.kernel.name)

    def blame(self, bad: Bad, instr: Instr, threads: Array | None) -> SimError:
        return self.fault(bad.kind, bad.detail, instr, bad.lane if threads is None else int(threads[bad.lane]))

    def start(self, numbers: Array, grid: Dim3, params: bytes) -> None:
        """Loads CTAs of the grid, numbered cluster by cluster: at most as many as the wave has, whole clusters."""
        self.params[: len(params)] = np.frombuffer(params, np.uint8)
        used = np.arange(self.ctas) < numbers.size
        cta = np.repeat(np.where(used, np.resize(numbers, self.ctas), 0), self.padded)
        shape = self.cluster_shape
        where = _coordinates(cta // self.cluster, tuple(g // c for g, c in zip(grid, shape, strict=True)))
        inside = _coordinates(cta % self.cluster, shape)
        for axis, extent, size, outer, inner in zip("xyz", grid, shape, where, inside, strict=True):
            self.special[f"%ctaid.{axis}"][:] = outer * size + inner
            self.special[f"%cluster_ctaid.{axis}"][:] = inner
            self.special[f"%clusterid.{axis}"][:] = outer
            self.special[f"%nctaid.{axis}"][:] = extent
            self.special[f"%nclusterid.{axis}"][:] = extent // size
        self.owner = cta // self.cluster  # each thread's CTA or cluster, counted over the grid
        self.shared.reset()
        self.shared.need = LIVE if self.device.poison_shared else READY
        self.exited[:] = np.repeat(~used, self.padded) | (self.tid >= self.threads)
        self.waited[:] = False
        self.registers[:] = self.registers_at_launch
        self.mbarriers.clear()
        self.in_flight.reset()
        self.events = 0


def _coordinates(index: Array, shape: tuple[int, ...]) -> tuple[Array, Array, Array]:
    return index % shape[0], index // shape[0] % shape[1], index // (shape[0] * shape[1])
