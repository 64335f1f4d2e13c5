"""The products with mma.sp against code that is not ours: CUTLASS's host reference GEMM, on the operand as CUTLASS
uncompresses it, and CUTLASS's dense convolution gradients, run by the same simulator on the decompressed operand.
"""

from __future__ import annotations

import ctypes
from pathlib import Path

import pytest
import torch
from torch import Tensor

from sdgp_accel.backends import dense
from sdgp_accel.geometry import Conv2dGeometry
from tests.kernels import test_sm80_sparse
from tests.kernels.products import (
    ConvCase,
    GemmCase,
    SimulatorEngine,
    assert_close,
    compressed,
    conv_gradient,
    dtype_of,
    gemm_operands,
    is_dgrad,
    out_size,
    run_conv,
    run_gemm,
    sparse_matrix,
)
from tests.ptxsim import toolchain
from tests.ptxsim.engine import pointer

pytestmark = [
    pytest.mark.skipif(
        not toolchain.cutlass_include(), reason="no CUTLASS headers: pip install nvidia-cutlass==4.2.0.0"
    ),
    pytest.mark.skipif(bool(toolchain.missing()), reason=str(toolchain.missing())),
    pytest.mark.skipif(test_sm80_sparse.ON_GPU, reason="compares two kernels on the simulator"),
    pytest.mark.timeout(1800),  # the first test may have to compile the kernels
]

HERE = Path(__file__).parent
ELEMENTS = {torch.float16: "cutlass::half_t", torch.bfloat16: "cutlass::bfloat16_t"}
STRIDED_DGRAD = {
    1: ("kUnity", "cutlass::gemm::threadblock::GemmIdentityThreadblockSwizzle<>"),
    2: ("kStrided", "cutlass::conv::threadblock::StridedDgradIdentityThreadblockSwizzle<1>"),
}


@pytest.fixture(scope="module")
def engine() -> SimulatorEngine:
    return SimulatorEngine("80")


def build(source: Path, **defines: str) -> Path:
    return toolchain.build_library(source, defines=defines, includes=toolchain.cutlass_include())


@pytest.mark.parametrize(
    "case",
    [
        GemmCase("sm80_dgrad_bf16_128x128", 70, 136, 264, float_out=True),
        GemmCase("sm80_dgrad_f16_128x64_any", 33, 41, 150, float_out=True),
        GemmCase("sm80_wgrad_f16_64x128", 72, 136, 333, splits=2, float_out=True),
        GemmCase("sm80_wgrad_bf16_128x64_any", 37, 50, 130, float_out=True),
    ],
    ids=lambda case: case.instance,
)
def test_gemm_equals_the_host_reference(engine: SimulatorEngine, case: GemmCase) -> None:
    dy, a, b = gemm_operands(case)
    out, _ = run_gemm(engine, case, dy, b)
    operand = compressed(dy, case)
    values, words = (
        tensor if is_dgrad(case) else tensor[:, : case.m].t().contiguous()
        for tensor in (operand.values, operand.metadata)
    )
    k = values.shape[1] * 2
    padded_b = torch.nn.functional.pad(b, (0, 0, 0, k - case.k))
    theirs = torch.empty(case.m, case.n)
    library = engine.load(build(HERE / "cutlass_reference_gemm.cu", ELEMENT=ELEMENTS[b.dtype]))
    library.run(case.m, case.n, k, pointer(values), pointer(words), pointer(padded_b), pointer(theirs))
    magnitude = 2 * (a.double().abs() @ b.double().abs())  # both sum in float32
    assert_close(out, theirs.double(), magnitude, case.k)


@pytest.mark.parametrize(
    "case",
    [
        ConvCase("sm80_conv_dgrad_f16_128x64", (2, 24, 9, 7), (40, 3, 3)),
        ConvCase("sm80_conv_dgrad_f16_128x128", (2, 24, 9, 7), (40, 3, 3), stride=(2, 2)),
        ConvCase("sm80_conv_dgrad_f16_256x128", (1, 64, 11, 8), (24, 5, 5), padding=(2, 2)),
        ConvCase("sm80_conv_wgrad_f16_64x128", (2, 24, 9, 7), (40, 3, 3), float_out=True),
        ConvCase("sm80_conv_wgrad_f16_256x128", (2, 24, 9, 7), (40, 3, 3), stride=(2, 2), float_out=True),
        ConvCase("sm80_conv_wgrad_f16_128x128", (1, 64, 11, 8), (24, 5, 5), padding=(2, 2), splits=2, float_out=True),
    ],
    ids=lambda case: f"{case.instance}-stride{case.stride[0]}",
)
def test_convolution_equals_the_dense_kernel(engine: SimulatorEngine, case: ConvCase) -> None:
    (n, c, h, w), (k, r, s) = case.x, case.filter
    p, q = out_size(case)
    x, weight = torch.randn(case.x).to(dtype_of(case)), torch.randn(k, c, r, s).to(dtype_of(case))
    dy = sparse_matrix(n * p * q, k, 1 if is_dgrad(case) else 0, dtype_of(case))
    other = weight if is_dgrad(case) else x
    out, _ = run_conv(engine, case, dy, other)

    decompressed = engine.put(compressed(dy, case).decompress().contiguous())
    theirs = engine.poisoned(out.shape, torch.float32)
    if is_dgrad(case):
        strides, swizzle = STRIDED_DGRAD[case.stride[0]]
        path = build(toolchain.HERE / "kernels" / "cutlass_dgrad.cu", STRIDES=strides, SWIZZLE=swizzle)
    else:
        path = build(HERE / "cutlass_wgrad.cu")
    library: ctypes.CDLL = engine.load(path)
    sizes = (n, h, w, c, k, r, s, case.padding[0], case.stride[0], case.dilation[0])
    device_other: Tensor = engine.put(other.permute(0, 2, 3, 1).contiguous())
    with engine.checked(), engine.poisoned_shared():
        assert library.run(*sizes, pointer(decompressed), pointer(device_other), pointer(theirs)) == 0

    geometry = Conv2dGeometry.of(case.x, (k, c, r, s), (*case.stride, *case.padding, *case.dilation, 1), True)
    gradient = dense.layer_view(dy, geometry).double()
    magnitude = 2 * conv_gradient(case, x.double().abs(), weight.double().abs(), gradient.abs())
    assert_close(out, theirs.double(), magnitude, k * r * s if is_dgrad(case) else n * p * q)
