"""How a backend is found, and the dense GEMMs that all of them are measured by."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from torch import Tensor

from sdgp_accel import backends, ops
from sdgp_accel.backends import Needs, dense
from sdgp_accel.config import SDGPConfig
from sdgp_accel.geometry import Conv2dGeometry, Geometry, LinearGeometry
from sdgp_accel.layer_plan import decode, plan_string


def test_a_backend_is_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "toy.py").write_text("class Toy:\n    name = 'toy'\nBACKEND = Toy()\n")
    assert backends.load("toy") is None
    monkeypatch.setattr(backends, "__path__", [*backends.__path__, str(tmp_path)])
    assert backends.load("toy").name == "toy"
    assert backends.load("reference").name == "reference"


@pytest.mark.parametrize("needs", [Needs(*flags) for flags in itertools.product([False, True], repeat=3)])
def test_reference_prepares_only_what_is_needed(needs: Needs) -> None:
    plan = decode(plan_string("linear", SDGPConfig(prune="magnitude")))
    dy = torch.randn(12, 8)
    operands = backends.load("reference").prune_compress(dy, LinearGeometry(12, 8, 8), plan, None, needs)
    assert tuple(operand is not None for operand in operands) == tuple(needs)
    if needs.dgrad:
        assert (operands.dgrad.view(12, 2, 4) != 0).sum(-1).eq(2).all()
    if needs.wgrad:
        assert (operands.wgrad.t().reshape(8, 3, 4) != 0).sum(-1).eq(2).all()
    if needs.bias:
        torch.testing.assert_close(operands.bias, dy.sum(0))


def test_a_backend_is_given_the_tilings_of_the_decision() -> None:
    class Recording(type(backends.load("reference"))):
        def dgrad(self, operand, weight, geometry, tiling=None, shape=None):
            given.append(tiling)
            return super().dgrad(operand, weight, geometry)

        def wgrad(self, operand, x, geometry, tiling=None):
            given.append(tiling)
            return super().wgrad(operand, x, geometry)

    given: list[object] = []
    dy, x, weight = torch.randn(8, 4), torch.randn(8, 12), torch.randn(4, 12)
    plan = decode(plan_string("linear", SDGPConfig()))
    decision = backends.Decision(LinearGeometry(8, 12, 4), Recording(), plan, True, "")
    ops.run(dy, x, weight, False, decision)
    ops.run(dy, x, weight, False, decision._replace(tilings=backends.Tilings("fast", "faster")))
    assert given == [None, None, "fast", "faster"]


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(
    ("stride", "padding", "dilation", "groups"), [(1, 0, 1, 1), (2, 1, 1, 1), (1, 2, 2, 2), ((2, 1), (0, 1), (1, 2), 4)]
)
def test_dense_convolution_gradients(
    stride: object, padding: object, dilation: object, groups: int, channels_last: bool
) -> None:
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    x = torch.randn(2, 8, 9, 10, dtype=torch.float64).to(memory_format=memory_format)
    weight = torch.randn(12, 8 // groups, 3, 3, dtype=torch.float64).to(memory_format=memory_format)
    y = torch.conv2d(x, weight, None, stride, padding, dilation, groups)
    dy = torch.randn_like(y)
    pair = lambda value: value if isinstance(value, tuple) else (value, value)  # noqa: E731
    window = (*pair(stride), *pair(padding), *pair(dilation), groups)
    geometry = Conv2dGeometry.of(x.shape, weight.shape, window, channels_last)
    arguments = (stride, padding, dilation, groups)
    dx, dw = dense.dgrad(dy, weight, geometry), dense.wgrad(dy, x, geometry)
    torch.testing.assert_close(dx, torch.nn.grad.conv2d_input(x.shape, weight, dy, *arguments))
    torch.testing.assert_close(dw, torch.nn.grad.conv2d_weight(x, weight.shape, dy, *arguments))
    for gradient in (dx, dw):
        assert gradient.is_contiguous(memory_format=memory_format)
    matrix = dense.matrix_view(dy, geometry)
    assert matrix.shape == (geometry.positions, 12)
    assert torch.equal(dense.layer_view(matrix, geometry), dy)
    assert (matrix.data_ptr() == dy.data_ptr()) == channels_last  # a copy only where it cannot be avoided


def wgrad_case(kind: str) -> tuple[Tensor, Tensor, Geometry]:
    if kind == "linear":
        return torch.randn(7, 6), torch.randn(7, 5), LinearGeometry(7, 5, 6)
    geometry = Conv2dGeometry.of((2, 4, 5, 6), (6, 4, 3, 3), (1, 1, 1, 1, 1, 1, 1), kind == "channels_last")
    return torch.randn(geometry.positions, 6), torch.randn(geometry.input_shape), geometry


@pytest.mark.parametrize("kind", ["linear", "conv2d", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_wgrad_delivers_to_out(kind: str, dtype: torch.dtype) -> None:
    reference = backends.load("reference")
    operand, x, geometry = wgrad_case(kind)
    operand, x = operand.bfloat16(), x.bfloat16()
    expected = reference.wgrad(operand.to(dtype), x.to(dtype), geometry)
    out = torch.full_like(expected, float("nan"))
    assert reference.wgrad(operand, x, geometry, out=out) is out
    assert torch.equal(out, expected)
    assert reference.wgrad(operand, x, geometry, out=out, accumulate=True) is out
    assert torch.equal(out, 2 * expected)


@pytest.mark.parametrize(
    ("out", "accumulate", "message"),
    [(None, True, "out=None"), (torch.empty(5, 6), False, r"\(5, 6\)"), (torch.empty(6, 5).half(), False, "float16")],
)
def test_wgrad_refuses_an_out_that_does_not_fit(out: Tensor | None, accumulate: bool, message: str) -> None:
    operand, x, geometry = wgrad_case("linear")
    with pytest.raises(ValueError, match=message):
        backends.load("reference").wgrad(operand, x, geometry, None, out, accumulate)


def test_dense_linear_gradients() -> None:
    dy, x, weight = torch.randn(7, 6), torch.randn(7, 5), torch.randn(6, 5)
    geometry = LinearGeometry.of(x.shape, 6)
    torch.testing.assert_close(dense.dgrad(dy, weight, geometry), dy @ weight)
    torch.testing.assert_close(dense.wgrad(dy, x, geometry), dy.T @ x)
    assert dense.matrix_view(dy.view(7, 1, 6), geometry).shape == (7, 6)
    assert dense.layer_view(dy, geometry) is dy
