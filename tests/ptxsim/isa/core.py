"""Registry of opcodes and the binder that turns an instruction's operands into arrays.

A handler `@op("add")` receives a Binder and returns `make`, where `make(mask)` builds the closure that executes the
instruction: for all threads (mask None) or where the bool array `mask` holds at the time of the call.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..in_flight import is_copy, is_mma_async
from ..ptx import Imm, Instr, Mem, Operand, PtxError, Reg, Sym, Vec

if TYPE_CHECKING:
    from ..wave import Wave

Array = NDArray[Any]
Closure = Callable[[], Any]
Make = Callable[[Array | None], Closure]
Handler = Callable[["Binder"], Make]

OPS: dict[str, Handler] = {}

DTYPES: dict[str, Any] = {
    **{f"{k}{b}": np.dtype(f"u{b // 8}") for k in "bu" for b in (8, 16, 32, 64)},
    **{f"s{b}": np.dtype(f"i{b // 8}") for b in (8, 16, 32, 64)},
    "f16": np.dtype(np.float16),
    "f32": np.dtype(np.float32),
    "f64": np.dtype(np.float64),
    "bf16": np.dtype(np.uint16),
    "f16x2": np.dtype(np.uint32),
    "bf16x2": np.dtype(np.uint32),
    "tf32": np.dtype(np.uint32),
    "b128": np.dtype(np.complex128),
    "pred": np.dtype(bool),
}


def op(*names: str) -> Callable[[Handler], Handler]:
    def register(handler: Handler) -> Handler:
        for name in names:
            OPS[name] = handler
        return handler

    return register


def unsigned(size: int) -> np.dtype[Any]:
    return np.dtype(np.complex128) if size == 16 else np.dtype(f"u{size}")


class Binder:
    """One instruction bound to one wave."""

    def __init__(self, wave: Wave, instr: Instr) -> None:
        self.wave, self.instr = wave, instr
        self.mods, self.args = instr.mods, instr.operands
        self.asked: set[str] = set()  # modifiers that the handler has looked for
        self.reads: list[str] = []  # registers, in the order in which the handler asks for them
        self.writes: list[str] = []

    def unknown(self, why: str = "") -> PtxError:
        return PtxError(why or "not implemented")

    @property
    def type(self) -> str:
        return self.mods[-1]

    def has(self, *mods: str) -> bool:
        self.asked.update(mods)
        return any(m in self.mods for m in mods)

    def rounding(self) -> str:
        return next((m for m in self.mods if m in ("rn", "rz", "rm", "rp")), "rn")

    def storage(self, operand: Operand) -> Array:
        """The register's own array (unsigned, or bool)."""
        if not isinstance(operand, Reg):
            raise self.unknown(f"operand {operand} where a register is expected")
        if operand.name in self.wave.regs:
            self.reads.append(operand.name)
            return self.wave.regs[operand.name]
        if operand.name in self.wave.special:
            return self.wave.special[operand.name]
        raise self.unknown(f"register {operand.name}")

    def src(self, operand: Operand, dtype: Any) -> Array:
        """A live view of an operand as `dtype`: one element per thread, or 0-d for constants."""
        dtype = np.dtype(dtype)
        if isinstance(operand, Imm):
            return constant(operand, dtype)
        if isinstance(operand, Sym):
            return self.symbol_address(operand, dtype, self.wave.address_bits(operand.name))
        array = self.storage(operand)
        if dtype == np.bool_ or array.dtype == np.bool_:
            if array.dtype != dtype:
                raise self.unknown("predicate and data registers mixed")
            return array
        if array.itemsize == dtype.itemsize:
            return array.view(dtype)
        if array.itemsize > dtype.itemsize:
            return array.view(unsigned(dtype.itemsize))[:: array.itemsize // dtype.itemsize].view(dtype)
        raise self.unknown(f"{array.itemsize}-byte register read as {dtype}")

    def symbol_address(self, symbol: Sym, dtype: Any, bits: Array | int = 0) -> Array:
        _, address = self.wave.address_of(symbol.name)
        return (np.array(address + symbol.offset, np.uint64) | np.array(bits, np.uint64)).astype(dtype)

    def dst(self, operand: Operand, dtype: Any) -> Array:
        """The array to write `dtype` results to; wider registers are extended by the dtype's signedness."""
        dtype = np.dtype(dtype)
        if isinstance(operand, Reg) and operand.name == "_":
            return np.zeros(self.wave.size, dtype)
        array = self.storage(operand)
        if isinstance(operand, Reg) and operand.name in self.wave.regs:
            self.writes.append(self.reads.pop())
        if array.itemsize == dtype.itemsize:
            return array.view(dtype)
        if array.itemsize > dtype.itemsize and dtype.kind in "iu":
            return array.view(f"{dtype.kind}{array.itemsize}")
        raise self.unknown(f"{dtype} result for a {array.itemsize}-byte register")

    def ufunc(self, function: Any, dst: Array, *srcs: Array) -> Make:
        def make(mask: Array | None) -> Closure:
            return partial(function, *srcs, out=dst) if mask is None else partial(function, *srcs, out=dst, where=mask)

        return make

    def value(self, dst: Array, function: Callable[[], Any]) -> Make:
        """dst = function(), computed for all threads and stored where the mask holds."""

        def make(mask: Array | None) -> Closure:
            if mask is None:

                def run_all() -> None:
                    dst[...] = function()

                return run_all
            select = mask if dst.ndim == 1 else mask[:, None]
            return lambda: np.copyto(dst, function(), where=select, casting="unsafe")

        return make

    def lanes(self, function: Callable[[Array], None]) -> Make:
        """function(active thread numbers), not called when there is none."""
        everyone = np.arange(self.wave.size)

        def make(mask: Array | None) -> Closure:
            if mask is None:
                return partial(function, everyone)

            def run() -> None:
                threads = mask.nonzero()[0]
                if threads.size:
                    function(threads)

            return run

        return make

    def masks(self, function: Callable[[Array], None]) -> Make:
        """function(active mask), not called when no thread is active."""
        everyone = np.ones(self.wave.size, bool)

        def make(mask: Array | None) -> Closure:
            if mask is None:
                return partial(function, everyone)

            def run() -> None:
                if mask.any():
                    function(mask)

            return run

        return make

    def address(self, operand: Operand) -> Callable[[Array], Array]:
        """A function from thread numbers to int64 addresses."""
        assert isinstance(operand, Mem)
        offset = operand.offset
        if isinstance(operand.base, Reg):
            register = self.storage(operand.base)
            if register.itemsize == 8:
                wide = register.view(np.int64)
                return lambda threads: wide[threads] + offset
            # 32-bit addresses wrap at 4 GiB like the hardware's.
            return lambda threads: (register[threads].astype(np.int64) + offset) & 0xFFFFFFFF
        fixed = offset + (
            operand.base.value if isinstance(operand.base, Imm) else int(self.symbol_address(operand.base, np.int64))
        )
        return lambda threads: np.full(threads.size, fixed, np.int64)


def constant(imm: Imm, dtype: Any) -> Array:
    """A literal as a 0-d array."""
    dtype = np.dtype(dtype)
    if dtype == np.bool_:
        return np.array(bool(imm.value))
    bits = imm.value & (1 << 8 * dtype.itemsize) - 1
    if imm.float_bits == 64 and dtype.itemsize < 8:
        return (
            np.array(imm.value & (1 << 64) - 1, np.uint64)
            .view(np.float64)
            .astype(np.float32)
            .view(np.uint32)
            .astype(unsigned(dtype.itemsize))
            .view(dtype)
        )
    if imm.float_bits == 32 and dtype == np.float64:
        return np.array(bits & 0xFFFFFFFF, np.uint32).view(np.float32).astype(np.float64)
    return np.array(bits, unsigned(dtype.itemsize)).view(dtype)


def vector(operand: Operand) -> tuple[Operand, ...]:
    return operand.items if isinstance(operand, Vec) else (operand,)


def _fails(wave: Wave, instr: Instr, why: str) -> Make:
    def make(mask: Array | None) -> Closure:
        def run() -> None:
            if mask is None or mask.any():
                thread = 0 if mask is None else int(mask.argmax())
                name = ".".join((instr.opcode, *instr.mods))
                raise wave.fault("unknown-opcode", f"{name}: {why}", instr, thread)

        return run

    return make


def _guard(b: Binder, make: Make) -> Make:
    """`make` for an instruction that may meet registers of wgmma."""
    flight = b.wave.in_flight
    reads, writes = flight.names.intersection(b.reads), flight.names.intersection(b.writes)
    if is_mma_async(b.instr) or not (reads or writes):
        return make
    copied = next(iter(reads), None) if is_copy(b.instr) else None

    def guarded(mask: Array | None) -> Closure:
        inner = make(mask)

        def run() -> None:
            groups = flight.use(b.instr, reads, mask, is_copied=copied is not None)
            inner()
            flight.write(b.instr, writes, groups, copied)

        return run

    return guarded


# Modifiers that make an instruction compute something else: never to be passed over.
CHANGING = frozenset(("abs", "cc", "ftz", "NaN", "oob", "relu", "sat", "satfinite", "shiftamt", "xorsign"))


def compile_instr(wave: Wave, instr: Instr) -> tuple[Closure, Closure]:
    """Closures for "all threads active" and "threads of wave.mask active". What is not implemented fails when it
    is executed.
    """
    handler = OPS.get(instr.opcode)
    try:
        binder = Binder(wave, instr)
        make = _guard(binder, handler(binder)) if handler else _fails(wave, instr, "not implemented")
        if handler and (ignored := CHANGING.intersection(instr.mods) - binder.asked):
            raise PtxError(f".{min(ignored)} is not implemented")
    except (PtxError, KeyError, NotImplementedError) as error:
        make = _fails(wave, instr, str(error) or "not implemented")
    pred = instr.pred
    if pred is None:
        return make(None), make(wave.mask)
    predicate = wave.regs[pred.name]
    scratch = wave.scratch
    inner = make(scratch)
    combine = np.greater if pred.negated else np.logical_and  # greater on bools: a and not b

    def masked() -> None:
        combine(wave.mask, predicate, scratch)
        inner()

    if not pred.negated:
        return make(predicate), masked

    def full() -> None:
        np.logical_not(predicate, scratch)
        inner()

    return full, masked
