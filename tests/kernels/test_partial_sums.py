"""The sum that ends a split reduction, for few and many outputs of few and many parts."""

from __future__ import annotations

import ctypes

import pytest
import torch

from cutlass_ops import build_kernels
from tests.kernels.products import SimulatorEngine, toolkit_for_simulator

pytestmark = pytest.mark.timeout(600)


class PartialSums(ctypes.Structure):
    """SdgpPartialSums of partial_sums_api.h."""

    _fields_ = [
        ("partials", ctypes.c_void_p), ("out", ctypes.c_void_p), ("count", ctypes.c_int64),
        *((name, ctypes.c_int32) for name in ("splits", "out_is_float", "is_bfloat16", "accumulate", "sm_count",
                                              "overlaps")),
        ("stream", ctypes.c_void_p),
    ]  # fmt: skip


@pytest.fixture(scope="module")
def simulated(tmp_path_factory):
    """The simulator of an H100, and the library on it."""
    toolkit, path = toolkit_for_simulator(), tmp_path_factory.mktemp("sums") / "sums.so"
    source = build_kernels.INSTANCES / "partial_sums.cu"
    build_kernels.link(toolkit, [build_kernels.compile_instance(toolkit, source, ("compute_90a",))], path)
    engine = SimulatorEngine("90a")
    return engine, engine.load(path)


def sums(
    simulated, splits: int, count: int, dtype: torch.dtype, accumulate: bool = False, shift: int = 0, sms: int = 4
):
    """What the kernel wrote, the exact sums, the sums of magnitudes. shift: elements that `out` is off alignment by."""
    engine, library = simulated
    partials, before = torch.randn(splits, count), torch.randn(count).to(dtype)
    on_device = engine.put(partials)
    shifted = engine.put(torch.cat([torch.zeros(shift).to(dtype), before])) if accumulate else None
    out = engine.poisoned((count,), dtype) if shifted is None else shifted[shift:]
    problem = PartialSums(
        on_device.data_ptr(), out.data_ptr(), count, splits, dtype == torch.float32, dtype == torch.bfloat16,
        accumulate, sms, 1,
    )  # fmt: skip
    with engine.checked():
        assert library.sdgp_sum_partials(ctypes.byref(problem)) == 0
    exact, magnitudes = partials.double().sum(0), partials.double().abs().sum(0)
    if accumulate:
        exact, magnitudes = exact + before.double(), magnitudes + before.double().abs()
    return out.clone(), exact, magnitudes


# 4 multiprocessors take 16 blocks of 256 threads: rows of threads share the splits of up to 8192 outputs.
@pytest.mark.parametrize(
    ("splits", "count"),
    [(2, 24), (3, 1), (4, 4), (5, 1004), (7, 4100), (8, 8188), (8, 8192), (16, 129), (33, 12), (132, 64), (129, 260)],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_every_part_is_added_once(simulated, splits, count, dtype):
    out, exact, magnitudes = sums(simulated, splits, count, dtype)
    # One rounding per addition in float32 (Higham, Accuracy and Stability, 4.2) and one to the result's type.
    bound = magnitudes * splits * 2.0**-24 + exact.abs() * torch.finfo(dtype).eps / 2 + 1e-7
    assert ((out.double() - exact).abs() <= bound).all()


@pytest.mark.parametrize(("splits", "count", "shift"), [(132, 64, 0), (16, 64, 1), (2, 40, 0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_sum_is_added_to_what_is_there(simulated, splits, count, shift, dtype):
    out, exact, magnitudes = sums(simulated, splits, count, dtype, accumulate=True, shift=shift)
    bound = magnitudes * (splits + 1) * 2.0**-24 + exact.abs() * torch.finfo(dtype).eps / 2 + 1e-7
    assert ((out.double() - exact).abs() <= bound).all()


def test_blocks_take_turns_at_more_outputs_than_they_hold(simulated):
    """With one multiprocessor, 4 blocks. Rows of threads there are only where every block has one turn."""
    for splits, count in ((2, 9000), (4, 2000), (64, 516)):
        out, exact, magnitudes = sums(simulated, splits, count, torch.float32, sms=1)
        assert ((out.double() - exact).abs() <= magnitudes * splits * 2.0**-24 + 1e-7).all()


def test_non_finite_parts_reach_the_sum(simulated):
    engine, library = simulated
    partials = torch.ones(40, 8)
    partials[17, 1], partials[39, 2], partials[0, 3] = float("nan"), float("inf"), float("-inf")
    on_device, out = engine.put(partials), engine.poisoned((8,), torch.float32)
    problem = PartialSums(on_device.data_ptr(), out.data_ptr(), 8, 40, 1, 0, 0, 4, 1)
    with engine.checked():
        assert library.sdgp_sum_partials(ctypes.byref(problem)) == 0
    assert torch.equal(out.isnan(), partials.sum(0).isnan())
    expected = torch.tensor([40.0, float("nan"), float("inf"), float("-inf"), *[40.0] * 4])
    torch.testing.assert_close(out.clone(), expected, equal_nan=True, rtol=0, atol=0)
