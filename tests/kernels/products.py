"""The sparse products in tests: one interface to the real GPU and to the simulator, and what their tests share.

The simulator runs instances one by one, compiled to PTX; a GPU runs those of the built extension.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import random
import subprocess
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import pytest
import torch
from torch import Tensor

import cutlass_ops
from cutlass_ops import build_kernels
from sdgp_accel.backends.sweep import Storage, StoredOperand
from sdgp_accel.backends.tiles import Tiling, workspace_bytes
from sdgp_accel.semi_structured import SparseOperand, compress_matrix

_POINTERS = ("values", "metadata", "b", "out", "workspace")
_LAUNCH = (
    "padded_k", "splits", "owned_blocks", "group_n", "cluster_size", "sm_count", "out_is_float", "accumulate", "step",
    "overlaps",
)  # fmt: skip
_SHAPE = ("n", "h", "w", "c_in", "p", "q", "c_out", "r", "s")
_WINDOW = ("stride_h", "stride_w", "padding_h", "padding_w", "dilation_h", "dilation_w")


def _structure(sizes: Sequence[str]) -> type[ctypes.Structure]:
    fields: list[tuple[str, type]] = [(name, ctypes.c_void_p) for name in _POINTERS]
    fields += [(name, ctypes.c_int32) for name in (*sizes, *_LAUNCH)]
    return type("Arguments", (ctypes.Structure,), {"_fields_": [*fields, ("stream", ctypes.c_void_p)]})


# SdgpSparseGemm and SdgpSparseConv of cutlass_ops/include/sdgp/sparse_*_api.h.
GemmArguments = _structure(("m", "n", "k"))
ConvArguments = _structure((*_SHAPE, *_WINDOW))


class Engine(Protocol):
    """Where kernels run."""

    sm_count: int

    def put(self, tensor: Tensor) -> Tensor:
        """A copy in (simulated) device memory."""

    def poisoned(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """An output: NaN where nothing gets written, with guard bytes around it."""

    def gemm(self, name: str, **arguments: Any) -> None:
        """Launch an instance on tensors and sizes named as in the C struct."""

    def conv(self, name: str, *, shape: Sequence[int], window: Sequence[int], **arguments: Any) -> None:
        """As `gemm`; shape and window in the order of the C struct."""


class SimulatorEngine:
    """The instances' PTX on the CPU: out-of-bounds accesses, races and illegal metadata are faults."""

    sm_count = 4

    def __init__(self, arch: str) -> None:
        """arch: "80" or "90a"."""
        from tests.ptxsim.engine import SimEngine

        self._arch = arch
        self._engine = SimEngine((int(arch[0]), int(arch[1])))

    def put(self, tensor: Tensor) -> Tensor:
        return self._engine.put(tensor)

    def poisoned(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        return self._engine.empty(*shape, dtype=dtype)  # all bits set: NaN

    def register(self, address: int, size: int) -> None:
        """Makes `size` bytes of the host's memory accessible to kernels."""
        self._engine.runtime.memory.register(address, size)

    def unregister(self, address: int) -> None:
        """Undoes `register`."""
        self._engine.runtime.memory.unregister(address)

    def load(self, path: Path) -> ctypes.CDLL:
        """A C library with kernels that are not ours."""
        return self._engine.load(path)

    def following_global_memory(self) -> contextlib.AbstractContextManager[None]:
        """Within, races between thread blocks on global memory are faults."""
        return self._engine.following_global_memory()

    def poisoned_shared(self) -> contextlib.AbstractContextManager[None]:
        """Within, kernels may read shared memory that nothing has written."""
        return self._engine.poisoned_shared()

    def launches(self) -> int:
        """Kernels launched since the last call."""
        count = len(self._engine.runtime.launches)
        self._engine.runtime.launches.clear()
        return count

    def checked(self) -> contextlib.AbstractContextManager[None]:
        """Raises what kernels launched within did wrong."""
        return self._engine.checked()

    def gemm(self, name: str, **arguments: Any) -> None:
        self._launch(name, GemmArguments, arguments)

    def conv(self, name: str, *, shape: Sequence[int], window: Sequence[int], **arguments: Any) -> None:
        sizes = dict(zip((*_SHAPE, *_WINDOW), (*shape, *window), strict=True))
        self._launch(name, ConvArguments, sizes | arguments)

    def _launch(self, name: str, structure: type[ctypes.Structure], arguments: dict[str, Any]) -> None:
        function = getattr(self._engine.load(simulated_library(name, self._arch)), f"sdgp_{name}")
        addresses = {key: x.data_ptr() if isinstance(x, Tensor) else x for key, x in arguments.items()}
        with self._engine.checked():
            status = function(ctypes.byref(structure(sm_count=self.sm_count, **addresses)))
        if status:
            raise RuntimeError(f"{name}: status {status}")


class SimulatedKernels:
    """What the backend uses of `cutlass_ops.kernels()`, run on the simulator on ordinary CPU tensors.

    The products are `engine`'s, the rest the `extension`'s.
    """

    def __init__(self, engine: SimulatorEngine, extension: Any = None) -> None:
        self._engine = engine
        self._extension = extension

    def device_problem(self) -> str:
        return ""

    def bias_partial_rows(self, t: int, c: int) -> int:
        rows: int = self._extension.bias_partial_rows(t, c)
        return rows

    def scope_workspace(self, t: int, c: int, positions_per_sample: int) -> int:
        size: int = self._extension.scope_workspace(t, c, positions_per_sample)
        return size

    def PruneCompress(self, **shape: Any) -> Callable[..., None]:
        launch = self._extension.PruneCompress(**shape)
        t, c, per_sample = shape["t"], shape["c"], shape["positions_per_sample"]
        scale = 4 * (t // per_sample * c if per_sample else 1)
        stored = (t * shape["dgrad_k"], (shape["wgrad_pitch"] or c) * shape["wgrad_k"])
        words = t * shape["dgrad_words"]
        bias = c * (4 if shape["bias_is_float"] else 2)
        sizes = (
            2 * ((t - 1) * shape["row_stride"] + c), stored[0], 2 * words, stored[1], stored[1] // 8, bias,
            4 * c * self.bias_partial_rows(t, c), 16, 0, 0, 0, scale, scale,
        )  # fmt: skip
        return self._launcher(launch, sizes)

    def ScopeScales(self, **shape: Any) -> Callable[..., None]:
        launch = self._extension.ScopeScales(**shape)
        t, c, per_sample = shape["t"], shape["c"], shape["positions_per_sample"]
        scale = 4 * (t // per_sample * c if per_sample else 1)
        dy = 2 * ((t - 1) * shape["row_stride"] + c)
        return self._launcher(launch, (dy, 8 * self.scope_workspace(t, c, per_sample), scale, scale))

    def Backward(self, sweeps: Sequence[Any], dgrad: Any, wgrad: Any) -> Callable[..., None]:
        """What the extension's does, step by step."""

        def launch(
            dy: int, block: int, bias: int, seed: int, key: int, offset: int, rank: int, weight: int, dx: int, x: int,
            dw: int, stream: int,
        ) -> None:  # fmt: skip
            for prune_compress, scope_scales, *operands, workspace, dgrad_scale, wgrad_scale in sweeps:
                places = [block + place for place in (workspace, dgrad_scale, wgrad_scale)]
                written = [
                    0 if operand is None else block + place for operand in operands for place in operand or (0, 0)
                ]
                scales = places[1:] if scope_scales is not None else [0, 0]
                if scope_scales is not None:
                    scope_scales(dy, *places, stream)
                prune_compress(dy, *written, bias, places[0], seed, key, offset, rank, *scales, stream)
                bias = 0
            for part, b, out in ((dgrad, weight, dx), (wgrad, x, dw)):
                if part is not None:
                    product, (values, metadata), workspace = part
                    product(block + values, block + metadata, b, out, block + workspace, stream)

        return launch

    def SparseGemm(self, name: str, **shape: Any) -> Callable[..., None]:
        m, n, k = (shape[size] for size in "mnk")
        rows = m if "dgrad" in name else -(-m // 8) * 8
        return self._product(self._engine.gemm, name, shape, rows, m * n, k * n)

    def SparseConv(self, name: str, **shape: Any) -> Callable[..., None]:
        batch, h, w, c_in, p, q, c_out, r, s = shape["shape"]
        x, weight = batch * h * w * c_in, c_out * r * s * c_in
        sizes = (batch * p * q, x, weight) if "dgrad" in name else (-(-c_out // 8) * 8, weight, x)
        return self._product(self._engine.conv, name, shape, *sizes)

    def _product(
        self, run: Callable[..., None], name: str, shape: dict[str, Any], rows: int, out: int, b: int
    ) -> Callable[..., None]:
        """`rows` of A, elements of the others."""
        shape = dict(shape)
        assert shape.pop("sm_count") == self._engine.sm_count
        stored = rows * shape["padded_k"]
        words = rows * -(-shape["padded_k"] // 128) * 8 if "dgrad" in name else stored // 16
        names = ("values", "metadata", "b", "out", "workspace")
        workspace = workspace_of(name, shape, out, self._engine.sm_count)
        sizes = (stored, 2 * words, 2 * b, out * (4 if shape["out_is_float"] else 2), workspace)

        def launch(*addresses: int) -> None:
            run(name.removeprefix("sdgp_"), **shape, **dict(zip(names, addresses[:5], strict=True)))

        return self._launcher(launch, sizes)

    def _launcher(self, launch: Callable[..., None], sizes: Sequence[int]) -> Callable[..., None]:
        """`launch` on addresses, the exact bytes behind which are the only memory that kernels may touch."""

        def checked_launch(*arguments: int) -> None:
            visible = [(address, size) for address, size in zip(arguments, sizes, strict=False) if address and size]
            for address, size in visible:
                self._engine.register(address, size)
            try:
                with self._engine.checked():
                    launch(*arguments)
            finally:
                for address, _ in visible:
                    self._engine.unregister(address)

        return checked_launch


class GpuEngine:
    """The built extension on the current CUDA device."""

    GUARD = 1024  # elements before and after an output

    def __init__(self) -> None:
        self._outputs: list[tuple[Tensor, int]] = []
        self.sm_count = torch.cuda.get_device_properties(0).multi_processor_count

    def put(self, tensor: Tensor) -> Tensor:
        return tensor.cuda()

    def poisoned(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        size = torch.Size(shape).numel()
        buffer = torch.full((size + 2 * self.GUARD,), float("nan"), dtype=dtype, device="cuda")
        self._outputs.append((buffer, size))
        return buffer[self.GUARD : self.GUARD + size].view(*shape)

    def gemm(self, name: str, **arguments: Any) -> None:
        self._launch(cutlass_ops.kernels().SparseGemm, name, arguments)

    def conv(self, name: str, *, shape: Sequence[int], window: Sequence[int], **arguments: Any) -> None:
        arguments |= {"shape": list(shape), "window": list(window)}
        self._launch(cutlass_ops.kernels().SparseConv, name, arguments)

    def _launch(self, kind: Any, name: str, arguments: dict[str, Any]) -> None:
        addresses = {key: arguments.pop(key) for key in _POINTERS if key in arguments}
        product = kind(f"sdgp_{name}", sm_count=self.sm_count, **arguments)
        product(**{key: x.data_ptr() for key, x in addresses.items() if x is not None})
        torch.cuda.synchronize()
        for buffer, size in self._outputs:
            assert buffer[: self.GUARD].isnan().all(), "written before an output"
            assert buffer[self.GUARD + size :].isnan().all(), "written behind an output"


def toolkit_for_simulator() -> build_kernels.Toolkit:
    """Skips a test of what only the simulator shows where that cannot run or a GPU would displace it."""
    from tests.ptxsim import toolchain

    if torch.cuda.is_available():
        pytest.skip("looked at on the simulator")
    if reason := toolchain.missing():
        pytest.skip(reason)
    toolkit = build_kernels.find_toolkit()
    assert toolkit is not None
    return toolkit


@functools.cache
def simulated_library(name: str, arch: str) -> Path:
    """A shared library with the PTX of one instance and of what sums up its parts, with the shared CUDA runtime."""
    toolkit = build_kernels.find_toolkit()
    assert toolkit is not None
    objects = [
        build_kernels.compile_instance(toolkit, build_kernels.INSTANCES / f"{source}.cu", (f"compute_{arch}",))
        for source in (name, "partial_sums")
    ]
    library = objects[0].with_suffix(f".{objects[1].stem}.so")
    if not library.exists():
        partial = library.with_suffix(".so.partial")
        subprocess.run(["g++", "-shared", "-o", partial, *objects, toolkit.runtime], check=True)
        partial.replace(library)
    return library


def compile_for_simulator(names: Sequence[str], arch: str) -> None:
    """Fill the cache of `simulated_library`, two compilers at a time."""
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda name: simulated_library(name, arch), names))


class GemmCase(NamedTuple):
    """One product; the name in `instance` covers family, pass, dtype and tile."""

    instance: str
    m: int
    n: int
    k: int
    splits: int = 1
    owned_blocks: int = 0
    cluster_size: int = 1
    group_n: int = 2
    float_out: bool = False
    accumulate: bool = False


class ConvCase(NamedTuple):
    """One convolution gradient: y[n, c_out, p, q] = conv(x[n, c_in, h, w], filter[c_out, c_in, r, s])."""

    instance: str
    x: tuple[int, int, int, int]
    filter: tuple[int, int, int]
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (1, 1)
    dilation: tuple[int, int] = (1, 1)
    splits: int = 1
    owned_blocks: int = 0
    cluster_size: int = 1
    float_out: bool = False
    accumulate: bool = False


Case = GemmCase | ConvCase


def is_dgrad(case: Case) -> bool:
    """Else wgrad."""
    return "dgrad" in case.instance


def dtype_of(case: Case) -> torch.dtype:
    """Of the operands."""
    return torch.bfloat16 if "_bf16_" in case.instance else torch.float16


def other_dtype(case: Case) -> Case:
    """The same of the instance for the other dtype."""
    old, new = ("_bf16_", "_f16_") if "_bf16_" in case.instance else ("_f16_", "_bf16_")
    return case._replace(instance=case.instance.replace(old, new))


def sparse_matrix(rows: int, columns: int, axis: int, dtype: torch.dtype) -> Tensor:
    """Random, with zero to two non-zeros in each group of 4 along `axis`."""
    matrix = torch.randn(rows, columns) if axis == 1 else torch.randn(columns, rows)
    padded = torch.nn.functional.pad(matrix, (0, -matrix.shape[1] % 4))
    quads = padded.view(matrix.shape[0], -1, 4)
    order = torch.rand_like(quads).argsort(-1)
    kept = (order < 2) & (torch.rand_like(quads) < 0.9)
    result = quads.where(kept, 0).view_as(padded)[:, : matrix.shape[1]].to(dtype)
    return result if axis == 1 else result.t().contiguous()


def workspace_of(name: str, launch: Mapping[str, Any], out: int, sm_count: int) -> int:
    """Of a launch of this instance with these arguments, `out` elements in its result."""
    tile = next(part for part in name.split("_") if "x" in part)
    tiling = Tiling("", tile, launch["cluster_size"], launch["splits"], 1, launch["owned_blocks"])
    return workspace_bytes(tiling, out, sm_count)


def arguments(engine: Engine, operand: SparseOperand, b: Tensor, out: Tensor, case: Case) -> dict[str, object]:
    size = workspace_of(case.instance, case._asdict(), out.numel(), engine.sm_count)
    metadata = operand.metadata
    if operand.axis == 1:  # in whole chunks of 16 bytes
        metadata = torch.nn.functional.pad(metadata, (0, -metadata.shape[1] % 8), value=0x4444)
    return {
        "values": engine.put(operand.values), "metadata": engine.put(metadata), "b": engine.put(b), "out": out,
        "workspace": engine.poisoned((size // 4,), torch.float32) if size else None,
        "padded_k": operand.values.shape[operand.axis] * 2, "splits": case.splits, "owned_blocks": case.owned_blocks,
        "cluster_size": case.cluster_size, "out_is_float": case.float_out, "accumulate": case.accumulate,
    }  # fmt: skip


def stored(operand: SparseOperand) -> StoredOperand:
    """A copy of `operand`, row-major, as the backend has it: in the middle of a block."""
    storage, at = Storage.of(operand.axis, *operand.shape), 256
    packed = StoredOperand(operand.values.new_zeros(-(-(at + storage.nbytes) // 2)), storage, at)
    packed.matrices()[1].fill_(0x4444)  # where K is padded further than that of `operand`
    for target, source in zip(packed.matrices(), (operand.values, operand.metadata), strict=True):
        target[: source.shape[0], : source.shape[1]] = source
    return packed


def assert_close(out: Tensor, exact: Tensor, magnitude: Tensor, k: int) -> None:
    """`exact` up to float32 summation of `k` products that sum to `magnitude` in absolute value, rounded once."""
    rounding = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 0.0}[out.dtype]
    allowed = rounding * exact.abs() + 2.0**-23 * (2 + k**0.5) * (1 + rounding) * magnitude + 1e-7
    error = (out.cpu().double() - exact).abs()
    assert (error <= allowed).all(), f"error {error.max():.3e} at {(error > allowed).sum()} places"


def compressed(dy: Tensor, case: Case) -> SparseOperand:
    """dY [T, C], pruned along the axis of the case's pass, as that pass takes it: wgrad's rows in whole chunks."""
    if is_dgrad(case):
        return compress_matrix(dy, 1, k_align=random.choice((64, 128)))
    return compress_matrix(torch.nn.functional.pad(dy, (0, -dy.shape[1] % 8)), 0, k_align=128)


def output(engine: Engine, case: Case, shape: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Where the case writes, poisoned or, to add to, random; and what it holds before (zeros for poison)."""
    dtype = torch.float32 if case.float_out else dtype_of(case)
    if not case.accumulate:
        return engine.poisoned(shape, dtype), torch.zeros(*shape, dtype=dtype)
    before = torch.randn(*shape).to(dtype)
    return engine.put(before), before


def run_gemm(engine: Engine, case: GemmCase, dy: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """The product and what the output held before."""
    out, before = output(engine, case, (case.m, case.n))
    engine.gemm(
        case.instance, m=case.m, n=case.n, k=case.k, group_n=case.group_n,
        **arguments(engine, compressed(dy, case), b, out, case),
    )  # fmt: skip
    return out, before


def gemm_operands(case: GemmCase) -> tuple[Tensor, Tensor, Tensor]:
    """dY, A (dY or its transpose) and B."""
    rows, columns = (case.m, case.k) if is_dgrad(case) else (case.k, case.m)
    dy = sparse_matrix(rows, columns, 1 if is_dgrad(case) else 0, dtype_of(case))
    return dy, dy if is_dgrad(case) else dy.t(), torch.randn(case.k, case.n).to(dtype_of(case))


def check_gemm(engine: Engine, case: GemmCase) -> None:
    """Run a product on fresh operands and compare it with float64."""
    dy, a, b = gemm_operands(case)
    out, before = run_gemm(engine, case, dy, b)
    a, b = a.double(), b.double()
    assert_close(out, a @ b + before.double(), a.abs() @ b.abs() + before.double().abs(), case.k)


def check_repeats(engine: Engine, case: GemmCase) -> None:
    """Two runs on the same operands give the same bits."""
    dy, _, b = gemm_operands(case)
    assert torch.equal(run_gemm(engine, case, dy, b)[0], run_gemm(engine, case, dy, b)[0])


def check_non_finite_row(engine: Engine, instance: str, value: float) -> None:
    """A dgrad whose gradient holds `value` in one row is finite in all the others, and nowhere in that one."""
    case = GemmCase(instance, 40, 24, 72)
    dy, _, b = gemm_operands(case)
    dy[7] = 0
    dy[7, 33] = value
    out, _ = run_gemm(engine, case, dy, b)
    finite = out.cpu().isfinite().all(1)
    assert not out.cpu()[7].isfinite().any()
    assert finite.sum() == case.m - 1


def out_size(case: ConvCase) -> tuple[int, int]:
    """Height and width of y."""
    (_, _, h, w), (_, r, s) = case.x, case.filter
    sizes = zip((h, w), (r, s), case.stride, case.padding, case.dilation, strict=True)
    p, q = ((size + 2 * pad - dilation * (k - 1) - 1) // stride + 1 for size, k, stride, pad, dilation in sizes)
    return p, q


def conv_gradient(case: ConvCase, x: Tensor, weight: Tensor, dy: Tensor) -> Tensor:
    """The slow obvious version, channels last: dX [N, H, W, C_in] or dW [C_out, R, S, C_in]."""
    window = (case.stride, case.padding, case.dilation)
    if is_dgrad(case):
        return torch.nn.grad.conv2d_input(x.shape, weight, dy, *window).permute(0, 2, 3, 1)
    return torch.nn.grad.conv2d_weight(x, weight.shape, dy, *window).permute(0, 2, 3, 1)


def conv_operands(case: ConvCase) -> tuple[Tensor, Tensor, Tensor]:
    """X, the filter and dY [N P Q, C_out]."""
    (batch, c_in, _, _), (c_out, r, s), (p, q) = case.x, case.filter, out_size(case)
    dtype = dtype_of(case)
    dy = sparse_matrix(batch * p * q, c_out, 1 if is_dgrad(case) else 0, dtype)
    return torch.randn(case.x).to(dtype), torch.randn(c_out, c_in, r, s).to(dtype), dy


def run_conv(engine: Engine, case: ConvCase, dy: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """dX or dW, channels last, from dY [N P Q, C_out] and the filter or x, and what the output held before."""
    (batch, c_in, h, w), (c_out, r, s) = case.x, case.filter
    out, before = output(engine, case, (batch, h, w, c_in) if is_dgrad(case) else (c_out, r, s, c_in))
    engine.conv(
        case.instance, shape=(batch, h, w, c_in, *out_size(case), c_out, r, s),
        window=[*case.stride, *case.padding, *case.dilation], group_n=2,
        **arguments(engine, compressed(dy, case), b.permute(0, 2, 3, 1).contiguous(), out, case),
    )  # fmt: skip
    return out, before


def check_conv(engine: Engine, case: ConvCase) -> None:
    """Run a convolution gradient on fresh operands and compare it with float64."""
    (batch, _, _, _), (c_out, r, s), (p, q) = case.x, case.filter, out_size(case)
    x, weight, dy = conv_operands(case)
    out, before = run_conv(engine, case, dy, weight if is_dgrad(case) else x)
    tensors = [t.double() for t in (x, weight, dy.view(batch, p, q, c_out).permute(0, 3, 1, 2))]
    exact, magnitude = conv_gradient(case, *tensors), conv_gradient(case, *(t.abs() for t in tensors))
    terms = c_out * r * s if is_dgrad(case) else batch * p * q
    assert_close(out, exact + before.double(), magnitude + before.double().abs(), terms)


def check_refused(engine: Engine, case: Case) -> None:
    """The launch fails."""
    with pytest.raises(RuntimeError, match=r"status|invalid"):
        check_gemm(engine, case) if isinstance(case, GemmCase) else check_conv(engine, case)
