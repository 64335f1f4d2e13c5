"""Loads, stores, atomics and asynchronous copies in all state spaces."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from ..memory import ELEMENT, LIVE, LOCAL_WINDOW, PARAM_WINDOW, SHARED_WINDOW, Bad
from ..numerics import bf16_to_f32, f32_to_bf16
from ..ptx import Imm, Mem, Reg, Sym
from .core import DTYPES, Array, Binder, Closure, Make, op, unsigned, vector
from .hopper import bulk, cp_async_arrive

WINDOWS = ((0, "global", 0), (1, "shared", SHARED_WINDOW), (2, "local", LOCAL_WINDOW), (3, "param", PARAM_WINDOW))
SPACES = ("global", "shared", "local", "param", "const")


def space_of(b: Binder) -> str:
    for mod in b.mods:
        name = mod.split("::")[0]
        if name in SPACES:
            return "global" if name == "const" else name
    return "generic"


def _count(b: Binder) -> int:
    return next((int(m[1]) for m in b.mods if m in ("v2", "v4", "v8")), 1)


def _policy(b: Binder) -> None:
    if b.has("acquire", "release") and b.has("cluster"):
        raise b.unknown("cluster scope")


class Access:
    """Reads and writes of one space for the threads of one instruction; faults name the instruction."""

    def __init__(self, b: Binder, space: str) -> None:
        self.b, self.space = b, space
        self.wave = b.wave
        self.synchronises = b.has("acquire", "release", "volatile")
        self.atomic = self.synchronises or b.has("relaxed")

    def load(self, address: Array, threads: Array, width: int) -> Array:
        try:
            return self._load(self.space, address, threads, width)
        except Bad as bad:
            raise self.wave.blame(bad, self.b.instr, threads) from None

    def store(self, address: Array, threads: Array, width: int, values: Array) -> None:
        try:
            self._store(self.space, address, threads, width, values)
        except Bad as bad:
            raise self.wave.blame(bad, self.b.instr, threads) from None

    def _load(self, space: str, address: Array, threads: Array, width: int) -> Array:
        wave = self.wave
        if space == "global":
            wave.counters.global_load += threads.size * width
            self._follow(address, threads, width, write=False)
            return wave.memory.load(address, width)
        if space == "shared":
            wave.counters.shared_load += threads.size * width
            return wave.shared.load_at(address, threads, width)
        if space == "local":
            return wave.local.load(self._local(address, threads, width), width, need=LIVE)
        if space == "param":
            if (address < 0).any() or (address > wave.params.size - width).any():
                raise Bad("out-of-bounds", 0, "parameter access")
            return wave.params[address[:, None] + np.arange(width)].view(ELEMENT[width])[:, 0]
        out = np.empty(threads.size, ELEMENT[width])
        for part, base, lanes in self._windows(address):
            try:
                out[lanes] = self._load(part, address[lanes] - base, threads[lanes], width)
            except Bad as bad:
                raise Bad(bad.kind, int(lanes[bad.lane]), bad.detail) from None
        return out

    def _store(self, space: str, address: Array, threads: Array, width: int, values: Array) -> None:
        wave = self.wave
        if space == "global":
            wave.counters.global_store += threads.size * width
            self._follow(address, threads, width, write=True)
            wave.memory.store(address, width, values)
        elif space == "shared":
            wave.counters.shared_store += threads.size * width
            wave.shared.store_at(address, threads, width, values)
        elif space == "local":
            wave.local.store(self._local(address, threads, width), width, values)
        else:
            for part, base, lanes in self._windows(address):
                try:
                    self._store(part, address[lanes] - base, threads[lanes], width, values[lanes])
                except Bad as bad:
                    raise Bad(bad.kind, int(lanes[bad.lane]), bad.detail) from None

    def _follow(self, address: Array, threads: Array, width: int, *, write: bool) -> None:
        races, owner = self.wave.memory.races, self.wave.owner[threads]
        races.access(address, owner, width, write=write, atomic=self.atomic)
        if self.synchronises:
            races.synchronise(address, owner)

    def _local(self, address: Array, threads: Array, width: int) -> Array:
        size = self.wave.program.local_size
        wrong = (address < 0) | (address > size - width)
        if wrong.any():
            raise Bad(
                "out-of-bounds",
                int(wrong.argmax()),
                f"{width}-byte local access at offset {int(address[wrong.argmax()])}",
            )
        return threads * size + address

    @staticmethod
    def _windows(address: Array) -> list[tuple[str, int, Array]]:
        """Splits generic addresses by space: (space, base to subtract, lanes)."""
        window = address >> 60
        parts = []
        for number, name, base in WINDOWS:
            lanes = (window == number).nonzero()[0]
            if lanes.size:
                parts.append((name, base, lanes))
        strange = ((window < 0) | (window > 3)).nonzero()[0]
        if strange.size:
            raise Bad(
                "out-of-bounds", int(strange[0]), f"wild generic address {int(address[strange[0]]) & (1 << 64) - 1:#x}"
            )
        return parts


def _spread(wave: Any, outs: list[Array], values: Array, threads: Array) -> None:
    """Writes column i of values to outs[i] for the given threads."""
    if threads.size == wave.size:
        for i, out in enumerate(outs):
            out[:] = values[:, i]
    else:
        for i, out in enumerate(outs):
            out[threads] = values[:, i]


@op("ld", "ldu")
def ld(b: Binder) -> Make:
    _policy(b)
    space, count, dtype = space_of(b), _count(b), DTYPES[b.type]
    outs = [b.dst(item, dtype) for item in vector(b.args[0])]
    if space == "param":
        return _ld_param(b, outs, dtype)
    width = count * dtype.itemsize
    if width > 16:
        raise b.unknown(f"{width}-byte load")
    address, access, wave = b.address(b.args[1]), Access(b, space), b.wave

    def run(threads: Array) -> None:
        values = access.load(address(threads), threads, width)
        _spread(wave, outs, values.view(dtype).reshape(threads.size, count), threads)

    return b.lanes(run)


def _ld_param(b: Binder, outs: list[Array], dtype: Any) -> Make:
    memory = b.args[1]
    assert isinstance(memory, Mem)
    params, size = b.wave.params, dtype.itemsize
    base = memory.base
    if isinstance(base, Sym) and base.name in b.wave.program.params:
        start = b.wave.address_of(base.name)[1] + base.offset + memory.offset
        sources = [params[start + i * size : start + (i + 1) * size].view(dtype) for i in range(len(outs))]

        def make(mask: Array | None) -> Closure:
            def run() -> None:
                for out, source in zip(outs, sources, strict=True):
                    np.copyto(out, source, **({} if mask is None else {"where": mask}))

            return run

        return make
    address = b.address(memory)
    if isinstance(base, Sym):  # a .param variable of a call
        access = Access(b, "local")
        return b.lanes(
            lambda threads: _spread(
                b.wave, outs, access.load(address(threads), threads, size).view(dtype).reshape(-1, 1), threads
            )
        )

    def gather(threads: Array) -> None:
        where = address(threads)[:, None] + np.arange(size * len(outs))
        if (where < 0).any() or (where >= params.size).any():
            raise b.wave.fault("out-of-bounds", "parameter access", b.instr, int(threads[0]))
        _spread(b.wave, outs, params[where].view(dtype).reshape(threads.size, len(outs)), threads)

    return b.lanes(gather)


@op("st")
def st(b: Binder) -> Make:
    _policy(b)
    space, count, dtype = space_of(b), _count(b), DTYPES[b.type]
    if b.has("async"):
        raise b.unknown()
    width = count * dtype.itemsize
    if width > 16:
        raise b.unknown(f"{width}-byte store")
    raw = unsigned(dtype.itemsize)
    sources = [b.src(item, raw) for item in vector(b.args[1])]
    address, access = b.address(b.args[0]), Access(b, "local" if space == "param" else space)

    def run(threads: Array) -> None:
        values = np.empty((threads.size, count), raw)
        for i, source in enumerate(sources):
            values[:, i] = source if source.ndim == 0 else source[threads]
        access.store(address(threads), threads, width, values.view(ELEMENT[width])[:, 0])

    return b.lanes(run)


# ---- atomics ------------------------------------------------------------------------------------------------------


def _wrap_inc(old: Array, x: Array) -> Array:
    return np.where(old >= x, 0, old + 1).astype(old.dtype)


def _wrap_dec(old: Array, x: Array) -> Array:
    return np.where((old == 0) | (old > x), x, old - 1).astype(old.dtype)


def _add(kind: str) -> Callable[[Array, Array], Array]:
    if kind == "f16x2":
        return lambda a, c: (a.view(np.float16) + c.view(np.float16)).view(np.uint32)
    if kind in ("bf16x2", "bf16"):
        return lambda a, c: f32_to_bf16(bf16_to_f32(a.view(np.uint16)) + bf16_to_f32(c.view(np.uint16))).view(a.dtype)
    return np.add


_RMW: dict[str, Callable[[Array, Array], Array]] = {
    "min": np.minimum,
    "max": np.maximum,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
    "exch": lambda old, x: x,
    "inc": _wrap_inc,
    "dec": _wrap_dec,
}


def _ranks(address: Array) -> list[Array]:
    """Lane sets with distinct addresses; executed in order they serialise lanes that hit the same address by
    thread number.
    """
    if np.unique(address).size == address.size:
        return [np.arange(address.size)]
    order = np.argsort(address, kind="stable")
    same = np.r_[False, address[order][1:] == address[order][:-1]]
    starts = np.maximum.accumulate(np.where(same, 0, np.arange(address.size)))
    rank = np.empty(address.size, np.int64)
    rank[order] = np.arange(address.size) - starts
    return [(rank == r).nonzero()[0] for r in range(int(rank.max()) + 1)]


@op("atom", "red")
def atom(b: Binder) -> Make:
    if b.instr.opcode == "red" and b.has("async"):
        raise b.unknown()
    if _count(b) > 1 or b.has("vec"):
        raise b.unknown("vector atomics")
    space, kind, dtype = space_of(b), b.type, DTYPES[b.type]
    name = next(m for m in b.mods if m in _RMW or m in ("add", "cas"))
    args = list(b.args)
    out = b.dst(args.pop(0), dtype) if b.instr.opcode == "atom" else None
    address, operands = b.address(args[0]), [b.src(a, dtype) for a in args[1:]]
    function = _add(kind) if name == "add" else _RMW.get(name)
    width, wave = dtype.itemsize, b.wave

    def update(old: Array, threads: Array) -> Array:
        values = [np.broadcast_to(o, (wave.size,))[threads] for o in operands]
        if name == "cas":
            return np.where(old == values[0], values[1], old)
        assert function is not None
        return function(old, values[0])

    def step(part: str, where: Array, threads: Array) -> None:
        if part == "shared":
            offsets = wave.shared.atomic_at(where, threads, width)
        else:
            wave.memory.races.access(where, wave.owner[threads], width, write=True, atomic=True)
            if out is not None:
                wave.memory.races.synchronise(where, wave.owner[threads])
        for lanes in _ranks(where if part == "global" else offsets):
            chosen = threads[lanes]
            if part == "shared":
                old = wave.shared.load(offsets[lanes], width).view(dtype)
                wave.shared.store(offsets[lanes], width, update(old, chosen).view(ELEMENT[width]))
            else:
                wave.counters.global_load += chosen.size * width
                wave.counters.global_store += chosen.size * width
                old = wave.memory.load(where[lanes], width).view(dtype)
                wave.memory.store(where[lanes], width, update(old, chosen).view(ELEMENT[width]))
            if out is not None:
                out[chosen] = old

    def run(threads: Array) -> None:
        where = address(threads)
        parts = [(space, 0, np.arange(threads.size))] if space != "generic" else Access._windows(where)
        for part, base, lanes in parts:
            if part not in ("shared", "global"):
                raise wave.fault("unknown-opcode", f"atomic on .{part}", b.instr, int(threads[0]))
            try:
                step(part, where[lanes] - base, threads[lanes])
            except Bad as bad:
                raise wave.fault(bad.kind, bad.detail, b.instr, int(threads[lanes][bad.lane])) from None

    return b.lanes(run)


# ---- cp.async -----------------------------------------------------------------------------------------------------


@op("cp")
def cp(b: Binder) -> Make:
    if b.mods[0] not in ("async", "reduce"):
        raise b.unknown()
    if b.has("bulk"):
        return bulk(b)
    if b.has("mbarrier"):
        return cp_async_arrive(b)
    if b.has("commit_group"):

        def commit(threads: Array) -> None:
            b.wave.shared.copies.group[threads] += 1

        return b.lanes(commit)
    if b.has("wait_all"):
        return b.lanes(lambda threads: b.wave.shared.wait(threads, None))
    if b.has("wait_group"):
        count = b.args[0]
        assert isinstance(count, Imm)
        return b.lanes(lambda threads: b.wave.shared.wait(threads, count.value))
    return _copy(b)


def _copy(b: Binder) -> Make:
    args = list(b.args)
    if any(m == "L2::cache_hint" for m in b.mods):
        args.pop()
    target, source, size_arg = args[:3]
    assert isinstance(size_arg, Imm)
    width = size_arg.value
    to, come_from, wave = b.address(target), b.address(source), b.wave
    size: Array | None = None
    ignore: Array | None = None
    if len(args) > 3:
        extra = args[3]
        if isinstance(extra, Reg) and wave.regs[extra.name].dtype == np.bool_:
            ignore = wave.regs[extra.name]
        else:
            size = b.src(extra, np.uint32)

    def fetch(threads: Array) -> Array:
        values = np.zeros(threads.size, ELEMENT[width])
        wanted = np.full(threads.size, width)
        if size is not None:
            wanted[:] = size if size.ndim == 0 else size[threads]
        if ignore is not None:
            wanted[ignore[threads]] = 0
        if (wanted > width).any():
            raise Bad("out-of-bounds", int((wanted > width).argmax()), f"source size above the copy's {width} bytes")
        address = come_from(threads)
        whole = (wanted == width).nonzero()[0]
        wave.counters.global_load += int(wanted.sum())
        wave.counters.async_copy += int(wanted.sum())
        if whole.size:
            try:
                wave.memory.races.access(address[whole], wave.owner[threads[whole]], width, write=False)
                values[whole] = wave.memory.load(address[whole], width)
            except Bad as bad:
                raise Bad(bad.kind, int(whole[bad.lane]), bad.detail) from None
        rows = values.view(np.uint8).reshape(threads.size, width)
        for lane in ((wanted > 0) & (wanted < width)).nonzero()[0]:
            try:
                rows[lane, : wanted[lane]] = wave.memory.load(address[lane] + np.arange(wanted[lane]), 1)
            except Bad as bad:
                raise Bad(bad.kind, int(lane), bad.detail) from None
        return values

    def run(threads: Array) -> None:
        try:
            wave.shared.copy_to(to(threads), threads, width, fetch(threads))
        except Bad as bad:
            raise wave.blame(bad, b.instr, threads) from None

    return b.lanes(run)
