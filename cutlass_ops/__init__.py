"""The CUDA kernels of sdgp_accel: `kernels()` where they have been built (see `build_kernels`), for `ARCHS`.

Nothing is loaded before it is asked for: an extension that does not load can be built anew.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import importlib.util
import warnings
from pathlib import Path
from typing import Any

# As in SDGP_CUDA_ARCHS at build time; empty, with a warning, where what has been built does not load, and where nothing
# has been built.
ARCHS: tuple[str, ...]


@functools.cache
def kernels() -> Any:
    """The extension module. Raises ModuleNotFoundError where it has not been built."""
    return importlib.import_module("cutlass_ops._C")


@functools.cache
def path() -> Path | None:
    """The extension's file; None where nothing has been built."""
    spec = importlib.util.find_spec("cutlass_ops._C")
    return None if spec is None or spec.origin is None else Path(spec.origin)


@functools.cache
def digest() -> str:
    """Of the extension's file: another for every build that differs. Empty where nothing has been built."""
    file = path()
    return "" if file is None else hashlib.sha256(file.read_bytes()).hexdigest()[:32]


def load_error() -> str:
    """Why the extension that has been built does not load; empty where it does, or where there is none."""
    return _archs_and_error()[1]


@functools.cache
def _archs_and_error() -> tuple[tuple[str, ...], str]:
    try:
        return tuple(kernels().ARCHS.split(";")), ""
    except ModuleNotFoundError:
        return (), ""
    except (ImportError, AttributeError) as error:  # the latter: some other module of that name
        return (), str(error)


def __getattr__(name: str) -> Any:
    if name != "ARCHS":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if load_error():
        warnings.warn(f"the CUDA kernels of sdgp_accel are built but do not load: {load_error()}", stacklevel=2)
    globals()[name] = _archs_and_error()[0]
    return globals()[name]
