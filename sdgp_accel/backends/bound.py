"""The backward of one layer shape through the kernels as a single call, for the host's sake: everything that depends on
the shape alone is worked out at the first call, and what is left is allocations, addresses and launches.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

import cutlass_ops
from sdgp_accel.backends import Call, Decision, Gradients, Needs, gpu
from sdgp_accel.backends.products import ALIGNMENT, Launch, plan_product
from sdgp_accel.backends.sweep import Sweeps, plan_sweeps
from sdgp_accel.geometry import LinearGeometry
from sdgp_accel.philox import data_parallel_rank, next_seed


class SparseBackward:
    """The `BoundBackward` of one layer shape: what `CutlassBackend` does step by step, on tensors that need no copy.

    The launches are made at the first call.
    """

    def __init__(self, decision: Decision, call: Call) -> None:
        self._shape = (decision.geometry, decision.plan, decision.tilings, call.dtype)
        self._out_dtype = torch.float32 if call.weight_dtype == torch.float32 else call.dtype
        self._input_shape, self._device, self._draws = call.input_shape, call.device, decision.draws
        is_matrix = isinstance(decision.geometry, LinearGeometry)
        self._memory_format = torch.contiguous_format if is_matrix else torch.channels_last
        self._sweeps: dict[tuple[bool, bool, bool], Sweeps] = {}

    def __call__(self, dy: Tensor, x: Tensor | None, weight: Tensor | None, bias: bool) -> Gradients | None:
        """See `BoundBackward`."""
        device, memory_format = self._device, self._memory_format
        if not dy.is_contiguous(memory_format=memory_format) or gpu.current_device() != device.index:
            return None
        x_at = weight_at = 0
        if x is not None:
            x_at = x.data_ptr()
            if x_at % ALIGNMENT or not x.is_contiguous(memory_format=memory_format):
                return None
        if weight is not None:
            weight_at = weight.data_ptr()
            if weight_at % ALIGNMENT or not weight.is_contiguous(memory_format=memory_format):
                return None
        needs = (weight is not None, x is not None, bias)
        sweeps = self._sweeps.get(needs) or self._prepare(needs)
        stream = gpu.stream_of(device)
        seed, rank = (next_seed(device), data_parallel_rank()) if self._draws else (None, 0)
        block, db = sweeps.run(dy, seed, rank, stream)
        block_at, (dgrad, wgrad) = block.data_ptr(), self._launches
        dx = dw = None
        # What `Launch.run` does, without its frames: they cost a Conv2d's backward some 4 µs of 15 (bench/overhead.py),
        # with the one that a test for an ordinary backward would take in `functional`.
        if weight is not None:
            kernel, metadata_at, _, shape, strides, _ = dgrad
            dx = dy.new_empty_strided(shape, strides)
            kernel(block_at, block_at + metadata_at, weight_at, dx.data_ptr(), block_at + sweeps.spare_at, stream)
        if x is not None:
            kernel, metadata_at, _, shape, strides, _ = wgrad
            dw, values = dy.new_empty_strided(shape, strides, dtype=self._out_dtype), block_at + sweeps.wgrad_at
            kernel(values, values + metadata_at, x_at, dw.data_ptr(), block_at, stream)
        return dx, dw, db

    @functools.cached_property
    def _launches(self) -> tuple[Launch, Launch]:
        geometry, _, tilings, dtype = self._shape
        kernels, device = cutlass_ops.kernels(), self._device
        dgrad = plan_product(kernels, geometry, "dgrad", dtype, device, tilings.dgrad, dtype)
        wgrad = plan_product(kernels, geometry, "wgrad", dtype, device, tilings.wgrad, self._out_dtype)
        assert dgrad is not None
        assert wgrad is not None
        if isinstance(geometry, LinearGeometry):  # an input of any rank
            dgrad = dgrad._replace(shape=self._input_shape, strides=_contiguous_strides(self._input_shape))
        return dgrad, wgrad

    def _prepare(self, needs: tuple[bool, bool, bool]) -> Sweeps:
        geometry, plan, _, dtype = self._shape
        spare = (launch.workspace if needed else 0 for launch, needed in zip(self._launches, needs, strict=False))
        sweeps = plan_sweeps(
            cutlass_ops.kernels(), geometry, plan, Needs(*needs), geometry.out_channels, dtype, self._out_dtype, *spare
        )
        self._sweeps[needs] = sweeps
        return sweeps


def _contiguous_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(math.prod(shape[d + 1 :]) for d in range(len(shape)))
