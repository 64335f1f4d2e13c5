"""The Hopper products against float64, on a GPU that has them and else on the simulator."""

from __future__ import annotations

import random
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

import cutlass_ops
from sdgp_accel.semi_structured import SparseOperand, compress_matrix
from tests.kernels.hopper import Engine, GpuEngine, SimulatorEngine, compile_for_simulator
from tests.ptxsim import toolchain

DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16}
ON_GPU = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0) and "90a" in cutlass_ops.ARCHS


class GemmCase(NamedTuple):
    """One product; a name in `instance` covers pass, dtype and tile."""

    instance: str
    m: int
    n: int
    k: int
    splits: int = 1
    cluster_size: int = 1
    group_n: int = 2
    float_out: bool = False
    accumulate: bool = False


GEMM_CASES = [
    GemmCase("dgrad_bf16_128x256", 130, 264, 200),
    GemmCase("dgrad_bf16_128x256", 300, 72, 1100, cluster_size=2),  # rings wrap; an odd number of k tiles
    GemmCase("dgrad_bf16_128x256", 1, 8, 8, cluster_size=2, float_out=True),  # a CTA of the cluster has no rows
    GemmCase("dgrad_f16_128x128", 260, 520, 136, cluster_size=2, group_n=3, accumulate=True),
    GemmCase("wgrad_bf16_256x128", 264, 136, 517, splits=3, cluster_size=2, float_out=True, accumulate=True),
    GemmCase("wgrad_bf16_256x128", 8, 8, 1),
    GemmCase("wgrad_f16_128x256", 136, 520, 323, splits=2, group_n=1),
    GemmCase("wgrad_f16_128x256", 200, 8, 150, cluster_size=2, float_out=True),
]


class ConvCase(NamedTuple):
    """One convolution gradient: y[n, c_out, p, q] = conv(x[n, c_in, h, w], filter[c_out, c_in, r, s])."""

    instance: str
    x: tuple[int, int, int, int]
    filter: tuple[int, int, int]
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (1, 1)
    dilation: tuple[int, int] = (1, 1)
    splits: int = 1
    cluster_size: int = 1


CONV_CASES = [
    ConvCase("conv_dgrad_bf16_128x128", (2, 72, 7, 7), (64, 3, 3)),  # one k tile per tap
    ConvCase("conv_dgrad_bf16_128x128", (2, 64, 9, 8), (192, 3, 3), stride=(2, 2), cluster_size=2),  # three
    ConvCase("conv_dgrad_bf16_128x128", (1, 16, 10, 9), (24, 3, 2), stride=(3, 1), padding=(0, 1), dilation=(1, 2)),
    ConvCase("conv_wgrad_bf16_128x256", (2, 72, 9, 8), (136, 3, 3), splits=2, cluster_size=2),
    ConvCase("conv_wgrad_bf16_128x256", (3, 8, 11, 6), (8, 2, 3), stride=(2, 1), padding=(1, 0), dilation=(2, 1)),
]


@pytest.fixture(scope="module")
def engine() -> Engine:
    if ON_GPU:
        return GpuEngine()
    if reason := toolchain.missing():
        pytest.skip(reason)
    compile_for_simulator(sorted({f"sm90_{case.instance}" for case in [*GEMM_CASES, *CONV_CASES]}))
    return SimulatorEngine()


def sparse_matrix(rows: int, columns: int, axis: int, dtype: torch.dtype) -> Tensor:
    """Random, with zero to two non-zeros in each group of 4 along `axis`."""
    matrix = torch.randn(rows, columns) if axis == 1 else torch.randn(columns, rows)
    padded = torch.nn.functional.pad(matrix, (0, -matrix.shape[1] % 4))
    quads = padded.view(matrix.shape[0], -1, 4)
    order = torch.rand_like(quads).argsort(-1)
    kept = (order < 2) & (torch.rand_like(quads) < 0.9)
    result = quads.where(kept, 0).view_as(padded)[:, : matrix.shape[1]].to(dtype)
    return result if axis == 1 else result.t().contiguous()


def arguments(engine: Engine, operand: SparseOperand, b: Tensor, out: Tensor, splits: int) -> dict[str, object]:
    workspace = engine.poisoned((splits, out.numel()), torch.float32) if splits > 1 else None
    return {
        "values": engine.put(operand.values), "metadata": engine.put(operand.metadata), "b": engine.put(b),
        "out": out, "workspace": workspace, "padded_k": operand.values.shape[operand.axis] * 2, "splits": splits,
    }  # fmt: skip


def assert_close(out: Tensor, exact: Tensor, magnitude: Tensor, k: int) -> None:
    """`exact` up to float32 summation of `k` products that sum to `magnitude` in absolute value, rounded once."""
    rounding = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 0.0}[out.dtype]
    allowed = rounding * exact.abs() + 2.0**-23 * (2 + k**0.5) * (1 + rounding) * magnitude + 1e-7
    error = (out.cpu().double() - exact).abs()
    assert (error <= allowed).all(), f"error {error.max():.3e} at {(error > allowed).sum()} places"


def run_gemm(engine: Engine, case: GemmCase, dy: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """The product and what the output held before."""
    is_dgrad = case.instance.startswith("dgrad")
    operand = compress_matrix(dy, 1 if is_dgrad else 0, k_align=128 if is_dgrad else 16)
    dtype = torch.float32 if case.float_out else b.dtype
    before = torch.randn(case.m, case.n).to(dtype) if case.accumulate else torch.zeros(case.m, case.n, dtype=dtype)
    out = engine.put(before) if case.accumulate else engine.poisoned((case.m, case.n), dtype)
    engine.gemm(
        f"sm90_{case.instance}", m=case.m, n=case.n, k=case.k, group_n=case.group_n, cluster_size=case.cluster_size,
        out_is_float=case.float_out, accumulate=case.accumulate, **arguments(engine, operand, b, out, case.splits),
    )  # fmt: skip
    return out, before


def gemm_operands(case: GemmCase) -> tuple[Tensor, Tensor, Tensor]:
    """dY, A (dY or its transpose) and B."""
    is_dgrad = case.instance.startswith("dgrad")
    dtype = DTYPES[case.instance.split("_")[1]]
    rows, columns = (case.m, case.k) if is_dgrad else (case.k, case.m)
    dy = sparse_matrix(rows, columns, 1 if is_dgrad else 0, dtype)
    return dy, dy if is_dgrad else dy.t(), torch.randn(case.k, case.n).to(dtype)


@pytest.mark.parametrize("case", GEMM_CASES, ids=lambda c: f"{c.instance}-{c.m}x{c.n}x{c.k}")
def test_gemm(engine: Engine, case: GemmCase) -> None:
    dy, a, b = gemm_operands(case)
    out, before = run_gemm(engine, case, dy, b)
    a, b = a.double(), b.double()
    assert_close(out, a @ b + before.double(), a.abs() @ b.abs() + before.double().abs(), case.k)


def test_gemm_of_random_shapes(engine: Engine) -> None:
    for case in random.choices(GEMM_CASES, k=3):
        drawn = case._replace(m=random.randint(1, 40) * 8, n=random.randint(1, 40) * 8, k=random.randint(257, 500))
        dy, a, b = gemm_operands(drawn)
        out, before = run_gemm(engine, drawn, dy, b)
        a, b = a.double(), b.double()
        assert_close(out, a @ b + before.double(), a.abs() @ b.abs() + before.double().abs(), drawn.k)


def test_split_gemm_repeats_its_bits(engine: Engine) -> None:
    case = GemmCase("wgrad_f16_128x256", 72, 72, 700, splits=4, float_out=True)
    dy, _, b = gemm_operands(case)
    assert torch.equal(run_gemm(engine, case, dy, b)[0], run_gemm(engine, case, dy, b)[0])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_gradient_reaches_its_row_only(engine: Engine, value: float) -> None:
    case = GemmCase("dgrad_bf16_128x256", 40, 24, 72)
    dy, _, b = gemm_operands(case)
    dy[7] = 0
    dy[7, 33] = value
    out, _ = run_gemm(engine, case, dy, b)
    finite = out.cpu().isfinite().all(1)
    assert not out.cpu()[7].isfinite().any()
    assert finite.sum() == case.m - 1


def test_more_parts_than_blocks_of_k_are_refused(engine: Engine) -> None:
    case = GemmCase("wgrad_bf16_256x128", 8, 8, 100, splits=2)
    dy, _, b = gemm_operands(case)
    with pytest.raises(RuntimeError):
        run_gemm(engine, case, dy, b)


@pytest.mark.parametrize("case", CONV_CASES, ids=lambda c: f"{c.instance}-{'x'.join(map(str, (*c.x, *c.filter)))}")
def test_conv(engine: Engine, case: ConvCase) -> None:
    (batch, c_in, h, w), (c_out, r, s) = case.x, case.filter
    window = (case.stride, case.padding, case.dilation)
    x, weight = torch.randn(case.x).bfloat16(), torch.randn(c_out, c_in, r, s).bfloat16()
    shape_of_y = torch.nn.functional.conv2d(x.to("meta"), weight.to("meta"), None, *window).shape
    p, q = shape_of_y[2:]
    is_dgrad = "dgrad" in case.instance
    dy = sparse_matrix(batch * p * q, c_out, 1 if is_dgrad else 0, torch.bfloat16)
    operand = compress_matrix(dy, 1 if is_dgrad else 0, k_align=128 if is_dgrad else 16)
    b, out_shape = (weight, (batch, h, w, c_in)) if is_dgrad else (x, (c_out, r, s, c_in))
    out = engine.poisoned(out_shape, torch.bfloat16)
    engine.conv(
        f"sm90_{case.instance}", shape=(batch, h, w, c_in, p, q, c_out, r, s),
        window=[v for pair in window for v in pair], group_n=2, cluster_size=case.cluster_size, out_is_float=False,
        accumulate=False, **arguments(engine, operand, b.permute(0, 2, 3, 1).contiguous(), out, case.splits),
    )  # fmt: skip

    y_gradient = dy.view(batch, p, q, c_out).permute(0, 3, 1, 2)

    def gradient(x: Tensor, weight: Tensor, dy: Tensor) -> Tensor:
        if is_dgrad:
            return torch.nn.grad.conv2d_input(x.shape, weight, dy, *window).permute(0, 2, 3, 1)
        return torch.nn.grad.conv2d_weight(x, weight.shape, dy, *window).permute(0, 2, 3, 1)

    tensors = (x.double(), weight.double(), y_gradient.double())
    terms = c_out * r * s if is_dgrad else batch * p * q
    assert_close(out, gradient(*tensors), gradient(*(t.abs() for t in tensors)), terms)
