"""Warpgroup matrix multiply: wgmma.mma_async, dense and .sp, A from shared memory or registers, 16-bit operands.

Matrix descriptors (PTX ISA, "Strides"; CUTE's mma_sm90_desc.hpp): bits 0-13 start address, 16-29 leading and 32-45
stride byte offset, all in units of 16 bytes, 62-63 the swizzle. With W units per swizzled row (1 none, 2, 4, 8),
element (i, k) of an operand with i along M or N lies at

    K-major    (i % 8) 16 W + (i / 8) stride + 2 k                                    (no swizzle: k / 8 steps by
    leading) MN-major   (u % W) 16 + (u / W) leading + (k % 8) 16 W + (k / 8) stride + 2 (i % 8),  u = i / 8
               (no swizzle: u stride + (k % 8) 16 + (k / 8) leading)

and address bits 4-6 are xored with bits 7-9, as far as W reaches.

The product is formed when the instruction issues, as in `tensor`; its shared-memory reads last until
`wgmma.wait_group`, which is what the race detector sees, as its accumulators are its own until then (`in_flight`).
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np

from ..memory import Bad
from ..numerics import f32_to_f16, odd_f64_to_f32
from ..ptx import Imm, Reg, Vec
from ..shared import TENSOR
from .core import Array, Binder, Make, op, vector
from .tensor import _a_index, _decoder, _metadata_source, check_nibbles

_UNITS = {0: 1, 1: 8, 2: 4, 3: 2}  # swizzle field -> 16-byte units per swizzled row


def warpgroups(b: Binder, mask: Array) -> Array:
    """Numbers of the active warpgroups; one with only some threads active is a fault."""
    wave = b.wave
    per_cta = mask.reshape(wave.ctas, -1)
    if wave.padded % 128:
        raise wave.fault("divergent-aligned", "the block is not made of whole warpgroups", b.instr, int(mask.argmax()))
    rows = per_cta.reshape(-1, 128)
    some = rows.any(axis=1)
    partial = some & ~rows.all(axis=1)
    if partial.any():
        group = int(partial.argmax())
        missing = (~rows[group]).nonzero()[0].tolist()
        detail = f"threads {missing[:8]}... of the warpgroup do not execute it"
        raise wave.fault("divergent-aligned", detail, b.instr, group * 128 + int(rows[group].argmax()))
    return some.nonzero()[0]


@lru_cache(None)
def _units(major_k: bool, swizzle: int, leading: int, stride: int, extent: int, k: int) -> Array:
    """Byte offsets before swizzling of the 16-byte units: [extent, k / 8] for K-major, [extent / 8, k] for MN-major."""
    w = _UNITS[swizzle]
    if major_k:
        i, unit = np.mgrid[:extent, : k // 8]
        return i % 8 * 16 * w + i // 8 * stride + (unit * leading if w == 1 else unit * 16)
    u, row = np.mgrid[: extent // 8, :k]
    if w == 1:
        return u * stride + row % 8 * 16 + row // 8 * leading
    return u % w * 16 + u // w * leading + row % 8 * 16 * w + row // 8 * stride


class _Operand:
    """A matrix in shared memory named by a descriptor register: [extent, k] for both A (extent M) and B (extent N)."""

    def __init__(self, b: Binder, operand: Any, extent: int, k: int, transposed: bool) -> None:
        self.b, self.register, self.extent, self.k, self.major_k = (
            b,
            b.src(operand, np.uint64),
            extent,
            k,
            not transposed,
        )

    def load(self, group: int, cta: int) -> Array:
        """16-bit patterns [extent, k]."""
        wave = self.b.wave
        values = np.broadcast_to(self.register, (wave.size,))[group * 128 : group * 128 + 128]
        if (values != values[0]).any():
            raise wave.fault("divergent-aligned", "descriptors differ within the warpgroup", self.b.instr, group * 128)
        descriptor = int(values[0])
        start, swizzle = (descriptor & 0x3FFF) << 4, descriptor >> 62
        leading, stride = (descriptor >> 16 & 0x3FFF) << 4, (descriptor >> 32 & 0x3FFF) << 4
        w = _UNITS[swizzle]
        if descriptor >> 49 & 7 or (self.major_k and w > 1 and self.k > 8 * w):
            raise wave.fault("unknown-opcode", f"matrix descriptor {descriptor:#x}", self.b.instr, group * 128)
        units = _units(self.major_k, swizzle, leading, stride, self.extent, self.k)
        address = (start + units).reshape(-1)
        address = address ^ ((address >> 7 & (w - 1)) << 4)
        warps = np.arange(group * 4, group * 4 + 4)
        agent = TENSOR + group % (wave.padded // 128)
        try:
            offset = wave.shared.offsets(address, np.full(address.size, group * 128), 16)
            raw = wave.shared.agent_read(offset, 16, cta, agent, warps)
        except Bad as bad:
            raise wave.fault(bad.kind, bad.detail, self.b.instr, group * 128) from None
        wave.counters.shared_load += 16 * address.size
        halves = raw.view(np.uint16).reshape(*units.shape, 8)
        if self.major_k:
            return halves.reshape(self.extent, self.k)
        return halves.swapaxes(1, 2).reshape(self.extent, self.k)


@op("wgmma")
def wgmma(b: Binder) -> Make:
    wave = b.wave
    if b.has("fence"):

        def fence(mask: Array) -> None:
            wave.in_flight.fences[warpgroups(b, mask)] += 1

        return b.masks(fence)
    if b.has("commit_group"):

        def commit(mask: Array) -> None:
            for group in warpgroups(b, mask):
                cta, agent = divmod(int(group), wave.padded // 128)
                wave.shared.agent_clock[cta, TENSOR + agent] += 1

        return b.masks(commit)
    if b.has("wait_group"):
        pending = b.args[0]
        assert isinstance(pending, Imm)

        def wait(mask: Array) -> None:
            for group in warpgroups(b, mask):
                cta, agent = divmod(int(group), wave.padded // 128)
                column = wave.shared.agent_column(cta, TENSOR + agent)
                done = wave.shared.agent_clock[cta, TENSOR + agent] - 1 - pending.value
                wave.in_flight.done[group] = max(wave.in_flight.done[group], done)
                warps = slice(group * 4, group * 4 + 4)
                wave.shared.known[warps, column] = np.maximum(wave.shared.known[warps, column], done)

        return b.masks(wait)
    return _mma_async(b)


def _mma_async(b: Binder) -> Make:
    wave = b.wave
    sparse = b.has("sp")
    shape = next(m for m in b.mods if m.startswith("m64n"))
    n, k = (int(x) for x in shape[4:].split("k"))
    out, kind_a, kind_b = b.mods[-3:]
    if kind_a not in ("f16", "bf16") or kind_b != kind_a or out not in ("f32", "f16") or k != (32 if sparse else 16):
        raise b.unknown("shape or type")
    args = list(b.args)
    accumulators = vector(args.pop(0))
    registers = [b.dst(r, np.uint32) for r in accumulators]
    names = [r.name for r in accumulators if isinstance(r, Reg)]
    a_arg, b_arg = args.pop(0), args.pop(0)
    from_registers = isinstance(a_arg, Vec)
    metadata = selector = None
    if sparse:
        metadata, select = np.broadcast_to(b.src(args.pop(0), np.uint32), (wave.size,)), args.pop(0)
        assert isinstance(select, Imm)
        selector = select.value
    scale_d = b.src(args.pop(0), bool)
    immediates = [a.value for a in args if isinstance(a, Imm)]
    sign = immediates[0] * immediates[1]
    transposes = immediates[2:]
    stored_k = k // 2 if sparse else k
    transpose_a = False if from_registers else bool(transposes.pop(0)) if transposes else False
    transpose_b = bool(transposes.pop(0)) if transposes else False
    matrix_a = None if from_registers else _Operand(b, a_arg, 64, stored_k, transpose_a)
    matrix_b = _Operand(b, b_arg, n, k, transpose_b)
    fragments = vector(a_arg) if from_registers else ()
    a_registers = [b.src(r, np.uint32) for r in fragments]
    fragment_names = [r.name for r in fragments if isinstance(r, Reg)]
    decode = _decoder(kind_a)
    positions = (
        _Positions(b, metadata, k, selector) if sparse and metadata is not None and selector is not None else None
    )

    def multiply(group: int) -> Array:
        cta = group // (wave.padded // 128)
        if matrix_a is not None:
            left = decode(np.ascontiguousarray(matrix_a.load(group, cta)).view(np.uint32)).reshape(64, stored_k)
        else:
            packed = np.stack([r[group * 128 : group * 128 + 128] for r in a_registers], axis=1).reshape(4, 32, -1)
            left = decode(packed).reshape(4, -1)[:, _a_index(stored_k, 2)].reshape(64, stored_k)
        right = decode(np.ascontiguousarray(matrix_b.load(group, cta)).view(np.uint32)).reshape(n, k)
        if positions is not None:
            dense = np.zeros((64, k))
            np.put_along_axis(dense, positions.of(group), left, axis=1)
            left = dense
        return sign * (left @ right.T)

    def run(mask: Array) -> None:
        for group in warpgroups(b, mask):
            here = slice(group * 128, group * 128 + 128)
            # The instruction starts when all four warps are there: what they read before (metadata) is read.
            wave.shared.barrier(np.arange(group * 4, group * 4 + 4))
            if sparse:
                wave.counters.mma_sparse += 1
            else:
                wave.counters.mma += 1
            # [warp, g, t, 8-column block, half of 16 rows, column]: see the fragment layout of C in `tensor`.
            product = (
                multiply(int(group)).reshape(4, 2, 8, n // 8, 4, 2).transpose(0, 2, 4, 3, 1, 5).reshape(128, n // 2)
            )
            keep = np.broadcast_to(scale_d, (wave.size,))[here]
            old = np.stack([r[here] for r in registers], axis=1)
            base = old.view(np.float32 if out == "f32" else np.float16).astype(np.float64)
            total = np.where(keep[:, None], base, 0.0) + product
            if out == "f32":
                result = total.astype(np.float32).view(np.uint32)
            else:
                result = f32_to_f16(odd_f64_to_f32(total)).view(np.uint32)
            for i, register in enumerate(registers):
                register[here] = result[:, i]
            cta, warpgroup = divmod(int(group), wave.padded // 128)
            ticket = int(wave.shared.agent_clock[cta, TENSOR + warpgroup])
            wave.in_flight.issue(b.instr, names, fragment_names, int(group), ticket)

    return b.masks(run)


class _Positions:
    """k positions of the packed elements of a warpgroup's sparse A, from its metadata registers."""

    def __init__(self, b: Binder, metadata: Array, k: int, selector: int) -> None:
        self.b, self.metadata = b, metadata
        self.lane, self.bit = _metadata_source("f16", k, selector)
        self.k = k

    def of(self, group: int) -> Array:
        registers = self.metadata[group * 128 : group * 128 + 128].reshape(4, 32)
        words = registers[:, self.lane] >> self.bit.astype(np.uint32) & np.uint32(0xFFFF)
        first, second = check_nibbles(self.b, words, self.lane, np.arange(group * 4, group * 4 + 4))
        groups = np.arange(first.shape[2])
        return (4 * groups[:, None] + np.stack([first, second], axis=3)).reshape(64, self.k // 2)
