"""The simulator against kernels that are not ours: CUTLASS's sm_80 sparse GEMM, dense GEMM and convolution dgrad.

Each is compiled from the nvidia-cutlass wheel, launched by its own host code and compared with float64. The bound is
a few float32 roundings of a sum of |a b|: a wrong metadata, fragment or swizzle rule is off by O(1).

Two habits of these kernels are not faults in them but would be in ours, so they are allowed for here: pipelines that
load shared-memory tiles no copy has filled (values unused; `poisoned_shared`), and all-zero metadata in the rows past
M (sizes here are multiples of the tile).
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from .toolchain import HERE, build_all, build_library, cutlass_include

pytestmark = [
    pytest.mark.skipif(not cutlass_include(), reason="no CUTLASS headers: pip install nvidia-cutlass==4.2.0.0"),
    pytest.mark.timeout(1800),  # the first test compiles for all
]

PAIRS = np.array([(0, 1), (0, 2), (1, 2), (0, 3), (1, 3), (2, 3)])
SPARSE = {  # name: torch type, ELEMENT, OUT, layouts of A and B, k tile, k of the instruction
    "f16-row-col": (torch.float16, "half_t", "float", "RowMajor", "ColumnMajor", 64, 32),
    "f16-col-row": (torch.float16, "half_t", "float", "ColumnMajor", "RowMajor", 64, 32),
    "bf16-row-row": (torch.bfloat16, "bfloat16_t", "float", "RowMajor", "RowMajor", 64, 32),
    "bf16-col-col": (torch.bfloat16, "bfloat16_t", "float", "ColumnMajor", "ColumnMajor", 64, 32),
    "tf32-row-col": (torch.float32, "tfloat32_t", "float", "RowMajor", "ColumnMajor", 32, 16),
    "s8-row-col": (torch.int8, "int8_t", "int32_t", "RowMajor", "ColumnMajor", 128, 64),
}


SWIZZLES = {
    "kUnity": "cutlass::gemm::threadblock::GemmIdentityThreadblockSwizzle<>",
    "kStrided": "cutlass::conv::threadblock::StridedDgradIdentityThreadblockSwizzle<1>",
}


def _jobs() -> dict[str, Callable[[], Path]]:
    def job(source: str, **defines: str) -> Callable[[], Path]:
        return lambda: build_library(HERE / "kernels" / source, defines=defines, includes=cutlass_include())

    jobs = {"dense": job("cutlass_dense_gemm.cu")}
    for strides, swizzle in SWIZZLES.items():
        jobs[strides] = job("cutlass_dgrad.cu", STRIDES=strides, SWIZZLE=swizzle)
    for case, (dtype, element, out, layout_a, layout_b, tile_k, mma_k) in SPARSE.items():
        jobs[case] = job(
            "cutlass_sparse_gemm.cu",
            ELEMENT=element if dtype == torch.int8 else f"cutlass::{element}",
            OUT=out,
            LAYOUT_A=layout_a,
            LAYOUT_B=layout_b,
            TILE_K=str(tile_k),
            MMA_K=str(mma_k),
        )
    return jobs


@pytest.fixture(scope="module")
def libraries(sim) -> dict[str, ctypes.CDLL]:
    return {name: sim.load(path) for name, path in build_all(_jobs()).items()}


def _values(generator: np.random.Generator, dtype: torch.dtype, *shape: int) -> torch.Tensor:
    if dtype == torch.int8:
        return torch.from_numpy(generator.integers(-128, 128, shape, dtype=np.int8))
    x = torch.from_numpy(generator.standard_normal(shape).astype(np.float32))
    # tf32 has 10 mantissa bits, like float16.
    return x.half().float() if dtype == torch.float32 else x.to(dtype)


def _selectors(generator: np.random.Generator, m: int, k: int, single: bool) -> tuple[np.ndarray, np.ndarray]:
    """Random k positions [m, k/2] of the kept values, and the metadata as 16-bit pieces [m, ...], four nibbles each."""
    if single:
        choice = generator.integers(0, 2, (m, k // 2))
        nibbles = np.where(choice, 0b1110, 0b0100)
        positions = 2 * np.arange(k // 2) + choice
    else:
        pairs = PAIRS[generator.integers(0, 6, (m, k // 4))]
        nibbles = pairs[..., 0] | pairs[..., 1] << 2
        positions = (4 * np.arange(k // 4)[:, None] + pairs).reshape(m, -1)
    packed = nibbles.reshape(m, -1, 4) << np.array([0, 4, 8, 12])
    return positions, packed.sum(axis=2).astype(np.uint16)


@pytest.mark.parametrize("case", SPARSE)
def test_sparse_gemm(sim, libraries, case):
    from .engine import pointer

    dtype, _, _, layout_a, layout_b, tile_k, mma_k = SPARSE[case]
    lib = libraries[case]
    generator = np.random.default_rng()
    m, n, k = 128, 80, 3 * tile_k
    a, b = _values(generator, dtype, m, k // 2), _values(generator, dtype, k, n)
    positions, selectors = _selectors(generator, m, k, dtype == torch.float32)
    dense = torch.zeros(m, k, dtype=torch.float64).scatter_(1, torch.from_numpy(positions), a.double())

    metadata = torch.from_numpy(selectors.view(np.int16))
    assert lib.words(k) * (4 if dtype == torch.int8 else 2) == selectors.shape[1] * 2
    if dtype != torch.float32:  # CUTLASS's host function has no tf32
        expanded = torch.zeros(m, k, dtype=dtype)
        lib.uncompress(m, k, pointer(a), pointer(metadata), pointer(expanded))
        assert torch.equal(expanded.double(), dense), "our reading of the metadata differs from CUTLASS's"
    reordered = sim.empty(*metadata.shape, dtype=torch.int16)
    lib.reorder(m, k, pointer(metadata), pointer(reordered))
    sim.initialised(reordered)

    da = sim.put(a if layout_a == "RowMajor" else a.t().contiguous())
    db = sim.put(b if layout_b == "RowMajor" else b.t().contiguous())
    d = sim.empty(m, n, dtype=torch.int32 if dtype == torch.int8 else torch.float32)
    sim.counters()
    with sim.checked(), sim.poisoned_shared():
        lda, ldb = (k // 2 if layout_a == "RowMajor" else m), (n if layout_b == "RowMajor" else k)
        status = lib.run(m, n, k, pointer(da), lda, pointer(db), ldb, pointer(d), pointer(reordered))
    assert status == 0
    counters = sim.counters()
    assert counters.mma_sparse == (m // 16) * (128 // 8) * (k // mma_k)  # n is padded to the tile
    reference, scale = dense @ b.double(), dense.abs() @ b.double().abs()
    error = ((d.double() - reference).abs() / scale).max().item()
    print(f"{case}: error / sum|ab| = {error:.1e}")
    assert error <= (0 if dtype == torch.int8 else 2.0**-22)


@pytest.mark.parametrize("flip", [0b1000, 0b0001], ids=["legal", "illegal"])
def test_one_wrong_metadata_bit(sim, libraries, flip):
    """0100 (keep 0 and 1) becomes 1100 (keep 0 and 3): only the numbers can tell. 0101 is a fault."""
    from .engine import pointer
    from .faults import SimError

    dtype = torch.float16
    lib = libraries["f16-row-col"]
    m, n, k = 64, 64, 64
    generator = np.random.default_rng()
    a, b = _values(generator, dtype, m, k // 2), _values(generator, dtype, n, k)
    metadata = torch.full((m, k // 16), 0x4444, dtype=torch.int16)
    dense = torch.zeros(m, k // 4, 4, dtype=torch.float64)
    dense[:, :, :2] = a.double().view(m, k // 4, 2)
    metadata[37, 2] ^= flip
    reordered, d = sim.empty(m, k // 16, dtype=torch.int16), sim.empty(m, n)
    lib.reorder(m, k, pointer(metadata), pointer(reordered))
    sim.initialised(reordered)
    da, db = sim.put(a), sim.put(b)

    def launch() -> None:
        with sim.checked(), sim.poisoned_shared():
            lib.run(m, n, k, pointer(da), k // 2, pointer(db), k, pointer(d), pointer(reordered))

    if flip == 1:
        with pytest.raises(SimError, match="illegal-metadata: nibble 0101 for row 5"):
            launch()
        return
    launch()
    wrong = (d.double() - dense.view(m, k) @ b.double().t()).abs() > 1e-3
    assert wrong.any(dim=1).nonzero().flatten().tolist() == [37]


@pytest.mark.parametrize("splits", [1, 3])
def test_dense_gemm(sim, libraries, splits):
    """Three slices of k take turns at the output through a semaphore: CTAs that spin for each other."""
    from .engine import pointer

    lib = libraries["dense"]
    generator = np.random.default_rng()
    m, n, k = 72, 136, 200
    a, b = _values(generator, torch.float16, m, k), _values(generator, torch.float16, n, k)
    c = torch.from_numpy(generator.standard_normal((m, n)).astype(np.float32))
    da, db, dc, d = sim.put(a), sim.put(b), sim.put(c), sim.empty(m, n)
    workspace = sim.put(torch.zeros(64, dtype=torch.int32))
    with sim.checked(), sim.poisoned_shared():
        assert lib.run(m, n, k, pointer(da), pointer(db), pointer(dc), pointer(d), splits, pointer(workspace)) == 0
    reference = a.double() @ b.double().t() + c.double()
    scale = a.double().abs() @ b.double().abs().t() + c.double().abs()
    error = ((d.double() - reference).abs() / scale).max().item()
    print(f"dense GEMM, {splits} slices: error / sum|ab| = {error:.1e}")
    assert error <= 2.0**-22


@pytest.mark.parametrize(("strides", "stride"), [("kUnity", 1), ("kStrided", 2)])
def test_conv_dgrad(sim, libraries, strides, stride):
    from .engine import pointer

    lib = libraries[strides]
    pad = dilation = 1
    generator = np.random.default_rng()
    n, h, w, c, k, r, s = 2, 9, 7, 24, 40, 3, 3
    p, q = ((x + 2 * pad - dilation * (r - 1) - 1) // stride + 1 for x in (h, w))
    dy, weight = _values(generator, torch.float16, n, p, q, k), _values(generator, torch.float16, k, r, s, c)
    ddy, dweight, dx = sim.put(dy), sim.put(weight), sim.empty(n, h, w, c)
    with sim.checked(), sim.poisoned_shared():
        assert lib.run(n, h, w, c, k, r, s, pad, stride, dilation, pointer(ddy), pointer(dweight), pointer(dx)) == 0

    def dgrad(gradient: torch.Tensor, filters: torch.Tensor) -> torch.Tensor:
        x = torch.nn.grad.conv2d_input(
            (n, c, h, w),
            filters.double().permute(0, 3, 1, 2),
            gradient.double().permute(0, 3, 1, 2),
            stride,
            pad,
            dilation,
        )
        return x.permute(0, 2, 3, 1)

    reference, scale = dgrad(dy, weight), dgrad(dy.abs(), weight.abs())
    error = ((dx.double() - reference).abs() / scale.clamp_min(1e-3)).max().item()
    print(f"dgrad, stride {stride}: error / sum|ab| = {error:.1e}")
    assert error <= 2.0**-22
