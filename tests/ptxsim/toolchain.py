"""Compilers for the tests: nvcc from the system or from PyPI wheels, gcc for the shim, and a cache of what they
made.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sysconfig
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent


def cache_dir() -> Path:
    root = os.environ.get("XDG_CACHE_HOME")
    path = (Path(root) if root else Path.home() / ".cache") / "sdgp_accel" / "ptxsim"
    path.mkdir(parents=True, exist_ok=True)
    return path


@functools.lru_cache(None)
def cuda_home() -> Path | None:
    """The directory with bin/nvcc and include/: $CUDA_HOME, /usr/local/cuda*, nvcc on PATH, or the nvidia/cu13
    wheels.
    """
    candidates = [Path(os.environ[n]) for n in ("CUDA_HOME", "CUDA_PATH") if n in os.environ]
    candidates += [Path("/usr/local/cuda-13.0"), Path("/usr/local/cuda")]
    found = shutil.which("nvcc")
    if found:
        candidates.append(Path(found).resolve().parent.parent)
    candidates += [Path(sysconfig.get_path(name)) / "nvidia" / "cu13" for name in ("purelib", "platlib")]
    return next(
        (c for c in candidates if (c / "bin" / "nvcc").exists() and (c / "include" / "cuda_runtime_api.h").exists()),
        None,
    )


def missing() -> str | None:
    """Why kernels cannot be compiled here, or None."""
    if cuda_home() is None:
        return "no nvcc: install CUDA 13 or the nvidia-cuda-nvcc, -crt, -nvvm, -cccl and -runtime wheels"
    return None if shutil.which("gcc") else "no gcc"


def cutlass_include() -> list[Path]:
    """Include directories of the nvidia-cutlass wheel, empty if it is not installed."""
    spec = importlib.util.find_spec("cutlass_library")
    if spec is None or not spec.submodule_search_locations:
        return []
    root = Path(next(iter(spec.submodule_search_locations))) / "source"
    return [root / "include", root / "tools" / "util" / "include"]


def _run(command: list[str]) -> None:
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{result.stdout[-3000:]}{result.stderr[-5000:]}")


def _build(suffix: str, key: bytes, command: list[str]) -> Path:
    """Runs `command` with its output path appended unless the cache has the result for `key`."""
    digest = hashlib.sha256(key + "\0".join(command).encode()).hexdigest()[:24]
    target = cache_dir() / f"{digest}{suffix}"
    if not target.exists():
        with tempfile.TemporaryDirectory(dir=cache_dir()) as scratch:
            product = Path(scratch) / f"out{suffix}"
            _run([*command, "-o", str(product)])
            product.replace(target)
    return target


@functools.lru_cache(None)
def _nvcc_version() -> str:
    return subprocess.run(
        [str(_home() / "bin" / "nvcc"), "--version"], capture_output=True, text=True, check=True
    ).stdout


def _home() -> Path:
    home = cuda_home()
    if home is None:
        raise RuntimeError(missing())
    return home


def build_library(
    source: Path, arch: str = "80", defines: dict[str, str] | None = None, includes: list[Path] | None = None
) -> Path:
    """A shared library with the PTX of `source` for compute_<arch> and its host code, linked to a shared CUDA
    runtime.
    """
    home = _home()
    command = [
        str(home / "bin" / "nvcc"),
        "-std=c++17",
        "-O3",
        "-shared",
        "-Xcompiler",
        "-fPIC",
        "-cudart",
        "none",
        "-l:libcudart.so.13",  # the wheels have no libcudart.so, which -cudart shared would look for
        "--no-compress",
        "-w",
    ]
    command += ["-gencode", f"arch=compute_{arch},code=compute_{arch}"]
    command += [f"-D{k}={v}" for k, v in (defines or {}).items()]
    for path in includes or []:
        command += ["-I", str(path)]
    command += [f"-L{home / sub}" for sub in ("lib64", "lib") if (home / sub).exists()]
    return _build(".so", source.read_bytes() + _nvcc_version().encode(), [*command, str(source)])


def build_all(jobs: dict[str, Callable[[], Path]]) -> dict[str, Path]:
    """Runs build jobs side by side, one per core."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return dict(zip(jobs, pool.map(lambda job: job(), jobs.values()), strict=True))


def build_shim() -> Path:
    """The stand-in CUDA runtime, soname libptxsim.so.13."""
    source, version_map = HERE / "shim" / "cudart_shim.c", HERE / "shim" / "cudart_shim.map"
    command = ["gcc", "-O1", "-shared", "-fPIC", "-Wall", "-I", str(_home() / "include"), "-Wl,-soname,libptxsim.so.13"]
    command += [f"-Wl,--version-script={version_map}", str(source)]
    return _build(".so", source.read_bytes() + version_map.read_bytes(), command)
