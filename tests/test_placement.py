"""Which kernels a model's layers would run on."""

import pytest
import torch
from torch import nn

from sdgp_accel import SDGPConfig
from sdgp_accel.backends.tiles import Tiling
from sdgp_accel.placement import GPUS, _kernel, placements


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 64, 3, padding=1)
        self.body = nn.Conv2d(64, 128, 3, padding=1)
        self.grouped = nn.Conv2d(128, 128, 3, padding=1, groups=4)
        self.head = nn.Linear(128, 10)

    def forward(self, x):
        return self.head(self.grouped(self.body(self.stem(x))).mean((2, 3)))


def placed(arch, **config):
    batch = torch.empty(16, 3, 32, 32, device="meta")
    return {layer.name: layer for layer in placements(Net(), batch, GPUS[arch], SDGPConfig(**config))}


@pytest.mark.parametrize("arch", GPUS)
def test_every_layer_has_a_place_and_every_dense_one_a_reason(arch):
    layers = placed(arch)
    assert list(layers) == ["stem", "body", "grouped", "head"]
    assert "3 input channels" in layers["stem"].reason
    assert "groups = 4" in layers["grouped"].reason
    assert layers["body"].dgrad.startswith("sm90" if arch == "90" else "sm80")
    assert layers["head"].wgrad.split()[0] == layers["body"].wgrad.split()[0]  # 10 classes are no obstacle


def test_passes_that_stay_dense_are_dense():
    layers = placed("80", grad_input="dense")
    assert layers["body"].dgrad == "dense"
    assert layers["body"].wgrad.startswith("sm80")


def test_a_gradient_that_nothing_needs_has_no_kernel():
    (layer,) = placements(nn.Conv2d(64, 128, 3), torch.empty(16, 64, 32, 32, device="meta"), GPUS["80"])
    assert layer.dgrad == "dense"
    assert layer.wgrad.startswith("sm80")
    assert layer.reason == "its input needs no gradient"
    assert layer.shape == "14400×576→128"


def test_what_the_layers_compute_in_decides():
    model, batch = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)), torch.empty(8192, 64)
    (_, half), (_, single) = (placements(model, batch, GPUS["80"], dtype=dtype) for dtype in (torch.half, torch.float))
    assert half.dgrad.startswith("sm80")
    assert "×" not in half.dgrad.split()[-1]
    assert half.wgrad.split()[-1].startswith("×"), "few tiles that reduce over many positions: in parts"
    assert single.dgrad == single.wgrad == "dense"
    assert "float32" in single.reason


def test_a_kernel_says_how_its_reduction_is_divided():
    tiling = Tiling("sm90", "128x256", cluster_size=2, splits=1, group_n=8)
    divided = (tiling, tiling._replace(splits=3), tiling._replace(owned_steps=5))
    assert [_kernel(each) for each in divided] == ["sm90 128x256", "sm90 128x256 ×3", "sm90 128x256 shared"]


def test_patterns_that_are_no_operand_have_a_reason():
    assert "4:8" in placed("80", n=4, m=8)["body"].reason
