"""The CUDA kernels of sdgp_accel: `kernels()` where they have been built (see `build_kernels`), for `ARCHS`."""

from __future__ import annotations

import functools
import importlib
import importlib.util
from typing import Any


@functools.cache
def kernels() -> Any:
    """The extension module. Raises ModuleNotFoundError where it has not been built."""
    return importlib.import_module("cutlass_ops._C")


# As in SDGP_CUDA_ARCHS at build time; empty where nothing has been built.
ARCHS: tuple[str, ...] = ()
if importlib.util.find_spec("cutlass_ops._C") is not None:
    ARCHS = tuple(kernels().ARCHS.split(";"))
