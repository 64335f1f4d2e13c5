"""Launches of the prune+compress kernels. What is the same for every gradient of one shape is worked out once, so that
a backward is left with allocations, sums of addresses and the launch itself.

The operands of a backward, and the workspace of its launches, lie in one block of 16-bit elements: an allocation costs
the host more than a launch.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sdgp_accel.backends import CACHED_DECISIONS, Needs
from sdgp_accel.backends.tiles import STAGE_K, TILE_K
from sdgp_accel.config import PruneSpec
from sdgp_accel.geometry import Geometry
from sdgp_accel.layer_plan import LayerPlan
from sdgp_accel.philox import Seed
from sdgp_accel.semi_structured import SparseOperand

DTYPE_NAMES = {torch.float16: "f16", torch.bfloat16: "bf16"}
CHUNK = 8  # 16-bit values or words in 16 bytes: rows are padded to whole ones, as TMA wants them
_ALIGNMENT = 128  # bytes, of what is read or written on its own: lines of the L2 cache; vectors need 16
UNIT = (1,)


class Storage(NamedTuple):
    """How an operand is stored: values first, the metadata `metadata_at` bytes behind their beginning.

    axis, shape: of the `SparseOperand`. stored: rows and columns of the values. words: of the metadata, an eighth of
    them along `axis`, and padded to whole chunks where that is along the rows.
    """

    axis: int
    shape: tuple[int, int]
    stored: tuple[int, int]
    words: tuple[int, int]
    metadata_at: int

    @classmethod
    def of(cls, axis: int, t: int, c: int) -> Storage:
        """Of a gradient [T, C]: dgrad's (axis 1) or wgrad's (axis 0)."""
        if axis == 1:  # to no more than a stage: narrow layers are short of bandwidth
            k = padded(c, STAGE_K)
            stored, words = (t, k // 2), (t, padded(k // 16, CHUNK))
        else:
            k, pitch = padded(t, TILE_K), padded(c, CHUNK)
            stored, words = (k // 2, pitch), (k // 16, pitch)
        return cls(axis, (t, c), stored, words, 2 * math.prod(stored))

    @property
    def k(self) -> int:
        """Length of the reduction axis, padding included."""
        return 2 * self.stored[self.axis]

    @property
    def nbytes(self) -> int:
        """Bytes of values and metadata."""
        return self.metadata_at + 2 * math.prod(self.words)

    @property
    def padded_nbytes(self) -> int:
        """As far as what follows begins."""
        return padded(self.nbytes, _ALIGNMENT)


class StoredOperand(NamedTuple):
    """A 2:4 operand as the kernels write and read it: in a block of 16-bit elements, from byte `at` on."""

    block: Tensor
    storage: Storage
    at: int

    @property
    def address(self) -> int:
        """Of the values."""
        return self.block.data_ptr() + self.at

    def matrices(self) -> tuple[Tensor, Tensor]:
        """The memory of values and metadata, with all that pads them."""
        begin, end = self.at // 2, (self.at + self.storage.nbytes) // 2
        between = begin + self.storage.metadata_at // 2
        values, metadata = self.block[begin:between], self.block[between:end]
        return values.view(self.storage.stored), metadata.view(torch.int16).view(self.storage.words)

    def unpack(self) -> SparseOperand:
        """The same memory as values and metadata."""
        values, metadata = self.matrices()
        if self.storage.axis == 0:  # without the channels that fill up the last chunk
            channels = self.storage.shape[1]
            values, metadata = values[:, :channels], metadata[:, :channels]
        else:
            metadata = metadata[:, : self.storage.k // 16]
        return SparseOperand(values, metadata, self.storage.axis, self.storage.shape)

    def decompress(self) -> Tensor:
        """The dense matrix [T, C]."""
        return self.unpack().decompress()


class Sweep(NamedTuple):
    """One pass over gradients [T, C] of one shape, as the extension's `Backward` takes it.

    dgrad, wgrad: where in the block the values and the metadata of the operand begin; None for what is not asked for.
    workspace, dgrad_scale, wgrad_scale: where these begin.
    """

    launch: Any
    scope_scales: Any
    dgrad: tuple[int, int] | None
    wgrad: tuple[int, int] | None
    workspace: int
    dgrad_scale: int
    wgrad_scale: int


class Sweeps(NamedTuple):
    """All passes over gradients of one shape, and the block that they fill.

    launch: all of them in one call. size: elements of the block, as a shape. wgrad_at: where wgrad's operand begins;
    dgrad's begins with the block. spare_at: where the bytes begin that the products asked for. bias: shape of the
    bias gradient, if asked for. bias_dtype: its dtype.
    """

    launch: Any
    passes: tuple[Sweep, ...]
    size: tuple[int]
    wgrad_at: int
    spare_at: int
    bias: tuple[int] | None
    bias_dtype: torch.dtype

    def run(self, dy: Tensor, seed: Seed | None, rank: int, stream: int) -> tuple[Tensor, Tensor | None]:
        """The block, filled, and the bias gradient.

        dy: in the memory that the passes were made for. seed: where a function draws. stream: of the current device.
        """
        block, db, bias = dy.new_empty_strided(self.size, UNIT), None, 0
        if self.bias is not None:
            db = dy.new_empty_strided(self.bias, UNIT, dtype=self.bias_dtype)
            bias = db.data_ptr()
        seed_at, key, offset = 0, 0, 0  # the seed's address, or its two numbers
        if seed is not None:
            if isinstance(seed, tuple):
                key, offset = seed
            else:
                seed_at = seed.data_ptr()
        self.launch(dy.data_ptr(), block.data_ptr(), bias, seed_at, key, offset, rank, 0, 0, 0, 0, stream)
        return block, db


@functools.lru_cache(maxsize=CACHED_DECISIONS)
def plan_sweeps(
    kernels: Any,
    geometry: Geometry,
    plan: LayerPlan,
    needs: Needs,
    row_stride: int,
    dtype: torch.dtype,
    bias_dtype: torch.dtype,
    spare: int = 0,
) -> Sweeps:
    """The passes over dY [T, C] that `needs` asks for: one, or two for operands of different rules.

    bias_dtype: `dtype` or float32.
    spare: bytes that the block has for the products, behind the operands.
    """
    t, c, positions_per_sample = geometry.positions, geometry.out_channels, geometry.positions_per_sample
    for_dgrad = plan.grad_input if needs.dgrad else None
    for_wgrad = plan.grad_weight if needs.wgrad else None
    specs = [spec for spec in dict.fromkeys((for_dgrad, for_wgrad)) if spec is not None]
    dgrad = Storage.of(1, t, c) if for_dgrad is not None else None
    wgrad = Storage.of(0, t, c) if for_wgrad is not None else None
    workspace = dgrad.padded_nbytes if dgrad is not None else 0
    scopes = [_Scope.of(kernels, spec, t, c, positions_per_sample, needs.bias) for spec in specs]
    wgrad_at = padded(workspace + max(scope.nbytes for scope in scopes), _ALIGNMENT)
    spare_at = wgrad_at + (wgrad.padded_nbytes if wgrad is not None else 0)
    gradient = {"t": t, "c": c, "row_stride": row_stride, "dtype": DTYPE_NAMES[dtype]}
    bias_is_float = bias_dtype == torch.float32
    passes = [
        _sweep(
            kernels, spec, gradient, bias_is_float, scope, workspace, dgrad if spec == for_dgrad else None,
            wgrad if spec == for_wgrad else None, wgrad_at,
        )
        for spec, scope in zip(specs, scopes, strict=True)
    ]  # fmt: skip
    size = (-(-(spare_at + spare) // 2),)
    launch, bias = kernels.Backward(passes, None, None), (c,) if needs.bias else None
    return Sweeps(launch, tuple(passes), size, wgrad_at, spare_at, bias, bias_dtype)


class _Scope(NamedTuple):
    """Over what one rule scales, and the workspace of its pass: bytes from the workspace's beginning.

    positions_per_sample: of a scope wider than a group, 0 for the whole tensor; None for the group.
    """

    positions_per_sample: int | None
    dgrad_scale: int
    wgrad_scale: int
    nbytes: int

    @classmethod
    def of(cls, kernels: Any, spec: PruneSpec, t: int, c: int, positions_per_sample: int, bias: bool) -> _Scope:
        samples, sums, scopes = None, 0, 0
        if spec.function == "rescale_magnitude" and spec.scope != "group":
            samples = positions_per_sample if spec.scope == "sample_channel" else 0
            sums, scopes = 8 * kernels.scope_workspace(t, c, samples), t // samples * c if samples else 1
        partials = 4 * c * kernels.bias_partial_rows(t, c) if bias else 0
        dgrad_scale = padded(max(sums, partials), _ALIGNMENT)
        wgrad_scale = dgrad_scale + padded(4 * scopes, _ALIGNMENT)
        return cls(samples, dgrad_scale, wgrad_scale, wgrad_scale + 4 * scopes)


def _sweep(
    kernels: Any,
    spec: PruneSpec,
    gradient: dict[str, Any],
    bias_is_float: bool,
    scope: _Scope,
    workspace: int,
    dgrad: Storage | None,
    wgrad: Storage | None,
    wgrad_at: int,
) -> Sweep:
    rule = {"n": spec.n, "m": spec.m, "eps": spec.eps, "positions_per_sample": scope.positions_per_sample, **gradient}
    launch = kernels.PruneCompress(
        function=spec.function, **rule, bias_is_float=bias_is_float,
        dgrad_k=dgrad.k if dgrad else 0, dgrad_words=dgrad.words[1] if dgrad else 0,
        wgrad_k=wgrad.k if wgrad else 0, wgrad_pitch=wgrad.stored[1] if wgrad else 0,
    )  # fmt: skip
    return Sweep(
        launch,
        None if scope.positions_per_sample is None else kernels.ScopeScales(**rule),
        None if dgrad is None else (0, dgrad.metadata_at),
        None if wgrad is None else (wgrad_at, wgrad_at + wgrad.metadata_at),
        workspace,
        workspace + scope.dgrad_scale,
        workspace + scope.wgrad_scale,
    )


def padded(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple
