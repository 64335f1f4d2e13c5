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
