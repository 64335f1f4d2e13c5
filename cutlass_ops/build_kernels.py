"""Builds the extension ``cutlass_ops._C``: finds a CUDA compiler, compiles in parallel, reuses what has not changed.

Run by setup.py, and by hand from the root of a checkout with ``python -m cutlass_ops.build_kernels`` (in place; not
where what is there already was built from these sources for these architectures). Needs nothing of torch, and of this
repository only this folder.

Environment:
    SDGP_CUDA        "1": build, with a compiler from PyPI where there is none. "0": do not. Default: build where an
                     NVIDIA GPU or nvcc is. A build that fails fails the installation.
    SDGP_CUDA_ARCHS  what to build for, separated by ";": "80", "90a", .. for machine code, "compute_80", .. for PTX.
    SDGP_CUDA_CACHE  folder of compiled objects, default ~/.cache/sdgp_accel/objects. Delete it whenever you like.
    CUDA_HOME        the CUDA toolkit to use, before any other. One older than CUDA 12.5 is passed over.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
INSTANCES = HERE / "instances"
INCLUDE = HERE / "include"
DEFAULT_ARCHS = "80;86;89;90a;compute_90"

# With PTX ISA 8.5, which has mma.sp::ordered_metadata, and cudaGetDriverEntryPointByVersion.
OLDEST_CUDA = (12, 5)

# Wheels that together hold nvcc, ptxas and the headers, for machines without a CUDA toolkit.
CUDA_WHEELS = tuple(f"nvidia-{name}==13.0.*" for name in ("cuda-nvcc", "cuda-crt", "nvvm", "cuda-cccl", "cuda-runtime"))

# --no-compress leaves the PTX readable. Cached objects depend on these flags and on the compiler's version.
COMPILE_FLAGS = ("-std=c++20", "-O3", "-Xcompiler", "-fPIC", "-cudart", "shared", "--no-compress")
BINDING_FLAGS = ("-std=c++20", "-O2", "-fPIC", "-fvisibility=hidden")


class BuildError(RuntimeError):
    """The extension cannot be built here; the message says what to do about it."""


@dataclass(frozen=True)
class Toolkit:
    """A CUDA toolkit: a system's, or what the wheels in `CUDA_WHEELS` put in site-packages."""

    home: Path

    @property
    def nvcc(self) -> Path:
        """The compiler."""
        return self.home / "bin" / "nvcc"

    @functools.cached_property
    def version(self) -> str:
        """What nvcc says about itself."""
        return _run([self.nvcc, "--version"])

    @functools.cached_property
    def release(self) -> tuple[int, int]:
        """Of CUDA; (0, 0) where nvcc does not run."""
        try:
            found = re.search(r"release (\d+)\.(\d+)", self.version)
        except BuildError:
            return (0, 0)
        return (int(found[1]), int(found[2])) if found else (0, 0)

    @functools.cached_property
    def runtime(self) -> Path:
        """The shared CUDA runtime to link with: by its soname, because wheels lack the unversioned link."""
        for folder in ("lib64", "lib", "targets/x86_64-linux/lib"):
            for path in sorted((self.home / folder).glob("libcudart.so.*")):
                if path.name.count(".") == 2:
                    return path
        raise BuildError(f"no libcudart.so under {self.home}; install a complete CUDA toolkit or {CUDA_WHEELS[-1]}")


def find_toolkit() -> Toolkit | None:
    """$CUDA_HOME, then nvcc on the PATH, /usr/local/cuda*, and the wheels; the first complete and new enough one."""
    homes = [Path(os.environ[name]) for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    if found := shutil.which("nvcc"):
        homes.append(Path(found).resolve().parent.parent)
    homes += [Path("/usr/local/cuda"), *sorted(Path("/usr/local").glob("cuda-*"), reverse=True)]
    # Not sysconfig: in an isolated build the wheels are on sys.path but not in this interpreter's site-packages.
    homes += [Path(entry) / "nvidia" / "cu13" for entry in sys.path if entry]
    complete = ("bin/nvcc", "include/cuda_runtime_api.h", "include/crt/host_config.h")
    toolkits = (Toolkit(home) for home in homes if all((home / path).exists() for path in complete))
    return next((toolkit for toolkit in toolkits if toolkit.release >= OLDEST_CUDA), None)


def is_wanted() -> bool:
    """Whether to build: SDGP_CUDA, and without it whether this machine has an NVIDIA GPU or a CUDA toolkit."""
    asked = os.environ.get("SDGP_CUDA", "")
    if asked not in ("", "0", "1"):
        raise BuildError(f"SDGP_CUDA must be 0 or 1; got {asked!r}")
    return asked == "1" if asked else Path("/dev/nvidiactl").exists() or find_toolkit() is not None


def requirements() -> list[str]:
    """What a build in an isolated environment needs beside setuptools."""
    if not is_wanted():
        return []
    return ["pybind11>=2.13", *([] if find_toolkit() else CUDA_WHEELS)]


def selected_archs() -> tuple[str, ...]:
    """The architectures of SDGP_CUDA_ARCHS, each once."""
    text = os.environ.get("SDGP_CUDA_ARCHS") or DEFAULT_ARCHS
    archs = tuple(dict.fromkeys(arch.strip() for arch in text.split(";") if arch.strip()))
    for arch in archs or (text,):
        if not re.fullmatch(r"(compute_)?(8[0-9]|9[0-9]a?|1[0-9]{2}[af]?)", arch):
            raise BuildError(
                f"SDGP_CUDA_ARCHS must list architectures from 80 on such as 80;90a or compute_90; got {arch!r}"
            )
    return archs


def archs_of(source: Path, archs: Iterable[str]) -> tuple[str, ...]:
    """Those of `archs` that an instance is compiled for: sm90_*.cu holds instructions that only sm_90a has."""
    return tuple(arch for arch in archs if not source.name.startswith("sm90_") or arch.endswith("90a"))


def build(output: Path, archs: Sequence[str] | None = None, jobs: int | None = None) -> None:
    """Compile every instance and the bindings, and link them into the Python extension `output`.

    archs: as in SDGP_CUDA_ARCHS; default: what that variable says. jobs: compilers at a time, default one per core.

    Raises BuildError where no compiler is found or one fails.
    """
    toolkit = find_toolkit()
    if toolkit is None:
        oldest, wheels = ".".join(map(str, OLDEST_CUDA)), " ".join(map(repr, CUDA_WHEELS))
        raise BuildError(f"no CUDA toolkit of {oldest} or later found: set CUDA_HOME, or pip install {wheels}")
    archs = selected_archs() if archs is None else tuple(archs)
    text = stamp(archs)  # before anything is compiled: sources that change meanwhile make it stale
    # wide_scope_* take longest, several times the others: they start first.
    sources = [source for source in sorted(INSTANCES.glob("*.cu"), reverse=True) if archs_of(source, archs)]
    with ThreadPoolExecutor(jobs or len(os.sched_getaffinity(0))) as pool:
        tasks = [pool.submit(_compile_bindings, toolkit, archs)]
        tasks += [pool.submit(compile_instance, toolkit, source, archs_of(source, archs)) for source in sources]
        try:
            objects = [task.result() for task in tasks]
        except BaseException:
            pool.shutdown(cancel_futures=True)  # not after minutes of compiling what cannot be linked
            raise
    link(toolkit, objects, output, text)


def source_digest() -> str:
    """Of everything in this folder that the extension is made from, and of the flags."""
    digest = hashlib.sha256(" ".join((*COMPILE_FLAGS, *BINDING_FLAGS)).encode())
    for path in sorted(path for path in HERE.rglob("*") if path.suffix in (".cu", ".cuh", ".h", ".cpp")):
        digest.update(f"\0{path.relative_to(HERE).as_posix()}\0".encode() + path.read_bytes())
    return digest.hexdigest()


def stamp(archs: Sequence[str]) -> str:
    """What an extension built for `archs` now ends with, for `is_current` to read."""
    return f"sdgp_accel kernels, sources {source_digest()}, architectures {';'.join(archs)}."


def is_current(extension: Path, archs: Sequence[str]) -> bool:
    """Whether `extension` was built from these sources for at least `archs`, wherever that was done.

    By the stamp at its end, so without loading it, and not by its age, which a copy does not keep. A copy that was cut
    short has none. Python and machine are in its name (`sysconfig`'s EXT_SUFFIX).
    """
    if not extension.is_file():
        return False
    found = re.search(rb"sdgp_accel kernels, sources (\w{64}), architectures ([\w;]+)\.\Z", extension.read_bytes())
    return (
        found is not None and found[1].decode() == source_digest() and set(archs) <= set(found[2].decode().split(";"))
    )


def extension_path() -> Path:
    """Where this interpreter looks for the extension beside this file."""
    return HERE / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"


def compile_instance(toolkit: Toolkit, source: Path, archs: Sequence[str]) -> Path:
    """The object of one instance, from the cache if nothing it depends on has changed."""
    command: list[str | Path] = [toolkit.nvcc, *COMPILE_FLAGS, "-I", INCLUDE]
    for arch in archs:
        virtual = arch if arch.startswith("compute_") else f"compute_{arch}"
        real = arch if arch.startswith("compute_") else f"sm_{arch}"
        command += ["-gencode", f"arch={virtual},code={real}"]
    return _compile(toolkit, [*command, "-c", source], source)


def _compile_bindings(toolkit: Toolkit, archs: Sequence[str]) -> Path:
    spec = importlib.util.find_spec("pybind11")
    if spec is None or spec.origin is None:
        raise BuildError("pybind11 is needed to build the extension: pip install pybind11")
    headers = [Path(spec.origin).parent / "include", Path(sysconfig.get_paths()["include"]), toolkit.home / "include"]
    source = HERE / "bindings.cpp"
    includes = [f"-I{path}" for path in (INCLUDE, *headers)]
    defines = [f'-DSDGP_ARCHS="{";".join(archs)}"']
    return _compile(toolkit, [_host_compiler(), *BINDING_FLAGS, *defines, *includes, "-c", source], source)


def _compile(toolkit: Toolkit, command: Sequence[str | Path], source: Path) -> Path:
    cache = Path(os.environ.get("SDGP_CUDA_CACHE") or Path.home() / ".cache" / "sdgp_accel" / "objects")
    digest = hashlib.sha256(toolkit.version.encode())
    # Paths stay out of it, so that another checkout of the same sources finds the same objects.
    digest.update("\0".join(part for part in command if isinstance(part, str) and not part.startswith("-I")).encode())
    if source.suffix == ".cpp":
        digest.update((sys.version + importlib.metadata.version("pybind11")).encode())
    for path in dependencies(source):
        digest.update(path.read_bytes())
    target = cache / f"{source.stem}-{digest.hexdigest()[:24]}.o"
    if not target.exists():
        try:
            cache.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=cache) as scratch:
                product = Path(scratch) / "object.o"
                _run([*command, "-o", product])
                product.replace(target)
        except OSError as error:
            raise BuildError(f"cannot keep objects in {cache}: {error}; name a folder with SDGP_CUDA_CACHE") from error
    return target


def dependencies(source: Path) -> list[Path]:
    """`source` and, each once, the headers of this project that it includes directly or not."""
    found = [source]
    for path in found:
        for name in re.findall(r'^\s*#include "(sdgp/[^"]+)"', path.read_text(), re.MULTILINE):
            header = INCLUDE / name
            if header not in found:
                found.append(header)
    return found


def link(toolkit: Toolkit, objects: Sequence[Path], output: Path, text: str = "") -> None:
    """Link objects into a shared library that uses the shared CUDA runtime and ends with `text`. All of it or none."""
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent) as scratch:
        product = Path(scratch) / output.name
        command: list[str | Path] = [_host_compiler(), "-shared", "-fPIC", "-o", product, *objects]
        # A torch for the same CUDA has loaded the runtime already. Otherwise it comes from a wheel: beside the
        # installed extension, or in this interpreter's site-packages for one in a checkout.
        for folder in ("$ORIGIN/..", sysconfig.get_path("purelib")):
            command += [f"-Wl,-rpath,{folder}/nvidia/{name}/lib" for name in ("cu13", "cuda_runtime")]
        _run([*command, toolkit.runtime, "-ldl"])
        with product.open("ab") as file:
            file.write(text.encode())
        product.replace(output)


def _host_compiler() -> str:
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        raise BuildError("no C++ compiler found: install g++, or set CXX")
    return compiler


def _run(command: Sequence[str | Path]) -> str:
    try:
        result = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
    except OSError as error:
        raise BuildError(f"cannot run {command[0]}: {error.strerror}") from error
    if result.returncode != 0:
        raise BuildError(f"{' '.join(map(str, command))}\n{(result.stdout + result.stderr)[-4000:]}")
    return result.stdout


if __name__ == "__main__":
    destination = extension_path()
    try:
        if is_current(destination, selected_archs()):
            print(f"{destination} was built from these sources already")
        else:
            build(destination)
            print(destination)
    except BuildError as error:
        raise SystemExit(str(error)) from error
