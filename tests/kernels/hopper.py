"""The Hopper products in tests: one interface to the real GPU and to the simulator.

The simulator runs instances one by one, compiled to PTX; a GPU runs those of the built extension.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import subprocess
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

import cutlass_ops
from cutlass_ops import build_kernels

_POINTERS = ("values", "metadata", "b", "out", "workspace")
_LAUNCH = ("padded_k", "splits", "group_n", "cluster_size", "sm_count", "out_is_float", "accumulate")
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

    SM_COUNT = 4

    def __init__(self) -> None:
        from tests.ptxsim.engine import SimEngine

        self._engine = SimEngine((9, 0))

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

    def gemm(self, name: str, **arguments: Any) -> None:
        self._launch(name, GemmArguments, arguments)

    def conv(self, name: str, *, shape: Sequence[int], window: Sequence[int], **arguments: Any) -> None:
        sizes = dict(zip((*_SHAPE, *_WINDOW), (*shape, *window), strict=True))
        self._launch(name, ConvArguments, sizes | arguments)

    def _launch(self, name: str, structure: type[ctypes.Structure], arguments: dict[str, Any]) -> None:
        function = getattr(self._engine.load(simulated_library(name)), f"sdgp_{name}")
        addresses = {key: x.data_ptr() if isinstance(x, Tensor) else x for key, x in arguments.items()}
        with self._engine.checked():
            status = function(ctypes.byref(structure(sm_count=self.SM_COUNT, **addresses)))
        if status:
            raise RuntimeError(f"{name}: status {status}")


class SimulatedKernels:
    """What the backend uses of `cutlass_ops.kernels()`, run on the simulator on ordinary CPU tensors."""

    def __init__(self, engine: SimulatorEngine) -> None:
        self._engine = engine

    def sparse_gemm(self, name: str, **arguments: Any) -> None:
        m, n, k = (arguments[size] for size in "mnk")
        with self._visible(m, m * n, k * n, arguments):
            self._engine.gemm(name.removeprefix("sdgp_"), **arguments)

    def sparse_conv(self, name: str, **arguments: Any) -> None:
        batch, h, w, c_in, p, q, c_out, r, s = arguments["shape"]
        x, weight = batch * h * w * c_in, c_out * r * s * c_in
        is_dgrad = "dgrad" in name
        sizes = (batch * p * q, x, weight) if is_dgrad else (c_out, weight, x)
        with self._visible(*sizes, arguments):
            self._engine.conv(name.removeprefix("sdgp_"), **arguments)

    @contextlib.contextmanager
    def _visible(self, rows: int, out: int, b: int, arguments: dict[str, Any]) -> Iterator[None]:
        """The tensors' exact bytes are the only memory that kernels may touch; counts are elements, rows those of A."""
        assert arguments.pop("sm_count") == self._engine.SM_COUNT
        stored = rows * arguments["padded_k"]
        sizes = {
            "values": stored, "metadata": stored // 8, "b": 2 * b, "out": out * (4 if arguments["out_is_float"] else 2),
            "workspace": 4 * arguments["splits"] * out,
        }  # fmt: skip
        addresses = {arguments[name]: size for name, size in sizes.items() if arguments[name]}
        for address, size in addresses.items():
            self._engine.register(address, size)
        try:
            yield
        finally:
            for address in addresses:
                self._engine.unregister(address)


class GpuEngine:
    """The built extension on the current CUDA device."""

    GUARD = 1024  # elements before and after an output

    def __init__(self) -> None:
        self._outputs: list[tuple[Tensor, int]] = []
        self._sm_count = torch.cuda.get_device_properties(0).multi_processor_count

    def put(self, tensor: Tensor) -> Tensor:
        return tensor.cuda()

    def poisoned(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        size = torch.Size(shape).numel()
        buffer = torch.full((size + 2 * self.GUARD,), float("nan"), dtype=dtype, device="cuda")
        self._outputs.append((buffer, size))
        return buffer[self.GUARD : self.GUARD + size].view(*shape)

    def gemm(self, name: str, **arguments: Any) -> None:
        self._launch(cutlass_ops.kernels().sparse_gemm, name, arguments)

    def conv(self, name: str, *, shape: Sequence[int], window: Sequence[int], **arguments: Any) -> None:
        arguments |= {"shape": list(shape), "window": list(window)}
        self._launch(cutlass_ops.kernels().sparse_conv, name, arguments)

    def _launch(self, function: Any, name: str, arguments: dict[str, Any]) -> None:
        addresses = {key: x.data_ptr() if isinstance(x, Tensor) else x for key, x in arguments.items() if x is not None}
        function(f"sdgp_{name}", sm_count=self._sm_count, **addresses)
        torch.cuda.synchronize()
        for buffer, size in self._outputs:
            assert buffer[: self.GUARD].isnan().all(), "written before an output"
            assert buffer[self.GUARD + size :].isnan().all(), "written behind an output"


@functools.cache
def simulated_library(name: str) -> Path:
    """A shared library with the PTX of one instance, linked to the shared CUDA runtime."""
    toolkit = build_kernels.find_toolkit()
    assert toolkit is not None
    source = build_kernels.INSTANCES / f"{name}.cu"
    compiled = build_kernels.compile_instance(toolkit, source, ("compute_90a",))
    library = compiled.with_suffix(".so")
    if not library.exists():
        partial = library.with_suffix(".so.partial")
        subprocess.run(["g++", "-shared", "-o", partial, compiled, toolkit.runtime], check=True)
        partial.replace(library)
    return library


def compile_for_simulator(names: Sequence[str]) -> None:
    """Fill the cache of `simulated_library`, two compilers at a time."""
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(simulated_library, names))
