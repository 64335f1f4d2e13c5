"""The backward on sparse tensor cores: operands from the prune+compress kernel, products from one of two families of
kernels. Hopper's (wgmma.sp, TMA) run on sm_90 what TMA can address; the others (mma.sp) every shape, from sm_80 on.

Sizes that count beyond 32 bits have no sparse products: ``backend="cutlass"`` still prunes and compresses with the
kernel and runs dense products on the decompressed operands, ``"auto"`` does not take such layers.
"""

from __future__ import annotations

import torch
from torch import Tensor

import cutlass_ops
from sdgp_accel.backends import (
    UPDATE_DRIVER,
    Call,
    Decision,
    Needs,
    Operands,
    build_command,
    check_out,
    dense,
    gpu,
    load_command,
)
from sdgp_accel.backends.bound import SparseBackward
from sdgp_accel.backends.products import ALIGNMENT, Launch, plan_product, rank, too_large
from sdgp_accel.backends.sweep import DTYPE_NAMES, Storage, StoredOperand, plan_sweeps
from sdgp_accel.backends.tiles import Product, Tiling
from sdgp_accel.config import Pass, PruneSpec
from sdgp_accel.geometry import Conv2dGeometry, Geometry, LinearGeometry
from sdgp_accel.layer_plan import LayerPlan
from sdgp_accel.philox import Rng

GROUP_SIZES = (4, 8, 16)


def takes_pattern(spec: PruneSpec) -> bool:
    """Whether the kernels prune by this N:M: fewer patterns than those whose result is a 2:4 operand."""
    return spec.n <= 2 and spec.m in GROUP_SIZES


class CutlassBackend:
    """Operands are `StoredOperand`s."""

    name = "cutlass"

    def unavailable(self, device: torch.device) -> str | None:
        """None where the extension is built for `device` and its driver."""
        if not cutlass_ops.ARCHS:
            if error := cutlass_ops.load_error():
                return f"the cutlass kernels do not load: {error}; run: {load_command(error, build_command())}"
            return f"the cutlass kernels are not built; build them with: {build_command()}"
        capability = gpu.device_facts(device).capability
        if not any(gpu.runs_on(arch, capability) for arch in cutlass_ops.ARCHS):
            problem = f"are built for {', '.join(cutlass_ops.ARCHS)} only; rebuild with"
        elif refusal := gpu.launch_problem(device):
            problem = f"do not run here: {refusal}; {UPDATE_DRIVER}"
        else:
            return None
        rebuild = gpu.build_command_for(gpu.sparse_gpus() | {capability: device.index})
        return f"the cutlass kernels {problem}: {rebuild}"

    def fingerprint(self) -> str:
        """The architectures of the build and a digest of it."""
        return f"{';'.join(cutlass_ops.ARCHS)} {cutlass_ops.digest()}"

    def unsupported(self, geometry: Geometry, plan: LayerPlan, dtype: torch.dtype, device: torch.device) -> str | None:
        """The first thing about the layer that the kernels do not have."""
        if dtype not in DTYPE_NAMES:
            return f"the kernels take float16 and bfloat16, not {str(dtype).removeprefix('torch.')}"
        if geometry.groups != 1:
            return f"the kernels have no grouped convolutions; groups = {geometry.groups}"
        for spec in (plan.grad_input, plan.grad_weight):
            if spec is not None and not takes_pattern(spec):
                return f"the kernels take N:M with N <= 2 and M of {GROUP_SIZES}, not {spec.n}:{spec.m}"
        if geometry.positions == 0 or geometry.out_channels == 0 or geometry.in_channels == 0:
            return "the layer's gradient is empty"
        return too_large(geometry) if plan.backend == "auto" else None

    def prune_compress(
        self, dy: Tensor, geometry: Geometry, plan: LayerPlan, rng: Rng | None, needs: Needs
    ) -> Operands:
        """One pass over dY for both operands and the bias gradient, two where their rules differ."""
        row_stride = c = geometry.out_channels
        if not _is_one_block(dy, geometry):
            dy = dense.matrix_view(dy, geometry)
            row_stride, column_stride = dy.stride()
            if column_stride != 1 or row_stride < c:
                dy, row_stride = dy.contiguous(), c
        device = dy.device
        planned = plan_sweeps(cutlass_ops.kernels(), geometry, plan, needs, row_stride, dy.dtype, dy.dtype)
        seed, rank = (None, 0) if rng is None else (rng.seed, rng.rank)
        with gpu.on_device(device):
            block, db = planned.run(dy, seed, rank, gpu.stream_of(device))
        t = geometry.positions
        return Operands(
            StoredOperand(block, Storage.of(1, t, c), 0) if needs.dgrad else None,
            StoredOperand(block, Storage.of(0, t, c), planned.wgrad_at) if needs.wgrad else None,
            db,
        )

    def tilings(
        self, geometry: Geometry, pass_name: Pass, dtype: torch.dtype, device: torch.device
    ) -> tuple[Tiling, ...]:
        """The tilings of the sparse product; none where it runs dense on the decompressed operand."""
        if too_large(geometry):
            return ()
        return rank(geometry, "dgrad" if pass_name == "grad_input" else "wgrad", gpu.device_facts(device))

    def dgrad(
        self,
        operand: StoredOperand,
        weight: Tensor,
        geometry: Geometry,
        tiling: Tiling | None = None,
        shape: tuple[int, ...] | None = None,
    ) -> Tensor:
        """dX on sparse tensor cores, or dense on the decompressed operand."""
        weight = _channels_innermost(weight, geometry)
        launch = _plan(geometry, "dgrad", weight, tiling, weight.dtype, False)
        if launch is None:
            dx = dense.dgrad(dense.layer_view(operand.decompress(), geometry), weight, geometry)
            return dx if shape is None else dx.view(shape)
        dx = weight.new_empty(shape) if shape is not None else weight.new_empty_strided(launch.shape, launch.strides)
        _launch(launch, operand, weight, dx)
        return dx if launch.final else dx.contiguous()

    def wgrad(
        self,
        operand: StoredOperand,
        x: Tensor,
        geometry: Geometry,
        tiling: Tiling | None = None,
        out: Tensor | None = None,
        accumulate: bool = False,
    ) -> Tensor:
        """dW on sparse tensor cores, or dense on the decompressed operand.

        The kernels write and add to an `out` of one block, a convolution's channels_last, at a multiple of 16 bytes; to
        others their result is copied or added.
        """
        if out is not None or accumulate:
            check_out(out, accumulate, x, geometry)
        x = _channels_innermost(x, geometry)
        direct = out is not None and _channels_innermost(out, geometry) is out and out.data_ptr() % ALIGNMENT == 0
        dtype = x.dtype if out is None else out.dtype
        launch = _plan(geometry, "wgrad", x, tiling, dtype, accumulate and direct)
        if launch is None:
            return dense.wgrad_into(dense.layer_view(operand.decompress(), geometry), x, geometry, out, accumulate)
        dw = out if out is not None and direct else None
        if dw is None:
            dw = (x if out is None else out).new_empty_strided(launch.shape, launch.strides)
        _launch(launch, operand, x, dw)
        if out is not None:
            return out if direct else out.add_(dw) if accumulate else out.copy_(dw)
        return dw if launch.final else dw.contiguous()

    def bind(self, decision: Decision, call: Call) -> SparseBackward | None:
        """Where both passes run on sparse tensor cores and their results need no copy.

        The gradients of float32 parameters come in float32, not rounded to 16 bits in between.
        """
        geometry = decision.geometry
        if too_large(geometry) or (isinstance(geometry, Conv2dGeometry) and not geometry.channels_last):
            return None
        return SparseBackward(decision, call)


def _launch(launch: Launch, operand: StoredOperand, b: Tensor, out: Tensor) -> None:
    with gpu.on_device(out.device):
        workspace = out.new_empty(launch.workspace, dtype=torch.uint8)
        stream = gpu.stream_of(out.device)
        launch.run(operand.address, b.data_ptr(), out.data_ptr(), workspace.data_ptr(), stream)


def _plan(
    geometry: Geometry, product: Product, b: Tensor, tiling: Tiling | None, out_dtype: torch.dtype, accumulate: bool
) -> Launch | None:
    is_aligned = b.data_ptr() % ALIGNMENT == 0
    kernels = cutlass_ops.kernels()
    return plan_product(kernels, geometry, product, b.dtype, b.device, tiling, out_dtype, accumulate, is_aligned)


def _channels_innermost(tensor: Tensor, geometry: Geometry) -> Tensor:
    """In one block with the channels innermost, as the kernels have them; itself where it is so."""
    if _is_one_block(tensor, geometry):
        return tensor
    is_matrix = isinstance(geometry, LinearGeometry)
    return tensor.contiguous(memory_format=torch.contiguous_format if is_matrix else torch.channels_last)


def _is_one_block(tensor: Tensor, geometry: Geometry) -> bool:
    """Whether the tensor of a layer, whatever its rank, has the channels innermost and no gaps."""
    if isinstance(geometry, LinearGeometry):
        return tensor.is_contiguous()
    return tensor.is_contiguous(memory_format=torch.channels_last)


BACKEND = CutlassBackend()
