"""The backward on sparse tensor cores: operands from the prune+compress kernel, products from one of two families of
kernels. Hopper's (wgmma.sp, TMA) run on sm_90 what TMA can address; the others (mma.sp) every shape, from sm_80 on.

Sizes that count beyond 32 bits have no sparse products: ``backend="cutlass"`` still prunes and compresses with the
kernel and runs dense products on the decompressed operands, ``"auto"`` does not take such layers.
"""

from __future__ import annotations

import contextlib
import functools
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

import cutlass_ops
from sdgp_accel.backends import BUILD_COMMAND, CACHED_DECISIONS, Needs, Operands, check_out, dense, tiles
from sdgp_accel.backends.sweep import DTYPE_NAMES, Storage, StoredOperand, sweeps
from sdgp_accel.backends.tiles import Product, Tiling, rank_tilings
from sdgp_accel.config import Pass
from sdgp_accel.geometry import Conv2dGeometry, Geometry, LinearGeometry
from sdgp_accel.layer_plan import LayerPlan
from sdgp_accel.philox import Rng

GROUP_SIZES = (4, 8, 16)
HOPPER = (9, 0)
MAX_SIZE = (1 << 31) - 1024  # the products count positions and channels, rounded up to tiles, in 32 bits
# TMA's im2col mode has 8 signed bits for the corners of a 4-D tensor's box and strides of at most 8 (CUDA driver API,
# cuTensorMapEncodeIm2col); the corners go beyond padding and reach of the filter by less than a stride.
MAX_REACH, MAX_STRIDE = 120, 8


class Device(NamedTuple):
    """What decisions and launches need to know of a GPU."""

    capability: tuple[int, int]
    multiprocessors: int
    wgmma: bool = False  # a Hopper, and the build holds the kernels for it


@functools.cache
def device_facts(device: torch.device) -> Device:
    """Of a CUDA device; asked once."""
    properties = torch.cuda.get_device_properties(device)
    capability = (properties.major, properties.minor)
    wgmma = capability == HOPPER and "90a" in cutlass_ops.ARCHS
    return Device(capability, properties.multi_processor_count, wgmma)


def runs_on(arch: str, capability: tuple[int, int]) -> bool:
    """Whether code built for `arch`, as in SDGP_CUDA_ARCHS, runs on a GPU of this compute capability."""
    number = arch.removeprefix("compute_")
    version = (int(number.rstrip("af")[:-1]), int(number.rstrip("af")[-1]))
    if number[-1] in "af":  # features of one architecture, which no other has
        return version == capability
    if arch.startswith("compute_"):  # PTX: the driver compiles it for what came later
        return version <= capability
    return version[0] == capability[0] and version <= capability


class CutlassBackend:
    """Operands are `StoredOperand`s."""

    name = "cutlass"

    def unavailable(self, device: torch.device) -> str | None:
        """None where the extension is built for `device`."""
        if not cutlass_ops.ARCHS:
            return f"the cutlass kernels are not built; build them with: {BUILD_COMMAND}"
        capability = device_facts(device).capability
        if any(runs_on(arch, capability) for arch in cutlass_ops.ARCHS):
            return None
        arch = f"{capability[0]}{capability[1]}" + ("a" if capability == HOPPER else "")
        built = ", ".join(cutlass_ops.ARCHS)
        return f"the cutlass kernels are built for {built} only; rebuild with: SDGP_CUDA_ARCHS={arch} {BUILD_COMMAND}"

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
            if spec is not None and not (spec.n <= 2 and spec.m in GROUP_SIZES):
                return f"the kernels take N:M with N <= 2 and M of {GROUP_SIZES}, not {spec.n}:{spec.m}"
        if geometry.positions == 0 or geometry.out_channels == 0 or geometry.in_channels == 0:
            return "the layer's gradient is empty"
        return _too_large(geometry) if plan.backend == "auto" else None

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
        planned = sweeps(cutlass_ops.kernels(), geometry, plan, needs, row_stride, dy.dtype)
        with _on_device(device):
            stream = _stream(device)
            operands = planned[0].run(dy, rng, stream)
            if len(planned) > 1:  # the first has applied dgrad's rule
                operands = operands._replace(wgrad=planned[1].run(dy, rng, stream).wgrad)
        return operands

    def tilings(
        self, geometry: Geometry, pass_name: Pass, dtype: torch.dtype, device: torch.device
    ) -> tuple[Tiling, ...]:
        """The tilings of the sparse product; none where it runs dense on the decompressed operand."""
        if _too_large(geometry):
            return ()
        return rank(geometry, "dgrad" if pass_name == "grad_input" else "wgrad", device_facts(device))

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
        launch = _launch(geometry, "dgrad", weight, tiling, weight.dtype, False)
        if launch is None:
            dx = dense.dgrad(dense.layer_view(operand.decompress(), geometry), weight, geometry)
            return dx if shape is None else dx.view(shape)
        dx = weight.new_empty(shape) if shape is not None else weight.new_empty_strided(launch.shape, launch.strides)
        launch.run(operand, weight, dx)
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
        direct = out is not None and _channels_innermost(out, geometry) is out and out.data_ptr() % 16 == 0
        dtype = x.dtype if out is None else out.dtype
        launch = _launch(geometry, "wgrad", x, tiling, dtype, accumulate and direct)
        if launch is None:
            return dense.wgrad_into(dense.layer_view(operand.decompress(), geometry), x, geometry, out, accumulate)
        if out is not None and direct:
            launch.run(operand, x, out)
            return out
        dw = (x if out is None else out).new_empty_strided(launch.shape, launch.strides)
        launch.run(operand, x, dw)
        if out is not None:
            return out.add_(dw) if accumulate else out.copy_(dw)
        return dw if launch.final else dw.contiguous()


def _too_large(geometry: Geometry) -> str | None:
    """Why the products of this layer cannot run on sparse tensor cores."""
    positions = geometry.positions
    if isinstance(geometry, Conv2dGeometry):
        positions = max(positions, geometry.batch * geometry.height * geometry.width)
    largest = max(positions, geometry.out_channels, math.prod(geometry.weight_shape[1:]))
    return f"sparse products count rows and columns in 32 bits; got {largest}" if largest > MAX_SIZE else None


def _family(geometry: Geometry, gpu: Device) -> tiles.Family:
    """The kernels that run this product on this GPU."""
    if geometry.in_channels % 8:  # the length of the rows of X, W and their gradients
        return tiles.SM80_ANY
    if gpu.wgmma and _tma_can_reach(geometry):
        return tiles.SM90
    return tiles.SM80_SMALL if gpu.capability in tiles.SMALL_SHARED_MEMORY else tiles.SM80


def _tma_can_reach(geometry: Geometry) -> bool:
    if isinstance(geometry, LinearGeometry) or _is_pointwise(geometry):
        return True
    filter_reach = (d * (k - 1) for d, k in zip(geometry.dilation, geometry.kernel, strict=True))
    return max(*geometry.padding, *filter_reach) <= MAX_REACH and max(geometry.stride) <= MAX_STRIDE


def rank(geometry: Geometry, product: Product, gpu: Device, family: tiles.Family | None = None) -> tuple[Tiling, ...]:
    """The tilings that run this product on this GPU, best predicted first. family: default the one that fits."""
    m, n, k = _product_size(geometry, product)
    gathering = isinstance(geometry, Conv2dGeometry) and not _is_pointwise(geometry)
    return rank_tilings(family or _family(geometry, gpu), product, m, n, k, gpu.multiprocessors, gathering)


def _product_size(geometry: Geometry, product: Product) -> tuple[int, int, int]:
    """(m, n, k) of dgrad or wgrad as one product; of a convolution's, the taps of the filter included.

    A strided dgrad meets a part of the taps at each pixel: on average one of stride x stride.
    """
    c_in, c_out = geometry.in_channels, geometry.out_channels
    taps, met, inputs = 1, 1, geometry.positions
    if isinstance(geometry, Conv2dGeometry):
        taps = geometry.kernel[0] * geometry.kernel[1]
        met = -(-taps // (geometry.stride[0] * geometry.stride[1]))
        inputs = geometry.batch * geometry.height * geometry.width
    return (inputs, c_in, c_out * met) if product == "dgrad" else (c_out, c_in * taps, geometry.positions)


class Launch(NamedTuple):
    """What is the same in every product of one shape: the launch but for addresses, and what to allocate.

    workspace: its size in 16-bit elements, as a shape; None where the kernel needs none. shape, strides: of the result;
    a convolution's is channels_last. final: False where the layer wants it contiguous.
    """

    kernel: Any
    workspace: tuple[int] | None
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    final: bool

    def run(self, operand: StoredOperand, b: Tensor, out: Tensor) -> None:
        """Multiply to (or add to) `out`; `b`: the weight or x. Both in one block, channels innermost."""
        device, workspace, address = b.device, None, 0
        if self.workspace is not None:
            workspace = operand.block.new_empty_strided(self.workspace, (1,))
            address = workspace.data_ptr()
        values = operand.block.data_ptr()
        metadata = values + operand.storage.metadata_at
        with _on_device(device):
            self.kernel(values, metadata, b.data_ptr(), out.data_ptr(), address, _stream(device))


def _launch(
    geometry: Geometry, product: Product, b: Tensor, tiling: Tiling | None, out_dtype: torch.dtype, accumulate: bool
) -> Launch | None:
    """With `tiling`, by default the best predicted; None where there is no sparse product."""
    device = b.device
    if tiling is None or b.data_ptr() % 16:
        if _too_large(geometry):
            return None
        # Where `b` does not begin at a multiple of 16 bytes, one that may.
        tiling = rank(geometry, product, device_facts(device), tiles.SM80_ANY if b.data_ptr() % 16 else None)[0]
    return _planned_launch(cutlass_ops.kernels(), geometry, product, b.dtype, device, tiling, out_dtype, accumulate)


@functools.lru_cache(maxsize=CACHED_DECISIONS)
def _planned_launch(
    kernels: Any,
    geometry: Geometry,
    product: Product,
    dtype: torch.dtype,
    device: torch.device,
    tiling: Tiling,
    out_dtype: torch.dtype,
    accumulate: bool,
) -> Launch:
    c_in, c_out, positions = geometry.in_channels, geometry.out_channels, geometry.positions
    arguments: dict[str, Any] = {
        "splits": tiling.splits, "group_n": tiling.group_n, "cluster_size": tiling.cluster_size,
        "sm_count": device_facts(device).multiprocessors, "out_is_float": out_dtype == torch.float32,
        "accumulate": accumulate, "padded_k": Storage.of(1 if product == "dgrad" else 0, positions, c_out).k,
    }  # fmt: skip
    instance = f"{product}_{DTYPE_NAMES[dtype]}_{tiling.tile}"
    final = True
    if isinstance(geometry, Conv2dGeometry):
        g = geometry
        shape: tuple[int, ...] = g.input_shape if product == "dgrad" else g.weight_shape
        _, channels, height, width = shape
        strides: tuple[int, ...] = (channels * height * width, 1, channels * width, channels)
        final = g.channels_last
    else:
        shape, strides = (positions, c_in) if product == "dgrad" else geometry.weight_shape, (c_in, 1)
    if isinstance(geometry, LinearGeometry) or _is_pointwise(geometry):
        m, k = (positions, c_out) if product == "dgrad" else (c_out, positions)
        kernel = kernels.SparseGemm(f"sdgp_{tiling.family}_{instance}", m=m, n=c_in, k=k, **arguments)
    else:
        kernel = kernels.SparseConv(
            f"sdgp_{tiling.family}_conv_{instance}",
            shape=(g.batch, g.height, g.width, c_in, g.out_height, g.out_width, c_out, *g.kernel),
            window=(*g.stride, *g.padding, *g.dilation), **arguments,
        )  # fmt: skip
    partials = (2 * tiling.splits * math.prod(shape),) if tiling.splits > 1 else None  # of float32
    return Launch(kernel, partials, shape, strides, final)


def _is_pointwise(geometry: Conv2dGeometry) -> bool:
    return geometry.kernel == (1, 1) and geometry.stride == (1, 1) and geometry.padding == (0, 0)


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


def _stream(device: torch.device) -> int:
    # What torch.cuda.current_stream(device).cuda_stream is, without making an object of it.
    stream: int = torch._C._cuda_getCurrentRawStream(device.index)
    return stream


_HERE = contextlib.nullcontext()


def _on_device(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Kernels are launched on the current device, which autograd sets but a direct call may not have."""
    # What torch.cuda.current_device() asks, which first sees to it that there is a CUDA context.
    return _HERE if torch._C._cuda_getDevice() == device.index else torch.cuda.device(device)


BACKEND = CutlassBackend()
