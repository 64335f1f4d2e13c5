"""Warp-wide matrix instructions: ldmatrix, stmatrix, movmatrix, mma and mma.sp.

Fragment layouts (PTX ISA, "Matrix fragments for mma"): with g = lane / 4, t = lane % 4 and p elements per 32-bit
register,

    A register r, element j:  row g + 8 (r % 2), column 4p (r / 2) + p t + j
    B register r, element j:  row 4p r + p t + j, column g
    C, D element i:           row g + 8 (i / 2), column 2t + i % 2

Sparse A holds the same fragment of the packed matrix. One nibble of metadata selects two of four k positions (tf32:
1110 or 0100 selects one of two). Which lane's register supplies it is `_metadata_source`.

Accumulation: products and their sum over k and C are formed in float64 and rounded once to the result type, so
results do not depend on an order of summation. Hardware sums in several truncating steps; compare with float32-sized
tolerances.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np

from ..memory import Bad
from ..numerics import bf16_to_f32, f32_to_f16, odd_f64_to_f32
from ..ptx import Imm, Reg
from .core import Array, Binder, Make, op, vector

_LANE = np.arange(32)


def full_warps(b: Binder, mask: Array) -> Array:
    """Numbers of the active warps; a warp with only some lanes active is a fault."""
    rows = mask.reshape(-1, 32)
    some = rows.any(axis=1)
    partial = some & ~rows.all(axis=1)
    if partial.any():
        warp = int(partial.argmax())
        missing = (~rows[warp]).nonzero()[0].tolist()
        raise b.wave.fault(
            "divergent-aligned",
            f"lanes {missing} of the warp do not execute it",
            b.instr,
            warp * 32 + int(rows[warp].argmax()),
        )
    return some.nonzero()[0]


def _matrices(b: Binder) -> int:
    if not b.has("m8n8") or b.type != "b16":
        raise b.unknown()
    return next(int(m[1]) for m in b.mods if m in ("x1", "x2", "x4"))


def _row_threads(warps: Array, count: int) -> Array:
    """Threads whose addresses name the rows: lanes 0 .. 8 * count - 1 of each warp."""
    return (warps[:, None] * 32 + np.arange(8 * count)).reshape(-1)


def _rows(registers: list[Array], size: int) -> list[Array]:
    return [r.reshape(size // 32, 32) for r in registers]


@op("ldmatrix")
def ldmatrix(b: Binder) -> Make:
    count, transpose, wave = _matrices(b), b.has("trans"), b.wave
    outs = _rows([b.dst(item, np.uint32) for item in vector(b.args[0])], wave.size)
    address = b.address(b.args[1])

    def run(mask: Array) -> None:
        warps = full_warps(b, mask)
        threads = _row_threads(warps, count)
        try:
            wave.counters.shared_load += threads.size * 16
            rows = wave.shared.load_at(address(threads), threads, 16)
        except Bad as bad:
            raise wave.blame(bad, b.instr, threads) from None
        halves = rows.view(np.uint16).reshape(warps.size, count, 8, 8)
        if transpose:
            halves = np.ascontiguousarray(halves.swapaxes(2, 3))
        values = halves.view(np.uint32).reshape(warps.size, count, 32)
        for i, out in enumerate(outs):
            out[warps] = values[:, i]

    return b.masks(run)


@op("stmatrix")
def stmatrix(b: Binder) -> Make:
    count, transpose, wave = _matrices(b), b.has("trans"), b.wave
    sources = _rows([b.src(item, np.uint32) for item in vector(b.args[1])], wave.size)
    address = b.address(b.args[0])

    def run(mask: Array) -> None:
        warps = full_warps(b, mask)
        threads = _row_threads(warps, count)
        halves = np.stack([s[warps] for s in sources], axis=1).view(np.uint16).reshape(warps.size, count, 8, 8)
        rows = np.ascontiguousarray(halves.swapaxes(2, 3) if transpose else halves)
        try:
            wave.counters.shared_store += threads.size * 16
            wave.shared.store_at(address(threads), threads, 16, rows.view(np.complex128).reshape(-1))
        except Bad as bad:
            raise wave.blame(bad, b.instr, threads) from None

    return b.masks(run)


@op("movmatrix")
def movmatrix(b: Binder) -> Make:
    d, x = _rows([b.dst(b.args[0], np.uint32), b.src(b.args[1], np.uint32)], b.wave.size)

    def run(mask: Array) -> None:
        warps = full_warps(b, mask)
        halves = x[warps].view(np.uint16).reshape(-1, 8, 8)
        d[warps] = np.ascontiguousarray(halves.swapaxes(1, 2)).view(np.uint32).reshape(-1, 32)

    return b.masks(run)


# ---- mma ----------------------------------------------------------------------------------------------------------

_PER_REGISTER = {"f16": 2, "bf16": 2, "tf32": 1, "s8": 4, "u8": 4}


@lru_cache(None)
def _a_index(columns: int, p: int) -> Array:
    """Index [16, columns] into a warp's A fragment flattened as (lane, register, element)."""
    registers = columns // (2 * p)
    row, column = np.mgrid[:16, :columns]
    register = (row // 8) + 2 * (column // (4 * p))
    lane = (row % 8) * 4 + column % (4 * p) // p
    return (lane * registers + register) * p + column % p


@lru_cache(None)
def _b_index(rows: int, p: int) -> Array:
    registers = rows // (4 * p)
    row, column = np.mgrid[:rows, :8]
    return ((column * 4 + row % (4 * p) // p) * registers + row // (4 * p)) * p + row % p


@lru_cache(None)
def _c_index() -> Array:
    row, column = np.mgrid[:16, :8]
    return ((row % 8) * 4 + column // 2) * 4 + 2 * (row // 8) + column % 2


def _decoder(kind: str) -> Callable[[Array], Array]:
    """Registers [..., r] of uint32 to float64 elements [..., r * p]."""
    if kind == "f16":
        return lambda x: x.view(np.float16).astype(np.float64)
    if kind == "bf16":
        return lambda x: bf16_to_f32(x.view(np.uint16)).astype(np.float64)
    if kind == "tf32":  # the 13 low bits do not take part
        return lambda x: (x & np.uint32(0xFFFFE000)).view(np.float32).astype(np.float64)
    return lambda x: x.view(np.int8 if kind == "s8" else np.uint8).astype(np.float64)


class _Fragments:
    """The operands of one mma as matrices of the active warps."""

    def __init__(self, b: Binder) -> None:
        shape = next((m for m in b.mods if m.startswith("m16n8k")), None)
        kinds = [m for m in b.mods if m in _PER_REGISTER or m in ("f32", "s32")]
        if shape is None or not b.has("row") or not b.has("col") or len(kinds) != 4 or kinds[1] not in _PER_REGISTER:
            raise b.unknown("shape or type")
        self.out, self.kind_a, self.kind_b, self.accumulator = kinds
        self.k = int(shape[6:])
        self.size = b.wave.size
        self.p = _PER_REGISTER[self.kind_a]
        if (self.kind_a in ("s8", "u8")) != (self.out == "s32") or self.out not in ("f32", "f16", "s32"):
            raise b.unknown("accumulator type")
        self.saturate = b.has("satfinite")
        self.d = [b.dst(i, np.uint32).reshape(-1, 32) for i in vector(b.args[0])]
        self.a, self.b, self.c = ([self.row(b, i) for i in vector(arg)] for arg in b.args[1:4])
        self.decode_a, self.decode_b = _decoder(self.kind_a), _decoder(self.kind_b)

    def row(self, b: Binder, operand: Any) -> Array:
        return np.broadcast_to(b.src(operand, np.uint32), (self.size,)).reshape(-1, 32)

    @staticmethod
    def gather(registers: list[Array], warps: Array) -> Array:
        out = np.empty((warps.size, 32, len(registers)), np.uint32)
        for i, register in enumerate(registers):
            out[:, :, i] = register[warps]
        return out

    def matrix_a(self, warps: Array, columns: int) -> Array:
        return self.decode_a(self.gather(self.a, warps)).reshape(warps.size, -1)[:, _a_index(columns, self.p)]

    def matrix_b(self, warps: Array) -> Array:
        return self.decode_b(self.gather(self.b, warps)).reshape(warps.size, -1)[:, _b_index(self.k, self.p)]

    def accumulate(self, warps: Array, product: Array) -> None:
        c = self.gather(self.c, warps)
        if self.accumulator == "f16":
            base = c.view(np.float16).astype(np.float64)
        else:
            base = c.view(np.float32 if self.accumulator == "f32" else np.int32).astype(np.float64)
        index = _c_index()
        flat = base.reshape(warps.size, -1)
        result = np.empty_like(flat)
        result[:, index] = flat[:, index] + product
        if self.out == "f32":
            packed = result.astype(np.float32).view(np.uint32)
        elif self.out == "f16":
            packed = f32_to_f16(odd_f64_to_f32(result)).view(np.uint32)
        else:
            whole = np.clip(result, -(2**31), 2**31 - 1).astype(np.int64) if self.saturate else result.astype(np.int64)
            packed = whole.astype(np.int32).view(np.uint32)
        packed = packed.reshape(warps.size, 32, len(self.d))
        for i, register in enumerate(self.d):
            register[warps] = packed[:, :, i]


@op("mma")
def mma(b: Binder) -> Make:
    if b.mods[0].startswith("sp"):
        return _sparse(b)
    f = _Fragments(b)

    def run(mask: Array) -> None:
        warps = full_warps(b, mask)
        b.wave.counters.mma += warps.size
        f.accumulate(warps, np.matmul(f.matrix_a(warps, f.k), f.matrix_b(warps)))

    return b.masks(run)


@lru_cache(None)
def _metadata_source(kind: str, k: int, selector: int) -> tuple[Array, Array]:
    """(lane, bit) [16, chunks] of each 16-bit piece of metadata of a row, k ascending.

    16-bit and tf32: a register holds 16 bits of row g (low) and of row g + 8 (high); with 32 bits per row, lanes 2s
    and 2s+1 of the quad supply the first and second half, with 16 bits lane s. 8-bit: a register holds 32 bits of one
    row, lanes 2s and 2s+1 are rows g and g + 8, and k = 64 takes all four lanes, the upper pair for k >= 32.
    """
    row = np.arange(16)
    g, high = row % 8, row // 8
    if kind in ("s8", "u8"):
        words = k // 32
        lane = np.stack([g * 4 + 2 * (selector + word) + high for word in range(words) for _ in range(2)], axis=1)
        bit = np.broadcast_to(np.array([0, 16] * words), lane.shape)
        return lane, bit
    bits = k if kind != "tf32" else 2 * k
    chunks = bits // 16
    lane = np.stack([g * 4 + selector * chunks + chunk for chunk in range(chunks)], axis=1)
    return lane, np.broadcast_to(16 * high[:, None], lane.shape)


def check_nibbles(
    b: Binder, words: Array, lane: Array, warps: Array, *, ordered: bool = True, single: bool = False
) -> tuple[Array, Array]:
    """Both indices [warps, 16, groups] of every nibble of 16-bit metadata words [warps, 16, words] from `lane` [16,
    words].

    The indices must differ, with `ordered` they must ascend; `single` (tf32) knows only 1110 and 0100.
    """
    nibble = (words[..., None] >> np.arange(0, 16, 4, dtype=np.uint32) & np.uint32(15)).reshape(*words.shape[:2], -1)
    first, second = (nibble & np.uint32(3)).astype(np.int64), (nibble >> np.uint32(2)).astype(np.int64)
    if single:  # noqa: SIM108
        wrong = (nibble != 0b1110) & (nibble != 0b0100)
    else:
        wrong = first >= second if ordered else first == second
    if wrong.any():
        w, row, group = (int(i[0]) for i in wrong.nonzero())
        detail = f"nibble {int(nibble[w, row, group]):04b} for row {row}, k group {group}"
        raise b.wave.fault("illegal-metadata", detail, b.instr, int(warps[w]) * 32 + int(lane[row, group // 4]))
    return first, second


def _sparse(b: Binder) -> Make:
    f = _Fragments(b)
    selector = b.args[5]
    legal_k = {"f16": (16, 32), "bf16": (16, 32), "tf32": (8, 16), "s8": (32, 64), "u8": (32, 64)}[f.kind_a]
    if f.k not in legal_k or not isinstance(selector, Imm):
        raise b.unknown("shape")
    if (
        not 0
        <= selector.value
        < (1 if f.k == 64 else 2 if f.k == legal_k[1] else 4 if f.kind_a not in ("s8", "u8") else 2)
    ):
        raise b.unknown(f"selector {selector.value}")
    if not isinstance(b.args[4], Reg):
        raise b.unknown("constant metadata")
    metadata = f.row(b, b.args[4])
    lane, bit = _metadata_source(f.kind_a, f.k, selector.value)
    single, ordered = f.kind_a == "tf32", b.mods[0] == "sp::ordered_metadata"
    packed = f.k // 2

    def positions(warps: Array) -> Array:
        """k position [warps, 16, k/2] of every packed element."""
        words = metadata[warps][:, lane] >> bit.astype(np.uint32) & np.uint32(0xFFFF)
        first, second = check_nibbles(b, words, lane, warps, ordered=ordered, single=single)
        groups = np.arange(first.shape[2])
        if single:
            return 2 * groups + (first == 2)
        return (4 * groups[:, None] + np.stack([first, second], axis=3)).reshape(warps.size, 16, packed)

    def run(mask: Array) -> None:
        warps = full_warps(b, mask)
        b.wave.counters.mma_sparse += warps.size
        dense = np.zeros((warps.size, 16, f.k))
        np.put_along_axis(dense, positions(warps), f.matrix_a(warps, packed), axis=2)
        f.accumulate(warps, np.matmul(dense, f.matrix_b(warps)))

    return b.masks(run)
