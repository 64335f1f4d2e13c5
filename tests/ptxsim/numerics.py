"""Exact floating-point helpers that numpy lacks: bfloat16, fused multiply-add and the directed roundings.

The float32 result of an operation is obtained by rounding to odd in float64 first (53 bits hold a float32 product
exactly and leave more than two spare bits), then once to the target; that equals a single correct rounding (Boldo &
Melquiond, 2008).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
_F32_MIN_NORMAL = np.float32(2.0**-126)


def flush(x: Array) -> Array:
    """float32 subnormals to zeros of the same sign (.ftz)."""
    return np.where(np.abs(x) < _F32_MIN_NORMAL, np.copysign(np.float32(0), x), x)


def bf16_to_f32(bits: Array) -> Array:
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def f32_to_bf16(x: Array, mode: str = "rn") -> Array:
    """float32 to bfloat16 bits; NaN becomes the canonical 0x7fff."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    if mode == "rn":
        rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    elif mode == "rz":
        rounded = bits >> np.uint32(16)
    else:
        raise NotImplementedError(f"rounding .{mode} to bf16")
    return np.where(np.isnan(x), np.uint32(0x7FFF), rounded).astype(np.uint16)


def odd_add(a: Array, b: Array) -> Array:
    """a + b in float64, rounded to odd."""
    s = a + b
    bb = s - a
    err = (a - (s - bb)) + (b - bb)
    inexact = (err != 0) & np.isfinite(s)
    if not inexact.any():
        return s
    bits = np.ascontiguousarray(s).view(np.int64)
    even = (bits & 1) == 0
    # s is one of the two neighbours of the exact sum; if it is the even one, the odd one lies in the direction of err.
    step = np.where((err > 0) == (s > 0), 1, -1)
    return np.where(inexact & even, bits + step, bits).view(np.float64)


def round_f32(x: Array, mode: str) -> Array:
    """float64 (exact or rounded to odd) to float32 with rounding rn, rz, rm or rp."""
    y = x.astype(np.float32)
    if mode == "rn":
        return y
    wide = y.astype(np.float64)
    if mode == "rz":
        wrong = np.abs(wide) > np.abs(x)
        toward = np.float32(0)
    elif mode == "rm":
        wrong, toward = wide > x, np.float32(-np.inf)
    elif mode == "rp":
        wrong, toward = wide < x, np.float32(np.inf)
    else:
        raise NotImplementedError(f"rounding .{mode}")
    return np.where(wrong, np.nextafter(y, toward), y)


def fma_f32(a: Array, b: Array, c: Array, mode: str = "rn") -> Array:
    return round_f32(odd_add(a.astype(np.float64) * b.astype(np.float64), c.astype(np.float64)), mode)


def fma_f64(a: Array, b: Array, c: Array) -> Array:
    """float64 fma through the x87 long double: 64 bits, so correctly rounded for all but very rare ties."""
    return (a.astype(np.longdouble) * b + c).astype(np.float64)


def odd_f64_to_f32(x: Array) -> Array:
    """float64 to float32 rounded to odd: the step before rounding once more to a 16-bit format."""
    y = round_f32(x, "rz")
    inexact = (y.astype(np.float64) != x) & np.isfinite(x)
    bits = np.ascontiguousarray(y).view(np.uint32)
    return np.where(inexact, bits | np.uint32(1), bits).view(np.float32)


def f32_to_f16(x: Array, mode: str = "rn") -> Array:
    """float32 to float16."""
    y = x.astype(np.float16)
    if mode == "rn":
        return y
    wide = y.astype(np.float32)
    wrong = {"rz": np.abs(wide) > np.abs(x), "rm": wide > x, "rp": wide < x}[mode]
    toward = {"rz": 0.0, "rm": -np.inf, "rp": np.inf}[mode]
    return np.where(wrong, np.nextafter(y, np.float16(toward)), y)


def mul_hi_u64(a: Array, b: Array) -> Array:
    mask, half = np.uint64(0xFFFFFFFF), np.uint64(32)
    a0, a1, b0, b1 = a & mask, a >> half, b & mask, b >> half
    mid = a1 * b0 + (a0 * b0 >> half)
    low = a0 * b1 + (mid & mask)
    return a1 * b1 + (mid >> half) + (low >> half)
