"""Every convolution of ResNet-9, ResNet-18 and ResNet-50 through the sparse products, against float64: filters,
strides and paddings as they are, channels divided by 16, images of a few odd pixels.
"""

from __future__ import annotations

import random

import pytest

from sdgp_accel.backends.tiles import SM80, SM80_ANY, rank_tilings
from tests.kernels import test_sm80_sparse, test_sm90_sparse
from tests.kernels.products import ConvCase, Engine, GpuEngine, SimulatorEngine, check_conv
from tests.ptxsim import toolchain

pytestmark = pytest.mark.timeout(1800)  # the first test may have to compile the kernels

# (C_in, C_out, filter, stride, padding)
RESNET9 = [(3, 128, 3, 1, 1), (128, 256, 5, 2, 2), (256, 256, 3, 1, 1), (256, 512, 3, 1, 1), (512, 512, 3, 1, 1),
           (512, 256, 3, 1, 0)]  # fmt: skip
RESNET18 = [(3, 64, 7, 2, 3), (64, 64, 3, 1, 1)] + [
    layer for c in (64, 128, 256)
    for layer in ((c, 2 * c, 3, 2, 1), (c, 2 * c, 1, 2, 0), (2 * c, 2 * c, 3, 1, 1))
]  # fmt: skip
RESNET50 = [(3, 64, 7, 2, 3), (64, 64, 1, 1, 0), (64, 64, 3, 1, 1), (64, 256, 1, 1, 0), (256, 64, 1, 1, 0)] + [
    layer for c in (128, 256, 512)
    for layer in ((2 * c, c, 1, 1, 0), (c, c, 3, 2, 1), (c, 4 * c, 1, 1, 0), (2 * c, 4 * c, 1, 2, 0),
                  (4 * c, c, 1, 1, 0), (c, c, 3, 1, 1))
]  # fmt: skip
SCALED = sorted({
    (max(c_in // 16, 3 if c_in == 3 else 8), max(c_out // 16, 8), *window)
    for c_in, c_out, *window in RESNET9 + RESNET18 + RESNET50
})  # fmt: skip


FAMILIES = {"80": test_sm80_sparse, "90a": test_sm90_sparse}


@pytest.fixture(scope="module", params=FAMILIES, ids=lambda arch: f"{arch}-{'gpu' if FAMILIES[arch].ON_GPU else 'sim'}")
def arch(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def engine(arch: str) -> Engine:
    if FAMILIES[arch].ON_GPU:
        return GpuEngine()
    if reason := toolchain.missing():
        pytest.skip(reason)
    return SimulatorEngine(arch)


def draw_case(arch: str, product: str, c_in: int) -> ConvCase:
    """An instance; Hopper's are those that its own tests compile anyway, as they launch them."""
    if arch == "90a":
        cases = [case for case in test_sm90_sparse.CONV_CASES if f"_{product}_" in case.instance]
        return random.choice(cases)._replace(dilation=(1, 1), splits=1, owned_blocks=0)
    tiling = random.choice(rank_tilings(SM80_ANY if c_in % 8 else SM80, product, 64, 64, 64, 4))
    return ConvCase(f"sm80_conv_{product}_{random.choice(('bf16', 'f16'))}_{tiling.tile}", (0, 0, 0, 0), (0, 0, 0))


@pytest.mark.parametrize("product", ["dgrad", "wgrad"])
@pytest.mark.parametrize("layer", SCALED, ids=lambda layer: "-".join(map(str, layer)))
def test_layer(engine: Engine, arch: str, layer: tuple[int, ...], product: str) -> None:
    c_in, c_out, size, stride, padding = layer
    if arch == "90a" and c_in % 8:
        pytest.skip("TMA cannot address these rows: they run on the other kernels")
    x = (random.choice((1, 2, 3)), c_in, *random.choices((5, 7, 9), k=2))
    drawn = draw_case(arch, product, c_in)
    check_conv(engine, drawn._replace(x=x, filter=(c_out, size, size), stride=(stride,) * 2, padding=(padding,) * 2))
