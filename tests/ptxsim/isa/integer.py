"""Integer arithmetic, logic and shifts. Arithmetic wraps, as in PTX; min, max and add may saturate where the ISA
says so.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ..numerics import mul_hi_u64
from ..ptx import Imm, Reg
from .core import DTYPES, Array, Binder, Make, op
from .floating import float_binary, float_unary, is_float

_WIDER = {"u16": "u32", "s16": "s32", "u32": "u64", "s32": "s64", "b16": "u32"}


def _three(b: Binder, dtype: Any) -> tuple[Array, Array, Array]:
    return b.dst(b.args[0], dtype), b.src(b.args[1], dtype), b.src(b.args[2], dtype)


@op("add", "sub")
def add(b: Binder) -> Make:
    if is_float(b.type):
        return float_binary(b)
    dtype = DTYPES[b.type]
    d, x, y = _three(b, dtype)
    function = np.add if b.instr.opcode == "add" else np.subtract
    if b.has("sat"):
        info = np.iinfo(dtype)
        return b.value(
            d, lambda: np.clip(function(x.astype(np.int64), y.astype(np.int64)), info.min, info.max).astype(dtype)
        )
    if b.has("cc"):
        return _carry_out(b, d, x, y, np.zeros((), dtype))
    return b.ufunc(function, d, x, y)


@op("addc", "subc")
def addc(b: Binder) -> Make:
    d, x, y = _three(b, np.dtype(f"u{DTYPES[b.type].itemsize}"))
    if b.has("cc"):
        return _carry_out(b, d, x, y, None)
    carry = b.wave.carry
    function = np.add if b.instr.opcode == "addc" else np.subtract
    return b.value(d, lambda: function(function(x, y), carry.astype(d.dtype)))


def _carry_out(b: Binder, d: Array, x: Array, y: Array, fixed: Array | None) -> Make:
    carry = b.wave.carry
    kind = np.dtype(f"u{d.itemsize}")
    d, x, y = d.view(kind), x.view(kind), y.view(kind)
    adds = b.instr.opcode.startswith("add")

    def step(mask: Array) -> None:
        c = np.broadcast_to(fixed.astype(kind), d.shape) if fixed is not None else carry.astype(kind)
        if adds:
            partial = x + y
            result = partial + c
            out = (partial < x) | (result < partial)
        else:
            partial = x - y
            result = partial - c
            out = (x < y) | (partial < c)
        np.copyto(d, result, where=mask)
        np.copyto(carry, out, where=mask)

    return b.masks(step)


def _product(b: Binder, x: Array, y: Array, part: str, kind: str) -> Any:
    """A function computing the requested part of x * y."""
    if part == "lo":
        return lambda: np.multiply(x, y)
    if part == "wide":
        wide = DTYPES[_WIDER[kind]]
        return lambda: np.multiply(x.astype(wide), y.astype(wide))
    if DTYPES[kind].itemsize < 8:
        wide = np.dtype(np.int64 if kind[0] == "s" else np.uint64)
        shift = wide.type(8 * DTYPES[kind].itemsize)
        return lambda: (np.multiply(x.astype(wide), y.astype(wide)) >> shift).astype(DTYPES[kind])
    if kind[0] != "s":
        return lambda: mul_hi_u64(x, y)
    ux, uy = x.view(np.uint64), y.view(np.uint64)
    zero = np.uint64(0)
    return lambda: (mul_hi_u64(ux, uy) - np.where(x < 0, uy, zero) - np.where(y < 0, ux, zero)).view(np.int64)


@op("mul")
def mul(b: Binder) -> Make:
    if is_float(b.type):
        return float_binary(b)
    part = next(m for m in b.mods if m in ("lo", "hi", "wide"))
    dtype = DTYPES[b.type]
    x, y = b.src(b.args[1], dtype), b.src(b.args[2], dtype)
    if part == "lo":
        return b.ufunc(np.multiply, b.dst(b.args[0], dtype), x, y)
    d = b.dst(b.args[0], DTYPES[_WIDER[b.type]] if part == "wide" else dtype)
    if part == "wide":
        return b.ufunc(lambda p, q, **kw: np.multiply(p, q, dtype=d.dtype, casting="unsafe", **kw), d, x, y)
    return b.value(d, _product(b, x, y, part, b.type))


@op("mad")
def mad(b: Binder) -> Make:
    if is_float(b.type):
        from .floating import fma

        return fma(b)
    part = next(m for m in b.mods if m in ("lo", "hi", "wide"))
    if b.has("sat", "cc"):
        raise b.unknown()
    dtype = DTYPES[b.type]
    out = DTYPES[_WIDER[b.type]] if part == "wide" else dtype
    x, y, z = b.src(b.args[1], dtype), b.src(b.args[2], dtype), b.src(b.args[3], out)
    product = _product(b, x, y, part, b.type)
    return b.value(b.dst(b.args[0], out), lambda: product() + z)


@op("sad")
def sad(b: Binder) -> Make:
    dtype = DTYPES[b.type]
    d, x, y = _three(b, dtype)
    z = b.src(b.args[3], dtype)
    return b.value(d, lambda: np.where(x < y, y - x, x - y) + z)


@op("div", "rem")
def div(b: Binder) -> Make:
    if is_float(b.type):
        return float_binary(b)
    dtype = DTYPES[b.type]
    d, x, y = _three(b, dtype)
    remainder = b.instr.opcode == "rem"
    ones = dtype.type(-1) if b.type[0] == "s" else np.iinfo(dtype).max

    def run() -> Array:
        divisor = np.where(y == 0, dtype.type(1), y)
        rest = np.fmod(x, divisor)
        # A division by zero has an unspecified result in PTX; all ones is what GPUs give.
        return np.where(y == 0, x if remainder else ones, rest if remainder else (x - rest) // divisor).astype(dtype)

    return b.value(d, run)


@op("abs", "neg")
def unary(b: Binder) -> Make:
    if is_float(b.type):
        return float_unary(b)
    dtype = DTYPES[b.type]
    return b.ufunc(np.abs if b.instr.opcode == "abs" else np.negative, b.dst(b.args[0], dtype), b.src(b.args[1], dtype))


@op("min", "max")
def minmax(b: Binder) -> Make:
    if is_float(b.type):
        return float_binary(b)
    if b.type.endswith("x2"):
        half = np.dtype("i2" if b.type[0] == "s" else "u2")
        d, x, y = (b.wave.pairs(b.storage(a), half) for a in b.args[:3])
        return b.value(d, lambda: (np.minimum if b.instr.opcode == "min" else np.maximum)(x, y))
    dtype = DTYPES[b.type]
    return b.ufunc(np.minimum if b.instr.opcode == "min" else np.maximum, *_three(b, dtype))


@op("and", "or", "xor")
def logic(b: Binder) -> Make:
    table = {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}
    return b.ufunc(table[b.instr.opcode], *_three(b, DTYPES[b.type]))


@op("not", "cnot")
def invert(b: Binder) -> Make:
    dtype = DTYPES[b.type]
    d, x = b.dst(b.args[0], dtype), b.src(b.args[1], dtype)
    if b.instr.opcode == "cnot":
        return b.value(d, lambda: x == 0)
    return b.ufunc(np.invert, d, x)


@op("lop3")
def lop3(b: Binder) -> Make:
    if b.has("BoolOp", "and", "or"):
        raise b.unknown()
    d, x, y = _three(b, np.uint32)
    z = b.src(b.args[3], np.uint32)
    table = b.args[4]
    assert isinstance(table, Imm)
    terms = [i for i in range(8) if table.value >> i & 1]

    def run() -> Array:
        result = np.zeros(d.shape, np.uint32)
        for i in terms:
            result |= (x if i & 4 else ~x) & (y if i & 2 else ~y) & (z if i & 1 else ~z)
        return result

    return b.value(d, run)


@op("shl", "shr")
def shift(b: Binder) -> Make:
    dtype = DTYPES[b.type]
    bits = 8 * dtype.itemsize
    d, x, n = b.dst(b.args[0], dtype), b.src(b.args[1], dtype), b.src(b.args[2], np.uint32)
    function = np.left_shift if b.instr.opcode == "shl" else np.right_shift
    if n.ndim == 0 and int(n) < bits:
        return b.ufunc(function, d, x, n.astype(dtype))
    if b.instr.opcode == "shr" and b.type[0] == "s":
        return b.value(d, lambda: x >> np.minimum(n, np.uint32(bits - 1)).astype(dtype))
    return b.value(
        d, lambda: np.where(n < bits, function(x, np.minimum(n, np.uint32(bits - 1)).astype(dtype)), dtype.type(0))
    )


@op("shf")
def funnel(b: Binder) -> Make:
    d, low = b.dst(b.args[0], np.uint32), b.src(b.args[1], np.uint32)
    high, n = b.src(b.args[2], np.uint32), b.src(b.args[3], np.uint32)
    limit = np.uint32(31) if b.has("wrap") else None
    left = b.has("l")

    def run() -> Array:
        count = ((n & limit) if limit is not None else np.minimum(n, np.uint32(32))).astype(np.uint64)
        both = high.astype(np.uint64) << np.uint64(32) | low
        return ((both << count) >> np.uint64(32) if left else both >> count).astype(np.uint32)

    return b.value(d, run)


def _bit_length(x: Array) -> Array:
    """Position of the highest set bit plus one; 0 for 0. Exact: 32-bit halves fit a float64."""
    high, low = (
        (x.astype(np.uint64) >> np.uint64(32)).astype(np.float64),
        (x.astype(np.uint64) & np.uint64(0xFFFFFFFF)).astype(np.float64),
    )
    return np.where(high > 0, np.frexp(high)[1] + 32, np.frexp(low)[1])


@op("popc", "clz", "brev")
def bits(b: Binder) -> Make:
    dtype = DTYPES[b.type]
    width = 8 * dtype.itemsize
    x = b.src(b.args[1], dtype)
    if b.instr.opcode == "clz":
        return b.value(b.dst(b.args[0], np.uint32), lambda: (width - _bit_length(x)).astype(np.uint32))
    rows = np.unpackbits

    def planes() -> Array:
        return rows(
            np.broadcast_to(x, (b.wave.size,)).copy().view(np.uint8).reshape(-1, dtype.itemsize),
            axis=1,
            bitorder="little",
        )

    if b.instr.opcode == "popc":
        return b.value(b.dst(b.args[0], np.uint32), lambda: planes().sum(axis=1, dtype=np.uint32))
    return b.value(
        b.dst(b.args[0], dtype),
        lambda: np.packbits(np.ascontiguousarray(planes()[:, ::-1]), axis=1, bitorder="little").view(dtype)[:, 0],
    )


@op("bfind")
def bfind(b: Binder) -> Make:
    dtype = DTYPES[b.type]
    x, d = b.src(b.args[1], dtype), b.dst(b.args[0], np.uint32)
    width = 8 * dtype.itemsize
    unsigned = np.dtype(f"u{dtype.itemsize}")
    counts_down = b.has("shiftamt")

    def run() -> Array:
        magnitude = np.where(x < 0, ~x, x).view(unsigned) if b.type[0] == "s" else x
        position = _bit_length(magnitude) - 1
        return (
            np.where(position < 0, -1, width - 1 - position if counts_down else position)
            .astype(np.int32)
            .view(np.uint32)
        )

    return b.value(d, run)


@op("bfe")
def bfe(b: Binder) -> Make:
    dtype = DTYPES[b.type]
    width = 8 * dtype.itemsize
    d, x = b.dst(b.args[0], dtype), b.src(b.args[1], dtype)
    start, count = b.src(b.args[2], np.uint32), b.src(b.args[3], np.uint32)

    def run() -> Array:
        pos, length = (start & np.uint32(255)).astype(np.int64), (count & np.uint32(255)).astype(np.int64)
        # Fields that reach past the top are filled with the sign (0 if unsigned); shift up, then down with the sign.
        wide = np.asarray(x).astype(np.int64) if width == 32 else None
        if wide is None:
            raise NotImplementedError("bfe on 64 bits")
        if b.type[0] == "u":
            shifted = (wide & 0xFFFFFFFF) >> np.minimum(pos, 63)
            return (shifted & ((np.int64(1) << np.minimum(length, 32)) - 1)).astype(dtype)
        shifted = wide >> np.minimum(pos, 31)
        keep = 64 - np.minimum(length, 32)
        return np.where(length == 0, 0, (shifted << np.minimum(keep, 63)) >> np.minimum(keep, 63)).astype(dtype)

    return b.value(d, run)


@op("bfi")
def bfi(b: Binder) -> Make:
    dtype = DTYPES[b.type]
    width = 8 * dtype.itemsize
    d, x, y = _three(b, dtype)
    start, count = b.src(b.args[3], np.uint32), b.src(b.args[4], np.uint32)
    one = np.uint64(1)

    def run() -> Array:
        pos, length = (start & np.uint32(255)).astype(np.uint64), (count & np.uint32(255)).astype(np.uint64)
        field = np.where(length >= width, ~np.uint64(0), (one << np.minimum(length, np.uint64(63))) - one)
        safe = np.minimum(pos, np.uint64(63))
        mask = np.where(pos >= width, np.uint64(0), field << safe)
        return ((y.astype(np.uint64) & ~mask) | ((x.astype(np.uint64) << safe) & mask)).astype(dtype)

    return b.value(d, run)


@op("bmsk")
def bmsk(b: Binder) -> Make:
    d, start, count = _three(b, np.uint32)
    one = np.uint64(1)

    def run() -> Array:
        pos, length = (
            np.minimum(start, np.uint32(32)).astype(np.uint64),
            np.minimum(count, np.uint32(32)).astype(np.uint64),
        )
        return (((one << length) - one) << pos).astype(np.uint32)

    return b.value(d, run)


@op("dp4a")
def dp4a(b: Binder) -> Make:
    kinds = [np.dtype("i1" if m == "s32" else "u1") for m in b.mods[-2:]]
    d = b.dst(b.args[0], np.int32)
    x, y = (b.storage(a).view(k).reshape(-1, 4) for a, k in zip(b.args[1:3], kinds, strict=True))
    z = b.src(b.args[3], np.int32)
    return b.value(d, lambda: ((x.astype(np.int64) * y).sum(axis=1) + z).astype(np.int32))


@op("prmt")
def prmt(b: Binder) -> Make:
    mode = next((m for m in b.mods if m in ("f4e", "b4e", "rc8", "ecl", "ecr", "rc16")), None)
    if mode:
        raise b.unknown(f"mode .{mode}")
    d, x, y = _three(b, np.uint32)
    selector = b.src(b.args[3], np.uint32)
    if isinstance(b.args[3], Reg):

        def run() -> Array:
            both = np.broadcast_to(y, d.shape).astype(np.uint64) << np.uint64(32) | x
            result = np.zeros(d.shape, np.uint32)
            for i in range(4):
                pick = selector >> np.uint32(4 * i) & np.uint32(15)
                byte = (both >> ((pick & np.uint32(7)) * np.uint32(8)).astype(np.uint64)).astype(np.uint32) & np.uint32(
                    255
                )
                sign = (byte >> np.uint32(7)) * np.uint32(255)
                result |= np.where(pick & np.uint32(8), sign, byte) << np.uint32(8 * i)
            return result

        return b.value(d, run)
    picks = [int(selector) >> 4 * i & 15 for i in range(4)]

    def fixed() -> Array:
        result = np.zeros(d.shape, np.uint32)
        for i, pick in enumerate(picks):
            source = x if pick & 7 < 4 else y
            byte = source >> np.uint32(8 * (pick & 3)) & np.uint32(255)
            if pick & 8:
                byte = (byte >> np.uint32(7)) * np.uint32(255)
            result |= byte << np.uint32(8 * i)
        return result

    return b.value(d, fixed)
