"""Launches of the prune+compress kernels. What is the same for every gradient of one shape is worked out once, so that
a backward is left with allocations, sums of addresses and the launch itself.

An operand is one block of 16-bit elements, and the sweep's workspace lies behind the first one: each allocation
costs the host about as much as a launch.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sdgp_accel.backends import CACHED_DECISIONS, Needs
from sdgp_accel.backends.tiles import TILE_K
from sdgp_accel.config import PruneSpec
from sdgp_accel.geometry import Geometry
from sdgp_accel.layer_plan import LayerPlan
from sdgp_accel.philox import Seed
from sdgp_accel.semi_structured import SparseOperand

DTYPE_NAMES = {torch.float16: "f16", torch.bfloat16: "bf16"}
CHUNK = 8  # 16-bit values in 16 bytes: the rows of wgrad's operand are padded to whole ones
_ALIGNMENT = 16  # bytes, of what the kernels access in vectors
_UNIT = (1,)


class Storage(NamedTuple):
    """Where in its block an operand lies: values first, the metadata `metadata_at` bytes behind their beginning.

    axis, shape: of the `SparseOperand`. stored: rows and columns of the values; the metadata has an eighth of them
    along `axis`. pitch: channels in a stored row of wgrad's, C padded to whole chunks.
    """

    axis: int
    shape: tuple[int, int]
    stored: tuple[int, int]
    metadata_at: int

    @classmethod
    def of(cls, axis: int, t: int, c: int) -> Storage:
        """Of a gradient [T, C]: dgrad's (axis 1) or wgrad's (axis 0)."""
        k = _padded(c if axis == 1 else t, TILE_K)
        stored = (t, k // 2) if axis == 1 else (k // 2, _padded(c, CHUNK))
        return cls(axis, (t, c), stored, 2 * math.prod(stored))

    @property
    def k(self) -> int:
        """Length of the reduction axis, padding included."""
        return 2 * self.stored[self.axis]

    @property
    def nbytes(self) -> int:
        """Bytes of values and metadata."""
        return self.metadata_at + self.metadata_at // 8


class StoredOperand(NamedTuple):
    """A 2:4 operand in one block: what the kernels write and read."""

    block: Tensor
    storage: Storage

    @classmethod
    def pack(cls, operand: SparseOperand) -> StoredOperand:
        """A copy of `operand`, row-major."""
        storage = Storage.of(operand.axis, *operand.shape)
        packed = cls(operand.values.new_zeros(-(-storage.nbytes // 2)), storage)
        for target, source in zip(packed._matrices(), (operand.values, operand.metadata), strict=True):
            target[: source.shape[0], : source.shape[1]] = source
        return packed

    def unpack(self) -> SparseOperand:
        """The same memory as values and metadata."""
        values, metadata = self._matrices()
        if self.storage.axis == 0:  # without the channels that fill up the last chunk
            channels = self.storage.shape[1]
            values, metadata = values[:, :channels], metadata[:, :channels]
        return SparseOperand(values, metadata, self.storage.axis, self.storage.shape)

    def decompress(self) -> Tensor:
        """The dense matrix [T, C]."""
        return self.unpack().decompress()

    def _matrices(self) -> tuple[Tensor, Tensor]:
        (rows, columns), size = self.storage.stored, math.prod(self.storage.stored)
        words = (rows, columns // 8) if self.storage.axis == 1 else (rows // 8, columns)
        values, metadata = self.block[:size], self.block[size : size + size // 8]
        return values.view(rows, columns), metadata.view(torch.int16).view(words)


# The blocks of both operands, and the bias gradient; None for what was not asked for.
Blocks = tuple[Tensor | None, Tensor | None, Tensor | None]


class Sweep(NamedTuple):
    """One pass over gradients [T, C] of one shape.

    sizes: elements of the blocks, as shapes; the workspace of all that follows lies `workspace_at` bytes behind the
    beginning of the first block there is, and in it the others at so many bytes. bias: shape of the bias gradient.
    """

    launch: Any
    scope_scales: Any
    draws: bool
    dgrad: Storage | None
    wgrad: Storage | None
    sizes: tuple[tuple[int], tuple[int]]
    workspace_at: int
    dgrad_scale_at: int
    wgrad_scale_at: int
    bias: tuple[int] | None

    def run(self, dy: Tensor, seed: Seed | None, rank: int, stream: int) -> Blocks:
        """dy: in the memory that the sweep was made for. seed: where the function draws."""
        address = dy.data_ptr()
        dgrad = wgrad = db = None
        first = values = metadata = wgrad_values = wgrad_metadata = 0
        if self.dgrad is not None:
            dgrad = dy.new_empty_strided(self.sizes[0], _UNIT)
            first = values = dgrad.data_ptr()
            metadata = values + self.dgrad.metadata_at
        if self.wgrad is not None:
            wgrad = dy.new_empty_strided(self.sizes[1], _UNIT)
            wgrad_values = wgrad.data_ptr()
            wgrad_metadata = wgrad_values + self.wgrad.metadata_at
            first = first or wgrad_values
        workspace = first + self.workspace_at
        bias = partials = seed_at = key = offset = dgrad_scale = wgrad_scale = 0
        if self.bias is not None:
            db = dy.new_empty_strided(self.bias, _UNIT)
            bias, partials = db.data_ptr(), workspace
        if self.scope_scales is not None:
            dgrad_scale, wgrad_scale = workspace + self.dgrad_scale_at, workspace + self.wgrad_scale_at
            # Its sums lie where the partial sums of the bias gradient will: this launch ends before the next begins.
            self.scope_scales(address, workspace, dgrad_scale, wgrad_scale, stream)
        if self.draws:
            assert seed is not None
            if isinstance(seed, Tensor):
                seed_at = seed.data_ptr()
            else:
                key, offset = seed
        self.launch(
            address, values, metadata, wgrad_values, wgrad_metadata, bias, partials, seed_at, key, offset, rank,
            dgrad_scale, wgrad_scale, stream,
        )  # fmt: skip
        return dgrad, wgrad, db


@functools.lru_cache(maxsize=CACHED_DECISIONS)
def plan_sweeps(
    kernels: Any, geometry: Geometry, plan: LayerPlan, needs: Needs, row_stride: int, dtype: torch.dtype
) -> tuple[Sweep, ...]:
    """The passes over dY [T, C] that `needs` asks for: one, or two for operands of different rules."""
    for_dgrad = plan.grad_input if needs.dgrad else None
    for_wgrad = plan.grad_weight if needs.wgrad else None
    shape = (geometry.positions, geometry.out_channels, row_stride, geometry.positions_per_sample, dtype)
    if for_dgrad is not None and for_wgrad is not None and for_dgrad != for_wgrad:
        return (
            _sweep(kernels, for_dgrad, Needs(True, False, needs.bias), *shape),
            _sweep(kernels, for_wgrad, Needs(False, True, False), *shape),
        )
    spec = for_dgrad or for_wgrad
    assert spec is not None
    return (_sweep(kernels, spec, Needs(for_dgrad is not None, for_wgrad is not None, needs.bias), *shape),)


def run_sweeps(sweeps: tuple[Sweep, ...], dy: Tensor, seed: Seed | None, rank: int, stream: int) -> Blocks:
    """What all passes of `plan_sweeps` yield. stream: of the current device."""
    if len(sweeps) == 1:
        return sweeps[0].run(dy, seed, rank, stream)
    dgrad, _, db = sweeps[0].run(dy, seed, rank, stream)
    return dgrad, sweeps[1].run(dy, seed, rank, stream)[1], db


def _sweep(
    kernels: Any,
    spec: PruneSpec,
    needs: Needs,
    t: int,
    c: int,
    row_stride: int,
    positions_per_sample: int,
    dtype: torch.dtype,
) -> Sweep:
    dgrad = Storage.of(1, t, c) if needs.dgrad else None
    wgrad = Storage.of(0, t, c) if needs.wgrad else None
    rule = {"n": spec.n, "m": spec.m, "eps": spec.eps, "dtype": DTYPE_NAMES[dtype]}
    gradient = {"t": t, "c": c, "row_stride": row_stride}
    scope_scales, samples, sums, scopes = None, None, 0, 0
    if spec.function == "rescale_magnitude" and spec.scope != "group":
        samples = positions_per_sample if spec.scope == "sample_channel" else 0  # 0: the whole tensor is one scope
        scope_scales = kernels.ScopeScales(**rule, **gradient, positions_per_sample=samples)
        sums, scopes = 8 * kernels.scope_workspace(t, c, samples), t // samples * c if samples else 1
    launch = kernels.PruneCompress(
        function=spec.function, **rule, **gradient, positions_per_sample=samples,
        dgrad_k=dgrad.k if dgrad else 0, wgrad_k=wgrad.k if wgrad else 0, wgrad_pitch=wgrad.stored[1] if wgrad else 0,
    )  # fmt: skip
    partials = 4 * c * kernels.bias_partial_rows(t, c) if needs.bias else 0
    dgrad_scale_at = _padded(max(sums, partials), _ALIGNMENT)
    wgrad_scale_at = dgrad_scale_at + _padded(4 * scopes, _ALIGNMENT)
    workspace = wgrad_scale_at + 4 * scopes
    first, *others = [_padded(storage.nbytes, _ALIGNMENT) for storage in (dgrad, wgrad) if storage is not None]
    lengths = [first + workspace, *others]
    sizes = (lengths[0] // 2, lengths[-1] // 2)
    return Sweep(
        launch, scope_scales, spec.is_random, dgrad, wgrad, ((sizes[0],), (sizes[1],)), first, dgrad_scale_at,
        wgrad_scale_at, (c,) if needs.bias else None,
    )  # fmt: skip


def _padded(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple
