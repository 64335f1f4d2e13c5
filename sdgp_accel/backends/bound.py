"""The backward of one layer shape through the kernels as a single call, for the host's sake: everything that depends on
the shape alone is worked out at the first call, and what is left is allocations, addresses and launches.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

import cutlass_ops
from sdgp_accel.backends import Call, Decision, Gradients, Needs, gpu
from sdgp_accel.backends.products import ALIGNMENT, plan_product
from sdgp_accel.backends.sweep import UNIT, padded, plan_sweeps
from sdgp_accel.geometry import LinearGeometry
from sdgp_accel.philox import data_parallel_rank, next_seed


class _Bound(NamedTuple):
    """One layer's backward for one choice of gradients: all its launches in one call, and what it allocates.

    block: the elements of operands and workspaces. dx, dw: shape and strides; db: shape.
    """

    launch: Any
    block: tuple[int]
    dx: tuple[tuple[int, ...], tuple[int, ...]]
    dw: tuple[tuple[int, ...], tuple[int, ...]]
    db: tuple[int] | None


class SparseBackward:
    """The `BoundBackward` of one layer shape: what `CutlassBackend` does step by step, on tensors that need no copy.

    The launches are made at the first call.
    """

    def __init__(self, decision: Decision, call: Call) -> None:
        self._shape = (decision.geometry, decision.plan, decision.tilings, call.dtype)
        self._out_dtype = torch.float32 if call.weight_dtype == torch.float32 else call.dtype
        self._casts = self._out_dtype != call.dtype
        self._input_shape, self._device, self._draws = call.input_shape, call.device, decision.draws
        is_matrix = isinstance(decision.geometry, LinearGeometry)
        self._memory_format = torch.contiguous_format if is_matrix else torch.channels_last
        self._bound: dict[tuple[bool, bool, bool], _Bound] = {}

    def __call__(self, dy: Tensor, x: Tensor | None, weight: Tensor | None, bias: bool) -> Gradients | None:
        """See `BoundBackward`."""
        device, memory_format = self._device, self._memory_format
        if not dy.is_contiguous(memory_format=memory_format) or gpu.current_device() != device.index:
            return None
        x_at = weight_at = dx_at = dw_at = db_at = seed_at = key = offset = rank = 0
        if x is not None:
            x_at = x.data_ptr()
            if x_at % ALIGNMENT or not x.is_contiguous(memory_format=memory_format):
                return None
        if weight is not None:
            weight_at = weight.data_ptr()
            if weight_at % ALIGNMENT or not weight.is_contiguous(memory_format=memory_format):
                return None
        needs = (weight is not None, x is not None, bias)
        launch, size, dx_like, dw_like, db_shape = self._bound.get(needs) or self._prepare(needs)
        dx = dw = db = None
        if self._draws:
            seed, rank = next_seed(device), data_parallel_rank()
            if isinstance(seed, tuple):
                key, offset = seed
            else:
                seed_at = seed.data_ptr()
        block = dy.new_empty_strided(size, UNIT)
        # What lies like a tensor that is here is allocated like it, and a dtype named only where it is another: 0.2 to
        # 0.5 us each.
        if weight is not None:
            dx = dy.new_empty_strided(*dx_like) if x is None else torch.empty_like(x)
            dx_at = dx.data_ptr()
        if x is not None:
            if weight is None or self._casts:
                dw = dy.new_empty_strided(*dw_like, dtype=self._out_dtype)
            else:
                dw = torch.empty_like(weight)
            dw_at = dw.data_ptr()
        if db_shape is not None:
            if self._casts:
                db = dy.new_empty_strided(db_shape, UNIT, dtype=self._out_dtype)
            else:
                db = dy.new_empty_strided(db_shape, UNIT)
            db_at = db.data_ptr()
        launch(
            dy.data_ptr(), block.data_ptr(), db_at, seed_at, key, offset, rank, weight_at, dx_at, x_at, dw_at,
            gpu.stream_of(device),
        )  # fmt: skip
        return dx, dw, db

    def _prepare(self, needs: tuple[bool, bool, bool]) -> _Bound:
        geometry, plan, tilings, dtype = self._shape
        kernels, device = cutlass_ops.kernels(), self._device
        dgrad = plan_product(kernels, geometry, "dgrad", dtype, device, tilings.dgrad, dtype)
        wgrad = plan_product(kernels, geometry, "wgrad", dtype, device, tilings.wgrad, self._out_dtype)
        assert dgrad is not None
        assert wgrad is not None
        if isinstance(geometry, LinearGeometry):  # an input of any rank
            dgrad = dgrad._replace(shape=self._input_shape, strides=_contiguous_strides(self._input_shape))
        needs_dx, needs_dw, _ = needs
        # Apart from all else, since wgrad begins while dgrad runs.
        dgrad_spare = padded(dgrad.workspace, ALIGNMENT) if needs_dx else 0
        spare = dgrad_spare + (wgrad.workspace if needs_dw else 0)
        sweeps = plan_sweeps(
            kernels, geometry, plan, Needs(*needs), geometry.out_channels, dtype, self._out_dtype, spare
        )
        parts = (
            (dgrad.kernel, (0, dgrad.metadata_at), sweeps.spare_at) if needs_dx else None,
            (wgrad.kernel, (sweeps.wgrad_at, sweeps.wgrad_at + wgrad.metadata_at), sweeps.spare_at + dgrad_spare)
            if needs_dw
            else None,
        )
        launch = kernels.Backward(sweeps.passes, *parts)
        bound = _Bound(launch, sweeps.size, (dgrad.shape, dgrad.strides), (wgrad.shape, wgrad.strides), sweeps.bias)
        self._bound[needs] = bound
        return bound


def _contiguous_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(math.prod(shape[d + 1 :]) for d in range(len(shape)))
