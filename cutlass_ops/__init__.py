"""The CUDA kernels of sdgp_accel: `kernels()` where they have been built (see `build_kernels`), for `ARCHS`."""

from __future__ import annotations

import functools
import hashlib
import importlib
import importlib.util
from pathlib import Path
from typing import Any


@functools.cache
def kernels() -> Any:
    """The extension module. Raises ModuleNotFoundError where it has not been built."""
    return importlib.import_module("cutlass_ops._C")


@functools.cache
def digest() -> str:
    """Of the extension's file: another for every build that differs. Empty where nothing has been built."""
    spec = importlib.util.find_spec("cutlass_ops._C")
    if spec is None or spec.origin is None:
        return ""
    return hashlib.sha256(Path(spec.origin).read_bytes()).hexdigest()[:32]


# As in SDGP_CUDA_ARCHS at build time; empty where nothing has been built.
ARCHS: tuple[str, ...] = ()
if importlib.util.find_spec("cutlass_ops._C") is not None:
    ARCHS = tuple(kernels().ARCHS.split(";"))
