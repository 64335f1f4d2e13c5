"""The Hopper products against float64, on a GPU that has them and else on the simulator."""

from __future__ import annotations

import contextlib
import random
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

import cutlass_ops
from cutlass_ops import build_kernels
from tests.kernels.products import (
    Case,
    ConvCase,
    Engine,
    GemmCase,
    GpuEngine,
    SimulatorEngine,
    check_conv,
    check_gemm,
    check_non_finite_row,
    check_refused,
    check_repeats,
    compile_for_simulator,
    other_dtype,
)
from tests.ptxsim import toolchain

pytestmark = pytest.mark.timeout(1800)  # the first test may have to compile the kernels

ON_GPU = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0) and "90a" in cutlass_ops.ARCHS


GEMM_CASES = [
    GemmCase("sm90_dgrad_bf16_128x256", 130, 264, 200),
    GemmCase("sm90_dgrad_bf16_128x256", 300, 72, 1100, cluster_size=2),  # rings wrap; an odd number of k tiles
    GemmCase("sm90_dgrad_bf16_128x256", 1300, 520, 1100, cluster_size=2),  # many tiles per CTA
    GemmCase("sm90_dgrad_bf16_128x256", 1, 8, 8, cluster_size=2, float_out=True),  # a CTA of the cluster has no rows
    GemmCase("sm90_dgrad_bf16_128x256", 131, 72, 203),  # channels of the gradient need no alignment
    GemmCase("sm90_dgrad_f16_128x128", 260, 520, 136, cluster_size=2, group_n=3, accumulate=True),
    GemmCase("sm90_dgrad_f16_256x128", 1100, 264, 72, cluster_size=2),  # several tiles per CTA, of one or two k tiles
    GemmCase("sm90_dgrad_bf16_128x192", 650, 392, 328),
    GemmCase("sm90_dgrad_f16_128x128_pingpong", 520, 264, 392),  # 15 tiles on 4 CTAs: warpgroups take turns
    GemmCase("sm90_dgrad_f16_128x128_pingpong", 700, 136, 72, cluster_size=2, accumulate=True),
    GemmCase("sm90_dgrad_bf16_256x64_pingpong", 1100, 136, 200, cluster_size=2),
    GemmCase("sm90_wgrad_bf16_256x128", 264, 136, 517, splits=3, cluster_size=2, float_out=True, accumulate=True),
    GemmCase("sm90_wgrad_bf16_256x128", 8, 8, 1),
    GemmCase("sm90_wgrad_bf16_256x128", 261, 136, 333, splits=2),
    GemmCase("sm90_wgrad_f16_128x256", 136, 520, 323, splits=2, group_n=1),
    GemmCase("sm90_wgrad_f16_128x256", 200, 8, 150, cluster_size=2, float_out=True),
    GemmCase("sm90_wgrad_f16_64x256_pingpong", 64, 520, 1100, splits=5),
    GemmCase("sm90_wgrad_f16_64x256_pingpong", 200, 264, 300, cluster_size=2, float_out=True),
    GemmCase("sm90_wgrad_bf16_128x192", 136, 328, 700, splits=2, cluster_size=2),
    GemmCase("sm90_wgrad_bf16_128x128", 264, 136, 323, cluster_size=2, accumulate=True),
]


# On the simulator's 4 multiprocessors; an H100's 132 take all of them in one round.
SHARED_CASES = [
    GemmCase("sm90_wgrad_bf16_256x128", 520, 264, 1490, owned_blocks=4),  # two rounds, then one tile and three helpers
    GemmCase("sm90_wgrad_bf16_256x128", 40, 328, 730, owned_blocks=4, float_out=True, accumulate=True),  # one helper
    GemmCase("sm90_wgrad_f16_128x256", 600, 200, 700, owned_blocks=3, cluster_size=2),
    GemmCase("sm90_wgrad_f16_128x256", 8, 8, 1100, owned_blocks=1, float_out=True),  # a helper each for k of 384, ..
    GemmCase("sm90_wgrad_bf16_128x192", 130, 504, 515, owned_blocks=2, accumulate=True),
    GemmCase("sm90_dgrad_bf16_128x256", 700, 200, 1100, owned_blocks=6, cluster_size=2),
    GemmCase("sm90_dgrad_f16_256x128", 300, 328, 700, owned_blocks=2, accumulate=True),
    GemmCase("sm90_wgrad_bf16_256x128", 300, 136, 515, owned_blocks=2),  # a full round: nothing to share
]


CONV_CASES = [
    ConvCase("sm90_conv_dgrad_bf16_128x128", (2, 72, 7, 7), (64, 3, 3)),  # one k tile per tap
    ConvCase("sm90_conv_dgrad_f16_256x128", (9, 136, 15, 13), (72, 2, 1), padding=(1, 0), cluster_size=2),
    ConvCase("sm90_conv_dgrad_bf16_128x128", (2, 72, 7, 7), (77, 3, 3)),
    ConvCase("sm90_conv_dgrad_bf16_128x128", (2, 64, 9, 8), (192, 3, 3), stride=(2, 2), cluster_size=2),  # three
    ConvCase("sm90_conv_dgrad_bf16_128x128", (1, 16, 10, 9), (24, 3, 2), (3, 1), (0, 1), (1, 2)),
    ConvCase("sm90_conv_dgrad_bf16_128x128", (2, 16, 9, 12), (72, 2, 1), (2, 3), (0, 0)),  # some pixels without a tap
    ConvCase("sm90_conv_dgrad_bf16_128x128", (1, 16, 9, 12), (72, 1, 1), (2, 3), (0, 0), accumulate=True),
    ConvCase("sm90_conv_dgrad_bf16_128x128", (3, 8, 1, 2), (8, 1, 1), (3, 3), accumulate=True),  # none has one
    ConvCase("sm90_conv_dgrad_bf16_128x256", (2, 264, 7, 9), (72, 3, 3), cluster_size=2),
    ConvCase("sm90_conv_dgrad_bf16_128x192", (3, 200, 9, 7), (40, 3, 2), (2, 1), (1, 0)),
    ConvCase("sm90_conv_dgrad_f16_128x128_pingpong", (5, 136, 15, 13), (72, 2, 3), (1, 2), cluster_size=2),
    ConvCase("sm90_conv_dgrad_bf16_256x64_pingpong", (5, 64, 17, 16), (72, 3, 3)),
    ConvCase("sm90_conv_dgrad_bf16_256x64_pingpong", (9, 72, 15, 13), (200, 3, 5), (2, 2), (1, 2), cluster_size=2),
    ConvCase("sm90_conv_dgrad_bf16_256x64_pingpong", (2, 64, 12, 13), (136, 3, 3), (2, 3), (2, 3), (3, 2)),
    ConvCase("sm90_conv_dgrad_bf16_128x128", (2, 72, 9, 7), (128, 3, 2), (1, 1), (1, 0), (1, 2), owned_blocks=2),
    ConvCase("sm90_conv_dgrad_f16_256x128", (7, 264, 9, 7), (256, 3, 3), owned_blocks=11, cluster_size=2),
    ConvCase("sm90_conv_wgrad_bf16_64x192_pingpong", (2, 64, 12, 13), (64, 3, 3), splits=3, accumulate=True),
    ConvCase("sm90_conv_wgrad_bf16_256x128", (2, 24, 9, 8), (264, 3, 3), splits=2, cluster_size=2),
    ConvCase("sm90_conv_wgrad_bf16_128x192", (2, 40, 9, 8), (200, 5, 3), (2, 1), (2, 0), float_out=True),
    ConvCase("sm90_conv_wgrad_f16_128x128", (3, 72, 7, 9), (136, 3, 3), cluster_size=2, accumulate=True),
    # Several images of an output pixel or two in a k tile.
    ConvCase("sm90_conv_wgrad_f16_128x128", (150, 8, 3, 4), (16, 3, 3), padding=(0, 0), cluster_size=2),
    ConvCase("sm90_conv_wgrad_f16_128x128", (139, 8, 3, 2), (16, 3, 2), padding=(0, 0)),
    ConvCase("sm90_conv_wgrad_bf16_128x256", (2, 24, 9, 8), (131, 3, 3), splits=2),
    ConvCase("sm90_conv_wgrad_bf16_128x256", (2, 72, 9, 8), (136, 3, 3), splits=2, cluster_size=2),
    ConvCase("sm90_conv_wgrad_bf16_128x256", (3, 8, 11, 6), (8, 2, 3), stride=(2, 1), padding=(1, 0), dilation=(2, 1)),
    ConvCase("sm90_conv_wgrad_bf16_128x256", (5, 72, 9, 8), (136, 3, 3), owned_blocks=2),
    ConvCase("sm90_conv_wgrad_bf16_128x256", (5, 24, 17, 8), (40, 3, 3), (2, 1), owned_blocks=1, cluster_size=2),
]

if ON_GPU:  # every instance; each takes some 10 s to compile for the simulator
    for cases in (GEMM_CASES, SHARED_CASES, CONV_CASES):
        cases += [other_dtype(case) for case in cases]


@pytest.fixture(scope="module", params=["gpu" if ON_GPU else "sim"])  # its name is in the test's id
def engine() -> Engine:
    if ON_GPU:
        return GpuEngine()
    if reason := toolchain.missing():
        pytest.skip(reason)
    compile_for_simulator(sorted({case.instance for case in [*GEMM_CASES, *SHARED_CASES, *CONV_CASES]}), "90a")
    return SimulatorEngine("90a")


@pytest.mark.parametrize(
    "case", [*GEMM_CASES, *SHARED_CASES], ids=lambda c: f"{c.instance.removeprefix('sm90_')}-{c.m}x{c.n}x{c.k}"
)
def test_gemm(engine: Engine, case: GemmCase) -> None:
    check_gemm(engine, case)


def test_gemm_of_random_shapes(engine: Engine) -> None:
    for case in random.choices(GEMM_CASES, k=3):
        drawn = case._replace(m=random.randint(1, 40) * 8, n=random.randint(1, 40) * 8, k=random.randint(257, 500))
        drawn = drawn._replace(splits=min(case.splits, 3))  # of at least 3 blocks of k
        check_gemm(engine, drawn)


def test_split_gemm_repeats_its_bits(engine: Engine) -> None:
    check_repeats(engine, GemmCase("sm90_wgrad_f16_128x256", 72, 72, 700, splits=4, float_out=True))


@pytest.mark.parametrize("case", SHARED_CASES[:1], ids=str)
def test_sharing_orders_what_clusters_pass_on(engine: Engine, case: GemmCase) -> None:
    """And what it adds up, so that the bits repeat."""
    follow = engine.following_global_memory if isinstance(engine, SimulatorEngine) else contextlib.nullcontext
    with follow():
        check_repeats(engine, case)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_gradient_reaches_its_row_only(engine: Engine, value: float) -> None:
    check_non_finite_row(engine, "sm90_dgrad_bf16_128x256", value)


def test_more_parts_than_blocks_of_k_are_refused(engine: Engine) -> None:
    check_refused(engine, GemmCase("sm90_wgrad_bf16_256x128", 8, 8, 100, splits=2))


@pytest.mark.parametrize(
    "case",
    [GemmCase("sm90_wgrad_bf16_256x128", 8, 8, 300, owned_blocks=3),  # nothing left
     GemmCase("sm90_wgrad_bf16_256x128", 8, 8, 300, owned_blocks=1, splits=2),
     GemmCase("sm90_wgrad_f16_64x256_pingpong", 8, 8, 300, owned_blocks=1),
     ConvCase("sm90_conv_dgrad_bf16_128x128", (2, 72, 7, 7), (64, 3, 3), owned_blocks=1),  # blocks end within a tap
     ConvCase("sm90_conv_dgrad_bf16_128x128", (2, 64, 9, 8), (128, 3, 3), stride=(2, 2), owned_blocks=1)],
    ids=str,
)  # fmt: skip
def test_products_that_cannot_be_shared_are_refused(engine: Engine, case: Case) -> None:
    check_refused(engine, case)


@pytest.mark.parametrize("change", [{"stride": (9, 1)}, {"stride": (1, 9)}, {"splits": 2}], ids=str)
def test_strides_and_parts_that_a_dgrad_does_not_have_are_refused(engine: Engine, change: dict[str, Any]) -> None:
    check_refused(engine, ConvCase("sm90_conv_dgrad_bf16_128x128", (1, 8, 10, 10), (512, 1, 1))._replace(**change))


def test_strided_dgrad_is_one_launch(engine: Engine) -> None:
    if not isinstance(engine, SimulatorEngine):
        pytest.skip("launches are counted by the simulator")
    engine.launches()
    check_conv(engine, ConvCase("sm90_conv_dgrad_bf16_128x128", (1, 8, 9, 8), (8, 3, 3), stride=(3, 2)))
    assert engine.launches() == 1


def test_tensor_maps_are_encoded_once(tmp_path: Path) -> None:
    toolkit = build_kernels.find_toolkit()
    if toolkit is None:
        pytest.skip("no CUDA headers")
    program, source = tmp_path / "tensor_maps", Path(__file__).parent / "tensor_maps.cpp"
    includes = [f"-I{path}" for path in (build_kernels.INCLUDE, toolkit.home / "include")]
    subprocess.run(["g++", "-std=c++20", "-O2", *includes, source, "-o", program, "-pthread"], check=True)
    result = subprocess.run([program], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout


@pytest.mark.parametrize("case", CONV_CASES, ids=lambda c: f"{c.instance.removeprefix('sm90_')}-{c.x}-{c.filter}")
def test_conv(engine: Engine, case: ConvCase) -> None:
    check_conv(engine, case)
