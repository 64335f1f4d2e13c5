"""The whole backward of a layer through the cutlass backend, prune+compress to gradients, on the PTX simulator.

The operands of both backends are the same bit for bit, so the gradients may differ by the products' rounding only.
On a GPU tests/test_layers_cuda.py and test_backend.py do this with the real runtime.
"""

from __future__ import annotations

import copy

import pytest
import torch

import cutlass_ops
from sdgp_accel import SDGPConfig, SDGPConv2d, SDGPLinear, backends, ops
from sdgp_accel.backends import Call, Decision, Needs, Tilings, _resolve_scope, cutlass, dense, gpu, reference
from sdgp_accel.geometry import Conv2dGeometry, LinearGeometry
from sdgp_accel.layer_plan import decode, plan_string
from sdgp_accel.philox import Rng
from tests.kernels.products import SimulatedKernels, SimulatorEngine, assert_close

pytestmark = pytest.mark.timeout(1800)  # the first test may have to compile the kernels

CPU = torch.device("cpu")

CONFIGS = [
    {}, {"prune": "random"}, {"prune": "magnitude"}, {"prune": "rescale_magnitude", "scope": "group"},
    {"prune": "rescale_magnitude", "scope": "sample_channel"}, {"prune": "rescale_magnitude", "scope": "tensor"},
    {"n": 1, "m": 8}, {"prune": {"grad_input": "magnitude", "grad_weight": "mvue"}}, {"grad_input": "dense"},
]  # fmt: skip
GEOMETRIES = {
    "linear": LinearGeometry(3 * 50, 72, 40, 50),
    "linear_wide": LinearGeometry(3 * 50, 72, 200, 50),
    "linear_odd": LinearGeometry(3 * 37, 36, 21, 37),
    "pointwise": Conv2dGeometry.of((2, 24, 9, 7), (40, 24, 1, 1), (1, 1, 0, 0, 1, 1, 1), True),
    "1x1_padded": Conv2dGeometry.of((2, 24, 9, 7), (40, 24, 1, 1), (1, 1, 1, 0, 1, 1, 1), True),  # not a matrix product
    "3x3": Conv2dGeometry.of((2, 24, 9, 7), (40, 24, 3, 3), (1, 1, 1, 1, 1, 1, 1), True),
    "5x5_stride": Conv2dGeometry.of((2, 16, 10, 9), (24, 16, 5, 5), (2, 2, 2, 2, 1, 1, 1), False),
    "3x3_odd": Conv2dGeometry.of((2, 3, 8, 9), (13, 3, 3, 3), (2, 1, 1, 0, 1, 2, 1), True),
}


@pytest.fixture
def simulated(engine, monkeypatch):
    """The backend believes in an A100 with a few multiprocessors."""
    if engine.name != "sim":
        pytest.skip("a GPU runs whole layers in tests/test_layers_cuda.py")
    kernels = SimulatedKernels(SimulatorEngine("80"), engine.kernels)
    monkeypatch.setattr(gpu, "device_facts", lambda device: gpu.Device((8, 0), SimulatorEngine.sm_count))
    monkeypatch.setattr(gpu, "current_device", lambda: None)  # the index of the CPU
    monkeypatch.setattr(gpu, "stream_of", lambda device: 0)
    monkeypatch.setattr(cutlass_ops, "ARCHS", ("80",))
    monkeypatch.setattr(cutlass_ops, "kernels", lambda: kernels)


def decision_for(config, geometry):
    kind = "linear" if isinstance(geometry, LinearGeometry) else "conv2d"
    plan = _resolve_scope(decode(plan_string(kind, SDGPConfig(**config, backend="cutlass"))), geometry)
    assert cutlass.BACKEND.unsupported(geometry, plan, torch.bfloat16, CPU) is None
    return Decision(geometry, cutlass.BACKEND, plan, plan.draws, "")


@pytest.mark.parametrize(
    ("name", "config"),
    [(name, config) for name in GEOMETRIES for config in (CONFIGS if name in ("linear", "3x3") else CONFIGS[::4])],
    ids=str,
)
def test_backward_equals_float64_on_the_pruned_gradient(simulated, monkeypatch, name, config):
    geometry = GEOMETRIES[name]
    dtype = torch.bfloat16 if torch.rand(()) < 0.5 else torch.float16
    is_linear = isinstance(geometry, LinearGeometry)
    memory_format = torch.contiguous_format if is_linear else torch.channels_last
    tokens = (geometry.positions // geometry.positions_per_sample, geometry.positions_per_sample)
    x = torch.randn((*tokens, geometry.in_channels) if is_linear else geometry.input_shape).to(dtype)
    weight = torch.randn(geometry.weight_shape).to(dtype)
    dy = dense.layer_view(torch.randn(geometry.positions, geometry.out_channels).to(dtype), geometry)
    if is_linear:
        dy = dy.view(*tokens, geometry.out_channels)
    x, weight = x.contiguous(memory_format=memory_format), weight.contiguous(memory_format=memory_format)
    seed = torch.randint(-(2**63), 2**63 - 1, (2,))
    if torch.rand(()) < 0.5:  # as on a GPU, where it comes from the host
        seed = tuple(seed.tolist())
    monkeypatch.setattr("sdgp_accel.philox.next_seed", lambda device: seed)
    decision = decision_for(config, geometry)
    dx, dw, db = ops.run(dy, x, weight, True, decision)

    matrix, plan = dense.matrix_view(dy, geometry), decision.plan
    needs = Needs(plan.grad_input is not None, plan.grad_weight is not None, True)
    pruned = reference.BACKEND.prune_compress(dy, geometry, plan, Rng(seed), needs)
    for out, gradient, other, product, terms in (
        (dx, pruned.dgrad, weight, dense.dgrad, geometry.out_channels * weight[0, 0].numel()),
        (dw, pruned.wgrad, x, dense.wgrad, geometry.positions),
    ):
        assert out.dtype == dtype
        assert out.shape == (weight if out is dw else x).shape
        if gradient is None:  # torch's own product
            continue
        gradient, other = dense.layer_view(gradient, geometry).double(), other.double()
        exact, magnitude = product(gradient, other, geometry), product(gradient.abs(), other.abs(), geometry)
        assert_close(out, exact.view(out.shape), magnitude.view(out.shape), terms)
    assert_close(db, matrix.double().sum(0), matrix.double().abs().sum(0), geometry.positions)


def test_a_gradient_of_repeated_rows_is_pruned(simulated):
    """As that of a sum over positions, whose rows are all in one place."""
    geometry = LinearGeometry(150, 24, 40)
    x, weight = torch.randn(150, 24).half(), torch.randn(40, 24).half()
    dy = torch.randn(40).half().expand(150, 40)
    decision = decision_for({"prune": "magnitude"}, geometry)
    expected = ops.run(dy.contiguous(), x, weight, True, decision)
    for ours, theirs in zip(ops.run(dy, x, weight, True, decision), expected, strict=True):
        assert torch.equal(ours, theirs)


BOUND = [
    (name, config, shape)
    for name, shape in (("linear_wide", (3, 50, 72)), ("3x3", None))
    for config in (CONFIGS[0], CONFIGS[4], CONFIGS[7])
]


@pytest.mark.parametrize("weight_dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("splits", [1, 2])
@pytest.mark.parametrize(("name", "config", "shape"), BOUND, ids=str)
def test_one_call_gives_the_bits_of_three(simulated, monkeypatch, name, config, shape, splits, weight_dtype):
    """For everything that a backward may be asked for, with the partial sums of both products in its one block.

    The gradients of float32 parameters are not rounded, else they are the same.
    """
    geometry = GEOMETRIES[name]
    input_shape = shape or geometry.input_shape
    memory_format = torch.contiguous_format if shape else torch.channels_last
    x = torch.randn(input_shape).bfloat16().contiguous(memory_format=memory_format)
    weight = torch.randn(geometry.weight_shape).bfloat16().contiguous(memory_format=memory_format)
    dy = dense.layer_view(torch.randn(geometry.positions, geometry.out_channels).bfloat16(), geometry)
    if shape:
        dy = dy.view(*shape[:-1], geometry.out_channels)
    monkeypatch.setattr("sdgp_accel.philox.draw", lambda device: torch.tensor([7, -9]))
    dgrad, wgrad = (
        cutlass.BACKEND.tilings(geometry, name, torch.bfloat16, CPU)[0]._replace(splits=splits)
        for name in ("grad_input", "grad_weight")
    )
    if not shape:  # a convolution's dgrad is not split
        dgrad = dgrad._replace(splits=1)
    decision = decision_for(config, geometry)._replace(tilings=Tilings(dgrad, wgrad))
    bound = cutlass.BACKEND.bind(decision, Call(input_shape, torch.bfloat16, CPU, weight_dtype))
    for asked in ((x, weight, True), (None, weight, False), (x, None, True)):
        expected = ops.run(dy, *asked, decision)
        gradients = bound(dy, *asked)
        dtypes = torch.bfloat16, weight_dtype, weight_dtype
        for ours, theirs, dtype in zip(gradients, expected, dtypes, strict=True):
            assert (ours is None) == (theirs is None)
            if ours is not None:
                assert ours.dtype == dtype
                assert torch.equal(ours.bfloat16(), theirs)
                assert ours.stride() == theirs.stride()


def test_one_call_declines_what_it_was_not_made_for(simulated, monkeypatch):
    geometry = LinearGeometry(32, 16, 16)
    decision = decision_for({"prune": "magnitude"}, geometry)
    bound = cutlass.BACKEND.bind(decision, Call((32, 16), torch.bfloat16, CPU, torch.bfloat16))
    dy, x, weight = torch.randn(3, 32, 16).bfloat16()
    weight = weight[:16]
    assert bound(dy.t().contiguous().t(), x, weight, False) is None
    assert bound(dy, x.t().contiguous().t(), weight, False) is None
    shifted = torch.zeros(16 * 16 + 1, dtype=torch.bfloat16)[1:].view(16, 16)
    assert bound(dy, x, shifted, False) is None
    shifted = torch.zeros(32 * 16 + 1, dtype=torch.bfloat16)[1:].view(32, 16)
    assert bound(dy, shifted, weight, False) is None
    with monkeypatch.context() as patch:  # kernels would be launched on the device that is current
        patch.setattr(gpu, "current_device", lambda: 1)
        assert bound(dy, x, weight, False) is None
    contiguous = Conv2dGeometry.of((2, 16, 5, 5), (16, 16, 3, 3), (1, 1, 1, 1, 1, 1, 1), False)
    decision = decision._replace(geometry=contiguous)
    call = Call(contiguous.input_shape, torch.bfloat16, CPU, torch.bfloat16)
    assert cutlass.BACKEND.bind(decision, call) is None


@pytest.mark.parametrize("kind", ["linear", "conv2d"])
def test_float32_parameters_get_float32_gradients_under_autocast(simulated, monkeypatch, kind):
    """As they come from the accumulators: rounded they are those of 16-bit parameters."""
    monkeypatch.setattr(backends, "_no_sparse_tensor_cores", lambda device: None)
    backends.forget_decisions()
    config = SDGPConfig(prune="rescale_magnitude", scope="group", backend="cutlass")
    if kind == "linear":
        layer, x = SDGPLinear(72, 40, config=config), torch.randn(3, 50, 72)
    else:
        layer, x = SDGPConv2d(24, 40, 3, padding=1, config=config), torch.randn(2, 24, 9, 7)
        layer, x = layer.to(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last)
    halves = copy.deepcopy(layer).bfloat16()
    expected_y = halves(x.bfloat16())
    dy = torch.randn_like(expected_y)
    expected = torch.autograd.grad(expected_y, halves.parameters(), dy)
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16):
            y = layer(x)
        assert torch.equal(y, expected_y)
        for ours, theirs in zip(torch.autograd.grad(y, layer.parameters(), dy), expected, strict=True):
            assert ours.dtype == torch.float32
            assert torch.equal(ours.bfloat16(), theirs)
            assert not torch.equal(ours, theirs.float())
    backends.forget_decisions()
