"""sm_90a: a warpgroup kernel with TMA, mbarriers and wgmma, right and with one mistake each."""

from __future__ import annotations

import ctypes
import functools
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

from .toolchain import HERE, build_all, build_library, cutlass_include

MISTAKES = [  # number in broken_sm90.cu, the fault, a part of its description
    ("lost_arrive", 1, "deadlock", "still expects 1 arrivals"),
    ("wrong_transaction_count", 2, "deadlock", "16 bytes"),
    ("missing_barrier_wait", 4, "shared-race", "a TMA load"),
    ("missing_proxy_fence", 5, "shared-race", "fence.proxy.async"),
    ("missing_wgmma_wait", 6, "shared-race", "the tensor cores"),
    ("accumulator_before_wait", 8, "async-race", "wgmma.wait_group"),
    ("half_a_warpgroup", 7, "divergent-aligned", "of the warpgroup"),
    ("missing_wgmma_fence", 9, "async-race", "no wgmma.fence since the kernel began"),
    ("missing_copy_wait", 10, "async-race", "a cp.async"),
    ("load_over_stores", 11, "shared-race", "the write by thread"),
    ("load_over_copies", 12, "async-race", "a cp.async"),
    ("load_over_what_is_read", 13, "shared-race", "the read by the tensor cores"),
    ("misplaced_load", 14, "misaligned", "is not a multiple of 128"),
    ("map_of_another_rank", 15, "launch", "does not fit the instruction"),
    ("im2col_map_for_tiles", 16, "launch", "does not fit the instruction"),
    ("no_map", 17, "launch", "not a tiled tensor map"),
    ("wait_before_initialisation", 18, "shared-race", "its initialisation by thread 0"),
    ("initialisation_without_fence", 19, "shared-race", "no fence.mbarrier_init or fence.proxy.async by thread 0"),
]


@pytest.fixture(scope="module")
def hopper(sim):
    from .engine import SimEngine

    return SimEngine((9, 0))


@pytest.fixture(scope="module")
def library(hopper):
    return hopper.load(build_library(HERE / "kernels" / "broken_sm90.cu", arch="90a"))


def _run(hopper, library, mistake: int) -> float:
    """Largest error of the product."""
    from .engine import pointer

    a, b = torch.randn(64, 64).bfloat16(), torch.randn(64, 64).bfloat16()
    da, db, out = hopper.put(a), hopper.put(b), hopper.empty(64, 64)
    with hopper.checked():
        assert library.run(pointer(da), pointer(db), pointer(out), mistake) == 0
    return (out.double() - a.double() @ b.double().t()).abs().max().item()


def test_product_is_right(hopper, library):
    assert _run(hopper, library, 0) < 1e-4


def test_wrong_swizzle_gives_wrong_numbers(hopper, library):
    assert _run(hopper, library, 3) > 0.1


@pytest.mark.parametrize(("name", "mistake", "kind", "detail"), MISTAKES, ids=[m[0] for m in MISTAKES])
def test_mistake_is_reported_by_name(hopper, library, name, mistake, kind, detail):
    from .faults import SimError

    with pytest.raises(SimError) as caught:
        _run(hopper, library, mistake)
    assert caught.value.kind == kind
    assert detail in caught.value.detail


def test_registers_that_nobody_gives_up_are_reported(hopper, library):
    from .faults import SimError

    with hopper.checked():
        assert library.share_registers(0) == 0
    with pytest.raises(SimError, match="asks for 80896 registers in all and was launched with 64512"), hopper.checked():
        library.share_registers(1)


def test_wait_for_a_phase_beyond_the_next_is_reported(hopper, library):
    from .faults import SimError

    with hopper.checked():
        assert library.run_twice(0) == 0
    with pytest.raises(SimError, match="has not seen phase 0") as caught, hopper.checked():
        library.run_twice(1)
    assert caught.value.kind == "mbarrier"


def _copy_bytes(hopper, library, size: int, source: int = 0, target: int = 0, barrier: int = 8) -> bool:
    """Whether a bulk copy of `size` bytes between these offsets is right."""
    from .engine import pointer

    data = torch.randint(256, (80,), dtype=torch.uint8)
    x, y = hopper.put(data), hopper.empty(size, dtype=torch.uint8)
    with hopper.checked():
        assert library.run_bulk_copy(pointer(x[source:]), pointer(y), size, target, barrier) == 0
    return torch.equal(y, data[source : source + size])


@pytest.mark.parametrize("size", [16, 64])
def test_bulk_copy_is_right(hopper, library, size):
    assert _copy_bytes(hopper, library, size, source=16, target=16)


@pytest.mark.parametrize("wrong", [{"size": 56}, {"size": 1}, {"source": 8}, {"target": 4}, {"barrier": 4}], ids=str)
def test_misaligned_bulk_copy_or_barrier_is_reported(hopper, library, wrong):
    from .faults import SimError

    with pytest.raises(SimError, match="mbarrier" if "barrier" in wrong else "multiples of 16 bytes") as caught:
        _copy_bytes(hopper, library, **{"size": 64} | wrong)
    assert caught.value.kind == "misaligned"


TILED = {  # what a map of bfloat16 [4, 8, 64] is made of; innermost first
    "type": 9, "rank": 3, "address": 1 << 20, "extents": (64, 8, 4), "strides": (128, 1024), "box": (64, 8, 2),
    "steps": (1, 1, 1), "interleave": 0, "swizzle": 3, "fill": 0,
}  # fmt: skip
IM2COL = {
    **TILED, "rank": 4, "extents": (64, 8, 8, 4), "strides": (128, 1024, 8192), "box": (64, 32), "steps": (1, 1, 1, 1),
    "lower": (-1, -1), "upper": (-1, -1),
}  # fmt: skip


def _encode(library, of: dict[str, object]) -> int:
    """What cuTensorMapEncodeTiled or, where there are corners, cuTensorMapEncodeIm2col returns."""
    types = {"extents": ctypes.c_uint64, "strides": ctypes.c_uint64, "box": ctypes.c_uint32, "steps": ctypes.c_uint32}
    arguments = [
        (types.get(name, ctypes.c_int) * 6)(*value) if isinstance(value, tuple) else value for name, value in of.items()
    ]
    arguments[2] = ctypes.c_void_p(of["address"])
    status: int = library.encode(*arguments, *[None] * (12 - len(arguments)))
    return status


@pytest.mark.parametrize(
    ("of", "change"),
    [(TILED, {}), (TILED, {"extents": (64, (1 << 32) - 1, 4)}), (TILED, {"strides": (128, (1 << 40) - 16)}),
     (TILED, {"swizzle": 0, "box": (256, 256, 1)}), (TILED, {"swizzle": 2, "box": (32, 8, 2)}),
     (IM2COL, {}), (IM2COL, {"swizzle": 0, "box": (256, 32)}), (IM2COL, {"box": (64, 1024)}),
     (IM2COL, {"steps": (1, 8, 8, 1)}),
     (IM2COL, {"lower": (-128, 127), "upper": (127, -128)})],
)  # fmt: skip
def test_tensor_map_that_the_driver_takes(hopper, library, of, change):
    assert _encode(library, of | change) == 0


@pytest.mark.parametrize(
    ("of", "change"),
    [(TILED, {"rank": 0}), (TILED, {"address": (1 << 20) + 8}), (TILED, {"type": 13, "box": (32, 8, 2)}),
     (TILED, {"rank": 6, "extents": (64,) * 6, "strides": (128,) * 6, "box": (64, 1, 1, 1, 1, 1), "steps": (1,) * 6}),
     (TILED, {"interleave": 1}), (TILED, {"swizzle": 4}), (TILED, {"fill": 1}), (TILED, {"extents": (64, 0, 4)}),
     (TILED, {"extents": (64, 8, 1 << 32)}), (TILED, {"strides": (136, 1024)}), (TILED, {"strides": (128, 1 << 40)}),
     (TILED, {"steps": (1, 0, 1)}), (TILED, {"steps": (1, 1, 2)}), (TILED, {"box": (60, 8, 2)}),
     (TILED, {"box": (72, 8, 2)}), (TILED, {"swizzle": 2}), (TILED, {"swizzle": 1, "box": (32, 8, 2)}),
     (TILED, {"box": (64, 0, 2)}), (TILED, {"box": (64, 8, 257)}), (TILED, {"swizzle": 0, "box": (264, 8, 2)}),
     (IM2COL, {"rank": 2}), (IM2COL, {"box": (0, 32)}), (IM2COL, {"swizzle": 0, "box": (264, 32)}),
     (IM2COL, {"box": (64, 0)}), (IM2COL, {"box": (64, 1025)}), (IM2COL, {"box": (72, 32)}),
     (IM2COL, {"lower": (-129, -1)}), (IM2COL, {"lower": (-1, 128)}), (IM2COL, {"upper": (-1, -129)}),
     (IM2COL, {"upper": (128, -1)}), (IM2COL, {"steps": (1, 9, 1, 1)}),
     (IM2COL, {"steps": (1, 1, 0, 1)}), (IM2COL, {"address": (1 << 20) + 8})],
)  # fmt: skip
def test_tensor_map_that_the_driver_refuses(hopper, library, of, change):
    assert _encode(library, of | change) in (1, 801)  # invalid value, not supported


WIDTHS = [(16, False), (16, True), (32, False), (64, False), (64, True), (128, False), (128, True)]


def _product_of_registers(hopper, width: int, sparse: bool, mistake: int = 0) -> float:
    """Largest error of a product with A in registers and B swizzled over `width` bytes (16: not at all)."""
    from .engine import pointer

    library = hopper.load(build_library(HERE / "kernels" / "wgmma_registers.cu", arch="90a"))
    values, b = torch.randn(64, 32 if sparse else 64).bfloat16(), torch.randn(64, 64).bfloat16()
    a, metadata = values.double(), None
    if sparse:
        kept = torch.rand(64, 16, 4).argsort(dim=2)[:, :, :2].sort(dim=2).values
        nibbles = kept[:, :, 0] | kept[:, :, 1] << 2
        words = (nibbles.view(64, 4, 4) << torch.tensor([0, 4, 8, 12])).sum(dim=2)
        metadata = hopper.put(words.to(torch.int32).to(torch.int16))
        a = torch.zeros(64, 16, 4, dtype=torch.float64).scatter_(2, kept, a.view(64, 16, 2)).view(64, 64)
    da, db, out = hopper.put(values), hopper.put(b), hopper.empty(64, 64)
    with hopper.checked():
        assert library.run(pointer(da), pointer(metadata), pointer(db), pointer(out), width, mistake) == 0
    return (out.double() - a @ b.double().t()).abs().max().item()


@pytest.mark.parametrize(("width", "sparse"), WIDTHS)
def test_product_of_registers_at_every_swizzle(hopper, width, sparse):
    """A sparse instruction's 64 bytes of k do not fit a row of the 32-byte swizzle."""
    assert _product_of_registers(hopper, width, sparse) < 1e-4


@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
@pytest.mark.parametrize(("mistake", "since"), [(1, "the kernel began"), (2, "the last use"), (3, "the last use")])
def test_missing_wgmma_fence_is_reported(hopper, mistake, since, sparse):
    """None at all, none after loading A, none after scaling an accumulator."""
    from .faults import SimError

    with pytest.raises(SimError, match=f"no wgmma.fence since {since}") as caught:
        _product_of_registers(hopper, 128, sparse, mistake)
    assert caught.value.kind == "async-race"


def _swap_in_clusters(hopper, mistake: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Numbers before and after the blocks of three clusters have swapped them through each other's shared memory."""
    from .engine import pointer

    library = hopper.load(build_library(HERE / "kernels" / "cluster.cu", arch="90a"))
    x = torch.randint(1000, (3, 2, 64), dtype=torch.int32)
    dx, y = hopper.put(x), hopper.empty(3, 2, 64, dtype=torch.int32)
    with hopper.checked():
        assert library.run(pointer(dx), pointer(y), 6, mistake) == 0
    return x, y


def test_cluster_shares_its_memory(hopper):
    x, y = _swap_in_clusters(hopper, 0)
    assert torch.equal(y, x.flip(1) * 1001)


@pytest.mark.parametrize(
    ("mistake", "access"),
    [(1, "write"), (2, "read"), (3, "access"), (4, "write")],
    ids=["reads_early", "leaves_early", "exits_early", "relaxed"],
)
def test_missing_cluster_barrier_is_reported(hopper, mistake, access):
    from .faults import SimError

    with pytest.raises(SimError, match=f"no barrier after the {access} by thread .* of the cluster") as caught:
        _swap_in_clusters(hopper, mistake)
    assert caught.value.kind == "shared-race"


def test_a_kernel_that_overlaps_the_one_before_and_may_end_before_it_is_reported(hopper):
    from .faults import SimError

    with pytest.raises(SimError, match=r"a block ends without griddepcontrol.wait") as caught:
        _swap_in_clusters(hopper, 5)
    assert caught.value.kind == "launch"


@pytest.mark.parametrize("mistake", [0, 6], ids=["none", "waits_late"])
def test_a_kernel_that_reads_what_the_one_before_may_not_have_written_is_reported(hopper, mistake):
    from .engine import pointer
    from .faults import SimError

    library = hopper.load(build_library(HERE / "kernels" / "cluster.cu", arch="90a"))
    x, y, z = (hopper.empty(1, 2, 64, dtype=torch.int32) for _ in range(3))
    hopper.initialised(x.copy_(torch.randint(1000, x.shape)))
    with hopper.following_global_memory(), hopper.checked():
        library.run(pointer(x), pointer(y), 2, 0)
    late = pytest.raises(SimError, match="written by a kernel that this one overlaps") if mistake else nullcontext()
    with hopper.following_global_memory(), late, hopper.checked():
        assert library.run(pointer(y), pointer(z), 2, mistake) == 0


def test_the_address_of_shared_memory_names_its_cta_in_a_cluster(hopper):
    from .engine import pointer

    library = hopper.load(build_library(HERE / "kernels" / "cluster.cu", arch="90a"))
    for cluster in (1, 2):
        ranks = hopper.empty(4, dtype=torch.int32)
        with hopper.checked():
            assert library.name(pointer(ranks), 4, cluster) == 0
        assert ((ranks[::2] == ranks[1::2]) == (cluster == 1)).all()


STORE, ADD, MIN, MAX = range(4)  # operations of tma_reduce.cu
REDUCTIONS = {  # torch type -> CUtensorMapDataType
    torch.int32: 3, torch.int64: 5, torch.float16: 6, torch.float32: 7, torch.float64: 8, torch.bfloat16: 9,
}  # fmt: skip


def _reduce(hopper, dtype: torch.dtype, operation: int, mistake: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """A matrix after TMA's operation with three tiles that reach beyond its end, and what it should be."""
    from .engine import pointer

    library = hopper.load(build_library(HERE / "kernels" / "tma_reduce.cu", arch="90a"))
    width = 64 // dtype.itemsize
    tiles = torch.randn(3, 8, width).mul(100).to(dtype)
    before = torch.randn(13, 2 * width).mul(100).to(dtype)
    row, column = 9, width + width // 2  # 4 rows and half of the columns are inside
    matrix = hopper.put(before)
    blocks = 1 if operation == STORE else 3
    with hopper.checked():
        arguments = (REDUCTIONS[dtype], dtype.itemsize, *before.shape, row, column, blocks, operation, mistake)
        assert library.run(pointer(matrix), pointer(hopper.put(tiles)), *arguments) == 0
    expected = before.clone()
    inside = expected[row:, column:]
    for tile in tiles[:blocks, : inside.shape[0], : inside.shape[1]]:
        results = {STORE: tile, ADD: inside + tile, MIN: inside.minimum(tile), MAX: inside.maximum(tile)}
        inside.copy_(results[operation])
    return matrix, expected


@pytest.mark.parametrize("operation", [STORE, ADD, MIN, MAX], ids=["store", "add", "min", "max"])
@pytest.mark.parametrize("dtype", REDUCTIONS, ids=str)
def test_tma_reduces_into_global_memory(hopper, dtype, operation):
    result, expected = _reduce(hopper, dtype, operation)
    assert torch.equal(result, expected)


@pytest.mark.parametrize(("mistake", "detail"), [(1, "fence.proxy.async"), (2, "a TMA store")])
@pytest.mark.parametrize("operation", [STORE, ADD], ids=["store", "add"])
def test_mistakes_around_tma_stores_are_reported(hopper, operation, mistake, detail):
    from .faults import SimError

    with pytest.raises(SimError) as caught:
        _reduce(hopper, torch.float32, operation, mistake)
    assert caught.value.kind == "shared-race"
    assert detail in caught.value.detail


# CUTLASS's sm_90a collectives: sparse, layout of A, cluster along m, schedule of the main loop, of the epilogue.
_COOPERATIVE = ("KernelTmaWarpSpecializedCooperative", "TmaWarpSpecializedCooperative")
COLLECTIVES = {
    "sparse-row-cluster2": (1, "RowMajor", 2, *_COOPERATIVE),
    "sparse-col": (1, "ColumnMajor", 1, *_COOPERATIVE),
    "dense-row-pingpong": (0, "RowMajor", 2, "KernelTmaWarpSpecializedPingpong", "TmaWarpSpecialized"),
}


def _collective(case: str) -> Path:
    names = ("IS_SPARSE", "LAYOUT_A", "CLUSTER_M", "SCHEDULE", "EPILOGUE")
    defines = {name: str(value) for name, value in zip(names, COLLECTIVES[case], strict=True)}
    source = HERE / "kernels" / "cutlass_sm90_gemm.cu"
    return build_library(source, arch="90a", defines=defines, includes=cutlass_include())


@pytest.fixture(scope="module")
def collectives(sim) -> dict[str, Path]:
    """All of them, compiled side by side: each takes half a minute or more of one core."""
    wgrad = functools.partial(
        build_library, HERE / "kernels" / "cutlass_sm90_conv.cu", arch="90a", includes=cutlass_include()
    )
    return build_all({"wgrad": wgrad, **{case: functools.partial(_collective, case) for case in COLLECTIVES}})


@pytest.mark.skipif(not cutlass_include(), reason="no CUTLASS headers: pip install nvidia-cutlass==4.2.0.0")
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("case", COLLECTIVES)
def test_cutlass_collective(hopper, collectives, case):
    """Kernels that are not ours, sparse operands packed by CUTLASS's own compressor kernel, against float64."""
    from .engine import pointer

    sparse, layout, *_ = COLLECTIVES[case]
    lib = hopper.load(collectives[case])
    m, n, k = 256, 136, 384
    a, b = torch.randn(m, k).bfloat16(), torch.randn(k, n).bfloat16()
    if sparse:
        keep = torch.rand(m, k // 4, 4).argsort(dim=2) < 2
        a = torch.where(keep.view(m, k), a, torch.zeros((), dtype=a.dtype))
    da, db, d = (
        hopper.put(a if layout == "RowMajor" else a.t().contiguous()),
        hopper.put(b),
        hopper.empty(m, n, dtype=a.dtype),
    )
    metadata = None
    with hopper.checked(), hopper.poisoned_shared():
        if sparse:
            values, size = ctypes.c_int64(), ctypes.c_int64()
            lib.sizes(m, n, k, ctypes.byref(values), ctypes.byref(size))
            packed = hopper.empty(values.value, dtype=a.dtype)
            metadata = hopper.empty(size.value, dtype=torch.uint8)
            assert lib.compress(m, n, k, pointer(da), pointer(packed), pointer(metadata)) == 0
            da = packed
        assert lib.run(m, n, k, pointer(da), pointer(metadata), pointer(db), pointer(d)) == 0
    reference = a.double() @ b.double()
    scale = a.double().abs() @ b.double().abs()
    rounding = reference.abs() * 2.0**-8  # of the bfloat16 result
    error = ((d.double() - reference).abs() - rounding) / scale
    print(f"{case}: error beyond the result's rounding / sum|ab| = {max(error.max().item(), 0):.1e}")
    assert error.max() <= 2.0**-22


@pytest.mark.skipif(not cutlass_include(), reason="no CUTLASS headers: pip install nvidia-cutlass==4.2.0.0")
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("stride", "pad", "dilation"), [(1, 1, 1), (2, 1, 1), (1, 2, 2)])
def test_cutlass_convolution(hopper, collectives, stride, pad, dilation):
    """A wgrad that is not ours: its activations come through TMA im2col, with strides, padding and dilation."""
    from .engine import pointer

    lib = hopper.load(collectives["wgrad"])
    n, h, w, c, k, r, s = 2, 9, 7, 40, 136, 3, 3
    p, q = ((x + 2 * pad - dilation * (r - 1) - 1) // stride + 1 for x in (h, w))
    dy, x = torch.randn(n, p, q, k).bfloat16(), torch.randn(n, h, w, c).bfloat16()
    ddy, dx, dw = hopper.put(dy), hopper.put(x), hopper.empty(k, r, s, c)
    with hopper.checked(), hopper.poisoned_shared(), hopper.following_global_memory():
        assert lib.run(n, h, w, c, k, r, s, pad, stride, dilation, pointer(ddy), pointer(dx), pointer(dw)) == 0

    def wgrad(activations: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
        nchw = (t.double().permute(0, 3, 1, 2) for t in (activations, gradient))
        weight = torch.nn.grad.conv2d_weight(next(nchw), (k, c, r, s), next(nchw), stride, pad, dilation)
        return weight.permute(0, 2, 3, 1)

    error = ((dw.double() - wgrad(x, dy)).abs() / wgrad(x.abs(), dy.abs()).clamp_min(1e-3)).max().item()
    print(f"wgrad, stride {stride}, dilation {dilation}: error / sum|ab| = {error:.1e}")
    assert error <= 2.0**-22
