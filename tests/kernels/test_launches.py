"""The extension's launch objects of the products, as Python calls them. What kernels compute is tested by instance."""

from __future__ import annotations

import pytest
import torch

from sdgp_accel.semi_structured import compress_matrix
from tests.kernels.products import assert_close, sparse_matrix

pytestmark = pytest.mark.timeout(1800)  # the first test may have to compile the kernels

GEMM = {"m": 40, "n": 24, "k": 72, "padded_k": 128, "sm_count": 4}
CONV = {
    "shape": (2, 5, 6, 16, 5, 6, 24, 3, 3), "window": (1, 1, 1, 1, 1, 1), "padded_k": 64, "sm_count": 4,
}  # fmt: skip
GEMM_NAME, CONV_NAME = "sdgp_sm80_dgrad_f16_128x64", "sdgp_sm80_conv_wgrad_bf16_64x128"
ADDRESSES = dict.fromkeys(("values", "metadata", "b", "out"), 1 << 20)


def test_a_gemm_is_bound_once_and_launched_often(engine):
    launch = engine.kernels.SparseGemm(GEMM_NAME, **GEMM)
    for _ in range(2):
        dy, weight = sparse_matrix(40, 72, 1, torch.float16), torch.randn(72, 24).half()
        operand, out = compress_matrix(dy, 1, k_align=128), engine.empty(40, 24, dtype=torch.float16)
        tensors = [engine.put(tensor) for tensor in (operand.values, operand.metadata, weight)]
        with engine.launching():
            launch(*(tensor.data_ptr() for tensor in (*tensors, out)))
        a, b = dy.double(), weight.double()
        assert_close(out, a @ b, a.abs() @ b.abs(), 72)


def test_a_convolution_takes_its_shape_and_window(engine):
    """And its result may be float32."""
    shape, window = (2, 16, 7, 6), {"stride": (2, 1), "padding": (1, 2), "dilation": (1, 2)}
    x, weight_shape = torch.randn(shape).bfloat16(), (24, 16, 3, 3)
    p, q = torch.nn.functional.conv2d(x.float(), torch.zeros(weight_shape), **window).shape[2:]
    dy = sparse_matrix(2 * p * q, 24, 0, torch.bfloat16)
    operand = compress_matrix(dy, 0, k_align=64)
    launch = engine.kernels.SparseConv(
        CONV_NAME, shape=(2, 7, 6, 16, p, q, 24, 3, 3), window=(2, 1, 1, 2, 1, 2),
        padded_k=operand.values.shape[0] * 2, sm_count=4, out_is_float=True,
    )  # fmt: skip
    out = engine.empty(24, 3, 3, 16, dtype=torch.float32)
    tensors = [engine.put(t) for t in (operand.values, operand.metadata, x.permute(0, 2, 3, 1).contiguous())]
    with engine.launching():
        launch(**{name: t.data_ptr() for name, t in zip(ADDRESSES, (*tensors, out), strict=True)})
    gradient = dy.view(2, p, q, 24).permute(0, 3, 1, 2).double()
    exact, magnitude = (
        torch.nn.grad.conv2d_weight(a, weight_shape, b, **window).permute(0, 2, 3, 1)
        for a, b in ((x.double(), gradient), (x.double().abs(), gradient.abs()))
    )
    assert_close(out, exact, magnitude, 2 * p * q)


@pytest.mark.parametrize(
    ("argument", "value"),
    [("m", 0), ("n", 20), ("k", -1), ("padded_k", 64), ("padded_k", 144), ("splits", 0), ("group_n", 0),
     ("cluster_size", 3), ("sm_count", 0), ("values", 0), ("metadata", 8), ("b", 2), ("out", 1)],
)  # fmt: skip
def test_bad_arguments_of_a_gemm_are_named(engine, argument, value):
    addresses = ADDRESSES | ({argument: value} if argument in ADDRESSES else {})
    shape = GEMM | ({} if argument in ADDRESSES else {argument: value})
    with pytest.raises(ValueError, match=argument):
        engine.kernels.SparseGemm(GEMM_NAME, **shape)(**addresses)


@pytest.mark.parametrize(
    ("change", "message"),
    [({"shape": (2, 5, 6, 12, 5, 6, 24, 3, 3)}, "c_in"), ({"shape": (0, 5, 6, 16, 5, 6, 24, 3, 3)}, "shape"),
     ({"window": (0, 1, 1, 1, 1, 1)}, "stride"), ({"window": (1, 1, 1, 1, 1, 0)}, "dilation"),
     ({"padded_k": 32}, "padded_k"), ({"splits": 2}, "workspace")],
)  # fmt: skip
def test_bad_arguments_of_a_convolution_are_named(engine, change, message):
    with pytest.raises(ValueError, match=message):
        engine.kernels.SparseConv(CONV_NAME, **CONV | change)(**ADDRESSES)


def test_products_that_do_not_exist_are_named(engine):
    with pytest.raises(ValueError, match="no kernel sdgp_sm80_dgrad_f16_64x64"):
        engine.kernels.SparseGemm("sdgp_sm80_dgrad_f16_64x64", **GEMM)
