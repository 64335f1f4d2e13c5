"""The CUDA kernels of sdgp_accel: `_C` where they have been built (see `build`), and for which architectures."""

from __future__ import annotations

import importlib
import importlib.util

ARCHS: tuple[str, ...] = ()

if importlib.util.find_spec("cutlass_ops._C") is not None:
    _C = importlib.import_module("cutlass_ops._C")
    ARCHS = tuple(_C.ARCHS.split(";"))
