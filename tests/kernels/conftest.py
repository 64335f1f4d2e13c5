"""One suite of kernel tests, two engines: a GPU where there is one, else the PTX simulator. Both run the shipping
extension; the simulator's is built with the PTX of its kernels."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from cutlass_ops import build_kernels


class GpuEngine:
    """The installed extension on the current GPU."""

    name = "gpu"
    large = True

    def __init__(self) -> None:
        import cutlass_ops

        if not cutlass_ops.ARCHS:
            pytest.skip("the extension is not built: python -m cutlass_ops.build_kernels")
        self.kernels: Any = cutlass_ops.kernels()

    def put(self, tensor: torch.Tensor) -> torch.Tensor:
        """A copy of `tensor` that kernels can read and write."""
        return tensor.cuda()

    def empty(self, *shape: int, dtype: torch.dtype) -> torch.Tensor:
        """Memory of which every byte is to be written."""
        return torch.empty(shape, dtype=dtype, device="cuda")

    @contextlib.contextmanager
    def launching(self, stream: int = 0) -> Iterator[None]:
        """Around calls of `kernels` in a stream; waits for them and raises what went wrong."""
        yield
        torch.cuda.synchronize()


class SimulatorEngine:
    """The extension's PTX on the CPU, with every access checked."""

    name = "sim"
    large = False
    arch = "compute_80"

    def __init__(self) -> None:
        from tests.ptxsim import toolchain
        from tests.ptxsim.engine import SimEngine

        if reason := toolchain.missing():
            pytest.skip(reason)
        self._sim = SimEngine((8, 0))
        # Everything is cached by content; linking the objects anew takes half a second.
        path = toolchain.cache_dir() / f"kernels-{os.getpid()}" / "_C.so"
        build_kernels.build(path, (self.arch,))
        self.kernels: Any = self._sim.load_module(path, "_C")
        _remove(path)

    def put(self, tensor: torch.Tensor) -> torch.Tensor:
        """A copy of `tensor` that kernels can read and write."""
        if tensor.is_contiguous():
            return self._sim.put(tensor)
        base = self._sim.put(tensor.as_strided((tensor.untyped_storage().nbytes() // tensor.itemsize,), (1,), 0))
        return base.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())

    def empty(self, *shape: int, dtype: torch.dtype) -> torch.Tensor:
        """Memory of which every byte is to be written."""
        return self._sim.empty(*shape, dtype=dtype)

    @contextlib.contextmanager
    def launching(self, stream: int = 0) -> Iterator[None]:
        """Around calls of `kernels` in a stream; raises what the simulator found."""
        runtime = self._sim.runtime
        runtime.queue.clear()
        first = len(runtime.launches)
        with self._sim.checked():
            yield
        assert all(where == stream for _, where in runtime.queue), "something was put into another stream"
        assert not any(launch.holds_gil for launch in runtime.launches[first:]), "a launch held the GIL"

    def traffic(self) -> tuple[int, int]:
        """Bytes that kernels have read from and written to global memory since the last call."""
        counters = self._sim.counters()
        return counters.global_load, counters.global_store


def _remove(path: Path) -> None:
    path.unlink()
    path.parent.rmdir()


ENGINES = {"gpu": GpuEngine} if torch.cuda.is_available() else {"sim": SimulatorEngine}
Engine = GpuEngine | SimulatorEngine


@pytest.fixture(scope="session", params=list(ENGINES))
def engine(request: pytest.FixtureRequest) -> Engine:
    """What runs the kernels here; its name is in the test's id."""
    return ENGINES[request.param]()
