"""Single instructions on random operands against scalar Python that follows the PTX manual's wording. Needs no
compiler.
"""

from __future__ import annotations

import ctypes
import math
import struct
from collections.abc import Callable
from fractions import Fraction

import numpy as np
import pytest

from .faults import SimError
from .machine import Launcher
from .memory import READY, GlobalMemory
from .ptx import parse
from .wave import Device

COUNT = 512
REGISTERS = {"b16": "%h", "b32": "%r", "b64": "%d", "pred": "%p"}


@pytest.fixture(scope="module")
def launcher() -> Launcher:
    return Launcher(Device(GlobalMemory(1 << 24), {}))


def _buffer(launcher: Launcher, words: np.ndarray) -> int:
    address = launcher.device.memory.allocate(words.nbytes)
    ctypes.memmove(address, words.ctypes.data, words.nbytes)
    launcher.device.memory.mark(address, words.nbytes, READY)
    return address


def execute(launcher: Launcher, body: str, inputs: list[np.ndarray], bits: int = 64) -> np.ndarray:
    """Runs `body` on 64-bit inputs %d1, %d2, ... (low halves in %r1, ..., %h1, ...); returns %d0, %r0 or %h0 as
    uint64.
    """
    count = len(inputs[0])
    text = [
        ".version 8.0",
        ".target sm_80",
        ".address_size 64",
        ".visible .entry k(.param .u64 k_0, .param .u64 k_1)",
        "{",
    ]
    text += [".reg .pred %p<9>;", ".reg .b16 %h<9>;", ".reg .b32 %r<19>;", ".reg .b64 %d<19>;"]
    text += [
        "ld.param.u64 %d10, [k_0];",
        "ld.param.u64 %d11, [k_1];",
        "mov.u32 %r10, %tid.x;",
        "mul.wide.u32 %d12, %r10, 8;",
    ]
    text += [
        "add.s64 %d11, %d11, %d12;",
        "add.s64 %d10, %d10, %d12;",
        "mov.u64 %d0, 0;",
        "mov.u32 %r0, 0;",
        "mov.u16 %h0, 0;",
    ]
    for i in range(1, len(inputs) + 1):
        text += [
            f"ld.global.u64 %d{i}, [%d10+{(i - 1) * 8 * count}];",
            f"cvt.u32.u64 %r{i}, %d{i};",
            f"cvt.u16.u64 %h{i}, %d{i};",
        ]
    text += [
        body,
        {64: "", 32: "cvt.u64.u32 %d0, %r0;", 16: "cvt.u64.u16 %d0, %h0;"}[bits],
        "st.global.u64 [%d11], %d0;",
        "ret;",
        "}",
    ]
    module = parse("\n".join(text))
    source = _buffer(launcher, np.concatenate(inputs).astype(np.uint64))
    target = _buffer(launcher, np.zeros(count, np.uint64))
    launcher.launch(module, module.kernels["k"], (1, 1, 1), (count, 1, 1), 0, struct.pack("<QQ", source, target))
    result = np.frombuffer((ctypes.c_uint8 * (8 * count)).from_address(target), np.uint64).copy()
    launcher.device.memory.free(source)
    launcher.device.memory.free(target)
    return result


def signed(x: int, bits: int) -> int:
    x &= (1 << bits) - 1
    return x - (1 << bits) if x >> bits - 1 else x


def words(generator: np.random.Generator, bits: int) -> np.ndarray:
    """Random words with many small, all-ones and extreme ones."""
    x = generator.integers(0, 1 << 64, COUNT, dtype=np.uint64)
    x >>= generator.integers(0, bits, COUNT).astype(np.uint64)
    corner = np.array(
        [0, 1, 2, 31, 32, 33, 63, 64, 255, (1 << bits) - 1, 1 << bits - 1, (1 << bits - 1) - 1], np.uint64
    )
    x[: corner.size] = corner
    x[corner.size : 2 * corner.size] = generator.permutation(corner)
    return generator.permutation(x & np.uint64((1 << bits) - 1))


def _prmt(a: int, b: int, s: int) -> int:
    both, out = b << 32 | a, 0
    for i in range(4):
        pick = s >> 4 * i & 15
        byte = both >> 8 * (pick & 7) & 255
        out |= (255 * (byte >> 7) if pick & 8 else byte) << 8 * i
    return out


def _bfe(a: int, b: int, c: int, is_signed: bool) -> int:
    pos, length, msb = b & 255, c & 255, 31
    sign = 0 if not is_signed or length == 0 else a >> min(pos + length - 1, msb) & 1
    return sum((a >> pos + i & 1 if i < length and pos + i <= msb else sign) << i for i in range(32))


def _bfi(a: int, b: int, c: int, d: int, bits: int) -> int:
    pos, length = c & 255, d & 255
    for i in range(length):
        if pos + i < bits:
            b = b & ~(1 << pos + i) | (a >> i & 1) << pos + i
    return b


def _truncated_division(a: int, b: int, bits: int, what: str) -> int:
    if b == 0:
        return a if what == "rem" else -1
    quotient = abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)
    return quotient if what == "div" else a - b * quotient


S = signed
INTEGER: dict[str, tuple[int, int, Callable[..., int]]] = {  # instruction: (input bits, output bits, function)
    "add.s32 %r0, %r1, %r2": (32, 32, lambda a, b: a + b),
    "sub.s64 %d0, %d1, %d2": (64, 64, lambda a, b: a - b),
    "add.u16 %h0, %h1, %h2": (16, 16, lambda a, b: a + b),
    "add.sat.s32 %r0, %r1, %r2": (32, 32, lambda a, b: max(min(S(a, 32) + S(b, 32), 2**31 - 1), -(2**31))),
    "add.cc.u32 %r0, %r1, %r2; addc.u32 %r0, %r1, %r3": (32, 32, lambda a, b, c: a + c + (a + b >> 32)),
    "sub.cc.u32 %r0, %r1, %r2; subc.u32 %r0, %r1, %r3": (32, 32, lambda a, b, c: a - c - (a < b)),
    "mul.lo.s32 %r0, %r1, %r2": (32, 32, lambda a, b: a * b),
    "mul.lo.u64 %d0, %d1, %d2": (64, 64, lambda a, b: a * b),
    "mul.hi.u32 %r0, %r1, %r2": (32, 32, lambda a, b: a * b >> 32),
    "mul.hi.s32 %r0, %r1, %r2": (32, 32, lambda a, b: S(a, 32) * S(b, 32) >> 32),
    "mul.hi.u64 %d0, %d1, %d2": (64, 64, lambda a, b: a * b >> 64),
    "mul.hi.s64 %d0, %d1, %d2": (64, 64, lambda a, b: S(a, 64) * S(b, 64) >> 64),
    "mul.wide.u32 %d0, %r1, %r2": (32, 64, lambda a, b: a * b),
    "mul.wide.s32 %d0, %r1, %r2": (32, 64, lambda a, b: S(a, 32) * S(b, 32)),
    "mul.wide.s16 %r0, %h1, %h2": (16, 32, lambda a, b: S(a, 16) * S(b, 16)),
    "mad.lo.s32 %r0, %r1, %r2, %r3": (32, 32, lambda a, b, c: a * b + c),
    "mad.hi.u32 %r0, %r1, %r2, %r3": (32, 32, lambda a, b, c: (a * b >> 32) + c),
    "mad.wide.s32 %d0, %r1, %r2, %d3": (32, 64, lambda a, b, c: S(a, 32) * S(b, 32) + c),
    "sad.u32 %r0, %r1, %r2, %r3": (32, 32, lambda a, b, c: abs(a - b) + c),
    "div.u32 %r0, %r1, %r2": (32, 32, lambda a, b: _truncated_division(a, b, 32, "div")),
    "div.s32 %r0, %r1, %r2": (32, 32, lambda a, b: _truncated_division(S(a, 32), S(b, 32), 32, "div")),
    "rem.s32 %r0, %r1, %r2": (32, 32, lambda a, b: _truncated_division(S(a, 32), S(b, 32), 32, "rem")),
    "rem.u64 %d0, %d1, %d2": (64, 64, lambda a, b: _truncated_division(a, b, 64, "rem")),
    "abs.s32 %r0, %r1": (32, 32, lambda a: abs(S(a, 32))),
    "neg.s32 %r0, %r1": (32, 32, lambda a: -a),
    "min.s32 %r0, %r1, %r2": (32, 32, lambda a, b: min(S(a, 32), S(b, 32))),
    "max.u64 %d0, %d1, %d2": (64, 64, max),
    "and.b32 %r0, %r1, %r2": (32, 32, lambda a, b: a & b),
    "xor.b64 %d0, %d1, %d2": (64, 64, lambda a, b: a ^ b),
    "not.b32 %r0, %r1": (32, 32, lambda a: ~a),
    "cnot.b32 %r0, %r1": (32, 32, lambda a: int(a == 0)),
    "lop3.b32 %r0, %r1, %r2, %r3, 0xb4": (32, 32, lambda a, b, c: a ^ (b & ~c)),
    "lop3.b32 %r0, %r1, %r2, %r3, 0xca": (32, 32, lambda a, b, c: (a & b) | (~a & c)),
    "shl.b32 %r0, %r1, %r2": (32, 32, lambda a, b: a << min(b, 32)),
    "shr.u32 %r0, %r1, %r2": (32, 32, lambda a, b: a >> min(b, 32)),
    "shr.s32 %r0, %r1, %r2": (32, 32, lambda a, b: S(a, 32) >> min(b, 32)),
    "shr.u64 %d0, %d1, %r2": (64, 64, lambda a, b: a >> min(b & 0xFFFFFFFF, 64)),
    "shl.b64 %d0, %d1, 7": (64, 64, lambda a: a << 7),
    "shf.l.wrap.b32 %r0, %r1, %r2, %r3": (32, 32, lambda a, b, c: (b << 32 | a) << (c & 31) >> 32),
    "shf.r.wrap.b32 %r0, %r1, %r2, %r3": (32, 32, lambda a, b, c: (b << 32 | a) >> (c & 31)),
    "shf.r.clamp.b32 %r0, %r1, %r2, %r3": (32, 32, lambda a, b, c: (b << 32 | a) >> min(c, 32)),
    "popc.b32 %r0, %r1": (32, 32, lambda a: a.bit_count()),
    "popc.b64 %r0, %d1": (64, 32, lambda a: a.bit_count()),
    "clz.b32 %r0, %r1": (32, 32, lambda a: 32 - a.bit_length()),
    "clz.b64 %r0, %d1": (64, 32, lambda a: 64 - a.bit_length()),
    "bfind.u32 %r0, %r1": (32, 32, lambda a: a.bit_length() - 1),
    "bfind.shiftamt.u32 %r0, %r1": (32, 32, lambda a: 32 - a.bit_length() if a else -1),
    "bfind.s32 %r0, %r1": (32, 32, lambda a: (~S(a, 32) if a >> 31 else a).bit_length() - 1),
    "brev.b32 %r0, %r1": (32, 32, lambda a: int(f"{a:032b}"[::-1], 2)),
    "bfe.u32 %r0, %r1, %r2, %r3": (32, 32, lambda a, b, c: _bfe(a, b, c, False)),
    "bfe.s32 %r0, %r1, %r2, %r3": (32, 32, lambda a, b, c: _bfe(a, b, c, True)),
    "bfi.b32 %r0, %r1, %r2, %r3, %r4": (32, 32, lambda a, b, c, d: _bfi(a, b, c, d, 32)),
    "bfi.b64 %d0, %d1, %d2, %r3, %r4": (64, 64, lambda a, b, c, d: _bfi(a, b, c, d, 64)),
    "prmt.b32 %r0, %r1, %r2, %r3": (32, 32, _prmt),
    "prmt.b32 %r0, %r1, %r2, 0x5410": (32, 32, lambda a, b: _prmt(a, b, 0x5410)),
    "prmt.b32 %r0, %r1, %r2, 0xba98": (32, 32, lambda a, b: _prmt(a, b, 0xBA98)),
    "dp4a.s32.s32 %r0, %r1, %r2, %r3": (
        32,
        32,
        lambda a, b, c: sum(S(a >> i, 8) * S(b >> i, 8) for i in (0, 8, 16, 24)) + S(c, 32),
    ),
    "setp.lt.s32 %p1, %r1, %r2; selp.b32 %r0, %r3, %r4, %p1": (
        32,
        32,
        lambda a, b, c, d: c if S(a, 32) < S(b, 32) else d,
    ),
    "setp.hi.u32 %p1, %r1, %r2; @%p1 mov.u32 %r0, %r3": (32, 32, lambda a, b, c: c if a > b else 0),
    "setp.hs.u32 %p1, %r1, %r2; @!%p1 add.u32 %r0, %r3, 5": (32, 32, lambda a, b, c: 0 if a >= b else c + 5),
    "setp.eq.u32 %p3, %r3, 0;setp.lt.and.u32 %p1|%p2, %r1, %r2, !%p3;selp.u32 %r0, 1,0, %p1;@%p2 add.u32 %r0, %r0, 2": (
        32,
        32,
        lambda a, b, c: int(a < b and c != 0) + 2 * int(not a < b and c != 0),
    ),
    "slct.b32.s32 %r0, %r1, %r2, %r3": (32, 32, lambda a, b, c: b if c >> 31 else a),
    "cvt.s64.s32 %d0, %r1": (32, 64, lambda a: S(a, 32)),
    "cvt.u64.u32 %d0, %r1": (32, 64, lambda a: a),
    "cvt.s32.s8 %r0, %r1": (32, 32, lambda a: S(a, 8)),
    "cvt.u32.u16 %r0, %h1": (16, 32, lambda a: a),
    "cvt.sat.s8.s32 %r0, %r1": (32, 32, lambda a: max(-128, min(127, S(a, 32)))),
    "cvt.sat.u8.s32 %r0, %r1": (32, 32, lambda a: max(0, min(255, S(a, 32)))),
    "mov.b64 %d0, {%r1, %r2}": (32, 64, lambda a, b: b << 32 | a),
    "mov.b64 {%r5, %r0}, %d1": (64, 32, lambda a: a >> 32),
    "mov.b32 %r0, {%h1, %h2}": (16, 32, lambda a, b: b << 16 | a),
    "{ .reg .b32 %r1; mov.u32 %r1, 9; add.u32 %r0, %r1, %r2; }": (32, 32, lambda a, b: 9 + b),
}


@pytest.mark.parametrize("instruction", INTEGER)
def test_integer(launcher, instruction):
    bits, out, function = INTEGER[instruction]
    generator = np.random.default_rng()
    inputs = [
        words(generator, bits) for _ in range(function.__code__.co_argcount if hasattr(function, "__code__") else 2)
    ]
    got = execute(launcher, instruction + ";", inputs, out)
    for row, value in zip(zip(*inputs, strict=True), got.tolist(), strict=True):
        expected = function(*(int(x) for x in row)) & (1 << out) - 1
        assert value == expected, f"{[hex(int(x)) for x in row]}: got {value:#x}, expected {expected:#x}"


def floats(generator: np.random.Generator, wide: bool = True) -> np.ndarray:
    """float32 patterns: all magnitudes, specials, and close neighbours that cancel."""
    x = generator.standard_normal(COUNT).astype(np.float32)
    if wide:
        x *= np.exp2(generator.integers(-60, 60, COUNT)).astype(np.float32)
    x[:12] = [0.0, -0.0, np.inf, -np.inf, np.nan, 1.0, -1.0, 1e-40, -1e-40, 3.4e38, 0.5, 1.0 + 2**-23]
    return generator.permutation(x)


def pattern(x: np.ndarray) -> np.ndarray:
    return x.view(np.uint32).astype(np.uint64)


def _exact(function: Callable[..., Fraction], *args: float) -> float | None:
    """The exact result, or None where specials are involved."""
    if not all(math.isfinite(a) for a in args):
        return None
    return function(*(Fraction(a) for a in args))


def nearest(value: Fraction, dtype: type[np.floating]) -> np.floating:
    """Round-to-nearest-even of an exact value, by comparing neighbours."""
    with np.errstate(over="ignore"):
        guess = dtype(float(value))
    best = [
        g for g in (np.nextafter(guess, dtype(-np.inf)), guess, np.nextafter(guess, dtype(np.inf))) if np.isfinite(g)
    ]
    bits = np.dtype(f"u{np.dtype(dtype).itemsize}")
    return min(best, key=lambda g: (abs(Fraction(float(g)) - value), int(np.array(g).view(bits)) & 1))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_fma_f32_is_rounded_once(launcher):
    generator = np.random.default_rng()
    a, b, c = floats(generator), floats(generator), floats(generator)
    c[: COUNT // 2] = (-(a[: COUNT // 2].astype(np.float64) * b[: COUNT // 2])).astype(np.float32)  # cancellation
    got = execute(launcher, "fma.rn.f32 %r0, %r1, %r2, %r3;", [pattern(x) for x in (a, b, c)], 32)
    result = got.astype(np.uint32).view(np.float32)
    for x, y, z, r in zip(a.tolist(), b.tolist(), c.tolist(), result, strict=True):
        exact = _exact(lambda p, q, s: p * q + s, x, y, z)
        if exact is None:
            assert np.isnan(r) == np.isnan(x * y + z) or np.isinf(r)
        elif abs(exact) < 2.0**127:
            assert r == nearest(exact, np.float32), (x, y, z, r)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("mode", ["rz", "rm", "rp"])
def test_directed_rounding(launcher, mode):
    generator = np.random.default_rng()
    a, b = floats(generator), floats(generator)
    for name, function in (("add", lambda p, q: p + q), ("mul", lambda p, q: p * q)):
        got = (
            execute(launcher, f"{name}.{mode}.f32 %r0, %r1, %r2;", [pattern(a), pattern(b)], 32)
            .astype(np.uint32)
            .view(np.float32)
        )
        for x, y, r in zip(a.tolist(), b.tolist(), got, strict=True):
            exact = _exact(function, x, y)
            if exact is None or not np.isfinite(r):
                continue
            below, above = np.nextafter(r, np.float32(-np.inf)), np.nextafter(r, np.float32(np.inf))
            value = Fraction(float(r))
            if mode == "rm" or (mode == "rz" and exact > 0):
                assert value <= exact, (x, y, r)
                assert not np.isfinite(above) or Fraction(float(above)) > exact, (x, y, r)
            elif mode == "rp" or exact < 0:
                assert value >= exact, (x, y, r)
                assert not np.isfinite(below) or Fraction(float(below)) < exact, (x, y, r)


def _bf16(x: np.ndarray) -> np.ndarray:
    import torch

    return torch.from_numpy(x).bfloat16().view(torch.int16).numpy().view(np.uint16)


FLOAT: dict[
    str, tuple[int, Callable[..., np.ndarray]]
] = {  # instruction on float32 inputs: (output bits, function giving the bits)
    "add.f32 %r0, %r1, %r2": (32, lambda a, b: a + b),
    "mul.f32 %r0, %r1, %r2": (32, lambda a, b: a * b),
    "div.rn.f32 %r0, %r1, %r2": (32, lambda a, b: a / b),
    "sqrt.rn.f32 %r0, %r1": (32, np.sqrt),
    "rcp.rn.f32 %r0, %r1": (32, lambda a: np.float32(1) / a),
    "add.sat.f32 %r0, %r1, %r2": (
        32,
        lambda a, b: np.where(np.isnan(a + b), np.float32(0), np.clip(a + b, 0, 1)).astype(np.float32),
    ),
    "min.f32 %r0, %r1, %r2": (32, np.fmin),
    "max.NaN.f32 %r0, %r1, %r2": (32, np.maximum),
    "abs.f32 %r0, %r1": (32, np.abs),
    "neg.f32 %r0, %r1": (32, np.negative),
    "cvt.rn.f16.f32 %h0, %r1": (16, lambda a: a.astype(np.float16)),
    "cvt.rn.bf16.f32 %h0, %r1": (16, _bf16),
    "cvt.rn.f16x2.f32 %r0, %r1, %r2": (
        32,
        lambda a, b: (
            b.astype(np.float16).view(np.uint16) | a.astype(np.float16).view(np.uint16).astype(np.uint32) << 16
        ),
    ),
    "cvt.rn.bf16x2.f32 %r0, %r1, %r2": (32, lambda a, b: _bf16(b) | _bf16(a).astype(np.uint32) << 16),
    "cvt.rni.f32.f32 %r0, %r1": (32, np.rint),
    "cvt.rmi.f32.f32 %r0, %r1": (32, np.floor),
    "cvt.rzi.s32.f32 %r0, %r1": (
        32,
        lambda a: np.nan_to_num(np.trunc(a.astype(np.float64))).clip(-(2**31), 2**31 - 1).astype(np.int32),
    ),
    "cvt.rni.u32.f32 %r0, %r1": (
        32,
        lambda a: np.nan_to_num(np.rint(a.astype(np.float64))).clip(0, 2**32 - 1).astype(np.uint32),
    ),
    "setp.lt.f32 %p1, %r1, %r2; selp.u32 %r0, 1, 0, %p1": (32, lambda a, b: (a < b).astype(np.uint32)),
    "setp.neu.f32 %p1, %r1, %r2; selp.u32 %r0, 1, 0, %p1": (32, lambda a, b: (a != b).astype(np.uint32)),
    "setp.ne.f32 %p1, %r1, %r2; selp.u32 %r0, 1, 0, %p1": (32, lambda a, b: ((a < b) | (a > b)).astype(np.uint32)),
    "setp.geu.f32 %p1, %r1, %r2; selp.u32 %r0, 1, 0, %p1": (32, lambda a, b: (~(a < b)).astype(np.uint32)),
    "setp.nan.f32 %p1, %r1, %r2; selp.u32 %r0, 1, 0, %p1": (
        32,
        lambda a, b: (np.isnan(a) | np.isnan(b)).astype(np.uint32),
    ),
    "testp.finite.f32 %p1, %r1; selp.u32 %r0, 1, 0, %p1": (32, lambda a: np.isfinite(a).astype(np.uint32)),
}


@pytest.mark.parametrize("instruction", FLOAT)
def test_float(launcher, instruction):
    out, function = FLOAT[instruction]
    generator = np.random.default_rng()
    a, b = floats(generator), floats(generator)
    arity = 2 if "%r2" in instruction else 1
    with np.errstate(all="ignore"):
        expected = function(*(a, b)[:arity])
    got = execute(launcher, instruction + ";", [pattern(x) for x in (a, b)[:arity]], out).astype(
        np.dtype(f"u{out // 8}")
    )
    if expected.dtype.kind == "f":
        np.testing.assert_array_equal(got.view(expected.dtype), expected)
    elif "bf16" in instruction or "f16x2" in instruction:
        same = got == expected.view(got.dtype)
        assert same[~np.isnan(a) & ~np.isnan(b)].all()
    else:
        np.testing.assert_array_equal(got, expected.view(got.dtype))


def test_half_pairs(launcher):
    """f16x2 and bf16x2 arithmetic, each half rounded once."""
    generator = np.random.default_rng()
    a, b, c = (generator.standard_normal((COUNT, 2)).astype(np.float16) for _ in range(3))
    packed = [x.view(np.uint32)[:, 0].astype(np.uint64) for x in (a, b, c)]
    got = (
        execute(launcher, "fma.rn.f16x2 %r0, %r1, %r2, %r3;", packed, 32)
        .astype(np.uint32)
        .view(np.float16)
        .reshape(-1, 2)
    )
    for x, y, z, r in zip(a.ravel(), b.ravel(), c.ravel(), got.ravel(), strict=True):
        assert r == nearest(Fraction(float(x)) * Fraction(float(y)) + Fraction(float(z)), np.float16)
    got = execute(launcher, "add.rn.f16x2 %r0, %r1, %r2;", packed, 32).astype(np.uint32).view(np.float16).reshape(-1, 2)
    np.testing.assert_array_equal(got, a + b)
    import torch

    ta, tb = torch.from_numpy(a).bfloat16(), torch.from_numpy(b).bfloat16()
    packed = [t.view(torch.int32).numpy().view(np.uint32)[:, 0].astype(np.uint64) for t in (ta, tb)]
    for name, expected in (("mul", ta * tb), ("sub", ta - tb), ("max", torch.maximum(ta, tb))):
        mode = "" if name == "max" else ".rn"
        got = execute(launcher, f"{name}{mode}.bf16x2 %r0, %r1, %r2;", packed, 32).astype(np.uint32)
        np.testing.assert_array_equal(got, expected.view(torch.int32).numpy().view(np.uint32)[:, 0])


def test_comparisons_of_half_pairs(launcher):
    """Any bits, NaN and denormals among them: masks of each half, and the larger and the smaller."""
    bits = np.random.default_rng().integers(1 << 16, size=(2, COUNT, 2), dtype=np.uint16)
    bits[:, ::5] = bits[0, ::5]
    packed = [x.view(np.uint32)[:, 0].astype(np.uint64) for x in bits]
    a, b = bits.view(np.float16)

    def run(instruction: str) -> np.ndarray:
        return execute(launcher, f"{instruction}.f16x2 %r0, %r1, %r2;", packed, 32).astype(np.uint32).view(np.uint16)

    def masks(condition: np.ndarray) -> np.ndarray:
        return np.where(condition, 0xFFFF, 0).ravel()

    with np.errstate(invalid="ignore"):
        np.testing.assert_array_equal(run("set.ge.u32"), masks(a >= b))
        np.testing.assert_array_equal(run("set.neu.u32"), masks(a != b))
        expected = {"max.NaN": np.maximum(a, b), "min": np.fmin(a, b)}
    for instruction, values in expected.items():
        got = run(instruction).view(np.float16)
        np.testing.assert_array_equal(got, values.ravel())
    with pytest.raises(SimError, match="unknown-opcode"):
        run("set.ge.f16x2")


@pytest.mark.parametrize(
    ("name", "function"), [("ex2", np.exp2), ("lg2", np.log2), ("rcp", np.reciprocal), ("rsqrt", lambda x: x**-0.5)]
)
def test_approximate_functions(launcher, name, function):
    x = np.abs(floats(np.random.default_rng(), wide=False)[:500]).clip(1e-3, 100).astype(np.float32)
    got = execute(launcher, f"{name}.approx.ftz.f32 %r0, %r1;", [pattern(x)], 32).astype(np.uint32).view(np.float32)
    np.testing.assert_allclose(got, function(x.astype(np.float64)), rtol=2**-23)


def test_unknown_opcode_is_an_error_that_names_it(launcher):
    with pytest.raises(SimError, match="unknown-opcode: frobnicate") as caught:
        execute(launcher, "frobnicate.b32 %r0, %r1;", [np.zeros(32, np.uint64)])
    assert caught.value.kind == "unknown-opcode"
    with pytest.raises(SimError, match="unknown-opcode"):
        execute(launcher, "add.rm.bf16 %h0, %h1, %h1;", [np.zeros(32, np.uint64)])


@pytest.mark.parametrize(
    "instruction",
    ["fma.rn.ftz.f16 %h0, %h1, %h1, %h1;", "add.ftz.f16 %h0, %h1, %h1;", "abs.ftz.f16 %h0, %h1;",
     "cvt.rn.satfinite.f16.f32 %h0, %r1;", "cvt.rn.satfinite.bf16x2.f32 %r0, %r1, %r1;",
     "ex2.approx.ftz.bf16 %h0, %h1;", "max.relu.s32 %r0, %r1, %r1;"],
)  # fmt: skip
def test_a_modifier_that_is_passed_over_is_an_unknown_opcode(launcher, instruction):
    with pytest.raises(SimError, match=r"unknown-opcode: .*\.\w+ is not implemented"):
        execute(launcher, instruction, [np.zeros(32, np.uint64)])


def test_a_loop_without_instructions_makes_no_progress(launcher, monkeypatch):
    from . import scheduler

    monkeypatch.setattr(scheduler, "BLOCK_BUDGET", 1000)
    with pytest.raises(SimError, match=r"no-progress: .*\n  at k, PTX line \d+ `bra FOREVER"):
        execute(launcher, "FOREVER: bra FOREVER;", [np.zeros(32, np.uint64)])


def test_a_cta_has_sixteen_barriers(launcher):
    execute(launcher, "mov.u32 %r1, 15; bar.sync %r1;", [np.zeros(32, np.uint64)])
    with pytest.raises(SimError, match="out-of-bounds: barrier 16, where a CTA has 16"):
        execute(launcher, "mov.u32 %r1, 16; bar.sync %r1;", [np.zeros(32, np.uint64)])


# Lane-dependent control flow: value of %r0 per lane as Python.
def test_divergence_and_loops(launcher):
    """A loop with a lane-dependent count around a branch, with a shuffle after reconvergence."""
    body = """
    mov.u32 %r5, 0;
    and.b32 %r6, %r1, 15;
    LOOP:
    setp.ge.u32 %p1, %r5, %r6;
    @%p1 bra DONE;
    and.b32 %r7, %r5, 1;
    setp.eq.u32 %p2, %r7, 0;
    @%p2 bra EVEN;
    add.u32 %r0, %r0, 100;
    bra JOIN;
    EVEN:
    add.u32 %r0, %r0, 1;
    JOIN:
    add.u32 %r5, %r5, 1;
    bra LOOP;
    DONE:
    shfl.sync.idx.b32 %r0, %r0, %r10, 31, -1;
    """
    x = words(np.random.default_rng(), 32)
    got = execute(launcher, body, [x], 32)
    for value, result in zip(x.tolist(), got.tolist(), strict=True):
        n = value & 15
        assert result == (n + 1) // 2 + 100 * (n // 2)


def test_indexed_branch(launcher):
    body = """
    and.b32 %r5, %r1, 3;
    TABLE: .branchtargets A, B, C, A;
    brx.idx %r5, TABLE;
    A: mov.u32 %r0, 10; bra END;
    B: mov.u32 %r0, 20; bra END;
    C: mov.u32 %r0, 30;
    END:
    """
    x = words(np.random.default_rng(), 32)
    assert execute(launcher, body, [x], 32).tolist() == [(10, 20, 30, 10)[v & 3] for v in x.tolist()]


def test_warp_instructions(launcher):
    generator = np.random.default_rng()
    x = generator.integers(0, 5, COUNT).astype(np.uint64)
    rows = x.reshape(-1, 32)
    lane = np.arange(32)

    def run(body: str) -> np.ndarray:
        return execute(launcher, body, [x], 32).reshape(-1, 32)

    np.testing.assert_array_equal(run("shfl.sync.bfly.b32 %r0, %r1, 5, 31, -1;"), rows[:, lane ^ 5])
    np.testing.assert_array_equal(
        run("shfl.sync.up.b32 %r0, %r1, 3, 0, -1;"), rows[:, np.where(lane < 3, lane, lane - 3)]
    )
    np.testing.assert_array_equal(
        run("shfl.sync.down.b32 %r0, %r1, 4, 31, -1;"), rows[:, np.where(lane > 27, lane, lane + 4)]
    )
    # width 8: c = ((32 - 8) << 8) | 31
    np.testing.assert_array_equal(run("shfl.sync.idx.b32 %r0, %r1, 2, 0x181f, -1;"), rows[:, lane // 8 * 8 + 2])
    up = run("shfl.sync.up.b32 %r5|%p1, %r1, 1, 0, -1; selp.u32 %r0, 1, 0, %p1;")
    np.testing.assert_array_equal(up, np.broadcast_to(lane >= 1, up.shape))
    ballots = ((rows == 2) << lane).sum(axis=1, keepdims=True)
    np.testing.assert_array_equal(
        run("setp.eq.u32 %p1, %r1, 2; vote.sync.ballot.b32 %r0, %p1, -1;"), np.broadcast_to(ballots, rows.shape)
    )
    matches = ((rows[:, :, None] == rows[:, None, :]) << lane).sum(axis=2)
    np.testing.assert_array_equal(run("match.any.sync.b32 %r0, %r1, -1;"), matches)
    np.testing.assert_array_equal(
        run("redux.sync.add.u32 %r0, %r1, -1;"), np.broadcast_to(rows.sum(axis=1, keepdims=True), rows.shape)
    )
    active = run("setp.eq.u32 %p1, %r1, 2; @%p1 activemask.b32 %r0;")
    np.testing.assert_array_equal(active, np.where(rows == 2, ballots, 0))
    total = execute(launcher, "setp.eq.u32 %p1, %r1, 2; barrier.cta.red.popc.aligned.u32 %r0, 0, %p1;", [x], 32)
    assert (total == (x == 2).sum()).all()


def test_atomics_serialise_lanes(launcher):
    """Old values of a contended counter are a permutation; the sum arrives."""
    x = np.random.default_rng().integers(0, 1000, 256).astype(np.uint64)
    counter = _buffer(launcher, np.zeros(4, np.uint64))
    body = f"mov.u64 %d5, {counter}; atom.global.add.u32 %r0, [%d5], 1;"
    body += "red.global.add.u64 [%d5+8], %d1; atom.global.max.u32 %r6, [%d5+16], %r1;"
    got = execute(launcher, body, [x], 32)
    after = np.frombuffer((ctypes.c_uint8 * 32).from_address(counter), np.uint64)
    assert sorted(got.tolist()) == list(range(256))
    assert after.tolist() == [256, int(x.sum()), int(x.max()), 0]
    launcher.device.memory.free(counter)


def test_producer_consumer_through_named_barriers(launcher):
    """Warps 0-3 write and arrive; warps 4-7 wait, read and answer: no barrier of all threads."""
    body = """
    { .shared .align 4 .b8 box[512];
    mov.u32 %r5, box;
    and.b32 %r6, %r10, 127;
    shl.b32 %r7, %r6, 2;
    add.u32 %r7, %r7, %r5;
    setp.lt.u32 %p1, %r10, 128;
    @!%p1 bra CONSUMER;
    st.shared.u32 [%r7], %r1;
    barrier.cta.arrive 1, 256;
    bra END;
    CONSUMER:
    barrier.cta.sync 1, 256;
    ld.shared.u32 %r0, [%r7];
    END: }
    """
    x = words(np.random.default_rng(), 32)[:256]
    got = execute(launcher, body, [x], 32)
    np.testing.assert_array_equal(got[128:], x[:128])
    with pytest.raises(SimError, match="shared-race"):
        execute(
            launcher, body.replace("barrier.cta.sync 1, 256;", "").replace("barrier.cta.arrive 1, 256;", ""), [x], 32
        )


MMA = {  # type of A and B: (elements in a register, type of C and D, k)
    "f16": (2, "f32", 16), "bf16": (2, "f32", 16), "tf32": (1, "f32", 8), "s8": (4, "s32", 32),
}  # fmt: skip


def _bits(kind: str, values: np.ndarray) -> np.ndarray:
    """Small whole numbers [.., elements] as registers [..]."""
    if kind in ("s8", "s32"):
        return values.astype(np.int8 if kind == "s8" else np.int32).view(np.uint32)[..., 0]
    if kind == "f16":
        return values.astype(np.float16).view(np.uint32)[..., 0]
    words = values.astype(np.float32).view(np.uint32)
    return words[..., 0] if kind in ("f32", "tf32") else words[..., 0] >> 16 | words[..., 1] & 0xFFFF0000


@pytest.mark.parametrize("kind", MMA)
def test_mma(launcher, kind):
    """Whole numbers, where every operand lies in the registers as the manual's figures have it."""
    p, out, k = MMA[kind]
    generator = np.random.default_rng()
    a, b, c = (generator.integers(-8, 8, shape) for shape in ((16, k), (k, 8), (16, 8)))
    lane = np.arange(32)
    g, t, element = lane // 4, lane % 4, np.arange(p)

    def fragment_a(r: int) -> np.ndarray:
        return _bits(kind, a[(g + 8 * (r % 2))[:, None], 4 * p * (r // 2) + p * t[:, None] + element])

    def fragment_b(r: int) -> np.ndarray:
        return _bits(kind, b[4 * p * r + p * t[:, None] + element, g[:, None]])

    def fragment_c(matrix: np.ndarray, i: int) -> np.ndarray:
        return _bits(out, matrix[g + 8 * (i // 2), 2 * t + i % 2][:, None])

    operands = [fragment_a(0), fragment_a(1), fragment_a(2), fragment_a(3), fragment_b(0), fragment_b(1)]
    operands += [fragment_c(c, i) for i in range(4)]
    halves = [operand.astype(np.uint64) for operand in operands]
    inputs = [low | high << np.uint64(32) for low, high in zip(halves[::2], halves[1::2], strict=True)]
    body = "mov.b64 {%r11, %r12}, %d1; mov.b64 {%r13, %r14}, %d2; mov.b64 {%r15, %r16}, %d3;"
    body += "mov.b64 {%r6, %r7}, %d4; mov.b64 {%r8, %r9}, %d5;"
    body += f"mma.sync.aligned.m16n8k{k}.row.col.{out}.{kind}.{kind}.{out} {{%r1, %r2, %r3, %r4}},"
    body += "{%r11, %r12, %r13, %r14}, {%r15, %r16}, {%r6, %r7, %r8, %r9}; mov.u32 %r0, RESULT;"
    for i in range(4):
        got = execute(launcher, body.replace("RESULT", f"%r{i + 1}"), inputs, 32)
        np.testing.assert_array_equal(got, fragment_c(a @ b + c, i))


def test_local_memory_and_generic_addresses(launcher):
    """A per-thread array in local memory, written directly and read through a generic address."""
    body = """
    { .local .align 8 .b8 frame[32];
    .reg .b64 %SP, %SPL;
    mov.u64 %SPL, frame;
    cvta.local.u64 %SP, %SPL;
    st.local.u32 [%SPL+8], %r1;
    st.local.u32 [%SPL+12], %r2;
    ld.u64 %d0, [%SP+8]; }
    """
    a, b = words(np.random.default_rng(), 32), words(np.random.default_rng(), 32)
    np.testing.assert_array_equal(execute(launcher, body, [a, b]), b << np.uint64(32) | a)
    with pytest.raises(SimError, match="out-of-bounds"):
        execute(launcher, body.replace("[%SP+8]", "[%SP+4096]"), [a, b])


GATHER = """
{ .shared .align 8 .b8 barrier[8];
.shared .align 16 .b8 box[2048];
.reg .pred done;
mov.u32 %r5, box;
mov.u32 %r6, barrier;
setp.ne.u32 %p1, %r10, 0;
@%p1 bra READY;
mbarrier.init.shared::cta.b64 [%r6], 256;
READY:
bar.sync 0;
shl.b32 %r7, %r10, 3;
add.u32 %r7, %r7, %r5;
cp.async.ca.shared.global [%r7], [%d10], 8;
cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%r6];
RETRY:
mbarrier.try_wait.parity.shared::cta.b64 done, [%r6], 0;
@!done bra RETRY;
xor.b32 %r8, %r10, 255;
shl.b32 %r8, %r8, 3;
add.u32 %r8, %r8, %r5;
ld.shared.u64 %d0, [%r8]; }
"""


def test_gather_signalled_through_an_mbarrier(launcher):
    """Each thread copies a value with cp.async whose completion arrives on an mbarrier; each reads another one."""
    x = words(np.random.default_rng(), 64)[:256]
    np.testing.assert_array_equal(execute(launcher, GATHER, [x]), x[::-1])
    with pytest.raises(SimError, match="async-race"):
        execute(
            launcher,
            GATHER.replace("cp.async.mbarrier.arrive.noinc", "mbarrier.arrive").replace(
                ".b64 [%r6];\nRETRY", ".b64 _, [%r6];\nRETRY"
            ),
            [x],
        )
    with pytest.raises(SimError, match=r"deadlock: .* still expects 1 arrivals"):
        execute(launcher, GATHER.replace("[%r6], 256", "[%r6], 257"), [x])
    with pytest.raises(SimError, match="mbarrier: more arrivals"):
        execute(launcher, GATHER.replace("[%r6], 256", "[%r6], 100"), [x])
    with pytest.raises(SimError, match="mbarrier: not initialised"):
        execute(launcher, GATHER.replace("mbarrier.init.shared::cta.b64 [%r6], 256;", ""), [x])


def test_bulk_copy_and_phase_token(launcher):
    """cp.async.bulk counts its bytes on an mbarrier; test_wait asks with the token of the arrival."""
    body = """
    { .shared .align 8 .b8 barrier[8];
    .shared .align 16 .b8 box[512];
    .reg .pred done;
    mov.u32 %r5, box;
    mov.u32 %r6, barrier;
    setp.ne.u32 %p1, %r10, 0;
    @%p1 bra OTHERS;
    mbarrier.init.shared::cta.b64 [%r6], 64;
    fence.mbarrier_init.release.cluster;
    OTHERS:
    bar.sync 0;
    @%p1 bra ARRIVE;
    mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [%r6], 512;
    cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%r5], [%d10], 512, [%r6];
    ARRIVE:
    mbarrier.arrive.shared::cta.b64 %d5, [%r6];
    RETRY:
    mbarrier.test_wait.shared::cta.b64 done, [%r6], %d5;
    @!done bra RETRY;
    shl.b32 %r7, %r10, 3;
    add.u32 %r7, %r7, %r5;
    ld.shared.u64 %d0, [%r7]; }
    """
    x = words(np.random.default_rng(), 64)[:64]
    np.testing.assert_array_equal(execute(launcher, body, [x]), x)
    with pytest.raises(SimError, match=r"shared-race: .*a TMA load"):
        execute(
            launcher,
            body.replace("mbarrier.test_wait.shared::cta.b64 done, [%r6], %d5;\n    @!done bra RETRY;", ""),
            [x],
        )
