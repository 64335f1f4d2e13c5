"""What runs the kernels in these tests: a GPU where there is one, else the PTX simulator. Both have the same
methods.
"""

from __future__ import annotations

import ctypes
import importlib
import importlib.machinery
import importlib.util
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import torch

from cutlass_ops import build_kernels
from tests.ptxsim import toolchain


class GpuEngine:
    """CUDA tensors and the real runtime."""

    name = "gpu"
    device = torch.device("cuda")

    def put(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(self.device).contiguous()

    def empty(self, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=self.device)

    def load(self, path: Path | str) -> ctypes.CDLL:
        return ctypes.CDLL(str(path))

    @contextmanager
    def checked(self) -> Iterator[None]:
        yield
        torch.cuda.synchronize()

    def extension(self) -> ModuleType:
        """The installed extension."""
        return importlib.import_module("cutlass_ops._C")


def missing() -> str | None:
    """Why no engine can run kernels here, or None."""
    if torch.cuda.is_available():
        return (
            None
            if importlib.util.find_spec("cutlass_ops._C")
            else "cutlass_ops is not built: SDGP_CUDA=1 pip install ."
        )
    if importlib.util.find_spec("pybind11") is None:
        return "no pybind11"
    return toolchain.missing()


def build_simulated_extension() -> Path:
    """The extension with PTX for sm_80 only: what the simulator loads."""
    path = toolchain.cache_dir() / "extension" / f"_C{importlib.machinery.EXTENSION_SUFFIXES[0]}"
    build_kernels.build(path, ["compute_80"])
    return path


def build_instances(names: list[str], arch: str) -> Path:
    """A C library of a few instances, for PTX of `arch` (simulator) or machine code of it (GPU)."""
    toolkit = build_kernels.find_toolkit()
    assert toolkit is not None
    objects = [build_kernels.compile_instance(toolkit, build_kernels.INSTANCES / f"{n}.cu", (arch,)) for n in names]
    library = toolchain.cache_dir() / ("-".join(o.stem[-12:] for o in objects) + ".so")
    if not library.exists():
        partial = library.with_suffix(".partial")
        subprocess.run(["g++", "-shared", "-o", partial, *objects, toolkit.runtime], check=True)
        partial.replace(library)
    return library
