"""Floating-point arithmetic in f16, bf16, f32, f64 and the packed x2 forms.

Basic operations are correctly rounded. The approximate functions (ex2, lg2, rcp.approx, sin, ...) are evaluated in
float64 and rounded once, so they are at least as accurate as hardware, not bit-equal to it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from ..numerics import bf16_to_f32, f32_to_bf16, flush, fma_f32, fma_f64, odd_add, odd_f64_to_f32, round_f32
from ..ptx import Operand
from .core import DTYPES, Array, Binder, Make, op

FLOATS = ("f16", "f16x2", "bf16", "bf16x2", "f32", "f64")


def is_float(kind: str) -> bool:
    return kind in FLOATS


def reader(b: Binder, operand: Operand, kind: str) -> Callable[[], Array]:
    """A function giving an operand's values as float16, float32 (also for bf16) or float64; x2 kinds have shape
    [threads, 2].
    """
    if kind != "f32" and b.has("ftz"):
        raise b.unknown(".ftz is not implemented")
    if kind in ("f32", "f64", "f16"):
        view = b.src(operand, DTYPES[kind])
        if kind == "f32" and b.has("ftz"):
            return lambda: flush(view)
        return lambda: view
    if kind == "bf16":
        bits = b.src(operand, np.uint16)
        return lambda: bf16_to_f32(bits)
    half = np.float16 if kind == "f16x2" else np.uint16
    source = b.src(operand, np.uint32)
    pair = source.reshape(1).view(half).reshape(1, 2) if source.ndim == 0 else b.wave.pairs(source, np.dtype(half))
    return (lambda: pair) if kind == "f16x2" else (lambda: bf16_to_f32(pair))


def writer(b: Binder, operand: Operand, kind: str, function: Callable[[], Any]) -> Make:
    """Stores function() rounded to `kind`; float64 input to a 16-bit kind must be exact or rounded to odd."""
    saturate, relu = b.has("sat"), b.has("relu")

    def finish() -> Array:
        x = function()
        if saturate:
            x = np.where(np.isnan(x), 0, np.clip(x, 0, 1)).astype(x.dtype)
        if relu:
            x = np.where(x > 0, x, np.where(np.isnan(x), x, 0)).astype(x.dtype)
        if kind == "f32":
            return flush(x) if b.has("ftz") else x
        if kind in ("bf16", "bf16x2"):
            return f32_to_bf16(odd_f64_to_f32(x) if x.dtype == np.float64 else x)
        if kind in ("f16", "f16x2") and x.dtype != np.float16:
            return (odd_f64_to_f32(x) if x.dtype == np.float64 else x).astype(np.float16)
        return x

    if kind.endswith("x2"):
        d = b.wave.pairs(b.dst(operand, np.uint32), np.dtype(np.float16 if kind == "f16x2" else np.uint16))
    else:
        d = b.dst(operand, DTYPES[kind])
    return b.value(d, finish)


def _min(x: Array, y: Array) -> Array:
    return np.where((x == y) & np.signbit(x), x, np.fmin(x, y))  # -0 < +0


def _max(x: Array, y: Array) -> Array:
    return np.where((x == y) & ~np.signbit(x), x, np.fmax(x, y))


def float_binary(b: Binder) -> Make:
    """add, sub, mul, div, min, max."""
    name, kind = b.instr.opcode, b.type
    mode = b.rounding()
    plain = not b.has("ftz", "sat", "relu", "NaN", "xorsign", "abs") and mode == "rn"
    ufuncs = {"add": np.add, "sub": np.subtract, "mul": np.multiply, "div": np.divide}
    if plain and kind in ("f32", "f64") and name in ufuncs:
        return b.ufunc(
            ufuncs[name], b.dst(b.args[0], DTYPES[kind]), b.src(b.args[1], DTYPES[kind]), b.src(b.args[2], DTYPES[kind])
        )
    if b.has("xorsign"):
        raise b.unknown(".xorsign")
    x, y = reader(b, b.args[1], kind), reader(b, b.args[2], kind)
    if name in ("min", "max"):
        function: Any = (
            {"min": np.minimum, "max": np.maximum}[name] if b.has("NaN") else {"min": _min, "max": _max}[name]
        )
        return writer(b, b.args[0], kind, lambda: function(x(), y()))
    if mode != "rn":
        if kind != "f32" or name == "div":
            raise b.unknown(f"rounding .{mode}")
        if name == "mul":
            return writer(b, b.args[0], kind, lambda: round_f32(x().astype(np.float64) * y(), mode))
        sign = 1.0 if name == "add" else -1.0
        return writer(
            b, b.args[0], kind, lambda: round_f32(odd_add(x().astype(np.float64), sign * y().astype(np.float64)), mode)
        )
    if kind.startswith("bf16"):
        # A float32 result rounded again: exact enough for mul (16 bits), rounded to odd for add.
        if name == "mul":
            return writer(b, b.args[0], kind, lambda: np.multiply(x(), y()))
        sign = 1.0 if name == "add" else -1.0
        return writer(b, b.args[0], kind, lambda: odd_add(x().astype(np.float64), sign * y().astype(np.float64)))
    function = ufuncs[name]
    return writer(b, b.args[0], kind, lambda: function(x(), y()))


def float_unary(b: Binder) -> Make:
    """abs, neg: bit operations, so that NaN and -0 behave."""
    kind = b.type
    size = DTYPES[kind].itemsize
    half = "16" in kind
    sign = 0x8000 if half and size == 2 else 0x80008000 if half else 1 << (8 * size - 1)
    bits = np.dtype(f"u{size}")
    d, x = b.dst(b.args[0], bits), b.src(b.args[1], bits)
    if b.has("ftz"):
        source = reader(b, b.args[1], kind)
        function = np.abs if b.instr.opcode == "abs" else np.negative
        return writer(b, b.args[0], kind, lambda: function(source()))
    if b.instr.opcode == "abs":
        return b.ufunc(np.bitwise_and, d, x, bits.type(~sign & (1 << 8 * size) - 1))
    return b.ufunc(np.bitwise_xor, d, x, bits.type(sign))


@op("fma")
def fma(b: Binder) -> Make:
    kind = b.type
    x, y, z = (reader(b, a, kind) for a in b.args[1:4])
    if kind == "f32":
        mode = b.rounding()
        return writer(b, b.args[0], kind, lambda: fma_f32(x(), y(), z(), mode))
    if kind == "f64":
        return writer(b, b.args[0], kind, lambda: fma_f64(x(), y(), z()))
    wide = np.float64
    return writer(b, b.args[0], kind, lambda: odd_add(x().astype(wide) * y().astype(wide), z().astype(wide)))


_FUNCTIONS: dict[str, Callable[[Array], Array]] = {
    "rcp": lambda x: 1.0 / x,
    "sqrt": np.sqrt,
    "rsqrt": lambda x: 1.0 / np.sqrt(x),
    "ex2": np.exp2,
    "lg2": np.log2,
    "sin": np.sin,
    "cos": np.cos,
    "tanh": np.tanh,
}


@op(*_FUNCTIONS)
def transcendental(b: Binder) -> Make:
    kind, function = b.type, _FUNCTIONS[b.instr.opcode]
    if b.rounding() != "rn":
        raise b.unknown(f"rounding .{b.rounding()}")
    x = reader(b, b.args[1], kind)
    if kind == "f64":
        return writer(b, b.args[0], kind, lambda: function(x()))
    return writer(b, b.args[0], kind, lambda: function(x().astype(np.float64)).astype(np.float32))


@op("copysign")
def copysign(b: Binder) -> Make:
    dtype = DTYPES[b.type]
    sign, x = b.src(b.args[1], dtype), b.src(b.args[2], dtype)
    return b.value(b.dst(b.args[0], dtype), lambda: np.copysign(x, sign))


@op("testp")
def testp(b: Binder) -> Make:
    dtype = DTYPES[b.type]
    x, d = b.src(b.args[1], dtype), b.dst(b.args[0], bool)
    tiny = np.finfo(dtype).tiny
    tests: dict[str, Callable[[], Any]] = {
        "finite": lambda: np.isfinite(x),
        "infinite": lambda: np.isinf(x),
        "number": lambda: ~np.isnan(x),
        "notanumber": lambda: np.isnan(x),
        "normal": lambda: np.isfinite(x) & (np.abs(x) >= tiny),
        "subnormal": lambda: (np.abs(x) < tiny) & (x != 0),
    }
    return b.value(d, tests[b.mods[0]])


_ORDERED = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
}
_ORDERED |= {"lo": np.less, "ls": np.less_equal, "hi": np.greater, "hs": np.greater_equal}
_INVERSE = {"equ": "ne", "neu": "eq", "ltu": "ge", "leu": "gt", "gtu": "le", "geu": "lt"}


def comparison(b: Binder, relation: str, kind: str, x: Operand, y: Operand) -> Callable[[], Array]:
    """A function giving the bools of `x relation y`; unordered float relations hold when either side is NaN."""
    if is_float(kind):
        left, right = reader(b, x, kind), reader(b, y, kind)
        if relation in ("num", "nan"):
            wanted = relation == "nan"
            return lambda: (np.isnan(left()) | np.isnan(right())) == wanted
        if relation == "ne":  # ordered: false for NaN
            return lambda: (left() < right()) | (left() > right())
        if relation == "neu":
            return lambda: np.not_equal(left(), right())
        if relation in _INVERSE:
            inverse = _ORDERED[_INVERSE[relation]]
            if relation == "equ":
                return lambda: ~((left() < right()) | (left() > right()))
            return lambda: ~inverse(left(), right())
        function = _ORDERED[relation]
        return lambda: function(left(), right())
    a, c = b.src(x, DTYPES[kind]), b.src(y, DTYPES[kind])
    function = _ORDERED[relation]
    return lambda: function(a, c)


@op("setp", "set")
def setp(b: Binder) -> Make:
    from ..ptx import Pair

    relation = b.mods[0]
    kind = b.type
    if kind.endswith("x2"):
        return _setp_pair(b, relation, kind)
    combine = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}.get(
        b.mods[1] if len(b.mods) > 1 else ""
    )
    first, second = (b.args[0].first, b.args[0].second) if isinstance(b.args[0], Pair) else (b.args[0], None)
    compare = comparison(b, relation, kind, b.args[1], b.args[2])
    if b.instr.opcode == "set":
        out = b.mods[-2]
        d = b.dst(first, DTYPES[out])
        one = np.array(1, DTYPES[out]) if is_float(out) else ~np.array(0, DTYPES[out])
        if combine is not None:
            raise b.unknown("set with a boolean operand")
        return b.value(d, lambda: np.where(compare(), one, DTYPES[out].type(0)))
    p = b.dst(first, bool)
    if combine is None and second is None:
        if not is_float(kind):
            return b.ufunc(_ORDERED[relation], p, b.src(b.args[1], DTYPES[kind]), b.src(b.args[2], DTYPES[kind]))
        return b.value(p, compare)
    other = b.src(b.args[3], bool) if combine is not None else None
    flip = bool(getattr(b.args[3], "negated", False)) if combine is not None else False
    q = b.dst(second, bool) if second is not None else None

    def run(mask: Array) -> None:
        result = compare()
        side = (other ^ flip) if other is not None else None
        yes = combine(result, side) if combine is not None else result
        no = combine(~result, side) if combine is not None else ~result
        np.copyto(p, yes, where=mask)
        if q is not None:
            np.copyto(q, no, where=mask)

    return b.masks(run)


def _setp_pair(b: Binder, relation: str, kind: str) -> Make:
    from ..ptx import Pair

    if b.instr.opcode == "set":
        out = b.mods[-2]
        if len(b.mods) != 3 or is_float(out):
            raise b.unknown()
        halves = b.wave.pairs(b.dst(b.args[0], np.uint32), np.dtype(np.uint16))
        compare = comparison(b, relation, kind, b.args[1], b.args[2])
        return b.value(halves, lambda: np.where(compare(), np.uint16(0xFFFF), np.uint16(0)))
    if not isinstance(b.args[0], Pair):
        raise b.unknown()
    p, q = b.dst(b.args[0].first, bool), b.dst(b.args[0].second, bool)
    compare = comparison(b, relation, kind, b.args[1], b.args[2])

    def run(mask: Array) -> None:
        result = compare()
        np.copyto(p, result[:, 0], where=mask)
        np.copyto(q, result[:, 1], where=mask)

    return b.masks(run)
