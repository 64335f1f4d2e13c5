"""Moves, selections and address-space conversions."""

from __future__ import annotations

from functools import partial

import numpy as np

from ..memory import LOCAL_WINDOW, PARAM_WINDOW, SHARED_WINDOW
from ..ptx import Sym, Vec
from .core import DTYPES, Array, Binder, Closure, Make, op, unsigned


@op("mov")
def mov(b: Binder) -> Make:
    target, source = b.args
    if isinstance(target, Vec):
        return _unpack(b, target, source)
    if isinstance(source, Vec):
        return _pack(b, target, source)
    dtype = DTYPES[b.type]
    d, x = b.dst(target, dtype), b.src(source, dtype)

    def make(mask: Array | None) -> Closure:
        return partial(np.copyto, d, x) if mask is None else partial(np.copyto, d, x, where=mask)

    return make


def _pack(b: Binder, target: object, source: Vec) -> Make:
    d = b.storage(target)  # type: ignore[arg-type]
    part = d.itemsize // len(source.items)
    pieces = d.view(unsigned(part)).reshape(b.wave.size, len(source.items))
    values = [b.src(item, unsigned(part)) for item in source.items]

    # All sources are read before the first write: they may overlap the destination.
    return b.value(pieces, lambda: np.stack([np.broadcast_to(v, (b.wave.size,)) for v in values], axis=1))


def _unpack(b: Binder, target: Vec, source: object) -> Make:
    x = b.storage(source)  # type: ignore[arg-type]
    part = x.itemsize // len(target.items)
    pieces = x.view(unsigned(part)).reshape(b.wave.size, len(target.items))
    outs = [b.dst(item, unsigned(part)) for item in target.items]

    def run(mask: Array) -> None:
        copy = pieces.copy()
        for i, out in enumerate(outs):
            np.copyto(out, copy[:, i], where=mask)

    return b.masks(run)


@op("selp")
def selp(b: Binder) -> Make:
    dtype = DTYPES[b.type]
    x, y, p = b.src(b.args[1], dtype), b.src(b.args[2], dtype), b.src(b.args[3], bool)
    return b.value(b.dst(b.args[0], dtype), lambda: np.where(p, x, y))


@op("slct")
def slct(b: Binder) -> Make:
    dtype = DTYPES[b.mods[-2]]
    x, y, c = b.src(b.args[1], dtype), b.src(b.args[2], dtype), b.src(b.args[3], DTYPES[b.type])
    return b.value(b.dst(b.args[0], dtype), lambda: np.where(c >= 0, x, y))


@op("cvta")
def cvta(b: Binder) -> Make:
    space = next(
        m.split("::")[0] for m in b.mods if m.split("::")[0] in ("global", "shared", "local", "const", "param")
    )
    window = {"shared": SHARED_WINDOW, "local": LOCAL_WINDOW, "param": PARAM_WINDOW}.get(space, 0)
    dtype = DTYPES[b.type]
    source = b.args[1]
    if isinstance(source, Sym) and b.wave.address_of(source.name)[0] != space and space in ("shared", "local"):
        raise b.unknown(f"{source.name} is not in .{space}")
    d, x = b.dst(b.args[0], dtype), b.src(source, dtype)
    base = np.uint64(window)
    return b.ufunc(np.subtract if b.has("to") else np.add, d, x, base)


@op("isspacep")
def isspacep(b: Binder) -> Make:
    x, d = b.src(b.args[1], np.uint64), b.dst(b.args[0], bool)
    number = {"shared": 1, "local": 2, "global": 0}[b.mods[0].split("::")[0]]
    return b.value(d, lambda: (x >> np.uint64(60)) == number)


@op("prefetch", "prefetchu", "discard", "applypriority", "membar", "nanosleep", "pmevent")
def no_effect(b: Binder) -> Make:
    """Hints, and orderings that a sequential interpreter gives anyway."""
    return lambda mask: lambda: None


@op("griddepcontrol")
def griddepcontrol(b: Binder) -> Make:
    if b.mods == ("launch_dependents",):
        return lambda mask: lambda: None
    if b.mods != ("wait",):
        raise b.unknown("only .wait and .launch_dependents")
    wave = b.wave

    def wait(threads: Array) -> None:
        wave.waited[threads // wave.padded] = True
        wave.memory.races.wait(wave.owner[threads])

    return b.lanes(wait)


@op("createpolicy")
def createpolicy(b: Binder) -> Make:
    return b.value(b.dst(b.args[0], np.uint64), lambda: 0)


@op("call")
def call(b: Binder) -> Make:
    """The only functions nvcc leaves as calls in kernels of ours: device-side assert (a fault) and printf (ignored)."""
    name = next((a.name for a in b.args if isinstance(a, Sym)), "?")
    if name == "vprintf":
        return lambda mask: lambda: None
    if name != "__assertfail":
        raise b.unknown(f"call of {name}")

    def run(threads: Array) -> None:
        raise b.wave.fault("trap", "device-side assertion failed", b.instr, int(threads[0]))

    return b.lanes(run)
