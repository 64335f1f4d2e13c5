"""An extension tells what it was built from, so that one built elsewhere is known to fit, or not."""

from __future__ import annotations

import shutil
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


def test_other_sources_and_other_files_are_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "_C.so"
    assert not build_kernels.is_current(file, ("90a",))
    file.write_bytes(b"\x7fELF from before there was a stamp")
    assert not build_kernels.is_current(file, ("90a",))
    sources = shutil.copytree(build_kernels.HERE, tmp_path / "sources", ignore=shutil.ignore_patterns("*.so"))
    monkeypatch.setattr(build_kernels, "HERE", sources)
    file.write_bytes(b"\0" + build_kernels.stamp(("90a",)).encode() + b"\0")
    assert build_kernels.is_current(file, ("90a",))
    header = next((sources / "include").rglob("*.cuh"))
    header.write_text(header.read_text() + "// changed\n")
    assert not build_kernels.is_current(file, ("90a",))


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


def test_neither_asked_for_nor_possible(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SDGP_CUDA", raising=False)
    monkeypatch.setattr(build_kernels, "find_toolkit", lambda: None)
    if Path("/dev/nvidiactl").exists():
        pytest.skip("a GPU is here")
    assert not build_kernels.is_wanted()
    monkeypatch.setenv("SDGP_CUDA", "yes")
    with pytest.raises(build_kernels.BuildError, match="SDGP_CUDA must be 0 or 1; got 'yes'"):
        build_kernels.is_wanted()
