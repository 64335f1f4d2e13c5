"""An extension tells what it was built from, so that one built elsewhere is known to fit, or not."""

from __future__ import annotations

import ctypes
import importlib
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from cutlass_ops import build_kernels


def test_an_extension_of_these_sources_is_current_wherever_it_lies(tmp_path: Path) -> None:
    toolkit = build_kernels.find_toolkit()
    if toolkit is None or shutil.which("g++") is None:
        pytest.skip("needs a CUDA toolkit and g++")
    built = tmp_path / "_C.so"
    build_kernels.link(toolkit, [], built, build_kernels.stamp(("80", "90a")))
    copy = shutil.copy(built, tmp_path / "elsewhere.so")
    for archs, expected in {("90a",): True, ("80", "90a"): True, ("89",): False, ("90a", "89"): False}.items():
        assert build_kernels.is_current(Path(copy), archs) is expected
    ctypes.CDLL(copy)
    # Where pip puts the CUDA runtime that torch may not bring.
    for folder in ("$ORIGIN/..", sysconfig.get_path("purelib")):
        for name in ("cu13", "cuda_runtime"):
            assert f"{folder}/nvidia/{name}/lib".encode() in built.read_bytes()
    cut = tmp_path / "cut.so"  # not the copy itself, which this process has mapped and unloads when it ends
    cut.write_bytes(built.read_bytes()[:-1])
    assert not build_kernels.is_current(cut, ("90a",))
    with pytest.raises(build_kernels.BuildError):
        build_kernels.link(toolkit, [tmp_path / "no_such.o"], built)
    assert build_kernels.is_current(built, ("90a",))  # what failed has not touched it
    assert {path.name for path in tmp_path.iterdir()} == {"_C.so", "elsewhere.so", "cut.so"}


def test_other_sources_and_other_files_are_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "_C.so"
    assert not build_kernels.is_current(file, ("90a",))
    file.write_bytes(b"\x7fELF from before there was a stamp")
    assert not build_kernels.is_current(file, ("90a",))
    sources = shutil.copytree(build_kernels.HERE, tmp_path / "sources", ignore=shutil.ignore_patterns("*.so"))
    monkeypatch.setattr(build_kernels, "HERE", sources)
    file.write_bytes(b"\0" + build_kernels.stamp(("90a",)).encode())
    assert build_kernels.is_current(file, ("90a",))
    header = next((sources / "include").rglob("*.cuh"))
    header.write_text(header.read_text() + "// changed\n")
    assert not build_kernels.is_current(file, ("90a",))


def test_objects_are_compiled_anew_where_something_they_are_made_of_has_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("pybind11")
    nvcc, calls = tmp_path / "bin" / "nvcc", tmp_path / "calls"
    nvcc.parent.mkdir()
    version = tmp_path / "version"
    version.write_text("13.0")
    nvcc.write_text(
        f"#!/bin/sh\nfor last; do :; done\n"
        f"if [ $1 = --version ]; then cat {version}; else echo $* >> {calls}; echo $last > $last; fi\n"
    )
    nvcc.chmod(0o755)
    include, source = tmp_path / "include", tmp_path / "one.cu"
    (include / "sdgp").mkdir(parents=True)
    source.write_text('#include "sdgp/near.cuh"\n')
    (include / "sdgp" / "near.cuh").write_text('#include "sdgp/far.cuh"\n')
    (include / "sdgp" / "far.cuh").write_text("// far\n")
    monkeypatch.setattr(build_kernels, "INCLUDE", include)
    monkeypatch.setenv("SDGP_CUDA_CACHE", str(tmp_path / "objects"))

    def compile_now(*archs: str) -> tuple[Path, int]:
        """The object, and how often nvcc has been called for all so far."""
        product = build_kernels.compile_instance(build_kernels.Toolkit(tmp_path), source, archs)
        return product, len(calls.read_text().splitlines())

    first, _ = compile_now("80")
    assert compile_now("80") == (first, 1)
    assert compile_now("90a")[1] == 2
    (include / "sdgp" / "far.cuh").write_text("// farther\n")
    assert compile_now("80")[1] == 3
    (include / "sdgp" / "far.cuh").write_text("// far\n")
    assert compile_now("80") == (first, 3)
    version.write_text("13.1")
    assert compile_now("80")[1] == 4
    version.write_text("13.0")
    assert compile_now("80", "90a", "compute_90")[1] == 5
    code = [word for word in calls.read_text().splitlines()[-1].split() if word.startswith("arch=")]
    assert code == ["arch=compute_80,code=sm_80", "arch=compute_90a,code=sm_90a", "arch=compute_90,code=compute_90"]

    # The bindings, by a host compiler that is this one: for their architectures and for this Python.
    monkeypatch.setenv("CXX", str(nvcc))
    monkeypatch.setattr(build_kernels, "INCLUDE", build_kernels.HERE / "include")

    def bindings() -> tuple[Path, int]:
        product = build_kernels._compile_bindings(build_kernels.Toolkit(tmp_path), ("80", "90a"))
        return product, len(calls.read_text().splitlines())

    before, _ = bindings()
    assert '-DSDGP_ARCHS="80;90a"' in calls.read_text().splitlines()[-1]
    assert bindings() == (before, 6)
    monkeypatch.setattr(sys, "version", "another")
    assert bindings()[1] == 7


def test_a_compiler_that_fails_is_quoted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nvcc, source = tmp_path / "bin" / "nvcc", tmp_path / "one.cu"
    nvcc.parent.mkdir()
    nvcc.write_text("#!/bin/sh\n[ $1 = --version ] || { echo first; echo second >&2; exit 3; }\n")
    nvcc.chmod(0o755)
    source.touch()
    monkeypatch.setenv("SDGP_CUDA_CACHE", str(tmp_path / "objects"))
    with pytest.raises(build_kernels.BuildError, match=rf"{nvcc} .*{source}[^$]*first\nsecond"):
        build_kernels.compile_instance(build_kernels.Toolkit(tmp_path), source, ("80",))
    assert not list((tmp_path / "objects").iterdir())


def test_only_hopper_gets_the_kernels_that_only_hopper_has() -> None:
    archs = ("80", "90a", "compute_90", "compute_90a")
    assert build_kernels.archs_of(Path("sm90_dgrad.cu"), archs) == ("90a", "compute_90a")
    assert build_kernels.archs_of(Path("sm80_dgrad.cu"), archs) == archs


@pytest.mark.parametrize("content", [b"", b"not an extension"])
def test_an_extension_that_does_not_load_is_left_out_and_can_be_built_anew(tmp_path: Path, content: bytes) -> None:
    package = tmp_path / "cutlass_ops"
    shutil.copytree(build_kernels.HERE, package, ignore=shutil.ignore_patterns("*.so"))
    (package / build_kernels.extension_path().name).write_bytes(content)

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        environment = os.environ | {"PYTHONPATH": str(tmp_path), "SDGP_CUDA_ARCHS": "no_such"}
        command = [sys.executable, *arguments]
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)

    used = run("-c", "import cutlass_ops; print(cutlass_ops.ARCHS, cutlass_ops.ARCHS, cutlass_ops.load_error())")
    assert used.stdout.startswith("() () ")
    assert len(used.stdout) > len("() () \n")
    assert used.stderr.count("are built but do not load") == 1
    rebuilt = run("-m", "cutlass_ops.build_kernels")  # as far as its own checks
    assert rebuilt.returncode == 1
    assert rebuilt.stderr.startswith("SDGP_CUDA_ARCHS must list architectures")
    assert rebuilt.stderr.count("\n") == 1


def test_a_build_by_hand_leaves_alone_what_is_current(tmp_path: Path) -> None:
    package = tmp_path / "cutlass_ops"
    shutil.copytree(build_kernels.HERE, package, ignore=shutil.ignore_patterns("*.so"))
    extension = package / build_kernels.extension_path().name
    extension.write_bytes(b"\0" + build_kernels.stamp(("80", "90a")).encode())
    before = extension.read_bytes()
    command = [sys.executable, "cutlass_ops/build_kernels.py"]
    environment = os.environ | {"SDGP_CUDA_ARCHS": "90a", "CXX": "/no/such/compiler"}
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    assert result.stdout == f"{extension} was built from these sources already\n"
    assert extension.read_bytes() == before


@pytest.mark.parametrize(
    ("asked", "code", "message"),
    [("0", 0, "sdgp_accel: without its CUDA kernels (SDGP_CUDA=0)"),
     ("1", 1, "\n\nsdgp_accel: SDGP_CUDA=0 installs it without its CUDA kernels")],
)  # fmt: skip
def test_an_installation_says_how_to_do_without_kernels(tmp_path: Path, asked: str, code: int, message: str) -> None:
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(build_kernels.HERE.parent / name, tmp_path)
    shutil.copytree(build_kernels.HERE, tmp_path / "cutlass_ops", ignore=shutil.ignore_patterns("*.so"))
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    environment = os.environ | {"SDGP_CUDA": asked, "SDGP_CUDA_ARCHS": "no_such", "CXX": "/no/such/compiler"}
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == code, result.stderr
    assert message in result.stderr
    assert ("SDGP_CUDA_ARCHS must list" in result.stderr or "no CUDA toolkit" in result.stderr) is (asked == "1")


@pytest.mark.parametrize("kind", ["wheel", "editable"])
def test_pip_is_asked_for_a_compiler_where_there_is_none(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(build_kernels.HERE)
    backend = importlib.import_module("build_backend")
    name = f"get_requires_for_build_{kind}"
    monkeypatch.setattr(backend.build_meta, name, lambda settings: [settings])
    monkeypatch.setattr(backend.build_kernels, "requirements", lambda: ["a compiler"])
    assert getattr(backend, name)("what setuptools needs") == ["what setuptools needs", "a compiler"]


@pytest.mark.parametrize("text", [";", " ; ", "70", "sm_80", "80,90a", "80 90a", "compute_70", "native", "80;x"])
def test_architectures_that_are_none_are_refused(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("SDGP_CUDA_ARCHS", text)
    with pytest.raises(build_kernels.BuildError, match="SDGP_CUDA_ARCHS must list architectures"):
        build_kernels.selected_archs()
    monkeypatch.setenv("SDGP_CUDA_ARCHS", " 80 ;90a; 80;")
    assert build_kernels.selected_archs() == ("80", "90a")


def test_what_the_environment_breaks_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("pybind11")
    toolkit = build_kernels.find_toolkit()
    if toolkit is None:
        pytest.skip("needs a CUDA toolkit")
    not_a_folder = tmp_path / "file"
    not_a_folder.touch()
    monkeypatch.setenv("SDGP_CUDA_CACHE", str(not_a_folder))
    with pytest.raises(build_kernels.BuildError, match=rf"{not_a_folder}.*SDGP_CUDA_CACHE"):
        build_kernels.build(tmp_path / "_C.so", ("80",), jobs=1)
    monkeypatch.setenv("CXX", "/no/such/compiler")
    with pytest.raises(build_kernels.BuildError, match="cannot run /no/such/compiler"):
        build_kernels.link(toolkit, [], tmp_path / "_C.so")


@pytest.mark.parametrize(("asked", "toolkit", "wanted"), [("", True, True), ("0", True, False), ("1", False, True)])
def test_built_when_asked_or_where_nvcc_is(
    asked: str, toolkit: bool, wanted: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("SDGP_CUDA", asked)
    monkeypatch.setattr(build_kernels, "find_toolkit", lambda: build_kernels.Toolkit(tmp_path) if toolkit else None)
    assert build_kernels.is_wanted() is wanted
    needed = build_kernels.requirements()
    assert any(name.startswith("pybind11") for name in needed) is wanted
    assert (build_kernels.CUDA_WHEELS[0] in needed) is (wanted and not toolkit)


def test_a_toolkit_that_is_too_old_is_passed_over(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def install(name: str, version: str) -> Path:
        home = tmp_path / name
        for path in ("bin/nvcc", "include/cuda_runtime_api.h", "include/crt/host_config.h"):
            (home / path).parent.mkdir(parents=True, exist_ok=True)
            (home / path).touch()
        (home / "bin/nvcc").write_text(f"#!/bin/sh\necho '{version}'\n")
        (home / "bin/nvcc").chmod(0o755)
        return home

    old = install("old", "Cuda compilation tools, release 12.4, V12.4.131")
    new = install("new", "Cuda compilation tools, release 12.10, V12.10.1")
    broken, oldest = install("broken", "no version"), install("oldest", "release 12.5, V12.5.1")
    monkeypatch.setenv("CUDA_HOME", str(old))
    monkeypatch.setenv("CUDA_PATH", str(new))
    assert build_kernels.find_toolkit() == build_kernels.Toolkit(new)
    monkeypatch.setenv("CUDA_HOME", str(broken))
    assert build_kernels.find_toolkit() == build_kernels.Toolkit(new)
    monkeypatch.setenv("CUDA_HOME", str(oldest))
    assert build_kernels.find_toolkit() == build_kernels.Toolkit(oldest)
    for needed in ("include/crt/host_config.h", "include/cuda_runtime_api.h"):  # of packages that may be left out
        (oldest / needed).rename(tmp_path / "away")
        assert build_kernels.find_toolkit() == build_kernels.Toolkit(new)
        (tmp_path / "away").rename(oldest / needed)


def test_neither_asked_for_nor_possible(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SDGP_CUDA", raising=False)
    monkeypatch.setattr(build_kernels, "find_toolkit", lambda: None)
    if Path("/dev/nvidiactl").exists():
        pytest.skip("a GPU is here")
    assert not build_kernels.is_wanted()
    monkeypatch.setenv("SDGP_CUDA", "yes")
    with pytest.raises(build_kernels.BuildError, match="SDGP_CUDA must be 0 or 1; got 'yes'"):
        build_kernels.is_wanted()
