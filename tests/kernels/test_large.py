"""Operands of more than 2^31 elements, on a GPU with the memory for them: parts of the result against float64.

`test_far_products` and `test_far_prune_compress` run single blocks of such launches on the simulator.
"""

from __future__ import annotations

import pytest
import torch

import cutlass_ops
from sdgp_accel.backends import cutlass, gpu, products
from sdgp_accel.geometry import LinearGeometry
from sdgp_accel.semi_structured import SparseOperand
from tests.kernels.products import assert_close, stored

CUDA = torch.device("cuda", 0)
POSITIONS, WIDE, NARROW = 1_200_000, 4096, 64  # 4.9e9 elements; compressed 2.5e9
BYTES = 24 << 30
HAS_ROOM = torch.cuda.is_available() and torch.cuda.get_device_properties(0).total_memory > 2 * BYTES
pytestmark = pytest.mark.skipif(not (HAS_ROOM and cutlass_ops.ARCHS), reason="no GPU of 48 GiB with the kernels built")


@pytest.fixture(params=["hopper", "any"])
def family(request, monkeypatch):
    """Hopper's own kernels where this is one, and those of every GPU."""
    if request.param == "any":
        monkeypatch.setattr(products, "_tma_can_reach", lambda geometry: False)
    elif gpu.device_facts(CUDA).capability != gpu.HOPPER:
        pytest.skip("not a Hopper")
    products.plan_product.cache_clear()  # it remembers what another family has launched for the same shape
    yield
    products.plan_product.cache_clear()


def random_operand(t: int, c: int, axis: int) -> SparseOperand:
    shape = (t, c // 2) if axis == 1 else (t // 2, c)
    values = torch.randn(shape, device=CUDA, dtype=torch.bfloat16)
    legal = torch.tensor([0x4, 0x8, 0xC, 0x9, 0xD, 0xE], device=CUDA)  # the six pairs of ascending indices
    words = torch.zeros((t, c // 16) if axis == 1 else (t // 16, c), device=CUDA, dtype=torch.int16)
    for group in range(4):
        words |= legal[torch.randint(6, words.shape, device=CUDA)].to(torch.int16) << 4 * group
    return SparseOperand(values, words, axis, (t, c))


def rows_of(operand: SparseOperand, first: int, count: int) -> torch.Tensor:
    """Rows [first, first + count) of the dense matrix, in float64."""
    values, words = operand.values, operand.metadata
    if operand.axis == 1:
        values, words = values[first : first + count], words[first : first + count]
    else:
        values, words = values[first // 2 : (first + count) // 2], words[first // 16 : (first + count) // 16]
    return SparseOperand(values, words, operand.axis, (count, operand.shape[1])).decompress().double()


def test_dgrad(family):
    operand = random_operand(POSITIONS, WIDE, 1)
    weight = torch.randn(WIDE, NARROW, device=CUDA, dtype=torch.bfloat16)
    dx = cutlass.BACKEND.dgrad(stored(operand), weight, LinearGeometry(POSITIONS, NARROW, WIDE))
    for first in (0, POSITIONS // 2, POSITIONS - 256):
        a, b = rows_of(operand, first, 256), weight.double()
        assert_close(dx[first : first + 256], (a @ b).cpu(), (a.abs() @ b.abs()).cpu(), WIDE)


def test_wgrad(family):
    operand = random_operand(POSITIONS, NARROW, 0)
    x = torch.randn(POSITIONS, WIDE, device=CUDA, dtype=torch.bfloat16)
    dw = cutlass.BACKEND.wgrad(stored(operand), x, LinearGeometry(POSITIONS, WIDE, NARROW))
    exact = torch.zeros(NARROW, WIDE, device=CUDA, dtype=torch.float64)
    magnitude = torch.zeros_like(exact)
    step = POSITIONS // 25
    for first in range(0, POSITIONS, step):
        a, b = rows_of(operand, first, step).t(), x[first : first + step].double()
        exact += a @ b
        magnitude += a.abs() @ b.abs()
    assert_close(dw, exact.cpu(), magnitude.cpu(), POSITIONS)
