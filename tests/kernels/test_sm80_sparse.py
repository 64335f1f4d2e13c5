"""The products with mma.sp against float64, on a GPU that has them and else on the simulator."""

from __future__ import annotations

import random
import subprocess
from collections.abc import Sequence

import pytest
import torch

import cutlass_ops
from cutlass_ops import build_kernels
from sdgp_accel.backends.gpu import device_facts, runs_on
from tests.kernels.products import (
    ConvCase,
    Engine,
    GemmCase,
    GpuEngine,
    SimulatorEngine,
    arguments,
    assert_close,
    check_conv,
    check_gemm,
    check_non_finite_row,
    check_refused,
    check_repeats,
    compile_for_simulator,
    compressed,
    gemm_operands,
)
from tests.ptxsim import toolchain

ON_GPU = torch.cuda.is_available() and any(
    runs_on(arch, device_facts(torch.device("cuda", 0)).capability) for arch in cutlass_ops.ARCHS
)

pytestmark = pytest.mark.timeout(1800)  # the first test may have to compile the kernels

# Every instance; sizes odd in every way, k beyond what the pipeline holds, splits of uneven length.
GEMM_CASES = [
    GemmCase("sm80_dgrad_bf16_256x128", 260, 264, 200),
    GemmCase("sm80_dgrad_bf16_256x128", 1, 8, 8, float_out=True),
    GemmCase("sm80_dgrad_f16_256x128", 520, 136, 72, group_n=1),
    GemmCase("sm80_dgrad_bf16_128x128", 300, 72, 1100),
    GemmCase("sm80_dgrad_f16_128x128", 260, 520, 136, group_n=3, accumulate=True),
    GemmCase("sm80_dgrad_f16_128x128", 500, 136, 72, group_n=1 << 30),  # rows of tiles times that: beyond 32 bits
    GemmCase("sm80_dgrad_bf16_128x64", 127, 136, 577, float_out=True, accumulate=True),
    GemmCase("sm80_dgrad_f16_128x64", 64, 56, 320),
    GemmCase("sm80_dgrad_bf16_128x64_any", 130, 67, 101),
    GemmCase("sm80_dgrad_f16_128x64_any", 33, 1, 3, float_out=True),
    GemmCase("sm80_dgrad_bf16_128x64_any", 33, 13, 257, accumulate=True),
    GemmCase("sm80_wgrad_bf16_256x128", 264, 136, 517, splits=3, float_out=True, accumulate=True),
    GemmCase("sm80_wgrad_f16_256x128", 136, 520, 323, splits=2, group_n=1),
    GemmCase("sm80_wgrad_bf16_128x128", 8, 8, 1),
    GemmCase("sm80_wgrad_f16_128x128", 200, 8, 150, float_out=True),
    GemmCase("sm80_wgrad_bf16_64x128", 72, 264, 700, splits=4),
    GemmCase("sm80_wgrad_bf16_64x128", 77, 136, 333),  # channels of the gradient need no alignment
    GemmCase("sm80_wgrad_f16_64x128", 64, 128, 449, accumulate=True),
    GemmCase("sm80_wgrad_bf16_128x64_any", 131, 65, 451, splits=3),
    GemmCase("sm80_wgrad_f16_128x64_any", 10, 77, 66, splits=2, float_out=True, accumulate=True),
    GemmCase("sm80_wgrad_f16_128x64_any", 1, 1, 1),
]

CONV_CASES = [
    ConvCase("sm80_conv_dgrad_bf16_128x128", (2, 72, 7, 7), (64, 3, 3)),  # one k tile per tap
    ConvCase("sm80_conv_dgrad_bf16_128x128", (2, 64, 9, 8), (192, 3, 3), stride=(2, 2)),  # three
    ConvCase("sm80_conv_dgrad_bf16_256x128", (1, 136, 9, 5), (24, 3, 2), (3, 1), (0, 1), (1, 2)),
    ConvCase("sm80_conv_dgrad_f16_256x128", (2, 8, 12, 11), (64, 7, 7), stride=(2, 2), padding=(3, 3)),
    ConvCase("sm80_conv_dgrad_f16_128x64", (7, 8, 9, 8), (8, 3, 3), stride=(2, 2)),  # of the first class alone 2 tiles
    ConvCase("sm80_conv_dgrad_f16_128x64", (1, 64, 13, 9), (72, 1, 1), stride=(2, 2), padding=(0, 0)),  # gaps: zeros
    ConvCase("sm80_conv_dgrad_f16_128x128", (3, 40, 5, 5), (72, 5, 5), padding=(2, 2), accumulate=True),
    ConvCase("sm80_conv_dgrad_bf16_128x64", (1, 16, 9, 31), (136, 1, 5), (1, 4), (0, 2), (1, 6)),
    ConvCase("sm80_conv_dgrad_bf16_128x64_any", (2, 3, 10, 9), (20, 3, 3), stride=(2, 1)),
    ConvCase("sm80_conv_dgrad_f16_128x64_any", (5, 13, 3, 3), (7, 3, 3), padding=(0, 0)),  # 1-pixel outputs
    ConvCase("sm80_conv_wgrad_bf16_256x128", (2, 72, 9, 8), (136, 3, 3), splits=2),
    ConvCase("sm80_conv_wgrad_bf16_256x128", (3, 8, 11, 6), (8, 2, 3), stride=(2, 1), padding=(1, 0), dilation=(2, 1)),
    ConvCase("sm80_conv_wgrad_f16_128x128", (2, 24, 7, 7), (72, 3, 3), float_out=True),
    ConvCase("sm80_conv_wgrad_f16_256x128", (1, 16, 14, 15), (136, 5, 5), stride=(2, 2), padding=(2, 2), splits=1),
    ConvCase("sm80_conv_wgrad_bf16_64x128", (2, 64, 12, 10), (64, 3, 3), splits=3, accumulate=True),
    ConvCase("sm80_conv_wgrad_f16_64x128", (2, 16, 9, 7), (13, 3, 3)),
    ConvCase("sm80_conv_wgrad_f16_64x128", (1, 8, 19, 9), (72, 7, 7), stride=(2, 2), padding=(3, 3)),
    ConvCase("sm80_conv_wgrad_bf16_128x128", (2, 40, 9, 9), (16, 1, 1), stride=(2, 2), padding=(0, 0)),
    ConvCase("sm80_conv_wgrad_bf16_128x64_any", (2, 3, 10, 9), (20, 3, 3), stride=(2, 1), splits=2),
    ConvCase(
        "sm80_conv_wgrad_f16_128x64_any", (9, 13, 3, 3), (7, 3, 3), padding=(0, 0), float_out=True, accumulate=True
    ),
]


@pytest.fixture(scope="module", params=["gpu" if ON_GPU else "sim"])  # its name is in the test's id
def engine() -> Engine:
    if ON_GPU:
        return GpuEngine()
    if reason := toolchain.missing():
        pytest.skip(reason)
    compile_for_simulator(sorted({case.instance for case in [*GEMM_CASES, *CONV_CASES]}), "80")
    return SimulatorEngine("80")


@pytest.mark.parametrize("case", GEMM_CASES, ids=lambda c: f"{c.instance.removeprefix('sm80_')}-{c.m}x{c.n}x{c.k}")
def test_gemm(engine: Engine, case: GemmCase) -> None:
    check_gemm(engine, case)


def test_gemm_of_random_shapes(engine: Engine) -> None:
    for case in random.choices(GEMM_CASES, k=3):
        multiple = 1 if case.instance.endswith("_any") else 8
        m, n, k = (random.randint(1, 200) for _ in range(3))
        check_gemm(engine, case._replace(m=m * multiple % 320 + multiple, n=n * multiple % 320 + multiple, k=k + 192))


def test_split_gemm_repeats_its_bits(engine: Engine) -> None:
    check_repeats(engine, GemmCase("sm80_wgrad_bf16_64x128", 72, 72, 700, splits=4, float_out=True))


@pytest.mark.skipif(ON_GPU, reason="reads the objects that the simulator's libraries are made of")
def test_nothing_is_shared_with_instances_for_hopper_alone() -> None:
    """Of a function that several objects define the linker keeps any: one that launches a kernel must not come from an
    object without code for other GPUs.
    """
    if reason := toolchain.missing():
        pytest.skip(reason)

    def shared_names(sources: Sequence[str], arch: str) -> set[str]:
        toolkit, names = build_kernels.find_toolkit(), set()
        assert toolkit is not None
        for source in sources:
            path = build_kernels.compile_instance(toolkit, build_kernels.INSTANCES / f"{source}.cu", (arch,))
            listing = subprocess.run(["nm", "--defined-only", path], capture_output=True, text=True, check=True).stdout
            names |= {name for _, kind, name in map(str.split, listing.splitlines()) if kind in "uvwVW"}
        return {name for name in names if "sdgp" in name}

    hopper = shared_names(["sm90_wgrad_bf16_128x256", "sm90_conv_wgrad_bf16_256x128"], "compute_90a")
    others = ("sm80_wgrad_bf16_64x128", "sm80_conv_wgrad_bf16_64x128", "mvue_2_4", "partial_sums")
    assert hopper
    assert not hopper & shared_names(others, "compute_80")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_gradient_reaches_its_row_only(engine: Engine, value: float) -> None:
    check_non_finite_row(engine, "sm80_dgrad_bf16_128x128", value)


@pytest.mark.parametrize(("splits", "offset"), [(1, 1), (2, 1), (2, 2)])
def test_an_output_may_begin_anywhere(engine: Engine, splits: int, offset: int) -> None:
    """Of instances for rows of any length; also where its elements would fill whole vectors."""
    case = GemmCase("sm80_wgrad_f16_128x64_any", 10, 12, 130, splits=splits)
    dy, a, b = gemm_operands(case)
    out = engine.poisoned((case.m * case.n + offset,), torch.float16)[offset:].view(case.m, case.n)
    operands = arguments(engine, compressed(dy, case), b, out, case)
    engine.gemm(case.instance, m=case.m, n=case.n, k=case.k, group_n=1, **operands)
    a, b = a.double(), b.double()
    assert_close(out, a @ b, a.abs() @ b.abs(), case.k)


def test_more_parts_than_tiles_of_k_are_refused(engine: Engine) -> None:
    check_refused(engine, GemmCase("sm80_wgrad_bf16_128x128", 8, 8, 100, splits=3))


@pytest.mark.parametrize("case", CONV_CASES, ids=lambda c: f"{c.instance.removeprefix('sm80_')}-{c.x}-{c.filter}")
def test_conv(engine: Engine, case: ConvCase) -> None:
    check_conv(engine, case)
