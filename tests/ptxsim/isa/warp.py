"""Warp-level communication: shuffles, votes, matches, reductions.

Lanes that a member mask names but that are not here to execute the instruction have left for good (the scheduler has
waited for all that could still come): that is a fault, as on hardware it is undefined or a hang.
"""

from __future__ import annotations

import numpy as np

from ..ptx import Imm, Pair
from .core import DTYPES, Array, Binder, Make, op

_LANES = np.arange(32, dtype=np.uint32)
_BITS = np.uint32(1) << _LANES


def warp_rows(array: Array, size: int) -> Array:
    """[warps, 32] view of a per-thread array (or a constant)."""
    return np.broadcast_to(array, (size,)).reshape(-1, 32)


def check_members(b: Binder, members: Array, mask: Array) -> None:
    """Every active lane must be named by its own member mask, and every named lane must be active (or have exited)."""
    wave = b.wave
    active = mask.reshape(-1, 32)
    present = np.where(active, _BITS, np.uint32(0)).sum(axis=1, dtype=np.uint32)[:, None]
    gone = np.where(wave.exited.reshape(-1, 32), _BITS, np.uint32(0)).sum(axis=1, dtype=np.uint32)[:, None]
    named = warp_rows(members, wave.size)
    wrong = active & (((named & ~(present | gone)) != 0) | ((named & _BITS) == 0))
    if wrong.any():
        thread = int(wrong.reshape(-1).argmax())
        row = thread // 32
        absent = int(named[row, thread % 32]) & ~int(present[row, 0])
        lanes = [i for i in range(32) if absent >> i & 1]
        detail = (
            f"member mask {int(named[row, thread % 32]):#010x} names lanes {lanes} that do not execute it"
            if lanes
            else "the executing lane is not in its member mask"
        )
        raise wave.fault("divergent-sync", detail, b.instr, thread)


@op("shfl")
def shfl(b: Binder) -> Make:
    if not b.has("sync"):
        raise b.unknown("without .sync")
    mode = next(m for m in b.mods if m in ("up", "down", "bfly", "idx"))
    target = b.args[0]
    first, second = (target.first, target.second) if isinstance(target, Pair) else (target, None)
    d, x = b.dst(first, np.uint32), b.src(b.args[1], np.uint32)
    p = b.dst(second, bool) if second is not None else None
    lane_arg, clamp_arg, members = (b.src(a, np.uint32) for a in b.args[2:5])
    wave = b.wave

    def run(mask: Array) -> None:
        check_members(b, members, mask)
        offset, control = warp_rows(lane_arg, wave.size) & np.uint32(31), warp_rows(clamp_arg, wave.size)
        clamp, segment = (
            (control & np.uint32(31)).astype(np.int64),
            (control >> np.uint32(8) & np.uint32(31)).astype(np.int64),
        )
        lane, delta = _LANES.astype(np.int64), offset.astype(np.int64)
        top = (lane & segment) | (clamp & ~segment)
        bottom = lane & segment
        if mode == "up":
            source, valid = lane - delta, lane - delta >= top
        elif mode == "down":
            source, valid = lane + delta, lane + delta <= top
        elif mode == "bfly":
            source, valid = lane ^ delta, (lane ^ delta) <= top
        else:
            source = bottom | (delta & ~segment)
            valid = source <= top
        source = np.where(valid, source, lane)
        values = np.take_along_axis(warp_rows(x, wave.size), source, axis=1).reshape(-1)
        active = np.take_along_axis(mask.reshape(-1, 32), source, axis=1).reshape(-1)
        unread = mask & ~active
        if unread.any():
            raise wave.fault(
                "divergent-sync", "the source lane does not execute the shuffle", b.instr, int(unread.argmax())
            )
        np.copyto(d, values, where=mask)
        if p is not None:
            np.copyto(p, np.broadcast_to(valid, source.shape).reshape(-1), where=mask)

    return b.masks(run)


@op("vote")
def vote(b: Binder) -> Make:
    if not b.has("sync"):
        raise b.unknown("without .sync")
    x, members = b.src(b.args[1], bool), b.src(b.args[2], np.uint32)
    flip = bool(getattr(b.args[1], "negated", False))
    mode = next(m for m in b.mods if m in ("ballot", "all", "any", "uni"))
    d = b.dst(b.args[0], np.uint32 if mode == "ballot" else bool)

    def run(mask: Array) -> None:
        check_members(b, members, mask)
        yes = (np.broadcast_to(x, mask.shape) ^ flip).reshape(-1, 32)
        active = mask.reshape(-1, 32) & ((warp_rows(members, mask.size) & _BITS) != 0)
        if mode == "ballot":
            result = np.where(yes & active, _BITS, np.uint32(0)).sum(axis=1, dtype=np.uint32)
        else:
            every, some = (yes | ~active).all(axis=1), (yes & active).any(axis=1)
            result = {"all": every, "any": some, "uni": every | ~some}[mode]
        np.copyto(d, np.repeat(result, 32), where=mask)

    return b.masks(run)


@op("match")
def match(b: Binder) -> Make:
    target = b.args[0]
    first, second = (target.first, target.second) if isinstance(target, Pair) else (target, None)
    d, x, members = b.dst(first, np.uint32), b.src(b.args[1], DTYPES[b.type]), b.src(b.args[2], np.uint32)
    p = b.dst(second, bool) if second is not None else None
    all_mode = b.has("all")

    def run(mask: Array) -> None:
        check_members(b, members, mask)
        values, active = warp_rows(x, mask.size), mask.reshape(-1, 32)
        equal = (values[:, :, None] == values[:, None, :]) & active[:, None, :]
        groups = np.where(equal, _BITS, np.uint32(0)).sum(axis=2, dtype=np.uint32)
        if all_mode:
            everyone = np.where(active, _BITS, np.uint32(0)).sum(axis=1, dtype=np.uint32)[:, None]
            same = groups == everyone
            groups = np.where(same, everyone, np.uint32(0))
            if p is not None:
                np.copyto(p, same.reshape(-1), where=mask)
        np.copyto(d, groups.reshape(-1), where=mask)

    return b.masks(run)


@op("activemask")
def activemask(b: Binder) -> Make:
    d = b.dst(b.args[0], np.uint32)

    def run(mask: Array) -> None:
        bits = np.where(mask.reshape(-1, 32), _BITS, np.uint32(0)).sum(axis=1, dtype=np.uint32)
        np.copyto(d, np.repeat(bits, 32), where=mask)

    return b.masks(run)


@op("redux")
def redux(b: Binder) -> Make:
    name = next(m for m in b.mods if m in ("add", "min", "max", "and", "or", "xor"))
    function = {
        "add": np.add,
        "min": np.minimum,
        "max": np.maximum,
        "and": np.bitwise_and,
        "or": np.bitwise_or,
        "xor": np.bitwise_xor,
    }[name]
    dtype = DTYPES[b.type]
    d, x, members = b.dst(b.args[0], dtype), b.src(b.args[1], dtype), b.src(b.args[2], np.uint32)

    def run(mask: Array) -> None:
        check_members(b, members, mask)
        values, active = warp_rows(x, mask.size), mask.reshape(-1, 32)
        for row in active.any(axis=1).nonzero()[0]:
            here = active[row]
            d.reshape(-1, 32)[row, here] = function.reduce(values[row, here])

    return b.masks(run)


@op("elect")
def elect(b: Binder) -> Make:
    target = b.args[0]
    assert isinstance(target, Pair)
    members, p = b.src(b.args[1], np.uint32), b.dst(target.second, bool)
    d = b.dst(target.first, np.uint32)

    def run(mask: Array) -> None:
        check_members(b, members, mask)
        leader = mask.reshape(-1, 32).argmax(axis=1)
        np.copyto(d, np.repeat(leader, 32).astype(np.uint32), where=mask)
        np.copyto(p, (leader[:, None] == _LANES).reshape(-1), where=mask)

    return b.masks(run)


@op("bar")
def bar_warp_sync(b: Binder) -> Make:
    """bar.warp.sync; the CTA-wide barriers are the scheduler's."""
    members = (
        b.src(b.args[0], np.uint32)
        if not isinstance(b.args[0], Imm)
        else np.array(b.args[0].value & 0xFFFFFFFF, np.uint32)
    )
    wave = b.wave

    def run(mask: Array) -> None:
        check_members(b, members, mask)
        wave.shared.warp_sync(mask.reshape(-1, 32).any(axis=1).nonzero()[0])

    return b.masks(run)
