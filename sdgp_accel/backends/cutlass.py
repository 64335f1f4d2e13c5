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
from sdgp_accel.backends import BUILD_COMMAND, Needs, Operands, check_out, dense, tiles
from sdgp_accel.backends.tiles import TILE_K, Product, Tiling, rank_tilings
from sdgp_accel.config import Pass, PruneSpec
from sdgp_accel.geometry import Conv2dGeometry, Geometry, LinearGeometry
from sdgp_accel.layer_plan import LayerPlan
from sdgp_accel.philox import Rng
from sdgp_accel.semi_structured import SparseOperand

DTYPE_NAMES = {torch.float16: "f16", torch.bfloat16: "bf16"}
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
    """Operands are `SparseOperand`s in the layout ``"row_major"``."""

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
        self, dy2d: Tensor, plan: LayerPlan, rng: Rng | None, positions_per_sample: int, needs: Needs
    ) -> Operands:
        """One pass over dY [T, C] for both operands and the bias gradient, two where their rules differ."""
        specs = (plan.grad_input if needs.dgrad else None, plan.grad_weight if needs.wgrad else None)
        with _on_device(dy2d.device):
            if specs[0] is not None and specs[1] is not None and specs[0] != specs[1]:
                dgrad, _, bias = _prune_compress(dy2d, specs[0], True, False, needs.bias, rng, positions_per_sample)
                _, wgrad, _ = _prune_compress(dy2d, specs[1], False, True, False, rng, positions_per_sample)
                return Operands(dgrad, wgrad, bias)
            spec = specs[0] or specs[1]
            assert spec is not None
            wanted = (specs[0] is not None, specs[1] is not None)
            return Operands(*_prune_compress(dy2d, spec, *wanted, needs.bias, rng, positions_per_sample))

    def tilings(
        self, geometry: Geometry, pass_name: Pass, dtype: torch.dtype, device: torch.device
    ) -> tuple[Tiling, ...]:
        """The tilings of the sparse product; none where it runs dense on the decompressed operand."""
        if _too_large(geometry):
            return ()
        return rank(geometry, "dgrad" if pass_name == "grad_input" else "wgrad", device_facts(device))

    def dgrad(self, operand: SparseOperand, weight: Tensor, geometry: Geometry, tiling: Tiling | None = None) -> Tensor:
        """dX on sparse tensor cores, or dense on the decompressed operand."""
        if _too_large(geometry):
            return dense.dgrad(dense.layer_view(operand.decompress(), geometry), weight, geometry)
        with _on_device(weight.device):
            if isinstance(geometry, LinearGeometry) or _is_pointwise(geometry):
                b = weight.reshape(geometry.out_channels, geometry.in_channels).contiguous()
                out = b.new_empty((operand.shape[0], geometry.in_channels))
                return _as_input(_gemm("dgrad", operand, b, out, geometry, tiling), geometry)
            b = _kernel_view(weight).contiguous()
            out = b.new_empty((geometry.batch, geometry.height, geometry.width, geometry.in_channels))
            return _as_input(_conv("dgrad", operand, b, out, geometry, tiling), geometry)

    def wgrad(
        self,
        operand: SparseOperand,
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
        check_out(out, accumulate, x, geometry)
        if _too_large(geometry):
            return dense.wgrad_into(dense.layer_view(operand.decompress(), geometry), x, geometry, out, accumulate)
        with _on_device(x.device):
            if out is None:
                dw = _sparse_wgrad(operand, x, geometry, tiling, _new_weight(x, geometry), False)
                return dw if isinstance(geometry, LinearGeometry) or geometry.channels_last else dw.contiguous()
            if _kernel_view(out).is_contiguous() and out.data_ptr() % 16 == 0:
                return _sparse_wgrad(operand, x, geometry, tiling, out, accumulate)
            dw = _sparse_wgrad(operand, x, geometry, tiling, _new_weight(out, geometry), False)
            return out.add_(dw) if accumulate else out.copy_(dw)


def _too_large(geometry: Geometry) -> str | None:
    """Why the products of this layer cannot run on sparse tensor cores."""
    positions = geometry.positions
    if isinstance(geometry, Conv2dGeometry):
        positions = max(positions, geometry.batch * geometry.height * geometry.width)
    largest = max(positions, geometry.out_channels, math.prod(geometry.weight_shape[1:]))
    return f"sparse products count rows and columns in 32 bits; got {largest}" if largest > MAX_SIZE else None


def _family(geometry: Geometry, product: Product, gpu: Device) -> tiles.Family:
    """The kernels that run this product on this GPU."""
    # Rows of X, W and their gradients hold C_in values, those of wgrad's compressed operand C_out.
    if geometry.in_channels % 8 or (product == "wgrad" and geometry.out_channels % 8):
        return tiles.SM80_ANY
    if gpu.wgmma and _tma_can_reach(geometry):
        return tiles.SM90
    return tiles.SM80_SMALL if gpu.capability in tiles.SMALL_SHARED_MEMORY else tiles.SM80


def _tma_can_reach(geometry: Geometry) -> bool:
    if isinstance(geometry, LinearGeometry) or _is_pointwise(geometry):
        return True
    filter_reach = (d * (k - 1) for d, k in zip(geometry.dilation, geometry.kernel, strict=True))
    return max(*geometry.padding, *filter_reach) <= MAX_REACH and max(geometry.stride) <= MAX_STRIDE


def _prune_compress(
    dy: Tensor, spec: PruneSpec, dgrad: bool, wgrad: bool, bias: bool, rng: Rng | None, positions_per_sample: int
) -> tuple[SparseOperand | None, SparseOperand | None, Tensor | None]:
    if dy.stride(1) != 1 or dy.stride(0) < dy.shape[1]:
        dy = dy.contiguous()
    t, c = dy.shape
    arguments: dict[str, Any] = {"n": spec.n, "m": spec.m, "dtype": DTYPE_NAMES[dy.dtype], "dy": dy.data_ptr()}
    arguments |= {"t": t, "c": c, "row_stride": dy.stride(0), "stream": _stream(dy.device)}
    # What pointers in `arguments` point at has to live until the launch.
    keep: list[Tensor] = []
    if spec.function == "rescale_magnitude" and spec.scope != "group":
        samples = positions_per_sample if spec.scope == "sample_channel" else 0
        keep = _scope_scales(dy, arguments, samples, spec.eps)
        arguments |= {"dgrad_scale": keep[0].data_ptr(), "wgrad_scale": keep[1].data_ptr()}
        arguments["positions_per_sample"] = samples
    if spec.is_random:
        assert rng is not None
        arguments |= {"seed": rng.seed.data_ptr(), "rank": rng.rank}

    operands: list[SparseOperand | None] = [None, None]
    for axis, name, wanted in ((1, "dgrad", dgrad), (0, "wgrad", wgrad)):
        if wanted:
            k = -(-dy.shape[axis] // TILE_K) * TILE_K
            values = dy.new_empty((t, k // 2) if axis == 1 else (k // 2, c))
            metadata = dy.new_empty((t, k // 16) if axis == 1 else (k // 16, c), dtype=torch.int16)
            arguments |= {f"{name}_values": values.data_ptr(), f"{name}_metadata": metadata.data_ptr(), f"{name}_k": k}
            operands[1 - axis] = SparseOperand(values, metadata, axis, (t, c))
    db = dy.new_empty(c, dtype=torch.float32) if bias else None
    if db is not None:
        keep.append(dy.new_empty((cutlass_ops.kernels().bias_partial_rows(t, c), c), dtype=torch.float32))
        arguments |= {"bias": db.data_ptr(), "bias_partials": keep[-1].data_ptr()}
    cutlass_ops.kernels().prune_compress(function=spec.function, eps=spec.eps, **arguments)
    return operands[0], operands[1], None if db is None else db.to(dy.dtype)


def _scope_scales(dy: Tensor, arguments: dict[str, Any], positions_per_sample: int, eps: float) -> list[Tensor]:
    """The factors of both passes, float32 [samples, C], or [1] for the whole tensor (positions_per_sample = 0)."""
    scopes = dy.shape[0] // positions_per_sample * dy.shape[1] if positions_per_sample else 1
    sums = dy.new_zeros((3, scopes), dtype=torch.float64)
    scales = [dy.new_empty(scopes, dtype=torch.float32) for _ in range(2)]
    cutlass_ops.kernels().scope_scales(
        positions_per_sample=positions_per_sample, eps=eps, sums=sums.data_ptr(), dgrad_scale=scales[0].data_ptr(),
        wgrad_scale=scales[1].data_ptr(), **arguments,
    )  # fmt: skip
    return scales


def rank(geometry: Geometry, product: Product, gpu: Device, family: tiles.Family | None = None) -> tuple[Tiling, ...]:
    """The tilings that run this product on this GPU, best predicted first. family: default the one that fits."""
    m, n, k = _product_size(geometry, product)
    gathering = isinstance(geometry, Conv2dGeometry) and not _is_pointwise(geometry)
    return rank_tilings(family or _family(geometry, product, gpu), product, m, n, k, gpu.multiprocessors, gathering)


def _tiling_for(b: Tensor, geometry: Geometry, product: Product, tiling: Tiling | None) -> Tiling:
    """`tiling`, by default the best predicted; where `b` does not begin at a multiple of 16 bytes, one that may."""
    if b.data_ptr() % 16:
        return rank(geometry, product, device_facts(b.device), tiles.SM80_ANY)[0]
    return tiling or rank(geometry, product, device_facts(b.device))[0]


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


def _sparse_wgrad(
    operand: SparseOperand, x: Tensor, geometry: Geometry, tiling: Tiling | None, out: Tensor, accumulate: bool
) -> Tensor:
    """dW in `out`, which has the kernels' layout."""
    b = _kernel_view(x).contiguous()
    if isinstance(geometry, LinearGeometry) or _is_pointwise(geometry):
        return _gemm("wgrad", operand, b.view(-1, geometry.in_channels), out, geometry, tiling, accumulate)
    return _conv("wgrad", operand, b, out, geometry, tiling, accumulate)


def _gemm(
    product: Product,
    operand: SparseOperand,
    b: Tensor,
    out: Tensor,
    geometry: Geometry,
    tiling: Tiling | None,
    accumulate: bool = False,
) -> Tensor:
    """operand [m, k] x b [k, n], to (or added to) `out`: m n elements in one block, of b's dtype or float32."""
    t, c = operand.shape
    m, k = (t, c) if operand.axis == 1 else (c, t)
    n = b.shape[1]
    tiling = _tiling_for(b, geometry, product, tiling)
    workspace = _workspace(out, tiling)
    cutlass_ops.kernels().sparse_gemm(
        f"sdgp_{tiling.family}_{product}_{DTYPE_NAMES[b.dtype]}_{tiling.tile}", m=m, n=n, k=k, accumulate=accumulate,
        **_product_arguments(operand, b, out, workspace, tiling),
    )  # fmt: skip
    return out


def _conv(
    product: Product,
    operand: SparseOperand,
    b: Tensor,
    out: Tensor,
    geometry: Conv2dGeometry,
    tiling: Tiling | None,
    accumulate: bool = False,
) -> Tensor:
    """dX [N, H, W, C_in] or dW [C_out, R, S, C_in], as `_gemm` does; b: the filter [C_out, R, S, C_in] or x NHWC."""
    g = geometry
    tiling = _tiling_for(b, geometry, product, tiling)
    workspace = _workspace(out, tiling)
    cutlass_ops.kernels().sparse_conv(
        f"sdgp_{tiling.family}_conv_{product}_{DTYPE_NAMES[b.dtype]}_{tiling.tile}",
        shape=(g.batch, g.height, g.width, g.in_channels, g.out_height, g.out_width, g.out_channels, *g.kernel),
        window=(*g.stride, *g.padding, *g.dilation), accumulate=accumulate,
        **_product_arguments(operand, b, out, workspace, tiling),
    )  # fmt: skip
    return out


def _workspace(out: Tensor, tiling: Tiling) -> Tensor | None:
    return out.new_empty((tiling.splits, out.numel()), dtype=torch.float32) if tiling.splits > 1 else None


def _product_arguments(
    operand: SparseOperand, b: Tensor, out: Tensor, workspace: Tensor | None, tiling: Tiling
) -> dict[str, Any]:
    return {
        "values": operand.values.data_ptr(), "metadata": operand.metadata.data_ptr(), "b": b.data_ptr(),
        "out": out.data_ptr(), "workspace": 0 if workspace is None else workspace.data_ptr(),
        "padded_k": operand.values.shape[operand.axis] * 2, "splits": tiling.splits, "group_n": tiling.group_n,
        "cluster_size": tiling.cluster_size, "out_is_float": out.dtype == torch.float32,
        "sm_count": device_facts(b.device).multiprocessors, "stream": _stream(b.device),
    }  # fmt: skip


def _is_pointwise(geometry: Conv2dGeometry) -> bool:
    return geometry.kernel == (1, 1) and geometry.stride == (1, 1) and geometry.padding == (0, 0)


def _kernel_view(tensor: Tensor) -> Tensor:
    """Channels innermost, as the kernels have them: [A, B, H, W] as [A, H, W, B]; a matrix as it is."""
    return tensor if tensor.dim() == 2 else tensor.permute(0, 2, 3, 1)


def _new_weight(like: Tensor, geometry: Geometry) -> Tensor:
    """A gradient of the weight's shape in the kernels' layout."""
    if isinstance(geometry, LinearGeometry):
        return like.new_empty(geometry.weight_shape)
    shape = (geometry.out_channels, *geometry.kernel, geometry.in_channels)
    return like.new_empty(shape).permute(0, 3, 1, 2)


def _as_input(dx: Tensor, geometry: Geometry) -> Tensor:
    """[T, C_in] for Linear, [N, C_in, H, W] in the layer's memory format for Conv2d."""
    if isinstance(geometry, LinearGeometry):
        return dx
    result = dx.view(geometry.batch, geometry.height, geometry.width, -1).permute(0, 3, 1, 2)
    return result if geometry.channels_last else result.contiguous()


def _stream(device: torch.device) -> int:
    return torch.cuda.current_stream(device).cuda_stream


def _on_device(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Kernels are launched on the current device, which autograd sets but a direct call may not have."""
    return contextlib.nullcontext() if torch.cuda.current_device() == device.index else torch.cuda.device(device)


BACKEND = CutlassBackend()
