"""sm_90's asynchronous machinery: mbarriers, TMA tile loads and stores, bulk copies, clusters.

A transfer happens when it is issued, and its bytes count towards its mbarrier at once: one of the legal orders. What
a kernel may rely on is tracked by the race detector: only who has waited for the phase (or the bulk group) knows of
the transfer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ..memory import ELEMENT, PARAM_WINDOW, Bad
from ..ptx import Imm, Instr, Mem, Pair
from ..shared import RANK_SHIFT, TMA_LOAD, TMA_STORE
from ..tma import TensorMap
from .core import Array, Binder, Make, op, vector

if TYPE_CHECKING:
    from ..wave import Wave


@dataclass
class Mbarrier:
    """State of one mbarrier and what its completed phases pass on to those who wait.

    before: what the phase before the last completed one passed on. initialised: the thread that did, and the clock of
    its warp then.
    """

    initialised: tuple[int, int]
    count: int
    pending: int
    arrived: Array
    arrived_fenced: Array
    released: Array
    released_fenced: Array
    before: Array
    bytes: int = 0
    phase: int = 0

    def settle(self, wave: Wave) -> None:
        wave.events += 1
        if self.pending == 0 and self.bytes == 0:
            self.phase += 1
            self.pending = self.count
            self.before = self.released
            self.released, self.released_fenced = self.arrived.copy(), self.arrived_fenced.copy()


def _offsets(b: Binder, operand: Mem, threads: Array) -> Array:
    try:
        return b.wave.shared.offsets(b.address(operand)(threads) & 0xFFFFFFFF, threads, 8)
    except Bad as bad:
        raise b.wave.blame(bad, b.instr, threads) from None


def _barrier(b: Binder, offset: int, thread: int) -> Mbarrier:
    found = b.wave.mbarriers.get(offset)
    if found is None:
        raise b.wave.fault("mbarrier", "not initialised", b.instr, thread)
    return found


def _check_initialised(b: Binder, barrier: Mbarrier, warps: Array) -> None:
    shared, (thread, clock) = b.wave.shared, barrier.initialised
    column = shared.column_of_warp[thread // 32]
    late = (shared.known[warps, column] < clock) & (shared.column_of_warp[warps] != column)
    if late.any():
        who = shared.describe(int(column) << 5 | thread % 32)
        detail = f"mbarrier: no barrier after its initialisation by {who}, or no fence.mbarrier_init before that"
        raise b.wave.fault("shared-race", detail, b.instr, int(warps[late][0]) * 32)


def _arrive(b: Binder, offset: int, threads: Array, count: int) -> int:
    """`threads` arrive, `count` times each; returns the phase they arrived in."""
    barrier = _barrier(b, offset, int(threads[0]))
    warps = np.unique(threads // 32)
    _check_initialised(b, barrier, warps)
    joined, fenced = b.wave.shared.release(warps)
    barrier.arrived = np.maximum(barrier.arrived, joined)
    barrier.arrived_fenced = np.maximum(barrier.arrived_fenced, fenced)
    phase = barrier.phase
    barrier.pending -= count * threads.size
    if barrier.pending < 0:
        raise b.wave.fault("mbarrier", f"more arrivals than the {barrier.count} of the phase", b.instr, int(threads[0]))
    return phase


def _transfer(wave: Wave, barrier: Mbarrier, size: int, cta: int) -> None:
    """complete_tx by the TMA unit of `cta`."""
    column = wave.shared.agent_column(cta, TMA_LOAD)
    barrier.arrived[column] = max(barrier.arrived[column], wave.shared.agent_clock[cta, TMA_LOAD])
    barrier.bytes -= size
    barrier.settle(wave)


@op("mbarrier")
def mbarrier(b: Binder) -> Make:
    handlers: dict[str, Callable[[Binder], Make]] = {
        "init": _init,
        "inval": _inval,
        "arrive": _arrive_op,
        "expect_tx": _expect,
        "complete_tx": _complete,
        "test_wait": _wait,
        "try_wait": _wait,
    }
    if b.mods[0] not in handlers or b.has("noComplete"):
        raise b.unknown()
    return handlers[b.mods[0]](b)


def _memory(operand: object) -> Mem:
    assert isinstance(operand, Mem)
    return operand


def _init(b: Binder) -> Make:
    target, count = _memory(b.args[0]), b.src(b.args[1], np.uint32)

    def run(threads: Array) -> None:
        wave = b.wave
        for thread, offset in zip(threads, _offsets(b, target, threads), strict=True):
            if offset % 8:
                raise wave.fault("misaligned", "mbarrier", b.instr, int(thread))
            expected = int(np.broadcast_to(count, (wave.size,))[thread])
            zeros = [np.zeros(wave.shared.columns, np.int64) for _ in range(5)]
            initialised = int(thread), int(wave.shared.clock[thread // 32])
            wave.mbarriers[int(offset)] = Mbarrier(initialised, expected, expected, *zeros)

    return b.lanes(run)


def _inval(b: Binder) -> Make:
    target = _memory(b.args[0])

    def run(threads: Array) -> None:
        for thread, offset in zip(threads, _offsets(b, target, threads), strict=True):
            _barrier(b, int(offset), int(thread))
            del b.wave.mbarriers[int(offset)]

    return b.lanes(run)


def _arrive_op(b: Binder) -> Make:
    args = list(b.args)
    state = args.pop(0)
    out = None if getattr(state, "name", "") == "_" else b.dst(state, np.uint64)
    target = _memory(args.pop(0))
    expects = b.has("expect_tx")
    operand = b.src(args[0], np.uint32) if args else None

    def run(threads: Array) -> None:
        wave = b.wave
        offsets = _offsets(b, target, threads)
        for offset in np.unique(offsets):
            mine = threads[offsets == offset]
            barrier = _barrier(b, int(offset), int(mine[0]))
            values = (
                np.broadcast_to(operand, (wave.size,))[mine] if operand is not None else np.ones(mine.size, np.uint32)
            )
            if expects:
                barrier.bytes += int(values.sum())
                phase = _arrive(b, int(offset), mine, 1)
            else:
                phase = barrier.phase
                for thread, count in zip(mine, values, strict=True) if operand is not None else ():
                    _arrive(b, int(offset), np.array([thread]), int(count))
                if operand is None:
                    _arrive(b, int(offset), mine, 1)
            barrier.settle(wave)
            if out is not None:
                out[mine] = phase

    return b.lanes(run)


def _expect(b: Binder) -> Make:
    target, size = _memory(b.args[0]), b.src(b.args[1], np.uint32)

    def run(threads: Array) -> None:
        for thread, offset in zip(threads, _offsets(b, target, threads), strict=True):
            _barrier(b, int(offset), int(thread)).bytes += int(np.broadcast_to(size, (b.wave.size,))[thread])

    return b.lanes(run)


def _complete(b: Binder) -> Make:
    target, size = _memory(b.args[0]), b.src(b.args[1], np.uint32)

    def run(threads: Array) -> None:
        for thread, offset in zip(threads, _offsets(b, target, threads), strict=True):
            barrier = _barrier(b, int(offset), int(thread))
            barrier.bytes -= int(np.broadcast_to(size, (b.wave.size,))[thread])
            barrier.settle(b.wave)

    return b.lanes(run)


def _done(b: Binder) -> Callable[[Array], Array]:
    """A function: for which threads the phase that a test_wait or try_wait asks for is complete."""
    target = _memory(b.args[1])
    parity = b.has("parity")
    wanted = b.src(b.args[2], np.uint32 if parity else np.uint64)
    address = b.address(target)
    wave = b.wave

    def done(threads: Array) -> Array:
        offsets = wave.shared.offsets(address(threads) & 0xFFFFFFFF, threads, 8)
        result = np.ones(threads.size, bool)
        values = np.broadcast_to(wanted, (wave.size,))[threads]
        for offset in np.unique(offsets):
            barrier = wave.mbarriers.get(int(offset))
            if barrier is not None:
                mine = offsets == offset
                result[mine] = (barrier.phase & 1) != values[mine] if parity else barrier.phase > values[mine]
        return result

    return done


def poll(wave: Wave, instr: Instr) -> Callable[[Array], Array]:
    """For the scheduler: which threads can pass a try_wait now."""
    return _done(Binder(wave, instr))


def explain(wave: Wave, instr: Instr, thread: int) -> str:
    """Why a try_wait never succeeds."""
    b = Binder(wave, instr)
    offset = int(_offsets(b, _memory(b.args[1]), np.array([thread]))[0])
    barrier = _barrier(b, offset, thread)
    return f"mbarrier phase {barrier.phase} still expects {barrier.pending} arrivals and {barrier.bytes} bytes"


def _wait(b: Binder) -> Make:
    first = b.args[0].first if isinstance(b.args[0], Pair) else b.args[0]
    p, done, target, by_parity = b.dst(first, bool), _done(b), _memory(b.args[1]), b.has("parity")

    def run(threads: Array) -> None:
        wave = b.wave
        offsets = _offsets(b, target, threads)
        for thread, offset in zip(threads[:1], offsets[:1], strict=True):
            _barrier(b, int(offset), int(thread))
        result = done(threads)
        p[threads] = result
        for offset in np.unique(offsets[result]):
            barrier = _barrier(b, int(offset), int(threads[0]))
            warps = np.unique(threads[result & (offsets == offset)] // 32)
            _check_initialised(b, barrier, warps)
            if by_parity and not wave.shared.knows(warps, barrier.before):
                # A parity stands for every second phase: the same wait would have passed two phases earlier.
                detail = f"wait for the parity of phase {barrier.phase - 1} by a warp that has not seen phase "
                detail += f"{barrier.phase - 2} complete: it may pass two phases too early"
                raise wave.fault("mbarrier", detail, b.instr, int(threads[0]))
            wave.shared.acquire(warps, barrier.released, barrier.released_fenced)

    return b.lanes(run)


def cp_async_arrive(b: Binder) -> Make:
    """cp.async.mbarrier.arrive: all prior cp.async of the thread are complete when it arrives."""
    target, noinc = _memory(b.args[0]), b.has("noinc")

    def run(threads: Array) -> None:
        wave = b.wave
        wave.shared.wait(threads, None)
        offsets = _offsets(b, target, threads)
        for offset in np.unique(offsets):
            mine = threads[offsets == offset]
            barrier = _barrier(b, int(offset), int(mine[0]))
            if not noinc:
                barrier.pending += mine.size
            _arrive(b, int(offset), mine, 1)
            barrier.settle(wave)

    return b.lanes(run)


# ---- bulk copies and TMA --------------------------------------------------------------------------------------------


def _tensor_map(b: Binder, address: int, thread: int) -> TensorMap:
    wave = b.wave
    if address >> 60 == PARAM_WINDOW >> 60:
        start = address - PARAM_WINDOW
        raw = wave.params[start : start + 128].tobytes()
    else:
        try:
            raw = wave.memory.load(address + np.arange(0, 128, 16), 16).tobytes()
        except Bad as bad:
            raise wave.fault(bad.kind, "tensor map: " + bad.detail, b.instr, thread) from None
    found = TensorMap.decode(raw)
    if found is None:
        raise wave.fault("launch", "not a tiled tensor map", b.instr, thread)
    return found


def _follow(wave: Wave, thread: int, address: Array, width: int, *, write: bool, atomic: bool = False) -> None:
    """Tells the detector of races on global memory of an access by TMA for `thread`."""
    owner = np.full(address.size, wave.owner[thread])
    wave.memory.races.access(address, owner, width, write=write, atomic=atomic)


def _scalar(array: Array, thread: int) -> int:
    return int(np.broadcast_to(array, (thread + 1,) if array.ndim == 0 else array.shape)[thread])


def bulk(b: Binder) -> Make:
    """cp.async.bulk*, by modifiers."""
    wave = b.wave
    if b.has("commit_group"):

        def commit(threads: Array) -> None:
            for cta in np.unique(threads // wave.padded):
                wave.shared.agent_clock[cta, TMA_STORE] += 1

        return b.lanes(commit)
    if b.has("wait_group"):
        pending = b.args[0]
        assert isinstance(pending, Imm)

        def wait(threads: Array) -> None:
            # Groups are counted per CTA: stores are issued by one thread of it in every kernel there is.
            for thread in threads:
                cta = int(thread) // wave.padded
                column = wave.shared.agent_column(cta, TMA_STORE)
                done = wave.shared.agent_clock[cta, TMA_STORE] - 1 - pending.value
                known = wave.shared.known[int(thread) // 32]
                known[column] = max(known[column], done)

        return b.lanes(wait)
    if b.has("tile::gather4", "im2col_no_offs", "im2col::w"):
        raise b.unknown()
    if b.has("reduce") and not b.has("tensor"):
        raise b.unknown()
    if b.has("tensor"):
        first_space = next(m for m in b.mods if m.split("::")[0] in ("shared", "global"))
        return _tma_store(b) if first_space == "global" else _tma_load(b)
    return _bulk_load(b)


def _tma_load(b: Binder) -> Make:
    wave = b.wave
    args = list(b.args)
    if b.has("L2::cache_hint"):
        args.pop()
    target, source, barrier_at = (_memory(a) for a in args[:3])
    if source.coords is None:
        raise b.unknown("tensor without coordinates")
    shifts = [b.src(o, np.uint16) for o in vector(args.pop(3))] if b.has("im2col") else []
    multicast = b.src(args[3], np.uint16) if b.has("multicast::cluster") else None
    to, map_at, barrier_address = b.address(target), b.address(source), b.address(barrier_at)
    coords = [b.src(c, np.int32) for c in vector(source.coords)]

    def one(thread: int) -> None:
        lane = np.array([thread])
        tensor = _tensor_map(b, int(map_at(lane)[0]), thread)
        if len(coords) != tensor.rank or tensor.is_im2col != b.has("im2col"):
            raise wave.fault("launch", f"{tensor} does not fit the instruction", b.instr, thread)
        start = int(to(lane)[0])
        inner = start & (1 << RANK_SHIFT) - 1
        if inner % 128:
            raise wave.fault("misaligned", f"TMA destination {inner} is not a multiple of 128", b.instr, thread)
        address, inside = tensor.elements([_scalar(c, thread) for c in coords], [_scalar(o, thread) for o in shifts])
        data = np.zeros(address.size, ELEMENT[tensor.element])
        _follow(wave, thread, address[inside], tensor.element, write=False)
        data[inside] = wave.memory.load(address[inside], tensor.element)
        wave.counters.global_load += int(inside.sum()) * tensor.element
        wave.counters.async_copy += tensor.bytes
        own = thread // wave.padded
        ctas = [own]
        if multicast is not None:
            cluster, bits = own // wave.cluster * wave.cluster, _scalar(multicast, thread)
            ctas = [cluster + rank for rank in range(wave.cluster) if bits >> rank & 1]
        barrier_in = int(barrier_address(lane)[0])
        for cta in ctas:
            place, barrier_there = tensor.place(inner), barrier_in
            if multicast is not None or start != inner:
                rank = cta % wave.cluster if multicast is not None else (start >> RANK_SHIFT) - 1
                place = place | rank + 1 << RANK_SHIFT
                barrier_there = barrier_in & (1 << RANK_SHIFT) - 1 | rank + 1 << RANK_SHIFT
                cta = own // wave.cluster * wave.cluster + rank
            write_transfer(b, thread, cta, place, data.view(np.complex128), barrier_there, tensor.bytes)

    return b.lanes(lambda threads: _each(b, threads, one))


def write_transfer(b: Binder, thread: int, cta: int, place: Array, data: Array, barrier_at: int, size: int) -> None:
    """Bytes that the TMA unit of `cta` writes for `thread`, and their count on the mbarrier."""
    wave = b.wave
    offsets = wave.shared.offsets(place, np.full(place.size, thread), 16, awaited=True)
    wave.shared.agent_write(offsets, 16, data, cta, TMA_LOAD, thread // 32)
    where = int(wave.shared.offsets(np.array([barrier_at]), np.array([thread]), 8, awaited=True)[0])
    barrier = _barrier(b, where, thread)
    initialised, clock = barrier.initialised
    if not wave.shared.has_fenced(initialised // 32, clock):
        who = wave.shared.describe(int(wave.shared.name[initialised]))
        detail = f"TMA counts on an mbarrier: no fence.mbarrier_init or fence.proxy.async by {who} after its init"
        raise wave.fault("shared-race", detail, b.instr, thread)
    _transfer(wave, barrier, size, cta)
    wave.shared.agent_clock[cta, TMA_LOAD] += 1


def _each(b: Binder, threads: Array, function: Callable[[int], None]) -> None:
    for thread in threads:
        try:
            function(int(thread))
        except Bad as bad:
            raise b.wave.fault(bad.kind, bad.detail, b.instr, int(thread)) from None


def _bulk_load(b: Binder) -> Make:
    """cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [dst], [src], size, [mbarrier]."""
    if not b.has("mbarrier::complete_tx::bytes") or b.has("multicast::cluster"):
        raise b.unknown()
    wave = b.wave
    to, come_from = b.address(b.args[0]), b.address(b.args[1])
    size_at, barrier_at = b.src(b.args[2], np.uint32), b.address(b.args[3])

    def one(thread: int) -> None:
        lane = np.array([thread])
        size = _scalar(size_at, thread)
        start, source = int(to(lane)[0]), int(come_from(lane)[0])
        if size % 16 or start % 16 or source % 16:
            raise Bad("misaligned", 0, "bulk copies need multiples of 16 bytes")
        steps = 16 * np.arange(size // 16)
        _follow(wave, thread, source + steps, 16, write=False)
        data = wave.memory.load(source + steps, 16)
        wave.counters.global_load += size
        wave.counters.async_copy += size
        write_transfer(b, thread, thread // wave.padded, start + steps, data, int(barrier_at(lane)[0]), size)

    return b.lanes(lambda threads: _each(b, threads, one))


def _tma_store(b: Binder) -> Make:
    wave = b.wave
    target, source = _memory(b.args[0]), _memory(b.args[1])
    if target.coords is None or not b.has("bulk_group"):
        raise b.unknown()
    reduction = b.mods[b.mods.index("shared::cta") + 1] if b.has("reduce") else None
    map_at, come_from = b.address(target), b.address(source)
    coords = [b.src(c, np.int32) for c in vector(target.coords)]

    def one(thread: int) -> None:
        lane = np.array([thread])
        tensor = _tensor_map(b, int(map_at(lane)[0]), thread)
        place = tensor.place(int(come_from(lane)[0]))
        offsets = wave.shared.offsets(place, np.full(place.size, thread), 16)
        raw = wave.shared.agent_read(offsets, 16, thread // wave.padded, TMA_STORE, np.array([thread // 32]))
        address, inside = tensor.elements([_scalar(c, thread) for c in coords], [])
        data = raw.view(ELEMENT[tensor.element])[inside]
        _follow(wave, thread, address[inside], tensor.element, write=True, atomic=reduction is not None)
        if reduction is not None:
            reduced = tensor.reduce(reduction, wave.memory.load(address[inside], tensor.element), data)
            if reduced is None:
                raise wave.fault("unknown-opcode", f"{reduction} on tensors of type {tensor.kind}", b.instr, thread)
            data = reduced
            wave.counters.global_load += data.nbytes
        wave.memory.store(address[inside], tensor.element, data)
        wave.counters.global_store += data.nbytes

    return b.lanes(lambda threads: _each(b, threads, one))


# ---- clusters and the rest ------------------------------------------------------------------------------------------


@op("mapa")
def mapa(b: Binder) -> Make:
    if b.type != "u32" or not b.has("shared::cluster"):
        raise b.unknown()
    d, address, rank = b.dst(b.args[0], np.uint32), b.src(b.args[1], np.uint32), b.src(b.args[2], np.uint32)
    keep = np.uint32((1 << RANK_SHIFT) - 1)
    return b.value(d, lambda: (address & keep) | (rank + np.uint32(1)) << np.uint32(RANK_SHIFT))


@op("setmaxnreg")
def setmaxnreg(b: Binder) -> Make:
    from .tensor import full_warps

    count = int(b.src(b.args[0], np.uint32))

    def run(mask: Array) -> None:
        b.wave.registers[full_warps(b, mask)] = count

    return b.masks(run)


@op("fence")
def fence(b: Binder) -> Make:
    """Memory fences order nothing here that the interpreter does not order anyway, but the async proxy needs to
    be told, and relaxed arrivals at a cluster's barrier pass on what fence.mbarrier_init releases.
    """
    if b.has("mbarrier_init"):
        tell = b.wave.shared.fence_initialisation
    elif b.mods[:2] == ("proxy", "async"):
        tell = b.wave.shared.proxy_fence
    else:
        return lambda mask: lambda: None
    return b.lanes(lambda threads: tell(np.unique(threads // 32)))
