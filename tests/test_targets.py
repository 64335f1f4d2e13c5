"""The node of autograd that multiplies, found from a layer's output: there validation and benchmarks hang hooks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sdgp_accel import SDGPConfig, SDGPConv2d, SDGPLinear
from sdgp_accel.targets import gemm_node

REFERENCE = SDGPConfig(backend="reference")


@pytest.mark.parametrize(
    ("layer", "shape", "name"),
    [
        (nn.Linear(8, 8), (4, 8), "AddmmBackward0"),
        (nn.Linear(8, 8, bias=False), (4, 8), "MmBackward0"),
        (nn.Linear(8, 8), (2, 4, 8), "AddmmBackward0"),  # behind a view
        (nn.Linear(8, 8, bias=False), (2, 4, 8), "MmBackward0"),  # behind an _unsafe_view
        (nn.Conv2d(8, 8, 3), (2, 8, 5, 5), "ConvolutionBackward0"),
        (SDGPLinear(8, 8, config=REFERENCE), (4, 8), "_LinearBackward"),
        (SDGPLinear(8, 8, config=REFERENCE), (2, 4, 8), "_LinearBackward"),
        (SDGPConv2d(8, 8, 3, config=REFERENCE), (2, 8, 5, 5), "_Conv2dBackward"),
    ],
    ids=lambda value: str(value),
)
def test_what_multiplies_is_found_behind_views_and_casts(layer: nn.Module, shape: tuple[int, ...], name: str) -> None:
    y = layer(torch.randn(shape))
    for output in (y, y.double(), y.view(-1), y.reshape(-1).double().view(-1, 1)):
        assert gemm_node(output.grad_fn).name() == name


def test_a_matrix_product_with_an_input_of_any_rank_is_found() -> None:
    """Of backends that have linear as one op, with a backward of its own."""

    class Node:
        def name(self) -> str:
            return "LinearBackward0"

    node = Node()
    assert gemm_node(node) is node


class Foreign(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        return dy


def test_what_computes_something_hides_the_product() -> None:
    y = nn.Linear(8, 8)(torch.randn(4, 8))
    assert gemm_node(y.relu().grad_fn) is None
    assert gemm_node((2 * y).grad_fn) is None
    assert gemm_node(Foreign.apply(y).grad_fn) is None  # another library's, although a Python function like ours
    assert gemm_node(Foreign.apply(y).view(-1).grad_fn) is None


def test_there_is_none_where_nothing_multiplies() -> None:
    assert gemm_node(None) is None
    leaf = torch.randn(4, requires_grad=True)
    assert gemm_node(leaf.view(2, 2).grad_fn) is None
