"""cvt: conversions between integers, floats and packed 16-bit pairs."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ..numerics import f32_to_bf16, f32_to_f16, flush, odd_f64_to_f32, round_f32
from .core import DTYPES, Array, Binder, Make, op
from .floating import is_float, reader

_INTEGER_ROUNDING = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}


@op("cvt")
def cvt(b: Binder) -> Make:
    kinds = [m for m in b.mods if m in DTYPES]
    if len(kinds) != 2:
        raise b.unknown(f"types {kinds}")
    to, source = kinds
    if b.mods[0] == "pack":
        raise b.unknown()
    if to.endswith("x2"):
        return _pair(b, to, source)
    if to == "tf32":
        return _tf32(b)
    if not is_float(to):
        return _to_integer(b, to, source) if is_float(source) else _resize(b, to, source)
    return _to_float(b, to, source)


def _resize(b: Binder, to: str, source: str) -> Make:
    x, d = b.src(b.args[1], DTYPES[source]), b.dst(b.args[0], DTYPES[to])
    if b.has("sat"):
        low, high = np.iinfo(DTYPES[to]).min, np.iinfo(DTYPES[to]).max
        if DTYPES[source] == np.uint64:
            return b.value(d, lambda: np.minimum(x, np.uint64(high)).astype(DTYPES[to]))
        return b.value(d, lambda: np.clip(x.astype(np.int64), low, min(high, 2**63 - 1)).astype(DTYPES[to]))
    narrow = DTYPES[to]
    return b.value(d, lambda: x.astype(narrow))


def _to_integer(b: Binder, to: str, source: str) -> Make:
    x, d = reader(b, b.args[1], source), b.dst(b.args[0], DTYPES[to])
    rounding = next((_INTEGER_ROUNDING[m] for m in b.mods if m in _INTEGER_ROUNDING), np.trunc)
    b.has("sat")  # which it always does
    info = np.iinfo(DTYPES[to])
    wide = info.bits == 64
    nan_result = info.min if wide and to[0] == "s" else (1 << 63 if wide else 0)

    def run() -> Array:
        value = rounding(x().astype(np.float64))
        # Out of range saturates; the float64 bound next below 2**63 (2**64) keeps the conversion itself defined.
        top = np.nextafter(float(info.max) + 1.0, 0.0) if wide else float(info.max)
        result = np.clip(np.nan_to_num(value, nan=0.0, posinf=np.inf, neginf=-np.inf), float(info.min), top).astype(
            info.dtype
        )
        result = np.where(value > top, info.max, result)
        return np.where(np.isnan(value), nan_result, result).astype(info.dtype)

    return b.value(d, run)


def _shaper(b: Binder) -> Callable[[Array], Array]:
    """What .sat and .relu do to a float."""
    saturate, relu = b.has("sat"), b.has("relu")

    def shape(x: Array) -> Array:
        if saturate:
            x = np.where(np.isnan(x), 0, np.clip(x, 0, 1)).astype(x.dtype)
        if relu:
            x = np.where(x < 0, 0, x).astype(x.dtype)
        return x

    return shape


def _to_float(b: Binder, to: str, source: str) -> Make:
    d = b.dst(b.args[0], DTYPES[to])
    mode = b.rounding()
    if is_float(source):
        values: Callable[[], Array] = reader(b, b.args[1], source)
    else:
        integers = b.src(b.args[1], DTYPES[source])
        values = lambda: integers  # noqa: E731
    rint = next((_INTEGER_ROUNDING[m] for m in b.mods if m in _INTEGER_ROUNDING), None)
    ftz, shape = b.has("ftz"), _shaper(b)

    def run() -> Array:
        x = values()
        if rint is not None:
            x = rint(x)
        if to == "f64":
            return shape(x.astype(np.float64))
        if to == "f32":
            if mode != "rn" and x.dtype.itemsize >= 4 and x.dtype != np.float32:
                if x.dtype.itemsize == 8 and x.dtype.kind in "iu":
                    raise NotImplementedError(f"cvt.{mode} from 64-bit integers")
                y = round_f32(x.astype(np.float64), mode)
            else:
                y = x.astype(np.float32)
            return shape(flush(y) if ftz else y)
        if x.dtype == np.float64 or x.dtype.kind in "iu":
            if x.dtype.itemsize == 8 and x.dtype.kind in "iu":
                raise NotImplementedError(f"cvt from {source} to {to}")
            x = x.astype(np.float32) if x.dtype.itemsize <= 2 else odd_f64_to_f32(x.astype(np.float64))
        x = shape(x)
        if to == "bf16":
            return f32_to_bf16(x.astype(np.float32), mode)
        return x if x.dtype == np.float16 else f32_to_f16(x, mode)

    return b.value(d, run)


def _pair(b: Binder, to: str, source: str) -> Make:
    """cvt.f16x2.f32 d, hi, lo."""
    if source != "f32":
        raise b.unknown(f"packed conversion from {source}")
    mode = b.rounding()
    high, low = reader(b, b.args[1], "f32"), reader(b, b.args[2], "f32")
    d = b.wave.pairs(b.dst(b.args[0], np.uint32), np.dtype(np.uint16))

    shape = _shaper(b)

    def narrow(x: Array) -> Array:
        x = shape(x)
        half = f32_to_bf16(x, mode) if to == "bf16x2" else f32_to_f16(x, mode).view(np.uint16)
        return np.broadcast_to(half, (b.wave.size,))

    return b.value(d, lambda: np.stack([narrow(low()), narrow(high())], axis=1))


def _tf32(b: Binder) -> Make:
    """Round to 10 mantissa bits, ties away (.rna) or to even (.rn)."""
    x, d = b.src(b.args[1], np.uint32), b.dst(b.args[0], np.uint32)
    if b.has("rna"):
        return b.value(
            d, lambda: np.where(np.isfinite(x.view(np.float32)), (x + np.uint32(0x1000)) & np.uint32(0xFFFFE000), x)
        )
    if not b.has("rn"):
        raise b.unknown()
    return b.value(
        d,
        lambda: np.where(
            np.isfinite(x.view(np.float32)),
            (x + np.uint32(0xFFF) + (x >> np.uint32(13) & np.uint32(1))) & np.uint32(0xFFFFE000),
            x,
        ),
    )
