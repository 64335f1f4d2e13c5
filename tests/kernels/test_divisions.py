"""The kernels' branch-free divisions against IEEE's, for every pair of mantissas that can reach them or very many: a
GPU's work; and those of indices, on the host.
"""

from __future__ import annotations

import ctypes
import subprocess
from pathlib import Path

import pytest
import torch

from cutlass_ops import build_kernels


def test_divisions_round_like_ieee(engine, tmp_path):
    if not engine.large:
        pytest.skip("34 billion divisions are too many for the simulator")
    toolkit = build_kernels.find_toolkit()
    if toolkit is None:
        pytest.skip("no CUDA toolkit to compile the check with")
    library = tmp_path / "divisions.so"
    source = Path(__file__).with_name("divisions.cu")
    build_kernels.link(toolkit, [build_kernels.compile_instance(toolkit, source, ("80", "compute_80"))], library)
    counts = engine.put(torch.zeros(3, dtype=torch.int64))
    assert ctypes.CDLL(str(library)).sdgp_count_division_differences(ctypes.c_void_p(counts.data_ptr())) == 0
    assert counts.tolist() == [0, 0, 0]


def test_indices_are_divided_exactly(tmp_path):
    toolkit = build_kernels.find_toolkit()
    if toolkit is None:
        pytest.skip("no CUDA headers")
    program, source = tmp_path / "index_divisions", Path(__file__).with_name("index_divisions.cpp")
    includes = [f"-I{path}" for path in (build_kernels.INCLUDE, toolkit.home / "include")]
    subprocess.run(["g++", "-std=c++20", "-O2", *includes, source, "-o", program], check=True)
    result = subprocess.run([program], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout
