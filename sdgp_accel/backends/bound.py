"""The backward of one layer shape through the kernels as a single call, for the host's sake: everything that depends on
the shape alone is worked out at the first call, and what is left is allocations, addresses and launches.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

import cutlass_ops
from sdgp_accel.backends import Decision, Gradients, Needs, gpu
from sdgp_accel.backends.products import Launch, plan_product
from sdgp_accel.backends.sweep import Sweep, plan_sweeps, run_sweeps
from sdgp_accel.geometry import LinearGeometry
from sdgp_accel.philox import data_parallel_rank, next_seed


class SparseBackward:
    """The `BoundBackward` of one layer shape: what `CutlassBackend` does step by step, on tensors that need no copy.

    The launches are made at the first call.
    """

    def __init__(
        self, decision: Decision, input_shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
    ) -> None:
        self._shape = (decision.geometry, decision.plan, decision.tilings, dtype)
        self._input_shape, self._device, self._draws = input_shape, device, decision.draws
        is_matrix = isinstance(decision.geometry, LinearGeometry)
        self._memory_format = torch.contiguous_format if is_matrix else torch.channels_last
        self._launches: tuple[Launch, Launch] | None = None
        self._sweeps: dict[tuple[bool, bool, bool], tuple[Sweep, ...]] = {}

    def __call__(self, dy: Tensor, x: Tensor | None, weight: Tensor | None, bias: bool) -> Gradients | None:
        """See `BoundBackward`."""
        device, memory_format = self._device, self._memory_format
        if not dy.is_contiguous(memory_format=memory_format) or gpu.current_device() != device.index:
            return None
        for b in (x, weight):
            if b is not None and (b.data_ptr() % 16 or not b.is_contiguous(memory_format=memory_format)):
                return None
        needs = (weight is not None, x is not None, bias)
        sweeps = self._sweeps.get(needs)
        if sweeps is None or self._launches is None:
            sweeps = self._prepare(needs)
        assert self._launches is not None
        stream = gpu.stream_of(device)
        seed, rank = (next_seed(device), data_parallel_rank()) if self._draws else (None, 0)
        for_dgrad, for_wgrad, db = run_sweeps(sweeps, dy, seed, rank, stream)
        dx = dw = None
        if weight is not None:
            assert for_dgrad is not None
            launch = self._launches[0]
            dx = dy.new_empty_strided(launch.shape, launch.strides)
            launch.run(for_dgrad, weight, dx, stream)
            del for_dgrad  # its memory is free for wgrad's
        if x is not None:
            assert for_wgrad is not None
            launch = self._launches[1]
            dw = dy.new_empty_strided(launch.shape, launch.strides)
            launch.run(for_wgrad, x, dw, stream)
        return dx, dw, db

    def _prepare(self, needs: tuple[bool, bool, bool]) -> tuple[Sweep, ...]:
        geometry, plan, tilings, dtype = self._shape
        kernels, device = cutlass_ops.kernels(), self._device
        if self._launches is None:
            dgrad = plan_product(kernels, geometry, "dgrad", dtype, device, tilings.dgrad, dtype)
            wgrad = plan_product(kernels, geometry, "wgrad", dtype, device, tilings.wgrad, dtype)
            assert dgrad is not None
            assert wgrad is not None
            if isinstance(geometry, LinearGeometry):  # an input of any rank
                dgrad = dgrad._replace(shape=self._input_shape, strides=_contiguous_strides(self._input_shape))
            self._launches = dgrad, wgrad
        sweeps = plan_sweeps(kernels, geometry, plan, Needs(*needs), geometry.out_channels, dtype)
        self._sweeps[needs] = sweeps
        return sweeps


def _contiguous_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(math.prod(shape[d + 1 :]) for d in range(len(shape)))
